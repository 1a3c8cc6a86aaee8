"""Does a model memorize: are generated images closer to single training images than unseen real images are?

The score of an image is the distance to its nearest training image, over that to the nearest other one (not a variant
of the first): near 0 for a copy, however noisy, near 1 for an image that resembles many. (Ratio of distances:
arXiv:2301.13188; comparison with unseen data: arXiv:2004.05675.) The threshold is a quantile of the scores of unseen
real images: held-out ones or, if these are few, training images left out in turn. An unseen image is exchangeable with
them, so the number of scores below the threshold has a known distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ldm.data import generator
from ldm.evaluation.baselines import BaselineComparison
from ldm.evaluation.loss_gap import LossGap
from ldm.evaluation.nearest_neighbors import TrainingFeatures, check_matrix, distinct
from ldm.evaluation.stats import wilson_interval
from ldm.pipelines import contact_sheet

QUANTILE = 0.05
"""The fraction of unseen real images below the threshold."""
MIN_HELD_OUT = 100
MAX_LEFT_OUT = 2048

# In 480 comparisons with held-out images in place of generated ones (20 to 300 training images of digits or OpenMoji)
# the smallest p-value was 7e-5.
MAX_P_VALUE, MIN_COPIES = 1e-5, 0.1
MAX_P_VALUE_SOME = 1e-3
# With so few distinct images a p-value cannot decide: they are copies if they are below the threshold and as close to a
# training image as its variants are.
MIN_DISTINCT_FOR_P_VALUE = 5
MAX_FLAGGED_HIGH = 0.3  # for the upper end of the interval: one in 30 sets of 25 unseen images exceeds it
# Relative to the loss on training images. A model of OpenMoji that generates new images had 0.4, models overfitted to
# 50 images 14.
MAX_LOSS_GAP = 1.0
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


# ---- the verdict

VerdictKind = Literal["not yet a model of this data", "learning", "memorizing", "undecided"]
FORMER_KINDS: dict[str, VerdictKind] = {"memorising": "memorizing"}


@dataclass(frozen=True)
class Verdict:
    """`kind`, and one sentence with the numbers behind it."""

    kind: VerdictKind
    sentence: str

    @classmethod
    def from_json(cls, content: Any) -> Verdict:
        """From stored JSON, also of earlier versions, which wrote "memorising".

        Raises:
            ValueError: for anything else.
        """
        if isinstance(content, dict) and isinstance(content.get("sentence"), str):
            written = str(content.get("kind"))
            for kind in get_args(VerdictKind):
                if kind == FORMER_KINDS.get(written, written):
                    return cls(kind, content["sentence"])
        kinds = ", ".join(get_args(VerdictKind))
        raise ValueError(f"{content!r:.80} is no verdict; it needs a sentence, and a kind of {kinds}")


def verdict(
    copying: Copying | None,
    gap: LossGap | None,
    baselines: BaselineComparison | None = None,
    *,
    not_compared: str = "",
) -> Verdict:
    """The first of these that holds; the loss gap alone never gives "memorizing".

    - memorizing: more images are flagged than chance allows (`MAX_P_VALUE`), and more than `MIN_COPIES`;
    - not yet a model of this data: the images are no closer to it than trivial baselines;
    - undecided: some copies; too few (distinct) images; an interval that allows both answers; no held-out images; or a
      loss far lower on training images;
    - learning: none of these.

    Args:
        copying: None with too few training images to find copies.
        baselines: None where not compared;
        not_compared: the reason.
    """
    numbers = (_describe_copying(copying), _describe_gap(gap), _describe_baselines(baselines))
    if copying is not None and _has_copies(copying):
        return Verdict("memorizing", f"Memorizing: {''.join(numbers)}; the model reproduces training images.")
    where = None if baselines is None else baselines.kind
    if where == "far":
        return Verdict(
            "not yet a model of this data",
            f"Not yet a model of this data: {numbers[0]}{numbers[2]}; trivial baselines are as close to the data.",
        )
    doubt = not_compared or _doubt(copying, gap, where)
    if doubt:
        return Verdict("undecided", f"Undecided: {''.join(numbers)}; {doubt}.")
    return Verdict(
        "learning",
        f"Learning: {''.join(numbers)}; the images are no closer to training images than unseen real images are.",
    )


def _has_copies(copying: Copying) -> bool:
    if copying.distinct < MIN_DISTINCT_FOR_P_VALUE:
        return copying.variants.low > MIN_COPIES
    return copying.chance < MAX_P_VALUE and copying.flagged_fraction.low > MIN_COPIES


def _doubt(copying: Copying | None, gap: LossGap | None, where: str | None) -> str:
    """The reason for "undecided", or ""."""
    if copying is None:
        return "there are too few training images to find copies"
    if copying.chance < MAX_P_VALUE_SOME and copying.flagged_fraction.low > 1.5 * copying.expected:
        return "some are copies: compare the closest with their nearest training images"
    if where == "few":
        return "nearly all images repeat each other, and the others are too few"
    if where == "between":
        return "they may or may not be closer to the data than trivial baselines: generate more images"
    if copying.held_out is None:
        return "no copies, but there are no held-out images to compare with"
    if copying.flagged_fraction.high > MAX_FLAGGED_HIGH:
        return "that interval is too wide: generate more images"
    if gap is not None and gap.widest().min_relative_gap > MAX_LOSS_GAP:
        return "no copies, but the loss is far lower on training images"
    return ""


def _describe_copying(copying: Copying | None) -> str:
    if copying is None:
        return "copies were not searched for"
    flagged = copying.flagged_fraction
    held_out, left_out = copying.calibrated_on
    kinds = [f"{held_out} held-out images"] if held_out else []
    kinds += [f"{left_out} training images left out in turn"] if left_out else []
    own = f"; of held-out images {_percent(copying.held_out.fraction)} are" if copying.held_out else ""
    return (
        f"{flagged.count} of {flagged.total} images ({_percent(flagged.fraction)}, 95 % interval "
        f"{_percent(flagged.low)} to {_percent(flagged.high)}) are closer to one training image than "
        f"{_percent(1 - copying.expected)} of unseen images{own} (calibrated on {' and '.join(kinds)})"
    )


def _describe_gap(gap: LossGap | None) -> str:
    if gap is None:
        return ""
    band = gap.widest()
    half_width = "" if math.isnan(band.interval) else f" ± {band.interval:.2g}"
    return (
        f", and at timesteps {band.first} to {band.last} the loss is {band.training:.3g} on training and "
        f"{band.held_out:.3g} on held-out images (gap {band.gap:.2g}{half_width})"
    )


def _describe_baselines(comparison: BaselineComparison | None) -> str:
    if comparison is None:
        return ""
    generated, real = comparison.generated, comparison.unseen
    baselines = ", ".join(
        f"{name} {_percent(closeness.precision.mean)} and {_percent(closeness.recall.mean)}"
        for name, closeness in comparison.baselines.items()
    )
    ranks = " and ".join(
        f"{found.median.mean:g} of {found.gallery} for {side} captions ({found.median_by_chance} by chance)"
        for side, found in comparison.retrieval.items()
    )
    repeated = ""
    if generated.distinct < generated.samples:
        repeated = f" ({generated.distinct} of {generated.samples} are distinct)"
    return (
        f", and their precision is {_percent(generated.precision.mean)} and their recall "
        f"{_percent(generated.recall.mean)}{repeated}, where unseen real images have {_percent(real.precision.mean)} "
        f"and {_percent(real.recall.mean)} ({baselines}); the caption's own image has the median rank {ranks}"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


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
