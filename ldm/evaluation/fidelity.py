"""How close generated images are to real ones: Fréchet distance, KID, precision and recall, with intervals.

Each metric is also measured for held-out images: these are as good as images can be that are not training images.
What the intervals cover, measured on normal features and on OpenMoji, is in docs/evaluation.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.data import generator
from ldm.evaluation import stats
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.stats import Interval

MIN_IMAGES = 50
"""Nothing is measured on fewer generated or training images: the intervals would be too wide (docs/evaluation.md)."""
MIN_FRECHET_IMAGES = stats.JACKKNIFE_GROUPS + 2
"""What the jackknife of a Fréchet distance needs on each side."""
RATIO_SUBSETS = 8
MIN_RELATIVE_DISTANCE = 1e-9  # a distance below this fraction of the trace is rounding
KID_BLOCK_SIZE = 10_000
NEIGHBORS = 3
_MAX_ENTRIES = 2**24  # of a kernel or distance matrix held in memory: 128 MiB


# ---- Fréchet distance


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """From features [N, D] of any floating dtype; ValueError for another shape, non-finite values, and N <= D."""
        values = _finite(features)
        count, dimensions = values.shape
        if count <= dimensions:
            needed = f"their covariance needs at least {dimensions + 1}: give more samples"
            raise ValueError(f"there are {count} samples of {dimensions} features each; {needed}")
        return cls.from_samples(values)

    @classmethod
    def from_samples(cls, values: Tensor) -> Gaussian:
        """As `fit`, from checked float64 values, with a covariance that may be singular."""
        return cls(values.mean(dim=0), torch.cov(values.T).view(values.shape[1], -1))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The Fréchet distance of features [N, D] to reference [M, D]; FID (arXiv:1706.08500) if `FeatureSpace.is_fid`."""
    one, other = check_features(features, reference, min_samples=1)
    return distance_between(Gaussian.fit(one), Gaussian.fit(other))


def distance_between(one: Gaussian, other: Gaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½): arXiv:1706.08500, Eq. 6; at least 0.

    Σ₁ Σ₂ has the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, so no root of a general matrix is needed.
    """
    product = one.root @ other.covariance @ one.root
    # Negative eigenvalues, and a negative sum, are rounding.
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    squares = (one.mean - other.mean).square().sum()
    return max(float(squares + one.covariance.trace() + other.covariance.trace() - 2 * shared), 0.0)


def frechet_interval(features: Tensor, reference: Tensor) -> Interval:
    """`frechet_distance` of features [N, D] to reference [M, D], with its 95 % interval for other N images.

    It covers the mean distance of sets of N images, which is biased upward from that of their distribution: a jackknife
    over 20 groups of images, of the logarithm. (A bootstrap repeats images, which lowers the rank.)
    """
    one, other = check_features(features, reference, min_samples=MIN_FRECHET_IMAGES)
    Gaussian.fit(one)
    return _exp_interval(*_log_distance(one, Gaussian.fit(other)))


def frechet_ratio(features: Tensor, held_out: Tensor, reference: Tensor, *, seed: int = 0) -> Interval:
    """The distance of generated features [N, D] to reference [M, D], over that of held-out ones [H, D] to the same.

    1 means: as far from the reference images as other real images are. It is meaningful for N <= D too: both sides miss
    as many directions. Both distances use min(N, H) samples, at least 22; of the larger side 8 subsets, averaged.
    """
    one, other = check_features(features, reference, min_samples=MIN_FRECHET_IMAGES)
    real, _ = check_features(held_out, reference, min_samples=MIN_FRECHET_IMAGES)
    target = Gaussian.from_samples(other)
    count = min(len(one), len(real))
    above, variance_above = _subset_log_distance(one, count, target, seed, "generated")
    below, variance_below = _subset_log_distance(real, count, target, seed, "held out")
    return _exp_interval(above - below, variance_above + variance_below)


def _subset_log_distance(
    features: Tensor, count: int, reference: Gaussian, seed: int, name: str
) -> tuple[float, float]:
    """The logarithm of the mean distance of `count` samples out of all, and its variance.

    That is the variance of one subset times s + (1 − s) / 8, where s is the fraction of the samples in a subset.
    """
    if count == len(features):
        return _log_distance(features, reference)
    rng = generator(seed, "frechet", name)
    subsets = [features[torch.from_numpy(rng.permutation(len(features))[:count])] for _ in range(RATIO_SUBSETS)]
    first, variance = _log_distance(subsets[0], reference)
    distances = [math.exp(first), *(_distances(subset, reference, 0)[0] for subset in subsets[1:])]
    shared = count / len(features)
    return math.log(math.fsum(distances) / RATIO_SUBSETS), variance * (shared + (1 - shared) / RATIO_SUBSETS)


def _log_distance(features: Tensor, reference: Gaussian) -> tuple[float, float]:
    """The logarithm of the distance of samples [n, D], and its variance."""
    distance, *without = _distances(features, reference, stats.JACKKNIFE_GROUPS)
    return math.log(distance), stats.jackknife_variance(torch.tensor(without, dtype=torch.float64).log())


def _exp_interval(value: float, variance: float) -> Interval:
    half_width = stats.student_quantile(0.95, stats.JACKKNIFE_GROUPS - 1) * math.sqrt(variance)
    return Interval(*(math.exp(value + sign * half_width) for sign in (0, -1, 1)))


def _distances(features: Tensor, reference: Gaussian, groups: int) -> list[float]:
    """1 + groups distances of samples [n, D] to a reference: of all, and without each group of the jackknife.

    With rows X the centered samples, Σ₁ Σ₂ has the eigenvalues of YᵀY / (n − 1) and of YYᵀ / (n − 1), Y = X Σ₂^½.
    """
    x, trace = features - reference.mean, reference.covariance.trace()  # [n, D]
    y, rows, found = x @ reference.root, torch.arange(len(x)), []
    few = len(x) <= x.shape[1]
    # Once for all groups: sums, and the smaller one of the two products.
    total, squares, product = x.sum(dim=0), x.square().sum(dim=1), y @ y.T if few else y.T @ y
    for group in range(-1, groups):
        # Groups take every 20th sample: features may be sorted by caption or class.
        out = rows % groups == group if group >= 0 else rows < 0
        count = len(x) - int(out.sum())
        mean = (total - x[out].sum(dim=0)) / count
        if few:
            centered = product[~out][:, ~out]  # [count, count]
            centered = centered - centered.mean(dim=0)
            centered = centered - centered.mean(dim=1, keepdim=True)
        else:
            of_mean = torch.outer(mean @ reference.root, mean @ reference.root)
            centered = product - y[out].T @ y[out] - count * of_mean  # [D, D]
        eigenvalues = torch.linalg.eigvalsh(centered).clamp(min=0) / (count - 1)  # below 0 is rounding
        own = mean.square().sum() + (squares[~out].sum() - count * mean.square().sum()) / (count - 1)
        distance = float(own + trace - 2 * eigenvalues.sqrt().sum())
        if distance <= MIN_RELATIVE_DISTANCE * float(trace):
            raise ValueError("the features equal those of the reference; give other images than the reference")
        found.append(distance)
    return found


# ---- kernel distance


def kid(features: Tensor, reference: Tensor) -> Interval:
    """Kernel Inception Distance (arXiv:1801.01401, section 4) of features [N, D] and reference [M, D], at least 3 each.

    The unbiased estimator of MMD² with k(x, y) = (x·y / D + 1)³: about 0 for two sets from one distribution, however
    few, and possibly negative. The 95 % interval is a jackknife over single images of both sides (Arvesen 1969),
    conservative where both sides have one distribution. Above 10,000 images it is the mean over blocks.
    """
    one, other = check_features(features, reference, min_samples=3)
    blocks = math.ceil(max(len(one), len(other)) / KID_BLOCK_SIZE)
    if min(len(one), len(other)) < 3 * blocks:
        raise ValueError(f"{len(one)} samples against {len(other)} are too unequal; give {3 * blocks} on either side")
    mean = variance = 0.0
    for i in range(blocks):
        x, y = one[i::blocks], other[i::blocks]  # features may be sorted by caption or class
        n, m = len(x), len(y)
        within_x, within_y = (_kernel_sums(z, z)[0] - (z.square().mean(dim=1) + 1).pow(3) for z in (x, y))  # [n], [m]
        across_x, across_y = _kernel_sums(x, y)  # [n], [m]
        sum_x, sum_y, across = within_x.sum(), within_y.sum(), across_x.sum()
        mean += float(sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * across / (n * m)) / blocks
        # Without the i-th x, and without the j-th y.
        without_x = (sum_x - 2 * within_x) / ((n - 1) * (n - 2)) - 2 * (across - across_x) / ((n - 1) * m)  # [n]
        without_y = (sum_y - 2 * within_y) / ((m - 1) * (m - 2)) - 2 * (across - across_y) / (n * (m - 1))  # [m]
        variance += (stats.jackknife_variance(without_x) + stats.jackknife_variance(without_y)) / blocks**2
    half_width = stats.NORMAL_95 * math.sqrt(variance)
    return Interval(mean, mean - half_width, mean + half_width)


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel matrix over y [n] and over x [m], by rows that fit into memory."""
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype)
    for chunk in x.split(max(_MAX_ENTRIES // len(y), 1)):
        kernel = _kernel(chunk, y)  # [b, m]
        rows.append(kernel.sum(dim=1))
        columns += kernel.sum(dim=0)
    return torch.cat(rows), columns


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def kid_leave_one_out(generated: Tensor, reference: Tensor, images: Tensor) -> tuple[float, Tensor]:
    """KID of features [N, D] to reference [M, D], of the images for whose captions they were generated: int64 [N].

    Also float64 [M] without image j and those generated for it. Where two settings share captions, noise and reference,
    the jackknife of the difference of these values is far narrower than either interval.
    """
    count, number = len(generated), len(reference)
    generated, reference = generated.double(), reference.double()
    pairs = (generated, generated), (generated, reference), (reference, reference)
    among, across, within = (_kernel(x, y) for x, y in pairs)
    among.fill_diagonal_(0)  # the unbiased estimate compares no image with itself
    within.fill_diagonal_(0)
    of_image = torch.zeros(number, count, dtype=torch.float64)
    of_image[images, torch.arange(count)] = 1
    per_image = of_image.sum(dim=1)  # [M]
    assert bool((per_image > 0).all()), "an image for which none was generated"

    # Sums over all pairs, minus those that involve image j or an image generated for it.
    own = of_image @ among  # [M, N]
    left = among.sum() - 2 * own.sum(dim=1) + (own * of_image).sum(dim=1)
    crossed = across.sum() - (of_image @ across).sum(dim=1) - across.sum(dim=0) + (of_image @ across).diagonal()
    others = within.sum() - 2 * within.sum(dim=1)
    n, m = count - per_image, number - 1
    without = left / (n * (n - 1)) + others / (m * (m - 1)) - 2 * crossed / (n * m)
    whole = among.sum() / (count * (count - 1)) + within.sum() / (number * (number - 1)) - 2 * across.mean()
    return float(whole), without


# ---- precision and recall


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions, 0 to 1, with 95 % intervals."""

    precision: Interval
    recall: Interval


def precision_recall(features: Tensor, reference: Tensor) -> PrecisionRecall:
    """Improved precision and recall (arXiv:1904.06991) of features [N, D] against reference [M, D], at least 5 each.

    Each point has a ball that reaches to its third nearest neighbor. Precision is the fraction of generated points
    inside the balls of the real ones (Eqs. 1 and 2), recall the reverse. Recall grows with N: compare it at equal N.
    The intervals, for other N images of the model, are Wilson's: for precision with count N, for recall with the count
    that would give the jackknife's variance over 20 groups of generated images, and min(N, M) at most.
    """
    one, other = check_features(features, reference, min_samples=NEIGHBORS + 2)
    # Distances do not change, and lose less to rounding when computed from products.
    center = other.mean(dim=0)
    one, other = one - center, other - center
    precision = float(_fraction_inside(one, other, _squared_radii(other, groups=0))[0])
    groups = min(stats.JACKKNIFE_GROUPS, len(one))
    fractions = _fraction_inside(other, one, _squared_radii(one, groups))  # [1 + groups]
    recall, variance = float(fractions[0]), stats.jackknife_variance(fractions[1:])
    count: float = min(len(one), len(other))
    if variance > 0:
        # A fraction of M images is known to half an image, at 0 and 1 too.
        inner = min(max(recall, 0.5 / len(other)), 1 - 0.5 / len(other))
        count = min(count, inner * (1 - inner) / variance)
    return PrecisionRecall(stats.wilson_interval(precision, len(one)), stats.wilson_interval(recall, count))


def _fraction_inside(points: Tensor, centers: Tensor, squared_radii: Tensor) -> Tensor:
    """Fractions [R] of points [P, D] in a ball around centers [C, D], for each column of radii [C, R]."""
    inside = torch.zeros(squared_radii.shape[1], dtype=torch.int64)
    for chunk in points.split(max(_MAX_ENTRIES // len(centers), 1)):
        squared = _squared_distances(chunk, centers)  # [b, C]
        inside += torch.stack([(squared <= radii).any(dim=1).sum() for radii in squared_radii.T])
    return inside.double() / len(points)


def _squared_radii(points: Tensor, groups: int) -> Tensor:
    """Squared distances to the third nearest other point, [P, 1 + groups]: of all, and without a group (of it: −1)."""
    parts, index, rows_at_once = [], torch.arange(len(points)), max(_MAX_ENTRIES // len(points), 1)
    for chunk, rows in zip(points.split(rows_at_once), index.split(rows_at_once), strict=True):
        squared = _squared_distances(chunk, points)  # [b, P]
        squared[torch.arange(len(rows)), rows] = math.inf
        columns = [squared.kthvalue(NEIGHBORS, dim=1).values]
        # Three of each group are enough to find three of all groups but one.
        members = [squared[:, group::groups] for group in range(groups)]
        nearest = [each.topk(min(NEIGHBORS, each.shape[1]), dim=1, largest=False).values for each in members]
        for group in range(groups):
            others = torch.cat(nearest[:group] + nearest[group + 1 :], dim=1)
            radii = others.kthvalue(NEIGHBORS, dim=1).values
            columns.append(radii.masked_fill(rows % groups == group, -1))
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[b, C], at least 0."""
    squares = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1) - 2 * x @ y.T
    return squares.clamp(min=0)


# ---- checks


def check_features(features: Tensor, reference: Tensor, min_samples: int) -> tuple[Tensor, Tensor]:
    """Two sets of the same finite features [N, D] and [M, D], at least `min_samples` each, as float64 on the CPU."""
    one, other = _finite(features), _finite(reference)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"the two sets have {one.shape[1]} and {other.shape[1]} features; they must be the same")
    if min(len(one), len(other)) < min_samples:
        raise ValueError(f"there are {len(one)} samples against {len(other)}; give at least {min_samples} on each side")
    return one, other


def _finite(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"features have shape {list(features.shape)}; they must be [samples, dimensions]")
    values = features.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        wrong = int((~values.isfinite()).any(dim=1).sum())
        raise ValueError(f"{wrong} of {len(values)} samples have features that are not finite; check their images")
    return values


# ---- all metrics of generated and held-out images

ImageKind = Literal["generated", "held-out"]


@dataclass(frozen=True)
class Metric:
    """One number with its 95 % interval and what it was measured on; `yardstick`: of a ratio, the held-out images."""

    name: str
    value: float
    low: float
    high: float
    images: ImageKind
    samples: int
    yardstick: int | None
    reference_samples: int
    features: str


@dataclass(frozen=True)
class FidelityMetrics:
    """Of one kind of images; no Fréchet distance of no more images than features, recall of equally many of each."""

    frechet: Metric | None
    kid: Metric
    precision: Metric
    recall: Metric


@dataclass(frozen=True)
class Fidelity:
    """Metrics of generated and of held-out images; `left_out` has a sentence for each that is None."""

    features: str
    frechet_ratio: Metric | None
    generated: FidelityMetrics
    held_out: FidelityMetrics | None
    left_out: tuple[str, ...]

    def metrics(self) -> list[Metric]:
        """All that are not None, each generated one before its held-out counterpart."""
        sides = [self.generated] if self.held_out is None else [self.generated, self.held_out]
        found = [self.frechet_ratio]
        found += [getattr(side, field.name) for field in fields(FidelityMetrics) for side in sides]
        return [metric for metric in found if metric is not None]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"left_out": list(self.left_out)}


def measure_fidelity(
    generated: Tensor, training: Tensor, held_out: Tensor | None, space: FeatureSpace, *, seed: int = 0
) -> Fidelity:
    """Measures features of generated images [N, D] against those of training images [M, D], at least 50 each.

    Without held-out features [H, D] some metrics are left out. `seed` is for subsets of the larger side.
    """
    for name, features in (("generated", generated), ("training", training), ("held-out", held_out)):
        if features is not None and (features.ndim != 2 or features.shape[1] != space.dimensions):
            wanted = f"{space.name} features are [images, {space.dimensions}]"
            raise ValueError(f"features of the {name} images have shape {list(features.shape)}; {wanted}")
        if features is not None and name != "held-out" and len(features) < MIN_IMAGES:
            raise ValueError(f"there are {len(features)} {name} images; at least {MIN_IMAGES} are needed")
    found = 0 if held_out is None else len(held_out)
    left_out: list[str] = []
    if held_out is None or found < MIN_IMAGES:
        held_out = None
        what = "the Fréchet ratio and all metrics of held-out images"
        left_out.append(f"Left out: {what}, of which there are {found}; at least {MIN_IMAGES} are needed.")
    equal_count = len(generated) if held_out is None else min(len(generated), found)

    def metric(name: str, value: Interval, images: ImageKind, samples: int, yardstick: int | None = None) -> Metric:
        ends = value.mean, value.low, value.high
        return Metric(name, *ends, images, samples, yardstick, len(training), space.label())

    def metrics(features: Tensor, images: ImageKind) -> FidelityMetrics:
        count, found = len(features), precision_recall(features, training)
        recall = found.recall
        if equal_count < count:
            order = generator(seed, "recall", images).permutation(count)[:equal_count]
            recall = precision_recall(features[torch.from_numpy(order)], training).recall
        frechet = None
        if min(count, len(training)) > space.dimensions:
            name = "FID" if space.is_fid else "Fréchet distance"
            frechet = metric(name, frechet_interval(features, training), images, count)
        else:
            what = f"{count:,} {images} images to {len(training):,} training images"
            needed = f"with {space.dimensions:,} features it needs at least {space.dimensions + 1:,} of both"
            left_out.append(f"Left out: the Fréchet distance of {what}; {needed}.")
        return FidelityMetrics(
            frechet=frechet,
            kid=metric("KID", kid(features, training), images, count),
            precision=metric("precision", found.precision, images, count),
            recall=metric("recall", recall, images, equal_count),
        )

    ratio = None
    if held_out is not None:
        interval = frechet_ratio(generated, held_out, training, seed=seed)
        ratio = metric("Fréchet ratio", interval, "generated", equal_count, yardstick=equal_count)
    of_generated = metrics(generated, "generated")
    of_held_out = None if held_out is None else metrics(held_out, "held-out")
    return Fidelity(space.label(), ratio, of_generated, of_held_out, tuple(left_out))
