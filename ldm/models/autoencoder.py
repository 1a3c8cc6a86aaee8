"""The first stages of latent diffusion: autoencoders with a normal posterior or a codebook, and their configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.coder import CoderConfig, Decoder, Encoder, check_statistics, compute_in_strips
from ldm.models.component_config import refuse


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(CoderConfig):
    """Shape of an autoencoder: keys, meanings and defaults of diffusers' `AutoencoderKL`."""

    __pydantic_config__ = {"extra": "forbid"}
    diffusers_class: ClassVar[str] = "AutoencoderKL"
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def without_statistics(self) -> AutoencoderConfig:
        """The same network, whose latents are used as they are."""
        return dataclasses.replace(self, scaling_factor=1.0, shift_factor=None)


class FirstStageNetwork(nn.Module):
    """Encoder and decoder with a 1x1 convolution behind and before them, as all first stages have."""

    config: CoderConfig
    encoder: Encoder
    decoder: Decoder
    quant_conv: nn.Conv2d | None
    post_quant_conv: nn.Conv2d | None

    @property
    def factor(self) -> int:
        """Pixels of the image on each side of a latent position: H / h."""
        return self.config.factor

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.config.channels

    def encode(self, images: Tensor, strips: int | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → moments [B, 2 C, h, w], mean and log-variance; of a VQ model z [B, C, h, w].

        With `strips` about so many pixels are computed at a time, without gradients: less memory, the same up to
        rounding. ValueError if `factor` does not divide H and W.
        """
        self.config.check_size(images)
        moments = self.encoder(images) if strips is None else compute_in_strips(self.encoder, images, strips)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latents: Tensor, strips: int | None = None) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, H, W], about in [-1, 1] but not clamped; `strips` as in `encode`."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents) if strips is None else compute_in_strips(self.decoder, latents, strips)


def sample_posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents mean + σ · noise from moments [B, 2 C, h, w] and noise [B, C, h, w]; the mode without noise.

    Auto-encoding variational Bayes (Kingma and Welling 2014), section 2.4; the log-variance is clamped to [-30, 20].
    """
    mean, log_variance = _mean_and_log_variance(moments)
    return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


class AutoencoderKL(FirstStageNetwork):
    """Images to moments of a normal posterior over latents, and latents to images: Rombach et al. 2022, section 3.1.

    Parameters are named as in diffusers' `AutoencoderKL`, so that weights load both ways.
    """

    config: AutoencoderConfig
    sample_latents = staticmethod(sample_posterior)

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std that users of this network assume of each channel of its latents: from the config."""
        config = self.config
        return (config.shift_factor or 0.0,) * self.channels, (1 / config.scaling_factor,) * self.channels

    @staticmethod
    def expectations(moments: Tensor) -> tuple[Tensor, Tensor]:
        """E[z] and E[z²] of the posterior of each latent: [B, 2 C, h, w] → [B, C, h, w] both."""
        mean, log_variance = _mean_and_log_variance(moments)
        return mean, mean.square() + log_variance.exp()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and noise → reconstructions and moments, in the one call that DistributedDataParallel sees."""
        moments = self.encode(images)
        return self.decode(sample_posterior(moments, noise)), moments

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Rewrites the 1x1 convolutions so that latents become (latents - mean) / std and `decode` undoes it.

        mean [C] and std [C] are those of the latents that this network gives, before any scaling_factor. Exact up to
        rounding, in float64. ValueError without both convolutions, and for other statistics.
        """
        if self.quant_conv is None or self.post_quant_conv is None:
            raise ValueError("use_quant_conv and use_post_quant_conv must be true to fold statistics into them")
        check_statistics(mean, std, self.channels)
        weight, bias = _as_float64(self.quant_conv)
        mean, std = mean.to(weight), std.to(weight)
        divisor = torch.cat([std, torch.ones_like(std)])  # [2 C]: mean, log-variance
        # z' = (z - m) / s has the mean (μ - m) / s and the log-variance log σ² - 2 log s.
        offset = torch.cat([mean, 2 * std.log()])
        _copy_into(self.quant_conv, weight / divisor[:, None], (bias - offset) / divisor)
        # V z + c = (V s) z' + (V m + c).
        weight, bias = _as_float64(self.post_quant_conv)
        _copy_into(self.post_quant_conv, weight * std, bias + weight @ mean)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(posterior || N(0, I)) in nats, summed over the latents of an image: moments [B, 2 C, h, w] → [B].

    Auto-encoding variational Bayes, appendix B. The result is float32, or float64 for such moments.
    """
    # In float16 the variance of a clamped log-variance would overflow.
    mean, log_variance = _mean_and_log_variance(moments.to(torch.promote_types(moments.dtype, torch.float32)))
    # -KL = ½ Σ (1 + log σ² - μ² - σ²)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


def upgrade_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under today's names: old files have query, key, value and proj_attn, some [C, C, 1, 1] for [C, C]."""
    upgraded = {}
    for name, tensor in state_dict.items():
        match = _ATTENTION_PARAMETER.fullmatch(name)
        if match is None:
            upgraded[name] = tensor
            continue
        prefix, layer, parameter = match.groups()
        is_convolution, layer = tensor.shape[2:] == (1, 1), _RENAMED_LAYERS.get(layer, layer)
        upgraded[f"{prefix}.{layer}.{parameter}"] = tensor.flatten(1) if is_convolution else tensor
    return upgraded


_RENAMED_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION_PARAMETER = re.compile(
    r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)"
)


def _mean_and_log_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = moments.chunk(2, dim=1)  # [B, C, h, w] each
    return mean, log_variance.clamp(-30.0, 20.0)


def _as_float64(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight [C_out, C_in] and bias [C_out] of a 1x1 convolution, on the CPU: some devices have no float64."""
    assert convolution.bias is not None
    return convolution.weight[:, :, 0, 0].cpu().double(), convolution.bias.cpu().double()


def _copy_into(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert convolution.bias is not None
    convolution.weight.copy_(weight[:, :, None, None])
    convolution.bias.copy_(bias)


MAX_DISTANCES = 2**22  # of the table of distances that is held at once: 16 MB in float32


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
        means, stds = tuple(mean.tolist()), tuple(std.tolist())
        self.config = dataclasses.replace(self.config, latents_mean=means, latents_std=stds, scaling_factor=1.0)


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
