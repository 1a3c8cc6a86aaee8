"""Do images follow their prompts: retrieval of the caption's own image, CLIP score, and a classifier of digits."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data import CaptionedImages, Sample, generator, to_signed
from ldm.data.builtin import DIGIT_WORDS
from ldm.evaluation.features import Clip, FeatureSpace, cached_features
from ldm.evaluation.stats import Interval, bootstrap_interval, fraction_interval, student_interval

RECALL_AT = (1, 5, 10)
RESAMPLES = 1000
BATCH_ROWS = 256
CLIP_BATCH = 32
CLIPSCORE_W = 2.5  # CLIPScore (arXiv:2104.08718), section 3


# ---- retrieval


@dataclass(frozen=True)
class RetrievalGallery:
    """All M images of a data set with features [M, D], float64, and hashes of their pixels at the size of the model."""

    samples: tuple[Sample, ...]
    features: Tensor
    pixel_hashes: tuple[str, ...]
    _indices: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_indices", {sample.id: index for index, sample in enumerate(self.samples)})

    @classmethod
    def from_images(cls, parts: Sequence[CaptionedImages], space: FeatureSpace) -> RetrievalGallery:
        """Of all `parts` (training and held-out) in turn, not augmented."""
        hashes = tuple(pixel_hash(images.image_at(index)) for images in parts for index in range(len(images)))
        features = torch.cat([cached_features(images, space) for images in parts])
        return cls(tuple(sample for images in parts for sample in images.samples), features, hashes)

    def indices(self, samples: Sequence[Sample]) -> list[int]:
        """Of these samples; KeyError for others."""
        return [self._indices[sample.id] for sample in samples]

    def matches(self, captions: Sequence[str]) -> list[tuple[int, ...]]:
        """For each caption the ascending indices of the images with it, or with the same pixels as one of these.

        (In OpenMoji 65 of 1,918 have a duplicate: flags of one pattern, "astronaut" and "man astronaut".)
        Near-duplicates do not match. ValueError for a caption that no image has.
        """
        with_caption: dict[str, set[str]] = {}
        with_hash: dict[str, list[int]] = {}
        for index, (sample, pixels) in enumerate(zip(self.samples, self.pixel_hashes, strict=True)):
            with_hash.setdefault(pixels, []).append(index)
            for caption in sample.captions:
                with_caption.setdefault(caption, set()).add(pixels)
        for caption in captions:
            if caption not in with_caption:
                raise ValueError(f"no image of the data has the caption {caption!r}; use captions of its images")
        images = {text: [i for pixels in with_caption[text] for i in with_hash[pixels]] for text in set(captions)}
        return [tuple(sorted(images[caption])) for caption in captions]


def pixel_hash(image: Tensor) -> str:
    """32 hexadecimal digits of the pixels of uint8 [3, h, w]."""
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Retrieval:
    """The rank of the caption's own image among all M (`gallery`), by similarity to the generated image.

    Attributes:
        ranks: float64 [N], from 1: one more than the non-matching images nearer than the nearest match; ties count
            half.
        within: for k = 1, 5, 10 the fraction of captions with a rank of at most k, with its 95 % interval.
        median: of the ranks, with its 95 % interval.
        chance, median_by_chance: of a model that ignores the caption.
    """

    ranks: Tensor
    gallery: int
    within: dict[int, Interval]
    median: Interval
    chance: dict[int, float]
    median_by_chance: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the ranks."""
        return {
            "captions": len(self.ranks),
            "gallery": self.gallery,
            "within": {str(k): {**vars(recall), "chance": self.chance[k]} for k, recall in self.within.items()},
            "median_rank": {**vars(self.median), "chance": self.median_by_chance},
        }


def retrieval(generated: Tensor, gallery: Tensor, matches: Sequence[Sequence[int]], *, seed: int = 0) -> Retrieval:
    """Ranks the gallery [M, D] by its cosine to each generated image [N, D] (why the cosine: docs/evaluation.md).

    `matches` are those of `RetrievalGallery.matches`. Captions with the same ones are not independent: intervals are
    over the groups that they form, that of the median by a bootstrap. ValueError for shapes that do not match,
    non-finite features, and indices outside the gallery.
    """
    if generated.ndim != 2 or gallery.ndim != 2 or generated.shape[1] != gallery.shape[1] or not len(generated):
        shapes = f"{list(generated.shape)} and those of the gallery {list(gallery.shape)}"
        raise ValueError(f"generated features have shape {shapes}; they must be [N, D] and [M, D]")
    if len(matches) != len(generated):
        raise ValueError(f"there are {len(matches)} captions for {len(generated)} images; give one per image")
    for indices in matches:
        if not indices or not all(0 <= index < len(gallery) for index in indices):
            raise ValueError(f"a caption matches {list(indices)}; give at least one index of 0 to {len(gallery) - 1}")
    for name, features in (("generated", generated), ("gallery", gallery)):
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} features are not all finite; check their images")
    directions = F.normalize(gallery.double(), dim=1)
    ranks = torch.empty(len(matches), dtype=torch.float64)
    for start in range(0, len(matches), BATCH_ROWS):
        cosines = F.normalize(generated[start : start + BATCH_ROWS].double(), dim=1) @ directions.T  # [b, M]
        for row, cosine in enumerate(cosines):
            indices = list(matches[start + row])
            best = cosine[indices].max()
            others = torch.ones(len(gallery), dtype=torch.bool)
            others[indices] = False
            nearer, equal = (cosine[others] > best).sum(), (cosine[others] == best).sum()
            ranks[start + row] = 1 + nearer + equal / 2
    numbers: dict[tuple[int, ...], int] = {}
    groups = torch.tensor([numbers.setdefault(tuple(sorted(indices)), len(numbers)) for indices in matches])
    counts = torch.tensor([len(set(indices)) for indices in matches], dtype=torch.float64)
    # The median by a bootstrap over groups.
    number, order = len(numbers), ranks.argsort()
    resampled = torch.from_numpy(generator(seed, "median rank").integers(number, size=(RESAMPLES, number)))
    ones = torch.ones_like(resampled, dtype=torch.float64)
    times = torch.zeros(RESAMPLES, number, dtype=torch.float64).scatter_add_(1, resampled, ones)
    weights = torch.cat([torch.ones(1, len(ranks), dtype=torch.float64), times[:, groups[order]]])  # [1 + resamples, N]
    # Ranks repeated so many times: the mean of the two in the middle.
    reached = weights.cumsum(dim=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(dim=1), (reached <= half).sum(dim=1)
    medians = (ranks[order][lower] + ranks[order][upper]) / 2
    return Retrieval(
        ranks=ranks,
        gallery=len(gallery),
        within={k: fraction_interval((ranks <= k).double(), groups) for k in RECALL_AT},
        median=bootstrap_interval(float(medians[0]), medians[1:]),
        chance={k: float(_chance(counts, len(gallery), k).mean()) for k in RECALL_AT},
        # The smallest rank that at least half of the captions reach by chance.
        median_by_chance=bisect_left(
            range(len(gallery)), 0.5 - 1e-12, 1, key=lambda k: float(_chance(counts, len(gallery), k).mean())
        ),
    )


def _chance(counts: Tensor, gallery: int, k: int) -> Tensor:
    """P(one of `counts` matches is among k of the gallery, chosen without replacement), for each caption."""
    missed = torch.ones_like(counts)
    for chosen in range(min(k, gallery)):
        missed = missed * ((gallery - counts - chosen).clamp(min=0) / (gallery - chosen))
    return 1 - missed


# ---- CLIP score


@dataclass(frozen=True)
class ClipScore:
    """Similarity of images and captions by CLIP.

    Attributes:
        hundred: mean of 100·cos(image, caption) with its 95 % interval over images, as torchmetrics reports it.
        score: CLIPScore, the mean of 2.5·max(cos, 0), arXiv:2104.08718, without the paper's prefix "A photo depicts".
        others: 100·cos of images with the captions of other images: what a model that ignores the text would have.
        model: of CLIP, and how images are resized for it.
    """

    hundred: Interval
    score: float
    others: float
    model: str
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"hundred": vars(self.hundred)}


def clip_score(clip: Clip, images: Tensor, captions: Sequence[str]) -> ClipScore:
    """Of images uint8 [N, 3, H, W] and the caption of each, N at least 2 (ValueError)."""
    if len(captions) != len(images) or len(captions) < 2:
        raise ValueError(f"there are {len(images)} images and {len(captions)} captions; give as many, at least 2")
    image_parts, text_parts = [], []
    for start in range(0, len(captions), CLIP_BATCH):
        batch = slice(start, start + CLIP_BATCH)
        image_parts.append(clip.embed_images(to_signed(images[batch])).double().cpu())
        text_parts.append(clip.embed_texts(captions[batch]).double().cpu())
    cosines = F.normalize(torch.cat(image_parts), dim=1) @ F.normalize(torch.cat(text_parts), dim=1).T  # [N, N]
    matched, count = cosines.diagonal(), len(captions)
    return ClipScore(
        hundred=student_interval((100 * matched).tolist()),
        score=float(CLIPSCORE_W * matched.clamp(min=0).mean()),
        others=float(100 * (cosines.sum() - matched.sum()) / (count * (count - 1))),
        model=f"CLIP {clip.name}, images resized to {clip.resize}",
        pictures=count,
    )


# ---- digits


@dataclass(frozen=True)
class DigitClassifier:
    """A support vector classifier of scans of digits, on 8×8 grays whatever the size of the image."""

    classifier: Any

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> DigitClassifier:
        """Fits to training samples of the `digits` data."""
        from sklearn.svm import SVC

        classifier = SVC(C=10, gamma=0.001)  # for grays 0 to 16, the range of the scans
        return cls(classifier.fit(_grays(sample.load() for sample in samples), [digit_of(s) for s in samples]))

    def accuracy(self, images: Iterable[Image.Image], digits: Sequence[int]) -> float:
        """The fraction of images classified as the given digits, 0 to 1."""
        return float(np.mean(self.classifier.predict(_grays(images)) == np.asarray(digits)))


def digit_of(sample: Sample) -> int:
    """The digit 0 to 9 of a sample of the `digits` data, from its first caption."""
    return DIGIT_WORDS.index(sample.captions[0].rsplit(" ", 1)[-1])


def digit_accuracy(classifier: DigitClassifier, images: Tensor, digits: Sequence[int]) -> Interval:
    """The fraction of images uint8 [N, 3, H, W] classified as their digit, with Wilson's 95 % interval."""
    if len(digits) != len(images) or not digits:
        raise ValueError(f"there are {len(images)} images and {len(digits)} digits; give as many, at least one")
    opened = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in images]
    right = round(classifier.accuracy(opened, digits) * len(digits))
    return fraction_interval(torch.tensor([1.0] * right + [0.0] * (len(digits) - right), dtype=torch.float64))


def _grays(images: Iterable[Image.Image]) -> np.ndarray:
    small = [image.convert("L").resize((8, 8), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() * (16 / 255) for image in small])  # [N, 64]
