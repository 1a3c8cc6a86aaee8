"""The autoencoder against its oracle, diffusers' AutoencoderKL, and the algebra of its posterior."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm.models import (
    AutoencoderConfig,
    AutoencoderKL,
    enable_gradient_checkpointing,
    kl_divergence,
    sample_posterior,
    upgrade_state_dict,
)

TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}
SHAPES = {
    "two levels": {},
    "two layers, grey images": {"layers_per_block": 2, "in_channels": 1, "out_channels": 1},
    "three levels, no attention": {
        "block_out_channels": (8, 12, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "mid_block_add_attention": False,
    },
    "one level, no 1x1 convolutions": {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}

# The vae/config.json of runwayml/stable-diffusion-v1-5; that of 2.1 has another sample_size.
STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def tiny_autoencoder(**changes: object) -> AutoencoderKL:
    """Every weight drawn anew, so that none can be left out unseen."""
    autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(TWO_LEVELS | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return autoencoder


def images(channels: int = 3, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_weights_load_both_ways_and_outputs_agree_with_diffusers(changes: dict[str, object]) -> None:
    ours = tiny_autoencoder(**changes)
    theirs = DiffusersAutoencoder.from_config(ours.config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pictures = images(channels=ours.config.in_channels)
    with torch.no_grad():
        moments = ours.encode(pictures)
        expected_moments = theirs.encode(pictures).latent_dist.parameters
        torch.testing.assert_close(moments, expected_moments, rtol=1e-5, atol=1e-5)
        latents = torch.randn(2, 3, 8 // ours.factor, 12 // ours.factor)
        decoded, expected = ours.decode(latents), theirs.decode(latents).sample
    assert moments.shape == (2, 6, 8 // ours.factor, 12 // ours.factor)
    assert decoded.shape == pictures.shape
    assert expected.std() > 0.05
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)


def test_full_stable_diffusion_has_the_same_parameters_as_in_diffusers() -> None:
    config = AutoencoderConfig.from_dict(STABLE_DIFFUSION)
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        theirs = DiffusersAutoencoder.from_config(STABLE_DIFFUSION).state_dict()
        ours_in_diffusers = DiffusersAutoencoder.from_config(config.to_dict()).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}
    assert shapes == {name: tensor.shape for name, tensor in ours_in_diffusers.items()}
    assert len(shapes) == 248
    assert ours.factor == 8
    assert config.scaling_factor == 0.18215


def test_defaults_are_those_of_diffusers() -> None:
    theirs = dict(DiffusersAutoencoder().config)
    ours = AutoencoderConfig().to_dict()
    keys = {key for key in theirs if not key.startswith("_")}
    assert keys == (ours.keys() - {"_class_name"}) | AutoencoderConfig.neutral_values.keys()
    for key in keys:
        expected = list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key]
        assert ours[key] == expected if key in ours else expected in AutoencoderConfig.neutral_values[key], key
    assert AutoencoderConfig.from_dict(theirs) == AutoencoderConfig()


def test_forward_reconstructs_from_a_sample_of_the_posterior() -> None:
    autoencoder = tiny_autoencoder()
    noise = torch.randn(2, 3, 4, 6)
    reconstruction, moments = autoencoder(images(), noise)
    torch.testing.assert_close(moments, autoencoder.encode(images()))
    torch.testing.assert_close(reconstruction, autoencoder.decode(sample_posterior(moments, noise)))


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 11)])
def test_sizes_that_the_factor_does_not_divide_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"height {height} and width {width}: both must be divisible by 2"):
        tiny_autoencoder().encode(images(height=height, width=width))


def test_folded_statistics_normalise_the_latents_and_decode_undoes_them() -> None:
    autoencoder = tiny_autoencoder().double()
    pictures, noise = images().double(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mean = torch.tensor([0.3, -2.0, 5.0])
    std = torch.tensor([0.01, 3.0, 40.0])
    with torch.no_grad():
        moments = autoencoder.encode(pictures)
        latents = sample_posterior(moments, noise)
        decoded = autoencoder.decode(latents)
        autoencoder.fold_statistics(mean, std)
        folded = autoencoder.encode(pictures)
        folded_latents = sample_posterior(folded, noise)
        redecoded = autoencoder.decode(folded_latents)
    shift, scale = mean.double()[:, None, None], std.double()[:, None, None]
    exact = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(folded_latents, (latents - shift) / scale, **exact)
    torch.testing.assert_close(folded[:, :3], (moments[:, :3] - shift) / scale, **exact)
    torch.testing.assert_close(folded[:, 3:], moments[:, 3:] - 2 * scale.log(), **exact)
    torch.testing.assert_close(redecoded, decoded, **exact)


def test_folding_keeps_the_dtype_and_the_place_of_the_weights() -> None:
    autoencoder = tiny_autoencoder().to(torch.bfloat16)
    weight = autoencoder.quant_conv.weight
    autoencoder.fold_statistics(torch.zeros(3), torch.full((3,), 2.0))
    assert autoencoder.quant_conv.weight is weight
    assert weight.dtype == torch.bfloat16
    assert weight.requires_grad


@pytest.mark.parametrize("missing", ["use_quant_conv", "use_post_quant_conv"])
def test_statistics_cannot_be_folded_without_both_convolutions(missing: str) -> None:
    with pytest.raises(ValueError, match="use_quant_conv and use_post_quant_conv must be true"):
        tiny_autoencoder(**{missing: False}).fold_statistics(torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 0.0], [1.0, 1.0], r"\(2,\) and \(2,\): must be \(3,\)"),
        ([0.0, 0.0, 0.0], [1.0, 0.0, 1.0], "the latter above zero"),
        ([0.0, 0.0, 0.0], [1.0, float("inf"), 1.0], "must be finite"),
        ([0.0, float("nan"), 0.0], [1.0, 1.0, 1.0], "must be finite"),
    ],
)
def test_impossible_statistics_are_refused(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder().fold_statistics(torch.tensor(mean), torch.tensor(std))


def test_posterior_and_divergence_agree_with_torch_and_diffusers() -> None:
    moments = 3 * torch.randn(2, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(moments), expected)
    torch.testing.assert_close(kl_divergence(moments), DiagonalGaussianDistribution(moments).kl())
    torch.testing.assert_close(sample_posterior(moments, noise), posterior.loc + posterior.scale * noise)
    assert torch.equal(sample_posterior(moments), mean)


@pytest.mark.parametrize(("log_variance", "clamped"), [(500.0, 20.0), (-500.0, -30.0)])
def test_the_log_variance_is_clamped(log_variance: float, clamped: float) -> None:
    moments = torch.tensor([0.0, log_variance], dtype=torch.float64).view(1, 2, 1, 1)
    expected = torch.tensor(clamped / 2, dtype=torch.float64).exp()
    torch.testing.assert_close(sample_posterior(moments, torch.ones(1, 1, 1, 1).double()).squeeze(), expected)
    torch.testing.assert_close(kl_divergence(moments).squeeze(), 0.5 * (expected.square() - 1 - clamped))


def test_the_divergence_of_half_precision_moments_does_not_overflow() -> None:
    divergence = kl_divergence(torch.full((1, 2, 1, 1), 15.0, dtype=torch.float16))
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence, torch.tensor([0.5 * (15.0**2 + 3269017.372 - 1 - 15.0)]))


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_weights_are_renamed(as_convolutions: bool) -> None:
    autoencoder = tiny_autoencoder()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in autoencoder.state_dict().items():
        if ".attentions." in name and "group_norm" not in name:
            for new_name, old_name in old_names.items():
                name = name.replace(new_name, old_name)
            tensor = tensor[:, :, None, None] if as_convolutions and tensor.ndim == 2 else tensor
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    upgraded = upgrade_state_dict(old)
    fresh = AutoencoderKL(autoencoder.config)
    fresh.load_state_dict(upgraded, strict=True)
    torch.testing.assert_close(fresh.encode(images()), autoencoder.encode(images()))
    assert upgrade_state_dict(upgraded).keys() == upgraded.keys()
    DiffusersAutoencoder.from_config(autoencoder.config.to_dict()).load_state_dict(upgraded, strict=True)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    autoencoder = tiny_autoencoder()
    noise = torch.randn(2, 3, 4, 6)

    def gradients() -> tuple[list[Tensor], int]:
        autoencoder.zero_grad()
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            reconstruction, moments = autoencoder(images(), noise)
        (reconstruction.square().mean() + kl_divergence(moments).mean()).backward()
        return [parameter.grad.clone() for parameter in autoencoder.parameters()], saved

    plain, plain_saved = gradients()
    enable_gradient_checkpointing(autoencoder)
    checkpointed, checkpointed_saved = gradients()
    assert checkpointed_saved < plain_saved / 3
    for one, two in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    autoencoder = tiny_autoencoder()
    with torch.no_grad():
        expected = autoencoder(images())[0]
        reconstruction, moments = autoencoder.to(dtype)(images().to(dtype))
    assert reconstruction.dtype == moments.dtype == dtype
    assert (reconstruction.float() - expected).std() < 0.05 * expected.std()
