"""Builds ldm/assets/scenes: the drawings that `data.path: scenes` composes its pictures of, in one file.

    mkdir packages && cd packages
    for name in noto twemoji fluent-emoji-flat openmoji; do npm pack @iconify-json/$name; done
    for archive in *.tgz; do mkdir "${archive%.tgz}" && tar xzf "$archive" -C "${archive%.tgz}" --strip-components=1; done
    cd .. && python tools/build_scenes.py --packages packages

The words are in tools/scenes/things.yaml, the places where a thing is worn or held in tools/scenes/anchors.yaml. The same
inputs give the same bytes. Writes drawings.json.xz and LICENSES.md, and prints what is missing.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scenes_svg
import yaml
from scenes_vocabulary import read_things

from ldm import disk

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "scenes"
LIMIT = 6_000_000  # bytes of drawings.json.xz
FORMAT = 1

# Package, name in captions, and what the license asks to be said.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "noto": ("noto", "noto", "Noto Emoji, © Google LLC and contributors, Apache License 2.0."),
    "twemoji": (
        "twemoji",
        "twemoji",
        "Twemoji, © 2020 Twitter, Inc. and other contributors (2022 on: jdecked), graphics under CC BY 4.0.",
    ),
    "fluent": ("fluent-emoji-flat", "fluent", "Fluent Emoji, © Microsoft Corporation, MIT License."),
    "openmoji": (
        "openmoji",
        "openmoji",
        "OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked npm packages")
    parser.add_argument("--out", type=Path, default=ROOT / "ldm/assets/scenes")
    arguments = parser.parse_args()
    things = read_things(HERE / "things.yaml")
    anchors = _anchors(HERE / "anchors.yaml")
    families, drawings = [], []
    for family in FAMILIES:
        package = _package(arguments.packages, FAMILIES[family][0])
        families.append(_family(family, package))
        drawings += _emoji(family, package, things)
    for drawing in drawings:
        drawing["anchors"] = anchors.pop(drawing["id"], {})
    if anchors:
        raise ValueError(f"anchors.yaml: no such drawing: {', '.join(sorted(anchors))}")
    _write(arguments.out, families, things, drawings)


def _package(folder: Path, name: str) -> Path:
    found = sorted(
        path.parent
        for path in folder.glob("*/package.json")
        if json.loads(path.read_text(encoding="utf-8"))["name"] == f"@iconify-json/{name}"
    )
    if not found:
        raise ValueError(f"{folder}: no @iconify-json/{name}; `npm pack` it and unpack it there")
    return found[-1]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _anchors(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def _family(name: str, package: Path) -> dict[str, str]:
    info, version = _json(package / "info.json"), _json(package / "package.json")["version"]
    return {
        "name": name,
        "style": FAMILIES[name][1],
        "title": info["name"],
        "version": f"@iconify-json/{FAMILIES[name][0]} {version}",
        "license": info["license"]["spdx"],
        "license_url": info["license"]["url"],
        "source": info["author"]["url"],
        "attribution": FAMILIES[name][2],
    }


def _emoji(family: str, package: Path, things: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The drawings of a family, in the order of the things."""
    icons, names = _json(package / "icons.json"), _json(package / "chars.json")
    for thing in things:
        seen: set[str] = set()
        for listed in thing["emoji"]:
            only, _, code = listed.rpartition("/")
            if only not in ("", family):
                continue
            name = names.get(code.lower().replace("-fe0f", ""))
            icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
            # Some families draw two code points alike.
            if icon is None or icon["body"] in seen:
                continue
            seen.add(icon["body"])
            box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
            svg = scenes_svg.shortened(scenes_svg.cropped(icon["body"], (box[0], box[1], box[2], box[3])))
            yield _drawing(f"{family}/{code}", thing["name"], family, svg)


def _drawing(identity: str, thing: str, family: str, svg: str, **more: str) -> dict[str, Any]:
    width, height = scenes_svg.view_box(svg)[2:]
    return {"id": identity, "thing": thing, "family": family, "ratio": round(width / height, 3), **more, "svg": svg}


def _write(
    out: Path, families: list[dict[str, str]], things: list[dict[str, Any]], drawings: list[dict[str, Any]]
) -> None:
    drawn = {(drawing["thing"], drawing["family"]) for drawing in drawings}
    counts = {thing["name"]: sum((thing["name"], family["name"]) in drawn for family in families) for thing in things}
    for thing in things:
        if counts[thing["name"]] < 3:
            print(f"{thing['name']} (tier {thing['tier']}): {counts[thing['name']]} families")
    content = {"format": FORMAT, "families": families, "things": things, "drawings": drawings}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > LIMIT:
        raise ValueError(f"drawings.json.xz would take {len(packed):,} bytes; the limit is {LIMIT:,}")
    out.mkdir(parents=True, exist_ok=True)
    with disk.new_file(out / "drawings.json.xz") as aside:
        aside.write_bytes(packed)
    disk.write_text(out / "LICENSES.md", _licenses(families, drawings))
    print(f"{len(things)} things, {len(drawings)} drawings, {len(text):,} characters, {len(packed):,} bytes")


def _licenses(families: list[dict[str, str]], drawings: list[dict[str, Any]]) -> str:
    lines = [
        "# The drawings of `scenes`",
        "",
        "`drawings.json.xz` holds drawings of these collections, each under its own license. They were changed: cropped to",
        "what is drawn, numbers rounded. `tools/build_scenes.py` makes the file.",
        "",
        "| family | collection | drawings | license | source | attribution |",
        "|---|---|---|---|---|---|",
    ]
    for family in families:
        count = sum(drawing["family"] == family["name"] for drawing in drawings)
        license_link = f"[{family['license']}]({family['license_url']})"
        lines.append(
            f"| {family['name']} | {family['title']} ({family['version']}) | {count} | {license_link} | "
            f"{family['source']} | {family['attribution']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
