"""The autoencoder with a codebook against its oracle, diffusers' VQModel, and the gradients of its codes."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import VQModel as DiffusersVQModel
from torch import Tensor

from ldm.models import VectorQuantizer, VQConfig, VQModel, autoencoder, codebook_usage

TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "num_vq_embeddings": 40,
}
SHAPES = {
    "two levels": {},
    "codes of other width than the latents beyond them": {"latent_channels": 5, "vq_embed_dim": 2},
    "three levels, two layers, no attention": {
        "block_out_channels": (8, 12, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "mid_block_add_attention": False,
    },
}


def tiny_vq(**changes: object) -> VQModel:
    """Every weight drawn anew, so that none can be left out unseen and many codes are used."""
    model = VQModel(VQConfig.from_dict(TWO_LEVELS | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "quantize" not in name else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def images(height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_weights_load_both_ways_and_outputs_agree_with_diffusers(changes: dict[str, object]) -> None:
    ours = tiny_vq(**changes)
    theirs = DiffusersVQModel.from_config(ours.config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        latents = ours.encode(images())
        torch.testing.assert_close(latents, theirs.encode(images()).latents, rtol=1e-5, atol=1e-5)
        noise = torch.randn(2, ours.channels, 4, 6, generator=torch.Generator().manual_seed(2))
        codes, loss, (_, _, indices) = theirs.quantize(noise)
        found = ours.quantize(noise)
        decoded, expected = ours.decode(noise), theirs.decode(noise).sample
    assert latents.shape == (2, ours.channels, 8 // ours.factor, 12 // ours.factor)
    assert len(indices.unique()) > 5
    assert torch.equal(found.indices.flatten(), indices)
    torch.testing.assert_close(found.latents, codes)
    # Theirs has β on the wrong term, which does not change the number.
    torch.testing.assert_close((found.codebook + theirs.quantize.beta * found.commitment).mean(), loss)
    assert expected.std() > 0.05
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_diffusers() -> None:
    theirs = dict(DiffusersVQModel(block_out_channels=(32,)).config) | {"block_out_channels": (64,)}
    ours = VQConfig().to_dict()
    keys = {key for key in theirs if not key.startswith("_")}
    assert keys == (ours.keys() - {"_class_name"}) | VQConfig.neutral_values.keys()
    for key in keys:
        expected = list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key]
        assert ours[key] == expected if key in ours else expected in VQConfig.neutral_values[key], key
    assert VQConfig.from_dict(theirs) == VQConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vq_embeddings": 0}, "num_vq_embeddings = 0: must be above zero"),
        ({"vq_embed_dim": 0}, "vq_embed_dim = 0: must be above zero"),
        ({"latents_mean": [0.0, 0.0, 0.0]}, "needs latents_std beside it"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 2}, r"latents_std = \[1.0, 1.0\]: needs 3 numbers"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0, 0.0, 1.0]}, "latents_std = .*must be above zero"),
        ({"norm_type": "spatial"}, "norm_type = 'spatial': this option of diffusers is not supported"),
        ({"num_vq_embedings": 4}, "nearest key of VQModel is 'num_vq_embeddings'"),
        ({"norm_num_groups": 3}, "norm_num_groups = 3: must divide the 8 channels"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig.from_dict(TWO_LEVELS | changes)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_the_nearest_code_is_found_far_from_zero_and_with_a_small_table(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where |z|² is a million times the squared distances, float32 keeps none of their digits."""
    quantizer = VectorQuantizer(50, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(offset + torch.randn(50, 3, generator=generator))
    latents = offset + torch.randn(2, 3, 5, 7, generator=generator)
    rows = latents.double().movedim(1, -1).reshape(-1, 3)
    expected = (rows[:, None] - quantizer.embedding.weight.double()).square().sum(dim=-1).argmin(dim=1)
    tables = []

    def addmm(*arguments: Tensor, alpha: int) -> Tensor:
        tables.append(multiply(*arguments, alpha=alpha))
        return tables[-1]

    multiply = torch.addmm
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(autoencoder, "MAX_DISTANCES", 350)
    assert torch.equal(quantizer.nearest(latents).flatten(), expected)
    assert [len(table) for table in tables] == [7] * 10
    assert max(table.numel() for table in tables) == 350


def test_codes_and_encoder_each_learn_from_their_own_loss() -> None:
    """VQ-VAE, Eq. 3: the gradient of the reconstruction passes straight through to the encoder, past the codes."""
    quantizer = VectorQuantizer(6, 2)
    torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(0))
    weight = quantizer.embedding.weight
    latents = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = quantizer(latents)
    codes = weight[found.indices].movedim(-1, 1)
    assert torch.equal(found.latents, codes), "the value is the code, to the last bit"
    assert torch.equal(found.moments, latents)
    torch.testing.assert_close(found.codebook, (latents - codes).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.commitment, found.codebook)

    def gradients(loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, (latents, weight), retain_graph=True, allow_unused=True)

    pull = torch.randn_like(latents)
    to_latents, to_codes = gradients((found.latents * pull).sum())
    assert to_codes is None
    torch.testing.assert_close(to_latents, pull)
    to_latents, to_codes = gradients(found.commitment[0])
    assert to_codes is None
    torch.testing.assert_close(to_latents[0], 2 * (latents - codes)[0] / 18)
    assert not to_latents[1].any()
    to_latents, to_codes = gradients(found.codebook.sum())
    assert to_latents is None
    expected = torch.zeros(6, 2).index_add(
        0, found.indices.flatten(), (2 * (codes - latents) / 18).movedim(1, -1).flatten(0, 2)
    )
    torch.testing.assert_close(to_codes, expected)


def test_forward_gives_what_training_needs() -> None:
    model = tiny_vq()
    reconstruction, quantized = model(images(), noise=torch.randn(2, 3, 4, 6))
    torch.testing.assert_close(quantized.moments, model.encode(images()))
    torch.testing.assert_close(reconstruction, model.decode(model.encode(images())))
    assert torch.equal(model.decode(quantized.latents), model.decode_codes(quantized.latents)), "codes stay themselves"
    (reconstruction.square().mean() + quantized.codebook.sum() + quantized.commitment.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_statistics_are_kept_beside_the_network_and_change_nothing_in_it() -> None:
    model = tiny_vq(scaling_factor=0.5)
    assert model.statistics == ((0.0,) * 3, (2.0,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fold_statistics(torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.25, 1.0, 8.0]))
    assert model.statistics == ((0.5, 2.0, -1.0), (0.25, 1.0, 8.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    written = model.config.to_dict()
    assert (written["latents_mean"], written["latents_std"]) == ([0.5, 2.0, -1.0], [0.25, 1.0, 8.0])
    assert VQConfig.from_dict(written) == model.config
    assert model.config.without_statistics() == tiny_vq(scaling_factor=1.0).config
    for mean, std in ((torch.zeros(2), torch.ones(2)), (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))):
        with pytest.raises(ValueError, match=r"one number a channel|above zero"):
            model.fold_statistics(mean, std)


def test_usage_of_a_codebook() -> None:
    assert codebook_usage(torch.tensor([5, 5, 5, 5])) == pytest.approx((4.0, 1.0))
    assert codebook_usage(torch.tensor([0, 7, 0, 0])) == pytest.approx((1.0, 0.25))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert codebook_usage(torch.tensor([3, 0, 1, 0])) == pytest.approx((math.exp(entropy), 0.5))


def test_sizes_that_the_factor_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="height 9 and width 8: both must be divisible by 2"):
        tiny_vq().encode(images(9, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept_and_find_the_same_codes(dtype: torch.dtype) -> None:
    model = tiny_vq()
    latents = model.quantize.embedding.weight[torch.arange(24).view(2, 3, 4)].movedim(-1, 1).detach()
    model.to(dtype)
    found = model.quantize(latents.to(dtype))
    assert torch.equal(found.indices, torch.arange(24).view(2, 3, 4))
    assert found.latents.dtype == dtype
    assert model.decode(latents.to(dtype)).dtype == dtype
    assert found.codebook.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
