"""Codecs map images to what is diffused: normalized pixels, or the latents of an autoencoder. Both are called latents.

The only place where the two spaces differ. Codecs apply the per-channel mean and std of the training data, so that
latents have zero mean and unit variance. Images are float [B, 3, H, W] in [−1, 1].
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.diffusion import Decoder, discretized_decoder, gaussian_decoder
from ldm.models import FirstStage
from ldm.weights import update_hash

LatentsSampler = Callable[[Tensor, Tensor | None], Tensor]
Compute = Callable[[FirstStage, Tensor], Tensor]
Tile = int | Literal["auto", "off"]
# Up to this many bytes, by an estimate, an image is computed as a whole: 512 and 768 pixels of Stable Diffusion are.
WHOLE_BYTES = 3 * 2**30
STRIP_BYTES = 2**28  # what a strip takes beside the map that is stored, which is larger where strips set in
# Bytes per pixel at the peak, measured on the CPU, in multiples of the second level's channels, and of the first's.
DECODER_MAPS, ENCODER_MAPS = 4, 6
PIXEL_MAPS = 6  # decoding, clamping and rounding, each into a new one
MIN_TILE = 16  # pixels; below, most of a strip is rows of its neighbors
HIGH_RESOLUTION = 1024**2  # of `force_upcast`, as in diffusers' pipelines; 512 or 768 pixels are below
# Keys of an autoencoder's config that its moments do not depend on: what concerns the decoder, or its users.
_NOT_IN_MOMENTS = frozenset(
    {"out_channels", "up_block_types", "use_post_quant_conv", "sample_size", "scaling_factor", "shift_factor",
     "force_upcast", "num_vq_embeddings", "latents_mean", "latents_std"}
)  # fmt: skip


class Codec(nn.Module):
    """What the rest of the package knows of either space.

    Attributes:
        channels: C of the latents.
        factor: pixels per latent position; image sizes must be divisible by it.
        bounded: whether `clip_x0` bounds x̂_0.
    """

    channels: int
    factor: int
    bounded = False

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for an image of `height` × `width` pixels; ValueError if the factor does not divide them."""
        factor = self.factor
        if height < factor or width < factor or height % factor or width % factor:
            nearest = "x".join(str(max(factor, round(side / factor) * factor)) for side in (height, width))
            size = f"{height}x{width}"
            raise ValueError(
                f"image size {size} is not divisible by the codec's factor {factor}; the nearest size is {nearest}"
            )
        return self.channels, height // factor, width // factor

    def moments(self, images: Tensor) -> Tensor:
        """What can be cached: [B, 3, H, W] in [−1, 1] → [B, M, h, w]."""
        return images

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] from moments; `noise` [B, C, h, w] samples the posterior, None takes its mean."""
        return self.latents_sampler()(moments, noise)

    def latents_sampler(self) -> LatentsSampler:
        """`sample_latents` with the present statistics and without the network; it can be pickled."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """32 hexadecimal digits of the function `moments`; None for the identity."""
        return None

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] → images [B, 3, H, W], about [−1, 1], not clamped."""
        raise NotImplementedError

    def decode_bytes(self, height: int, width: int) -> int:
        """An estimate of the memory to decode or encode one image of `height` × `width` pixels."""
        raise NotImplementedError

    def clip_x0(self, x_0: Tensor) -> Tensor:
        """Clamps a predicted x_0 [B, C, h, w] to possible images, if `bounded`."""
        return x_0

    def tile(self, size: Tile) -> None:
        """Sets how much of a large image is encoded or decoded at a time: about size² pixels, in strips, with less
        memory, up to twice the time, and the same result up to rounding.

        "auto", the default, does so above `WHOLE_BYTES`; "off" never. ValueError for anything else or below 16.
        """
        self._tile = check_tile(size)


class PixelCodec(Codec):
    """Normalized images: (pixel − mean) / std, with mean and std of each channel of the training images in [−1, 1]."""

    factor = 1
    bounded = True

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        means, deviations = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
        is_valid = bool(means.isfinite().all() and deviations.isfinite().all() and (deviations > 0).all())
        if len(mean) != len(std) or not is_valid:
            raise ValueError(f"PixelCodec mean {mean} and std {std}: one entry per channel, finite, std above 0")
        self.channels = len(mean)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", means.view(1, -1, 1, 1))
        self.register_buffer("std", deviations.view(1, -1, 1, 1))
        self.config = {"_class_name": "PixelCodec", "mean": list(mean), "std": list(std)}

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return (moments - self.mean) / self.std

    def latents_sampler(self) -> LatentsSampler:
        return self.sample_latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean

    def decode_bytes(self, height: int, width: int) -> int:
        return PIXEL_MAPS * self.mean.element_size() * self.channels * height * width

    def clip_x0(self, x_0: Tensor) -> Tensor:
        low, high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        return x_0.clamp(low.to(x_0.dtype), high.to(x_0.dtype))


class LatentCodec(Codec):
    """The latents of a first stage (LDM, arXiv:2112.10752, section 3.1), with a normal posterior or a codebook.

    Their statistics are the autoencoder's: folded into `quant_conv` and `post_quant_conv` by our own training, or in
    its config. Latents of a codebook are diffused before and quantized when they are decoded.

    Args:
        source: the folder of the autoencoder, which is copied byte for byte on saving.
    """

    def __init__(self, autoencoder: FirstStage, source: Path | None = None) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.source = source
        self.channels = autoencoder.channels
        self.factor = autoencoder.factor
        self._tile: Tile = "auto"

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel of the autoencoder's latents."""
        return self.autoencoder.statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel of the autoencoder's latents."""
        return self.autoencoder.statistics[1]

    def moments(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        return self._in_range(lambda network, x: network.encode(x, self._strips(network, x, *size)), images, *size)

    def latents_sampler(self) -> LatentsSampler:
        return partial(_whitened, sample=self.autoencoder.sample_latents, mean=self.mean, std=self.std)

    def fingerprint(self) -> str | None:
        """Of weights and config of the encoder and `quant_conv`; decoder and scaling factors do not change moments."""
        config = {key: value for key, value in self.autoencoder.config.to_dict().items() if key not in _NOT_IN_MOMENTS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        weights = self.autoencoder.state_dict().items()
        update_hash(digest, {name: value for name, value in weights if name.startswith(("encoder.", "quant_conv."))})
        return digest.hexdigest()[:32]

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents * _by_channel(self.std, latents) + _by_channel(self.mean, latents)
        raw, size = scaled.to(latents.dtype), [self.factor * side for side in latents.shape[2:]]
        return self._in_range(lambda network, x: network.decode(x, self._strips(network, x, *size)), raw, *size)

    def decode_bytes(self, height: int, width: int) -> int:
        with torch.no_grad():
            weight = self.autoencoder.encoder.conv_in.weight
            whole = height * width * _bytes_per_pixel(self.autoencoder)
            # In strips, what is stored is one map of the second level or less: a quarter of what is there otherwise.
            return whole if self._strips(self.autoencoder, weight, height, width) is None else STRIP_BYTES + whole // 4

    def _strips(self, network: FirstStage, x: Tensor, height: int, width: int) -> int | None:
        """How many pixels of an image of this size are computed at a time, whatever the batch; None for all."""
        weight = network.encoder.conv_in.weight
        if self._tile == "off" or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return None
        if self._tile != "auto":
            return self._tile**2 if height * width > self._tile**2 else None
        each = _bytes_per_pixel(network)
        return STRIP_BYTES // each if height * width * each > WHOLE_BYTES else None

    def _in_range(self, compute: Compute, x: Tensor, height: int, width: int) -> Tensor:
        """`compute` of the autoencoder on x [B, ...]; in float32 what half precision cannot hold, image by image."""
        dtype = self.autoencoder.encoder.conv_in.weight.dtype
        if dtype == torch.float16 and self.autoencoder.config.force_upcast and height * width >= HIGH_RESOLUTION:
            return _in_float32(compute, self.autoencoder, x).to(dtype)
        result = compute(self.autoencoder, x)
        if result.dtype not in (torch.float16, torch.bfloat16):
            return result
        # Images that were finite before.
        lost = x.isfinite().flatten(1).all(dim=1) & ~result.isfinite().flatten(1).all(dim=1)  # [B]
        if bool(lost.any()):
            _warn_of_overflow(result.dtype)
            result[lost] = _in_float32(compute, self.autoencoder, x[lost]).to(result.dtype)
        return result


def _in_float32(compute: Compute, network: FirstStage, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # a copy: later results must not depend on this one
        return compute(copy.deepcopy(network).float(), x.float())


def _bytes_per_pixel(network: FirstStage) -> int:
    """At the peak, where an image is computed as a whole."""
    widths = network.config.block_out_channels
    size = network.encoder.conv_in.weight.element_size()
    return size * max(DECODER_MAPS * max(widths[:2]), ENCODER_MAPS * widths[0])


@cache
def _warn_of_overflow(dtype: torch.dtype) -> None:  # once a process
    warnings.warn(
        f"the autoencoder exceeded the range of {str(dtype).removeprefix('torch.')}; these images are computed again "
        "in float32, which takes longer (warned once); open the model in torch.bfloat16 or torch.float32 to avoid it",
        stacklevel=4,
    )


def check_tile(size: Tile) -> Tile:
    """The size, if `Codec.tile` accepts it; ValueError if not."""
    if size in ("auto", "off") or (type(size) is int and size >= MIN_TILE):
        return size
    raise ValueError(f"tile is {size!r}; it is auto, off, or the side of a square in pixels, at least {MIN_TILE}")


def _whitened(
    moments: Tensor, noise: Tensor | None, *, sample: LatentsSampler, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    latents = sample(moments, noise)
    return ((latents - _by_channel(mean, latents)) / _by_channel(std, latents)).to(latents.dtype)


def _by_channel(values: tuple[float, ...], latents: Tensor) -> Tensor:
    """[1, C, 1, 1] in float32 at least: statistics in half precision would shift the whole image."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.tensor(values, dtype=dtype, device=latents.device).view(1, -1, 1, 1)


def decoder_of(codec: Codec) -> Decoder:
    """log p(x_0 | x_1) of the variational bound: discrete for pixels, which have 256 values, a density for latents."""
    if isinstance(codec, PixelCodec):
        return discretized_decoder(codec.mean.flatten().tolist(), codec.std.flatten().tolist())
    return gaussian_decoder
