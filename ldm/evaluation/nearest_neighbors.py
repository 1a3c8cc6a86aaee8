"""Nearest training images, in features that show copies, where some training images are variants of one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT_GRID = 8
MIN_TRAINING_GROUPS = 10
# Training images closer than this, relative to the root mean square distance of two of them, count as variants of one
# another: most skin tones of OpenMoji, and one of a hundred scans of digits with its nearest.
VARIANT_RADIUS = 0.2
_ROWS = 256


def color_layout(images: Tensor) -> Tensor:
    """Colors averaged to 8×8 cells: images [B, 1 or 3, H, W] in [−1, 1] → [B, 192] float64.

    Copies are searched in these and not in features of a network, which see noise and would call a noisy copy new;
    average colors hardly change under noise, blur or an autoencoder.

    Raises:
        ValueError: for images below 8×8.
    """
    if min(images.shape[-2:]) < LAYOUT_GRID:
        raise ValueError(
            f"images are {images.shape[-2]}x{images.shape[-1]}; to find copies they need {LAYOUT_GRID}x{LAYOUT_GRID}"
        )
    return F.adaptive_avg_pool2d(images.to(torch.float64).expand(-1, 3, -1, -1), LAYOUT_GRID).flatten(1)


@dataclass(frozen=True)
class NearestNeighbors:
    """For each of n images, its nearest training image.

    Attributes:
        index: int64 [n].
        distance: [n].
        ratio: [n], the distance over that to the nearest training image that is no variant of `index`; 1 without one.
        closer: bool [n], whether the distance is below that of `index` to its own nearest non-variant.
    """

    index: Tensor
    distance: Tensor
    ratio: Tensor
    closer: Tensor


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of the training images, and which of them are variants of one another.

    Attributes:
        variants: [N, D] features as they are and, if training flips, mirrored.
        groups: int64 [N].
        has_groups: whether groups were given; otherwise each image is its own.
        radius: images closer than this are variants of one another.
    """

    variants: tuple[Tensor, ...]
    groups: Tensor
    has_groups: bool
    radius: float

    @classmethod
    def from_features(
        cls, training: Tensor, groups: Sequence[str] | None = None, mirrored: Tensor | None = None
    ) -> TrainingFeatures:
        """From features [N, D].

        Raises:
            ValueError: for shapes that do not match, non-finite features, and fewer than 10 groups.
        """
        variants = (training,) if mirrored is None else (training, mirrored)
        for features in variants:
            check_matrix("training", features, training.shape[-1])
        if mirrored is not None and len(mirrored) != len(training):
            raise ValueError(f"there are {len(training)} training images and {len(mirrored)} mirrored; give as many")
        if groups is not None and len(groups) != len(training):
            raise ValueError(f"there are {len(training)} training images and {len(groups)} groups; give one per image")
        names = range(len(training)) if groups is None else groups
        numbers: dict[int | str, int] = {}
        for name in names:
            numbers.setdefault(name, len(numbers))
        if len(numbers) < MIN_TRAINING_GROUPS:
            raise ValueError(
                f"there are {len(numbers)} different training images; at least {MIN_TRAINING_GROUPS} are needed to "
                "find copies"
            )
        # The mean square distance of two of them is twice the variance.
        spread = math.sqrt(2 * float(training.double().var(dim=0).sum()))
        numbered = torch.tensor([numbers[name] for name in names])
        return cls(tuple(one.double() for one in variants), numbered, groups is not None, VARIANT_RADIUS * spread)

    def distances(self, features: Tensor) -> Tensor:
        """[n, D] → [n, N]: to each training image, or to its mirror image where that is nearer."""
        # From products: in float64 they are exact to 1e-7 of the spread.
        mode = "use_mm_for_euclid_dist"
        return torch.stack([torch.cdist(features, one, compute_mode=mode) for one in self.variants]).amin(dim=0)

    def nearest(self, features: Tensor, leave_out: Tensor | None = None) -> NearestNeighbors:
        """Of features [n, D].

        Args:
            leave_out: int64 [n]: indices of the training images that the features are of; each is compared with images
                of other groups.
        """
        parts = []
        for start in range(0, len(features), _ROWS):
            own = None if leave_out is None else leave_out[start : start + _ROWS]
            parts.append(self._nearest(features[start : start + _ROWS].double(), own))
        return NearestNeighbors(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def _nearest(self, features: Tensor, own: Tensor | None) -> NearestNeighbors:
        distances = self.distances(features)  # [n, N]
        if own is not None:
            # Groups define what is held out together; without them, the distance does.
            excluded = self.groups[own][:, None] == self.groups
            if not self.has_groups:
                excluded = excluded | (distances < self.radius)
            distances = distances.masked_fill(excluded, math.inf)
        distance, index = distances.min(dim=1)
        between = self.distances(self.variants[0][index])  # [n, N]
        variants = (self.groups[index][:, None] == self.groups) | (between < self.radius)
        others = distances.masked_fill(variants, math.inf).amin(dim=1)
        apart = between.masked_fill(variants, math.inf).amin(dim=1)
        ratio = distance / others
        return NearestNeighbors(index, distance, ratio.masked_fill(others.isinf(), 1.0), distance < apart)


def distinct(features: Tensor, radius: float) -> Tensor:
    """Ascending indices of the rows of [n, K] that are not closer than `radius` to an earlier one of these."""
    chosen: list[int] = []
    rows = torch.empty(features.shape, dtype=torch.float64)  # the first len(chosen) are used
    for index, row in enumerate(features.double()):
        if not chosen or float((rows[: len(chosen)] - row).square().sum(dim=1).min()) >= radius**2:
            rows[len(chosen)] = row
            chosen.append(index)
    return torch.tensor(chosen, dtype=torch.int64)


def check_matrix(name: str, features: Tensor, dimensions: int) -> None:
    """Raises ValueError unless features are finite and [images, dimensions]."""
    if features.ndim != 2 or features.shape[1] != dimensions:
        raise ValueError(f"{name} features have shape {list(features.shape)}; they must be [images, {dimensions}]")
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} features are not all finite; check their images")
