"""Encoder and decoder that all first stages share, their config, and their computation in strips of large images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.blocks import CheckpointedBlock, Downsample, ImageAttention, ResnetBlock, Upsample
from ldm.models.component_config import ComponentConfig, refuse

NORM_EPS = 1e-6  # encoder and decoder of LDM; no config key of diffusers reaches it


@dataclass(frozen=True, kw_only=True)
class CoderConfig(ComponentConfig):
    """Shape of encoder and decoder; `scaling_factor`, `sample_size` and `force_upcast` are for those who use them."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        self.check_numbers()
        self.check_positive(
            "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels",
            "norm_num_groups", "sample_size", "scaling_factor",
        )  # fmt: skip
        self.check_names("down_block_types", ("DownEncoderBlock2D",))
        self.check_names("up_block_types", ("UpDecoderBlock2D",))
        levels = len(self.block_out_channels)
        if levels == 0:
            refuse("block_out_channels", (), "needs at least one level")
        for key in ("down_block_types", "up_block_types"):
            names = getattr(self, key)
            if len(names) != levels:
                refuse(key, names, f"needs {levels} names, one for each of block_out_channels, but has {len(names)}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                refuse("norm_num_groups", self.norm_num_groups, f"must divide the {channels} channels of every level")

    @property
    def factor(self) -> int:
        """Pixels of the image on each side of a latent position: H / h."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.latent_channels

    def check_size(self, images: Tensor) -> None:
        """Raises ValueError unless `factor` divides height and width of images [B, 3, H, W]."""
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"image of height {height} and width {width}: both must be divisible by {self.factor}")


class CoderBlock(CheckpointedBlock):
    """A level of encoder or decoder, or the middle: residual blocks, attention after the first, another resolution."""

    def __init__(
        self,
        config: CoderConfig,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        attention: bool = False,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else out_channels, out_channels, groups=groups, eps=NORM_EPS)
            for index in range(layers)
        )
        attentions = [ImageAttention(out_channels, groups=groups, eps=NORM_EPS)] if attention else []
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        for index, resnet in enumerate(self.resnets):
            x = self.apply_layer(resnet, x)
            if index < len(self.attentions):
                x = self.apply_layer(self.attentions[index], x)
        for downsample in self.downsamplers:
            x = downsample(x)  # [B, C', H / 2, W / 2]
        for upsample in self.upsamplers:
            x = upsample(x)  # [B, C', 2 H, 2 W]
        return x


class Coder(nn.Module):
    """A convolution, blocks, and a normalized convolution: what encoder and decoder have in common."""

    conv_in: nn.Conv2d
    mid_block: CoderBlock
    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def blocks(self) -> list[CoderBlock]:
        """In the order in which they are applied."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Encoder: [B, 3, H, W] → [B, D, h, w]; decoder: [B, C, h, w] → [B, 3, H, W]."""
        x = self.conv_in(x)
        for block in self.blocks():
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Encoder(Coder):
    """Images [B, 3, H, W] → what `quant_conv` is given, [B, D, h, w]: D is `out_channels`."""

    def __init__(self, config: CoderConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        layers, last = config.layers_per_block, len(widths) - 1
        self.down_blocks = nn.ModuleList(
            CoderBlock(config, before, width, layers=layers, downsample=level < last)
            for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = CoderBlock(config, widths[-1], widths[-1], layers=2, attention=config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def blocks(self) -> list[CoderBlock]:
        return [*self.down_blocks, self.mid_block]


class Decoder(Coder):
    """Latents [B, C, h, w] → images [B, 3, H, W]."""

    def __init__(self, config: CoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = CoderBlock(config, widths[0], widths[0], layers=2, attention=config.mid_block_add_attention)
        layers, last = config.layers_per_block + 1, len(widths) - 1
        self.up_blocks = nn.ModuleList(
            CoderBlock(config, before, width, layers=layers, upsample=level < last)
            for level, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def blocks(self) -> list[CoderBlock]:
        return [self.mid_block, *self.up_blocks]


def check_statistics(mean: Tensor, std: Tensor, channels: int) -> None:
    """Raises ValueError unless there is one finite mean and one finite std above zero for each channel."""
    if mean.shape != (channels,) or std.shape != (channels,):
        shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise ValueError(f"mean and std of shapes {shapes}: must be {(channels,)}, one number a channel")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        values = f"mean {mean.tolist()} and std {std.tolist()}"
        raise ValueError(f"{values}: must be finite, the latter above zero; train with fewer latent_channels")


# ---- in strips of rows: the same result up to rounding, in less memory

# Convolutions read a row or two of the neighboring strips, group norms gather their statistics first, and the attention
# in the middle holds all keys and values: no seams. One map per residual block is stored, in place.
Function = Callable[[Tensor], Tensor]
Rows = Callable[[int, int], Tensor]
MIN_ROWS = 2  # in place a strip may look back over one strip, and a residual block looks back over two rows


@dataclass(frozen=True)
class _Map:
    """A map [1, C, height, width] of which any rows can be had; `stored` where it lies in memory that is ours."""

    height: int
    width: int
    read: Rows
    stored: Tensor | None = None


def _part(x: _Map, top: int, bottom: int) -> _Map:
    """A map whose rows `top` to `bottom` are computed now, once, and of which no others will be asked for."""
    rows = x.read(top, bottom)
    return _Map(x.height, x.width, lambda first, last: rows[:, :, first - top : last - top])


def _given(x: Tensor) -> _Map:
    return _Map(x.shape[2], x.shape[3], lambda top, bottom: x[:, :, top:bottom])


@torch.no_grad()
def compute_in_strips(coder: Coder, images: Tensor, pixels: int) -> Tensor:
    """`coder(images)` of an encoder or decoder, [B, C, H, W] → [B, C', H', W'], about `pixels` places at a time."""
    computed, strips = [], Strips(pixels)
    for image in images:
        x = _convolution(coder.conv_in, _given(image[None]))
        for block in coder.blocks():
            x = strips.block(block, x)
        x = _convolution(coder.conv_out, x, strips.normalization(coder.conv_norm_out, x))
        computed.append(strips.stored(x, x.read).read(0, x.height))
    return torch.cat(computed)


class Strips:
    """Computes parts of a coder about `pixels` places at a time."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def block(self, block: CoderBlock, x: _Map) -> _Map:
        """`CoderBlock.forward`; a change of resolution is not stored, for it is larger than what follows from it."""
        for index, resnet in enumerate(block.resnets):
            x = self.resnet(resnet, x)  # type: ignore[arg-type]
            if index < len(block.attentions):
                x = self.attention(block.attentions[index], x)  # type: ignore[arg-type]
        for downsample in block.downsamplers:
            x = _downsampled(downsample, x)  # type: ignore[arg-type]
        for upsample in block.upsamplers:
            x = _upsampled(upsample, x)  # type: ignore[arg-type]
        return x

    def resnet(self, block: ResnetBlock, x: _Map) -> _Map:
        """`ResnetBlock.forward` without time."""
        first = self.normalization(block.norm1, x)
        second = self.normalization(block.norm2, _convolution(block.conv1, x, first))

        def rows(top: int, bottom: int) -> Tensor:
            around = _part(x, max(top - 2, 0), min(bottom + 2, x.height))
            residual = _convolution(block.conv2, _convolution(block.conv1, around, first), second).read(top, bottom)
            before = around.read(top, bottom)
            return residual + (before if block.conv_shortcut is None else block.conv_shortcut(before))

        return self.stored(x, rows)

    def attention(self, layer: ImageAttention, x: _Map) -> _Map:
        """`ImageAttention.forward`: queries a strip at a time, to the keys and values of all places."""
        normalize = self.normalization(layer.group_norm, x, silu=False)

        def tokens(top: int, bottom: int) -> Tensor:
            return normalize(x.read(top, bottom)).flatten(2).transpose(1, 2)  # [1, n, C]

        parts = [tokens(top, bottom) for top, bottom in self.strips(x)]
        key = torch.cat([layer.to_k(part) for part in parts], dim=1).unflatten(2, (layer.heads, -1))  # [1, N, heads, d]
        value = torch.cat([layer.to_v(part) for part in parts], dim=1).unflatten(2, (layer.heads, -1))

        def rows(top: int, bottom: int) -> Tensor:
            before = x.read(top, bottom)
            query = layer.to_q(tokens(top, bottom)).unflatten(2, (layer.heads, -1))  # [1, n, heads, d]
            attended = layer.to_out[0](layer.kernel(query, key, value).flatten(2))  # [1, n, C]
            return before + attended.transpose(1, 2).reshape(before.shape)

        return self.stored(x, rows)

    def normalization(self, norm: nn.GroupNorm, x: _Map, *, silu: bool = True) -> Function:
        """`norm` with the statistics of the whole of `x`, and SiLU behind it: a function of any rows."""
        count, mean, variance = 0, torch.zeros(()), torch.zeros(())
        for top, bottom in self.strips(x):
            rows = x.read(top, bottom)
            values = rows.to(torch.promote_types(rows.dtype, torch.float32)).reshape(norm.num_groups, -1)  # [G, n]
            its_variance, its_mean = torch.var_mean(values, dim=1, correction=0)  # [G]
            share = values.shape[1] / (count + values.shape[1])
            if count == 0:
                mean, variance = its_mean, its_variance
            distance = its_mean - mean  # joins two sets (Chan, Golub and LeVeque 1983) without losing digits
            mean = mean + share * distance
            variance = torch.lerp(variance, its_variance, share) + share * (1 - share) * distance.square()
            count += values.shape[1]
        each = norm.num_channels // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(each) * norm.weight  # [C]
        shift = norm.bias - mean.repeat_interleave(each) * scale
        scale, shift = scale[:, None, None], shift[:, None, None]

        def apply(rows: Tensor) -> Tensor:
            # In half precision torch's own normalization computes in float32, too.
            normalized = torch.addcmul(shift, rows.to(scale.dtype), scale).to(rows.dtype)
            return F.silu(normalized, inplace=True) if silu else normalized

        return apply

    def stored(self, x: _Map, rows: Rows) -> _Map:
        """Computes all rows of what follows from `x`; over `x` itself where it is stored and no channels are added.

        A strip is written when the next has been computed, which looks back at what it was before.
        """
        target, waiting = x.stored, None
        for top, bottom in self.strips(x):
            strip = rows(top, bottom)
            if target is None or target.shape[1] != strip.shape[1]:
                assert waiting is None
                target = strip.new_empty(1, strip.shape[1], x.height, x.width)
            if waiting is not None:
                target[:, :, waiting[0] : waiting[0] + waiting[1].shape[2]] = waiting[1]
            waiting = (top, strip)
        assert target is not None and waiting is not None
        target[:, :, waiting[0] :] = waiting[1]
        whole = _given(target)
        return dataclasses.replace(whole, stored=target)

    def strips(self, x: _Map) -> Iterator[tuple[int, int]]:
        """(top, bottom) of strips of about `pixels` places each, from top to bottom."""
        height = max(MIN_ROWS, self.pixels // x.width)
        for top in range(0, x.height, height):
            yield top, min(top + height, x.height)


def _convolution(layer: nn.Conv2d, x: _Map, before: Function | None = None) -> _Map:
    """A 3x3 convolution with padding 1 of `before(x)`; not stored."""

    def rows(top: int, bottom: int) -> Tensor:
        first, last = max(top - 1, 0), min(bottom + 1, x.height)
        values = x.read(first, last) if before is None else before(x.read(first, last))
        # Zeros stand beside the image, after the normalization; not where a strip ends.
        padded = F.pad(values, (1, 1, first - (top - 1), bottom + 1 - last))
        return F.conv2d(padded, layer.weight, layer.bias)

    return _Map(x.height, x.width, rows)


def _downsampled(layer: Downsample, x: _Map) -> _Map:
    """`Downsample.forward` with padding 0: a row of zeros below and on the right."""
    assert layer.padding == 0

    def rows(top: int, bottom: int) -> Tensor:
        last = min(2 * bottom + 1, x.height)
        padded = F.pad(x.read(2 * top, last), (0, 1, 0, 2 * bottom + 1 - last))
        return F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2)

    return _Map(x.height // 2, x.width // 2, rows)


def _upsampled(layer: Upsample, x: _Map) -> _Map:
    """`Upsample.forward`."""

    def doubled(top: int, bottom: int) -> Tensor:
        first = top // 2
        rows = F.interpolate(x.read(first, (bottom + 1) // 2), scale_factor=2.0, mode="nearest")
        return rows[:, :, top - 2 * first : bottom - 2 * first]

    return _convolution(layer.conv, _Map(2 * x.height, 2 * x.width, doubled))
