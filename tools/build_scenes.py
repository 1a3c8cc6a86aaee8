"""Builds ldm/assets/scenes, the drawings of `data.path: scenes`.

    mkdir packages && cd packages
    for name in noto twemoji fluent-emoji-flat openmoji; do npm pack @iconify-json/$name; done
    for archive in *.tgz; do mkdir "${archive%.tgz}"; tar xzf "$archive" -C "${archive%.tgz}" --strip-components=1; done
    apt-get download openclipart-svg && dpkg-deb -x openclipart-svg_*.deb clipart
    pip install scour && cd ..
    python -m tools.build_scenes --packages packages --clipart packages/clipart/usr/share/openclipart/svg

In tools/scenes, things.yaml has the names, clipart.yaml the selected clip art, anchors.yaml and clipart_anchors.yaml
the positions of worn and held things. Writes drawings.json.xz and LICENSES.md, deterministically, and prints what is
left out and what has few drawings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ldm import disk
from tools import scenes_clipart, scenes_svg
from tools.scenes_vocabulary import read_things

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "scenes"
MAX_BYTES = 6_000_000  # bytes of drawings.json.xz
MAX_CHARACTERS = 80_000  # of a drawing; excludes traced photographs
FORMAT = 1
_EMAIL = re.compile(r"\s*[(<]?[\w.+-]+@[\w.-]+[)>]?")

# Package, name in captions, and attribution.
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


MIT = """
MIT License. Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and
this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED
"AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
CLIPART = {
    "name": "clipart",
    "style": "clip art",
    "title": "Open Clip Art Library",
    "version": "0.18, Debian openclipart-svg 1:0.18+dfsg-19",
    "license": "public domain",
    "license_url": "https://creativecommons.org/licenses/publicdomain/",
    "source": "https://openclipart.org",
    "attribution": "Open Clip Art Library, dedicated to the public domain by its authors, who are named below.",
}


class DrawingCache:
    """A cache file of converted drawings, as their conversion takes minutes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._code = b"".join(Path(module.__file__).read_bytes() for module in (scenes_svg, scenes_clipart))
        self._known: dict[str, str] = _json(path) if path and path.exists() else {}

    def __call__(self, make: Callable[[str], str], text: str) -> str:
        key = hashlib.sha256(self._code + text.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = make(text)
            if len(self._known) % 100 == 0:
                self.save()
        return self._known[key]

    def save(self) -> None:
        if self._path:
            disk.write_text(self._path, json.dumps(self._known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the unpacked npm packages")
    parser.add_argument("--clipart", type=Path, help="folder `svg` of Debian's openclipart-svg; without it, emoji only")
    parser.add_argument("--cache", type=Path, help="cache file of converted drawings")
    parser.add_argument("--out", type=Path, default=ROOT / "ldm/assets/scenes")
    arguments = parser.parse_args()
    things = read_things(HERE / "things.yaml")
    anchors = _anchors(HERE / "anchors.yaml")
    clipart_anchors = _anchors(HERE / "clipart_anchors.yaml")
    anchors |= {f"clipart/{path.removesuffix('.svg')}": places for path, places in clipart_anchors.items()}
    cache = DrawingCache(arguments.cache)
    families: list[dict[str, str]] = []
    drawings: list[dict[str, Any]] = []
    for family in FAMILIES:
        package = _package(arguments.packages, FAMILIES[family][0])
        families.append(_family(family, package))
        drawings += _emoji(family, package, things, cache)
    if arguments.clipart:
        families.append(CLIPART)
        drawings += _clipart(arguments.clipart, things, cache)
    cache.save()
    for drawing in drawings:
        drawing["anchors"] = anchors.pop(drawing["id"], {})
        drawing["colors"] = scenes_svg.colors(drawing["svg"])
    if anchors and arguments.clipart:
        raise ValueError(f"anchors without a drawing: {', '.join(sorted(anchors))}")
    bare = {thing["name"] for thing in things} - {drawing["thing"] for drawing in drawings}
    if bare and arguments.clipart:
        raise ValueError(f"things.yaml: nothing draws {', '.join(sorted(bare))}")
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


def _emoji(family: str, package: Path, things: list[dict[str, Any]], cache: DrawingCache) -> Iterator[dict[str, Any]]:
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
            # Some families use one drawing for several code points.
            if icon is None or icon["body"] in seen:
                continue
            seen.add(icon["body"])
            box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
            whole = scenes_svg.document(icon["body"], (box[0], box[1], box[2], box[3]))
            svg = cache(scenes_svg.shorten, whole)
            yield _drawing(f"{family}/{code}", thing["name"], family, svg)


def _clipart(folder: Path, things: list[dict[str, Any]], cache: DrawingCache) -> Iterator[dict[str, Any]]:
    """The drawings of clipart.yaml, in the order of the things; invalid ones are reported and left out."""
    listed = yaml.safe_load((HERE / "clipart.yaml").read_text(encoding="utf-8"))
    if unknown := sorted(set(listed) - {thing["name"] for thing in things}):
        raise ValueError(f"clipart.yaml: no such thing in things.yaml: {', '.join(unknown)}")
    for thing in things:
        for path in listed.get(thing["name"], []):
            source = (folder / path).read_bytes()
            try:
                svg = cache(scenes_clipart.plain, source.decode("utf-8", errors="replace"))
            except ValueError as error:
                print(f"{path} is left out: {error}")
                continue
            if len(svg) > MAX_CHARACTERS:
                print(f"{path} is left out: {len(svg):,} characters")
                continue
            words = {key: _EMAIL.sub("", text) for key, text in scenes_clipart.title_and_author(source).items()}
            yield _drawing(f"clipart/{path.removesuffix('.svg')}", thing["name"], "clipart", svg, **words)


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
    if len(packed) > MAX_BYTES:
        raise ValueError(f"drawings.json.xz would take {len(packed):,} bytes; the limit is {MAX_BYTES:,}")
    out.mkdir(parents=True, exist_ok=True)
    with disk.new_file(out / "drawings.json.xz") as aside:
        aside.write_bytes(packed)
    disk.write_text(out / "LICENSES.md", _licenses(families, drawings))
    print(f"{len(things)} things, {len(drawings)} drawings, {len(text):,} characters, {len(packed):,} bytes")


def _licenses(families: list[dict[str, str]], drawings: list[dict[str, Any]]) -> str:
    lines = [
        "# The drawings of `scenes`",
        "",
        "`drawings.json.xz` holds drawings of these collections, each under its own license. They were changed:",
        "cropped to what is drawn, numbers rounded. `tools/build_scenes.py` makes the file.",
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
    lines += [
        "",
        "The text of the Apache License 2.0 is that of the package's own LICENSE file. Fluent Emoji:",
        "",
        "Copyright (c) Microsoft Corporation.",
        MIT.strip(),
    ]
    authors = Counter(drawing.get("author", "unknown") for drawing in drawings if drawing["family"] == "clipart")
    if authors:
        named = ", ".join(
            f"{name} ({count})" for name, count in sorted(authors.items(), key=lambda one: one[0].lower())
        )
        lines += ["", "Authors of the clip art, with the number of drawings:", "", *textwrap.wrap(named, 120)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
