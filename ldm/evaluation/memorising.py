"""Learning or memorising: are generated pictures nearer to single training images than unseen real images are?

What is measured of a picture is the ratio of two distances: to the nearest training image, and to the nearest of the
others. A copy has a ratio near 0, however noisy it is, or dull; a picture that resembles many training images, such as
their average, has one near 1, though it may be nearer to all of them than any real image. Where training images come in
variants, those of the nearest one do not count as others, for else a copy of one would lie near the next as well.
(Nearest over further distances: arXiv:2301.13188, section 5; a third sample of unseen data to compare with:
arXiv:2004.05675.)

How low is too low is read from real images that were not trained on: held-out ones or, where these are few, training
images left out in turn. An unseen image is exchangeable with them, so that the number of pictures below their
quantile has a known distribution, for calibrations of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import generator
from ldm.evaluation.loss_gap import LossGap
from ldm.pipelines import contact_sheet

GRID = 8
LEVEL = 0.05
"""The share of unseen real images that lie below the threshold."""
LEAST_TRAINING = 10
ENOUGH_HELD_OUT = 100
MOST_LEFT_OUT = 2048
# Training images closer than this, in units of the root mean square distance of two of them, are taken for variants of
# one: three of four skin-tone variants of OpenMoji, one of 700 pairs of nearest scans of digits.
VARIANT = 0.15

NORMAL_95 = 1.96
_ROWS = 256


def copy_features(images: Tensor) -> Tensor:
    """Colours averaged to 8×8 places: images [B, 1 or 3, H, W] in [−1, 1] → [B, 192] float64.

    Not the features of the Fréchet distance: a network that knows what a picture shows sees noise as well, and calls a
    noisy copy something new, while the places of colours hardly change under noise, blur or an autoencoder.

    Raises:
        ValueError: for images below 8×8.
    """
    if min(images.shape[-2:]) < GRID:
        raise ValueError(f"images are {images.shape[-2]}x{images.shape[-1]}; to find copies they need {GRID}x{GRID}")
    return F.adaptive_avg_pool2d(images.to(torch.float64).expand(-1, 3, -1, -1), GRID).flatten(1)


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with Wilson's 95 % interval of the share."""

    count: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.count / self.total

    @classmethod
    def of(cls, marked: Tensor) -> Share:
        """From a bool [N], N at least 1."""
        count, total = int(marked.sum()), len(marked)
        share, z = count / total, NORMAL_95**2 / total
        middle = (share + z / 2) / (1 + z)
        reach = math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
        return cls(count, total, max(middle - reach, 0.0), min(middle + reach, 1.0))


@dataclass(frozen=True)
class Copying:
    """How near generated pictures are to training images.

    Attributes:
        nearest: [M] int64: of each picture, the index of its nearest training image.
        distance: [M] float64, in the units of the features.
        ratio: [M] float64: distance over that to the nearest other training image; from 0, a copy, to 1.
        threshold: ratios below it are `suspect`.
        suspect: [M] bool.
        suspects: their share.
        expected: the share of unseen real images that would be suspect.
        chance: how probable so many suspects are, or more, among M unseen real images.
        held_out: the share of suspects among held-out images; None without any.
        closer: the share of pictures closer to their nearest training image than that is to any other.
        held_out_closer: the same of held-out images.
        calibrated_on: how many held-out images, and training images left out, the threshold is from.
    """

    nearest: Tensor
    distance: Tensor
    ratio: Tensor
    threshold: float
    suspect: Tensor
    suspects: Share
    expected: float
    chance: float
    held_out: Share | None
    closer: Share
    held_out_closer: Share | None
    calibrated_on: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types of JSON."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor | tuple):
                value = list(value) if isinstance(value, tuple) else value.tolist()
            plain[name] = vars(value) | {"share": value.share} if isinstance(value, Share) else value
        return plain


def copying(
    generated: Tensor,
    training: Tensor,
    held_out: Tensor | None,
    *,
    groups: Sequence[str] | None = None,
    mirrored: Tensor | None = None,
    seed: int = 0,
) -> Copying:
    """Compares pictures with all training images, and how near they are with how near unseen real images are.

    The threshold is the ratio that a share `LEVEL` of unseen images has at most: of the held-out images alone, where
    they are `ENOUGH_HELD_OUT`, else of these and of training images (each compared with those of other groups).

    Args:
        generated, training, held_out: features [M, D], [N, D], [H, D], such as those of `copy_features`.
        groups: of the training images, one a variant of the same picture: `Sample.group`. Held-out images must be of
            other groups, as `ldm.data.split` makes sure. None takes each image for itself.
        mirrored: [N, D] of the training images flipped; to be given where training flips.
        seed: of the training images that are left out in turn, where they are more than 2,048.

    Raises:
        ValueError: for features that do not fit together or are not finite, and for fewer than 10 training groups.
    """
    known = _Known.of(training, groups, mirrored)
    for name, features in (("generated", generated), ("held-out", held_out)):
        if features is not None:
            _check(name, features, known.variants[0].shape[1])
    if not len(generated):
        raise ValueError("there are no generated pictures; draw some")
    unseen = None if held_out is None or not len(held_out) else _near(held_out, known)
    calibration = [] if unseen is None else [unseen.ratio]
    left_out = 0
    if unseen is None or len(unseen.ratio) < ENOUGH_HELD_OUT:
        order = torch.from_numpy(generator(seed, "left out").permutation(len(training))[:MOST_LEFT_OUT])
        calibration.append(_near(training[order], known, leave_out=order).ratio)
        left_out = len(order)
    ratios = torch.cat(calibration).sort().values
    rank = max(1, math.floor(LEVEL * (len(ratios) + 1)))
    threshold = float(ratios[rank - 1])
    found = _near(generated, known)
    suspect = found.ratio < threshold
    suspects = Share.of(suspect)
    return Copying(
        nearest=found.nearest,
        distance=found.distance,
        ratio=found.ratio,
        threshold=threshold,
        suspect=suspect,
        suspects=suspects,
        expected=rank / (len(ratios) + 1),
        chance=_chance(suspects.count, suspects.total, rank, len(ratios) + 1 - rank),
        held_out=None if unseen is None else Share.of(unseen.ratio < threshold),
        closer=Share.of(found.closer),
        held_out_closer=None if unseen is None else Share.of(unseen.closer),
        calibrated_on=(0 if unseen is None else len(unseen.ratio), left_out),
    )


@dataclass(frozen=True)
class _Near:
    """Of each image: its nearest training image, the distance, the ratio, and whether it is closer than others are."""

    nearest: Tensor
    distance: Tensor
    ratio: Tensor
    closer: Tensor


@dataclass(frozen=True)
class _Known:
    """Training images: features [N, D], as they are and perhaps mirrored; groups [N]; how near variants of one are."""

    variants: tuple[Tensor, ...]
    groups: Tensor
    grouped: bool
    radius: float

    @classmethod
    def of(cls, training: Tensor, groups: Sequence[str] | None, mirrored: Tensor | None) -> _Known:
        variants = (training,) if mirrored is None else (training, mirrored)
        for features in variants:
            _check("training", features, training.shape[-1])
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


def _near(features: Tensor, known: _Known, leave_out: Tensor | None = None) -> _Near:
    """`leave_out` [n]: indices of the training images that the features are of; they are compared with the others."""
    parts = []
    for start in range(0, len(features), _ROWS):
        own = None if leave_out is None else leave_out[start : start + _ROWS]
        parts.append(_near_few(features[start : start + _ROWS].double(), known, own))
    return _Near(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _near_few(features: Tensor, known: _Known, own: Tensor | None) -> _Near:
    distances = known.distances(features)  # [n, N]
    if own is not None:
        # Groups say what is held out together; where there are none, the distance has to.
        same = known.groups[own][:, None] == known.groups
        gone = same if known.grouped else same | (distances < known.radius)
        distances = distances.masked_fill(gone, math.inf)
    distance, nearest = distances.min(dim=1)
    between = known.distances(known.variants[0][nearest])  # [n, N]
    not_other = known.variants_of(nearest, between)
    if own is not None:
        not_other |= gone
    others = distances.masked_fill(not_other, math.inf).amin(dim=1)
    apart = between.masked_fill(not_other, math.inf).amin(dim=1)
    ratio = distance / others
    # Where all training images are variants of the nearest there is nothing to compare with.
    return _Near(nearest, distance, ratio.masked_fill(others.isinf(), 1.0), distance < apart)


def _check(name: str, features: Tensor, dimensions: int) -> None:
    if features.ndim != 2 or features.shape[1] != dimensions:
        raise ValueError(
            f"{name} features have shape {list(features.shape)}; they must be [images, {dimensions}], all of one kind"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} features are not all finite; look at the pictures they come from")


def _chance(count: int, total: int, below: int, above: int) -> float:
    """P(X >= count) of X, the number of `total` new values below the `below`-th of below + above − 1 old ones.

    All of one distribution, X is beta-binomial, whatever that is: it counts in that the threshold is itself a sample.
    """

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    terms = [
        math.exp(
            math.lgamma(total + 1)
            - math.lgamma(x + 1)
            - math.lgamma(total - x + 1)
            + log_beta(x + below, total - x + above)
            - log_beta(below, above)
        )
        for x in range(count, total + 1)
    ]
    return min(math.fsum(terms), 1.0)
