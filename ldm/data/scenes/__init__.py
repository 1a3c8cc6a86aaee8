"""Scenes: the things they show (`ldm/assets/scenes`, made by `tools/build_scenes.py`), what these wear and hold, their
relation and background, and which concepts are held out.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.rng import content_hash, pick
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
        # A hand has a side ("left", "right") instead of a width.
        anchors = {
            name: Anchor(*(float(value) for value in values if not isinstance(value, str)))
            for name, values in entry.get("anchors", {}).items()
        }
        drawing = Drawing(entry["id"], entry["family"], entry["svg"], anchors, tuple(entry.get("colors", ())))
        drawings.setdefault(entry["thing"], []).append(drawing)
    things = [
        Thing(
            name=entry["name"],
            forms={word: (article, plural) for word, (article, plural) in entry["forms"].items()},
            group=entry["group"],
            tier=entry["tier"],
            synonyms=tuple(entry.get("synonyms") or ()),
            kinds=tuple(entry.get("kinds") or ()),
            classes=tuple(entry.get("classes") or ()),
            colors=tuple(entry.get("color") or ()),
            tint=bool(entry.get("tint")),
            wears=entry.get("wears"),
            held=bool(entry.get("held")),
            is_character=bool(entry.get("bearer")),
            stands=entry.get("stands", "any"),
            drawings=tuple(drawings[entry["name"]]),
        )
        for entry in content["things"]
    ]
    return Catalog(tuple(sorted(things, key=lambda thing: thing.name)), content_hash(packed))


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


ConceptKind = Literal["color", "relation", "worn", "synonym", "phrasing"]
HELD_OUT_FRACTIONS = {"color": 0.1, "relation": 0.1, "worn": 0.1, "synonym": 0.05, "phrasing": 0.1}
# Relations, and the equivalent ones with exchanged things that are used as keys.
INVERSE_RELATIONS = {"right of": "left of", "under": "above", "behind": "in front of"}


class Concept(NamedTuple):
    """A property of a scene or a caption that may be held out of training."""

    kind: ConceptKind
    names: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether no training scene has it; a function of its names."""
        key = "\0".join(("scenes", self.kind, *self.names)).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return number / 2**64 < HELD_OUT_FRACTIONS[self.kind]


def relation_concept(first: str, how: str, second: str) -> Concept:
    """The concept of `first` being `how` (one of `RELATIONS`) `second`."""
    if how in INVERSE_RELATIONS:
        first, how, second = second, INVERSE_RELATIONS[how], first
    elif how == "next to":
        first, second = sorted((first, second))
    return Concept("relation", (first, how, second))


SceneKind = Literal["one", "count", "pair", "three", "worn", "held", "worn pair"]
Size = Literal["small", "big"]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
RELATIONS = ("left of", "right of", "above", "under", "next to", "in front of", "behind")
PLACES = ("grass", "sea", "night sky")
# Fractions of the scenes that are not single things.
KIND_FRACTIONS: dict[SceneKind, float]
KIND_FRACTIONS = {"count": 0.2, "pair": 0.34, "three": 0.06, "worn": 0.22, "held": 0.1, "worn pair": 0.08}
RELATION_FRACTIONS = (0.17, 0.13, 0.14, 0.12, 0.24, 0.11, 0.09)
# The fraction of single things falls slowly, until they are known, and is then low, so that the others are learned.
INITIAL_SINGLES, DECREASE_OF_SINGLES, FINAL_SINGLES = 0.75, 0.5e-6, 0.3
FEW_SINGLES_FROM = 38 * 4096  # number of the scene


@dataclass(frozen=True)
class Part:
    """A thing in a scene.

    Args:
        color: of the tint; None keeps its own colors.
        worn, held: parts attached to it.
        mirrored: flipped horizontally, with attached parts.
    """

    thing: Thing
    drawing: Drawing
    color: str | None = None
    size: Size | None = None
    worn: Part | None = None
    held: Part | None = None
    mirrored: bool = False

    @property
    def shown_color(self) -> str | None:
        """The visible color: the tint, or the main color of a tintable thing."""
        if self.color is not None or not self.thing.tint:
            return self.color
        return self.drawing.colors[0] if self.drawing.colors else None


@dataclass(frozen=True)
class Scene:
    """The content of a scene, without exact positions.

    Args:
        parts: one thing; two in a relation; three from left to right.
        relation: of the first of two things to the second.
        count: repetitions of the only part, 1 to 5.
        background: one of `COLORS` or `PLACES`, or "" for white.
    """

    kind: SceneKind
    parts: tuple[Part, ...]
    relation: str = ""
    count: int = 1
    background: str = ""

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """`parts`, each followed by its attached parts."""
        return tuple(one for part in self.parts for one in (part, part.worn, part.held) if one is not None)

    @property
    def family(self) -> str | None:
        """The common style of all drawings; None if they differ."""
        families = {part.drawing.family for part in self.all_parts}
        return families.pop() if len(families) == 1 else None

    def concepts(self) -> list[Concept]:
        """All concepts of the scene."""
        concepts = [
            Concept("color", (part.thing.name, color))
            for part in self.all_parts
            if (color := part.shown_color) is not None and color not in part.thing.colors
        ]
        concepts += [Concept("worn", (part.thing.name, part.worn.thing.name)) for part in self.parts if part.worn]
        names = [part.thing.name for part in self.parts]
        if self.kind == "three":
            concepts += [relation_concept(names[a], "left of", names[b]) for a, b in ((0, 1), (1, 2), (0, 2))]
            concepts += [relation_concept(names[a], "next to", names[b]) for a, b in ((0, 1), (1, 2))]
        elif len(names) == 2:
            concepts.append(relation_concept(names[0], self.relation, names[1]))
            if self.relation in ("left of", "right of"):
                concepts.append(relation_concept(names[0], "next to", names[1]))
        return concepts


class SceneSampler:
    """Samples scenes of the things of a catalog, up to a tier."""

    def __init__(self, catalog: Catalog, tier: int = 1) -> None:
        self.things = [thing for thing in catalog.things if thing.tier <= tier]
        characters = [thing for thing in self.things if thing.is_character]
        self.characters = [thing for thing in characters if any(drawing.anchors for drawing in thing.drawings)]
        self.worn = [thing for thing in self.things if thing.wears is not None]
        self.held = [thing for thing in self.things if thing.held]
        self.tinted = [thing for thing in self.things if thing.tint]
        self.families = sorted({drawing.family for thing in self.things for drawing in thing.drawings})

    def sample(self, rng: np.random.Generator, number: int) -> Scene:
        """Training scene `number`, ≥ 0, without held-out concepts."""
        singles = INITIAL_SINGLES - DECREASE_OF_SINGLES * number if number < FEW_SINGLES_FROM else FINAL_SINGLES
        kind: SceneKind = "one"
        if rng.random() >= singles:
            kind = list(KIND_FRACTIONS)[int(rng.choice(len(KIND_FRACTIONS), p=list(KIND_FRACTIONS.values())))]
        while True:
            scene = self.sample_kind(kind, rng)
            if not any(concept.is_held_out for concept in scene.concepts()):
                return scene

    def sample_kind(self, kind: SceneKind, rng: np.random.Generator) -> Scene:
        """A scene of a kind, with or without held-out concepts."""
        family = None if rng.random() < 0.25 else pick(self.families, rng)  # None mixes styles
        parts: tuple[Part, ...]
        if kind == "one":
            parts = (self._part(pick(self.things, rng), family, rng, colored=0.3, sized=0.15),)
            return self._on_background(Scene(kind, parts), rng)
        if kind == "count":
            counted = [thing for thing in self.things if thing.plural]
            part = self._part(pick(counted, rng), family, rng, colored=0.15)
            return self._on_background(Scene(kind, (part,), count=int(rng.integers(2, 6))), rng)
        if kind == "three":
            chosen = _some(self.things, 3, rng)
            parts = tuple(self._part(thing, family, rng, colored=0.15) for thing in chosen)
            return self._on_background(Scene(kind, parts), rng)
        if kind == "worn":
            return self._on_background(Scene(kind, (self._wearing(family, rng),)), rng)
        if kind == "held":
            able = [thing for thing in self.characters if any("hand" in drawing.anchors for drawing in thing.drawings)]
            held = pick(self.held, rng)
            holder = pick([thing for thing in able if thing is not held], rng)
            anchored = [drawing for drawing in holder.drawings if "hand" in drawing.anchors]
            first = self._on(holder, anchored, family, rng)
            first = replace(first, held=replace(self._part(held, family, rng, colored=0.25), mirrored=False))
            return self._on_background(Scene(kind, (first,)), rng)
        how = RELATIONS[int(rng.choice(len(RELATIONS), p=RELATION_FRACTIONS))]
        if kind == "worn pair":
            first = self._wearing(family, rng)
            others = [thing for thing in self.things if thing not in (first.thing, first.worn and first.worn.thing)]
            parts = (first, self._part(pick(others, rng), family, rng, colored=0.2))
        else:
            both = rng.random() < 0.4  # two colors in 40 %, as attribute binding is hardest to learn
            chosen = _some(self.tinted if both else self.things, 2, rng)
            parts = tuple(self._part(thing, family, rng, colored=1.0 if both else 0.15) for thing in chosen)
            if rng.random() < 0.1:
                parts = (replace(parts[0], size="big"), replace(parts[1], size="small"))
        if rng.random() < 0.5:
            parts = parts[::-1]
        return self._on_background(Scene(kind, parts, how), rng)

    def _part(
        self, thing: Thing, family: str | None, rng: np.random.Generator, *, colored: float = 0.0, sized: float = 0.0
    ) -> Part:
        drawings = [drawing for drawing in thing.drawings if drawing.family == family]
        color = pick(COLORS, rng) if thing.tint and rng.random() < colored else None
        size: Size | None = None
        if rng.random() < sized:
            size = "small" if rng.random() < 0.6 else "big"
        drawing = pick(drawings, rng) if drawings else _by_family(thing.drawings, rng)
        return Part(thing, drawing, color, size, mirrored=bool(rng.random() < 0.5))

    def _wearing(self, family: str | None, rng: np.random.Generator) -> Part:
        worn = pick(self.worn, rng)
        wearer = pick([thing for thing in self.characters if thing.can_wear(worn) and thing is not worn], rng)
        anchored = [drawing for drawing in wearer.drawings if worn.anchor in drawing.anchors]
        part = self._on(wearer, anchored, family, rng)
        return replace(part, worn=replace(self._part(worn, family, rng, colored=0.35), mirrored=False))

    def _on(self, wearer: Thing, anchored: Sequence[Drawing], family: str | None, rng: np.random.Generator) -> Part:
        of_family = [drawing for drawing in anchored if drawing.family == family]
        part = self._part(wearer, family, rng, colored=0.12)
        return replace(part, drawing=pick(of_family, rng) if of_family else _by_family(anchored, rng))

    def _on_background(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Adds a background with contrast to all parts."""
        background = ""
        chance = rng.random()
        if chance < 0.18:
            background = pick(COLORS, rng)
        elif chance < 0.33:
            background = pick(PLACES, rng)
        tints = {part.color for part in scene.all_parts}
        own = {color for part in scene.all_parts if part.color is None for color in part.drawing.colors[:1]}
        while invisible_colors(background) & (tints | own):
            if "white" in own and background == "" and "white" not in tints:
                break  # white drawings have outlines
            background = pick(COLORS, rng)
        return replace(scene, background=background)


def invisible_colors(background: str) -> set[str]:
    """Colors without contrast to a background."""
    return {"": {"white"}, "grass": {"green"}, "sea": {"blue"}, "night sky": {"black"}}.get(background, {background})


def _some(things: Sequence[Thing], count: int, rng: np.random.Generator) -> list[Thing]:
    return [things[int(place)] for place in rng.choice(len(things), count, replace=False)]


def _by_family(drawings: Sequence[Drawing], rng: np.random.Generator) -> Drawing:
    """A random drawing of a random family; clip art counts twice."""
    families = sorted({drawing.family for drawing in drawings})
    weights = np.array([2.0 if family == CLIP_ART else 1.0 for family in families])
    family = families[int(rng.choice(len(families), p=weights / weights.sum()))]
    return pick([drawing for drawing in drawings if drawing.family == family], rng)
