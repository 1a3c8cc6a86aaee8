"""Aspect-ratio buckets: which images share one size, so that little of each is cropped away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Aspect ratios 2^(k/4), from 1:2 to 2:1: before the sides are rounded, an image between them loses at most 8 %.
_STEPS_TO_TWO = 4


@dataclass(frozen=True)
class Buckets:
    """The sizes that a set of images is brought to.

    Attributes:
        sizes: (height, width) in pixels, distinct, from the tallest to the widest, each in use.
        assignment: for each image, its place in `sizes`.
        moved: how many images are not at the size nearest to them, since too few others are.
        cropped: what cropping takes of an image, as a share of its pixels in [0, 1), a mean over the images.
        cropped_as_squares: the same if all were squares. Both are None where all are, and nobody looked at their
            shapes.
    """

    sizes: tuple[tuple[int, int], ...]
    assignment: tuple[int, ...]
    moved: int = 0
    cropped: float | None = None
    cropped_as_squares: float | None = None

    def members(self) -> tuple[tuple[int, ...], ...]:
        """For each size the images that have it, in ascending order."""
        members: list[list[int]] = [[] for _ in self.sizes]
        for index, bucket in enumerate(self.assignment):
            members[bucket].append(index)
        return tuple(map(tuple, members))

    def summary(self) -> str:
        """What a person should know of it."""
        counts = np.bincount(self.assignment, minlength=len(self.sizes))
        sizes = ", ".join(f"{h}x{w} ({count})" for (h, w), count in zip(self.sizes, counts, strict=True))
        text = f"sizes, height x width (and how many images): {sizes}"
        if self.cropped is not None and self.cropped_as_squares is not None:
            text += f"; {self.cropped:.1%} of an image is cropped away (of squares {self.cropped_as_squares:.1%})"
        if self.moved:
            text += f"; moved to the next size, since too few at their own make a batch: {self.moved}"
        return text


def bucket_sizes(resolution: int, step: int | None = None) -> tuple[tuple[int, int], ...]:
    """(height, width) of images of about R² pixels with aspect ratios up to about 2, tallest first.

    Args:
        resolution: R, the side of the square among them.
        step: sides are multiples of it, so it should be one of the codec's factor; None takes `bucket_step`.
    """
    step = step or bucket_step(resolution)
    # Symmetric in the sign of k: every size occurs lying and standing.
    exponents = range(-_STEPS_TO_TWO, _STEPS_TO_TWO + 1)
    sides = {k: _rounded(resolution * 2 ** (k / (2 * _STEPS_TO_TWO)), step) for k in exponents}
    sizes = {(sides[-k], sides[k]) for k in exponents}
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def bucket_step(resolution: int) -> int:
    """64 from 512 pixels up, as in Stable Diffusion; below that an eighth of R, which keeps the ratios apart.

    A power of two that divides R, so that the square bucket is R×R. For small R it is 8 as long as that is no more
    than a quarter: most first stages divide by 8.
    """
    largest = max(1, min(64, max(resolution // 8, min(8, resolution // 4))))
    return max(step for step in (1, 2, 4, 8, 16, 32, 64) if step <= largest and resolution % step == 0)


def _rounded(side: float, step: int) -> int:
    return max(1, math.floor(side / step + 0.5)) * step


def square_bucket(count: int, resolution: int) -> Buckets:
    """All images as squares."""
    return Buckets(((resolution, resolution),), (0,) * count)


def assign_buckets(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], batch_size: int) -> Buckets:
    """Brings each image to the size that is nearest in log aspect ratio, which crops least.

    As long as a size has fewer images than a batch, the one that has the fewest is given up, and its images go to the
    nearest of those that are left. So each image is at the nearest size in use. A function of the shapes alone, not
    of their order.

    Args:
        shapes: (width, height) of the images.
        sizes: (height, width) to choose from, tallest first.
        batch_size: how many images make a batch; 1 keeps every size that one image is nearest to.
    """
    # A difference of logarithms is exactly symmetric, so that a size and its upright twin are equally far from 1:1.
    aspects = -np.diff(np.log(shapes))[:, 0]  # [N], log(width / height)
    targets = np.diff(np.log(sizes))[:, 0]  # [K]
    distance = np.abs(aspects[:, None] - targets)  # [N, K]
    nearest = distance.argmin(axis=1)
    chosen = nearest
    left = sorted(set(nearest.tolist()))  # sizes only gain images from here on, so each of these stays in use
    while True:
        counts = np.bincount(chosen, minlength=len(sizes))
        # Of equally small ones the one of the most extreme aspect ratio, then the taller.
        smallest = min(left, key=lambda k: (counts[k], -abs(targets[k]), k))
        if counts[smallest] >= batch_size or len(left) == 1:
            break
        left.remove(smallest)
        chosen = np.array(left)[distance[:, left].argmin(axis=1)]
    place = {k: i for i, k in enumerate(left)}
    return Buckets(
        sizes=tuple(sizes[k] for k in left),
        assignment=tuple(place[k] for k in chosen.tolist()),
        moved=int((chosen != nearest).sum()),
        cropped=float(np.mean(1 - np.exp(-np.abs(aspects - targets[chosen])))),
        cropped_as_squares=float(np.mean(1 - np.exp(-np.abs(aspects)))),
    )
