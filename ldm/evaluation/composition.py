"""How well a model of scenes composes: prompts by axis, and the accuracy of a scene classifier on its images.

The axes are those of GenEval (arXiv:2310.11513): one thing, color, position, two colors on the right things, counting;
and words and phrasings that no training caption has, and things that are worn. Prompts depend on (seed, axis) only.
The classifier makes errors and a first stage loses detail, so each accuracy is compared with that on real scenes of the
same captions after encoding and decoding by the model's first stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from ldm.codecs import Codec
from ldm.data import generator, to_signed, to_uint8
from ldm.data.builtin import render_training_scene
from ldm.data.scenes import (
    COLORS,
    INVERSE_RELATIONS,
    RELATIONS,
    Concept,
    Drawing,
    Part,
    Scene,
    SceneSampler,
    Thing,
    load_catalog,
    relation_concept,
)
from ldm.data.scenes import captions as phrases
from ldm.data.scenes.captions import CaptionWriter
from ldm.data.scenes.render import render_scene
from ldm.evaluation.images import SampleCache, default_batch_size, generate_images
from ldm.evaluation.memorization import Copying, TrainingFeatures, color_layout, find_copies
from ldm.evaluation.scene_classifier import Detection, SceneClassifier, ScenePrediction
from ldm.evaluation.stats import Interval, bootstrap_interval, fraction_interval
from ldm.pipelines import Pipeline
from ldm.progress import Progress, no_progress

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
    for scene, caption in getattr(AxisScenes(sampler, rng), axis.replace(" ", "_"))():
        if caption not in captions:
            captions.add(caption)
            colors = {part.color for part in scene.all_parts}
            background = ""  # white, or another color if that would hide something
            if "white" in colors:
                background = next(color for color in ("blue", "red", "green", "yellow") if color not in colors)
            found.append(Prompt(axis, caption, replace(scene, background=background)))
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
    # Lengths of the overlap of both boxes, across and down; negative for a gap.
    one, other = first.box, second.box
    beside, below = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return -down > MIN_OFFSET and beside > 0 and below > -0.05


def is_on(worn: Detection, wearer: Detection, margin: float) -> bool:
    """Whether a thing has its center in the box of another, enlarged by a fraction of it on each side."""
    x, y = _center(worn)
    left, top, right, bottom = wearer.box
    across, down = margin * (right - left), margin * (bottom - top)
    return left - across <= x <= right + across and top - down <= y <= bottom + down


def _center(detection: Detection) -> tuple[float, float]:
    left, top, right, bottom = detection.box
    return (left + right) / 2, (top + bottom) / 2


# ---- scenes of each axis

Scenes = Iterator[tuple[Scene, str]]
T = TypeVar("T")


@dataclass(frozen=True)
class AxisScenes:
    """Scenes of each axis with captions, endless or all there are: a method an axis."""

    sampler: SceneSampler
    rng: np.random.Generator

    def one_thing(self) -> Scenes:
        for thing in self._shuffled(self.sampler.things):
            scene = Scene("one", (self._part(thing),))
            yield scene, self._plain(scene)

    def unseen_synonym(self) -> Scenes:
        pairs = [(thing, word) for thing in self.sampler.things for word in (*thing.synonyms, *thing.kinds)]
        unseen = [(thing, word) for thing, word in pairs if Concept("synonym", (thing.name, word)).is_held_out]
        writer = CaptionWriter(self.rng, frozenset({"synonym"}))
        for thing, word in self._shuffled(unseen):
            scene = Scene("one", (self._part(thing),))
            captions = (writer.caption(scene).text for _ in range(MAX_TRIES))
            article = thing.forms[word][0]
            alone = {f"{article} {word}" if article else word}
            caption = next((text for text in captions if text in alone), None)
            if caption is not None:
                yield scene, caption

    def color(self) -> Scenes:
        pairs = [(thing, color) for thing in self.sampler.tinted for color in COLORS if color not in thing.colors]
        unseen = [(thing, color) for thing, color in pairs if Concept("color", (thing.name, color)).is_held_out]
        for thing, color in self._shuffled(unseen):
            scene = Scene("one", (self._part(thing, color),))
            yield scene, self._plain(scene)

    def relation(self) -> Scenes:
        for _ in range(MAX_TRIES * len(self.sampler.things)):
            first, second = self._two(self.sampler.things)
            relation = RELATIONS[int(self.rng.integers(len(RELATIONS)))]
            if relation_concept(first.name, relation, second.name).is_held_out:
                scene = Scene("pair", (self._part(first), self._part(second)), relation)
                yield scene, self._plain(scene)

    def worn(self) -> Scenes:
        animals = [thing for thing in self.sampler.characters if thing.group == "animal"]
        pairs = [(animal, worn) for animal in animals for worn in self.sampler.worn if animal.can_wear(worn)]
        unseen = [(animal, worn) for animal, worn in pairs if Concept("worn", (animal.name, worn.name)).is_held_out]
        for animal, worn in self._shuffled(unseen):
            scene = with_other_drawings(Scene("worn", (replace(self._part(animal), worn=self._part(worn)),)), self.rng)
            yield scene, self._plain(scene)

    def two_colors(self) -> Scenes:
        for _ in range(MAX_TRIES * len(self.sampler.tinted)):
            first, second = self._two(self.sampler.tinted)
            colors = [COLORS[place] for place in self.rng.choice(len(COLORS), 2, replace=False).tolist()]
            scene = Scene("pair", (self._part(first, colors[0]), self._part(second, colors[1])), "next to")
            if any(concept.is_held_out for concept in scene.concepts()):
                yield scene, " and ".join(self._plain(Scene("one", (part,))) for part in scene.parts)

    def count(self) -> Scenes:
        things = self._shuffled(self.sampler.things)
        for place in range(len(COUNTS) * len(things)):
            thing = things[place % len(things)]
            # Another number each time that the things begin again.
            number = COUNTS[(place + place // len(things)) % len(COUNTS)]
            scene = Scene("count", (self._part(thing),), count=number)
            yield scene, self._plain(scene)

    def unseen_phrasing(self) -> Scenes:
        """Scenes of all kinds without held-out concepts, in held-out phrasings."""
        writer = CaptionWriter(self.rng, frozenset({"phrasing"}))
        families = {drawing.family for thing in load_catalog().things for drawing in thing.drawings}
        templates: list[tuple[str, str, Sequence[str]]] = [
            ("one", "", (*phrases.ONE_PHRASES[1:], *phrases.ONE_CLAUSES)),
            ("count", "", (*phrases.COUNT_PHRASES[1:], *phrases.COUNT_CLAUSES)),
            ("three", "", (*phrases.THREE_PHRASES[1:], *phrases.THREE_CLAUSES)),
            ("held", "", (*phrases.HELD_PHRASES[1:], *phrases.HELD_CLAUSES)),
            *(
                ("pair", name, (*own[1:], *phrases.RELATION_CLAUSES[name]))
                for name, own in phrases.RELATION_PHRASES.items()
            ),
            *(("worn", place, (*own[1:], *phrases.WORN_CLAUSES[place])) for place, own in phrases.WORN_PHRASES.items()),
        ]
        every = [(kind, about, template) for kind, about, phrasings in templates for template in phrasings]
        unseen = [row for row in every if Concept("phrasing", row[2:]).is_held_out]
        for place in range(MAX_TRIES if unseen else 0):
            kind, about, template = unseen[place % len(unseen)]
            scene = self.of_kind(kind, about)
            if scene is None:
                continue
            names = [part.thing.plural if kind == "count" else part.thing.name for part in scene.all_parts]
            for _ in range(MAX_TRIES):  # until it has the main name of each thing, no style and no further sentences
                caption = writer.caption(scene)
                plain = not caption.text.endswith(".") and not any(family in caption.text for family in families)
                wanted = caption.concepts == [Concept("phrasing", (template,))]
                if wanted and plain and all(name in caption.text for name in names):
                    yield scene, caption.text
                    break

    def of_kind(self, kind: str, about: str) -> Scene | None:
        """A scene without held-out concepts or tints; `about`: the relation of a pair, or where a thing is worn."""
        for _ in range(MAX_TRIES):
            scene = self.sampler.sample_kind(kind, self.rng)  # type: ignore[arg-type]
            scene = replace(scene, parts=tuple(_bare(part) for part in scene.parts), background="")
            if kind == "pair":
                scene = replace(scene, relation=about)
            worn = scene.parts[0].worn
            fits = (kind != "worn" or (worn is not None and worn.thing.wears == about)) and scene.count <= max(COUNTS)
            if fits and not any(concept.is_held_out for concept in scene.concepts()):
                return scene
        return None

    def _plain(self, scene: Scene) -> str:
        return CaptionWriter(self.rng).caption(scene, plain=True).text

    def _shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[place] for place in self.rng.permutation(len(items)).tolist()]

    def _two(self, things: Sequence[Thing]) -> tuple[Thing, Thing]:
        first, second = self.rng.choice(len(things), 2, replace=False).tolist()
        return things[first], things[second]

    def _part(self, thing: Thing, color: str | None = None) -> Part:
        return Part(thing, thing.drawings[int(self.rng.integers(len(thing.drawings)))], color)


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


# ---- accuracy on the axes


IMAGES_PER_PROMPT = 4
MIN_REAL_ACCURACY = 0.85
"""On real scenes; below, an accuracy says little."""
RESAMPLES = 2000
MAX_TRAINING_SCENES = 20_000
BATCH_SIZE = 64


@dataclass(frozen=True)
class AxisAccuracy:
    """The fraction of images that meet one criterion.

    Attributes:
        axis, what: such as "color" and "top 5"; "right" means all criteria of the axis.
        generated: with Wilson's 95 % interval; images of one prompt are correlated.
        real: of real scenes of the same captions, through the first stage.
        untouched: of these scenes without the first stage.
        ratio: generated over real, with a bootstrap interval over prompts; None where real is 0.
    """

    axis: Axis
    what: str
    generated: Interval
    real: Interval
    untouched: float
    ratio: Interval | None


@dataclass(frozen=True)
class AxisResult:
    """One axis.

    Attributes:
        prompts: P of them.
        images, real: uint8 [4P, 3, H, W], four per prompt; real scenes went through the first stage.
        correct: criterion → bool [4P].
        top_things: for each image the things with the highest scores.
        accuracies: by criterion.
    """

    axis: Axis
    prompts: tuple[Prompt, ...]
    images: Tensor
    real: Tensor
    correct: dict[str, Tensor]
    top_things: tuple[tuple[str, ...], ...]
    accuracies: tuple[AxisAccuracy, ...]


@dataclass(frozen=True)
class CombinationCopies:
    """Whether combinations are copied: images of combinations that no training scene shows, and real scenes of the same
    captions, compared with training scenes.

    Attributes:
        seen: number of training scenes compared with, and of those that the run saw.
        copying: with the real scenes as held-out images.
        distance, real_distance: medians of the distances to the nearest training scene.
        nearer: the fraction of images nearer than the nearest 5 % of real scenes; expected are 0.05.
    """

    seen: tuple[int, int]
    copying: Copying
    distance: float
    real_distance: float
    nearer: Interval

    @classmethod
    def from_results(
        cls, parts: Sequence[AxisResult], seen: int, tier: int, seed: int, resolution: int, progress: Progress
    ) -> CombinationCopies | None:
        """None without an axis of combinations; `seen` is how many training scenes the run saw, of this `tier`."""
        of_combinations = [part for part in parts if part.axis in COMBINATIONS]
        if not of_combinations:
            return None
        numbers = generator(seed, "scenes seen").permutation(seen)[:MAX_TRAINING_SCENES].tolist()
        layouts = []
        with progress("training scenes", len(numbers)) as update:
            for start in range(0, len(numbers), BATCH_SIZE):
                batch = numbers[start : start + BATCH_SIZE]
                images = np.stack([np.asarray(render_training_scene(number, resolution, tier)) for number in batch])
                layouts.append(color_layout(to_signed(torch.from_numpy(images).permute(0, 3, 1, 2))))
                update(len(batch))
        training = torch.cat(layouts)
        both = ([getattr(part, name) for part in of_combinations] for name in ("images", "real"))
        generated, real = (color_layout(to_signed(torch.cat(images))) for images in both)
        known = TrainingFeatures.from_features(training)
        distances, real_distances = known.nearest(generated).distance, known.nearest(real).distance
        nearer = distances < torch.quantile(real_distances, 0.05)
        return cls(
            (len(numbers), seen),
            find_copies(generated, training, real, seed=seed),
            float(distances.median()),
            float(real_distances.median()),
            fraction_interval(nearer.double(), _prompt_groups(nearer)),
        )


@dataclass(frozen=True)
class AxesReport:
    """The results, and their settings."""

    settings: dict[str, Any]
    parts: tuple[AxisResult, ...]
    nearest: CombinationCopies | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the images."""
        axes = {}
        for part in self.parts:
            prompts = [
                {
                    "caption": prompt.caption,
                    "right": {name: values[rows].tolist() for name, values in part.correct.items()},
                    "seen": [list(names) for names in part.top_things[rows]],
                }
                for prompt, rows in zip(part.prompts, prompt_rows(len(part.prompts)), strict=True)
            ]
            axes[part.axis] = {"figures": [asdict(accuracy) for accuracy in part.accuracies], "prompts": prompts}
        nearest = None
        if self.nearest is not None:
            found = self.nearest.copying.to_dict()
            summary = {key: value for key, value in found.items() if not isinstance(value, list) or len(value) == 2}
            nearest = asdict(self.nearest) | {"copying": summary}
        return {**self.settings, "axes": axes, "nearest": nearest}


def prompt_rows(prompts: int) -> list[slice]:
    """The rows of each prompt's images."""
    return [slice(IMAGES_PER_PROMPT * i, IMAGES_PER_PROMPT * (i + 1)) for i in range(prompts)]


def evaluate_composition(
    pipeline: Pipeline,
    classifier: SceneClassifier,
    *,
    tier: int = 1,
    scenes_seen: int | None = None,
    max_prompts: int | None = None,
    axes: Sequence[Axis] = AXES,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    cache: SampleCache | None = None,
    progress: Progress = no_progress,
) -> AxesReport:
    """Generates images for the prompts of each axis, and classifies them.

    Args:
        tier: of the things that the model was trained on.
        scenes_seen: number of training scenes, which are those from number 0 on; None does not search for copies.
        max_prompts: per axis; None takes 100, and all single things.
        num_inference_steps, guidance_scale: None takes the defaults stored with the model.

    Raises:
        ValueError: for a model of other than square images, `max_prompts` below 1, and a classifier of fewer things.
    """
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(f"the model generates {width}x{height} pixels; scenes are squares")
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"{max_prompts} prompts per axis were requested; it must be at least 1")
    if classifier.config.tier < tier:
        raise ValueError("the scene classifier has only the common things, but the model was trained on all things")
    steps = pipeline.num_inference_steps if num_inference_steps is None else num_inference_steps
    guidance = pipeline.guidance_scale if guidance_scale is None else guidance_scale
    sampler = SceneSampler(load_catalog(), tier)
    by_axis = {axis: tuple(axis_prompts(axis, max_prompts, seed, sampler)) for axis in axes}
    parts = []
    with progress("images", IMAGES_PER_PROMPT * sum(map(len, by_axis.values()))) as update:
        for axis, prompts in by_axis.items():
            images = (generate_images if cache is None else cache.generate)(
                pipeline,
                [prompt.caption for prompt in _repeated(prompts)],
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                batch_size=default_batch_size(height, width),
                progress=update,
            )
            parts.append(measure_axis(axis, prompts, images, pipeline.codec, classifier, seed))
    nearest = None
    if scenes_seen is not None:
        nearest = CombinationCopies.from_results(parts, scenes_seen, tier, seed, height, progress)
    settings = {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": pipeline.sampler,
        "things": len(sampler.things),
        "pictures_of_a_prompt": IMAGES_PER_PROMPT,
        "judge": classifier.digest,
        "catalog": load_catalog().digest,
    }
    return AxesReport(settings, tuple(parts), nearest)


def measure_axis(
    axis: Axis, prompts: Sequence[Prompt], images: Tensor, codec: Codec, classifier: SceneClassifier, seed: int
) -> AxisResult:
    """Classifies images uint8 [4P, 3, H, W] of prompts, and real scenes of these prompts."""
    real = real_scenes(prompts, images.shape[-1], seed)
    decoded = reconstruct(codec, real)
    queries = [prompt.things for prompt in _repeated(prompts)]
    predictions = classifier.predict(images, queries)
    of_generated = _correct(prompts, predictions)
    of_decoded, of_real = (_correct(prompts, classifier.predict(each, queries)) for each in (decoded, real))
    accuracies = tuple(
        axis_accuracy(axis, what, of_generated[what], of_decoded[what], of_real[what], seed) for what in of_generated
    )
    top_things = tuple(prediction.top_things for prediction in predictions)
    return AxisResult(axis, tuple(prompts), images, decoded, of_generated, top_things, accuracies)


def real_scenes(prompts: Sequence[Prompt], resolution: int, seed: int) -> Tensor:
    """Four scenes per prompt, of different drawings: uint8 [4P, 3, H, W]."""
    images = []
    for prompt in prompts:
        for number in range(IMAGES_PER_PROMPT):
            rng = generator(seed, "axes", prompt.axis, prompt.caption, number)
            images.append(np.asarray(render_scene(with_other_drawings(prompt.scene, rng), rng, resolution)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def reconstruct(codec: Codec, images: Tensor) -> Tensor:
    """Images after encoding and decoding, uint8 [N, 3, H, W] both."""
    assert isinstance(codec, torch.nn.Module)
    like = next(chain(codec.parameters(), codec.buffers()), torch.empty(0))
    parts = []
    for chunk in images.split(BATCH_SIZE):
        latents = codec.sample_latents(codec.moments(to_signed(chunk).to(like)))
        parts.append(to_uint8(codec.decode(latents).float().cpu()))
    return torch.cat(parts)


def _correct(prompts: Sequence[Prompt], predictions: Sequence[ScenePrediction]) -> dict[str, Tensor]:
    """Criterion → bool [4P]: the criteria that all prompts have (those of a phrasing depend on its kind of scene)."""
    rows = [correctness(prompt, prediction) for prompt, prediction in zip(_repeated(prompts), predictions, strict=True)]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def _repeated(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]


def axis_accuracy(axis: Axis, what: str, generated: Tensor, real: Tensor, untouched: Tensor, seed: int) -> AxisAccuracy:
    """From bool [4P] of generated images, of decoded real scenes, and of real scenes."""
    fractions = [fraction_interval(values.double(), _prompt_groups(values)) for values in (generated, real)]
    ratio = None
    if bool(real.any()):  # prompts are resampled, since both sides have the same
        by_prompt = [values.double().view(-1, IMAGES_PER_PROMPT).mean(dim=1) for values in (generated, real)]  # [P]
        count = len(by_prompt[0])
        resampled = torch.from_numpy(generator(seed, "ratio").integers(count, size=(RESAMPLES, count)))
        above, below = (values[resampled].mean(dim=1) for values in by_prompt)
        ratios = above / below.clamp(min=1 / (2 * IMAGES_PER_PROMPT * count))
        ratio = bootstrap_interval(float(by_prompt[0].mean() / by_prompt[1].mean()), ratios)
    return AxisAccuracy(axis, what, fractions[0], fractions[1], float(untouched.double().mean()), ratio)


def _prompt_groups(values: Tensor) -> Tensor:
    return torch.arange(len(values) // IMAGES_PER_PROMPT).repeat_interleave(IMAGES_PER_PROMPT)
