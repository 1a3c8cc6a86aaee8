"""The things that scenes show, and the drawings of each: `ldm/assets/scenes`, made by `tools/build_scenes.py`."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ldm.data.rng import content_hash
from ldm.data.sources import require

PATH = Path(__file__).parents[2] / "assets" / "scenes" / "drawings.json.xz"
CLIP_ART = "clipart"  # the family of many hands; the others are each of one

Place = Literal["head", "face", "neck"]


@dataclass(frozen=True)
class Anchor:
    """Where something is fixed to a drawing, in shares of its box from the top left; `angle` in degrees, clockwise.

    `width` is that of the head, eyes or neck; 0 for a hand.
    """

    x: float
    y: float
    width: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True, eq=False)
class Drawing:
    """One picture of a thing: an SVG that fills its box, the family of its style, anchors by name, and the colors that
    most of it has, the main one first.
    """

    id: str
    family: str
    svg: str
    anchors: Mapping[str, Anchor]
    colors: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Thing:
    """What a noun names.

    Args:
        name: without an article.
        forms: of every word for it, its article ("a", "an", or "" as in "broccoli") and its plural ("" for none).
        group: "animal", "face", "food" …
        tier: 1 for the most common third of all things, else 2.
        synonyms: other names of the same thing; `kinds` are narrower words that it can stand for, `classes` broader.
        colors: those that it usually has; with them it is never held out.
        tint: whether it can have any color.
        wears: where it is worn, if at all.
        held: whether a hand can hold it.
        is_character: whether it can wear or hold something.
        stands: "ground", "sky", "water" or "any".
    """

    name: str
    forms: Mapping[str, tuple[str, str]]
    group: str
    tier: int
    synonyms: tuple[str, ...]
    kinds: tuple[str, ...]
    classes: tuple[str, ...]
    colors: tuple[str, ...]
    tint: bool
    wears: Place | None
    held: bool
    is_character: bool
    stands: str
    drawings: tuple[Drawing, ...]

    @property
    def plural(self) -> str:
        """Of its name; "" where it has none."""
        return self.forms[self.name][1]

    @property
    def anchor(self) -> str | None:
        """The name of the anchor that it is fixed to where it is worn."""
        return "eyes" if self.wears == "face" else self.wears

    def can_wear(self, thing: Thing) -> bool:
        """Whether some drawing has the anchor that `thing` needs."""
        return any(thing.anchor in drawing.anchors for drawing in self.drawings)


@dataclass(frozen=True)
class Catalog:
    """All things in the order of their names, and what names this version of them."""

    things: tuple[Thing, ...]
    digest: str

    def thing(self, name: str) -> Thing:
        """The thing of that name; ValueError if there is none."""
        for thing in self.things:
            if thing.name == name:
                return thing
        raise ValueError(f'scenes have no thing named "{name}"')


@cache
def load_catalog() -> Catalog:
    """The catalog that comes with the package."""
    require("scenes", "resvg_py")
    packed = PATH.read_bytes()
    content = json.loads(lzma.decompress(packed))
    drawings: dict[str, list[Drawing]] = {}
    for entry in content["drawings"]:
        anchors = {name: _anchor(values) for name, values in entry.get("anchors", {}).items()}
        drawing = Drawing(entry["id"], entry["family"], entry["svg"], anchors, tuple(entry.get("colors", ())))
        drawings.setdefault(entry["thing"], []).append(drawing)
    things = [_thing(entry, tuple(drawings[entry["name"]])) for entry in content["things"]]
    return Catalog(tuple(sorted(things, key=lambda thing: thing.name)), content_hash(packed))


def _anchor(values: list[float | str]) -> Anchor:
    # A hand has a side, "left" or "right", where the others have a width.
    return Anchor(*(float(value) for value in values if not isinstance(value, str)))


def _thing(entry: dict[str, Any], drawings: tuple[Drawing, ...]) -> Thing:
    def words(key: str) -> tuple[str, ...]:
        return tuple(str(word) for word in entry.get(key) or ())

    return Thing(
        name=str(entry["name"]),
        forms={word: (str(article), str(plural)) for word, (article, plural) in entry["forms"].items()},
        group=str(entry["group"]),
        tier=int(entry["tier"]),
        synonyms=words("synonyms"),
        kinds=words("kinds"),
        classes=words("classes"),
        colors=words("color"),
        tint=bool(entry.get("tint")),
        wears=entry.get("wears"),
        held=bool(entry.get("held")),
        is_character=bool(entry.get("bearer")),
        stands=str(entry.get("stands", "any")),
        drawings=drawings,
    )


@lru_cache(maxsize=6000)
def rasterize(drawing: Drawing, side: int) -> np.ndarray:
    """A drawing whose longer side has `side` pixels: uint8 [h, w, 4], red, green, blue and opacity."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=drawing.svg, width=side, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.height > side:
        png = svg_to_bytes(svg_string=drawing.svg, height=side, skip_system_fonts=True)
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    pixels = np.asarray(image)
    pixels.setflags(write=False)
    return pixels
