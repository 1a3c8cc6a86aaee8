"""The real images that generated ones are compared with, and their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.evaluation.features import READ_BATCH, FeatureSpace, cached_features
from ldm.evaluation.nearest_neighbors import color_layout
from ldm.evaluation.prompt_alignment import DigitClassifier, RetrievalGallery, pixel_hash
from ldm.progress import Progress, no_progress


@dataclass(frozen=True)
class Reference:
    """Training and held-out images.

    Attributes:
        features, held_out_features: [N, D] and [H, D] float64, in `space`; H may be 0.
        layouts, held_out_layouts: their `color_layout`, in which copies are searched: [N, K] and [H, K].
        mirrored_layouts: [N, K] of the training images flipped; None if training does not flip.
        gallery: all images, for retrieval.
        digit_classifier: for the data `digits`, else None.
        mean_image: [3, R, R] float64 in [−1, 1], R the resolution of the data: of the training images, unflipped.
        colors: mean and std of each channel, [3] and [3], over all of their pixels.
        baselines: cache of `ldm.evaluation.baselines`.
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
        """Reads every image; features are cached on disk.

        Raises:
            ValueError: for an image that has become unreadable or is below 8×8, or a cache that cannot be written.
        """
        parts = [training] if held_out is None else [training, held_out]
        with progress("features of the data", sum(map(len, parts))) as update:
            features = [cached_features(images, space, progress=update, log=log) for images in parts]
        with progress("reading the data", sum(map(len, parts))) as update:
            average = _Average(training.config.resolution)
            read = [_read(training, update, average)] + [_read(images, update) for images in parts[1:]]
        layouts = [torch.stack([layout for layout, _, _ in part]) for part in read]
        hashes = tuple(pixels for part in read for _, _, pixels in part)
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
            mean_image=average.sums[0] / average.count,
            colors=average.colors(),
        )


def subset(images: CaptionedImages, max_count: int, seed: int) -> CaptionedImages:
    """All images or, if there are more, `max_count` of them, sampled without replacement, in their order.

    Raises:
        ValueError: for fewer than one.
    """
    if max_count < 1:
        raise ValueError(f"{max_count} images to compare with were requested; give at least 1")
    if len(images) <= max_count:
        return images
    chosen = sorted(generator(seed, "reference").permutation(len(images))[:max_count].tolist())
    samples = [images.samples[index] for index in chosen]
    return CaptionedImages(samples, images.config, images.seed, cache_bytes=0, sizes=images.buckets.sizes)


class _Average:
    """Sums of values and of their squares over images resized to one size, [3, R, R] each."""

    def __init__(self, resolution: int) -> None:
        self.size = (resolution, resolution)
        self.sums = torch.zeros(2, 3, *self.size, dtype=torch.float64)
        self.count = 0

    def add(self, images: Tensor) -> None:
        values = images.double()  # [b, 3, h, w] in [-1, 1]
        if values.shape[-2:] != self.size:
            values = F.interpolate(values, self.size, mode="area")
        self.sums += torch.stack([values.sum(dim=0), values.square().sum(dim=0)])
        self.count += len(values)

    def colors(self) -> tuple[Tensor, Tensor]:
        """Mean and std of each channel."""
        mean, squares = self.sums.mean(dim=(-2, -1)) / self.count  # [3], [3]
        return mean, (squares - mean.square()).clamp(min=0).sqrt()


def _read(
    images: CaptionedImages, progress: Callable[[int], object], average: _Average | None = None
) -> list[tuple[Tensor, Tensor, str]]:
    """For each image its color layout, as it is and flipped, and the hash of its pixels."""
    found: list[tuple[Tensor, Tensor, str]] = [(torch.empty(0), torch.empty(0), "")] * len(images)
    for chunk in images.chunks(READ_BATCH):
        pixels = torch.stack([images.image_at(index) for index in chunk])  # uint8 [b, 3, h, w]
        layouts, flipped = color_layout(to_signed(pixels)), color_layout(to_signed(pixels.flip(-1)))
        if average is not None:
            average.add(to_signed(pixels))
        for row, index in enumerate(chunk):
            found[index] = layouts[row], flipped[row], pixel_hash(pixels[row])
        progress(len(chunk))
    return found


def default_batch_size(height: int, width: int) -> int:
    """Images of this size that go through a model together: as many pixels as 16 have at 128×128."""
    return max(1, min(16, 16 * 128**2 // (height * width)))
