"""Training losses."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.diffusion.prediction import add_noise, training_target
from ldm.diffusion.schedule import NoiseSchedule, PredictionType


class Denoiser(Protocol):
    """(x_t [B, C, H, W], timestep [B] int64, condition [B, L, D]) → prediction [B, C, H, W]."""

    def __call__(self, sample: Tensor, timestep: Tensor, condition: Tensor, /) -> Any: ...


def diffusion_loss(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    latents: Tensor,
    condition: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """L_simple of each sample: the mean square of what was predicted less what was true. DDPM, Eq. 14.

    Args:
        latents: x_0, [B, C, H, W] float32, of zero mean and unit variance.
        condition: [B, L, D].
        timesteps: [B] int64, 0 to T − 1, on the CPU.
        noise: ε, [B, C, H, W], on the device of `latents`.

    Returns:
        [B] float32; its mean is what is minimised.
    """
    alpha, sigma = schedule.coefficients(timesteps, latents)  # [B, 1, 1, 1]
    noisy = add_noise(latents, noise, alpha, sigma)
    target = training_target(latents, noise, alpha, sigma, prediction_type)
    prediction = denoiser(noisy, timesteps.to(latents.device), condition)
    return (prediction.to(torch.float32) - target).square().flatten(1).mean(dim=1)  # [B]
