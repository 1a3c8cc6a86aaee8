"""Whether a model draws what it is asked for: can the picture be told to be of its caption?

Three answers. `retrieval` needs no text model: features of the generated picture are compared with those of all
images of the data, and the caption's own image should be among the nearest. `clip_score` asks CLIP, where its weights
are. `read_as_asked` asks a classifier, where the data are digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import CaptionedImages, Sample, generator, to_signed
from ldm.evaluation.clip import Clip
from ldm.evaluation.digits import DigitReader
from ldm.evaluation.features import IMAGES_AT_ONCE, FeatureSpace
from ldm.evaluation.frechet import Interval, interval_over
from ldm.evaluation.precision import wilson

NEAREST = (1, 5, 10)
RESAMPLES = 1000
ROWS_AT_ONCE = 256
CLIPSCORE_W = 2.5  # CLIPScore (arXiv:2104.08718), section 3


@dataclass(frozen=True)
class Gallery:
    """All images of a data set, in features, and which of them count as a caption's own.

    Attributes:
        samples: M of them.
        features: [M, D], float64.
        looks: for each image a digest of its pixels as the model knows them.
    """

    samples: tuple[Sample, ...]
    features: Tensor
    looks: tuple[str, ...]
    _places: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", {sample.id: place for place, sample in enumerate(self.samples)})

    @classmethod
    def of(cls, parts: Sequence[CaptionedImages], space: FeatureSpace) -> Gallery:
        """Of the images of all `parts` (training and held out) one after the other, neither flipped nor cropped."""
        samples = tuple(sample for images in parts for sample in images.samples)
        looks, order = [""] * len(samples), []

        def batches() -> Iterator[Tensor]:
            before = 0
            for images in parts:
                for chunk in images.chunks(IMAGES_AT_ONCE):  # of one shape, so not in order
                    pictures = torch.stack([images.image_at(index) for index in chunk])  # [b, 3, h, w]
                    places = [before + index for index in chunk]
                    for place, picture in zip(places, pictures, strict=True):
                        looks[place] = look_of(picture)
                    order.extend(places)
                    yield to_signed(pictures)
                before += len(images)

        found = space.of(batches())
        features = torch.empty_like(found)
        features[order] = found
        return cls(samples, features, tuple(looks))

    def places(self, samples: Sequence[Sample]) -> list[int]:
        """Where these samples stand; KeyError for one of other data."""
        return [self._places[sample.id] for sample in samples]

    def own(self, captions: Sequence[str]) -> list[tuple[int, ...]]:
        """For each caption the indices of the images that are its own, ascending.

        Those that bear it: a text cannot say which of them is meant ("a handwritten three"). And those that are the
        same picture, to the last pixel, as one that bears it: no feature can say which of them was drawn (in OpenMoji
        65 of 1,918: flags of one pattern, "astronaut" and "man astronaut"). Near-duplicates do not count: whoever asks
        for four o'clock and gets three has not got what was asked for.

        Raises:
            ValueError: for a caption that no image bears.
        """
        bearers: dict[str, set[str]] = {}
        alike: dict[str, list[int]] = {}
        for index, (sample, look) in enumerate(zip(self.samples, self.looks, strict=True)):
            alike.setdefault(look, []).append(index)
            for caption in sample.captions:
                bearers.setdefault(caption, set()).add(look)
        for caption in captions:
            if caption not in bearers:
                raise ValueError(f"no image of the data bears the caption {caption!r}; ask for captions of its images")
        known = {text: tuple(sorted(i for look in bearers[text] for i in alike[look])) for text in set(captions)}
        return [known[caption] for caption in captions]


def look_of(picture: Tensor) -> str:
    """32 hexadecimal digits that name the pixels of uint8 [3, h, w]."""
    digest = hashlib.blake2b(str(tuple(picture.shape)).encode(), digest_size=16)
    digest.update(picture.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Retrieval:
    """Where the caption's own image stands among all M images, ordered by their likeness to the generated picture.

    Attributes:
        ranks: [N] float64, from 1: one more than the images that are not the caption's own and nearer than the nearest
            that is; an equal one counts half.
        gallery: M.
        within: for k = 1, 5, 10 the share of captions whose rank is at most k, with its 95 % interval over captions.
        median: of the ranks, with its 95 % interval.
        chance, median_by_chance: the same for a model that draws regardless of the caption.
    """

    ranks: Tensor
    gallery: int
    within: dict[int, Interval]
    median: Interval
    chance: dict[int, float]
    median_by_chance: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the ranks, for JSON."""
        return {
            "captions": len(self.ranks),
            "gallery": self.gallery,
            "within": {str(k): {**vars(share), "chance": self.chance[k]} for k, share in self.within.items()},
            "median_rank": {**vars(self.median), "chance": self.median_by_chance},
        }

    def lines(self, label: str) -> list[str]:
        """For the terminal; `label` says which features."""
        head = (
            f"retrieval: the rank of the caption's own image among all {self.gallery}, by the cosine of {label}; "
            f"{len(self.ranks)} captions, intervals of 95 %"
        )
        table = [
            f"  among the {k:2d} nearest  {100 * share.mean:5.1f} %  ({100 * share.low:.1f} to {100 * share.high:.1f}; "
            f"by chance {100 * self.chance[k]:.2g} %)"
            for k, share in self.within.items()
        ]
        low, high = self.median.low, self.median.high
        middle = f"  median rank {self.median.mean:11g}    ({low:g} to {high:g}; by chance {self.median_by_chance})"
        return [head, *table, middle]


def retrieval(generated: Tensor, gallery: Tensor, own: Sequence[Sequence[int]], *, seed: int = 0) -> Retrieval:
    """How well the picture drawn for a caption leads back to the caption's own image.

    Images are ordered by the cosine between features. On 200 OpenMoji drawings that were recoloured, made grey,
    shifted, shrunk, blurred, given noise, mirrored, or passed through a first stage, so that the right answer is
    known, the own image was among the 10 nearest of 1,918 (EfficientNet-Lite0 at 128 pixels, mean over the changes) in
    88 % by the cosine, 87 % after subtracting the mean of the gallery, 83 % by the Euclidean distance, 78 % and 77 %
    by that of standardised features and the sum of absolute differences; at 64 pixels in 83, 80, 76, 71 and 73 %; on
    pixel features all are within 69 to 71 %.

    Captions that ask for the same images do not count as independent: the intervals are over the groups they form.

    Args:
        generated: [N, D] features of the pictures.
        gallery: [M, D] features of all images of the data, training and held out.
        own: for each caption the indices of the images that count as its own: `Gallery.own`.
        seed: of the resampling behind the interval of the median.

    Raises:
        ValueError: for shapes that do not fit, features that are not finite, and indices outside the gallery.
    """
    _check(generated, gallery, own)
    ranks = _ranks(generated, gallery, own)
    groups = _groups(own)
    counts = torch.tensor([len(set(indices)) for indices in own], dtype=torch.float64)
    return Retrieval(
        ranks=ranks,
        gallery=len(gallery),
        within={k: share_interval((ranks <= k).double(), groups) for k in NEAREST},
        median=_median_interval(ranks, groups, seed),
        chance={k: float(_chance(counts, len(gallery), k).mean()) for k in NEAREST},
        median_by_chance=_chance_median(counts, len(gallery)),
    )


def _check(generated: Tensor, gallery: Tensor, own: Sequence[Sequence[int]]) -> None:
    if generated.ndim != 2 or gallery.ndim != 2 or generated.shape[1] != gallery.shape[1] or not len(generated):
        raise ValueError(
            f"generated features have shape {list(generated.shape)} and those of the gallery {list(gallery.shape)}; "
            "they must be [N, D] and [M, D], of the same features"
        )
    if len(own) != len(generated):
        raise ValueError(f"there are {len(own)} captions for {len(generated)} pictures; give one a picture")
    for indices in own:
        if not indices or not all(0 <= index < len(gallery) for index in indices):
            raise ValueError(
                f"a caption's own images are {list(indices)}; give at least one of 0 to {len(gallery) - 1}"
            )
    for name, features in (("generated", generated), ("gallery", gallery)):
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} features are not all finite; look at the pictures they come from")


def _ranks(generated: Tensor, gallery: Tensor, own: Sequence[Sequence[int]]) -> Tensor:
    directions = F.normalize(gallery.double(), dim=1)
    ranks = torch.empty(len(own), dtype=torch.float64)
    for start in range(0, len(own), ROWS_AT_ONCE):
        likeness = F.normalize(generated[start : start + ROWS_AT_ONCE].double(), dim=1) @ directions.T  # [b, M]
        for row, like in enumerate(likeness):
            indices = list(own[start + row])
            best = like[indices].max()
            others = torch.ones(len(gallery), dtype=torch.bool)
            others[indices] = False
            nearer, equal = (like[others] > best).sum(), (like[others] == best).sum()
            ranks[start + row] = 1 + nearer + equal / 2
    return ranks


def _groups(own: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N]: the same number for captions that ask for the same images."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(sorted(indices)), len(numbers)) for indices in own])


def _chance(counts: Tensor, gallery: int, k: int) -> Tensor:
    """P(one of `counts` own images is among k drawn of all without repetition), for each caption."""
    missed = torch.ones_like(counts)
    for drawn in range(min(k, gallery)):
        missed = missed * ((gallery - counts - drawn).clamp(min=0) / (gallery - drawn))
    return 1 - missed


def _chance_median(counts: Tensor, gallery: int) -> int:
    """The least rank that half of the captions, or more, do not exceed by chance."""
    low, high = 1, gallery
    while low < high:
        middle = (low + high) // 2
        if float(_chance(counts, gallery, middle).mean()) >= 0.5 - 1e-12:
            high = middle
        else:
            low = middle + 1
    return low


def share_interval(hits: Tensor, groups: Tensor | None = None) -> Interval:
    """The share of `hits` (0 or 1, float [N]) with Wilson's 95 % interval, which has sense near 0 and 1 too.

    Args:
        groups: int64 [N]; members of a group are alike, so that N shrinks by the design effect: the variance of the
            share over groups, in units of that of N independent hits, if it is larger. Where all hits are
            alike nothing is known of it, and N is the number of groups.
    """
    count, share = len(hits), float(hits.mean())
    effective = float(count)
    if groups is not None:
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, hits.double() - share)
        present = len(groups.unique())
        independent = count * share * (1 - share)
        if independent > 0 and present > 1:
            grouped = float(sums.square().sum()) * present / (present - 1) * (count - 1) / count
            effective = min(max(count * independent / max(grouped, 1e-12), 1.0), count)
        else:
            effective = present
    return wilson(share, round(effective))


def _median_interval(ranks: Tensor, groups: Tensor, seed: int) -> Interval:
    """By drawing as many groups again, with repetition: the middle 95 % of the medians."""
    number = int(groups.max()) + 1
    drawn = torch.from_numpy(generator(seed, "median rank").integers(number, size=(RESAMPLES, number)))
    times = torch.zeros(RESAMPLES, number, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    order = ranks.argsort()
    weights = torch.cat([torch.ones(1, len(ranks), dtype=torch.float64), times[:, groups[order]]])  # [1 + resamples, N]
    medians = _weighted_medians(ranks[order], weights)
    low, high = torch.quantile(medians[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(medians[0]), low, high)


def _weighted_medians(ascending: Tensor, weights: Tensor) -> Tensor:
    """Of values [N] that count `weights` [B, N] times (whole numbers): [B], the mean of the two in the middle."""
    reached = weights.cumsum(dim=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(dim=1), (reached <= half).sum(dim=1)
    return (ascending[lower] + ascending[upper]) / 2


@dataclass(frozen=True)
class ClipScore:
    """How well pictures and captions fit, by CLIP.

    Attributes:
        hundred: mean of 100·cos(picture, caption) with its 95 % interval over pictures, as torchmetrics prints it.
        score: CLIPScore, the mean of 2.5·max(cos, 0), arXiv:2104.08718; captions are taken as they are, without the
            paper's "A photo depicts" before them, for not all pictures are photographs.
        others: 100·cos over all pairs of a picture and the caption of another: what ignoring the text would give.
        model: of CLIP, and how pictures are resized for it.
        pictures: N.
    """

    hundred: Interval
    score: float
    others: float
    model: str
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"hundred": vars(self.hundred)}

    def lines(self) -> list[str]:
        """For the terminal."""
        found = self.hundred
        return [
            f"CLIP score {found.mean:.2f} ({found.low:.2f} to {found.high:.2f}, 95 %): 100 x cosine, {self.model}, "
            f"{self.pictures} pictures; with the captions of others {self.others:.2f}; as CLIPScore (w = "
            f"{CLIPSCORE_W}) {self.score:.3f}"
        ]


def clip_score(clip: Clip, pictures: Tensor, captions: Sequence[str], *, at_once: int = 32) -> ClipScore:
    """Pictures uint8 [N, 3, H, W] and the caption of each, N at least 2.

    Raises:
        ValueError: for another number of captions, or fewer than two.
    """
    if len(captions) != len(pictures) or len(captions) < 2:
        raise ValueError(f"there are {len(pictures)} pictures and {len(captions)} captions; give as many, at least 2")
    seen, read = [], []
    for start in range(0, len(captions), at_once):
        chunk = slice(start, start + at_once)
        seen.append(clip.embed_images(to_signed(pictures[chunk])).double().cpu())
        read.append(clip.embed_texts(captions[chunk]).double().cpu())
    cosines = F.normalize(torch.cat(seen), dim=1) @ F.normalize(torch.cat(read), dim=1).T  # [N, N]
    matched, count = cosines.diagonal(), len(captions)
    return ClipScore(
        hundred=interval_over((100 * matched).tolist()),
        score=float(CLIPSCORE_W * matched.clamp(min=0).mean()),
        others=float(100 * (cosines.sum() - matched.sum()) / (count * (count - 1))),
        model=f"CLIP {clip.name}, pictures resized to {clip.resize}",
        pictures=count,
    )


def read_as_asked(reader: DigitReader, pictures: Tensor, digits: Sequence[int]) -> Interval:
    """The share of pictures, uint8 [N, 3, H, W], that are read as the digit asked for; Wilson's 95 % interval."""
    if len(digits) != len(pictures) or not digits:
        raise ValueError(f"there are {len(pictures)} pictures and {len(digits)} digits; give as many, at least one")
    images = [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())) for picture in pictures]
    right = round(reader.accuracy(images, digits) * len(digits))
    return share_interval(torch.tensor([1.0] * right + [0.0] * (len(digits) - right), dtype=torch.float64))
