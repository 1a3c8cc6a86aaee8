"""One evaluation of a model: pictures for captions of its data, and all that can be said of them.

Half of the captions are of held-out images, as far as there are such, the others of training images. Quality is that of
all pictures; faithfulness is told for each half by itself, since captions of training images may have been learned by
heart; and copies of training images are looked for among the pictures of their captions, where they would be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.evaluation.cells import evaluations_of
from ldm.evaluation.clip import Clip
from ldm.evaluation.controls import standing
from ldm.evaluation.digits import label
from ldm.evaluation.drawn import captions_of, draw
from ldm.evaluation.faithfulness import ClipScore, Retrieval, clip_score, read_as_asked, retrieval
from ldm.evaluation.frechet import Interval
from ldm.evaluation.kept import KeptPictures
from ldm.evaluation.loss_gap import BANDS, LossGap, loss_gap
from ldm.evaluation.memorising import Copying, Verdict, copy_features, copying, verdict
from ldm.evaluation.quality import MINIMUM, Quality, quality
from ldm.evaluation.reference import Bars, Reference, no_bars, pictures_at_once
from ldm.evaluation.standing import Standing
from ldm.pipelines import Pipeline

GAP_IMAGES, GAP_DRAWS = 128, 4
FIRST_CALL = 5.0  # seconds: in less, what a first call does besides would count


@dataclass(frozen=True)
class Asked:
    """The pictures for captions of one side of the split.

    Attributes:
        side: "training" or "held-out".
        captions, own: what was asked for, and the index of the image of that side that each caption is of.
        pictures: uint8 [n, 3, H, W].
    """

    side: str
    captions: tuple[str, ...]
    own: tuple[int, ...]
    pictures: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        settings: what all figures stand on: samples, features, guidance, steps, sampler, seed, sizes of both sides.
        asked: the pictures, of training captions and, where there are held-out images, of theirs.
        quality: None where `left_out` says why.
        found: side → retrieval in the features of the reference.
        read: side → share that is read as the digit asked for, where the data is `digits`.
        clip: side → CLIP score, where a CLIP model was given.
        copies, gap: whether pictures are copies of training images; the gap is None without held-out images.
        standing: how near they are to the data at all; None where quality is.
        verdict: what follows from these.
        left_out: sentences: what is not said, and why.
    """

    settings: dict[str, Any]
    asked: tuple[Asked, ...]
    quality: Quality | None
    found: dict[str, Retrieval]
    read: dict[str, Interval]
    clip: dict[str, ClipScore]
    copies: Copying | None
    gap: LossGap | None
    standing: Standing | None
    verdict: Verdict
    left_out: tuple[str, ...]

    @property
    def pictures(self) -> Tensor:
        """uint8 [N, 3, H, W], those of training captions first."""
        return torch.cat([side.pictures for side in self.asked])

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, for JSON."""
        return {
            **self.settings,
            "verdict": vars(self.verdict),
            "standing": None if self.standing is None else self.standing.to_dict(),
            "quality": None if self.quality is None else self.quality.to_dict(),
            "retrieval": {side: found.to_dict() for side, found in self.found.items()},
            "read_as_asked": {side: vars(share) for side, share in self.read.items()},
            "clip_score": {side: found.to_dict() for side, found in self.clip.items()},
            "copying": None if self.copies is None else self.copies.to_dict(),
            "loss_gap": None if self.gap is None else self.gap.to_dict(),
            "left_out": list(self.left_out),
        }


def evaluate(
    pipeline: Pipeline,
    reference: Reference,
    *,
    samples: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    clip: Clip | None = None,
    with_loss_gap: bool = True,
    keep: KeptPictures | None = None,
    bars: Bars = no_bars,
) -> Evaluation:
    """Draws and measures.

    Args:
        samples: N, how many pictures.
        seed: of captions, noise, and what is drawn for intervals.
        num_inference_steps, guidance_scale: None takes the defaults that are stored with the model.
        clip: for the CLIP score.
        with_loss_gap: whether the loss is measured on both sides of the split.
        keep: keeps pictures as they are drawn; None draws all of them.

    Raises:
        ValueError: for too few samples, a model of another image size than the data, and settings out of range.
    """
    check_samples(samples)
    _check_size(pipeline, reference.training)
    steps = pipeline.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = pipeline.guidance_scale if guidance_scale is None else guidance_scale
    drawing = _Drawing(pipeline, steps, scale, seed, keep, bars)
    wanted = captions_wanted(reference, samples, seed)
    asked = tuple(drawing(side, captions, own) for side, (captions, own) in wanted.items())
    gap = None
    if with_loss_gap and reference.held_out is not None:
        gap = _gap(pipeline, reference.training, reference.held_out, seed, bars)
    how = {"num_inference_steps": steps, "guidance_scale": scale, "sampler": pipeline.sampler}
    return measure(asked, reference, seed=seed, how=how, clip=clip, gap=gap, bars=bars)


def measure(
    asked: tuple[Asked, ...],
    reference: Reference,
    *,
    seed: int,
    how: dict[str, Any],
    clip: Clip | None = None,
    gap: LossGap | None = None,
    bars: Bars = no_bars,
) -> Evaluation:
    """All that is said of pictures that are drawn.

    Args:
        asked: those of training captions first.
        how: the settings that they were drawn with, for the record.
    """
    with bars("features of the pictures", sum(len(side.captions) for side in asked)) as done:
        features = {side.side: _features(side.pictures, reference, done) for side in asked}
    left_out: list[str] = []
    copies = _copies(asked, reference, seed, left_out)
    everything = torch.cat(list(features.values()))
    figures = _quality(everything, reference, seed, left_out)
    found = {side.side: _found(side, features[side.side], reference, seed) for side in asked}
    stands, unmeasured = None, ""
    if figures is None:
        unmeasured = (
            f"{len(everything)} pictures and {len(reference.features)} training images are too few to say whether the "
            f"pictures are like the data, for which there have to be {MINIMUM} of both"
        )
    else:
        pictures = torch.cat([side.pictures for side in asked])
        stands = standing(pictures, everything, found, reference, seed=seed)
    return Evaluation(
        settings=_settings(reference, asked, seed) | how,
        asked=asked,
        quality=figures,
        found=found,
        read={side.side: _read(side, reference) for side in asked if reference.reader is not None},
        clip={
            side.side: clip_score(clip, side.pictures, side.captions) for side in asked if clip and len(side.own) > 1
        },
        copies=copies,
        gap=gap,
        standing=stands,
        verdict=verdict(copies, gap, stands, unmeasured=unmeasured),
        left_out=tuple(left_out),
    )


def expected(pipeline: Pipeline, samples: int, *, num_inference_steps: int | None, guidance_scale: float | None) -> str:
    """How long an evaluation takes, in words. One picture is drawn, for its time; in a batch each takes less.

    Raises:
        ValueError: for too few samples and settings out of range, before anything else is done.
    """
    check_samples(samples)
    steps = pipeline.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = pipeline.guidance_scale if guidance_scale is None else guidance_scale

    def one() -> float:
        started = time.perf_counter()
        draw(pipeline, ["a"], seed=0, num_inference_steps=steps, guidance_scale=scale, at_once=1)
        return time.perf_counter() - started

    seconds = one()
    if seconds < FIRST_CALL:
        seconds = one()
    looks = 2 * GAP_IMAGES * BANDS * GAP_DRAWS / evaluations_of(scale, steps)
    return (
        f"{samples} pictures at {_duration(seconds)} each or less, and the loss of {2 * GAP_IMAGES} images: at most "
        f"{_duration((samples + looks) * seconds)}"
    )


def check_samples(samples: int) -> None:
    """Refuses a number of pictures of which nothing could be said."""
    if samples < MINIMUM:
        raise ValueError(
            f"samples is {samples}; at least {MINIMUM} pictures are needed, as the intervals say little below that"
        )


def _check_size(pipeline: Pipeline, images: CaptionedImages) -> None:
    height, width = pipeline.default_size
    side = images.config.resolution
    if not images.config.bucketed and (height, width) != (side, side):
        raise ValueError(
            f"the data has {side}x{side} pixels but the model draws {width}x{height}; resizing alone would set them "
            "apart: set data.resolution to the size of training"
        )


def captions_wanted(reference: Reference, samples: int, seed: int) -> dict[str, tuple[list[str], list[int]]]:
    """Side → captions and their images: half are of held-out images, each of these at most once."""
    held_out = 0 if reference.held_out is None else min(samples // 2, len(reference.held_out))
    wanted = {"training": captions_of(reference.training.samples, samples - held_out, _seed(seed, "training"))}
    if reference.held_out is not None and held_out:
        wanted["held-out"] = captions_of(reference.held_out.samples, held_out, _seed(seed, "held-out"))
    return wanted


def _seed(seed: int, side: str) -> int:
    """Sides differ in their noise, and both from a sweep that was chosen by."""
    return int(generator(seed, "evaluation", side).integers(2**31))


class _Drawing:
    """Draws the pictures of one side."""

    def __init__(
        self, pipeline: Pipeline, steps: int, scale: float, seed: int, keep: KeptPictures | None, bars: Bars
    ) -> None:
        self.pipeline, self.seed, self.bars = pipeline, seed, bars
        self.draw = draw if keep is None else keep.draw
        self.settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale}
        self.at_once = pictures_at_once(*pipeline.default_size)

    def __call__(self, side: str, captions: list[str], own: list[int]) -> Asked:
        with self.bars(f"pictures of {side} captions", len(captions)) as done:
            pictures = self.draw(
                self.pipeline,
                captions,
                seed=_seed(self.seed, side),
                at_once=self.at_once,
                progress=done,
                **self.settings,
            )
        return Asked(side, tuple(captions), tuple(own), pictures)


def _gap(pipeline: Pipeline, training: CaptionedImages, held_out: CaptionedImages, seed: int, bars: Bars) -> LossGap:
    total = sum(min(GAP_IMAGES, len(images)) for images in (training, held_out)) * BANDS * GAP_DRAWS
    with bars("loss of both sides", total) as done:
        return loss_gap(pipeline, training, held_out, images=GAP_IMAGES, draws=GAP_DRAWS, seed=seed, progress=done)


def _features(pictures: Tensor, reference: Reference, progress: Callable[[int], object]) -> Tensor:
    parts = []
    for chunk in pictures.split(pictures_at_once(*pictures.shape[-2:])):
        parts.append(reference.space.of([to_signed(chunk)]))
        progress(len(chunk))
    return torch.cat(parts)  # [n, D]


def _quality(features: Tensor, reference: Reference, seed: int, left_out: list[str]) -> Quality | None:
    for count, what in ((len(reference.features), "training images to compare with"), (len(features), "pictures")):
        if count < MINIMUM:
            left_out.append(
                f"Left out: all figures of quality, for there are {count} {what}; at least {MINIMUM} are needed, as "
                "the intervals say little below that."
            )
            return None
    held_out = reference.held_out_features if len(reference.held_out_features) else None
    return quality(features, reference.features, held_out, reference.space, seed=seed)


def _found(side: Asked, features: Tensor, reference: Reference, seed: int) -> Retrieval:
    return retrieval(features, reference.gallery.features, reference.gallery.own(side.captions), seed=seed)


def _read(side: Asked, reference: Reference) -> Interval:
    assert reference.reader is not None
    images = reference.training if side.side == "training" else reference.held_out
    assert images is not None
    return read_as_asked(reference.reader, side.pictures, [label(images.samples[index]) for index in side.own])


def _copies(asked: tuple[Asked, ...], reference: Reference, seed: int, left_out: list[str]) -> Copying | None:
    """Of the pictures of training captions: copies would be there."""
    try:
        return copying(
            copy_features(to_signed(asked[0].pictures)),
            reference.near,
            reference.held_out_near if len(reference.held_out_near) else None,
            groups=[sample.group for sample in reference.training.samples],
            mirrored=reference.mirrored,
            seed=seed,
        )
    except ValueError as error:  # too few training images to tell what is near
        left_out.append(f"Left out: whether pictures are copies of training images, for {error}.")
        return None


def _settings(reference: Reference, asked: tuple[Asked, ...], seed: int) -> dict[str, Any]:
    height, width = asked[0].pictures.shape[-2:]
    return {
        "samples": {side.side: len(side.captions) for side in asked},
        "images": {"training": len(reference.features), "held-out": len(reference.held_out_features)},
        "features": reference.space.label(),
        "size": [width, height],
        "seed": seed,
    }


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
