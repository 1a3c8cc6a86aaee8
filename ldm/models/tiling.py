"""Encoding and decoding of large images in strips of rows: the same result up to rounding, in less memory.

Convolutions read a row or two of the neighboring strips. The statistics of group norms are gathered strip by strip
first, and the attention in the middle holds all keys and values, so there are no seams. One map per residual block is
stored, in place; the rest is computed when needed, some of it two or three times. Measured: docs/first-stage.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.blocks import Downsample, ImageAttention, ResnetBlock, Upsample
from ldm.models.coder import Coder, CoderBlock

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
    computed = []
    for image in images:
        x = _convolution(coder.conv_in, _given(image[None]))
        for block in coder.blocks():
            x = _block(block, x, pixels)
        x = _convolution(coder.conv_out, x, _normalization(coder.conv_norm_out, x, pixels))
        computed.append(_stored(x, x.read, pixels).read(0, x.height))
    return torch.cat(computed)


def _block(block: CoderBlock, x: _Map, pixels: int) -> _Map:
    """`CoderBlock.forward`; a change of resolution is not stored, for it is larger than what follows from it."""
    for index, resnet in enumerate(block.resnets):
        x = _resnet(resnet, x, pixels)  # type: ignore[arg-type]
        if index < len(block.attentions):
            x = _attention(block.attentions[index], x, pixels)  # type: ignore[arg-type]
    for downsample in block.downsamplers:
        x = _downsampled(downsample, x)  # type: ignore[arg-type]
    for upsample in block.upsamplers:
        x = _upsampled(upsample, x)  # type: ignore[arg-type]
    return x


def _resnet(block: ResnetBlock, x: _Map, pixels: int) -> _Map:
    """`ResnetBlock.forward` without time."""
    first = _normalization(block.norm1, x, pixels)
    second = _normalization(block.norm2, _convolution(block.conv1, x, first), pixels)

    def rows(top: int, bottom: int) -> Tensor:
        around = _part(x, max(top - 2, 0), min(bottom + 2, x.height))
        residual = _convolution(block.conv2, _convolution(block.conv1, around, first), second).read(top, bottom)
        before = around.read(top, bottom)
        return residual + (before if block.conv_shortcut is None else block.conv_shortcut(before))

    return _stored(x, rows, pixels)


def _attention(layer: ImageAttention, x: _Map, pixels: int) -> _Map:
    """`ImageAttention.forward`: queries a strip at a time, to the keys and values of all places."""
    normalize = _normalization(layer.group_norm, x, pixels, silu=False)

    def tokens(top: int, bottom: int) -> Tensor:
        return normalize(x.read(top, bottom)).flatten(2).transpose(1, 2)  # [1, n, C]

    parts = [tokens(top, bottom) for top, bottom in _strips(x, pixels)]
    key = torch.cat([layer.to_k(part) for part in parts], dim=1).unflatten(2, (layer.heads, -1))  # [1, N, heads, d]
    value = torch.cat([layer.to_v(part) for part in parts], dim=1).unflatten(2, (layer.heads, -1))

    def rows(top: int, bottom: int) -> Tensor:
        before = x.read(top, bottom)
        query = layer.to_q(tokens(top, bottom)).unflatten(2, (layer.heads, -1))  # [1, n, heads, d]
        attended = layer.to_out[0](layer.kernel(query, key, value).flatten(2))  # [1, n, C]
        return before + attended.transpose(1, 2).reshape(before.shape)

    return _stored(x, rows, pixels)


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


def _normalization(norm: nn.GroupNorm, x: _Map, pixels: int, *, silu: bool = True) -> Function:
    """`norm` with the statistics of the whole of `x`, and SiLU behind it: a function of any rows."""
    count, mean, variance = 0, torch.zeros(()), torch.zeros(())
    for top, bottom in _strips(x, pixels):
        rows = x.read(top, bottom)
        values = rows.to(torch.promote_types(rows.dtype, torch.float32)).reshape(norm.num_groups, -1)  # [G, n]
        its_variance, its_mean = torch.var_mean(values, dim=1, correction=0)  # [G]
        share = values.shape[1] / (count + values.shape[1])
        if count == 0:
            mean, variance = its_mean, its_variance
        # Two sets make one (Chan, Golub and LeVeque 1983); a mean of squares would lose digits.
        distance = its_mean - mean
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


def _stored(x: _Map, rows: Rows, pixels: int) -> _Map:
    """Computes all rows of what follows from `x`; over `x` itself where it is stored and no channels are added.

    A strip is written when the next has been computed, which looks back at what it was before.
    """
    target, waiting = x.stored, None
    for top, bottom in _strips(x, pixels):
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


def _strips(x: _Map, pixels: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of strips of about `pixels` places each, from top to bottom."""
    height = max(MIN_ROWS, pixels // x.width)
    for top in range(0, x.height, height):
        yield top, min(top + height, x.height)
