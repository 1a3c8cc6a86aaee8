"""The images of an evaluation: generated ones, cached on disk, and the real ones they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import CaptionedImages, Sample, generator, to_signed
from ldm.data.cache import RowCache
from ldm.data.rng import content_hash
from ldm.evaluation.features import READ_BATCH, FeatureSpace, cached_features
from ldm.evaluation.memorization import color_layout
from ldm.evaluation.prompt_alignment import DigitClassifier, RetrievalGallery, pixel_hash
from ldm.pipelines import Pipeline
from ldm.progress import Progress, no_progress
from ldm.text import ignore_cut_prompts

# ---- generated images


CACHE_VERSION = 1  # increase when the images of a key change
SHARD_IMAGES = 8  # an interruption loses no more


def sample_captions(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[str], list[int]]:
    """`count` captions, and the index of the sample that each belongs to; ValueError for none of either.

    Samples are drawn without replacement; when all were drawn, a new round begins in another order. Round r takes the
    r-th caption of a sample, in an order drawn for it. The first n captions do not depend on `count`.
    """
    if not samples:
        raise ValueError("there are no images to take captions from; give a split that has some (data.held_out)")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1 caption")
    captions, indices = [], []
    for position in range(count):
        turn, offset = divmod(position, len(samples))
        if offset == 0:
            order = generator(seed, "asked", turn).permutation(len(samples))
        index = int(order[offset])
        choices = samples[index].captions
        caption_order = generator(seed, "asked caption", samples[index].id).permutation(len(choices))
        captions.append(choices[int(caption_order[turn % len(choices)])])
        indices.append(index)
    return captions, indices


def generate_images(
    pipeline: Pipeline,
    captions: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int,
    first: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """One image per caption, uint8 [N, 3, H, W] on the CPU, in the size of training.

    The noise of image i, counted from `first`, depends on (seed, i) only: models and settings are compared on the same
    noise. Steps and scale are by default those stored with the model; `progress` is called with the number of images
    finished since. ValueError without captions, for a batch size below 1, and for settings out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 image")
    if not captions:
        raise ValueError("there are no captions; give at least one")
    seeds = [int(generator(seed, "drawn", i).integers(2**63 - 1)) for i in range(first, first + len(captions))]
    settings: Any = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    parts = []
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        with ignore_cut_prompts():  # the caller knows the data, and warns once
            images = pipeline(list(captions[batch]), seed=seeds[batch], **settings).images
        parts.append(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
        progress(len(images))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()  # [N, 3, H, W]


class SampleCache:
    """Generates only the images that are not in the cache yet, one row each; `model` is a hash of its weights."""

    def __init__(self, folder: Path, model: str) -> None:
        self._store = RowCache(folder / content_hash(f"{CACHE_VERSION} {model}".encode()))

    def generate(
        self,
        pipeline: Pipeline,
        captions: Sequence[str],
        *,
        seed: int,
        num_inference_steps: int,
        guidance_scale: float,
        batch_size: int,
        progress: Callable[[int], object],
    ) -> Tensor:
        """As `generate_images`: uint8 [N, 3, H, W]."""
        settings: Any = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        key = (seed, *settings.values(), *pipeline.default_size)
        keys = [content_hash(repr((*key, i, caption)).encode()) for i, caption in enumerate(captions)]
        missing = self._store.missing(keys)
        first = min(missing, default=len(keys))  # the first n images do not depend on their number
        progress(first)
        shard = max(1, SHARD_IMAGES // batch_size) * batch_size
        for start in range(first, len(keys), shard):
            part = slice(start, start + shard)
            settings |= {"first": start, "seed": seed, "batch_size": batch_size, "progress": progress}
            images = generate_images(pipeline, captions[part], **settings)
            self._store.add(keys[part], images, max(0, len(keys) - start - shard))
        rows = self._store.open(keys)
        return rows[range(len(keys))] if keys else torch.empty(0, dtype=torch.uint8)


# ---- real images


@dataclass(frozen=True)
class Reference:
    """Training and held-out images.

    Attributes:
        features, held_out_features: [N, D] and [H, D] float64, in `space`; H may be 0.
        layouts, held_out_layouts: their `color_layout`, in which copies are searched: [N, K] and [H, K].
        mirrored_layouts: [N, K] of the training images flipped; None if training does not flip.
        gallery: all images, for retrieval.
        digit_classifier: for the data `digits`, else None.
        mean_image: [3, R, R] float64 in [−1, 1] of the training images, R the resolution of the data.
        colors: mean and std of each channel, [3] and [3].
        baselines: cache of `ldm.evaluation.verdict`.
    """

    training: CaptionedImages
    held_out: CaptionedImages | None
    space: FeatureSpace
    features: Tensor
    held_out_features: Tensor
    layouts: Tensor
    held_out_layouts: Tensor
    mirrored_layouts: Tensor | None
    gallery: RetrievalGallery
    digit_classifier: DigitClassifier | None
    mean_image: Tensor
    colors: tuple[Tensor, Tensor]
    baselines: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_data(
        cls,
        training: CaptionedImages,
        held_out: CaptionedImages | None,
        space: FeatureSpace,
        *,
        progress: Progress = no_progress,
        log: Callable[[str], None] = print,
    ) -> Reference:
        """Reads every image; features are cached on disk. ValueError as in `cached_features`, and below 8×8."""
        parts = [training] if held_out is None else [training, held_out]
        with progress("features of the data", sum(map(len, parts))) as update:
            features = [cached_features(images, space, progress=update, log=log) for images in parts]
        with progress("reading the data", sum(map(len, parts))) as update:
            read, means = zip(*(_read(images, update) for images in parts), strict=True)
        layouts = [torch.stack([layout for layout, _, _ in part]) for part in read]
        hashes = tuple(pixels for part in read for _, _, pixels in part)
        mean, squares = means[0].mean(dim=(-2, -1))  # of each channel
        samples = tuple(sample for images in parts for sample in images.samples)
        return cls(
            training=training,
            held_out=held_out,
            space=space,
            features=features[0],
            held_out_features=features[1] if held_out else features[0][:0],
            layouts=layouts[0],
            held_out_layouts=layouts[1] if held_out else layouts[0][:0],
            mirrored_layouts=torch.stack([flipped for _, flipped, _ in read[0]]) if training.config.flip else None,
            gallery=RetrievalGallery(samples, torch.cat(features), hashes),
            digit_classifier=DigitClassifier.fit(training.samples) if training.config.path == "digits" else None,
            mean_image=means[0][0],
            colors=(mean, (squares - mean.square()).clamp(min=0).sqrt()),
        )


def subset(images: CaptionedImages, max_count: int, seed: int) -> CaptionedImages:
    """All images or, if more, `max_count` of them, sampled without replacement, in order; ValueError below 1."""
    if max_count < 1:
        raise ValueError(f"{max_count} images to compare with were requested; give at least 1")
    if len(images) <= max_count:
        return images
    chosen = sorted(generator(seed, "reference").permutation(len(images))[:max_count].tolist())
    samples = [images.samples[index] for index in chosen]
    return CaptionedImages(samples, images.config, images.seed, cache_bytes=0, sizes=images.buckets.sizes)


def _read(
    images: CaptionedImages, progress: Callable[[int], object]
) -> tuple[list[tuple[Tensor, Tensor, str]], Tensor]:
    """For each image its color layout, as it is and flipped, and the hash of its pixels; and two means over all images.

    These are of the values and of their squares, resized to the resolution: [2, 3, R, R] float64.
    """
    found: list[tuple[Tensor, Tensor, str]] = [(torch.empty(0), torch.empty(0), "")] * len(images)
    size = (images.config.resolution, images.config.resolution)
    sums = torch.zeros(2, 3, *size, dtype=torch.float64)
    for chunk in images.chunks(READ_BATCH):
        pixels = torch.stack([images.image_at(index) for index in chunk])  # uint8 [b, 3, h, w]
        signed = to_signed(pixels)
        for row, index, layout, flipped in zip(
            pixels, chunk, color_layout(signed), color_layout(signed.flip(-1)), strict=True
        ):
            found[index] = layout, flipped, pixel_hash(row)
        values = signed.double() if signed.shape[-2:] == size else F.interpolate(signed.double(), size, mode="area")
        sums += torch.stack([values.sum(dim=0), values.square().sum(dim=0)])
        progress(len(chunk))
    return found, sums / len(images)


def default_batch_size(height: int, width: int) -> int:
    """Images of this size that go through a model together: as many pixels as 16 have at 128×128."""
    return max(1, min(16, 16 * 128**2 // (height * width)))
