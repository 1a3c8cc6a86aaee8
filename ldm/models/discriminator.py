"""A patch discriminator, and the losses between it and the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.component_config import refuse

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
