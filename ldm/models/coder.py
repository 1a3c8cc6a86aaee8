"""Encoder and decoder that all first stages share, and their config."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.blocks import CheckpointedBlock, Downsample, ImageAttention, ResnetBlock, Upsample
from ldm.models.component_config import ComponentConfig, refuse

# Encoder and decoder of LDM; no config key of diffusers reaches it.
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class CoderConfig(ComponentConfig):
    """Shape of encoder and decoder, which all first stages share.

    `scaling_factor`, `sample_size` and `force_upcast` do not concern the network; they are for those who use it.
    """

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
            raise ValueError(
                f"image of height {height} and width {width}: both must be divisible by {self.factor}, "
                "by which the autoencoder reduces images"
            )


class CoderBlock(CheckpointedBlock):
    """One level of the encoder or the decoder, or the middle of either.

    Residual blocks, with `attention` after the first of them, then a change of resolution.
    """

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
        self.attentions = nn.ModuleList(
            [ImageAttention(out_channels, groups=groups, eps=NORM_EPS)] if attention else []
        )
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
        self.down_blocks = nn.ModuleList(
            CoderBlock(
                config,
                widths[max(level - 1, 0)],
                widths[level],
                layers=config.layers_per_block,
                downsample=level < len(widths) - 1,
            )
            for level in range(len(widths))
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
        self.up_blocks = nn.ModuleList(
            CoderBlock(
                config,
                widths[max(level - 1, 0)],
                widths[level],
                layers=config.layers_per_block + 1,
                upsample=level < len(widths) - 1,
            )
            for level in range(len(widths))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def blocks(self) -> list[CoderBlock]:
        return [self.mid_block, *self.up_blocks]


def check_statistics(mean: Tensor, std: Tensor, channels: int) -> None:
    """Raises ValueError unless there is one finite mean and one finite std above zero for each channel."""
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ValueError(
            f"mean and deviation of shapes {tuple(mean.shape)} and {tuple(std.shape)}: must be "
            f"{(channels,)}, one number a channel of the latents"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(
            f"mean {mean.tolist()} and deviation {std.tolist()}: must be finite, the latter above zero; "
            "where a channel never changes, train with fewer latent_channels"
        )
