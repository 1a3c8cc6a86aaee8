"""The first stage with a codebook: latents are the nearest of learned codes when they are decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import FirstStageNetwork
from ldm.models.coder import CoderConfig, Decoder, Encoder, check_statistics
from ldm.models.component_config import refuse

# Of the table of distances that is held at once: 16 MB in float32.
MAX_DISTANCES = 2**22


@dataclass(frozen=True, kw_only=True)
class VQConfig(CoderConfig):
    """Shape of an autoencoder with a codebook: keys, meanings and defaults of diffusers' `VQModel`.

    `vq_embed_dim` is C, the channels of codes and latents, by default `latent_channels`, those on the other side of the
    1x1 convolutions. `latents_mean` and `latents_std`, C numbers or null, are keys of our own: what is diffused is (z -
    mean) · scaling_factor / std; diffusers' `VQModel` ignores them.
    """

    __pydantic_config__ = {"extra": "forbid"}
    diffusers_class: ClassVar[str] = "VQModel"
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "norm_type": ("group",),
        "lookup_from_codebook": (False, True),  # concerns decoding without quantization, which is not done here
    }

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    force_upcast: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_vq_embeddings")
        if self.vq_embed_dim is not None:
            self.check_positive("vq_embed_dim")
        if (self.latents_mean is None) != (self.latents_std is None):
            refuse("latents_mean", self.latents_mean, "needs latents_std beside it, and the other way round")
        for key in ("latents_mean", "latents_std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.channels:
                refuse(key, values, f"needs {self.channels} numbers, one for each channel of the codes")
        if self.latents_std is not None:
            self.check_positive("latents_std")

    def to_dict(self) -> dict[str, Any]:
        own = {"latents_mean", "latents_std"}
        return {key: value for key, value in super().to_dict().items() if key not in own or value is not None}

    def without_statistics(self) -> VQConfig:
        """The same network, whose latents are used as they are."""
        return dataclasses.replace(self, scaling_factor=1.0, latents_mean=None, latents_std=None)

    @property
    def channels(self) -> int:
        """C of codes and latents."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


class Quantized(NamedTuple):
    """Latents z and their nearest codes e, [B, C, h, w]; the gradient of `latents` is that of z (straight through).

    Attributes:
        moments: z, as the encoder gives them.
        latents: e, in the dtype of the codebook; `indices` [B, h, w] int64 says which.
        codebook: |sg(z) - e|² as a mean over the latents of a sample, [B] float32: it moves the codes.
        commitment: |z - sg(e)|², the same number; it moves the encoder.
    """

    moments: Tensor
    latents: Tensor
    indices: Tensor
    codebook: Tensor
    commitment: Tensor


class VectorQuantizer(nn.Module):
    """A codebook of K codes [C]. Neural discrete representation learning (van den Oord et al. 2017), section 3."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """The first nearest code of each latent, Eq. 1: [B, C, h, w] → [B, h, w] int64; in float32 or more."""
        channels = latents.shape[1]
        with torch.autocast(latents.device.type, enabled=False):
            wide = torch.promote_types(latents.dtype, torch.float32)
            codes = self.embedding.weight.to(wide)  # [K, C]
            # |z - e|² = |z|² - 2 z·e + |e|² cancels where all are far from zero, but not around the codes' middle.
            middle = codes.mean(dim=0)
            codes = codes - middle
            squares = codes.square().sum(dim=1)  # [K]
            rows = latents.to(wide).movedim(1, -1).reshape(-1, channels) - middle  # [B·h·w, C]
            parts = rows.split(max(1, MAX_DISTANCES // len(codes)))
            nearest = [torch.addmm(squares, part, codes.T, alpha=-2).argmin(dim=1) for part in parts]
        return torch.cat(nearest).view(latents.shape[0], *latents.shape[2:])

    def forward(self, latents: Tensor) -> Quantized:
        """[B, C, h, w] → their codes, and the two losses of each sample. Eq. 2 and the last two terms of Eq. 3."""
        indices = self.nearest(latents)
        codes = self.embedding(indices).movedim(-1, 1)  # [B, C, h, w]
        wide = torch.promote_types(latents.dtype, torch.float32)
        z, e = latents.to(wide), codes.to(wide)
        return Quantized(
            moments=latents,
            # The value is that of the code, to the last bit; the gradient is that of z.
            latents=codes.detach() + (z - z.detach()).to(codes.dtype),
            indices=indices,
            codebook=(z.detach() - e).square().flatten(1).mean(dim=1),
            commitment=(z - e.detach()).square().flatten(1).mean(dim=1),
        )


class VQModel(FirstStageNetwork):
    """Images to latents, and latents by way of their nearest codes to images: Rombach et al. 2022, section 3.1.

    The latents before quantization are diffused. Parameters are named as in diffusers' `VQModel`.
    """

    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.channels, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.channels)
        self.post_quant_conv = nn.Conv2d(config.channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std that users of this network assume of each channel of its latents: from the config."""
        mean = self.config.latents_mean or (0.0,) * self.channels
        std = self.config.latents_std or (1.0,) * self.channels
        return mean, tuple(value / self.config.scaling_factor for value in std)

    def decode(self, latents: Tensor, strips: int | None = None) -> Tensor:
        """Latents [B, C, h, w] → their nearest codes → images [B, 3, H, W], about in [-1, 1] but not clamped."""
        return self.decode_codes(self.quantize(latents).latents, strips)

    def decode_codes(self, codes: Tensor, strips: int | None = None) -> Tensor:
        """Latents that are codes already, [B, C, h, w] → images [B, 3, H, W]."""
        return super().decode(codes, strips)

    @staticmethod
    def sample_latents(moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents, which are all that `encode` gives; noise is not used."""
        return moments

    @staticmethod
    def expectations(moments: Tensor) -> tuple[Tensor, Tensor]:
        """z and z², [B, C, h, w] both."""
        return moments, moments.square()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """Images → reconstructions, and the latents with their codes, in one call; noise is not used."""
        quantized = self.quantize(self.encode(images))
        return self.decode_codes(quantized.latents), quantized

    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Keeps mean [C] and std [C] in the config: the 1x1 convolutions would change which codes are nearest."""
        check_statistics(mean, std, self.channels)
        self.config = dataclasses.replace(
            self.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()), scaling_factor=1.0
        )


class CodebookUsage(NamedTuple):
    """How a codebook of K codes is used: the fraction that is, and exp of the entropy of how often each is, 1 to K."""

    perplexity: float
    used: float


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """Of how often each code was used, [K], once at least in all."""
    counts = counts.cpu()  # some devices have no float64
    assert bool(counts.sum() > 0)
    shares = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return CodebookUsage(float(entropy.exp()), float((counts > 0).double().mean()))
