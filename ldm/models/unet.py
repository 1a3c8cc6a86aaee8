"""The denoiser: a UNet with cross-attention to text, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.blocks import (
    CheckpointedBlock,
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    timestep_sinusoids,
)
from ldm.models.component_config import ComponentConfig, refuse

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True, kw_only=True)
class UNetConfig(ComponentConfig):
    """Shape of a UNet: keys, meanings and defaults of diffusers' `UNet2DConditionModel`.

    A tuple has one value a level, from the largest image to the smallest (`up_block_types`: the other way round); a
    single value holds for all. `attention_head_dim` is the *number* of heads, as diffusers reads it. `upcast_attention`
    changes nothing: all kernels accumulate the scores in float32.
    """

    __pydantic_config__ = {"extra": "forbid"}
    diffusers_class: ClassVar[str] = "UNet2DConditionModel"
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(
            (
                *("addition_embed_type", "addition_time_embed_dim", "class_embed_type", "cross_attention_norm"),
                *("encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads", "num_class_embeds"),
                *("projection_class_embeddings_input_dim", "reverse_transformer_layers_per_block"),
                *("time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act"),
            ),
            (None,),
        ),
        "act_fn": ("silu",),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "dual_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "resnet_out_scale_factor": (1.0, 1),
        "resnet_skip_time_act": (False,),
        "time_embedding_type": ("positional",),
    }

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def __post_init__(self) -> None:
        self.check_numbers()
        self.check_positive(
            "in_channels", "out_channels", "block_out_channels", "layers_per_block", "mid_block_scale_factor",
            "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block",
            "attention_head_dim", "conv_in_kernel", "conv_out_kernel",
        )  # fmt: skip
        self.check_names("down_block_types", DOWN_BLOCKS)
        self.check_names("up_block_types", UP_BLOCKS)
        levels = len(self.block_out_channels)
        if levels == 0:
            refuse("block_out_channels", (), "needs at least one level")
        for key in (
            "down_block_types", "up_block_types", "only_cross_attention", "layers_per_block",
            "transformer_layers_per_block", "attention_head_dim",
        ):  # fmt: skip
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                refuse(key, value, f"needs {levels} values, one for each of block_out_channels, but has {len(value)}")
        first = self.block_out_channels[0]
        if first % 2 or first // 2 <= self.freq_shift:
            why = f"the first must be even and above twice freq_shift = {self.freq_shift} (time embedding)"
            refuse("block_out_channels", self.block_out_channels, why)
        attention = [name.startswith("CrossAttn") for name in self.down_block_types]
        for level, name in enumerate(reversed(self.up_block_types)):
            attention[level] |= name.startswith("CrossAttn")
        attention[-1] |= self.mid_block_type == "UNetMidBlock2DCrossAttn"
        all_heads = self.per_level(self.attention_head_dim)
        for channels, heads, has_attention in zip(self.block_out_channels, all_heads, attention, strict=True):
            if channels % self.norm_num_groups:
                refuse("norm_num_groups", self.norm_num_groups, f"must divide the {channels} channels of every level")
            if has_attention and channels % heads:
                why = f"is the number of heads, but {heads} does not divide the {channels} channels there"
                refuse("attention_head_dim", self.attention_head_dim, why)
        if not 0 <= self.dropout < 1:
            refuse("dropout", self.dropout, "must be at least 0 and below 1")
        if self.downsample_padding not in (0, 1):
            refuse("downsample_padding", self.downsample_padding, "must be 0 or 1")
        for key in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, key) % 2 == 0:
                refuse(key, getattr(self, key), "must be odd, so that the output is as large as the input")

    @property
    def learned_variance(self) -> bool:
        """Whether half of the output is ν, which says the variance of a step (Improved DDPM, arXiv:2102.09672)."""
        return self.out_channels == 2 * self.in_channels

    def per_level(self, value: Any) -> tuple[Any, ...]:
        """A value that may stand for all levels, written out for each."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class UNetBlock(CheckpointedBlock):
    """One level of the way down or up, or the middle: residual blocks, and attention to the text after them.

    `resnets` are input and output channels of the residual blocks; attention follows the first `attentions` of them. On
    the way down ("push") results go onto the stack of skip connections, which the way up ("pop") reads.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        resnets: list[tuple[int, int]],
        *,
        attentions: int,
        skips: Literal["push", "pop"] | None = None,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.skips = skips
        in_middle = skips is None
        channels = config.block_out_channels[level]
        self.resnets = nn.ModuleList(
            ResnetBlock(
                in_channels,
                out_channels,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_channels=4 * config.block_out_channels[0],
                scale_shift=config.resnet_time_scale_shift == "scale_shift",
                dropout=config.dropout,
                output_divisor=config.mid_block_scale_factor if in_middle else 1.0,
            )
            for in_channels, out_channels in resnets
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels,
                heads=config.per_level(config.attention_head_dim)[level],
                text_channels=config.cross_attention_dim,
                layers=config.per_level(config.transformer_layers_per_block)[level],
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                # In the middle diffusers ignores this option.
                only_cross_attention=not in_middle and config.per_level(config.only_cross_attention)[level],
            )
            for _ in range(attentions)
        )
        self.downsamplers = nn.ModuleList([Downsample(channels, config.downsample_padding)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def forward(self, x: Tensor, time: Tensor, text: Tensor, stack: list[Tensor]) -> Tensor:
        """x [B, C, H, W], time [B, T], text [B, L, D] → [B, C', H', W']; pushes onto or pops from `stack`."""
        for index, resnet in enumerate(self.resnets):
            if self.skips == "pop":
                x = torch.cat([x, stack.pop()], dim=1)  # [B, C + C_skip, H, W]
            x = self.apply_layer(resnet, x, time)
            if index < len(self.attentions):
                x = self.apply_layer(self.attentions[index], x, text)
            if self.skips == "push":
                stack.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # [B, C, H / 2, W / 2]
            stack.append(x)
        for upsample in self.upsamplers:
            # To the size of the next skip connection: sizes that were odd on the way down come back.
            x = upsample(x, stack[-1].shape[-2:])  # [B, C, 2 H, 2 W]
        return x


class UNet(nn.Module):
    """The denoiser of latent diffusion (Rombach et al. 2022, section 3.3): (x_t, t, text) → prediction.

    Parameters are named as in diffusers' `UNet2DConditionModel`, so that weights load both ways. A new
    network predicts zero and its residual branches add nothing, as the last layer of each is zero.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        kernel_in, kernel_out = config.conv_in_kernel, config.conv_out_kernel
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel_in, padding=kernel_in // 2)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.down_blocks = nn.ModuleList()
        layers, width, skip_widths = config.per_level(config.layers_per_block), first, [first]
        for level, block_type in enumerate(config.down_block_types):
            channels, downsample = config.block_out_channels[level], level < len(layers) - 1
            resnets = [(width, channels)] + [(channels, channels)] * (layers[level] - 1)
            attentions = len(resnets) if block_type == "CrossAttnDownBlock2D" else 0
            block = UNetBlock(config, level, resnets, attentions=attentions, skips="push", downsample=downsample)
            self.down_blocks.append(block)
            skip_widths += [channels] * (layers[level] + downsample)
            width = channels
        self.mid_block: UNetBlock | None = None
        if config.mid_block_type is not None:
            attentions = 1 if config.mid_block_type == "UNetMidBlock2DCrossAttn" else 0
            self.mid_block = UNetBlock(config, -1, [(last, last)] * (1 + attentions), attentions=attentions)
        self.up_blocks = nn.ModuleList()
        for level, block_type in zip(reversed(range(len(layers))), config.up_block_types, strict=True):
            channels, resnets = config.block_out_channels[level], []
            for _ in range(layers[level] + 1):  # each pops a skip connection
                resnets.append((width + skip_widths.pop(), channels))
                width = channels
            attentions = len(resnets) if block_type == "CrossAttnUpBlock2D" else 0
            block = UNetBlock(config, level, resnets, attentions=attentions, skips="pop", upsample=level > 0)
            self.up_blocks.append(block)
        assert not skip_widths
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel_out, padding=kernel_out // 2)
        # The last layer of each branch begins at zero, as in the code of DDPM (init_scale=0) and LDM (zero_module).
        branches = [module.conv2 for module in self.modules() if isinstance(module, ResnetBlock)]
        transformers = [module.proj_out for module in self.modules() if isinstance(module, SpatialTransformer)]
        for layer in (self.conv_out, *branches, *transformers):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Predicts noise, or what else the network was trained for, at timesteps of the training schedule.

        sample [B, in_channels, H, W], timestep [B] or a scalar (int64 or float), encoder_hidden_states [B, L,
        cross_attention_dim], all but the timestep in the dtype of the weights → [B, out_channels, H, W]. ValueError for
        wrong channels.
        """
        config, width = self.config, encoder_hidden_states.shape[-1]
        if sample.shape[1] != config.in_channels:
            channels = sample.shape[1]
            raise ValueError(f"latents have {channels} channels, but the UNet has in_channels {config.in_channels}")
        if width != config.cross_attention_dim:
            wanted = f"cross_attention_dim of the UNet is {config.cross_attention_dim}"
            raise ValueError(f"text states have width {width}, but {wanted}; use the text encoder of this model")
        if config.center_input_sample:
            sample = 2 * sample - 1
        sinusoids = timestep_sinusoids(
            timestep.to(sample.device).expand(sample.shape[0]),
            config.block_out_channels[0],
            cosine_first=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )  # [B, C_0]
        time = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))  # [B, T]
        time = F.silu(time)  # once here; diffusers does it in each residual block

        x = self.conv_in(sample)  # [B, C_0, H, W]
        stack = [x]
        for block in self.down_blocks:
            x = block(x, time, encoder_hidden_states, stack)
        if self.mid_block is not None:
            x = self.mid_block(x, time, encoder_hidden_states, stack)
        for block in self.up_blocks:
            x = block(x, time, encoder_hidden_states, stack)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # [B, out_channels, H, W]
