"""The training data set: captioned images as tensors of one or a few sizes, the held-out split, channel statistics."""

from __future__ import annotations

import hashlib
import math
import mmap
import signal
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.images import resize_and_crop
from ldm.data.rng import BatchOrder, generator
from ldm.data.sources import DataConfig, Sample
from ldm.environment import usable_cores

_STEPS_TO_TWO = 4  # aspect ratios 2^(k/4), from 1:2 to 2:1, so that cropping removes at most 8 % before rounding


@dataclass(frozen=True)
class Buckets:
    """The training sizes of images.

    Attributes:
        sizes: distinct (height, width) in pixels, from the tallest to the widest, all in use.
        assignment: index into `sizes` per image; `moved` images are not at their nearest size, as too few others are.
        cropped, cropped_as_squares: mean fraction of the pixels that cropping removes; None for squares.
    """

    sizes: tuple[tuple[int, int], ...]
    assignment: tuple[int, ...]
    moved: int = 0
    cropped: float | None = None
    cropped_as_squares: float | None = None

    def members(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the images of each size, ascending."""
        members: list[list[int]] = [[] for _ in self.sizes]
        for index, bucket in enumerate(self.assignment):
            members[bucket].append(index)
        return tuple(map(tuple, members))

    def summary(self) -> str:
        """One line for users."""
        counts = np.bincount(self.assignment, minlength=len(self.sizes))
        sizes = ", ".join(f"{h}x{w} ({count})" for (h, w), count in zip(self.sizes, counts, strict=True))
        text = f"sizes, height x width (and how many images): {sizes}"
        if self.cropped is not None and self.cropped_as_squares is not None:
            text += f"; {self.cropped:.1%} of an image is cropped away (of squares {self.cropped_as_squares:.1%})"
        if self.moved:
            text += f"; moved to the next size, since too few at their own make a batch: {self.moved}"
        return text


def bucket_sizes(resolution: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of about R² pixels with aspect ratios up to about 2, tallest first, for the square side R.

    Sides are multiples of `bucket_step`; each size occurs in both orientations.
    """
    step = bucket_step(resolution)
    exponents = range(-_STEPS_TO_TWO, _STEPS_TO_TWO + 1)
    ideal = {k: resolution * 2 ** (k / (2 * _STEPS_TO_TWO)) for k in exponents}
    sides = {k: max(1, math.floor(side / step + 0.5)) * step for k, side in ideal.items()}
    sizes = {(sides[-k], sides[k]) for k in exponents}
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def bucket_step(resolution: int) -> int:
    """The largest power of two up to R/8 and 64 (as in Stable Diffusion) that divides R; 8 where that is at most R/4,
    as most first stages divide by 8.
    """
    largest = max(1, min(64, max(resolution // 8, min(8, resolution // 4))))
    return max(step for step in (1, 2, 4, 8, 16, 32, 64) if step <= largest and resolution % step == 0)


def assign_buckets(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], batch_size: int) -> Buckets:
    """Assigns each image to the size with the nearest log aspect ratio, which crops least.

    While a size has fewer images than a batch, the one with the fewest is given up, and its images go to the nearest
    remaining size. The order of the images does not matter.

    Args:
        shapes: (width, height) of the images.
        sizes: possible (height, width), tallest first.
        batch_size: 1 keeps every nearest size.
    """
    # Differences of logarithms are exactly symmetric in the orientation.
    aspects = -np.diff(np.log(shapes))[:, 0]  # [N], log(width / height)
    targets = np.diff(np.log(sizes))[:, 0]  # [K]
    distance = np.abs(aspects[:, None] - targets)  # [N, K]
    nearest = distance.argmin(axis=1)
    chosen = nearest
    left = sorted(set(nearest.tolist()))
    while True:
        counts = np.bincount(chosen, minlength=len(sizes))
        smallest = min(left, key=lambda k: (counts[k], -abs(targets[k]), k))  # at a tie, the most extreme
        if counts[smallest] >= batch_size or len(left) == 1:
            break
        left.remove(smallest)
        chosen = np.array(left)[distance[:, left].argmin(axis=1)]
    place = {k: i for i, k in enumerate(left)}
    return Buckets(
        sizes=tuple(sizes[k] for k in left),
        assignment=tuple(place[k] for k in chosen.tolist()),
        moved=int((chosen != nearest).sum()),
        cropped=float(np.mean(1 - np.exp(-np.abs(aspects - targets[chosen])))),
        cropped_as_squares=float(np.mean(1 - np.exp(-np.abs(aspects)))),
    )


MIN_STD = 1 / 127.5  # one gray level in [-1, 1]


@dataclass(frozen=True)
class Item:
    """One sample in one epoch; `image` is uint8 [3, *size], or None if it is not loaded. A `renewed` one is used for
    `data.renew_every` epochs only, as a composition or a replacement.
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
    """B items of one `size` (h, w): `indices` int64 [B]; `flipped`, `loaded` and `renewed` bool [B]; `images` uint8
    [N, 3, h, w] of the N loaded items, None for N = 0.
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


class ItemComposer(Protocol):
    """What is known here of `ldm.data.composer.Composer`."""

    fits: Callable[[str], bool] | None

    def compose(self, epoch: int, index: int, size: tuple[int, int]) -> Sample | None: ...

    def summary(self, size_of: Callable[[int], tuple[int, int]]) -> str: ...


class CaptionedImages(Dataset[Item]):
    """Samples as images of one or a few sizes, indexed by (epoch, index), see `BatchOrder`.

    The choice of a caption, the flip and a random crop are functions of (seed, epoch, sample id).

    Args:
        samples: at least one, with distinct ids. With buckets, images of unknown size are loaded here once.
        cache_bytes: memory for resized images, with `crop: center`. Forked workers share it.
        batch_size: with buckets, sizes with fewer images are given up, see `assign_buckets`.
        sizes: with buckets, the possible (height, width); None takes `bucket_sizes`.
        composer: composes a fraction `config.compose` of the items, but not `samples` and `image_at`.

    Attributes:
        buckets: the size of each image.
        with_images: if False, nothing is loaded and `Item.image` is None, for users who cache encoded images.
        renewed_cached: renewed items of the samples below this index are loaded in their first epoch only, as users
            cache them encoded, and in `reload_epochs`, as the memory of a resumed run is empty.

    Raises:
        ValueError: if there are no samples, or an image has become unreadable.
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
        composer: ItemComposer | None = None,
    ) -> None:
        if not samples:
            raise ValueError(f"no images in {config.path}; add captioned images")
        self.samples, self.config, self.seed, self.composer = tuple(samples), config, seed, composer
        self.with_images = True
        self.renewed_cached = 0
        self.reload_epochs: Collection[int] = ()
        self.cache_bytes = cache_bytes if config.crop == "center" else 0
        if config.bucketed:
            choice = sizes or bucket_sizes(config.resolution)
            with ThreadPoolExecutor(usable_cores()) as pool:  # decoding releases the interpreter lock
                shapes = list(pool.map(lambda sample: sample.size or sample.load().size, self.samples))
            self.buckets = assign_buckets(shapes, choice, batch_size)
        else:
            self.buckets = Buckets(((config.resolution, config.resolution),), (0,) * len(self.samples))
        self._cache = _Cache(self.buckets, self.cache_bytes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: tuple[int, int]) -> Item:
        """The item at `position` (epoch, index)."""
        epoch, index = position
        sample, shape, flipped, image = self.sample_at(epoch, index), self.shape_of(index), False, None
        renewed = sample is not self.samples[index]
        if renewed:  # never mirrored, as captions name left and right
            is_new = epoch % self.config.renew_every == 0 or epoch in self.reload_epochs
            if self.with_images or index >= self.renewed_cached or is_new:
                image = resize_and_crop(sample.load(), shape)  # [3, h, w]
        else:
            flipped = self.config.flip and bool(self._rng("flip", epoch, sample).integers(2))
            if self.with_images and self.config.crop == "random":
                place = float(self._rng("crop", epoch, sample).random())
                image = resize_and_crop(sample.load(), shape, place)  # [3, h, w]
                image = image.flip(-1) if flipped else image
            elif self.with_images:
                image = self.image_at(index, flipped)
        return Item(sample.id, epoch, index, self._caption(epoch, sample), flipped, shape, image, renewed)

    def sample_at(self, epoch: int, index: int) -> Sample:
        """The sample, its replacement in this epoch, or a composition."""
        sample = self.samples[index]
        if sample.renew is not None:
            return sample.renew(epoch)
        composed = None if self.composer is None else self.composer.compose(epoch, index, self.shape_of(index))
        return sample if composed is None else composed

    @property
    def renewed_fraction(self) -> float:
        """The maximum fraction of items of an epoch that are `renewed`."""
        if any(sample.renew is not None for sample in self.samples):
            return 1.0
        return 0.0 if self.composer is None else self.config.compose

    def caption_at(self, epoch: int, index: int) -> str:
        """The caption of a sample in an epoch; "" if it has none."""
        return self._caption(epoch, self.sample_at(epoch, index))

    def _caption(self, epoch: int, sample: Sample) -> str:
        if not sample.captions:
            return ""
        return sample.captions[int(self._rng("caption", epoch, sample).integers(len(sample.captions)))]

    def shape_of(self, index: int) -> tuple[int, int]:
        """(height, width) of an image in training."""
        return self.buckets.sizes[self.buckets.assignment[index]]

    def order(self, batch_size: int) -> BatchOrder:
        """The global batches of a training."""
        return BatchOrder(self.buckets.members(), self.buckets.sizes, batch_size, self.seed)

    def chunks(self, size: int, limit: int | None = None) -> list[list[int]]:
        """The first `limit` indices (None: all), in lists of at most `size` of one image shape, ordered by
        `buckets.sizes`, then by index.
        """
        chunks = []
        for members in self.buckets.members():
            chosen = [index for index in members if limit is None or index < limit]
            chunks += [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return chunks

    def check_factor(self, factor: int) -> None:
        """Raises ValueError if an image size is not divisible by the downsampling factor of the codec."""
        for height, width in self.buckets.sizes:
            if height % factor == 0 and width % factor == 0:
                continue
            unit = 8 * factor if self.config.bucketed else factor  # see `bucket_step`
            nearest = max(unit, round(self.config.resolution / unit) * unit)
            advice = f"set data.resolution to a multiple of {unit}, such as {nearest}"
            if self.config.bucketed and self.config.resolution % factor == 0:
                advice += ", or data.buckets to false"
            raise ValueError(f"image size {height}x{width} is not divisible by the codec's factor {factor}; {advice}")

    def image_at(self, index: int, flipped: bool = False) -> Tensor:
        """The center crop of an image, without random augmentation; uint8 [3, *shape_of(index)].

        Raises ValueError, naming the file, if it has become unreadable.
        """
        image = self._cache.get(index)
        if image is None:
            image = resize_and_crop(self.samples[index].load(), self.shape_of(index))  # [3, h, w]
            self._cache.put(index, image)
        return image.flip(-1) if flipped else image

    def _rng(self, purpose: str, epoch: int, sample: Sample) -> np.random.Generator:
        return generator(self.seed, purpose, epoch, sample.id)

    def __getstate__(self) -> dict[str, Any]:
        # A memory mapping cannot be pickled: spawned processes start with an empty cache.
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Cache(self.buckets, self.cache_bytes)


class _Cache:
    """The resized first images of a data set, and whether each is filled, in an anonymous mapping: forked workers share
    it, empty pages use no memory, and /dev/shm does not limit it.
    """

    def __init__(self, buckets: Buckets, budget: int) -> None:
        self.buckets = buckets
        bytes_of = np.array([3 * height * width for height, width in buckets.sizes], dtype=np.int64)
        ends = np.cumsum(bytes_of[np.array(buckets.assignment)])  # [N]
        self.capacity = int(np.searchsorted(ends + np.arange(1, len(ends) + 1), budget, side="right"))
        self.starts = np.concatenate([[0], ends[: self.capacity]])  # [N + 1], the last is the end
        if self.capacity:
            memory = np.frombuffer(mmap.mmap(-1, int(self.starts[-1]) + self.capacity), dtype=np.uint8)
            self.images, self.filled = np.split(memory, [int(self.starts[-1])])

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
    """`worker_init_fn` of data loaders: only the main process handles signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items: Sequence[Item]) -> Batch:
    """Items of one size → one batch, in the same order."""
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
    """Floats in [-1, 1] of any shape → uint8, clamped and rounded half to even."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def split(samples: Sequence[Sample], held_out: float) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Samples → (training, held out), whole groups, both in the order given.

    The hash of a group's name decides, so it keeps its side when other data change: it is held out below `held_out`. If
    one side would be empty, the group with the nearest hash moves there (at `held_out` 0.1: in 12 % of data sets of 20
    groups, and 0.5 % of 50). A single group is trained on. If all samples have `held_out` set, that decides. Raises
    ValueError without samples.
    """
    if not samples:
        raise ValueError("no images are left for training; add captioned images")
    if not 0 <= held_out < 1:
        raise ValueError(f"data.held_out is {held_out}; it is a fraction, at least 0 and below 1")
    if all(sample.held_out is not None for sample in samples):
        return tuple(one for one in samples if not one.held_out), tuple(one for one in samples if one.held_out)
    ranks = {}  # hashes in [0, 1)
    for group in {sample.group: None for sample in samples}:
        digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        ranks[group] = int.from_bytes(digest, "little") / 2**64
    chosen = {group for group, rank in ranks.items() if rank < held_out}
    if len(ranks) == 1:
        chosen = set()
    elif held_out > 0 and not chosen:
        chosen = {min(ranks, key=ranks.__getitem__)}
    elif len(chosen) == len(ranks):
        chosen.remove(max(ranks, key=ranks.__getitem__))
    training = tuple(sample for sample in samples if sample.group not in chosen)
    return training, tuple(sample for sample in samples if sample.group in chosen)


def image_statistics(dataset: CaptionedImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel over all pixels of all images (`image_at`), in [-1, 1]: two float64
    tensors [3].

    Integer sums make them independent of the order. The minimum std is one gray level.
    """
    count = 0
    total, of_squares = torch.zeros(2, 3, dtype=torch.int64)
    for index in range(len(dataset)):
        flat = dataset.image_at(index).flatten(1).to(torch.int64)  # [3, h·w]
        count += flat.shape[1]
        total += flat.sum(1)
        of_squares += (flat * flat).sum(1)
    means = [value / count / 127.5 - 1 for value in total.tolist()]
    # Var = E[x²] - E[x]², as one fraction of integers: no cancellation.
    variances = [(count * s - t * t) / count**2 for s, t in zip(of_squares.tolist(), total.tolist(), strict=True)]
    stds = [max(math.sqrt(variance) / 127.5, MIN_STD) for variance in variances]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)
