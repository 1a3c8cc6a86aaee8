"""Configs of networks: what is read, what is refused, and what is written."""

from __future__ import annotations

import dataclasses
import json

import pydantic
import pytest

from ldm.models import AutoencoderConfig, UNetConfig, VQConfig

TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "mid_block_type": None,
    "attention_head_dim": [2, 3],
    "sample_size": [8, 16],
}


@pytest.mark.parametrize("config", [UNetConfig.from_dict(TWO_LEVELS), AutoencoderConfig()])
def test_a_config_survives_json(config: UNetConfig | AutoencoderConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["_class_name"] == config.diffusers_class


def test_sequences_become_tuples_and_the_config_is_frozen() -> None:
    config = UNetConfig.from_dict(TWO_LEVELS)
    assert config.block_out_channels == (8, 16)
    assert config.sample_size == (8, 16)
    hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.in_channels = 3  # type: ignore[misc]


def test_neutral_values_of_unsupported_keys_are_accepted() -> None:
    for key, values in UNetConfig.neutral_values.items():
        for value in values:
            assert UNetConfig.from_dict({key: value}) == UNetConfig()


@pytest.mark.parametrize("key", sorted(UNetConfig.neutral_values))
def test_other_values_of_unsupported_keys_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} = 'other': this option of diffusers is not supported"):
        UNetConfig.from_dict({key: "other"})


def test_notes_of_libraries_are_skipped() -> None:
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 1000, "power": 2 / 3}
    ema |= {"update_after_step": 0, "use_ema_warmup": False}
    notes = {"_class_name": "x", "_diffusers_version": "0.36", "_name_or_path": "a/b", "_commit_hash": None}
    notes |= {"torch_dtype": "float16", "dtype": "bfloat16", "quantization_config": None}
    for config in (UNetConfig, AutoencoderConfig, VQConfig):
        assert config.from_dict(ema | notes) == config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dual_cross_attention": 0}, "dual_cross_attention = 0: .* must be False"),
        ({"resnet_out_scale_factor": True}, "resnet_out_scale_factor = True: .* must be 1.0"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention = True: .* None or False"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8: .* must be None"),
        ({"block_out_chanels": [8]}, "unknown key 'block_out_chanels', .*; the nearest .* 'block_out_channels'"),
        ({"class_embed_typ": None}, "unknown key 'class_embed_typ', .*; the nearest .* 'class_embed_type'"),
        ({"use_flux": True}, "unknown key 'use_flux', which UNet2DConditionModel does not have; leave it out$"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config = .*full or half precision"),
        ({"quantization_config": {}}, "quantization_config = {}: "),
    ],
)
def test_keys_that_cannot_be_read_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": "4"}, "in_channels = '4': must be int"),
        ({"in_channels": True}, "in_channels = True: must be int"),
        ({"in_channels": 4.0}, "in_channels = 4.0: must be int"),
        ({"in_channels": 0}, "in_channels = 0: must be above zero"),
        ({"norm_eps": float("inf")}, "norm_eps = inf: must be finite"),
        ({"norm_eps": None}, "norm_eps = None: must be float"),
        ({"center_input_sample": 1}, "center_input_sample = 1: must be bool"),
        ({"sample_size": [8, 8, 8]}, r"sample_size = \[8, 8, 8\]: must be int or list of 2 int or null$"),
        ({"block_out_channels": [8, "16"]}, r"block_out_channels = \[8, '16'\]: must be list of int$"),
        ({"block_out_channels": [8, -16]}, r"block_out_channels = \[8, -16\]: must be above zero"),
        ({"block_out_channels": []}, r"block_out_channels = \[\]: needs at least one level"),
        ({"block_out_channels": [8, 16, 24]}, r"down_block_types = .*: needs 3 values, .* but has 2"),
        ({"up_block_types": ["UpBlock2D"]}, r"up_block_types = \['UpBlock2D'\]: needs 2 values"),
        ({"layers_per_block": [1]}, r"layers_per_block = \[1\]: needs 2 values"),
        ({"attention_head_dim": [1, 1, 1]}, r"attention_head_dim = \[1, 1, 1\]: needs 2 values"),
        ({"transformer_layers_per_block": [1]}, r"transformer_layers_per_block = \[1\]: needs 2 values"),
        ({"only_cross_attention": [True]}, r"only_cross_attention = \[True\]: needs 2 values"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "'AttnDownBlock2D' is not supported"),
        ({"up_block_types": ["DownBlock2D", "UpBlock2D"]}, "choose from CrossAttnUpBlock2D, UpBlock2D"),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "must be 'UNetMidBlock2DCrossAttn' or 'UNetMidBlock2D' or null$",
        ),
        ({"norm_num_groups": 5}, "norm_num_groups = 5: must divide the 8 channels"),
        ({"attention_head_dim": 3}, "attention_head_dim = 3: .* 3 does not divide the 8 channels"),
        (
            {"attention_head_dim": [2, 5], "mid_block_type": "UNetMidBlock2DCrossAttn"},
            "5 does not divide the 16",
        ),
        ({"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
        ({"downsample_padding": 2}, "downsample_padding = 2: must be 0 or 1"),
        ({"conv_in_kernel": 2}, "conv_in_kernel = 2: must be odd"),
        (
            {"freq_shift": 4},
            r"block_out_channels = \[8, 16\]: the first must be even and above twice freq_shift",
        ),
        ({"block_out_channels": [5, 10], "norm_num_groups": 5}, "the first must be even"),
        ({"cross_attention_dim": [4, 4]}, r"cross_attention_dim = \[4, 4\]: must be int"),
    ],
)
def test_impossible_unets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(TWO_LEVELS | changes)


def test_heads_need_to_divide_channels_only_where_there_is_attention() -> None:
    UNetConfig.from_dict(TWO_LEVELS)  # 3 heads and 16 channels, but without attention
    for changes in (
        {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
    ):
        with pytest.raises(ValueError, match="3 does not divide the 16 channels"):
            UNetConfig.from_dict(TWO_LEVELS | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [32, 64]}, "down_block_types = .*: needs 2 names, .* but has 1"),
        ({"up_block_types": []}, r"up_block_types = \[\]: needs 1 names"),
        ({"block_out_channels": []}, "needs at least one level"),
        ({"block_out_channels": [48]}, "norm_num_groups = 32: must divide the 48 channels"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "'AttnDownEncoderBlock2D' is not supported"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean = \[0.0, 0.0, 0.0, 0.0\]: this option .* not supported"),
        ({"layers_per_block": [1]}, "layers_per_block = .*: must be int"),
        ({"latent_chanels": 4}, "nearest key of AutoencoderKL is 'latent_channels'"),
    ],
)
def test_impossible_autoencoders_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig.from_dict(changes)


@pytest.mark.parametrize("config_class", [UNetConfig, AutoencoderConfig])
def test_pydantic_validates_the_configs_and_forbids_unknown_keys(config_class: type) -> None:
    adapter = pydantic.TypeAdapter(config_class)
    assert adapter.validate_python({"in_channels": 1}) == config_class(in_channels=1)
    with pytest.raises(pydantic.ValidationError, match="norm_num_groups = 7: must divide"):
        adapter.validate_python({"norm_num_groups": 7})
    with pytest.raises(pydantic.ValidationError, match="block_out_chanels"):
        adapter.validate_python({"block_out_chanels": [32]})
