"""Layers of the UNet and the autoencoder: residual blocks, attention, changes of resolution, checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(nn.Module):
    """A block of layers whose activations can be recomputed in the backward pass instead of kept."""

    gradient_checkpointing = False

    def apply_layer(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """Calls the layer; with `gradient_checkpointing` on, only its inputs are stored (Chen et al. 2016)."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output


def enable_gradient_checkpointing(module: nn.Module, enabled: bool = True) -> None:
    """Switches gradient checkpointing in all blocks of a network: less memory, about a third more time.

    Gradients stay the same, dropout included. ValueError for a network without such blocks.
    """
    blocks = [block for block in module.modules() if isinstance(block, CheckpointedBlock)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no blocks that can be checkpointed; leave it off")
    for block in blocks:
        block.gradient_checkpointing = enabled


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection, conditioned on time if `time_channels` is given.

    DDPM (Ho et al. 2020), appendix B. With `scale_shift` (ADM, Dhariwal and Nichol 2021, section 3) time gives a factor
    and an offset after the second normalization, not an offset before it.
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
    """Halves height and width by a 3x3 convolution; padding 0 pads right and bottom only, as in LDM's autoencoders."""

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
    """Doubles height and width, or brings them to a given size, by nearest neighbors, then a 3x3 convolution."""

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
    """Sines and cosines of timesteps [B] at geometrically spaced frequencies → [B, channels], even, in float32.

    Half precision cannot tell neighboring timesteps apart: bfloat16 rounds 999 to 1000.
    """
    half = channels // 2
    # Attention is all you need (Vaswani et al. 2017), section 3.5: ω_i = 10000^(-i / half), less the shift.
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # [B, half]
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)  # [B, channels]


# Query [B, N, heads, d], key and value [B, L, heads, d] → [B, N, heads, d].
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
# Up to so many weights a head, the backward pass of torch's kernel for bfloat16 on CPUs takes several times as long as
# the plain formula (tools/benchmark_training.py).
SHORT = 128 * 128


# Without cuDNN, whose backward pass gives NaN for finite losses on Hopper cards (pytorch/pytorch#196678); it ended a
# training of ours on an H200 after 888 steps.
TRAINING_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, as `AttentionKernel`. Attention is all you need (Vaswani et al. 2017), Eq. 1."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, ., d]
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if slow and query.shape[2] * key.shape[2] <= SHORT:
        with torch.autocast("cpu", enabled=False):  # scores in float32, as the kernel has them
            scores = query.float() @ key.float().transpose(2, 3) * query.shape[3] ** -0.5  # [B, heads, N, L]
            return (scores.softmax(dim=3).to(value.dtype) @ value).transpose(1, 2)
    if query.is_cuda and torch.is_grad_enabled():
        with sdpa_kernel(TRAINING_BACKENDS):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of image positions to themselves, or to a context of `context_channels`."""

    def __init__(self, channels: int, *, heads: int, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        assert channels % heads == 0
        self.heads = heads
        self.kernel: AttentionKernel = sdpa
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # diffusers has a dropout behind it

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, N, C], context [B, L, D] or None for x itself → [B, N, C]."""
        context = x if context is None else context
        query = self.to_q(x).unflatten(2, (self.heads, -1))  # [B, N, heads, d]
        key = self.to_k(context).unflatten(2, (self.heads, -1))  # [B, L, heads, d]
        value = self.to_v(context).unflatten(2, (self.heads, -1))  # [B, L, heads, d]
        return self.to_out[0](self.kernel(query, key, value).flatten(2))  # [B, N, C]


class ImageAttention(Attention):
    """Single-head self-attention over the positions of an image, with a residual connection (VAE of LDM)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W]; there is no context."""
        assert context is None
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H W, C]
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)  # [B, C, H, W]


class GEGLU(nn.Module):
    """x → V x · gelu(W x), with both projections in one layer. GLU variants (Shazeer 2020), Eq. 5."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] → [B, N, out_channels]."""
        value, gate = self.proj(x).chunk(2, dim=2)  # [B, N, out_channels] each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer of four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # diffusers has a dropout (of 0) in the second place, which gives the third its name.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] → [B, N, C]."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Attention within the image (or to the text alone) and to the text, a feed-forward network, each residual."""

    def __init__(self, channels: int, *, heads: int, text_channels: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(channels)
        first_context = text_channels if only_cross_attention else None
        self.attn1 = Attention(channels, heads=heads, context_channels=first_context)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, context_channels=text_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B, N, C], text [B, L, D] → [B, N, C]."""
        x = x + self.attn1(self.norm1(x), text if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of an image, with a residual connection. LDM, appendix E.2.1.

    `linear_projection` says how the weights of the projections are stored: as [C, C], or [C, C, 1, 1].
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        text_channels: int,
        layers: int,
        groups: int,
        linear_projection: bool,
        only_cross_attention: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, heads=heads, text_channels=text_channels, only_cross_attention=only_cross_attention
            )
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B, C, H, W], text [B, L, D] → [B, C, H, W]."""
        hidden = self.norm(x)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)  # [B, H W, C]
        if self.linear_projection:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, text)
        if self.linear_projection:
            hidden = self.proj_out(hidden)
        hidden = hidden.transpose(1, 2).reshape(x.shape)  # [B, C, H, W]
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return x + hidden


def set_attention_backend(module: nn.Module, backend: str) -> None:
    """Chooses the kernel of all attention in a network: "sdpa", torch's own and the default, or "xformers".

    ValueError for another name, without xformers, and where the network is not on CUDA; nothing is changed then.
    """
    if backend not in ("sdpa", "xformers"):
        raise ValueError(f"unknown attention backend {backend!r}; choose 'sdpa' or 'xformers'")
    kernel: AttentionKernel = sdpa
    if backend == "xformers":
        device = next(module.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"attention backend 'xformers' needs CUDA, but the network is on {device}; use 'sdpa'")
        try:
            import xformers.ops
        except ImportError as error:
            why = "pip install xformers, or use 'sdpa'"
            raise ValueError(f"attention backend 'xformers' cannot be loaded ({error}); {why}") from error
        kernel = xformers.ops.memory_efficient_attention  # of the same layout
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.kernel = kernel
