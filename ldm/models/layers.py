"""Layers that the UNet and the autoencoder share, and gradient checkpointing for both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(nn.Module):
    """A block of layers whose activations can be recomputed in the backward pass instead of kept."""

    gradient_checkpointing = False

    def apply_layer(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """Calls the layer; with `gradient_checkpointing` on, only its inputs stay until the backward pass.

        Training deep nets with sublinear memory cost (Chen et al. 2016), section 4.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output


def enable_gradient_checkpointing(module: nn.Module, enabled: bool = True) -> None:
    """Switches gradient checkpointing in all blocks of a network: less memory, about a third more time.

    Gradients stay the same, dropout included. Raises `ValueError` for a network that has no such blocks.
    """
    blocks = [block for block in module.modules() if isinstance(block, CheckpointedBlock)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no blocks that can be checkpointed; leave it off")
    for block in blocks:
        block.gradient_checkpointing = enabled


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection, conditioned on time if `time_channels` is given.

    DDPM (Ho et al. 2020), appendix B; `scale_shift` is the adaptive group normalisation of ADM (Dhariwal and
    Nichol 2021), section 3: the time embedding gives a factor and an offset after the second normalisation
    instead of an offset before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        output_divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.output_divisor = output_divisor
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, C_in, H, W] and, with `time_channels`, the activated time [B, T] → [B, C_out, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))  # [B, C_out, H, W]
        if time is None:
            hidden = self.norm2(hidden)
        elif self.scale_shift:
            scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)  # [B, C_out, 1, 1] each
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden + self.time_emb_proj(time)[:, :, None, None])
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        output = shortcut + hidden
        return output if self.output_divisor == 1 else output / self.output_divisor


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2.

    Padding 1 pads all sides; padding 0 pads right and bottom only, as in the autoencoders of LDM.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H / 2, W / 2]."""
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width, or brings them to a given size, by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """[B, C, H, W] → [B, C, *size], or [B, C, 2 H, 2 W]."""
        size = (2 * x.shape[-2], 2 * x.shape[-1]) if size is None else size
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class TimestepEmbedding(nn.Module):
    """The two linear layers between the sinusoids of a timestep and the residual blocks."""

    def __init__(self, in_channels: int, time_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """[B, C] → [B, T]."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def timestep_sinusoids(timesteps: Tensor, channels: int, *, cosine_first: bool, freq_shift: int) -> Tensor:
    """Sines and cosines of timesteps [B] at geometrically spaced frequencies → [B, channels], in float32.

    `channels` is even. Half precision cannot tell neighbouring timesteps apart: bfloat16 rounds 999 to 1000.
    """
    half = channels // 2
    # Attention is all you need (Vaswani et al. 2017), section 3.5: ω_i = 10000^(-i / half), less the shift.
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # [B, half]
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)  # [B, channels]


def zero_(layer: nn.Conv2d | nn.Linear) -> None:
    """Sets the weights and the bias of a layer to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
