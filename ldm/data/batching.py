"""Batches: aspect-ratio buckets, and the order of samples as a function of the global step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.data.rng import generator


@dataclass(frozen=True)
class SampleOrder:
    """An endless stream of (epoch, index): each epoch is a permutation of `range(length)`, a function of
    (seed, key, epoch) alone, and epochs follow each other without a gap, so that no batch is short.

    Args:
        length: number of samples, at least 1.
        seed: any integer.
        key: sets streams of one seed apart.
    """

    length: int
    seed: int
    key: tuple[int, ...] = ()
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"an order needs at least one sample, not {self.length}; check the data's path")

    def at(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, index) that stand at these positions (0-based, any order) of the stream."""
        return [self._at(position) for position in positions]

    def batch(self, number: int, batch_size: int) -> list[tuple[int, int]]:
        """Batch `number` (0-based) of the stream: positions number·batch_size up to (number + 1)·batch_size."""
        return self.at(range(number * batch_size, (number + 1) * batch_size))

    def _at(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise ValueError(f"positions start at 0, not {position}")
        epoch, offset = divmod(position, self.length)
        return epoch, int(self._permutation(epoch)[offset])

    def _permutation(self, epoch: int) -> np.ndarray:
        kept = self._permutations
        if epoch not in kept:
            # A batch touches neighbouring epochs, two as a rule; a permutation costs 8 bytes a sample.
            if len(kept) > 1:
                del kept[next(iter(kept))]
            kept[epoch] = generator(self.seed, "order", *self.key, epoch).permutation(self.length)
        return kept[epoch]


@dataclass(frozen=True)
class BatchOrder:
    """The global batches of a run: each has images of one bucket alone, none is short, and number `step` is a
    function of (seed, step).

    Every bucket has a stream of its own (a `SampleOrder`), cut into batches that cross its epochs. Round r deals, of
    each bucket of n images, the batches that its first r + 1 epochs fill and its first r do not: numbers
    ⌊r·n/B⌋ up to ⌊(r + 1)·n/B⌋. The batches of a round are shuffled as to their bucket. So after r rounds every
    image has been seen r or r − 1 times if no bucket is smaller than a batch, and the steps before a round are a sum
    over the buckets. With one bucket, batches are those of its stream, one after the other.

    Args:
        members: for each bucket the indices of its images; no bucket is empty.
        sizes: for each bucket its (height, width), which keys its stream where there are several.
        batch_size: B, the global batch size: samples in one optimizer step, over all processes.
        seed: any integer.
    """

    members: tuple[Sequence[int], ...]
    sizes: tuple[tuple[int, int], ...]
    batch_size: int
    seed: int
    _streams: tuple[SampleOrder, ...] = field(init=False, repr=False, compare=False)
    _rounds: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # One bucket has the order that squares have always had, whatever its size.
        keys = self.sizes if len(self.sizes) > 1 else [()]
        streams = [SampleOrder(len(of), self.seed, key) for of, key in zip(self.members, keys, strict=True)]
        object.__setattr__(self, "_streams", tuple(streams))

    @property
    def length(self) -> int:
        """Number of samples in all buckets."""
        return sum(len(of) for of in self.members)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of the global batch number `step` (0-based); an epoch is one of the bucket's own.

        An image is there twice only in different epochs.
        """
        if step < 0:
            raise ValueError(f"steps start at 0, not {step}")
        number_of_round = self._round_of(step)
        offset = step - self._steps_before(number_of_round)
        dealt = self._round(number_of_round)
        bucket = int(dealt[offset])
        number = self._batches_before(number_of_round, bucket) + int(np.count_nonzero(dealt[:offset] == bucket))
        members = self.members[bucket]
        return [(epoch, members[place]) for epoch, place in self._streams[bucket].batch(number, self.batch_size)]

    def _round_of(self, step: int) -> int:
        # Flooring never deals more than r·N/B steps in r rounds, and at most one a bucket less.
        number = step * self.batch_size // self.length
        while self._steps_before(number + 1) <= step:
            number += 1
        return number

    def _steps_before(self, number_of_round: int) -> int:
        return sum(self._batches_before(number_of_round, bucket) for bucket in range(len(self.members)))

    def _batches_before(self, number_of_round: int, bucket: int) -> int:
        return number_of_round * len(self.members[bucket]) // self.batch_size

    def _round(self, number: int) -> np.ndarray:
        """The bucket of each batch of a round, in order."""
        if number not in self._rounds:
            buckets = range(len(self.members))
            counts = [self._batches_before(number + 1, k) - self._batches_before(number, k) for k in buckets]
            dealt = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
            self._rounds.clear()
            self._rounds[number] = generator(self.seed, "buckets", number).permutation(dealt)
        return self._rounds[number]


def micro_batches(
    order: BatchOrder,
    *,
    first_step: int,
    last_step: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[tuple[int, int]]]:
    """What one process feeds its network, in order: the `batch_sampler` of a DataLoader of `CaptionedImages`.

    Each global batch, for steps `first_step` up to but not including `last_step`, is cut into
    accumulation·world equal slices; micro-batch m of process `rank` is slice m·world + rank. So every number
    of processes and accumulation steps sees the same samples in the same steps.

    Args:
        accumulation: micro-batches in a step.
        rank: this process, from 0 to world - 1.
        world: number of processes.

    Returns:
        An iterator over lists of (epoch, index), each of length batch_size / (accumulation·world).

    Raises:
        ValueError: at once, if the batch cannot be split evenly or is larger than the data.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} processes; it lies between 0 and {world - 1}")
    slices = accumulation * world
    batch_size = order.batch_size
    if slices < 1 or batch_size < 1 or batch_size % slices:
        raise ValueError(
            f"train.batch_size {batch_size} does not split evenly into {slices} parts (accumulation steps "
            f"{accumulation} × processes {world}); choose a positive multiple of {slices}"
        )
    if order.length < batch_size:
        raise ValueError(
            f"fewer images than a batch needs: {order.length} training images, "
            f"train.batch_size {batch_size}; set train.batch_size to at most {order.length} or add images"
        )
    return _slices(order, range(first_step, last_step), accumulation, rank, world)


def _slices(
    order: BatchOrder, steps: range, accumulation: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    size = order.batch_size // (accumulation * world)
    for step in steps:
        batch = order.batch(step)
        for micro_batch in range(accumulation):
            start = (micro_batch * world + rank) * size
            yield batch[start : start + size]


# Aspect ratios 2^(k/4), from 1:2 to 2:1: before the sides are rounded, an image between them loses at most 8 %.
_STEPS_TO_TWO = 4


@dataclass(frozen=True)
class Buckets:
    """The sizes that a set of images is brought to.

    Attributes:
        sizes: (height, width) in pixels, distinct, from the tallest to the widest, each in use.
        assignment: for each image, its place in `sizes`.
        moved: how many images are not at the size nearest to them, since too few others are.
        cropped: what cropping takes of an image, as a share of its pixels in [0, 1), a mean over the images.
        cropped_as_squares: the same if all were squares. Both are None where all are, and nobody looked at their
            shapes.
    """

    sizes: tuple[tuple[int, int], ...]
    assignment: tuple[int, ...]
    moved: int = 0
    cropped: float | None = None
    cropped_as_squares: float | None = None

    def members(self) -> tuple[tuple[int, ...], ...]:
        """For each size the images that have it, in ascending order."""
        members: list[list[int]] = [[] for _ in self.sizes]
        for index, bucket in enumerate(self.assignment):
            members[bucket].append(index)
        return tuple(map(tuple, members))

    def summary(self) -> str:
        """What a person should know of it."""
        counts = np.bincount(self.assignment, minlength=len(self.sizes))
        sizes = ", ".join(f"{h}x{w} ({count})" for (h, w), count in zip(self.sizes, counts, strict=True))
        text = f"sizes, height x width (and how many images): {sizes}"
        if self.cropped is not None and self.cropped_as_squares is not None:
            text += f"; {self.cropped:.1%} of an image is cropped away (of squares {self.cropped_as_squares:.1%})"
        if self.moved:
            text += f"; moved to the next size, since too few at their own make a batch: {self.moved}"
        return text


def bucket_sizes(resolution: int, step: int | None = None) -> tuple[tuple[int, int], ...]:
    """(height, width) of images of about R² pixels with aspect ratios up to about 2, tallest first.

    Args:
        resolution: R, the side of the square among them.
        step: sides are multiples of it, so it should be one of the codec's factor; None takes `bucket_step`.
    """
    step = step or bucket_step(resolution)
    # Symmetric in the sign of k: every size occurs lying and standing.
    exponents = range(-_STEPS_TO_TWO, _STEPS_TO_TWO + 1)
    sides = {k: _rounded(resolution * 2 ** (k / (2 * _STEPS_TO_TWO)), step) for k in exponents}
    sizes = {(sides[-k], sides[k]) for k in exponents}
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def bucket_step(resolution: int) -> int:
    """64 from 512 pixels up, as in Stable Diffusion; below that an eighth of R, which keeps the ratios apart.

    A power of two that divides R, so that the square bucket is R×R. For small R it is 8 as long as that is no more
    than a quarter: most first stages divide by 8.
    """
    largest = max(1, min(64, max(resolution // 8, min(8, resolution // 4))))
    return max(step for step in (1, 2, 4, 8, 16, 32, 64) if step <= largest and resolution % step == 0)


def _rounded(side: float, step: int) -> int:
    return max(1, math.floor(side / step + 0.5)) * step


def square_bucket(count: int, resolution: int) -> Buckets:
    """All images as squares."""
    return Buckets(((resolution, resolution),), (0,) * count)


def assign_buckets(shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], batch_size: int) -> Buckets:
    """Brings each image to the size that is nearest in log aspect ratio, which crops least.

    As long as a size has fewer images than a batch, the one that has the fewest is given up, and its images go to the
    nearest of those that are left. So each image is at the nearest size in use. A function of the shapes alone, not
    of their order.

    Args:
        shapes: (width, height) of the images.
        sizes: (height, width) to choose from, tallest first.
        batch_size: how many images make a batch; 1 keeps every size that one image is nearest to.
    """
    # A difference of logarithms is exactly symmetric, so that a size and its upright twin are equally far from 1:1.
    aspects = -np.diff(np.log(shapes))[:, 0]  # [N], log(width / height)
    targets = np.diff(np.log(sizes))[:, 0]  # [K]
    distance = np.abs(aspects[:, None] - targets)  # [N, K]
    nearest = distance.argmin(axis=1)
    chosen = nearest
    left = sorted(set(nearest.tolist()))  # sizes only gain images from here on, so each of these stays in use
    while True:
        counts = np.bincount(chosen, minlength=len(sizes))
        # Of equally small ones the one of the most extreme aspect ratio, then the taller.
        smallest = min(left, key=lambda k: (counts[k], -abs(targets[k]), k))
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
