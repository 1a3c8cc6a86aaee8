"""Does a model memorize: are generated images closer to single training images than unseen real images are?

The score of an image is the distance to its nearest training image over that to the nearest other one that is no
variant of it (arXiv:2301.13188): near 0 for a copy, near 1 for an image that resembles many. The threshold is a
quantile of the scores of unseen real images (arXiv:2004.05675): held-out ones or, if these are few, training images
left out in turn. The number of unseen images below it has a known distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import NOISE_BANDS, NoiseSchedule, diffusion_loss, noise_bands, without_variance
from ldm.evaluation.stats import beta_binomial_tail, student_quantile, wilson_interval
from ldm.pipelines import Pipeline, contact_sheet

# ---- nearest training images, where some of these are variants of one another


LAYOUT_GRID = 8
MIN_TRAINING_GROUPS = 10
# Training images closer than this, relative to the root mean square distance of two of them, count as variants of one
# another: most skin tones of OpenMoji, and one of a hundred scans of digits with its nearest.
VARIANT_RADIUS = 0.2
_ROWS = 256


def color_layout(images: Tensor) -> Tensor:
    """Colors averaged to 8×8 cells, which noise hardly changes: [B, 1 or 3, H, W] in [−1, 1] → [B, 192] float64."""
    if min(images.shape[-2:]) < LAYOUT_GRID:
        height, width = images.shape[-2:]
        raise ValueError(f"images are {height}x{width}; to find copies give {LAYOUT_GRID}x{LAYOUT_GRID} or more")
    return F.adaptive_avg_pool2d(images.to(torch.float64).expand(-1, 3, -1, -1), LAYOUT_GRID).flatten(1)


@dataclass(frozen=True)
class NearestNeighbors:
    """For each of n images, the index of its nearest training image, and its distance.

    `ratio` is the distance over that to the nearest training image that is no variant of `index`, 1 without one;
    `closer` says whether the distance is below that of `index` to its own nearest non-variant. All are [n].
    """

    index: Tensor
    distance: Tensor
    ratio: Tensor
    closer: Tensor


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of the training images, [N, D], also mirrored if training flips; and their groups, int64 [N].

    Images closer than `radius` are variants of one another; each is its own group unless `has_groups`.
    """

    variants: tuple[Tensor, ...]
    groups: Tensor
    has_groups: bool
    radius: float

    @classmethod
    def from_features(
        cls, training: Tensor, groups: Sequence[str] | None = None, mirrored: Tensor | None = None
    ) -> TrainingFeatures:
        """From features [N, D]; ValueError for other shapes, non-finite features, and fewer than 10 groups."""
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
        """Of features [n, D]; with `leave_out`, int64 [n], of these training images, each among other groups."""
        parts = []
        for rows in torch.arange(len(features)).split(_ROWS):
            distances = self.distances(features[rows].double())  # [b, N]
            if leave_out is not None:
                # Groups define what is held out together; without them, the distance does.
                excluded = self.groups[leave_out[rows]][:, None] == self.groups
                if not self.has_groups:
                    excluded = excluded | (distances < self.radius)
                distances = distances.masked_fill(excluded, math.inf)
            distance, index = distances.min(dim=1)
            between = self.distances(self.variants[0][index])  # [b, N]
            variants = (self.groups[index][:, None] == self.groups) | (between < self.radius)
            others = distances.masked_fill(variants, math.inf).amin(dim=1)
            apart = between.masked_fill(variants, math.inf).amin(dim=1)
            ratio = (distance / others).masked_fill(others.isinf(), 1.0)
            parts.append((index, distance, ratio, distance < apart))
        return NearestNeighbors(*map(torch.cat, zip(*parts, strict=True)))


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


# ---- copies


QUANTILE = 0.05
"""The fraction of unseen real images below the threshold."""
MIN_HELD_OUT = 100
MAX_LEFT_OUT = 2048

SHEET_IMAGES, SHEET_PAIRS, SHEET_SIDE = 24, 4, 96


@dataclass(frozen=True)
class CountedFraction:
    """`count` of `total`, with Wilson's 95 % interval of the fraction."""

    count: int
    total: int
    low: float
    high: float

    @property
    def fraction(self) -> float:
        return self.count / self.total

    @classmethod
    def from_mask(cls, mask: Tensor) -> CountedFraction:
        """From bool [N], N at least 1."""
        count, total = int(mask.sum()), len(mask)
        interval = wilson_interval(count / total, total)
        return cls(count, total, interval.low, interval.high)


@dataclass(frozen=True)
class Copying:
    """How close M generated images are to training images.

    Attributes:
        nearest, distance, ratio: of `NearestNeighbors`; `flagged` [M], with a ratio below the `threshold`.
        flagged_fraction: of all images; `expected` is that of unseen real images.
        distinct: images that neither are near-duplicates of an earlier one nor share its nearest training image; only
            these are evidence.
        chance: p-value: the probability that as many of `distinct` unseen real images are flagged.
        variants: images that are flagged and as close to a training image as its variants are.
        held_out: flagged held-out images; None without any.
        closer: images closer to their nearest training image than that is to any other; `held_out_closer` likewise.
        calibrated_on: number of held-out images, and of training images left out, behind the threshold.
    """

    nearest: Tensor
    distance: Tensor
    ratio: Tensor
    threshold: float
    flagged: Tensor
    flagged_fraction: CountedFraction
    expected: float
    distinct: int
    chance: float
    variants: CountedFraction
    held_out: CountedFraction | None
    closer: CountedFraction
    held_out_closer: CountedFraction | None
    calibrated_on: tuple[int, int]

    def describe(self) -> str:
        """The flagged images and the calibration, as a part of a sentence."""
        flagged = self.flagged_fraction
        numbers = flagged.fraction, flagged.low, flagged.high, 1 - self.expected
        percent, low, high, unseen = (f"{100 * number:.0f} %" for number in numbers)
        own = f"; of held-out images {100 * self.held_out.fraction:.0f} % are" if self.held_out else ""
        kinds = zip(self.calibrated_on, ("held-out images", "training images left out in turn"), strict=True)
        return (
            f"{flagged.count} of {flagged.total} images ({percent}, 95 % interval {low} to {high}) are closer to one "
            f"training image than {unseen} of unseen images{own} (calibrated on "
            f"{' and '.join(f'{count} {kind}' for count, kind in kinds if count)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, CountedFraction):
                value = vars(value) | {"share": value.fraction}
            elif isinstance(value, Tensor):
                value = value.tolist()
            plain[{"flagged": "suspect", "flagged_fraction": "suspects"}.get(name, name)] = value
        return plain


def find_copies(
    generated: Tensor,
    training: Tensor,
    held_out: Tensor | None,
    *,
    groups: Sequence[str] | None = None,
    mirrored: Tensor | None = None,
    seed: int = 0,
) -> Copying:
    """Compares generated images with all training images, and with unseen real images.

    The threshold is the `QUANTILE` of the ratios of held-out images and, if these are fewer than `MIN_HELD_OUT`, of
    training images, each compared with those of other groups (at most 2,048, by `seed`).

    Args:
        generated, training, held_out: features [M, D], [N, D], [H, D], such as `color_layout`.
        groups: `Sample.group` of the training images, None if each is its own; held-out images are of other groups.
        mirrored: [N, D], the training images flipped; give them if training flips.

    Raises:
        ValueError: for shapes that do not match, non-finite features, and fewer than 10 training groups.
    """
    known = TrainingFeatures.from_features(training, groups, mirrored)
    for name, features in (("generated", generated), ("held-out", held_out)):
        if features is not None:
            check_matrix(name, features, training.shape[1])
    if not len(generated):
        raise ValueError("there are no generated images; give at least one")
    unseen = None if held_out is None or not len(held_out) else known.nearest(held_out)
    calibration = [] if unseen is None else [unseen.ratio]
    left_out = 0
    if unseen is None or len(unseen.ratio) < MIN_HELD_OUT:
        order = torch.from_numpy(generator(seed, "left out").permutation(len(training))[:MAX_LEFT_OUT])
        calibration.append(known.nearest(training[order], leave_out=order).ratio)
        left_out = len(order)
    ratios = torch.cat(calibration).sort().values
    rank = max(1, math.floor(QUANTILE * (len(ratios) + 1)))
    threshold = float(ratios[rank - 1])
    found = known.nearest(generated)
    flagged = found.ratio < threshold
    # One image per set of near-duplicates and per nearest group: a repeated image would be flagged each time, and
    # images of other data (digits for a model of photographs) may all have the same dark photograph as their nearest.
    first_of = {int(known.groups[found.index[i]]): i for i in reversed(distinct(generated, known.radius).tolist())}
    evidence = flagged[sorted(first_of.values())]
    return Copying(
        nearest=found.index,
        distance=found.distance,
        ratio=found.ratio,
        threshold=threshold,
        flagged=flagged,
        flagged_fraction=CountedFraction.from_mask(flagged),
        expected=rank / (len(ratios) + 1),
        distinct=len(evidence),
        chance=beta_binomial_tail(int(evidence.sum()), len(evidence), rank, len(ratios) + 1 - rank),
        variants=CountedFraction.from_mask(flagged & (found.distance < known.radius)),
        held_out=None if unseen is None else CountedFraction.from_mask(unseen.ratio < threshold),
        closer=CountedFraction.from_mask(found.closer),
        held_out_closer=None if unseen is None else CountedFraction.from_mask(unseen.closer),
        calibrated_on=(0 if unseen is None else len(unseen.ratio), left_out),
    )


def nearest_sheet(
    generated: Sequence[Image.Image], training: Callable[[int], Image.Image], copying: Copying
) -> Image.Image:
    """The 24 generated images with the lowest ratios, each beside its nearest training image, the closest first.

    `generated` are all, `training` opens one by its index. ValueError for another number of images than in `copying`.
    """
    if len(generated) != len(copying.ratio):
        raise ValueError(f"there are {len(generated)} images but {len(copying.ratio)} were compared; give the same")
    order = copying.ratio.argsort(stable=True)[:SHEET_IMAGES].tolist()
    rows, captions = [], []
    for start in range(0, len(order), SHEET_PAIRS):
        row = order[start : start + SHEET_PAIRS]
        rows.append([image for i in row for image in (generated[i], training(int(copying.nearest[i])))])
        ratios = ", ".join(f"{float(copying.ratio[i]):.2f}" for i in row)
        captions.append(f"generated | nearest: {ratios} (copies below {copying.threshold:.2f})")
    return contact_sheet(rows, captions, size=SHEET_SIDE)


# ---- the loss on training and on held-out images


BATCH_SIZE = 32


@dataclass(frozen=True)
class BandGap:
    """Mean L_simple over timesteps `first` to `last`, both included, of training and held-out images.

    `interval` is the half-width of the 95 % interval of `gap` over images; nan where a side has a single image.
    """

    first: int
    last: int
    training: float
    held_out: float
    gap: float
    interval: float

    @property
    def min_relative_gap(self) -> float:
        """Lower end of the 95 % interval of the gap over the loss on training images; −∞ without an interval."""
        return -math.inf if math.isnan(self.interval) else (self.gap - self.interval) / max(self.training, 1e-12)

    def describe(self) -> str:
        """The losses, as a part of a sentence."""
        half_width = "" if math.isnan(self.interval) else f" ± {self.interval:.2g}"
        return (
            f"at timesteps {self.first} to {self.last} the loss is {self.training:.3g} on training and "
            f"{self.held_out:.3g} on held-out images (gap {self.gap:.2g}{half_width})"
        )


@dataclass(frozen=True)
class LossGap:
    """The bands, from little noise to much, the number of images on each side, and the noise draws per band."""

    bands: tuple[BandGap, ...]
    training_images: int
    held_out_images: int
    draws: int

    def widest(self) -> BandGap:
        """The band with the largest `min_relative_gap`."""
        return max(self.bands, key=lambda band: band.min_relative_gap)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an unknown interval is None."""
        intervals = (None if math.isnan(band.interval) else band.interval for band in self.bands)
        bands = [vars(band) | {"interval": interval} for band, interval in zip(self.bands, intervals, strict=True)]
        return vars(self) | {"bands": bands}


@torch.inference_mode()
def loss_gap(
    pipeline: Pipeline,
    training: CaptionedImages,
    held_out: CaptionedImages,
    *,
    images: int = 128,
    draws: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> LossGap:
    """L_simple (DDPM, Eq. 14) of `images` training and as many held-out images, or all where there are fewer.

    Image i of either side gets the same timesteps and noise, `draws` times a band, stratified over it. Images are not
    augmented, latents are posterior means, captions are the first of each image and never dropped. `progress` is called
    with the number of evaluations done since. ValueError for numbers below 1.
    """
    for name, value in (("images", images), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    schedule, like = NoiseSchedule.from_config(pipeline.schedule), pipeline.unet.conv_in.weight
    steps, denoiser = schedule.num_train_timesteps, without_variance(pipeline.unet)

    def losses_of(data: CaptionedImages) -> Tensor:
        """[N, bands] float64: the mean of each image over its draws."""
        order = generator(seed, "loss gap", "images").permutation(len(data))[:images].tolist()
        positions = {index: position for position, index in enumerate(order)}
        losses = torch.zeros(len(order), NOISE_BANDS, dtype=torch.float64)
        chosen = ([index for index in chunk if index in positions] for chunk in data.chunks(len(data)))
        for batch in (chunk[at : at + BATCH_SIZE] for chunk in chosen for at in range(0, len(chunk), BATCH_SIZE)):
            rows = [positions[index] for index in batch]
            pixels = to_signed(torch.stack([data.image_at(index) for index in batch])).to(like)
            latents = pipeline.codec.sample_latents(pipeline.codec.moments(pixels))  # [b, C, h, w]
            states = pipeline.text_encoder([data.samples[index].captions[0] for index in batch]).to(like)
            for band, draw in product(range(NOISE_BANDS), range(draws)):
                first, end = band * steps / NOISE_BANDS, (band + 1) * steps / NOISE_BANDS
                timesteps, noise = [], []  # functions of seed and position, in the `draw`-th part of the band
                for row in rows:
                    rng = generator(seed, "loss gap", row, band, draw)
                    timesteps.append(min(int(first + (end - first) * (draw + rng.random()) / draws), steps - 1))
                    noise.append(torch.from_numpy(rng.standard_normal(tuple(latents.shape[1:]), "float32")))
                loss = diffusion_loss(
                    denoiser,
                    schedule,
                    latents,
                    states,
                    timesteps=torch.tensor(timesteps),
                    noise=torch.stack(noise).to(latents),
                    prediction_type=pipeline.schedule.prediction_type,
                )
                losses[rows, band] += loss.cpu().double()
                progress(len(rows))
        return losses / draws

    ours, theirs = losses_of(training), losses_of(held_out)  # [N, bands], [M, bands]
    smaller, bands = min(len(ours), len(theirs)), []
    for band, a, b in zip(noise_bands(steps), ours.T, theirs.T, strict=True):
        half_width = math.nan
        if smaller > 1:  # degrees of freedom of the smaller side
            error = math.sqrt(float(a.var() / len(a) + b.var() / len(b)))
            half_width = student_quantile(0.95, smaller - 1) * error
        means = float(a.mean()), float(b.mean())
        bands.append(BandGap(band[0], band[-1], *means, means[1] - means[0], half_width))
    return LossGap(tuple(bands), len(ours), len(theirs), draws)
