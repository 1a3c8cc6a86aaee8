"""The things of scenes and their drawings, from `ldm/assets/scenes` (made by `tools/build_scenes.py`)."""

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
CLIP_ART = "clipart"  # the family with drawings of many styles

Place = Literal["head", "face", "neck"]


@dataclass(frozen=True)
class Anchor:
    """Where to attach something to a drawing, in fractions of its box from the top left.

    `width` of the head, eyes or neck, 0 for a hand; `angle` in degrees, clockwise.
    """

    x: float
    y: float
    width: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True, eq=False)
class Drawing:
    """One SVG of a thing: its style family, anchors by name, and main colors."""

    id: str
    family: str
    svg: str
    anchors: Mapping[str, Anchor]
    colors: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Thing:
    """A thing that scenes show.

    Args:
        name: without an article.
        forms: article ("a", "an" or "") and plural ("" for none) of each of its names.
        group: "animal", "face", "food" …
        tier: 1 for the most common third of all things, else 2.
        synonyms: equivalent names; `kinds` are narrower, `classes` broader ones.
        colors: its usual colors, which are never held out.
        tint: whether it can have any color.
        wears: where it is worn, if at all.
        held: whether a hand can hold it.
        is_character: whether it can wear or hold things.
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
        """The plural of its name; "" if it has none."""
        return self.forms[self.name][1]

    @property
    def anchor(self) -> str | None:
        """The name of the anchor where it is worn."""
        return "eyes" if self.wears == "face" else self.wears

    def can_wear(self, thing: Thing) -> bool:
        """Whether a drawing has the anchor for `thing`."""
        return any(thing.anchor in drawing.anchors for drawing in self.drawings)


@dataclass(frozen=True)
class Catalog:
    """All things in the order of their names, and a hash of the file."""

    things: tuple[Thing, ...]
    digest: str

    def thing(self, name: str) -> Thing:
        """The thing of that name. Raises ValueError if there is none."""
        for thing in self.things:
            if thing.name == name:
                return thing
        raise ValueError(f'scenes have no thing named "{name}"')


@cache
def load_catalog() -> Catalog:
    """The catalog of the package."""
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
    # A hand has a side ("left", "right") instead of a width.
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
    """A drawing as RGBA, uint8 [h, w, 4], with `side` pixels on its longer side."""
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=drawing.svg, width=side, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.height > side:
        png = svg_to_bytes(svg_string=drawing.svg, height=side, skip_system_fonts=True)
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    pixels = np.asarray(image)
    pixels.setflags(write=False)
    return pixels
