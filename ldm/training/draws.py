"""All randomness of a training step, as a function of (seed, epoch, sample id, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.data import generator


@dataclass(frozen=True)
class Draws:
    """What is random about B samples at one step.

    Attributes:
        timesteps: [B] int64 on the CPU, uniform over 0 … T − 1.
        dropped: [B] bool, whether the caption is replaced by the empty one.
        noise: ε, [B, C, h, w] float32.
        posterior: noise of the first stage's posterior, [B, C, h, w] float32.
    """

    timesteps: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor


def keyed_draws(
    seed: int,
    epochs: Sequence[int],
    ids: Sequence[str],
    step: int,
    *,
    shape: tuple[int, int, int],
    num_train_timesteps: int = 1,
    caption_dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> Draws:
    """Draws for each sample from a generator of its own, so that batches can be cut and spread in any way.

    Args:
        shape: (C, h, w) of the latents.
        caption_dropout: probability of `dropped`, 0 to 1.
    """
    size = len(ids)
    timesteps, dropped = np.empty(size, np.int64), np.empty(size, bool)
    noise, posterior = (np.empty((size, *shape), np.float32) for _ in range(2))
    for i, (epoch, sample) in enumerate(zip(epochs, ids, strict=True)):
        draw = generator(seed, "step", epoch, sample, step)
        timesteps[i] = draw.integers(num_train_timesteps)
        dropped[i] = draw.random() < caption_dropout
        noise[i] = draw.standard_normal(shape, np.float32)
        posterior[i] = draw.standard_normal(shape, np.float32)
    return Draws(
        timesteps=torch.from_numpy(timesteps),
        dropped=torch.from_numpy(dropped).to(device),
        noise=torch.from_numpy(noise).to(device),
        posterior=torch.from_numpy(posterior).to(device),
    )
