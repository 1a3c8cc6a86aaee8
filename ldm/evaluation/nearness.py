"""How near images are to training images, in features, where some training images are variants of one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TRAINING = 10
# Training images closer than this, in units of the root mean square distance of two of them, are taken for variants of
# one: most of the skin tones of OpenMoji, one of a hundred scans of digits and its nearest.
VARIANT = 0.2
_ROWS = 256


@dataclass(frozen=True)
class Near:
    """Of each image: its nearest training image, the distance, the ratio, and whether it is closer than others are."""

    nearest: Tensor
    distance: Tensor
    ratio: Tensor
    closer: Tensor


@dataclass(frozen=True)
class Known:
    """Training images: features [N, D], as they are and perhaps mirrored; groups [N]; how near variants of one are."""

    variants: tuple[Tensor, ...]
    groups: Tensor
    grouped: bool
    radius: float

    @classmethod
    def of(cls, training: Tensor, groups: Sequence[str] | None, mirrored: Tensor | None) -> Known:
        variants = (training,) if mirrored is None else (training, mirrored)
        for features in variants:
            check("training", features, training.shape[-1])
        if mirrored is not None and len(mirrored) != len(training):
            raise ValueError(f"there are {len(training)} training images and {len(mirrored)} mirrored; give as many")
        if groups is not None and len(groups) != len(training):
            raise ValueError(f"there are {len(training)} training images and {len(groups)} groups; give one an image")
        names = range(len(training)) if groups is None else groups
        numbers: dict[int | str, int] = {}
        for name in names:
            numbers.setdefault(name, len(numbers))
        if len(numbers) < LEAST_TRAINING:
            raise ValueError(
                f"there are {len(numbers)} different training images; at least {LEAST_TRAINING} are needed to tell "
                "what is near"
            )
        # The mean square distance of two of them is twice the variance.
        spread = math.sqrt(2 * float(training.double().var(dim=0).sum()))
        numbered = torch.tensor([numbers[name] for name in names])
        return cls(tuple(one.double() for one in variants), numbered, groups is not None, VARIANT * spread)

    def distances(self, features: Tensor) -> Tensor:
        """[n, D] → [n, N]: to each training image, or to its mirror image where that is nearer."""
        # By products, as in float64 they are exact to 1e-7 of the spread.
        mode = "use_mm_for_euclid_dist"
        return torch.stack([torch.cdist(features, one, compute_mode=mode) for one in self.variants]).amin(dim=0)

    def variants_of(self, images: Tensor, between: Tensor) -> Tensor:
        """Which training images are variants of these: [n] indices and their `between` [n, N] → bool [n, N]."""
        return (self.groups[images][:, None] == self.groups) | (between < self.radius)


def near(features: Tensor, known: Known, leave_out: Tensor | None = None) -> Near:
    """`leave_out` [n]: indices of the training images that the features are of; they are compared with the others."""
    parts = []
    for start in range(0, len(features), _ROWS):
        own = None if leave_out is None else leave_out[start : start + _ROWS]
        parts.append(_near_few(features[start : start + _ROWS].double(), known, own))
    return Near(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _near_few(features: Tensor, known: Known, own: Tensor | None) -> Near:
    distances = known.distances(features)  # [n, N]
    if own is not None:
        # Groups say what is held out together; where there are none, the distance has to.
        same = known.groups[own][:, None] == known.groups
        gone = same if known.grouped else same | (distances < known.radius)
        distances = distances.masked_fill(gone, math.inf)
    distance, nearest = distances.min(dim=1)
    between = known.distances(known.variants[0][nearest])  # [n, N]
    not_other = known.variants_of(nearest, between)
    others = distances.masked_fill(not_other, math.inf).amin(dim=1)
    apart = between.masked_fill(not_other, math.inf).amin(dim=1)
    ratio = distance / others
    # Where all training images are variants of the nearest there is nothing to compare with.
    return Near(nearest, distance, ratio.masked_fill(others.isinf(), 1.0), distance < apart)


def distinct(features: Tensor, radius: float) -> Tensor:
    """Indices, ascending, of those of [n, K] that are not closer than `radius` to one that is kept before them."""
    kept: list[int] = []
    rows = torch.empty(features.shape, dtype=torch.float64)  # the first of them are those that are kept
    for index, row in enumerate(features.double()):
        if not kept or float((rows[: len(kept)] - row).square().sum(dim=1).min()) >= radius**2:
            rows[len(kept)] = row
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


def check(name: str, features: Tensor, dimensions: int) -> None:
    if features.ndim != 2 or features.shape[1] != dimensions:
        raise ValueError(
            f"{name} features have shape {list(features.shape)}; they must be [images, {dimensions}], all of one kind"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} features are not all finite; look at the pictures they come from")
