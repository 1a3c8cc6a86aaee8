"""The UNet against its oracle, diffusers' UNet2DConditionModel."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldm.models import UNet, UNetConfig, enable_gradient_checkpointing
from ldm.models.blocks import ResnetBlock, SpatialTransformer, timestep_sinusoids

TWO_LEVELS = {
    "in_channels": 3,
    "out_channels": 5,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
DOWN, ATTENTION_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, ATTENTION_UP = "UpBlock2D", "CrossAttnUpBlock2D"

SHAPES = {
    "attention at the top": {},
    "attention at the bottom": {
        "down_block_types": (DOWN, ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, UP),
    },
    "different blocks down and up": {
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (ATTENTION_UP, ATTENTION_UP),
    },
    "heads per level": {
        "down_block_types": (ATTENTION_DOWN,) * 2,
        "up_block_types": (ATTENTION_UP,) * 2,
        "attention_head_dim": (2, 8),
    },
    "linear projections, two transformer layers": {
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
    },
    "layers per level": {"layers_per_block": (2, 1), "transformer_layers_per_block": (1, 2)},
    "three levels": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": (DOWN, ATTENTION_DOWN, DOWN),
        "up_block_types": (UP, ATTENTION_UP, UP),
        "layers_per_block": (1, 2, 1),
        "attention_head_dim": (1, 3, 2),
        "only_cross_attention": (False, True, False),
    },
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": (ATTENTION_DOWN,),
        "up_block_types": (ATTENTION_UP,),
    },
    "no middle": {"mid_block_type": None},
    "middle without attention": {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 2.0},
    "middle scaled": {"mid_block_scale_factor": 1.5, "only_cross_attention": True},
    "scale and shift by time": {"resnet_time_scale_shift": "scale_shift"},
    "sine first, shifted frequencies": {"flip_sin_to_cos": False, "freq_shift": 1},
    "centred input, other kernels": {
        "center_input_sample": True,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "norm_eps": 1e-2,
        "downsample_padding": 0,
    },
}

# The unet/config.json of runwayml/stable-diffusion-v1-5 and of stabilityai/stable-diffusion-2-1.
STABLE_DIFFUSION_1_5 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [ATTENTION_DOWN, ATTENTION_DOWN, ATTENTION_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, ATTENTION_UP, ATTENTION_UP, ATTENTION_UP],
}
STABLE_DIFFUSION_2_1 = STABLE_DIFFUSION_1_5 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def tiny_config(**changes: object) -> UNetConfig:
    return UNetConfig.from_dict(TWO_LEVELS | changes)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Every weight drawn anew, those that start at zero or one included: an unused one would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(config: UNetConfig, *, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, config.in_channels, height, width, generator=generator)
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    return sample, torch.tensor([3, 981]), text


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_weights_load_both_ways_and_outputs_agree_with_diffusers(changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    ours = randomised(UNet(config))
    theirs = UNet2DConditionModel.from_config(config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    sample, timestep, text = inputs(config)
    with torch.no_grad():
        output = ours(sample, timestep, text)
        expected = theirs(sample, timestep, text).sample
    assert output.shape == expected.shape == (2, 5, 8, 12)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (9, 5), (6, 6)])
def test_sizes_that_do_not_halve_evenly_agree_with_diffusers(height: int, width: int) -> None:
    config = UNetConfig.from_dict(
        TWO_LEVELS
        | {
            "block_out_channels": [8, 8, 8],
            "down_block_types": ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * 2,
        }
    )
    ours = randomised(UNet(config))
    theirs = UNet2DConditionModel.from_config(config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    sample, timestep, text = inputs(config, height=height, width=width)
    with torch.no_grad():
        output, expected = ours(sample, timestep, text), theirs(sample, timestep, text).sample
    assert output.shape == (*sample.shape[:1], config.out_channels, height, width)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("published", [STABLE_DIFFUSION_1_5, STABLE_DIFFUSION_2_1], ids=["1.5", "2.1"])
def test_full_stable_diffusion_has_the_same_parameters_as_in_diffusers(published: dict[str, object]) -> None:
    config = UNetConfig.from_dict(published)
    with torch.device("meta"):
        ours = UNet(config).state_dict()
        theirs = UNet2DConditionModel.from_config(published).state_dict()
        ours_in_diffusers = UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}
    assert shapes == {name: tensor.shape for name, tensor in ours_in_diffusers.items()}
    assert len(shapes) == 686


def test_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel()
    ours = UNetConfig().to_dict()
    for key, value in theirs.config.items():
        if key in ours:
            assert ours[key] == (list(value) if isinstance(value, tuple) else value), key
        else:
            assert key.startswith("_") or value in UNetConfig.neutral_values[key], key
    keys = {key for key in theirs.config if not key.startswith("_")}
    assert keys == (ours.keys() - {"_class_name"}) | UNetConfig.neutral_values.keys()
    assert UNetConfig.from_dict(dict(theirs.config)) == UNetConfig()


def test_dropout_stands_in_every_residual_block_as_in_diffusers() -> None:
    config = tiny_config(dropout=0.25)
    theirs = UNet2DConditionModel.from_config(config.to_dict())

    def rates(network: torch.nn.Module) -> list[float]:
        return sorted(layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout) and layer.p)

    blocks = [module for module in UNet(config).modules() if isinstance(module, ResnetBlock)]
    assert rates(UNet(config)) == rates(theirs) == [0.25] * len(blocks)
    ours = randomised(UNet(config))
    assert not torch.equal(ours(*inputs(config)), ours(*inputs(config)))  # in training mode


def test_a_new_network_predicts_zero_and_its_residual_branches_add_nothing() -> None:
    config = tiny_config()
    unet = UNet(config)
    assert not unet(*inputs(config)).any()
    x, time, text = torch.randn(2, 8, 4, 4), torch.randn(2, 32), torch.randn(2, 5, 6)
    for module in unet.modules():
        if isinstance(module, ResnetBlock) and module.conv_shortcut is None and module.conv1.in_channels == 8:
            torch.testing.assert_close(module(x, time), x)
        if isinstance(module, SpatialTransformer) and module.norm.num_channels == 8:
            torch.testing.assert_close(module(x, text), x)
    unet(*inputs(config)).sum().backward()
    assert unet.conv_out.weight.grad is not None
    assert unet.conv_out.weight.grad.any()


def test_a_scalar_timestep_holds_for_the_whole_batch() -> None:
    config = tiny_config()
    unet = randomised(UNet(config))
    sample, _, text = inputs(config)
    expected = unet(sample, torch.tensor([7, 7]), text)
    torch.testing.assert_close(unet(sample, torch.tensor(7), text), expected)
    torch.testing.assert_close(unet(sample, torch.tensor(7.0), text), expected)
    assert not torch.allclose(unet(sample, torch.tensor(8.0), text), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_is_close_to_float32(dtype: torch.dtype) -> None:
    config = tiny_config()
    unet = randomised(UNet(config))
    sample, timestep, text = inputs(config)
    with torch.no_grad():
        expected = unet(sample, timestep, text)
        output = unet.to(dtype)(sample.to(dtype), timestep, text.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).std() < 0.05 * expected.std()


def test_sinusoids_tell_neighbouring_late_timesteps_apart() -> None:
    # In bfloat16 both timesteps would be 1000.
    late = timestep_sinusoids(torch.tensor([998, 999]), 16, cosine_first=True, freq_shift=0)
    assert late.dtype == torch.float32
    exact = torch.tensor([998.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(late[:, 0].double(), exact.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(late[:, 8].double(), exact.sin(), rtol=0, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    config = tiny_config(dropout=0.3, layers_per_block=2)
    unet = randomised(UNet(config))

    def gradients() -> tuple[list[Tensor], int]:
        unet.zero_grad()
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = unet(*inputs(config)).square().mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in unet.parameters()], saved

    plain, plain_saved = gradients()
    enable_gradient_checkpointing(unet)
    checkpointed, checkpointed_saved = gradients()
    enable_gradient_checkpointing(unet, enabled=False)
    again, again_saved = gradients()
    assert checkpointed_saved < plain_saved / 3
    assert again_saved == plain_saved
    for one, two, three in zip(plain, checkpointed, again, strict=True):
        assert one.any()
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


def test_checkpointing_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no blocks that can be checkpointed"):
        enable_gradient_checkpointing(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("height", "width", "channels", "text_channels", "message"),
    [
        (8, 8, 4, 6, "latents have 4 channels, but the UNet has in_channels 3"),
        (8, 8, 3, 7, "text states have width 7, but cross_attention_dim of the UNet is 6"),
    ],
)
def test_inputs_of_a_wrong_shape_are_named(
    height: int, width: int, channels: int, text_channels: int, message: str
) -> None:
    sample, text = torch.zeros(1, channels, height, width), torch.zeros(1, 2, text_channels)
    with pytest.raises(ValueError, match=message):
        UNet(tiny_config())(sample, torch.tensor(0), text)
