"""What is no model of the data, measured as its pictures are, and real images that nobody was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import generator, to_signed, to_uint8
from ldm.evaluation.faithfulness import Retrieval
from ldm.evaluation.frechet import Interval
from ldm.evaluation.memorising import copy_features
from ldm.evaluation.nearness import Known, distinct
from ldm.evaluation.precision import NEIGHBOURS, precision_recall, wilson
from ldm.evaluation.quality import MINIMUM
from ldm.evaluation.reference import Reference
from ldm.evaluation.standing import Shares, Standing

MOST_TRAINING, MOST_PICTURES = 2048, 256  # what is said by them changes little beyond, and costs the square
COARSE = 4  # places a side that are left of a blurred image: those of its colors


def standing(
    pictures: Tensor, features: Tensor, found: Mapping[str, Retrieval], reference: Reference, *, seed: int
) -> Standing:
    """Measures pictures and controls of the same size and number against the same training images.

    Args:
        pictures: uint8 [N, 3, H, W], N at least 50, of at least 50 training images.
        features: [N, D] of them, in the features of the reference.
        found: side → retrieval.
        seed: of the training images that are drawn where there are many, of noise and of what is left out in turn.
    """
    height, width = pictures.shape[-2:]
    yardstick = yardstick_of(reference, len(pictures), (height, width), seed)
    return Standing(
        generated=yardstick.shares(copy_features(to_signed(pictures)), features),
        unseen=yardstick.unseen,
        controls=yardstick.controls,
        reference_samples=len(yardstick.training),
        found=found,
    )


def yardstick_of(reference: Reference, samples: int, size: tuple[int, int], seed: int) -> Yardstick:
    """What does not depend on the pictures, for `samples` of them of this (height, width); measured once."""
    key = (samples, size, seed)
    if key not in reference.yardsticks:
        reference.yardsticks[key] = Yardstick.of(reference, samples, size, seed)
    found: Yardstick = reference.yardsticks[key]
    return found


@dataclass(frozen=True)
class Yardstick:
    """Training features [M, D] that all is compared with, how near variants are, N' for recall, and what was found."""

    training: Tensor
    radius: float
    count: int
    seed: int
    controls: Mapping[str, Shares]
    unseen: Shares

    @classmethod
    def of(cls, reference: Reference, samples: int, size: tuple[int, int], seed: int) -> Yardstick:
        unseen, rest = _unseen(reference, samples, seed)
        features, near, images = reference.features, reference.near, reference.training
        if reference.held_out is not None and len(reference.held_out_features) >= MINIMUM:
            features, near = reference.held_out_features, reference.held_out_near
            images = reference.held_out
        radius = Known.of(reference.near, None, None).radius
        training = reference.features[rest]
        nothing = Shares(Interval(0, 0, 0), Interval(0, 0, 0), 0, 0)
        count = min(samples, len(unseen), MOST_PICTURES)
        empty = cls(training, radius, count, seed, {}, nothing)
        controls = {
            name: empty.shares(*_seen(pictures, reference))
            for name, pictures in _controls(
                reference, [images.image_at(int(i)) for i in unseen[:count]], size, seed
            ).items()
        }
        return replace(empty, controls=controls, unseen=empty.shares(near[unseen], features[unseen]))

    def shares(self, near: Tensor, features: Tensor) -> Shares:
        """Of images by what copies are found by [n, K] and their features [n, D]."""
        kept = distinct(near, self.radius)
        order = generator(self.seed, "standing").permutation(len(kept))[: self.count]
        different = features[kept[torch.from_numpy(order)]]
        precision = precision_recall(features, self.training).precision
        recall = Interval(0.0, 0.0, 0.0)
        if len(different) >= NEIGHBOURS + 2:
            recall = precision_recall(different, self.training).recall
        return Shares(wilson(precision.mean, len(kept)), recall, len(kept), len(features))


def _unseen(reference: Reference, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which images stand for unseen ones, of the held-out or else of the training images; and which are the others."""
    held_out, training = len(reference.held_out_features), len(reference.features)
    order = generator(seed, "unseen").permutation(held_out if held_out >= MINIMUM else training)
    if held_out >= MINIMUM:
        rest = torch.from_numpy(generator(seed, "training").permutation(training)[:MOST_TRAINING])
        return torch.from_numpy(order[:MOST_TRAINING]), rest
    # Variants of one picture stay on one side, as they do where images are held out.
    most, groups = min(samples, MOST_PICTURES, training // 2), [one.group for one in reference.training.samples]
    sizes, chosen, left = Counter(groups), set[str](), most
    if min(sizes.values()) > most:
        groups = [one.id for one in reference.training.samples]
        sizes = Counter(groups)
    for place in order:
        group = groups[place]
        if group not in chosen and sizes[group] <= left:
            chosen.add(group)
            left -= sizes[group]
    out = torch.tensor([groups[place] in chosen for place in order])
    return torch.from_numpy(order)[out], torch.from_numpy(order)[~out][:MOST_TRAINING]


def _controls(reference: Reference, unseen: list[Tensor], size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Name → uint8 [n, 3, H, W], as many as there are unseen images uint8 [3, h, w]."""
    count = len(unseen)
    random = torch.Generator().manual_seed(int(generator(seed, "controls").integers(2**63 - 1)))
    noise = torch.randn(count, 3, *size, generator=random, dtype=torch.float64)
    mean, std = reference.colors
    coarse = [F.adaptive_avg_pool2d(to_signed(image[None]), COARSE) for image in unseen]
    blurred = F.interpolate(torch.cat(coarse), size, mode="bicubic").clamp(-1, 1)
    average = F.interpolate(reference.mean_image[None], size, mode="bicubic")
    return {
        "noise": to_uint8((mean.view(3, 1, 1) + std.view(3, 1, 1) * noise).clamp(-1, 1)),
        "the mean image": to_uint8(average.clamp(-1, 1)).expand(count, -1, -1, -1),
        "blurred images": to_uint8(blurred),
    }


def _seen(images: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    return copy_features(to_signed(images)), reference.space.of([to_signed(images)])
