"""Both halves of classifier-free guidance (arXiv:2207.12598): dropping in training, guiding in sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.objective import Denoiser

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t [B, C, H, W], t) → prediction [B, C, H, W]: a denoiser whose condition is already inside."""


def drop_conditioning(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replaces the condition of the samples marked in `dropped` by the null one. Algorithm 1, line 3.

    Args:
        condition: [B, L, D].
        null: [1, L, D], the states of the empty caption.
        dropped: [B] bool, drawn a sample.
    """
    return torch.where(dropped.to(condition.device).view(-1, 1, 1), null, condition)  # [B, L, D]


def classifier_free_guidance(denoiser: Denoiser, condition: Tensor, null: Tensor, guidance_scale: float) -> Denoise:
    """ε_∅ + w (ε_c − ε_∅): Eq. 6 with the w of Imagen and diffusers, where w = 1 is no guidance.

    Both halves go through the network as one batch. At w = 1 the unconditional half cancels and is not
    computed; at w = 0 the conditional one is not.

    Args:
        condition: [B, L, D], states of the prompts.
        null: [B, L, D], states of the empty caption or of the negative prompts.
        guidance_scale: w, any finite number.
    """

    def evaluate(x_t: Tensor, t: int, states: Tensor) -> Tensor:
        timesteps = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        prediction: Tensor = denoiser(x_t, timesteps, states)
        return prediction

    def guided(x_t: Tensor, t: int) -> Tensor:
        if guidance_scale == 1:
            return evaluate(x_t, t, condition)
        if guidance_scale == 0:
            return evaluate(x_t, t, null)
        both = evaluate(torch.cat([x_t, x_t]), t, torch.cat([null, condition]))  # [2B, C, H, W]
        unconditional, conditional = both.chunk(2)  # [B, C, H, W] each
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided
