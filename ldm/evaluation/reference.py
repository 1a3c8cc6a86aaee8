"""The images of a data set as pictures are compared with them: their features, read or computed once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.evaluation.digits import DigitReader
from ldm.evaluation.faithfulness import Gallery, look_of
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.memorising import copy_features
from ldm.evaluation.stored import IMAGES_AT_ONCE, stored_features

Bars = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""(what is being done, of how many) → a context in which the function that it gives is told how many are done."""


def no_bars(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Reference:
    """Training and held-out images, and what is known of them.

    Attributes:
        features, held_out_features: [N, D] and [H, D] float64, in `space`; H may be 0.
        near, held_out_near: [N, K] and [H, K], as `memorising.copy_features` sees them, by which copies are found.
        mirrored: [N, K] of the training images flipped, where training flips; else None.
        gallery: all of them, for retrieval.
        reader: reads digits, where the data is `digits`.
        mean_image: [3, R, R] float64 in [−1, 1], R the resolution of the data: of the training images, unflipped.
        colors: mean and std of each channel, [3] and [3], over all of their pixels.
        yardsticks: what `ldm.evaluation.controls` has measured of it already.
    """

    training: CaptionedImages
    held_out: CaptionedImages | None
    space: FeatureSpace
    features: Tensor
    held_out_features: Tensor
    near: Tensor
    held_out_near: Tensor
    mirrored: Tensor | None
    gallery: Gallery
    reader: DigitReader | None
    mean_image: Tensor
    colors: tuple[Tensor, Tensor]
    yardsticks: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        training: CaptionedImages,
        held_out: CaptionedImages | None,
        space: FeatureSpace,
        *,
        bars: Bars = no_bars,
        print: Callable[[str], None] = print,
    ) -> Reference:
        """Reads every image once more; features that are kept in the cache are not computed again.

        Raises:
            ValueError: if an image has become unreadable, is below 8×8, or the cache cannot be written.
        """
        parts = [training] if held_out is None else [training, held_out]
        with bars("features of the data", sum(map(len, parts))) as done:
            features = [stored_features(images, space, progress=done, print=print) for images in parts]
        with bars("reading the data", sum(map(len, parts))) as done:
            average = _Average(training.config.resolution)
            seen = [_seen(training, done, average)] + [_seen(images, done) for images in parts[1:]]
        near = [torch.stack([copies for copies, _, _ in part]) for part in seen]
        looks = tuple(look for part in seen for _, _, look in part)
        samples = tuple(sample for images in parts for sample in images.samples)
        none = torch.empty(0, near[0].shape[1], dtype=torch.float64)
        return cls(
            training=training,
            held_out=held_out,
            space=space,
            features=features[0],
            held_out_features=features[1] if held_out else features[0][:0],
            near=near[0],
            held_out_near=near[1] if held_out else none,
            mirrored=torch.stack([flipped for _, flipped, _ in seen[0]]) if training.config.flip else None,
            gallery=Gallery(samples, torch.cat(features), looks),
            reader=DigitReader.fit(training.samples) if training.config.path == "digits" else None,
            mean_image=average.sums[0] / average.count,
            colors=average.colors(),
        )


def some_of(images: CaptionedImages, most: int, seed: int) -> CaptionedImages:
    """All of the images or, where there are more, `most` of them, drawn without repetition, in their order.

    Raises:
        ValueError: for fewer than one.
    """
    if most < 1:
        raise ValueError(f"there are to be {most} images to compare with; give at least 1")
    if len(images) <= most:
        return images
    chosen = sorted(generator(seed, "reference").permutation(len(images))[:most].tolist())
    samples = [images.samples[index] for index in chosen]
    return CaptionedImages(samples, images.config, images.seed, cache_bytes=0, sizes=images.buckets.sizes)


class _Average:
    """Sums over images, all brought to one size: of values and of their squares, [3, R, R] each."""

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


def _seen(
    images: CaptionedImages, progress: Callable[[int], object], average: _Average | None = None
) -> list[tuple[Tensor, Tensor, str]]:
    """Of each image what copies are found by, as it is and flipped, and the digest of its pixels."""
    found: list[tuple[Tensor, Tensor, str]] = [(torch.empty(0), torch.empty(0), "")] * len(images)
    for chunk in images.chunks(IMAGES_AT_ONCE):
        pixels = torch.stack([images.image_at(index) for index in chunk])  # uint8 [b, 3, h, w]
        both = [copy_features(to_signed(pixels)), copy_features(to_signed(pixels.flip(-1)))]
        if average is not None:
            average.add(to_signed(pixels))
        for place, index in enumerate(chunk):
            found[index] = both[0][place], both[1][place], look_of(pixels[place])
        progress(len(chunk))
    return found


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of this size go through a model together: as many pixels as 16 have at 128 by 128."""
    return max(1, min(16, 16 * 128**2 // (height * width)))
