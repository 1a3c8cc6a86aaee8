"""Evaluation of a model: generates images for captions of its data and measures them.

Half of the captions are of held-out images, if there are any. Fidelity is of all images; prompt alignment of each half,
since captions of training images may be memorized; copies are searched among the images for training captions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data import generator, to_signed
from ldm.diffusion import NOISE_BANDS
from ldm.evaluation.features import Clip
from ldm.evaluation.fidelity import MIN_IMAGES, Fidelity, measure_fidelity
from ldm.evaluation.images import Reference, SampleCache, default_batch_size, generate_images, sample_captions
from ldm.evaluation.memorization import Copying, LossGap, color_layout, find_copies, loss_gap
from ldm.evaluation.prompt_alignment import ClipScore, Retrieval, clip_score, digit_accuracy, digit_of, retrieval
from ldm.evaluation.stats import Interval
from ldm.evaluation.sweep import evaluations_per_image
from ldm.evaluation.verdict import BaselineComparison, Verdict, compare_with_baselines, verdict
from ldm.pipelines import Pipeline
from ldm.progress import Progress, format_duration, no_progress

GAP_IMAGES, GAP_DRAWS = 128, 4
MIN_FIRST_CALL = 5.0  # seconds: a faster first call is timed again, since it includes initialization


@dataclass(frozen=True)
class GeneratedImages:
    """Images uint8 [N, 3, H, W] for captions of one side, "training" or "held-out", and the indices of theirs."""

    side: str
    captions: tuple[str, ...]
    indices: tuple[int, ...]
    images: Tensor


@dataclass(frozen=True)
class Evaluation:
    """The results; what is None was not measured.

    Attributes:
        settings: samples, features, guidance, steps, sampler, seed, numbers of images.
        generated: for training captions and, if there are held-out images, for theirs.
        retrieval, digit_accuracy, clip_scores: by side; accuracy for the data `digits`, scores with a CLIP model.
        copying: of the images for training captions.
        left_out: sentences: what was not measured, and why.
    """

    settings: dict[str, Any]
    generated: tuple[GeneratedImages, ...]
    fidelity: Fidelity | None
    retrieval: dict[str, Retrieval]
    digit_accuracy: dict[str, Interval]
    clip_scores: dict[str, ClipScore]
    copying: Copying | None
    gap: LossGap | None
    baselines: BaselineComparison | None
    verdict: Verdict
    left_out: tuple[str, ...]

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W], those for training captions first."""
        return torch.cat([side.images for side in self.generated])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the images."""
        return {
            **self.settings,
            "verdict": vars(self.verdict),
            "standing": None if self.baselines is None else self.baselines.to_dict(),
            "quality": None if self.fidelity is None else self.fidelity.to_dict(),
            "retrieval": {side: found.to_dict() for side, found in self.retrieval.items()},
            "read_as_asked": {side: vars(accuracy) for side, accuracy in self.digit_accuracy.items()},
            "clip_score": {side: score.to_dict() for side, score in self.clip_scores.items()},
            "copying": None if self.copying is None else self.copying.to_dict(),
            "loss_gap": None if self.gap is None else self.gap.to_dict(),
            "left_out": list(self.left_out),
        }


def evaluate_pipeline(
    pipeline: Pipeline,
    reference: Reference,
    *,
    samples: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    clip: Clip | None = None,
    with_loss_gap: bool = True,
    cache: SampleCache | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Generates `samples` images and measures them; ValueError for too few, another image size, and other settings.

    Args:
        seed: for captions, noise, and subsets.
        num_inference_steps, guidance_scale: None takes the defaults stored with the model.
        clip: for the CLIP score.
        cache: for generated images; None generates all of them.
    """
    check_samples(samples)
    (height, width), data = pipeline.default_size, reference.training.config
    if not data.bucketed and (height, width) != (data.resolution, data.resolution):
        sizes = f"the data has {data.resolution}x{data.resolution} pixels but the model generates {width}x{height}"
        raise ValueError(f"{sizes}; set data.resolution to the size of training")
    settings: dict[str, Any] = _settings(pipeline, num_inference_steps, guidance_scale)
    make = generate_images if cache is None else cache.generate
    generated = []
    for side, (captions, indices) in select_captions(reference, samples, seed).items():
        with progress(f"images for {side} captions", len(captions)) as update:
            batch_size = default_batch_size(height, width)
            noise = _side_seed(seed, side)
            images = make(pipeline, captions, seed=noise, batch_size=batch_size, progress=update, **settings)
        generated.append(GeneratedImages(side, tuple(captions), tuple(indices), images))
    gap = None
    if with_loss_gap and reference.held_out is not None:
        sides = reference.training, reference.held_out
        total = sum(min(GAP_IMAGES, len(images)) for images in sides) * NOISE_BANDS * GAP_DRAWS
        with progress("loss of both sides", total) as update:
            gap = loss_gap(pipeline, *sides, images=GAP_IMAGES, draws=GAP_DRAWS, seed=seed, progress=update)
    sampling = settings | {"sampler": pipeline.sampler}
    return measure_generated(
        tuple(generated), reference, seed=seed, sampling=sampling, clip=clip, gap=gap, progress=progress
    )


def measure_generated(
    generated: tuple[GeneratedImages, ...],
    reference: Reference,
    *,
    seed: int,
    sampling: dict[str, Any],
    clip: Clip | None = None,
    gap: LossGap | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measures images that were generated, those for training captions first; `sampling` is for the record."""
    by_side: dict[str, Tensor] = {}
    with progress("features of the images", sum(len(side.captions) for side in generated)) as update:
        for side in generated:
            parts = []
            for chunk in side.images.split(default_batch_size(*side.images.shape[-2:])):
                parts.append(reference.space.compute([to_signed(chunk)]))
                update(len(chunk))
            by_side[side.side] = torch.cat(parts)  # [n, D]
    left_out: list[str] = []
    copying = None
    try:
        copying = find_copies(
            color_layout(to_signed(generated[0].images)),
            reference.layouts,
            reference.held_out_layouts if len(reference.held_out_layouts) else None,
            groups=[sample.group for sample in reference.training.samples],
            mirrored=reference.mirrored_layouts,
            seed=seed,
        )
    except ValueError as error:  # too few training images
        left_out.append(f"Left out: whether images are copies of training images, for {error}.")
    features, gallery = torch.cat(list(by_side.values())), reference.gallery
    matches = {side.side: gallery.matches(side.captions) for side in generated}
    found = {side: retrieval(by_side[side], gallery.features, matches[side], seed=seed) for side in matches}
    fidelity, baselines, not_compared = None, None, ""
    counts = {"training images": len(reference.features), "generated images": len(features)}
    if few := next((f"{count} {what}" for what, count in counts.items() if count < MIN_IMAGES), None):
        left_out.append(f"Left out: all metrics of fidelity, for there are {few}; at least {MIN_IMAGES} are needed.")
        sizes = f"{len(features)} images and {len(reference.features)} training images"
        not_compared = f"{sizes} are too few to compare them with baselines, which needs {MIN_IMAGES} of both"
    else:
        held_out = reference.held_out_features if len(reference.held_out_features) else None
        fidelity = measure_fidelity(features, reference.features, held_out, reference.space, seed=seed)
        images = torch.cat([side.images for side in generated])
        baselines = compare_with_baselines(images, features, found, reference, seed=seed)
    accuracy = {}
    for side in generated if reference.digit_classifier is not None else ():
        real = reference.training if side.side == "training" else reference.held_out
        assert reference.digit_classifier is not None and real is not None
        digits = [digit_of(real.samples[index]) for index in side.indices]
        accuracy[side.side] = digit_accuracy(reference.digit_classifier, side.images, digits)
    height, width = generated[0].images.shape[-2:]
    settings = {
        "samples": {side.side: len(side.captions) for side in generated},
        "images": {"training": len(reference.features), "held-out": len(reference.held_out_features)},
        "features": reference.space.label(),
        "size": [width, height],
        "seed": seed,
    }
    return Evaluation(
        settings=settings | sampling,
        generated=generated,
        fidelity=fidelity,
        retrieval=found,
        digit_accuracy=accuracy,
        clip_scores={
            side.side: clip_score(clip, side.images, side.captions)
            for side in generated
            if clip and len(side.captions) > 1
        },
        copying=copying,
        gap=gap,
        baselines=baselines,
        verdict=verdict(copying, gap, baselines, not_compared=not_compared),
        left_out=tuple(left_out),
    )


def estimate_duration(
    pipeline: Pipeline, samples: int, *, num_inference_steps: int | None, guidance_scale: float | None
) -> str:
    """How long an evaluation takes at most, in words, from one image; ValueError as `evaluate_pipeline`."""
    check_samples(samples)
    settings = _settings(pipeline, num_inference_steps, guidance_scale)

    def time_one() -> float:
        started = time.perf_counter()
        generate_images(pipeline, ["a"], seed=0, batch_size=1, **settings)
        return time.perf_counter() - started

    seconds = time_one()
    if seconds < MIN_FIRST_CALL:
        seconds = time_one()
    evaluations = evaluations_per_image(settings["guidance_scale"], settings["num_inference_steps"])
    losses = 2 * GAP_IMAGES * NOISE_BANDS * GAP_DRAWS / evaluations
    most = format_duration((samples + losses) * seconds)
    images = f"{samples} images at {format_duration(seconds)} each or less"
    return f"{images}, and the loss of {2 * GAP_IMAGES} images: at most {most}"


def _settings(pipeline: Pipeline, num_inference_steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    steps = pipeline.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = pipeline.guidance_scale if guidance_scale is None else guidance_scale
    return {"num_inference_steps": steps, "guidance_scale": scale}


def check_samples(samples: int) -> None:
    """Raises ValueError for too few images."""
    if samples < MIN_IMAGES:
        raise ValueError(f"samples is {samples}; at least {MIN_IMAGES} images are needed for useful intervals")


def select_captions(reference: Reference, samples: int, seed: int) -> dict[str, tuple[list[str], list[int]]]:
    """Side → captions and indices of their images: half are of held-out images, each of these at most once."""
    held_out = 0 if reference.held_out is None else min(samples // 2, len(reference.held_out))
    training = reference.training.samples
    selected = {"training": sample_captions(training, samples - held_out, _side_seed(seed, "training"))}
    if reference.held_out is not None and held_out:
        selected["held-out"] = sample_captions(reference.held_out.samples, held_out, _side_seed(seed, "held-out"))
    return selected


def _side_seed(seed: int, side: str) -> int:
    """Sides differ in their noise, and from a sweep that chose the settings."""
    return int(generator(seed, "evaluation", side).integers(2**31))
