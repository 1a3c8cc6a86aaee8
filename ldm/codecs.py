"""Charts between images and what is diffused: pixels themselves, or the latents of an autoencoder.

The only place where the two spaces differ. Both carry the per-channel mean and deviation of the training data,
applied inside `draw` and `decode` alone, so that what is diffused has zero mean and unit variance as the papers
assume. Images are float [B, 3, H, W] in [−1, 1]; what is diffused is called latents in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.models import FirstStage

Draw = Callable[[Tensor, Tensor | None], Tensor]

# Keys of an autoencoder's config that its moments do not depend on: what concerns the decoder, or its users.
_NOT_OF_MOMENTS = frozenset(
    {"out_channels", "up_block_types", "use_post_quant_conv", "sample_size", "scaling_factor", "shift_factor",
     "force_upcast", "num_vq_embeddings", "latents_mean", "latents_std"}
)  # fmt: skip


class Codec(Protocol):
    """What the rest of the package knows of either space."""

    channels: int
    """C of the latents."""
    factor: int
    """Pixels a latent position in height and width; image sizes must be divisible by it."""
    bounded: bool
    """Whether `project` bounds x̂_0."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves what it holds to a device or dtype, like `nn.Module.to`."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for an image of `height` × `width` pixels; ValueError if the factor does not divide them."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """What can be encoded once and kept: [B, 3, H, W] in [−1, 1] → [B, M, h, w]."""
        ...

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] from moments; `noise` [B, C, h, w] draws from the posterior, None takes its mean."""
        ...

    def drawing(self) -> Draw:
        """`draw` as it is now, without a network: all that is needed of the codec once the moments are known."""
        ...

    def fingerprint(self) -> str | None:
        """32 hexadecimal digits that name the function `moments`; None where it is the identity."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] → images [B, 3, H, W], about [−1, 1], not clamped."""
        ...

    def project(self, original: Tensor) -> Tensor:
        """Bounds a predicted x_0 [B, C, h, w] by what an image can be."""
        ...


def _divided(height: int, width: int, factor: int) -> tuple[int, int]:
    if height < factor or width < factor or height % factor or width % factor:
        raise ValueError(
            f"image size {height}x{width} is not divisible by the codec's factor {factor}; "
            f"the nearest size is {_nearest(height, factor)}x{_nearest(width, factor)}"
        )
    return height // factor, width // factor


def _nearest(size: int, factor: int) -> int:
    return max(factor, round(size / factor) * factor)


class PixelCodec(nn.Module):
    """The identity chart: images, normalised.

    Args:
        mean, std: per channel, of the training images in [−1, 1].
    """

    factor = 1
    bounded = True

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"PixelCodec mean {mean} and std {std} must have one entry a channel, std positive")
        self.channels = len(mean)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.config = {"_class_name": "PixelCodec", "mean": list(mean), "std": list(std)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.channels, *_divided(height, width, self.factor))

    def moments(self, images: Tensor) -> Tensor:
        return images

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return (moments - self.mean) / self.std

    def drawing(self) -> Draw:
        return self.draw

    def fingerprint(self) -> str | None:
        return None

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean

    def project(self, original: Tensor) -> Tensor:
        low, high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        return original.clamp(low.to(original.dtype), high.to(original.dtype))


class LatentCodec(nn.Module):
    """The chart of a first stage (LDM, arXiv:2112.10752, section 3.1), with a normal posterior or a codebook.

    The statistics of the latents stand in the autoencoder itself: folded into its `quant_conv` pair by our own
    training, or in its config: `scaling_factor` and `shift_factor` of a foreign one, `latents_mean` and `latents_std`
    of one with a codebook, whose latents are diffused as the encoder gives them and quantised when they are decoded.

    Args:
        source: the folder that the autoencoder was read from, which is copied byte for byte when it is saved.
    """

    bounded = False

    def __init__(self, autoencoder: FirstStage, source: Path | None = None) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.source = source
        self.channels = autoencoder.channels
        self.factor = autoencoder.factor

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel of the latents that the autoencoder gives."""
        return self.autoencoder.statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel of the latents that the autoencoder gives."""
        return self.autoencoder.statistics[1]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.channels, *_divided(height, width, self.factor))

    def moments(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.drawing()(moments, noise)

    def drawing(self) -> Draw:
        return partial(_drawn, draw=self.autoencoder.draw, mean=self.mean, std=self.std)

    def fingerprint(self) -> str | None:
        """Covers the encoder and `quant_conv`, weights and config. Decoder and scaling factors do not change moments,
        so that first stages which differ in them alone share what is kept.
        """
        config = {key: value for key, value in self.autoencoder.config.to_dict().items() if key not in _NOT_OF_MOMENTS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, value in sorted(self.autoencoder.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents * _by_channel(self.std, latents) + _by_channel(self.mean, latents)
        return self.autoencoder.decode(scaled.to(latents.dtype))

    def project(self, original: Tensor) -> Tensor:
        return original


def _drawn(
    moments: Tensor, noise: Tensor | None, *, draw: Draw, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    latents = draw(moments, noise)
    return ((latents - _by_channel(mean, latents)) / _by_channel(std, latents)).to(latents.dtype)


def _by_channel(values: tuple[float, ...], latents: Tensor) -> Tensor:
    """[1, C, 1, 1] in float32 at least: statistics in half precision would shift the whole picture."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.tensor(values, dtype=dtype, device=latents.device).view(1, -1, 1, 1)
