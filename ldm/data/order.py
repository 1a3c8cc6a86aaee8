"""Which sample is seen when: the state of the data stream is one integer, the global step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.data.keyed import generator


@dataclass(frozen=True)
class SampleOrder:
    """An endless stream of (epoch, index): each epoch is a permutation of `range(length)`, a function of
    (seed, epoch) alone, and epochs follow each other without a gap, so that no batch is short.

    Args:
        length: number of samples, at least 1.
        seed: any integer.
    """

    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"an order needs at least one sample, not {self.length}; check the data's path")

    def at(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """The (epoch, index) that stand at these positions (0-based, any order) of the stream."""
        return [self._at(position) for position in positions]

    def batch(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """The global batch number `step` (0-based): positions step·batch_size up to (step + 1)·batch_size."""
        return self.at(range(step * batch_size, (step + 1) * batch_size))

    def _at(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise ValueError(f"positions start at 0, not {position}")
        epoch, offset = divmod(position, self.length)
        return epoch, int(_permutation(self.length, self.seed, epoch)[offset])


# A batch touches at most a few neighbouring epochs; a permutation costs 8 bytes a sample.
@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    permutation = generator(seed, "order", epoch).permutation(length)
    permutation.setflags(write=False)
    return permutation


def micro_batches(
    order: SampleOrder,
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[tuple[int, int]]]:
    """What one process feeds its network, in order: the `batch_sampler` of a DataLoader of `CaptionedImages`.

    Each global batch, for steps `first_step` up to but not including `last_step`, is cut into
    accumulation·world equal slices; micro-batch m of process `rank` is slice m·world + rank. So every number
    of processes and accumulation steps sees the same samples in the same steps.

    Args:
        batch_size: the global batch size: samples in one optimizer step, over all processes.
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
    if slices < 1 or batch_size < 1 or batch_size % slices:
        raise ValueError(
            f"train.batch_size {batch_size} does not split evenly into {accumulation} accumulation steps "
            f"of {world} processes; choose a positive multiple of {slices}"
        )
    if order.length < batch_size:
        raise ValueError(
            f"fewer images than a batch needs: {order.length} training images, "
            f"train.batch_size {batch_size}; set train.batch_size to at most {order.length} or add images"
        )
    return _slices(order, range(first_step, last_step), batch_size, accumulation, rank, world)


def _slices(
    order: SampleOrder, steps: range, batch_size: int, accumulation: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    size = batch_size // (accumulation * world)
    for step in steps:
        batch = order.batch(step, batch_size)
        for micro_batch in range(accumulation):
            start = (micro_batch * world + rank) * size
            yield batch[start : start + size]
