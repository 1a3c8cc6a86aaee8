"""Similarity of two images: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
RANGE = 2.0  # of images in [−1, 1]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log₁₀ (range² / mean squared error), in dB, at most 120.

    [B, 3, H, W] twice, in [−1, 1] → [B].
    """
    error = (images - others).square().flatten(1).mean(dim=1)  # [B]
    return 10 * torch.log10(RANGE**2 / error.clamp(min=RANGE**2 * 1e-12))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13), 1 for equal images: [B, 3, H, W] twice, in [−1, 1] → [B].

    As in torchmetrics: the mean over channels, a Gaussian window of 11 pixels with σ 1.5, mirrored edges, K₁ 0.01 and
    K₂ 0.03. In float64 on the CPU, since variances are differences of squares.

    Raises:
        ValueError: for images with fewer than 11 pixels a side.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"images are {images.shape[-2]}x{images.shape[-1]}; SSIM needs at least {WINDOW} pixels a side"
        )
    x, y = (values.to("cpu", torch.float64).flatten(0, 1)[:, None] for values in (images, others))  # [B·3, 1, H, W]
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()

    def blurred(values: Tensor) -> Tensor:
        values = F.pad(values, (WINDOW // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c_1, c_2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c_1) * (variance_x + variance_y + c_2))
    return similarity.view(len(images), -1).mean(dim=1).to(images.device, torch.float32)
