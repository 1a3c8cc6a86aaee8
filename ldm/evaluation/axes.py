"""Prompts for a model of scenes, by axis, and whether an image matches its prompt.

The axes are those of GenEval (arXiv:2310.11513): one thing, color, position, two colors on the right things, counting;
and words and phrasings that no training caption has, and things that are worn. Prompts depend on (seed, axis) only.
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
from ldm.evaluation.scene_classifier import Detection, ScenePrediction

Axis = Literal["one thing", "unseen synonym", "color", "relation", "worn", "two colors", "count", "unseen phrasing"]
AXES: tuple[Axis, ...] = get_args(Axis)
COMBINATIONS: tuple[Axis, ...] = ("color", "relation", "worn", "two colors")
"""Axes of combinations that no training scene shows."""
COUNTS = (2, 3, 4)
TOP_K = 5
MIN_OFFSET = 0.1  # of the centers of two things, in fractions of the image, for one to be left of, above, … the other
WORN_MARGIN = 0.25  # a worn thing has its center in the wearer's box, enlarged by this fraction of it on each side
MAX_TRIES = 4000  # captions, until one has the required words


@dataclass(frozen=True)
class Prompt:
    """A caption, and a scene that it describes."""

    axis: Axis
    caption: str
    scene: Scene

    @property
    def things(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(part.thing.name for part in self.scene.all_parts)


def axis_prompts(axis: Axis, count: int | None, seed: int, sampler: SceneSampler) -> list[Prompt]:
    """At most `count` prompts of an axis; None: all things for "one thing", 100 for others."""
    rng = generator(seed, "axes", axis)
    max_count = (len(sampler.things) if axis == "one thing" else 100) if count is None else count
    found: list[Prompt] = []
    captions: set[str] = set()
    for scene, caption in _SCENES[axis](sampler, rng):
        if caption not in captions:
            captions.add(caption)
            found.append(Prompt(axis, caption, _with_visible_background(scene)))
        if len(found) == max_count:
            break
    return found


def with_other_drawings(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with other drawings of its things."""
    return replace(scene, parts=tuple(_with_other_drawing(part, rng) for part in scene.parts))


def correctness(prompt: Prompt, prediction: ScenePrediction) -> dict[str, bool]:
    """Criteria by name, the strictest last: "right" combines the others where there are several."""
    detections, scene = prediction.detections, prompt.scene
    first = scene.parts[0]
    things = all(detection.rank <= TOP_K for detection in detections)
    if prompt.axis in ("one thing", "unseen synonym"):
        return {"top 5": things, "top 1": detections[0].rank == 1}
    if prompt.axis in ("color", "two colors"):
        colors = all(detection.color == part.color for detection, part in zip(detections, scene.all_parts, strict=True))
        return {"color": colors, "top 5": things, "right": colors and things}
    if scene.kind == "count":
        counted = prediction.count == scene.count
        return {"count": counted, "top 5": things, "right": counted and things}
    if first.worn is not None or first.held is not None:
        # A hand may be anywhere beside the body.
        on = is_on(detections[1], detections[0], WORN_MARGIN if first.worn is not None else 2 * WORN_MARGIN)
        return {"on it": on, "top 5": things, "right": on and things}
    if scene.relation:
        placed = is_placed(scene.relation, detections[0], detections[1])
        return {"placed": placed, "top 5": things, "right": placed and things}
    return {"top 5": things, "right": things}


def is_placed(relation: str, first: Detection, second: Detection) -> bool:
    """Whether the first has this relation to the second."""
    if relation in INVERSE_RELATIONS:
        return is_placed(INVERSE_RELATIONS[relation], second, first)
    (x, y), (other_x, other_y) = _center(first), _center(second)
    across, down = other_x - x, other_y - y
    if relation == "left of":
        return across > MIN_OFFSET and across > abs(down)
    if relation == "next to":
        return abs(across) > MIN_OFFSET and abs(across) > abs(down)
    if relation == "above":
        return down > MIN_OFFSET and down > abs(across)
    # In front: lower, and overlapping or touching the other.
    return (
        -down > MIN_OFFSET
        and _overlap(first.box[::2], second.box[::2]) > 0
        and _overlap(first.box[1::2], second.box[1::2]) > -0.05
    )


def is_on(worn: Detection, wearer: Detection, margin: float) -> bool:
    """Whether a thing has its center in the box of another, enlarged by a fraction of it on each side."""
    x, y = _center(worn)
    left, top, right, bottom = wearer.box
    across, down = margin * (right - left), margin * (bottom - top)
    return left - across <= x <= right + across and top - down <= y <= bottom + down


def _center(detection: Detection) -> tuple[float, float]:
    left, top, right, bottom = detection.box
    return (left + right) / 2, (top + bottom) / 2


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Length of the overlap of two intervals; negative for a gap."""
    return min(one[1], other[1]) - max(one[0], other[0])


def _with_visible_background(scene: Scene) -> Scene:
    """White, or another color if that would hide something."""
    if all(part.color != "white" for part in scene.all_parts):
        return replace(scene, background="")
    tints = {part.color for part in scene.all_parts}
    return replace(scene, background=next(color for color in ("blue", "red", "green", "yellow") if color not in tints))


# ---- scenes of each axis with captions, endless or all there are

Scenes = Iterator[tuple[Scene, str]]


def _one_thing(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    for place in rng.permutation(len(sampler.things)).tolist():
        scene = Scene("one", (_part(sampler.things[place], rng),))
        yield scene, _plain(scene, rng)


def _unseen_synonym(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    pairs = [
        (thing, word)
        for thing in sampler.things
        for word in (*thing.synonyms, *thing.kinds)
        if Concept("synonym", (thing.name, word)).is_held_out
    ]
    writer = CaptionWriter(rng, frozenset({"synonym"}))
    for place in rng.permutation(len(pairs)).tolist():
        thing, word = pairs[place]
        scene = Scene("one", (_part(thing, rng),))
        captions = (writer.caption(scene).text for _ in range(MAX_TRIES))
        article = thing.forms[word][0]
        alone = {f"{article} {word}" if article else word}
        caption = next((text for text in captions if text in alone), None)
        if caption is not None:
            yield scene, caption


def _color(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    pairs = [(thing, color) for thing in sampler.tinted for color in COLORS if _is_new(thing, color)]
    for place in rng.permutation(len(pairs)).tolist():
        thing, color = pairs[place]
        scene = Scene("one", (_part(thing, rng, color),))
        yield scene, _plain(scene, rng)


def _relation(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    for _ in range(MAX_TRIES * len(sampler.things)):
        first, second = _two(sampler.things, rng)
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        if relation_concept(first.name, relation, second.name).is_held_out:
            scene = Scene("pair", (_part(first, rng), _part(second, rng)), relation)
            yield scene, _plain(scene, rng)


def _worn(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    animals = [thing for thing in sampler.characters if thing.group == "animal"]
    pairs = [
        (animal, worn)
        for animal in animals
        for worn in sampler.worn
        if animal.can_wear(worn) and Concept("worn", (animal.name, worn.name)).is_held_out
    ]
    for place in rng.permutation(len(pairs)).tolist():
        animal, worn = pairs[place]
        scene = with_other_drawings(Scene("worn", (replace(_part(animal, rng), worn=_part(worn, rng)),)), rng)
        yield scene, _plain(scene, rng)


def _two_colors(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    for _ in range(MAX_TRIES * len(sampler.tinted)):
        first, second = _two(sampler.tinted, rng)
        colors = [COLORS[place] for place in rng.choice(len(COLORS), 2, replace=False).tolist()]
        scene = Scene("pair", (_part(first, rng, colors[0]), _part(second, rng, colors[1])), "next to")
        if any(concept.is_held_out for concept in scene.concepts()):
            yield scene, " and ".join(_plain(Scene("one", (part,)), rng) for part in scene.parts)


def _count(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    things = rng.permutation(len(sampler.things)).tolist()
    for place in range(len(COUNTS) * len(things)):
        thing = sampler.things[things[place % len(things)]]
        # Another number each time that the things begin again.
        number = COUNTS[(place + place // len(things)) % len(COUNTS)]
        scene = Scene("count", (_part(thing, rng),), count=number)
        yield scene, _plain(scene, rng)


def _unseen_phrasing(sampler: SceneSampler, rng: np.random.Generator) -> Scenes:
    """Scenes of all kinds without held-out concepts, in held-out phrasings."""
    writer = CaptionWriter(rng, frozenset({"phrasing"}))
    templates: list[tuple[str, str, Sequence[str]]] = [
        ("one", "", (*ONE_PHRASES[1:], *ONE_CLAUSES)),
        ("count", "", (*COUNT_PHRASES[1:], *COUNT_CLAUSES)),
        ("three", "", (*THREE_PHRASES[1:], *THREE_CLAUSES)),
        ("held", "", (*HELD_PHRASES[1:], *HELD_CLAUSES)),
        *(("pair", name, (*RELATION_PHRASES[name][1:], *RELATION_CLAUSES[name])) for name in RELATION_PHRASES),
        *(("worn", place, (*WORN_PHRASES[place][1:], *WORN_CLAUSES[place])) for place in WORN_PHRASES),
    ]
    unseen = [
        (kind, about, template)
        for kind, about, phrasings in templates
        for template in phrasings
        if Concept("phrasing", (template,)).is_held_out
    ]
    for place in range(MAX_TRIES if unseen else 0):
        kind, about, template = unseen[place % len(unseen)]
        scene = _of_kind(kind, about, sampler, rng)
        if scene is None:
            continue
        for _ in range(MAX_TRIES):
            caption = writer.caption(scene)
            if caption.concepts == [Concept("phrasing", (template,))] and _names_all(scene, caption.text):
                yield scene, caption.text
                break


def _of_kind(kind: str, about: str, sampler: SceneSampler, rng: np.random.Generator) -> Scene | None:
    """A scene without held-out concepts or tints; `about`: the relation of a pair, or where a thing is worn."""
    for _ in range(MAX_TRIES):
        scene = sampler.sample_kind(kind, rng)  # type: ignore[arg-type]
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


def _plain(scene: Scene, rng: np.random.Generator) -> str:
    return CaptionWriter(rng).caption(scene, plain=True).text


def _names_all(scene: Scene, text: str) -> bool:
    """Whether a caption has the main name of each thing, no style and no further sentences."""
    names = [part.thing.plural if scene.kind == "count" else part.thing.name for part in scene.all_parts]
    return all(name in text for name in names) and not text.endswith(".") and not _is_styled(text)


def _is_styled(text: str) -> bool:
    families = {drawing.family for thing in load_catalog().things for drawing in thing.drawings}
    return any(family in text for family in families)


def _is_new(thing: Thing, color: str) -> bool:
    return color not in thing.colors and Concept("color", (thing.name, color)).is_held_out


def _two(things: Sequence[Thing], rng: np.random.Generator) -> tuple[Thing, Thing]:
    first, second = rng.choice(len(things), 2, replace=False).tolist()
    return things[first], things[second]


def _part(thing: Thing, rng: np.random.Generator, color: str | None = None) -> Part:
    return Part(thing, thing.drawings[int(rng.integers(len(thing.drawings)))], color)


def _bare(part: Part) -> Part:
    worn, held = part.worn and _bare(part.worn), part.held and _bare(part.held)
    return replace(part, color=None, size=None, worn=worn, held=held)


def _with_other_drawing(part: Part, rng: np.random.Generator) -> Part:
    needed = {part.worn.thing.anchor} if part.worn is not None else set()
    needed |= {"hand"} if part.held is not None else set()
    able: list[Drawing] = [drawing for drawing in part.thing.drawings if needed <= set(drawing.anchors)]
    worn, held = part.worn and _with_other_drawing(part.worn, rng), part.held and _with_other_drawing(part.held, rng)
    # Families are equally likely: one of them may have many drawings.
    families = sorted({drawing.family for drawing in able})
    family = families[int(rng.integers(len(families)))]
    chosen = [drawing for drawing in able if drawing.family == family]
    return replace(part, drawing=chosen[int(rng.integers(len(chosen)))], worn=worn, held=held)
