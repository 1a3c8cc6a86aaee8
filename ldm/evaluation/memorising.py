"""Learning or memorizing: are generated pictures nearer to single training images than unseen real images are?

What is measured of a picture is the ratio of two distances: to the nearest training image, and to the nearest of the
others. A copy has a ratio near 0, however noisy it is, or dull; a picture that resembles many training images, such as
their average, has one near 1, though it may be nearer to all of them than any real image. Where training images come in
variants, those of the nearest one do not count as others, for else a copy of one would lie near the next as well.
(Nearest over further distances: arXiv:2301.13188; a third sample of unseen data to compare with:
arXiv:2004.05675.)

How low is too low is read from real images that were not trained on: held-out ones or, where these are few, training
images left out in turn. An unseen image is exchangeable with them, so that the number of pictures below their
quantile has a known distribution, for calibrations of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import generator
from ldm.evaluation.loss_gap import LossGap, least_growth
from ldm.evaluation.nearness import Known, check, distinct, near
from ldm.evaluation.reasons import counts, loss, nearness
from ldm.evaluation.standing import Standing
from ldm.pipelines import contact_sheet

GRID = 8
LEVEL = 0.05
"""The share of unseen real images that lie below the threshold."""
ENOUGH_HELD_OUT = 100
MOST_LEFT_OUT = 2048

# Of 480 comparisons with held-out images as pictures (20 to 300 training images of digits or OpenMoji) the least
# probable had a chance of 7e-5.
CHANCE, MANY = 1e-5, 0.1
CHANCE_OF_SOME = 1e-3
# Of so few different pictures, however many there are of each, chance cannot say: they are copies if they are suspect
# and as near to a training image as its variants are.
TOO_FEW_FOR_CHANCE = 4
TOO_WIDE = 0.3  # of the upper end: of 25 unseen images one set in 30 has more
# A loss twice that on training images. A model of OpenMoji that draws new pictures had 1.4 times, those
# overfitted to 50 images 15 times.
BY_HEART = 1.0

NORMAL_95 = 1.96


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
        distinct: how many pictures are neither near-duplicates of one before them nor nearest to the same training
            image as one: only these are evidence.
        chance: how probable so many suspects are, or more, among as many unseen real images as are `distinct`.
        variants: the share of pictures that are suspect, and as near to a training image as its variants are.
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
    distinct: int
    chance: float
    variants: Share
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
    known = Known.of(training, groups, mirrored)
    for name, features in (("generated", generated), ("held-out", held_out)):
        if features is not None:
            check(name, features, known.variants[0].shape[1])
    if not len(generated):
        raise ValueError("there are no generated pictures; draw some")
    unseen = None if held_out is None or not len(held_out) else near(held_out, known)
    calibration = [] if unseen is None else [unseen.ratio]
    left_out = 0
    if unseen is None or len(unseen.ratio) < ENOUGH_HELD_OUT:
        order = torch.from_numpy(generator(seed, "left out").permutation(len(training))[:MOST_LEFT_OUT])
        calibration.append(near(training[order], known, leave_out=order).ratio)
        left_out = len(order)
    ratios = torch.cat(calibration).sort().values
    rank = max(1, math.floor(LEVEL * (len(ratios) + 1)))
    threshold = float(ratios[rank - 1])
    found = near(generated, known)
    suspect = found.ratio < threshold
    once = Share.of(suspect[_evidence(generated, known.groups[found.nearest], known.radius)])
    return Copying(
        nearest=found.nearest,
        distance=found.distance,
        ratio=found.ratio,
        threshold=threshold,
        suspect=suspect,
        suspects=Share.of(suspect),
        expected=rank / (len(ratios) + 1),
        distinct=once.total,
        chance=_chance(once.count, once.total, rank, len(ratios) + 1 - rank),
        variants=Share.of(suspect & (found.distance < known.radius)),
        held_out=None if unseen is None else Share.of(unseen.ratio < threshold),
        closer=Share.of(found.closer),
        held_out_closer=None if unseen is None else Share.of(unseen.closer),
        calibrated_on=(0 if unseen is None else len(unseen.ratio), left_out),
    )


def _evidence(generated: Tensor, nearest: Tensor, radius: float) -> list[int]:
    """Which pictures [n, K] count as evidence: of those that resemble each other the first, and of those that are
    nearest to one group [n] of training images.

    A picture that is drawn again and again is suspect each time. And pictures of something else, digits where the data
    are photographs, are all nearest to the one dark photograph.
    """
    seen: set[int] = set()
    kept = []
    for index in distinct(generated, radius).tolist():
        if int(nearest[index]) not in seen:
            seen.add(int(nearest[index]))
            kept.append(index)
    return kept


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


Kind = Literal["not yet a model of this data", "learning", "memorizing", "undecided"]
FORMER_KINDS: dict[str, Kind] = {"memorising": "memorizing"}


@dataclass(frozen=True)
class Verdict:
    """`kind`, and one sentence that says what was counted and what follows."""

    kind: Kind
    sentence: str

    @classmethod
    def read(cls, content: Any) -> Verdict:
        """From what was stored as JSON, now or by an earlier version, which wrote "memorising".

        Raises:
            ValueError: for what is no verdict.
        """
        if isinstance(content, dict) and isinstance(content.get("sentence"), str):
            written = str(content.get("kind"))
            for kind in get_args(Kind):
                if kind == FORMER_KINDS.get(written, written):
                    return cls(kind, content["sentence"])
        raise ValueError(f"{content!r:.80} is no verdict; it has a sentence, and a kind of {', '.join(get_args(Kind))}")


def verdict(
    copying: Copying | None, gap: LossGap | None, standing: Standing | None = None, *, unmeasured: str = ""
) -> Verdict:
    """One of four, from the pictures; the loss may raise doubts, but convicts no picture. The first that holds:

    - memorizing: more suspects than unseen real images could have by chance (below `CHANCE`), and more than `MANY`;
    - not yet a model of this data: the pictures are no nearer to it than noise, the mean image or blurred images are;
    - undecided: some suspects too many; too few pictures, or too few different ones; an interval that holds both
      answers; nothing held out, so that nobody knows whether the model draws what it has not seen; or a loss so much
      lower on training images that the model knows them by heart;
    - learning: none of these.

    Args:
        copying: None where there are too few training images to tell copies by.
        standing: how near the pictures are to the data; None where that is not asked, or
        unmeasured: why it is not known.
    """
    counted, seen, stands = counts(copying), loss(gap), nearness(standing)
    if copying is not None and _copies(copying):
        return Verdict(
            "memorizing", f"Memorizing: {counted}{seen}{stands}; the model gives back what it was trained on."
        )
    where = None if standing is None else standing.kind
    if where == "far":
        return Verdict(
            "not yet a model of this data",
            f"Not yet a model of this data: {counted}{stands}; what is no model of the data comes as near to it.",
        )
    doubt = unmeasured or _doubt(copying, gap, where)
    if doubt:
        return Verdict("undecided", f"Undecided: {counted}{seen}{stands}; {doubt}.")
    return Verdict(
        "learning", f"Learning: {counted}{seen}{stands}; the pictures are no nearer than unseen real images are."
    )


def _copies(copying: Copying) -> bool:
    if copying.distinct <= TOO_FEW_FOR_CHANCE:
        return copying.variants.low > MANY
    return copying.chance < CHANCE and copying.suspects.low > MANY


def _doubt(copying: Copying | None, gap: LossGap | None, where: str | None) -> str:
    """Why a verdict is left open, or nothing."""
    if copying is None:
        return "the training images are too few to tell copies by"
    if copying.chance < CHANCE_OF_SOME and copying.suspects.low > 1.5 * copying.expected:
        return "some are copies, see the closest beside their nearest"
    if where == "few":
        return "nearly all pictures repeat each other, so that the few that are left say little"
    if where == "between":
        return "they may be nearer to the data than what is no model of it, or not, so draw more pictures"
    if copying.held_out is None:
        return "no copies, but nothing is held out to compare with"
    if copying.suspects.high > TOO_WIDE:
        return "that is too wide, so draw more pictures"
    if gap is not None and least_growth(gap.widest()) > BY_HEART:
        return "no copies, yet the model knows its training images by heart"
    return ""


def nearest_sheet(
    generated: Sequence[Image.Image],
    training: Sequence[Image.Image],
    copying: Copying,
    *,
    most: int = 24,
    pairs: int = 4,
    size: int = 96,
) -> Image.Image:
    """The pictures with the lowest ratios, each beside its nearest training image, the closest first.

    Args:
        generated, training: in the order of the features that `copying` was given; of `training` only those that are
            shown are read.
        most: pictures at most; `pairs` of them in a row.
        size: of the longer side of each, in pixels.

    Raises:
        ValueError: for another number of pictures than `copying` is about.
    """
    if len(generated) != len(copying.ratio):
        raise ValueError(f"there are {len(generated)} pictures but {len(copying.ratio)} were compared; give the same")
    order = copying.ratio.argsort(stable=True)[:most].tolist()
    rows, captions = [], []
    for start in range(0, len(order), pairs):
        some = order[start : start + pairs]
        rows.append([image for i in some for image in (generated[i], training[int(copying.nearest[i])])])
        ratios = ", ".join(f"{float(copying.ratio[i]):.2f}" for i in some)
        captions.append(f"generated | nearest: {ratios} (suspect below {copying.threshold:.2f})")
    return contact_sheet(rows, captions, size=size)
