"""Similarity of two images: PSNR, SSIM and a perceptual distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
RANGE = 2.0  # of images in [−1, 1]


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """10 log₁₀ (range² / mean squared error) in dB, at most 120: [B, 3, H, W] twice, in [−1, 1] → [B]."""
    error = (images - others).square().flatten(1).mean(dim=1)  # [B]
    return 10 * torch.log10(RANGE**2 / error.clamp(min=RANGE**2 * 1e-12))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13), 1 for equal images: [B, 3, H, W] twice, in [−1, 1] → [B].

    As in torchmetrics: the mean over channels, a Gaussian window of 11 pixels with σ 1.5, mirrored edges, K₁ 0.01 and
    K₂ 0.03. In float64 on the CPU, since variances are differences of squares. ValueError below 11 pixels a side.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"images are {images.shape[-2]}x{images.shape[-1]}; SSIM needs {WINDOW} pixels a side")
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


MIN_IMAGE_SIZE = 8
# A map of a single place says nothing of where things are, and its padding is most of what it sees.
MIN_MAP_SIZE = 2


class PerceptualDistance:
    """LPIPS (arXiv:1801.03924, Eq. 1) with a weight a map instead of one a channel.

    Maps are normalized to length 1 over their channels at each place; the squared difference is averaged over places.
    The distance is the mean over maps of these averages, each divided by what it is between two different images.

    Args:
        maps: (images [B, 3, H, W] in [−1, 1], n) → the first n maps of a frozen network, [B, C_i, H_i, W_i], each at
            half the height and width of the one before, the first at half of the images'.
        scales: for each map, the mean of its average over pairs of different images.
    """

    def __init__(self, maps: Callable[[Tensor, int], list[Tensor]], scales: Sequence[float]) -> None:
        assert scales and all(scale > 0 for scale in scales), scales
        self.maps = maps
        self.scales = tuple(scales)

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """[B, 3, H, W] twice, in [−1, 1] → [B], always in float32.

        Below 64 pixels a side only maps with 2 x 2 places or more count: with 8 pixels two, 16 three, 32 four; below
        8 pixels ValueError.
        """
        differences = self.differences(images, others)  # [B, L]
        return (differences / differences.new_tensor(self.scales[: differences.shape[1]])).mean(dim=1)

    def differences(self, images: Tensor, others: Tensor) -> Tensor:
        """The squared difference in each map that counts, not divided by its scale: [B, L]."""
        assert images.shape == others.shape, (images.shape, others.shape)
        levels = self.levels(*images.shape[2:])
        # Nearly equal maps are subtracted: bfloat16 changes the distance by 1 to 3 % where it is about 0.2.
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.maps(images.float(), levels), self.maps(others.float(), levels), strict=True)
            return torch.stack([(_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs], dim=1)

    def levels(self, height: int, width: int) -> int:
        """How many maps count for images of this size."""
        side = min(height, width)
        if side < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images of {height}x{width} are too small for a perceptual distance, which needs {MIN_IMAGE_SIZE} "
                "pixels a side; leave it out (loss.perceptual_weight=0)"
            )
        return min(len(self.scales), (side // MIN_MAP_SIZE).bit_length() - 1)


def _unit(features: Tensor) -> Tensor:
    """[B, C, h, w], of length 1 over C at each place; zero stays zero, and its gradient finite."""
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()
