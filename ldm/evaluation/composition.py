"""How well a model of scenes composes: accuracy of a scene classifier on its images, relative to real scenes.

The classifier makes errors and a first stage loses detail, so each accuracy is compared with that on real scenes of the
same captions after encoding and decoding by the model's first stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.codecs import Codec
from ldm.data import generator, to_signed, to_uint8
from ldm.data.scenes.catalog import load_catalog
from ldm.data.scenes.render import render_scene
from ldm.data.scenes.scene import SceneSampler
from ldm.data.scenes.source import render_training_scene
from ldm.evaluation.axes import AXES, COMBINATIONS, Axis, Prompt, axis_prompts, correctness, with_other_drawings
from ldm.evaluation.generate import SampleCache, generate_images
from ldm.evaluation.memorization import Copying, find_copies
from ldm.evaluation.nearest_neighbors import TrainingFeatures, color_layout
from ldm.evaluation.reference import default_batch_size
from ldm.evaluation.scene_classifier import SceneClassifier, ScenePrediction
from ldm.evaluation.stats import Interval, bootstrap_interval, fraction_interval
from ldm.pipelines import Pipeline
from ldm.progress import Progress, no_progress

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
    nearest = None if scenes_seen is None else _combination_copies(parts, scenes_seen, tier, seed, height, progress)
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
    mean = float(untouched.double().mean())
    return AxisAccuracy(axis, what, fractions[0], fractions[1], mean, _ratio(generated, real, seed))


def _prompt_groups(values: Tensor) -> Tensor:
    return torch.arange(len(values) // IMAGES_PER_PROMPT).repeat_interleave(IMAGES_PER_PROMPT)


def _ratio(generated: Tensor, real: Tensor, seed: int) -> Interval | None:
    """Of two fractions for the same prompts, which are resampled together."""
    by_prompt = [values.double().view(-1, IMAGES_PER_PROMPT).mean(dim=1) for values in (generated, real)]  # [P]
    if not bool(real.any()):
        return None
    count = len(by_prompt[0])
    resampled = torch.from_numpy(generator(seed, "ratio").integers(count, size=(RESAMPLES, count)))
    above, below = (values[resampled].mean(dim=1) for values in by_prompt)
    ratios = above / below.clamp(min=1 / (2 * IMAGES_PER_PROMPT * count))
    return bootstrap_interval(float(by_prompt[0].mean() / by_prompt[1].mean()), ratios)


def _combination_copies(
    parts: Sequence[AxisResult], seen: int, tier: int, seed: int, resolution: int, progress: Progress
) -> CombinationCopies | None:
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
    generated, real = (
        color_layout(to_signed(torch.cat([getattr(part, name) for part in of_combinations])))
        for name in ("images", "real")
    )
    known = TrainingFeatures.from_features(training)
    distances, real_distances = known.nearest(generated).distance, known.nearest(real).distance
    nearer = distances < torch.quantile(real_distances, 0.05)
    return CombinationCopies(
        (len(numbers), seen),
        find_copies(generated, training, real, seed=seed),
        float(distances.median()),
        float(real_distances.median()),
        fraction_interval(nearer.double(), _prompt_groups(nearer)),
    )
