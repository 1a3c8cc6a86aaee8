"""Does a model memorize: are generated images closer to single training images than unseen real images are?

The score of an image is the distance to its nearest training image, over that to the nearest other one (not a variant
of the first): near 0 for a copy, however noisy, near 1 for an image that resembles many. (Ratio of distances:
arXiv:2301.13188; comparison with unseen data: arXiv:2004.05675.) The threshold is a quantile of the scores of unseen
real images: held-out ones or, if these are few, training images left out in turn. An unseen image is exchangeable with
them, so the number of scores below the threshold has a known distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import NOISE_BANDS, NoiseSchedule, diffusion_loss, noise_bands, without_variance
from ldm.evaluation.stats import student_quantile, wilson_interval
from ldm.pipelines import Pipeline, contact_sheet

# ---- nearest training images, where some of these are variants of one another


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
        nearest: int64 [M], index of the nearest training image.
        distance: float64 [M], in units of the features.
        ratio: float64 [M], from 0, a copy, to 1.
        threshold: images with a ratio below it are `flagged`, a bool [M].
        flagged_fraction: of all images; `expected` is that of unseen real images.
        distinct: images that neither are near-duplicates of an earlier one nor have the same nearest training image;
            only these are evidence.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        keys = {"flagged": "suspect", "flagged_fraction": "suspects"}
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor | tuple):
                value = list(value) if isinstance(value, tuple) else value.tolist()
            if isinstance(value, CountedFraction):
                value = vars(value) | {"share": value.fraction}
            plain[keys.get(name, name)] = value
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

    The threshold is the `QUANTILE` of the ratios of held-out images, if there are `MIN_HELD_OUT`; otherwise also of
    training images, each compared with those of other groups.

    Args:
        generated, training, held_out: features [M, D], [N, D], [H, D], such as `color_layout`.
        groups: `Sample.group` of the training images: variants of one image share it. Held-out images must be of other
            groups, as after `ldm.data.split`. None: each image is its own group.
        mirrored: [N, D], the training images flipped; give them if training flips.
        seed: for the subset of training images to leave out, if there are more than 2,048.

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
    evidence = CountedFraction.from_mask(flagged[_evidence(generated, known.groups[found.index], known.radius)])
    return Copying(
        nearest=found.index,
        distance=found.distance,
        ratio=found.ratio,
        threshold=threshold,
        flagged=flagged,
        flagged_fraction=CountedFraction.from_mask(flagged),
        expected=rank / (len(ratios) + 1),
        distinct=evidence.total,
        chance=_p_value(evidence.count, evidence.total, rank, len(ratios) + 1 - rank),
        variants=CountedFraction.from_mask(flagged & (found.distance < known.radius)),
        held_out=None if unseen is None else CountedFraction.from_mask(unseen.ratio < threshold),
        closer=CountedFraction.from_mask(found.closer),
        held_out_closer=None if unseen is None else CountedFraction.from_mask(unseen.closer),
        calibrated_on=(0 if unseen is None else len(unseen.ratio), left_out),
    )


def _evidence(generated: Tensor, nearest_groups: Tensor, radius: float) -> list[int]:
    """Indices of the first of each set of near-duplicates, and of these the first for each nearest group.

    A repeated image is flagged each time. And images of other data, such as digits for a model of photographs, may all
    have the same dark photograph as their nearest.
    """
    seen: set[int] = set()
    chosen = []
    for index in distinct(generated, radius).tolist():
        if int(nearest_groups[index]) not in seen:
            seen.add(int(nearest_groups[index]))
            chosen.append(index)
    return chosen


def _p_value(count: int, total: int, below: int, above: int) -> float:
    """P(X >= count), for X of `total` new values below the `below`-th of below + above − 1 old ones.

    If all have one distribution, X is beta-binomial: this accounts for the threshold being a sample itself.
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


def nearest_sheet(generated: Sequence[Image.Image], training: Sequence[Image.Image], copying: Copying) -> Image.Image:
    """The 24 generated images with the lowest ratios, each beside its nearest training image, the closest first.

    Args:
        generated, training: in the order of the features given to `find_copies`; only the training images that are
            shown are read.

    Raises:
        ValueError: for another number of images than `copying` has.
    """
    if len(generated) != len(copying.ratio):
        raise ValueError(f"there are {len(generated)} images but {len(copying.ratio)} were compared; give the same")
    order = copying.ratio.argsort(stable=True)[:SHEET_IMAGES].tolist()
    rows, captions = [], []
    for start in range(0, len(order), SHEET_PAIRS):
        row = order[start : start + SHEET_PAIRS]
        rows.append([image for i in row for image in (generated[i], training[int(copying.nearest[i])])])
        ratios = ", ".join(f"{float(copying.ratio[i]):.2f}" for i in row)
        captions.append(f"generated | nearest: {ratios} (copies below {copying.threshold:.2f})")
    return contact_sheet(rows, captions, size=SHEET_SIDE)


# ---- the loss on training and on held-out images


BATCH_SIZE = 32


@dataclass(frozen=True)
class BandGap:
    """Mean L_simple over timesteps `first` to `last`, both included.

    Attributes:
        training, held_out: the two means.
        gap: held_out − training.
        interval: half-width of the 95 % interval of `gap` over images; nan where a side has a single image.
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
        plain: dict[str, Any] = asdict(self)
        for band in plain["bands"]:
            band["interval"] = None if math.isnan(band["interval"]) else band["interval"]
        plain["bands"] = list(plain["bands"])
        return plain


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

    Image i of either side gets the same timesteps and noise. Images are not augmented, latents are posterior means,
    captions are the first of each image and never dropped.

    Args:
        images: per side, sampled without replacement.
        draws: evaluations of each image per band, at timesteps stratified over the band.
        seed: for images, timesteps and noise.
        progress: called with the number of evaluations done since.

    Raises:
        ValueError: for numbers below 1.
    """
    for name, value in (("images", images), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    losses = _BandLosses(pipeline, draws, seed, progress)
    ours, theirs = losses(training, images), losses(held_out, images)  # [N, bands], [M, bands]
    bands = []
    for number, band in enumerate(noise_bands(losses.schedule.num_train_timesteps)):
        a, b = ours[:, number], theirs[:, number]
        means = float(a.mean()), float(b.mean())
        bands.append(BandGap(band[0], band[-1], *means, means[1] - means[0], _half_width(a, b)))
    return LossGap(tuple(bands), len(ours), len(theirs), draws)


class _BandLosses:
    """The loss of images, by band."""

    def __init__(self, pipeline: Pipeline, draws: int, seed: int, progress: Callable[[int], object]) -> None:
        self.pipeline, self.draws, self.seed, self.progress = pipeline, draws, seed, progress
        self.schedule = NoiseSchedule.from_config(pipeline.schedule)
        self.like = pipeline.unet.conv_in.weight

    def __call__(self, data: CaptionedImages, max_images: int) -> Tensor:
        """[N, bands] float64: the mean of each image over its draws."""
        order = generator(self.seed, "loss gap", "images").permutation(len(data))[:max_images].tolist()
        positions = {index: position for position, index in enumerate(order)}
        losses = torch.empty(len(order), NOISE_BANDS, dtype=torch.float64)
        for chunk in data.chunks(len(data)):
            selected = [index for index in chunk if index in positions]
            for start in range(0, len(selected), BATCH_SIZE):
                batch = selected[start : start + BATCH_SIZE]
                rows = [positions[index] for index in batch]
                losses[rows] = self._losses(data, batch, rows)
        return losses

    def _losses(self, data: CaptionedImages, indices: list[int], positions: list[int]) -> Tensor:
        codec = self.pipeline.codec
        pixels = to_signed(torch.stack([data.image_at(index) for index in indices])).to(self.like)
        latents = codec.sample_latents(codec.moments(pixels))  # [b, C, h, w]
        states = self.pipeline.text_encoder([data.samples[index].captions[0] for index in indices]).to(self.like)
        losses = torch.zeros(len(indices), NOISE_BANDS, dtype=torch.float64)
        for band in range(NOISE_BANDS):
            for draw in range(self.draws):
                timesteps, noise = self._noise(positions, band, draw, latents)
                loss = diffusion_loss(
                    without_variance(self.pipeline.unet),
                    self.schedule,
                    latents,
                    states,
                    timesteps=timesteps,
                    noise=noise,
                    prediction_type=self.pipeline.schedule.prediction_type,
                )
                losses[:, band] += loss.cpu().double()
                self.progress(len(indices))
        return losses / self.draws

    def _noise(self, positions: list[int], band: int, draw: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [b] in the `draw`-th part of the band, and noise [b, C, h, w]: functions of seed and position."""
        steps = self.schedule.num_train_timesteps
        first, end = band * steps / NOISE_BANDS, (band + 1) * steps / NOISE_BANDS
        timesteps, noise = [], []
        for position in positions:
            rng = generator(self.seed, "loss gap", position, band, draw)
            timesteps.append(min(int(first + (end - first) * (draw + rng.random()) / self.draws), steps - 1))
            noise.append(torch.from_numpy(rng.standard_normal(tuple(like.shape[1:]), "float32")))
        return torch.tensor(timesteps), torch.stack(noise).to(like)


def _half_width(ours: Tensor, theirs: Tensor) -> float:
    """Of the 95 % interval of the difference of two means; degrees of freedom of the smaller side."""
    smaller = min(len(ours), len(theirs))
    if smaller < 2:
        return math.nan
    error = math.sqrt(float(ours.var() / len(ours) + theirs.var() / len(theirs)))
    return student_quantile(0.95, smaller - 1) * error
