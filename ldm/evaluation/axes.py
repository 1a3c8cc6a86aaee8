"""What a model of scenes is asked for, axis by axis, and when a picture is right.

The axes are those of GenEval (arXiv:2310.11513), in the vocabulary of scenes: one thing, colors, position, two colors
on the right things, counting; and what scenes have besides: words and phrasings that no training caption has, and
things that are worn. Everything is drawn by (seed, axis) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ldm.data import generator
from ldm.data.scenes.captions import (
    COUNT_CLAUSES,
    COUNT_PHRASES,
    HELD_CLAUSES,
    HELD_PHRASES,
    ONE_CLAUSES,
    ONE_PHRASES,
    RELATION_CLAUSES,
    RELATION_PHRASES,
    THREE_CLAUSES,
    THREE_PHRASES,
    WORN_CLAUSES,
    WORN_PHRASES,
    CaptionWriter,
)
from ldm.data.scenes.catalog import Drawing, Thing, load_catalog
from ldm.data.scenes.scene import (
    COLORS,
    INVERSE_RELATIONS,
    RELATIONS,
    Concept,
    Part,
    Scene,
    SceneSampler,
    relation_concept,
)
from ldm.evaluation.judge import Look, Reading

Axis = Literal["one thing", "unseen synonym", "color", "relation", "worn", "two colors", "count", "unseen phrasing"]
AXES: tuple[Axis, ...] = get_args(Axis)
COMBINATIONS: tuple[Axis, ...] = ("color", "relation", "worn", "two colors")
"""Of these no training scene shows what is asked for."""
COUNTS = (2, 3, 4)
TOP = 5
# Centers are further apart than this, in shares of the image, or nothing is left of, above or before another.
APART = 0.1
ON = 0.25  # what is worn has its center in the bearer's box, grown by this share of it on each side
TRIES = 4000  # of captions, until one says what is asked for


@dataclass(frozen=True)
class Prompt:
    """A caption, a scene that it describes, and what is looked at.

    Attributes:
        asked: the names of the things that are looked for.
    """

    axis: Axis
    caption: str
    scene: Scene

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(part.thing.name for part in self.scene.all_parts)


def axis_prompts(axis: Axis, count: int | None, seed: int, sampler: SceneSampler) -> list[Prompt]:
    """`count` prompts of an axis, or as many as there are; None: of "one thing" all things, of others 100."""
    draw = generator(seed, "axes", axis)
    most = (len(sampler.things) if axis == "one thing" else 100) if count is None else count
    found: list[Prompt] = []
    captions: set[str] = set()
    for scene, caption in _SCENES[axis](sampler, draw):
        if caption not in captions:
            captions.add(caption)
            found.append(Prompt(axis, caption, _seen(scene)))
        if len(found) == most:
            break
    return found


def redrawn(scene: Scene, draw: np.random.Generator) -> Scene:
    """The same scene with other drawings of its things."""
    return replace(scene, parts=tuple(_redrawn(part, draw) for part in scene.parts))


def right(prompt: Prompt, reading: Reading) -> dict[str, bool]:
    """By name, what is right of a picture, the strictest last: its name is "right" where it is of several."""
    looks, scene = reading.looks, prompt.scene
    first = scene.parts[0]
    things = all(look.rank <= TOP for look in looks)
    if prompt.axis in ("one thing", "unseen synonym"):
        return {"top 5": things, "top 1": looks[0].rank == 1}
    if prompt.axis in ("color", "two colors"):
        colors = all(look.color == part.color for look, part in zip(looks, scene.all_parts, strict=True))
        return {"color": colors, "top 5": things, "right": colors and things}
    if scene.kind == "count":
        counted = reading.count == scene.count
        return {"count": counted, "top 5": things, "right": counted and things}
    if first.worn is not None or first.held is not None:
        # A hand may be anywhere beside the body.
        on = is_on(looks[1], looks[0], ON if first.worn is not None else 2 * ON)
        return {"on it": on, "top 5": things, "right": on and things}
    if scene.relation:
        placed = is_placed(scene.relation, looks[0], looks[1])
        return {"placed": placed, "top 5": things, "right": placed and things}
    return {"top 5": things, "right": things}


def is_placed(how: str, first: Look, second: Look) -> bool:
    """Whether the first stands so to the second."""
    if how in INVERSE_RELATIONS:
        return is_placed(INVERSE_RELATIONS[how], second, first)
    (x, y), (other_x, other_y) = _center(first), _center(second)
    across, down = other_x - x, other_y - y
    if how == "left of":
        return across > APART and across > abs(down)
    if how == "next to":
        return abs(across) > APART and abs(across) > abs(down)
    if how == "above":
        return down > APART and down > abs(across)
    # Who stands in front stands lower, and covers the other or touches it.
    return (
        -down > APART
        and _overlap(first.box[::2], second.box[::2]) > 0
        and _overlap(first.box[1::2], second.box[1::2]) > -0.05
    )


def is_on(worn: Look, bearer: Look, margin: float) -> bool:
    """Whether a thing has its center in the box of another that is grown by a share of it on each side."""
    x, y = _center(worn)
    left, top, right, bottom = bearer.box
    across, down = margin * (right - left), margin * (bottom - top)
    return left - across <= x <= right + across and top - down <= y <= bottom + down


def _center(look: Look) -> tuple[float, float]:
    left, top, right, bottom = look.box
    return (left + right) / 2, (top + bottom) / 2


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two intervals; below 0 the gap between them."""
    return min(one[1], other[1]) - max(one[0], other[0])


def _seen(scene: Scene) -> Scene:
    """On white as captions without a ground mostly are, or on another color where that would hide something."""
    if all(part.color != "white" for part in scene.all_parts):
        return replace(scene, background="")
    tints = {part.color for part in scene.all_parts}
    return replace(scene, background=next(color for color in ("blue", "red", "green", "yellow") if color not in tints))


# ---- scenes of each axis, without end or as many as there are; with captions

Scenes = Iterator[tuple[Scene, str]]


def _one_thing(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    for place in draw.permutation(len(sampler.things)).tolist():
        scene = Scene("one", (_part(sampler.things[place], draw),))
        yield scene, _plain(scene, draw)


def _unseen_synonym(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    pairs = [
        (thing, word)
        for thing in sampler.things
        for word in (*thing.synonyms, *thing.kinds)
        if Concept("synonym", (thing.name, word)).is_held_out
    ]
    writer = CaptionWriter(draw, frozenset({"synonym"}))
    for place in draw.permutation(len(pairs)).tolist():
        thing, word = pairs[place]
        scene = Scene("one", (_part(thing, draw),))
        captions = (writer.caption(scene).text for _ in range(TRIES))
        article = thing.forms[word][0]
        alone = {f"{article} {word}" if article else word}
        caption = next((text for text in captions if text in alone), None)
        if caption is not None:
            yield scene, caption


def _color(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    pairs = [(thing, color) for thing in sampler.tinted for color in COLORS if _is_new(thing, color)]
    for place in draw.permutation(len(pairs)).tolist():
        thing, color = pairs[place]
        scene = Scene("one", (_part(thing, draw, color),))
        yield scene, _plain(scene, draw)


def _relation(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    for _ in range(TRIES * len(sampler.things)):
        first, second = _two(sampler.things, draw)
        how = RELATIONS[int(draw.integers(len(RELATIONS)))]
        if relation_concept(first.name, how, second.name).is_held_out:
            scene = Scene("pair", (_part(first, draw), _part(second, draw)), how)
            yield scene, _plain(scene, draw)


def _worn(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    animals = [thing for thing in sampler.characters if thing.group == "animal"]
    pairs = [
        (animal, worn)
        for animal in animals
        for worn in sampler.worn
        if animal.can_wear(worn) and Concept("worn", (animal.name, worn.name)).is_held_out
    ]
    for place in draw.permutation(len(pairs)).tolist():
        animal, worn = pairs[place]
        scene = redrawn(Scene("worn", (replace(_part(animal, draw), worn=_part(worn, draw)),)), draw)
        yield scene, _plain(scene, draw)


def _two_colors(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    for _ in range(TRIES * len(sampler.tinted)):
        first, second = _two(sampler.tinted, draw)
        colors = [COLORS[place] for place in draw.choice(len(COLORS), 2, replace=False).tolist()]
        scene = Scene("pair", (_part(first, draw, colors[0]), _part(second, draw, colors[1])), "next to")
        if any(concept.is_held_out for concept in scene.concepts()):
            said = [_plain(Scene("one", (part,)), draw) for part in scene.parts]
            yield scene, " and ".join(said)


def _count(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    things = draw.permutation(len(sampler.things)).tolist()
    for place in range(len(COUNTS) * len(things)):
        thing = sampler.things[things[place % len(things)]]
        # Another number each time that the things begin again.
        number = COUNTS[(place + place // len(things)) % len(COUNTS)]
        scene = Scene("count", (_part(thing, draw),), count=number)
        yield scene, _plain(scene, draw)


def _unseen_phrasing(sampler: SceneSampler, draw: np.random.Generator) -> Scenes:
    """Scenes of all kinds that show nothing held out, said in a way that is."""
    writer = CaptionWriter(draw, frozenset({"phrasing"}))
    templates: list[tuple[str, str, Sequence[str]]] = [
        ("one", "", (*ONE_PHRASES[1:], *ONE_CLAUSES)),
        ("count", "", (*COUNT_PHRASES[1:], *COUNT_CLAUSES)),
        ("three", "", (*THREE_PHRASES[1:], *THREE_CLAUSES)),
        ("held", "", (*HELD_PHRASES[1:], *HELD_CLAUSES)),
        *(("pair", how, (*RELATION_PHRASES[how][1:], *RELATION_CLAUSES[how])) for how in RELATION_PHRASES),
        *(("worn", place, (*WORN_PHRASES[place][1:], *WORN_CLAUSES[place])) for place in WORN_PHRASES),
    ]
    unseen = [
        (kind, about, template)
        for kind, about, phrasings in templates
        for template in phrasings
        if Concept("phrasing", (template,)).is_held_out
    ]
    for place in range(TRIES if unseen else 0):
        kind, about, template = unseen[place % len(unseen)]
        scene = _of_kind(kind, about, sampler, draw)
        if scene is None:
            continue
        for _ in range(TRIES):
            caption = writer.caption(scene)
            if caption.concepts == [Concept("phrasing", (template,))] and _names_all(scene, caption.text):
                yield scene, caption.text
                break


def _of_kind(kind: str, about: str, sampler: SceneSampler, draw: np.random.Generator) -> Scene | None:
    """A scene with nothing held out, in its own colors; `about`: how a pair stands, or where something is worn."""
    for _ in range(TRIES):
        scene = sampler.sample_kind(kind, draw)  # type: ignore[arg-type]
        scene = replace(scene, parts=tuple(_bare(part) for part in scene.parts), background="")
        if kind == "pair":
            scene = replace(scene, relation=about)
        worn = scene.parts[0].worn
        fits = (kind != "worn" or (worn is not None and worn.thing.wears == about)) and scene.count <= max(COUNTS)
        if fits and not any(concept.is_held_out for concept in scene.concepts()):
            return scene
    return None


_SCENES: dict[Axis, Callable[[SceneSampler, np.random.Generator], Scenes]] = {
    "one thing": _one_thing,
    "unseen synonym": _unseen_synonym,
    "color": _color,
    "relation": _relation,
    "worn": _worn,
    "two colors": _two_colors,
    "count": _count,
    "unseen phrasing": _unseen_phrasing,
}


# ---- their parts


def _plain(scene: Scene, draw: np.random.Generator) -> str:
    return CaptionWriter(draw).caption(scene, plain=True).text


def _names_all(scene: Scene, text: str) -> bool:
    """Whether a caption has the own name of each thing, no style and no sentences after it."""
    names = [part.thing.plural if scene.kind == "count" else part.thing.name for part in scene.all_parts]
    return all(name in text for name in names) and not text.endswith(".") and not _is_styled(text)


def _is_styled(text: str) -> bool:
    families = {drawing.family for thing in load_catalog().things for drawing in thing.drawings}
    return any(family in text for family in families)


def _is_new(thing: Thing, color: str) -> bool:
    return color not in thing.colors and Concept("color", (thing.name, color)).is_held_out


def _two(things: Sequence[Thing], draw: np.random.Generator) -> tuple[Thing, Thing]:
    first, second = draw.choice(len(things), 2, replace=False).tolist()
    return things[first], things[second]


def _part(thing: Thing, draw: np.random.Generator, color: str | None = None) -> Part:
    return Part(thing, thing.drawings[int(draw.integers(len(thing.drawings)))], color)


def _bare(part: Part) -> Part:
    worn, held = part.worn and _bare(part.worn), part.held and _bare(part.held)
    return replace(part, color=None, size=None, worn=worn, held=held)


def _redrawn(part: Part, draw: np.random.Generator) -> Part:
    needed = {part.worn.thing.anchor} if part.worn is not None else set()
    needed |= {"hand"} if part.held is not None else set()
    able: list[Drawing] = [drawing for drawing in part.thing.drawings if needed <= set(drawing.anchors)]
    worn, held = part.worn and _redrawn(part.worn, draw), part.held and _redrawn(part.held, draw)
    # Every family alike: one of them may have many drawings.
    families = sorted({drawing.family for drawing in able})
    family = families[int(draw.integers(len(families)))]
    chosen = [drawing for drawing in able if drawing.family == family]
    return replace(part, drawing=chosen[int(draw.integers(len(chosen)))], worn=worn, held=held)
