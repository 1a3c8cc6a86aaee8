"""Captioned images as tensors, the split into training and held-out data, and the images' statistics."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.images import square
from ldm.data.keyed import generator
from ldm.data.sources import DataConfig, Sample

# One grey level in [-1, 1]: bytes cannot tell a smaller deviation from none.
MIN_STD = 1 / 127.5


@dataclass(frozen=True)
class Item:
    """One sample as it is seen in one epoch; `image` is uint8 [3, R, R], or None where it is not loaded."""

    id: str
    epoch: int
    index: int
    caption: str
    flipped: bool
    image: Tensor | None


class Batch(NamedTuple):
    """B items: `indices` int64 [B], `flipped` bool [B], `images` uint8 [B, 3, R, R] or None."""

    ids: list[str]
    epochs: list[int]
    indices: Tensor
    captions: list[str]
    flipped: Tensor
    images: Tensor | None


class CaptionedImages(Dataset[Item]):
    """Samples as square images, indexed by (epoch, index): see `SampleOrder`.

    The caption that is drawn, the flip and a random crop are functions of (seed, epoch, sample id), whichever
    process draws them, and however often.

    Args:
        samples: at least one, with distinct ids.
        config: the resolution and what may be drawn.
        seed: any integer.
        cache_bytes: with `crop: center` images are kept in memory once resized, as many as fit into this many
            bytes. Worker processes that are forked share them.

    Attributes:
        with_images: at first True; set to False, items are drawn as before but nothing is loaded and
            `Item.image` is None, for those who hold the images encoded.
    """

    def __init__(self, samples: Sequence[Sample], config: DataConfig, seed: int, cache_bytes: int = 2**30) -> None:
        if not samples:
            raise ValueError(f"no images in {config.path}; add captioned images")
        self.samples = tuple(samples)
        self.config = config
        self.seed = seed
        self.with_images = True
        self.cache_bytes = cache_bytes if config.crop == "center" else 0
        self._cache = _Cache(len(self.samples), config.resolution, self.cache_bytes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: tuple[int, int]) -> Item:
        """The sample `index` as epoch `epoch` shows it, for `position` (epoch, index)."""
        epoch, index = position
        sample = self.samples[index]
        choice = int(self._draw("caption", epoch, sample).integers(len(sample.captions)))
        flipped = self.config.flip and bool(self._draw("flip", epoch, sample).integers(2))
        image = None
        if self.with_images and self.config.crop == "random":
            place = float(self._draw("crop", epoch, sample).random())
            image = square(sample.load(), self.config.resolution, place)  # [3, R, R]
            image = image.flip(-1) if flipped else image
        elif self.with_images:
            image = self.image_at(index, flipped)
        return Item(sample.id, epoch, index, sample.captions[choice], flipped, image)

    def image_at(self, index: int, flipped: bool = False) -> Tensor:
        """The image's middle square, without anything drawn; uint8 [3, R, R].

        Raises:
            ValueError: naming the file if it has become unreadable.
        """
        image = self._cache.get(index)
        if image is None:
            image = square(self.samples[index].load(), self.config.resolution)  # [3, R, R]
            self._cache.put(index, image)
        return image.flip(-1) if flipped else image

    def _draw(self, purpose: str, epoch: int, sample: Sample) -> np.random.Generator:
        return generator(self.seed, purpose, epoch, sample.id)

    def __getstate__(self) -> dict[str, Any]:
        # A mapping of memory cannot be pickled: a process that is spawned starts with an empty cache.
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Cache(len(self.samples), self.config.resolution, self.cache_bytes)


class _Cache:
    """The first images of a data set, each beside a byte that says whether it is there.

    The memory is an anonymous shared mapping: forked workers fill one cache together, pages that nobody has
    filled cost nothing, and the size of /dev/shm does not bound it. Two workers that fill one place write the
    same bytes.
    """

    def __init__(self, length: int, resolution: int, budget: int) -> None:
        shape = (3, resolution, resolution)
        size = math.prod(shape)
        self.capacity = min(length, budget // (size + 1))
        if self.capacity:
            memory = np.frombuffer(mmap.mmap(-1, self.capacity * (size + 1)), dtype=np.uint8)
            self.images = memory[: self.capacity * size].reshape(self.capacity, *shape)  # [N, 3, R, R]
            self.filled = memory[self.capacity * size :]  # [N]

    def get(self, index: int) -> Tensor | None:
        if index >= self.capacity or not self.filled[index]:
            return None
        return torch.from_numpy(self.images[index].copy())

    def put(self, index: int, image: Tensor) -> None:
        if index < self.capacity:
            self.images[index] = image.numpy()
            self.filled[index] = 1


def collate(items: Sequence[Item]) -> Batch:
    """Items → one batch, in their order."""
    images = [item.image for item in items if item.image is not None]
    return Batch(
        ids=[item.id for item in items],
        epochs=[item.epoch for item in items],
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        captions=[item.caption for item in items],
        flipped=torch.tensor([item.flipped for item in items], dtype=torch.bool),
        images=torch.stack(images) if images else None,  # [B, 3, R, R]
    )


def to_signed(images: Tensor) -> Tensor:
    """uint8 of any shape → float32 in [-1, 1], x / 127.5 - 1."""
    assert images.dtype == torch.uint8, images.dtype
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape → uint8, clamped and rounded to the nearest (half to even)."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def split(samples: Sequence[Sample], held_out: float) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples → (training, held out), whole groups at a time, both in the order given.

    A group's side follows from its name alone (a hash below `held_out`), so that it stays whatever is added or removed.
    One exception keeps small data usable: with `held_out` > 0 and two groups or more, neither side is empty; the group
    whose hash is nearest to the empty side stands in, until one that belongs there by its own hash arrives. At a share
    of 0.1 this concerns 12 % of data sets of 20 groups, 0.5 % of 50, and hardly any above. No rule can do without: a
    side that never changes is a function of the name alone, and that may leave nothing held out. A single group is
    trained on.

    Which group a sample is of may depend on what else there is: see `inspect`.

    Raises:
        ValueError: if nothing is left to train on.
    """
    if not samples:
        raise ValueError("no images are left for training; add captioned images")
    if not 0 <= held_out < 1:
        raise ValueError(f"data.held_out is {held_out}; it is a share of the data, at least 0 and below 1")
    ranks = {sample.group: _unit_hash(sample.group) for sample in samples}
    chosen = {group for group, rank in ranks.items() if rank < held_out}
    if len(ranks) == 1:
        chosen = set()
    elif held_out > 0 and not chosen:
        chosen = {min(ranks, key=ranks.__getitem__)}
    elif len(chosen) == len(ranks):
        chosen.remove(max(ranks, key=ranks.__getitem__))
    training = tuple(sample for sample in samples if sample.group not in chosen)
    return training, tuple(sample for sample in samples if sample.group in chosen)


def _unit_hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def image_statistics(dataset: CaptionedImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all images (their middle squares), in [-1, 1].

    Returns:
        Two float64 tensors [3]. Summed in integers, so exact and independent of the order. A channel that
        hardly varies gets the deviation of one grey level instead of 0.
    """
    total = [0, 0, 0]
    squares = [0, 0, 0]
    for index in range(len(dataset)):
        flat = dataset.image_at(index).flatten(1).to(torch.int64)  # [3, R·R]
        total = [a + b for a, b in zip(total, flat.sum(1).tolist(), strict=True)]
        squares = [a + b for a, b in zip(squares, (flat * flat).sum(1).tolist(), strict=True)]
    count = len(dataset) * dataset.config.resolution**2
    means = [value / count / 127.5 - 1 for value in total]
    # Var = E[x²] - E[x]², as one fraction of integers: no cancellation.
    variances = [(count * s - t * t) / count**2 for s, t in zip(squares, total, strict=True)]
    deviations = [max(math.sqrt(variance) / 127.5, MIN_STD) for variance in variances]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64)
