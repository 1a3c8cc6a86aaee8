"""The formulas of the noise schedules: each a function of numbers to a table of T float64 numbers on the CPU.

Tables count from 0: entry t belongs to what the papers call t + 1, which runs from 1 to T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s of Improved DDPM, section 3.2
MAX_BETA = 0.999  # Improved DDPM, section 3.2: no singularity at the end

# ε of `plain_cosine`. At the end σ/α = 100, so that a predicted ε still says something about x_0 (below
# `MAX_ERROR_GAIN` of the schedule); at the start σ = 0.01, as with DDPM's β_1 = 1e-4, about one grey level of 256.
PLAIN_COSINE_MARGIN = 1e-4


def linear(steps: int, start: float, end: float) -> Tensor:
    """β in equal steps from `start` to `end`. DDPM (arXiv:2006.11239), section 4: from 1e-4 to 0.02."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear(steps: int, start: float, end: float) -> Tensor:
    """Equal steps in √β. LDM (arXiv:2112.10752), as published with it and in Stable Diffusion."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()


def sigmoid(steps: int, start: float, end: float) -> Tensor:
    """β = start + (end − start) · sigmoid(x), x in equal steps from −6 to 6. GeoDiff (arXiv:2203.02923), as published
    with it and in diffusers' DDPMScheduler; the ends are met to 0.25 % of their distance."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


def cosine(steps: int) -> Tensor:
    """β = 1 − f(t) / f(t − 1) ≤ 0.999 with f(t) = cos²((t/T + s) / (1 + s) · π/2). Improved DDPM
    (arXiv:2102.09672), Eq. 17."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


def plain_cosine(steps: int) -> Tensor:
    """The betas of ᾱ = (cos(πt/T) + 1) / 2, t = 1 … T, brought into [ε, 1 − ε] by ᾱ ↦ ε + (1 − 2ε) ᾱ.

    Clipping would hold ᾱ still for about (2/π) √ε T steps at each end, where β would be 0; the affine map moves ᾱ by
    at most ε and leaves it falling strictly.
    """
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    bare = torch.cos(time * (math.pi / 2)).square()  # (cos(πt/T) + 1) / 2, without cancellation near 0
    return betas_from_alphas_cumprod(PLAIN_COSINE_MARGIN + (1 - 2 * PLAIN_COSINE_MARGIN) * bare)


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """β_t = 1 − ᾱ_t / ᾱ_{t−1} with ᾱ = 1 before the first: DDPM, Eq. 4, read backwards. [T] → [T]."""
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ shifted and scaled so that the last is exactly 0 and the first stays. arXiv:2305.08891, Algorithm 1.

    Args:
        alphas_cumprod: [T] float64, falling, T at least 2.
    """
    assert len(alphas_cumprod) >= 2, "the first step stays and the last becomes 0"
    root = alphas_cumprod.sqrt()
    rescaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return rescaled.square()
