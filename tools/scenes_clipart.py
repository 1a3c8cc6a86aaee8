"""Open Clip Art as plain SVG, without data of editors, and its titles and authors."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np

from tools import scenes_svg

_PURE = {"rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "dc": "http://purl.org/dc/elements/1.1/"}
_UNITS = {"": 1.0, "px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}
_TEXT = re.compile(r"<(text|flowRoot)\b(?:[^>]*/>|.*?</\1>)", re.S)
_ROOT = re.compile(r"<svg\b[^>]*>", re.S)


def plain(source: str) -> str:
    """The text of an SVG file → a short, cropped SVG that looks the same.

    Raises:
        ValueError: if resvg cannot render it.
    """
    import scour  # noqa: F401  # fail early if it is not installed

    whole = scenes_svg.document(*_body(source))
    try:
        cleaned = scenes_svg.document(*_body(_scoured(source)))
    except Exception:  # scour fails on a few, with many types
        return scenes_svg.shorten(_TEXT.sub("", whole))
    # Use scour's result if it looks the same.
    first, second = (scenes_svg.render(svg, 128).astype(np.float32) for svg in (whole, cleaned))
    same = first.shape == second.shape and np.abs(first - second).mean() < 1
    # Text would depend on the fonts of the machine.
    return scenes_svg.shorten(_TEXT.sub("", cleaned if same else whole))


def _scoured(source: str) -> str:
    from scour import scour

    options = scour.sanitizeOptions(None)
    options.remove_metadata = options.remove_descriptive_elements = options.strip_comments = True
    options.strip_xml_prolog = options.strip_ids = options.shorten_ids = True
    options.indent_type, options.newlines = "none", False
    options.quiet = True
    return str(scour.scourString(source, options)).strip()


def _body(source: str) -> tuple[str, tuple[float, float, float, float]]:
    """(the content of the root in a group with its style, the view box)."""
    root = _ROOT.search(source)
    if root is None:
        raise ValueError("no root element")
    # Entities that Illustrator declares for namespaces.
    for name, value in re.findall(r'<!ENTITY\s+(\S+)\s+"([^"]*)"', source[: root.start()]):
        source = source.replace(f"&{name};", value)
    root = _ROOT.search(source)
    assert root
    attributes = dict(re.findall(r'([\w:-]+)\s*=\s*"([^"]*)"', root[0]))
    body = source[root.end() : source.rindex("</svg>")].strip()
    namespaces = "".join(f' {k}="{v}"' for k, v in attributes.items() if k.startswith("xmlns:") and k[6:] + ":" in body)
    style = "".join(
        f' {key}="{value}"'
        for key, value in attributes.items()
        if re.match(r"fill|stroke|style|opacity|font|color", key) and not key.startswith("xmlns")
    )
    namespaces = namespaces.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    if style or namespaces:
        body = f"<g{namespaces}{style}>{body}</g>"
    return body, _box(attributes)


def _box(attributes: dict[str, str]) -> tuple[float, float, float, float]:
    if "viewBox" in attributes:
        x, y, width, height = map(float, re.split(r"[\s,]+", attributes["viewBox"].strip()))
        return x, y, width, height
    sides = []
    for key in ("width", "height"):
        found = re.fullmatch(r"([\d.eE+-]+)\s*([a-z]*)", attributes.get(key, "100"))
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"{key}={attributes.get(key)} is no length")
        sides.append(float(found[1]) * _UNITS[found[2]])
    return 0.0, 0.0, sides[0], sides[1]


def title_and_author(source: bytes) -> dict[str, str]:
    """`title` and `author`, if the metadata of a file have them."""
    try:
        root = ET.fromstring(source)
    except ET.ParseError:
        return {}
    work = next((node for node in root.iter() if node.tag.endswith("}Work")), None)
    if work is None:
        return {}
    title = work.findtext("dc:title", "", _PURE)
    author = work.find("dc:creator", _PURE)
    agent = "" if author is None else "".join(author.itertext())
    words = {"title": " ".join(title.split()), "author": " ".join(agent.split())}
    return {key: value for key, value in words.items() if value}
