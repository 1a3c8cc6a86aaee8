"""What a scene shows: things, what they wear and hold, where they stand, on what ground. Drawn by `draw`, told by
`captions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from ldm.data.scenes.catalog import CLIP_ART, Catalog, Drawing, Thing
from ldm.data.scenes.held_out import Fact, relation

Kind = Literal["one", "count", "pair", "three", "worn", "held", "worn pair"]
Size = Literal["small", "big"]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
RELATIONS = ("left of", "right of", "above", "under", "next to", "in front of", "behind")
PLACES = ("grass", "sea", "night sky")
# Shares of scenes, of those that show more than one thing alone.
SHARES: dict[Kind, float] = {"count": 0.2, "pair": 0.34, "three": 0.06, "worn": 0.22, "held": 0.1, "worn pair": 0.08}
RELATION_SHARES = (0.17, 0.13, 0.14, 0.12, 0.24, 0.11, 0.09)
# Things are learned before scenes (measured: layout is learned within 50,000 samples, things need a million): the share
# of single things falls from FIRST_ONES to LAST_ONES over SETTLED scenes.
FIRST_ONES, LAST_ONES, SETTLED = 0.75, 0.45, 600_000

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A thing in a scene.

    Args:
        color: what it is tinted in; None leaves its own colors.
        worn, held: what is on it.
        mirrored: left and right exchanged, with all that is on it.
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
        """The color that is seen: the tint, or the main one of a drawing whose thing may have any."""
        if self.color is not None or not self.thing.tint:
            return self.color
        return self.drawing.colors[0] if self.drawing.colors else None


@dataclass(frozen=True)
class Scene:
    """Everything that a scene shows, except for the few pixels by which things are moved about.

    Args:
        parts: one thing; two in a relation; three from left to right.
        how: of two things, where the first stands to the second.
        count: how often the only part is there, 1 to 5.
        background: a color of `COLORS`, one of `PLACES`, or "" for white.
    """

    kind: Kind
    parts: tuple[Part, ...]
    how: str = ""
    count: int = 1
    background: str = ""

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """`parts`, and after each what it wears and holds."""
        return tuple(one for part in self.parts for one in (part, part.worn, part.held) if one is not None)

    @property
    def family(self) -> str | None:
        """The style that all drawings share; None where they are of several."""
        families = {part.drawing.family for part in self.all_parts}
        return families.pop() if len(families) == 1 else None

    def facts(self) -> list[Fact]:
        """All combinations that can be seen, of kinds that may be held out."""
        facts = [
            Fact("color", (part.thing.name, color))
            for part in self.all_parts
            if (color := part.shown_color) is not None and color not in part.thing.colors
        ]
        facts += [Fact("worn", (part.thing.name, part.worn.thing.name)) for part in self.parts if part.worn is not None]
        names = [part.thing.name for part in self.parts]
        if self.kind == "three":
            for first, second in ((0, 1), (1, 2), (0, 2)):
                facts.append(relation(names[first], "left of", names[second]))
            facts += [relation(names[0], "next to", names[1]), relation(names[1], "next to", names[2])]
        elif len(names) == 2:
            facts.append(relation(names[0], self.how, names[1]))
            if self.how in ("left of", "right of"):
                facts.append(relation(names[0], "next to", names[1]))
        return facts


class SceneSampler:
    """Draws scenes of the things of a catalog, as training sees them or as they are held out.

    Args:
        tier: the highest tier of things to show.
    """

    def __init__(self, catalog: Catalog, tier: int = 1) -> None:
        self.things = [thing for thing in catalog.things if thing.tier <= tier]
        self.bearers = [thing for thing in self.things if thing.bearer and any(d.anchors for d in thing.drawings)]
        self.worn = [thing for thing in self.things if thing.wears is not None]
        self.held = [thing for thing in self.things if thing.held]
        self.tinted = [thing for thing in self.things if thing.tint]
        self.families = sorted({drawing.family for thing in self.things for drawing in thing.drawings})

    def scene(self, draw: np.random.Generator, number: int) -> Scene:
        """The training scene `number`, ≥ 0, which nothing held out can be seen in."""
        ones = FIRST_ONES + (LAST_ONES - FIRST_ONES) * min(1.0, number / SETTLED)
        kind: Kind = "one" if draw.random() < ones else self._kind(draw)
        while True:
            scene = self.of_kind(kind, draw)
            if not any(fact.is_held_out for fact in scene.facts()):
                return scene

    def _kind(self, draw: np.random.Generator) -> Kind:
        return list(SHARES)[int(draw.choice(len(SHARES), p=list(SHARES.values())))]

    def of_kind(self, kind: Kind, draw: np.random.Generator) -> Scene:
        """Any scene of a kind, held out or not."""
        family = self._family(draw)
        parts: tuple[Part, ...]
        if kind == "one":
            parts = (self._part(_any(self.things, draw), family, draw, colored=0.3, sized=0.15),)
            return self._placed(Scene(kind, parts), draw)
        if kind == "count":
            counted = [thing for thing in self.things if thing.plural]
            part = self._part(_any(counted, draw), family, draw, colored=0.15)
            return self._placed(Scene(kind, (part,), count=int(draw.integers(2, 6))), draw)
        if kind == "three":
            chosen = _some(self.things, 3, draw)
            parts = tuple(self._part(thing, family, draw, colored=0.15) for thing in chosen)
            return self._placed(Scene(kind, parts), draw)
        if kind == "worn":
            return self._placed(Scene(kind, (self._wearing(family, draw),)), draw)
        if kind == "held":
            return self._placed(Scene(kind, (self._holding(family, draw),)), draw)
        how = RELATIONS[int(draw.choice(len(RELATIONS), p=RELATION_SHARES))]
        if kind == "worn pair":
            first = self._wearing(family, draw)
            others = [thing for thing in self.things if thing not in (first.thing, first.worn and first.worn.thing)]
            parts = (first, self._part(_any(others, draw), family, draw, colored=0.2))
        else:
            # Four in ten pairs have two colors: what belongs to which thing is the hardest to learn.
            both = draw.random() < 0.4
            chosen = _some(self.tinted if both else self.things, 2, draw)
            parts = tuple(self._part(thing, family, draw, colored=1.0 if both else 0.15) for thing in chosen)
            if draw.random() < 0.1:
                parts = (replace(parts[0], size="big"), replace(parts[1], size="small"))
        if draw.random() < 0.5:
            parts = parts[::-1]
        return self._placed(Scene(kind, parts, how), draw)

    def _family(self, draw: np.random.Generator) -> str | None:
        """The style of a whole scene, in most scenes; None mixes."""
        if draw.random() < 0.25:
            return None
        return self.families[int(draw.integers(len(self.families)))]

    def _part(
        self, thing: Thing, family: str | None, draw: np.random.Generator, *, colored: float = 0.0, sized: float = 0.0
    ) -> Part:
        drawings = [drawing for drawing in thing.drawings if drawing.family == family]
        color = None
        if thing.tint and draw.random() < colored:
            color = _any(COLORS, draw)
        size: Size | None = None
        if draw.random() < sized:
            size = "small" if draw.random() < 0.6 else "big"
        return Part(
            thing,
            _any(drawings, draw) if drawings else _by_family(thing.drawings, draw),
            color,
            size,
            mirrored=bool(draw.random() < 0.5),
        )

    def _wearing(self, family: str | None, draw: np.random.Generator) -> Part:
        worn = _any(self.worn, draw)
        bearer = _any([thing for thing in self.bearers if thing.can_wear(worn) and thing is not worn], draw)
        anchored = [drawing for drawing in bearer.drawings if worn.anchor in drawing.anchors]
        part = self._on(bearer, anchored, family, draw)
        return replace(part, worn=replace(self._part(worn, family, draw, colored=0.35), mirrored=False))

    def _holding(self, family: str | None, draw: np.random.Generator) -> Part:
        able = [thing for thing in self.bearers if any("hand" in drawing.anchors for drawing in thing.drawings)]
        held = _any(self.held, draw)
        bearer = _any([thing for thing in able if thing is not held], draw)
        anchored = [drawing for drawing in bearer.drawings if "hand" in drawing.anchors]
        part = self._on(bearer, anchored, family, draw)
        return replace(part, held=replace(self._part(held, family, draw, colored=0.25), mirrored=False))

    def _on(self, bearer: Thing, anchored: Sequence[Drawing], family: str | None, draw: np.random.Generator) -> Part:
        of_family = [drawing for drawing in anchored if drawing.family == family]
        part = self._part(bearer, family, draw, colored=0.12)
        return replace(part, drawing=_any(of_family, draw) if of_family else _by_family(anchored, draw))

    def _placed(self, scene: Scene, draw: np.random.Generator) -> Scene:
        """With a background on which everything can be seen."""
        background = ""
        chance = draw.random()
        if chance < 0.18:
            background = _any(COLORS, draw)
        elif chance < 0.33:
            background = _any(PLACES, draw)
        tints = {part.color for part in scene.all_parts}
        own = {color for part in scene.all_parts if part.color is None for color in part.drawing.colors[:1]}
        while hidden_by(background) & (tints | own):
            if "white" in own and background == "" and "white" not in tints:
                break  # the outlines of white drawings are seen on white, as everyone draws them
            background = _any(COLORS, draw)
        return replace(scene, background=background)


def hidden_by(background: str) -> set[str]:
    """Colors that cannot be seen before it."""
    return {"": {"white"}, "grass": {"green"}, "sea": {"blue"}, "night sky": {"black"}}.get(background, {background})


def _any(choices: Sequence[T], draw: np.random.Generator) -> T:
    return choices[int(draw.integers(len(choices)))]


def _some(things: Sequence[Thing], count: int, draw: np.random.Generator) -> list[Thing]:
    return [things[int(place)] for place in draw.choice(len(things), count, replace=False)]


def _by_family(drawings: Sequence[Drawing], draw: np.random.Generator) -> Drawing:
    """Every family alike, so that many clip arts do not displace the others; these count twice, as they differ."""
    families = sorted({drawing.family for drawing in drawings})
    weights = np.array([2.0 if family == CLIP_ART else 1.0 for family in families])
    family = families[int(draw.choice(len(families), p=weights / weights.sum()))]
    return _any([drawing for drawing in drawings if drawing.family == family], draw)
