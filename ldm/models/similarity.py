"""What compares images with reconstructions: PSNR, SSIM, a perceptual distance, and a discriminator with its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.component_config import refuse

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
MIN_MAP_SIZE = 2  # a map of a single place says nothing of where things are, and its padding is most of what it sees


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


AdversarialLoss = Literal["hinge", "non_saturating"]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of a discriminator.

    Args:
        channels: of the first level; each has twice as many as the one before, eight times these at most.
        levels: how often height and width are halved. The patch of a logit is about 54, 26 or 12 pixels wide with 3, 2,
            1.
        norm_num_groups: of the group normalization, which divides `channels`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    channels: int = 64
    levels: int = 3
    norm_num_groups: int = 8

    def __post_init__(self) -> None:
        for key in ("channels", "levels", "norm_num_groups"):
            if getattr(self, key) < 1:
                refuse(key, getattr(self, key), "must be above zero")
        if self.channels % self.norm_num_groups:
            refuse("norm_num_groups", self.norm_num_groups, f"must divide the {self.channels} channels")

    @property
    def min_image_size(self) -> int:
        """Pixels a side that an image must have."""
        return int(2**self.levels)


class PatchDiscriminator(nn.Module):
    """Images to logits, one a patch: positive where the patch is taken for a real one.

    PatchGAN (arXiv:1611.07004), with two changes: group instead of batch normalization, so that a logit depends on its
    own image alone, and 3x3 instead of 4x4 in the layers that do not halve, so that 8 pixels a side are enough.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**level, 8) for level in range(config.levels)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1) for narrow, wide in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(config.norm_num_groups, width) for width in widths[1:])
        self.conv_mid = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.norm_mid = nn.GroupNorm(config.norm_num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [−1, 1] → logits [B, 1, h, w], h = H / 2^levels rounded down; H and W at least 2^levels."""
        x = F.leaky_relu(self.conv_in(images), 0.2)  # [B, C, H / 2, W / 2]
        for downsample, norm in zip(self.downsamplers, self.norms, strict=True):
            x = F.leaky_relu(norm(downsample(x)), 0.2)  # [B, 2 C, H / 4, W / 4] and so on
        x = F.leaky_relu(self.norm_mid(self.conv_mid(x)), 0.2)
        logits: Tensor = self.conv_out(x)  # [B, 1, h, w]
        return logits


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """What the discriminator minimizes: logits of images and of reconstructions, [B, 1, h, w] each → [B] float32.

    Half the sum of both sides, each a mean over patches; 1 (hinge) or log 2 (non-saturating) for logits of 0.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":  # Geometric GAN (arXiv:1705.02894)
        at_images, at_fakes = F.relu(1 - real), F.relu(1 + fake)
    else:  # GAN (arXiv:1406.2661): −log D(x) and −log(1 − D(x̂)), where D is the sigmoid of a logit
        at_images, at_fakes = F.softplus(-real), F.softplus(fake)
    return 0.5 * (_mean(at_images) + _mean(at_fakes))


def generator_loss(fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """What the autoencoder minimizes: logits of its reconstructions [B, 1, h, w] → [B] float32, a mean over patches."""
    fake = fake.float()
    # The hinge has none on this side; GAN (arXiv:1406.2661), section 3: −log D(x̂), whose gradient does not vanish
    # where the discriminator is sure.
    return _mean(-fake if kind == "hinge" else F.softplus(-fake))


def _mean(values: Tensor) -> Tensor:
    """[B, 1, h, w] → [B]."""
    return values.flatten(1).mean(dim=1)
