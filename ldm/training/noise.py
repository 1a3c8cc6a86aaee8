"""All randomness of a training step, as a function of (seed, epoch, sample id, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data import Batch, generator
from ldm.data.rng import BatchOrder
from ldm.diffusion import logit_normal_timesteps, stratified_timestep


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of B samples at one step."""

    timesteps: Tensor  # [B] int64 on the CPU, 0 … T − 1; over many steps uniform, or logit-normal where that is set
    dropped: Tensor  # [B] bool, whether the caption is replaced by the empty one
    noise: Tensor  # ε, [B, C, h, w] float32
    posterior: Tensor  # noise of the first stage's posterior, [B, C, h, w] float32


class BatchPositions(NamedTuple):
    """Positions of samples in the global batch of a step: `indices`, each 0 to `batch_size` − 1."""

    indices: Sequence[int]
    batch_size: int

    @classmethod
    def find(cls, order: BatchOrder, batch: Batch, step: int) -> BatchPositions:
        """Those of a micro-batch of `step` (0-based), whichever process, worker or micro-batch reads it."""
        # An image is in a batch twice only in different epochs.
        position = {sample: i for i, sample in enumerate(order.batch(step))}
        samples = zip(batch.epochs, batch.indices.tolist(), strict=True)
        return cls([position[sample] for sample in samples], order.batch_size)


def step_noise(
    seed: int,
    epochs: Sequence[int],
    ids: Sequence[str],
    step: int,
    *,
    shape: tuple[int, int, int],
    num_train_timesteps: int = 1,
    caption_dropout: float = 0.0,
    positions: BatchPositions | None = None,
    logit_normal: tuple[float, float] | None = None,
    device: torch.device | str = "cpu",
) -> StepNoise:
    """Sample the random numbers of each sample from its own generator, so that batches may be split in any way.

    Args:
        shape: (C, h, w) of the latents.
        caption_dropout: probability of `dropped`, 0 to 1.
        positions: stratifies timesteps over the global batch: see `stratified_timestep`.
        logit_normal: mean and std of the density of timesteps: see `logit_normal_timesteps`. None leaves it uniform.
    """
    size = len(ids)
    timesteps, dropped = np.empty(size, np.int64), np.empty(size, bool)
    noise, posterior = (np.empty((size, *shape), np.float32) for _ in range(2))
    for i, (epoch, sample) in enumerate(zip(epochs, ids, strict=True)):
        rng = generator(seed, "step", epoch, sample, step)
        if positions is None:
            timesteps[i] = rng.integers(num_train_timesteps)
        else:
            timesteps[i] = stratified_timestep(
                positions.indices[i], positions.batch_size, rng.random(), num_train_timesteps
            )
        dropped[i] = rng.random() < caption_dropout
        noise[i] = rng.standard_normal(shape, np.float32)
        posterior[i] = rng.standard_normal(shape, np.float32)
    sampled = torch.from_numpy(timesteps)
    if logit_normal is not None:
        mean, std = logit_normal
        sampled = logit_normal_timesteps(sampled, num_train_timesteps, mean=mean, std=std)
    return StepNoise(
        timesteps=sampled,
        dropped=torch.from_numpy(dropped).to(device),
        noise=torch.from_numpy(noise).to(device),
        posterior=torch.from_numpy(posterior).to(device),
    )
