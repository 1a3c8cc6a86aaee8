"""Keyed random generators, content hashes, and the order of samples as a function of the global step."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A generator for one purpose: `generator(seed, "flip", epoch, sample_id)`.

    The stream is a function of the arguments: their 128-bit blake2b digest is the key of Philox, a counter-based
    generator (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3). Exact repetition needs the same version
    of numpy.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        digest.update(_encode(part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _encode(part: int | str) -> bytes:
    # With type and length, so that 1 and "1", or ("a", "bc") and ("ab", "c"), differ. File names that are not UTF-8
    # hold lone surrogates.
    if isinstance(part, str):
        payload, kind = part.encode("utf-8", "surrogatepass"), b"s"
    else:
        payload, kind = str(operator.index(part)).encode(), b"i"
    return kind + len(payload).to_bytes(8, "little") + payload


def content_hash(data: bytes) -> str:
    """The blake2b hash of some bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """A uniformly random element."""
    return choices[int(rng.integers(len(choices)))]


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
        keys = self.sizes if len(self.sizes) > 1 else [()]  # one bucket has the order of squares
        return [SampleOrder(len(of), self.seed, key) for of, key in zip(self.members, keys, strict=True)]

    @property
    def length(self) -> int:
        """Number of samples in all buckets."""
        return sum(len(of) for of in self.members)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of the global batch `step`, from 0; epochs are those of the bucket."""
        if step < 0:
            raise ValueError(f"steps start at 0, not {step}")
        number = step * self.batch_size // self.length  # or at most one less per bucket
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
            f"train.batch_size {batch_size} does not split evenly into {accumulation} accumulation steps × {world} "
            f"processes; choose a positive multiple of {slices}"
        )
    if order.length < batch_size:
        needed = f"{order.length} training images, train.batch_size {batch_size}"
        raise ValueError(f"fewer images than a batch needs: {needed}; set that to at most {order.length}")
    size = batch_size // slices
    starts = [(micro_batch * world + rank) * size for micro_batch in range(accumulation)]
    batches = map(order.batch, range(first_step, last_step))
    return (batch[start : start + size] for batch in batches for start in starts)
