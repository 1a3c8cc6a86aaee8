"""How well a model of scenes composes: what the judge reads in its pictures, beside what it reads in real scenes.

A judge errs, and a first stage loses detail. So every figure comes with that of real scenes of the same captions which
went through the model's first stage; what a model reaches is its share of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from ldm.evaluation.axes import AXES, COMBINATIONS, Axis, Prompt, axis_prompts, redrawn, right
from ldm.evaluation.drawn import draw
from ldm.evaluation.faithfulness import share_interval
from ldm.evaluation.frechet import Interval
from ldm.evaluation.judge import Judge, Reading
from ldm.evaluation.kept import KeptPictures
from ldm.evaluation.memorising import Copying, copy_features, copying
from ldm.evaluation.nearness import Known, near
from ldm.evaluation.reference import Bars, no_bars, pictures_at_once
from ldm.pipelines import Pipeline

EACH = 4
"""Pictures of every prompt, of as many seeds."""
FAIR = 0.85
"""What a judge reads right of real scenes, at least, where figures are to be trusted."""
RESAMPLES = 2000
SCENES_SEEN = 20_000
CHUNK = 64


@dataclass(frozen=True)
class AxisFigure:
    """One share of right pictures.

    Attributes:
        axis, what: such as "color" and "top 5"; of several, "right" is when all others are.
        generated: of the model's pictures, with Wilson's 95 % interval; pictures of one prompt are alike.
        real: the same judge's of real scenes of the same captions, through the first stage.
        untouched: and of these as they were drawn.
        ratio: generated over real; the interval is by drawing prompts again, with repetition. None where real is 0.
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
        pictures, real: uint8 [P · EACH, 3, H, W], prompt by prompt; real scenes went through the first stage.
        right: by name, bool [P · EACH]: what is right of each picture.
        first: of each picture the things that the judge sees most surely.
        figures: the shares.
    """

    axis: Axis
    prompts: tuple[Prompt, ...]
    pictures: Tensor
    real: Tensor
    right: dict[str, Tensor]
    first: tuple[tuple[str, ...], ...]
    figures: tuple[AxisFigure, ...]


@dataclass(frozen=True)
class Nearest:
    """Whether combinations are given back from training: pictures of combinations that no training scene shows, and
    real scenes of the same captions, beside the scenes that the run saw.

    Attributes:
        seen: how many training scenes are compared with, of how many that the run saw.
        copying: `ldm.evaluation.memorising.copying`, with the real scenes as what is held out.
        distance, real_distance: the middle of the distances to the nearest training scene.
        nearer: the share of pictures that are nearer than all but 5 % of the real scenes are; 0.05 is none the nearer.
    """

    seen: tuple[int, int]
    copying: Copying
    distance: float
    real_distance: float
    nearer: Interval


@dataclass(frozen=True)
class AxesReport:
    """What was measured, and what it stands on."""

    settings: dict[str, Any]
    parts: tuple[AxisResult, ...]
    nearest: Nearest | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, in types of JSON."""
        axes = {}
        for part in self.parts:
            rows = [
                {
                    "caption": prompt.caption,
                    "right": {name: _of_prompt(values, place).tolist() for name, values in part.right.items()},
                    "seen": [list(one) for one in part.first[EACH * place : EACH * (place + 1)]],
                }
                for place, prompt in enumerate(part.prompts)
            ]
            axes[part.axis] = {"figures": [asdict(figure) for figure in part.figures], "prompts": rows}
        nearest = None
        if self.nearest is not None:
            found = self.nearest.copying.to_dict()
            kept = {key: value for key, value in found.items() if not isinstance(value, list) or len(value) == 2}
            nearest = asdict(self.nearest) | {"copying": kept}
        return {**self.settings, "axes": axes, "nearest": nearest}


def compose(
    pipeline: Pipeline,
    judge: Judge,
    *,
    tier: int = 1,
    seen: int | None = None,
    count: int | None = None,
    axes: Sequence[Axis] = AXES,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    keep: KeptPictures | None = None,
    bars: Bars = no_bars,
) -> AxesReport:
    """Asks a model for scenes, and judges what it draws.

    Args:
        tier: of the things that it was trained on.
        seen: how many training scenes it was trained on: those of the numbers from 0 on; None does not look for copies.
        count: prompts of an axis, at most; None takes 100, and of single things all.
        num_inference_steps, guidance_scale: None takes those that are stored with the model.

    Raises:
        ValueError: for a model of other than square images, a count below 1, and a judge of fewer things.
    """
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(f"the model draws {width}x{height} pixels; scenes are squares")
    if count is not None and count < 1:
        raise ValueError(f"{count} prompts of an axis were asked for; it must be at least 1")
    if judge.config.tier < tier:
        raise ValueError("the judge knows the common things alone, and the model was trained on all; train another one")
    steps = pipeline.num_inference_steps if num_inference_steps is None else num_inference_steps
    guidance = pipeline.guidance_scale if guidance_scale is None else guidance_scale
    sampler = SceneSampler(load_catalog(), tier)
    wanted = {axis: tuple(axis_prompts(axis, count, seed, sampler)) for axis in axes}
    parts = []
    with bars("pictures", EACH * sum(map(len, wanted.values()))) as done:
        for axis, asked in wanted.items():
            captions = [prompt.caption for prompt in asked for _ in range(EACH)]
            pictures = (draw if keep is None else keep.draw)(
                pipeline,
                captions,
                seed=seed,
                num_inference_steps=steps,
                guidance_scale=guidance,
                at_once=pictures_at_once(height, width),
                progress=done,
            )
            parts.append(part_of(axis, asked, pictures, pipeline.codec, judge, seed))
    nearest = None if seen is None else _nearest(parts, seen, tier, seed, height, bars)
    settings = {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": pipeline.sampler,
        "things": len(sampler.things),
        "pictures_of_a_prompt": EACH,
        "judge": judge.digest,
        "catalog": load_catalog().digest,
    }
    return AxesReport(settings, tuple(parts), nearest)


def part_of(axis: Axis, asked: Sequence[Prompt], pictures: Tensor, codec: Codec, judge: Judge, seed: int) -> AxisResult:
    """Judges pictures uint8 [P · EACH, 3, H, W] of prompts, and real scenes beside them."""
    real = real_scenes(asked, pictures.shape[-1], seed)
    decoded = through(codec, real)
    named = [prompt.asked for prompt in asked for _ in range(EACH)]
    readings = judge.read(pictures, named)
    of_pictures = _all_right(asked, readings)
    of_decoded, of_real = (_all_right(asked, judge.read(images, named)) for images in (decoded, real))
    figures = tuple(
        figure_of(axis, what, of_pictures[what], of_decoded[what], of_real[what], seed) for what in of_pictures
    )
    first = tuple(reading.first for reading in readings)
    return AxisResult(axis, tuple(asked), pictures, decoded, of_pictures, first, figures)


def real_scenes(asked: Sequence[Prompt], resolution: int, seed: int) -> Tensor:
    """`EACH` scenes of every prompt, of different drawings: uint8 [P · EACH, 3, H, W]."""
    images = []
    for prompt in asked:
        for place in range(EACH):
            moved = generator(seed, "axes", prompt.axis, prompt.caption, place)
            images.append(np.asarray(render_scene(redrawn(prompt.scene, moved), moved, resolution)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def through(codec: Codec, images: Tensor) -> Tensor:
    """What a first stage makes of images, uint8 [N, 3, H, W] both."""
    device = next((value.device for value in _tensors(codec)), torch.device("cpu"))
    dtype = next((value.dtype for value in _tensors(codec)), torch.float32)
    parts = []
    for chunk in images.split(CHUNK):
        latents = codec.sample_latents(codec.moments(to_signed(chunk).to(device, dtype)))
        parts.append(to_uint8(codec.decode(latents).float().cpu()))
    return torch.cat(parts)


def _tensors(codec: Codec) -> Iterator[Tensor]:
    assert isinstance(codec, torch.nn.Module)
    yield from codec.parameters()
    yield from codec.buffers()


def _all_right(asked: Sequence[Prompt], readings: Sequence[Reading]) -> dict[str, Tensor]:
    """By name, bool [P · EACH]. A phrasing may be of any kind of scene: only whether all is right can be told."""
    rows = [right(prompt, reading) for prompt, reading in zip(_each(asked), readings, strict=True)]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def _each(asked: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in asked for _ in range(EACH)]


def _of_prompt(values: Tensor, place: int) -> Tensor:
    return values[EACH * place : EACH * (place + 1)]


def figure_of(axis: Axis, what: str, generated: Tensor, real: Tensor, untouched: Tensor, seed: int) -> AxisFigure:
    """From bool [P · EACH] of the model's pictures, of decoded real scenes, and of real scenes."""
    count = len(generated) // EACH
    groups = torch.arange(count).repeat_interleave(EACH)
    shares = [share_interval(values.double(), groups) for values in (generated, real)]
    return AxisFigure(axis, what, shares[0], shares[1], float(untouched.double().mean()), _ratio(generated, real, seed))


def _ratio(generated: Tensor, real: Tensor, seed: int) -> Interval | None:
    """Of two shares of the same prompts: both are drawn again together."""
    by_prompt = [values.double().view(-1, EACH).mean(dim=1) for values in (generated, real)]  # [P]
    if not bool(real.any()):
        return None
    count = len(by_prompt[0])
    drawn = torch.from_numpy(generator(seed, "ratio").integers(count, size=(RESAMPLES, count)))
    above, below = (values[drawn].mean(dim=1) for values in by_prompt)
    ratios = above / below.clamp(min=1 / (2 * EACH * count))
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(by_prompt[0].mean() / by_prompt[1].mean()), low, high)


# ---- copies


def _nearest(
    parts: Sequence[AxisResult], seen: int, tier: int, seed: int, resolution: int, bars: Bars
) -> Nearest | None:
    of_combinations = [part for part in parts if part.axis in COMBINATIONS]
    if not of_combinations:
        return None
    numbers = generator(seed, "scenes seen").permutation(seen)[:SCENES_SEEN].tolist()
    features = []
    with bars("scenes that the run saw", len(numbers)) as done:
        for start in range(0, len(numbers), CHUNK):
            part = numbers[start : start + CHUNK]
            images = np.stack([np.asarray(render_training_scene(number, resolution, tier)) for number in part])
            features.append(copy_features(to_signed(torch.from_numpy(images).permute(0, 3, 1, 2))))
            done(len(part))
    training = torch.cat(features)
    generated, real = (
        copy_features(to_signed(torch.cat([getattr(part, name) for part in of_combinations])))
        for name in ("pictures", "real")
    )
    known = Known.of(training, None, None)
    distances, reals = near(generated, known).distance, near(real, known).distance
    nearer = distances < torch.quantile(reals, 0.05)
    groups = torch.arange(len(generated) // EACH).repeat_interleave(EACH)
    return Nearest(
        (len(numbers), seen),
        copying(generated, training, real, seed=seed),
        float(distances.median()),
        float(reals.median()),
        share_interval(nearer.double(), groups),
    )
