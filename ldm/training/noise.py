"""All randomness of a training step, as a function of (seed, epoch, sample id, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data import Batch, CaptionedImages, generator
from ldm.diffusion import stratified_timestep


@dataclass(frozen=True)
class StepNoise:
    """What is random about B samples at one step.

    Attributes:
        timesteps: [B] int64 on the CPU, 0 … T − 1; over many steps each is equally likely.
        dropped: [B] bool, whether the caption is replaced by the empty one.
        noise: ε, [B, C, h, w] float32.
        posterior: noise of the first stage's posterior, [B, C, h, w] float32.
    """

    timesteps: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor


class BatchPositions(NamedTuple):
    """Where samples stand in the global batch of a step: `indices`, each 0 to `batch_size` − 1."""

    indices: Sequence[int]
    batch_size: int


class GlobalBatchIndex:
    """Finds samples in the global batch of their step, which follows from the step alone: a sample has the same place
    whichever process, worker or micro-batch it is in.
    """

    def __init__(self, images: CaptionedImages, batch_size: int) -> None:
        self._order = images.order(batch_size)

    def places(self, batch: Batch, step: int) -> BatchPositions:
        """Where the samples of a micro-batch stand in the global batch of `step` (0-based)."""
        # An image is in a batch twice only in different epochs.
        place = {position: i for i, position in enumerate(self._order.batch(step))}
        positions = zip(batch.epochs, batch.indices.tolist(), strict=True)
        return BatchPositions([place[position] for position in positions], self._order.batch_size)


def step_noise(
    seed: int,
    epochs: Sequence[int],
    ids: Sequence[str],
    step: int,
    *,
    shape: tuple[int, int, int],
    num_train_timesteps: int = 1,
    caption_dropout: float = 0.0,
    places: BatchPositions | None = None,
    device: torch.device | str = "cpu",
) -> StepNoise:
    """Draws for each sample from a generator of its own, so that batches can be cut and spread in any way.

    Args:
        shape: (C, h, w) of the latents.
        caption_dropout: probability of `dropped`, 0 to 1.
        places: with them timesteps are stratified over the global batch: see `stratified_timestep`.
    """
    size = len(ids)
    timesteps, dropped = np.empty(size, np.int64), np.empty(size, bool)
    noise, posterior = (np.empty((size, *shape), np.float32) for _ in range(2))
    for i, (epoch, sample) in enumerate(zip(epochs, ids, strict=True)):
        draw = generator(seed, "step", epoch, sample, step)
        if places is None:
            timesteps[i] = draw.integers(num_train_timesteps)
        else:
            place = places.indices[i]
            timesteps[i] = stratified_timestep(place, places.batch_size, draw.random(), num_train_timesteps)
        dropped[i] = draw.random() < caption_dropout
        noise[i] = draw.standard_normal(shape, np.float32)
        posterior[i] = draw.standard_normal(shape, np.float32)
    return StepNoise(
        timesteps=torch.from_numpy(timesteps),
        dropped=torch.from_numpy(dropped).to(device),
        noise=torch.from_numpy(noise).to(device),
        posterior=torch.from_numpy(posterior).to(device),
    )
