"""Batches: aspect-ratio buckets, and the order of samples as a function of the global step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ldm.data.rng import generator


@dataclass(frozen=True)
class SampleOrder:
    """An endless stream of (epoch, index): each epoch is a permutation of `range(length)` by (seed, key, epoch), where
    `length` is at least 1 and `key` distinguishes streams of one seed.
    """

    length: int
    seed: int
    key: tuple[int, ...] = ()
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"an order needs at least one sample, not {self.length}; check the data's path")

    def at(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, index) at these positions of the stream, from 0."""
        found = []
        for position in positions:
            if position < 0:
                raise ValueError(f"positions start at 0, not {position}")
            epoch, offset = divmod(position, self.length)
            if epoch not in self._permutations:
                if len(self._permutations) > 1:  # a batch touches two neighboring epochs as a rule
                    del self._permutations[next(iter(self._permutations))]
                self._permutations[epoch] = generator(self.seed, "order", *self.key, epoch).permutation(self.length)
            found.append((epoch, int(self._permutations[epoch][offset])))
        return found

    def batch(self, number: int, batch_size: int) -> list[tuple[int, int]]:
        """Batch `number` of the stream: positions number·batch_size up to (number + 1)·batch_size."""
        return self.at(range(number * batch_size, (number + 1) * batch_size))


@dataclass(frozen=True)
class BatchOrder:
    """The global batches of a run, of one bucket each, as a function of (seed, step). No batch is short.

    Each bucket has its own `SampleOrder`, cut into batches. Round r has the batches ⌊r·n/B⌋ up to ⌊(r + 1)·n/B⌋ of each
    bucket of n images, in shuffled order of buckets. So after r rounds every image was seen r or r − 1 times, if each
    bucket fills a batch. With one bucket, batches are those of its stream.

    Args:
        members: the indices of the images of each bucket; none is empty.
        sizes: the (height, width) of each bucket, which are keys of the streams if there are several.
        batch_size: B, the samples in one optimizer step over all processes.
    """

    members: tuple[Sequence[int], ...]
    sizes: tuple[tuple[int, int], ...]
    batch_size: int
    seed: int
    _rounds: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _streams(self) -> list[SampleOrder]:
        # A single bucket has the order of squares, whatever its size.
        keys = self.sizes if len(self.sizes) > 1 else [()]
        return [SampleOrder(len(of), self.seed, key) for of, key in zip(self.members, keys, strict=True)]

    @property
    def length(self) -> int:
        """Number of samples in all buckets."""
        return sum(len(of) for of in self.members)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of the global batch `step`, from 0; epochs are those of the bucket."""
        if step < 0:
            raise ValueError(f"steps start at 0, not {step}")
        # r rounds have at most r·N/B steps, and at most one less per bucket.
        number = step * self.batch_size // self.length
        while self._batches_before(number + 1).sum() <= step:
            number += 1
        before = self._batches_before(number)
        if number not in self._rounds:
            counts = self._batches_before(number + 1) - before
            ordered = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
            self._rounds.clear()
            self._rounds[number] = generator(self.seed, "buckets", number).permutation(ordered)
        buckets, offset = self._rounds[number], step - int(before.sum())  # the bucket of each batch of the round
        bucket = int(buckets[offset])
        batch = int(before[bucket]) + int(np.count_nonzero(buckets[:offset] == bucket))
        members = self.members[bucket]
        return [(epoch, members[place]) for epoch, place in self._streams[bucket].batch(batch, self.batch_size)]

    def _batches_before(self, number_of_round: int) -> np.ndarray:
        """Of each bucket."""
        return np.array([number_of_round * len(of) // self.batch_size for of in self.members], dtype=np.int64)


def micro_batches(
    order: BatchOrder, *, first_step: int, last_step: int, accumulation: int = 1, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The micro-batches of one process: the `batch_sampler` of a DataLoader of `CaptionedImages`.

    Each global batch from `first_step` up to, not including, `last_step` is cut into accumulation·world equal slices;
    micro-batch m of process `rank` (below `world`) is slice m·world + rank, a list of (epoch, index). So the samples of
    a step do not depend on them.

    Raises:
        ValueError: immediately, if the batch does not split evenly or is larger than the data.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} processes; it is between 0 and {world - 1}")
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
    size = batch_size // slices
    starts = [(micro_batch * world + rank) * size for micro_batch in range(accumulation)]
    batches = map(order.batch, range(first_step, last_step))
    return (batch[start : start + size] for batch in batches for start in starts)


# Aspect ratios 2^(k/4), from 1:2 to 2:1, so that cropping removes at most 8 % before rounding.
_STEPS_TO_TWO = 4


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
        # At a tie, the most extreme aspect ratio, then the taller.
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
