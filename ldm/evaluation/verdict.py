"""The verdict on a model: does it memorize, and is it a model of its data at all?

It is one if generated images are clearly closer to the data than trivial baselines: noise, the mean image, blurred
images. Closeness is the lesser of precision and recall, each relative to that of unseen real images: the mean image can
have a precision of 1, and one outlier among noise a high recall. The scale of KID depends on the features. See
docs/evaluation.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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

    The interval of precision is for the `distinct` samples, those that are no near-duplicates of an earlier one; recall
    is of these alone, since repeated images have balls of size zero.
    """

    precision: Interval
    recall: Interval
    distinct: int
    samples: int


@dataclass(frozen=True)
class BaselineComparison:
    """Generated images between trivial baselines and unseen real images, by name and side.

    Unseen are real images that are not among the `reference_samples` training images.
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
        of_real = self.unseen.distinct / self.unseen.samples * self.generated.samples
        if self.generated.distinct < max(min(MIN_DISTINCT, of_real / 2), of_real / 4):
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

    def _relative(self, closeness: Closeness, end: str) -> float:
        """The lesser of precision and recall, relative to unseen images, 1 at most."""
        parts = []
        for name in ("precision", "recall"):
            real = getattr(self.unseen, name).mean
            parts.append(getattr(getattr(closeness, name), end) / real if real > 0 else 1.0)
        return float(min(*parts, 1.0))

    def describe(self) -> str:
        """Precision, recall and rank beside those of unseen images and baselines, as a part of a sentence."""

        def numbers(closeness: Closeness, between: str = "and") -> str:
            return f"{100 * closeness.precision.mean:.0f} % {between} {100 * closeness.recall.mean:.0f} %"

        ranks = " and ".join(
            f"{found.median.mean:g} of {found.gallery} for {side} captions ({found.median_by_chance} by chance)"
            for side, found in self.retrieval.items()
        )
        made = self.generated
        repeated = f" ({made.distinct} of {made.samples} are distinct)" if made.distinct < made.samples else ""
        baselines = ", ".join(f"{name} {numbers(closeness)}" for name, closeness in self.baselines.items())
        return (
            f"their precision is {numbers(made, 'and their recall')}{repeated}, where unseen real images have "
            f"{numbers(self.unseen)} ({baselines}); the caption's own image has the median rank {ranks}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the retrieval."""
        return {
            "kind": self.kind,
            "generated": asdict(self.generated),
            "unseen": asdict(self.unseen),
            "controls": {name: asdict(closeness) for name, closeness in self.baselines.items()},
            "reference_samples": self.reference_samples,
        }


def compare_with_baselines(
    images: Tensor, features: Tensor, retrieval: Mapping[str, Retrieval], reference: Reference, *, seed: int
) -> BaselineComparison:
    """Measures 50 or more images, uint8 [N, 3, H, W] with features [N, D], and as many of each baseline."""
    height, width = images.shape[-2:]
    baselines = baselines_of(reference, len(images), (height, width), seed)
    generated = baselines.closeness(color_layout(to_signed(images)), features)
    figures, count = baselines.figures, baselines.reference_samples
    return BaselineComparison(generated, baselines.unseen, figures, count, retrieval)


@dataclass(frozen=True)
class Baselines:
    """What images with color layouts [n, K] and features [n, D] are compared with, by name, and unseen images."""

    closeness: Callable[[Tensor, Tensor], Closeness]
    figures: Mapping[str, Closeness]
    unseen: Closeness
    reference_samples: int


def baselines_of(reference: Reference, samples: int, size: tuple[int, int], seed: int) -> Baselines:
    """What does not depend on the generated images, measured once; unseen images are held-out or left out."""
    key = (samples, size, seed)
    if key in reference.baselines:
        known: Baselines = reference.baselines[key]
        return known
    if reference.held_out is not None and len(reference.held_out_features) >= MIN_IMAGES:
        features, layouts, images = reference.held_out_features, reference.held_out_layouts, reference.held_out
        unseen = torch.from_numpy(generator(seed, "unseen").permutation(len(features))[:MAX_TRAINING])
        rest = torch.from_numpy(generator(seed, "training").permutation(len(reference.features))[:MAX_TRAINING])
    else:
        features, layouts, images = reference.features, reference.layouts, reference.training
        # Some training images are left out; groups stay on one side, as in a split.
        left, groups = min(samples, MAX_SAMPLES, len(images) // 2), [one.group for one in images.samples]
        if min(Counter(groups).values()) > left:
            groups = [one.id for one in images.samples]
        order, sizes, chosen = generator(seed, "unseen").permutation(len(images)), Counter(groups), set[str]()
        for index in order:
            group = groups[index]
            if group not in chosen and sizes[group] <= left:
                chosen.add(group)
                left -= sizes[group]
        out = torch.tensor([groups[index] in chosen for index in order])
        unseen, rest = torch.from_numpy(order)[out], torch.from_numpy(order)[~out][:MAX_TRAINING]
    training, radius = reference.features[rest], TrainingFeatures.from_features(reference.layouts).radius
    count = min(samples, len(unseen), MAX_SAMPLES)

    def closeness(layouts: Tensor, features: Tensor) -> Closeness:
        chosen = distinct(layouts, radius)
        order = generator(seed, "standing").permutation(len(chosen))[:count]
        different = features[chosen[torch.from_numpy(order)]]
        precision = precision_recall(features, training).precision
        recall = Interval(0.0, 0.0, 0.0)
        if len(different) >= NEIGHBORS + 2:
            recall = precision_recall(different, training).recall
        return Closeness(wilson_interval(precision.mean, len(chosen)), recall, len(chosen), len(features))

    rng = torch.Generator().manual_seed(int(generator(seed, "controls").integers(2**63 - 1)))
    noise = torch.randn(count, 3, *size, generator=rng, dtype=torch.float64)
    mean, std = (color.view(3, 1, 1) for color in reference.colors)
    coarse = [F.adaptive_avg_pool2d(to_signed(images.image_at(int(i))[None]), BLUR_GRID) for i in unseen[:count]]
    average = F.interpolate(reference.mean_image[None], size, mode="bicubic")
    made = {
        "noise": mean + std * noise,
        "the mean image": average.expand(count, -1, -1, -1),
        "blurred images": F.interpolate(torch.cat(coarse), size, mode="bicubic"),
    }
    figures = {}
    for name, values in made.items():
        quantized = to_signed(to_uint8(values.clamp(-1, 1)))  # [n, 3, H, W]
        figures[name] = closeness(color_layout(quantized), reference.space.compute([quantized]))
    found = Baselines(closeness, figures, closeness(layouts[unseen], features[unseen]), len(training))
    reference.baselines[key] = found
    return found


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
        """From stored JSON, also of earlier versions, which wrote "memorising"; ValueError for anything else."""
        if isinstance(content, dict) and isinstance(content.get("sentence"), str):
            written = str(content.get("kind"))
            for kind in get_args(VerdictKind):
                if kind == FORMER_KINDS.get(written, written):
                    return cls(kind, content["sentence"])
        kinds = ", ".join(get_args(VerdictKind))
        raise ValueError(f"{content!r:.80} is no verdict; it needs a sentence, and a kind of {kinds}")


def verdict(
    copying: Copying | None, gap: LossGap | None, baselines: BaselineComparison | None = None, *, not_compared: str = ""
) -> Verdict:
    """The first of these that holds; the loss gap alone never gives "memorizing".

    - memorizing: more images are flagged than chance allows (`MAX_P_VALUE`), and more than `MIN_COPIES`;
    - not yet a model of this data: the images are no closer to it than trivial baselines;
    - undecided: some copies; too few (distinct) images; an interval that allows both answers; no held-out images; or a
      loss far lower on training images;
    - learning: none of these.

    `copying` is None with too few training images, `baselines` where not compared, for the reason `not_compared`.
    """
    copies = "copies were not searched for" if copying is None else copying.describe()
    loss = "" if gap is None else f", and {gap.widest().describe()}"
    compared = "" if baselines is None else f", and {baselines.describe()}"
    if copying is not None:
        if copying.distinct < MIN_DISTINCT_FOR_P_VALUE:
            has_copies = copying.variants.low > MIN_COPIES
        else:
            has_copies = copying.chance < MAX_P_VALUE and copying.flagged_fraction.low > MIN_COPIES
        if has_copies:
            sentence = f"Memorizing: {copies}{loss}{compared}; the model reproduces training images."
            return Verdict("memorizing", sentence)
    where = None if baselines is None else baselines.kind
    if where == "far":
        compared += "; trivial baselines are as close to the data"
        return Verdict("not yet a model of this data", f"Not yet a model of this data: {copies}{compared}.")
    if doubt := not_compared or _doubt(copying, gap, where):
        return Verdict("undecided", f"Undecided: {copies}{loss}{compared}; {doubt}.")
    compared += "; the images are no closer to training images than unseen real images are"
    return Verdict("learning", f"Learning: {copies}{loss}{compared}.")


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
