"""Captioned images as tensors, the split into training and held-out data, and the images' statistics."""

from __future__ import annotations

import hashlib
import math
import mmap
import signal
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.cores import usable_cores
from ldm.data.batching import BatchOrder, Buckets, assign_buckets, bucket_sizes, square_bucket
from ldm.data.composer import Composer
from ldm.data.images import resize_and_crop
from ldm.data.rng import generator
from ldm.data.sources import DataConfig, Sample

# One grey level in [-1, 1]: bytes cannot tell a smaller deviation from none.
MIN_STD = 1 / 127.5


@dataclass(frozen=True)
class Item:
    """One sample as it is seen in one epoch; `image` is uint8 [3, *size], or None where it is not loaded.

    `renewed` says that it is there for `data.renew_every` epochs only: composed, or one that took another's place.
    """

    id: str
    epoch: int
    index: int
    caption: str
    flipped: bool
    size: tuple[int, int]
    image: Tensor | None
    renewed: bool = False


class Batch(NamedTuple):
    """B items of one `size` (h, w): `indices` int64 [B], `flipped` bool [B], `images` uint8 [N, 3, h, w], or None for
    N = 0, of the N items that are `loaded`, bool [B]; `renewed` bool [B].
    """

    ids: list[str]
    epochs: list[int]
    indices: Tensor
    captions: list[str]
    flipped: Tensor
    size: tuple[int, int]
    images: Tensor | None
    loaded: Tensor
    renewed: Tensor


class CaptionedImages(Dataset[Item]):
    """Samples as images of a few sizes, or one, indexed by (epoch, index): see `BatchOrder`.

    The caption that is drawn, the flip and a random crop are functions of (seed, epoch, sample id), whichever
    process draws them, and however often.

    Args:
        samples: at least one, with distinct ids. Where `config.bucketed`, those whose size is not known are loaded
            here, once, to learn it.
        config: the resolution and what may be drawn.
        seed: any integer.
        cache_bytes: with `crop: center` images are kept in memory once resized, as many as fit into this many
            bytes. Worker processes that are forked share them.
        batch_size: with buckets, sizes that are nearest to fewer images are given up: see `assign_buckets`.
        sizes: with buckets, the (height, width) to choose from, such as `buckets.sizes` of the training images for
            those held out; None takes `bucket_sizes`.
        composed: whether items are composed as `config.compose` says: those of training are, and of them alone;
            `samples` and `image_at` are always the plain ones.

    Attributes:
        buckets: which image has which size.
        composer: what composes; None where nothing is.
        with_images: at first True; set to False, items are drawn as before but nothing is loaded and
            `Item.image` is None, for those who hold the images encoded.
        renewed_cached: of the samples below this index, those who hold the images encoded keep what is renewed too, so
            that it is loaded only in the first epoch in which it is there; 0 at first.
        reload_epochs: epochs in which it is loaded even so: the first ones of a resumed run, whose memory is empty.

    Raises:
        ValueError: if there are no samples, or one that has to be loaded has become unreadable.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: DataConfig,
        seed: int,
        cache_bytes: int = 2**30,
        *,
        batch_size: int = 1,
        sizes: Sequence[tuple[int, int]] | None = None,
        composed: bool = False,
    ) -> None:
        if not samples:
            raise ValueError(f"no images in {config.path}; add captioned images")
        self.samples = tuple(samples)
        self.config = config
        self.seed = seed
        self.with_images = True
        self.renewed_cached = 0
        self.reload_epochs: Collection[int] = ()
        self.composer = Composer(self.samples, config, seed) if composed and config.compose > 0 else None
        self.cache_bytes = cache_bytes if config.crop == "center" else 0
        if config.bucketed:
            choice = sizes or bucket_sizes(config.resolution)
            self.buckets = assign_buckets(_native_sizes(self.samples), choice, batch_size)
        else:
            self.buckets = square_bucket(len(self.samples), config.resolution)
        self._cache = _Cache(self.buckets, self.cache_bytes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: tuple[int, int]) -> Item:
        """The sample `index` as epoch `epoch` shows it, for `position` (epoch, index)."""
        epoch, index = position
        sample = self.sample_at(epoch, index)
        if sample is not self.samples[index]:
            return self._renewed(epoch, index, sample)
        flipped = self.config.flip and bool(self._draw("flip", epoch, sample).integers(2))
        image = None
        if self.with_images and self.config.crop == "random":
            place = float(self._draw("crop", epoch, sample).random())
            image = resize_and_crop(sample.load(), self.shape_of(index), place)  # [3, h, w]
            image = image.flip(-1) if flipped else image
        elif self.with_images:
            image = self.image_at(index, flipped)
        return Item(sample.id, epoch, index, self._caption(epoch, sample), flipped, self.shape_of(index), image)

    def sample_at(self, epoch: int, index: int) -> Sample:
        """What stands at a place in an epoch: the sample there, or the one that has taken its place."""
        sample = self.samples[index]
        if sample.renew is not None:
            return sample.renew(epoch)
        composed = None if self.composer is None else self.composer.compose(epoch, index, self.shape_of(index))
        return sample if composed is None else composed

    @property
    def renewed_fraction(self) -> float:
        """Of the samples of an epoch, at most so many are there for `data.renew_every` epochs only."""
        if any(sample.renew is not None for sample in self.samples):
            return 1.0
        return 0.0 if self.composer is None else self.config.compose

    def _renewed(self, epoch: int, index: int, sample: Sample) -> Item:
        """An item that is kept by nobody from before, and never mirrored: captions say what is left and right."""
        shape, image = self.shape_of(index), None
        is_new = epoch % self.config.renew_every == 0 or epoch in self.reload_epochs
        if self.with_images or index >= self.renewed_cached or is_new:
            image = resize_and_crop(sample.load(), shape)  # [3, h, w]
        return Item(sample.id, epoch, index, self._caption(epoch, sample), False, shape, image, renewed=True)

    def caption_at(self, epoch: int, index: int) -> str:
        """Which of its captions a sample has in an epoch; "" for one that has none."""
        return self._caption(epoch, self.sample_at(epoch, index))

    def _caption(self, epoch: int, sample: Sample) -> str:
        if not sample.captions:
            return ""
        return sample.captions[int(self._draw("caption", epoch, sample).integers(len(sample.captions)))]

    def shape_of(self, index: int) -> tuple[int, int]:
        """(height, width) of an image as it is trained on."""
        return self.buckets.sizes[self.buckets.assignment[index]]

    def order(self, batch_size: int) -> BatchOrder:
        """The global batches of `batch_size` images that training sees."""
        return BatchOrder(self.buckets.members(), self.buckets.sizes, batch_size, self.seed)

    def chunks(self, size: int, limit: int | None = None) -> list[list[int]]:
        """The first `limit` indices (all of them for None), in lists of at most `size` whose images have one shape.

        Shapes follow each other in the order of `buckets.sizes`; within a shape, indices ascend.
        """
        chunks = []
        for members in self.buckets.members():
            chosen = [index for index in members if limit is None or index < limit]
            chunks += [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return chunks

    def check_factor(self, factor: int) -> None:
        """Refuses sizes that an autoencoder cannot divide by its factor.

        Raises:
            ValueError: naming size and factor.
        """
        for height, width in self.buckets.sizes:
            if height % factor == 0 and width % factor == 0:
                continue
            # Sides of buckets are multiples of an eighth of such a resolution (see `bucket_step`).
            unit = 8 * factor if self.config.bucketed else factor
            advice = f"set data.resolution to a multiple of {unit}, such as {_nearest(self.config.resolution, unit)}"
            if self.config.bucketed and self.config.resolution % factor == 0:
                advice += ", or data.buckets to false"
            raise ValueError(f"image size {height}x{width} is not divisible by the codec's factor {factor}; {advice}")

    def image_at(self, index: int, flipped: bool = False) -> Tensor:
        """The middle of the image, without anything drawn; uint8 [3, *shape_of(index)].

        Raises:
            ValueError: naming the file if it has become unreadable.
        """
        image = self._cache.get(index)
        if image is None:
            image = resize_and_crop(self.samples[index].load(), self.shape_of(index))  # [3, h, w]
            self._cache.put(index, image)
        return image.flip(-1) if flipped else image

    def _draw(self, purpose: str, epoch: int, sample: Sample) -> np.random.Generator:
        return generator(self.seed, purpose, epoch, sample.id)

    def __getstate__(self) -> dict[str, Any]:
        # A mapping of memory cannot be pickled: a process that is spawned starts with an empty cache.
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Cache(self.buckets, self.cache_bytes)


def _native_sizes(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """(width, height) of each image, as found."""
    # Decoding releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(lambda sample: sample.size or sample.load().size, samples))


def _nearest(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)


class _Cache:
    """The first images of a data set, one after the other, and a byte for each that says whether it is there.

    The memory is an anonymous shared mapping: forked workers fill one cache together, pages that nobody has
    filled cost nothing, and the size of /dev/shm does not bound it. Two workers that fill one place write the
    same bytes.
    """

    def __init__(self, buckets: Buckets, budget: int) -> None:
        self.buckets = buckets
        bytes_of = np.array([3 * height * width for height, width in buckets.sizes], dtype=np.int64)
        ends = np.cumsum(bytes_of[np.array(buckets.assignment)])  # [N]
        # The bytes of an image and its mark, and of all before it.
        self.capacity = int(np.searchsorted(ends + np.arange(1, len(ends) + 1), budget, side="right"))
        if self.capacity:
            self.starts = np.concatenate([[0], ends[: self.capacity]])  # [N + 1], the last is the end
            total = int(self.starts[-1])
            memory = np.frombuffer(mmap.mmap(-1, total + self.capacity), dtype=np.uint8)
            self.images = memory[:total]
            self.filled = memory[total:]  # [N]

    def get(self, index: int) -> Tensor | None:
        if index >= self.capacity or not self.filled[index]:
            return None
        height, width = self.buckets.sizes[self.buckets.assignment[index]]
        return torch.from_numpy(self._place(index).copy()).view(3, height, width)

    def put(self, index: int, image: Tensor) -> None:
        if index < self.capacity:
            self._place(index)[:] = image.numpy().ravel()
            self.filled[index] = 1

    def _place(self, index: int) -> np.ndarray:
        return self.images[self.starts[index] : self.starts[index + 1]]


def ignore_signals(worker: int) -> None:
    """What a worker process begins with: the process that started it decides when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items: Sequence[Item]) -> Batch:
    """Items of one size → one batch, in their order."""
    (size,) = {item.size for item in items}
    images = [item.image for item in items if item.image is not None]
    return Batch(
        ids=[item.id for item in items],
        epochs=[item.epoch for item in items],
        indices=torch.tensor([item.index for item in items], dtype=torch.int64),
        captions=[item.caption for item in items],
        flipped=torch.tensor([item.flipped for item in items], dtype=torch.bool),
        size=size,
        images=torch.stack(images) if images else None,  # [N, 3, h, w]
        loaded=torch.tensor([item.image is not None for item in items], dtype=torch.bool),
        renewed=torch.tensor([item.renewed for item in items], dtype=torch.bool),
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

    Which group a sample is of may depend on what else there is: see `inspect`. Samples that say their side themselves
    are on it.

    Raises:
        ValueError: if nothing is left to train on.
    """
    if not samples:
        raise ValueError("no images are left for training; add captioned images")
    if not 0 <= held_out < 1:
        raise ValueError(f"data.held_out is {held_out}; it is a share of the data, at least 0 and below 1")
    if all(sample.held_out is not None for sample in samples):
        return tuple(one for one in samples if not one.held_out), tuple(one for one in samples if one.held_out)
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
    """Mean and standard deviation of each channel over all images (`image_at`), in [-1, 1]; each pixel counts alike.

    Returns:
        Two float64 tensors [3]. Summed in integers, so exact and independent of the order. A channel that
        hardly varies gets the deviation of one grey level instead of 0.
    """
    count, total = 0, [0, 0, 0]
    of_squares = [0, 0, 0]
    for index in range(len(dataset)):
        flat = dataset.image_at(index).flatten(1).to(torch.int64)  # [3, h·w]
        count += flat.shape[1]
        total = [a + b for a, b in zip(total, flat.sum(1).tolist(), strict=True)]
        of_squares = [a + b for a, b in zip(of_squares, (flat * flat).sum(1).tolist(), strict=True)]
    means = [value / count / 127.5 - 1 for value in total]
    # Var = E[x²] - E[x]², as one fraction of integers: no cancellation.
    variances = [(count * s - t * t) / count**2 for s, t in zip(of_squares, total, strict=True)]
    deviations = [max(math.sqrt(variance) / 127.5, MIN_STD) for variance in variances]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64)
