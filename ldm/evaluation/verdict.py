"""The verdict on a model: does it memorize, and is it a model of its data at all?

Is it: are generated images closer to the data than trivial baselines: noise, the mean image, blurred images? They count
as close as the lesser of precision and recall, each relative to that of unseen real images, and have to exceed the best
baseline clearly. Neither metric is enough alone: the mean image can have a precision of 1, and one outlier among noise
a high recall. KID does not decide: its scale depends on the features. See docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import generator, to_signed, to_uint8
from ldm.evaluation.fidelity import MIN_IMAGES, NEIGHBORS, precision_recall
from ldm.evaluation.images import Reference
from ldm.evaluation.memorization import Copying, LossGap, TrainingFeatures, color_layout, distinct
from ldm.evaluation.prompt_alignment import Retrieval
from ldm.evaluation.stats import Interval, wilson_interval

# ---- trivial baselines


# A threshold between the best baseline (0) and unseen real images (1). Images of other data came to 0.26 at most,
# held-out images through a first stage to 0.5 and more.
THRESHOLD = 0.25
# A baseline counts for no more than this: on pixel features of photographs blurred images come to 0.5 and, of 50
# photographs, to nearly 1.
MAX_BASELINE = 0.5
MIN_DISTINCT = 25
RETRIEVAL_K = 10
MAX_TRAINING, MAX_SAMPLES = 2048, 256  # more changes little, and the cost is quadratic
BLUR_GRID = 4  # blurred images keep the colors of this many cells a side

Kind = Literal["far", "between", "near", "few"]


@dataclass(frozen=True)
class Closeness:
    """Precision and recall against the training images, 0 to 1.

    Attributes:
        precision: of all `samples`; its interval is for the number of distinct ones.
        recall: of the distinct ones, since repeated images have balls of size zero.
        distinct: samples that are no near-duplicates of an earlier one.
    """

    precision: Interval
    recall: Interval
    distinct: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"precision": vars(self.precision), "recall": vars(self.recall)}


@dataclass(frozen=True)
class BaselineComparison:
    """Generated images between trivial baselines and unseen real images.

    Attributes:
        generated, unseen: unseen are real images that are not among the `reference_samples` training images.
        baselines: name → closeness of noise, the mean image, and blurred images.
        retrieval: side → retrieval of the images' own captions.
    """

    generated: Closeness
    unseen: Closeness
    baselines: Mapping[str, Closeness]
    reference_samples: int
    retrieval: Mapping[str, Retrieval]

    @property
    def kind(self) -> Kind:
        """- far: no closer than a baseline; or closer, but below the threshold, and captions have no effect;
        - few: not far, but nearly all images repeat each other;
        - near: above the threshold; or around it, and captions have an effect;
        - between: neither is certain.
        """
        baseline = max((self._relative(closeness, "mean") for closeness in self.baselines.values()), default=0.0)
        baseline = min(baseline, MAX_BASELINE)
        threshold = baseline + THRESHOLD * (1 - baseline)
        low, mean, high = (self._relative(self.generated, end) for end in ("low", "mean", "high"))
        if (low <= baseline and mean < threshold) or (high < threshold and not self.follows_captions):
            return "far"
        if self._is_repetitive:
            return "few"
        if low > threshold or (high >= threshold and self.follows_captions):
            return "near"
        return "between"

    @property
    def follows_captions(self) -> bool:
        """Whether the caption's own images rank above chance on one side, by both metrics of retrieval."""
        return any(
            found.within[RETRIEVAL_K].low > found.chance[RETRIEVAL_K] and found.median.high < found.median_by_chance
            for found in self.retrieval.values()
        )

    @property
    def _is_repetitive(self) -> bool:
        of_real = self.unseen.distinct / self.unseen.samples * self.generated.samples
        return self.generated.distinct < max(min(MIN_DISTINCT, of_real / 2), of_real / 4)

    def _relative(self, closeness: Closeness, end: str) -> float:
        """The lesser of precision and recall, relative to unseen images, 1 at most."""
        parts = []
        for name in ("precision", "recall"):
            real = getattr(self.unseen, name).mean
            parts.append(getattr(getattr(closeness, name), end) / real if real > 0 else 1.0)
        return float(min(*parts, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the retrieval."""
        return {
            "kind": self.kind,
            "generated": self.generated.to_dict(),
            "unseen": self.unseen.to_dict(),
            "controls": {name: closeness.to_dict() for name, closeness in self.baselines.items()},
            "reference_samples": self.reference_samples,
        }


def compare_with_baselines(
    images: Tensor, features: Tensor, retrieval: Mapping[str, Retrieval], reference: Reference, *, seed: int
) -> BaselineComparison:
    """Measures generated images, and baselines of the same size and number, against the same training images.

    Args:
        images: generated, uint8 [N, 3, H, W], N at least 50, of at least 50 training images.
        features: [N, D] of them, in the space of the reference.
        retrieval: by side.
        seed: for subsets of the training images and for noise.
    """
    height, width = images.shape[-2:]
    baselines = baselines_of(reference, len(images), (height, width), seed)
    return BaselineComparison(
        generated=baselines.closeness(color_layout(to_signed(images)), features),
        unseen=baselines.unseen,
        baselines=baselines.figures,
        reference_samples=len(baselines.training),
        retrieval=retrieval,
    )


def baselines_of(reference: Reference, samples: int, size: tuple[int, int], seed: int) -> Baselines:
    """What does not depend on the generated images, for `samples` of this (height, width); measured once."""
    key = (samples, size, seed)
    if key not in reference.baselines:
        reference.baselines[key] = Baselines.from_reference(reference, samples, size, seed)
    found: Baselines = reference.baselines[key]
    return found


@dataclass(frozen=True)
class Baselines:
    """What generated images are compared with.

    Attributes:
        training: features [M, D].
        radius: below which two images are near-duplicates.
        count: images that recall is measured on.
        figures: name → closeness of each baseline.
        unseen: that of unseen real images.
    """

    training: Tensor
    radius: float
    count: int
    seed: int
    figures: Mapping[str, Closeness]
    unseen: Closeness

    @classmethod
    def from_reference(cls, reference: Reference, samples: int, size: tuple[int, int], seed: int) -> Baselines:
        """Measures baselines and unseen images: held-out ones or, of few, training images that are left out."""
        unseen, rest = _unseen(reference, samples, seed)
        features, layouts, images = reference.features, reference.layouts, reference.training
        if reference.held_out is not None and len(reference.held_out_features) >= MIN_IMAGES:
            features, layouts = reference.held_out_features, reference.held_out_layouts
            images = reference.held_out
        radius = TrainingFeatures.from_features(reference.layouts).radius
        nothing = Closeness(Interval(0, 0, 0), Interval(0, 0, 0), 0, 0)
        count = min(samples, len(unseen), MAX_SAMPLES)
        empty = cls(reference.features[rest], radius, count, seed, {}, nothing)
        made = _baseline_images(reference, [images.image_at(int(i)) for i in unseen[:count]], size, seed)
        figures = {
            name: empty.closeness(color_layout(to_signed(each)), reference.space.compute([to_signed(each)]))
            for name, each in made.items()
        }
        return replace(empty, figures=figures, unseen=empty.closeness(layouts[unseen], features[unseen]))

    def closeness(self, layouts: Tensor, features: Tensor) -> Closeness:
        """Of images with color layouts [n, K] and features [n, D]."""
        chosen = distinct(layouts, self.radius)
        order = generator(self.seed, "standing").permutation(len(chosen))[: self.count]
        different = features[chosen[torch.from_numpy(order)]]
        precision = precision_recall(features, self.training).precision
        recall = Interval(0.0, 0.0, 0.0)
        if len(different) >= NEIGHBORS + 2:
            recall = precision_recall(different, self.training).recall
        return Closeness(wilson_interval(precision.mean, len(chosen)), recall, len(chosen), len(features))


def _unseen(reference: Reference, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of unseen images, held-out or else training images left out; and of the other training images."""
    held_out, training = len(reference.held_out_features), len(reference.features)
    order = generator(seed, "unseen").permutation(held_out if held_out >= MIN_IMAGES else training)
    if held_out >= MIN_IMAGES:
        rest = torch.from_numpy(generator(seed, "training").permutation(training)[:MAX_TRAINING])
        return torch.from_numpy(order[:MAX_TRAINING]), rest
    # Groups stay on one side, as in a split.
    max_count, groups = min(samples, MAX_SAMPLES, training // 2), [one.group for one in reference.training.samples]
    sizes, chosen, left = Counter(groups), set[str](), max_count
    if min(sizes.values()) > max_count:
        groups = [one.id for one in reference.training.samples]
        sizes = Counter(groups)
    for index in order:
        group = groups[index]
        if group not in chosen and sizes[group] <= left:
            chosen.add(group)
            left -= sizes[group]
    out = torch.tensor([groups[index] in chosen for index in order])
    return torch.from_numpy(order)[out], torch.from_numpy(order)[~out][:MAX_TRAINING]


def _baseline_images(reference: Reference, unseen: list[Tensor], size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Name → uint8 [n, 3, H, W], as many as there are unseen images uint8 [3, h, w]."""
    count = len(unseen)
    rng = torch.Generator().manual_seed(int(generator(seed, "controls").integers(2**63 - 1)))
    noise = torch.randn(count, 3, *size, generator=rng, dtype=torch.float64)
    mean, std = reference.colors
    coarse = [F.adaptive_avg_pool2d(to_signed(image[None]), BLUR_GRID) for image in unseen]
    blurred = F.interpolate(torch.cat(coarse), size, mode="bicubic").clamp(-1, 1)
    average = F.interpolate(reference.mean_image[None], size, mode="bicubic")
    return {
        "noise": to_uint8((mean.view(3, 1, 1) + std.view(3, 1, 1) * noise).clamp(-1, 1)),
        "the mean image": to_uint8(average.clamp(-1, 1)).expand(count, -1, -1, -1),
        "blurred images": to_uint8(blurred),
    }


# ---- the verdict


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
