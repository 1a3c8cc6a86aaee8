"""Each network on CUDA against itself on the CPU, in float32 and under autocast; kernels and memory formats."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldm.codecs import LatentCodec, PixelCodec
from ldm.models import (
    AutoencoderConfig,
    AutoencoderKL,
    DiscriminatorConfig,
    PatchDiscriminator,
    UNet,
    UNetConfig,
    VQConfig,
    VQModel,
    enable_gradient_checkpointing,
    set_attention_backend,
)
from ldm.models.blocks import sdpa
from ldm.text import load_text_encoder
from tests import tiny
from tests.text.conftest import model_and_tokenizer

UNETS = {
    "defaults": {},
    "linear projections": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "learned variances": {"out_channels": 8},
}
SHAPES = [(8, 8), (8, 12), (6, 10)]


def randomized(network: nn.Module) -> nn.Module:
    """New weights everywhere: a new UNet predicts zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet(**changes: object) -> UNet:
    network = randomized(UNet(UNetConfig.from_dict(tiny.UNET | changes)))
    assert isinstance(network, UNet)
    return network


def unet_inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, height, width, generator=generator)
    return x_t, torch.tensor([3, 981]), torch.randn(2, 5, tiny.WIDTH, generator=generator)


def images(count: int = 2, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same(network: nn.Module, call: Callable[[nn.Module, torch.device], Tensor], device: torch.device) -> None:
    """Outputs and gradients of a network on both devices."""
    with torch.no_grad():
        expected = call(network, torch.device("cpu"))
        moved = copy.deepcopy(network).to(device)
        found = call(moved, device)
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    gradients = []
    for copied, place in ((network, torch.device("cpu")), (moved, device)):
        call(copied, place).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in copied.parameters() if p.grad is not None]))
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS.keys())
def test_unet(changes: dict[str, object], device: torch.device) -> None:
    for height, width in SHAPES:
        inputs = unet_inputs(height, width)
        assert_same(unet(**changes), lambda n, d, i=inputs: n(*(x.to(d) for x in i)), device)


def test_autoencoder(device: torch.device) -> None:
    network = randomized(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE)))
    assert_same(network, lambda n, d: n(images().to(d))[0], device)


def test_codebook(device: torch.device) -> None:
    torch.manual_seed(0)
    network = VQModel(VQConfig(**tiny.VQ))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        moved = copy.deepcopy(network).to(device)
        torch.testing.assert_close(
            moved.encode(images().to(device)).cpu(), network.encode(images()), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            moved.decode(latents.to(device)).cpu(), network.decode(latents), rtol=1e-4, atol=1e-4
        )


def test_discriminator(device: torch.device) -> None:
    network = randomized(PatchDiscriminator(DiscriminatorConfig(channels=8, levels=2, norm_num_groups=4)))
    assert_same(network, lambda n, d: n(images(side=32).to(d)), device)


@pytest.mark.parametrize("space", ["pixel", "latent", "codebook"])
def test_codec(space: str, device: torch.device) -> None:
    torch.manual_seed(0)

    def make() -> PixelCodec | LatentCodec:
        torch.manual_seed(0)
        if space == "pixel":
            return PixelCodec((-0.5, 0.0, 0.2), (0.5, 1.0, 0.7))
        network = VQModel(VQConfig(**tiny.VQ)) if space == "codebook" else AutoencoderKL(AutoencoderConfig(**tiny.VAE))
        return LatentCodec(network)

    here, there = make(), make().to(device)
    with torch.no_grad():
        moments = here.moments(images())
        torch.testing.assert_close(there.moments(images().to(device)).cpu(), moments, rtol=1e-4, atol=1e-4)
        noise = torch.randn(here.sample_latents(moments).shape)
        latents = here.sample_latents(moments, noise)
        torch.testing.assert_close(there.sample_latents(moments.to(device), noise.to(device)).cpu(), latents)
        torch.testing.assert_close(there.decode(latents.to(device)).cpu(), here.decode(latents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["clip", "bert", "t5"])
def test_text_encoder(family: str, device: torch.device, tmp_path) -> None:
    model, tokenizer = model_and_tokenizer(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    here, there = load_text_encoder(str(tmp_path), 12), load_text_encoder(str(tmp_path), 12).to(device)
    captions = ["a cat", "", "a corgi wearing a hat"]
    assert there(captions).device.type == device.type
    torch.testing.assert_close(there(captions).cpu(), here(captions), rtol=1e-4, atol=1e-4)


def test_strips_are_the_whole(device: torch.device) -> None:
    torch.manual_seed(0)
    codec = LatentCodec(AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE))).to(device)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        whole = codec.decode(latents)
        codec.tile(16)
        torch.testing.assert_close(codec.decode(latents), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_near_float32(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("float16 autocast is slow on a CPU and nobody trains so")
    network, inputs = unet().to(device), [x.to(device) for x in unet_inputs()]
    with torch.no_grad():
        expected = network(*inputs)
        with torch.autocast(device.type, dtype):
            found = network(*inputs)
    assert bool(found.isfinite().all())
    error = float((found.float() - expected).norm() / expected.norm())
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005), error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_weights_are_near_float32(dtype: torch.dtype, device: torch.device) -> None:
    network, inputs = unet(), unet_inputs()
    with torch.no_grad():
        expected = network(*inputs)
        x_t, timesteps, text = inputs
        half = network.to(device, dtype)
        found = half(x_t.to(device, dtype), timesteps.to(device), text.to(device, dtype))
    assert found.dtype == dtype
    error = float((found.float().cpu() - expected).norm() / expected.norm())
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005), error


def test_channels_last_changes_nothing_but_rounding(device: torch.device) -> None:
    network, (x_t, timesteps, text) = unet().to(device), (x.to(device) for x in unet_inputs())
    with torch.no_grad():
        expected = network(x_t, timesteps, text)
        network.to(memory_format=torch.channels_last)
        found = network(x_t.to(memory_format=torch.channels_last), timesteps, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(device: torch.device) -> None:
    plain, inputs = unet().to(device), [x.to(device) for x in unet_inputs()]
    again = copy.deepcopy(plain)
    enable_gradient_checkpointing(again, True)
    for network in (plain, again):
        network(*inputs).square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [16, 48, 64, 192])
def test_attention_has_finite_gradients(tokens: int, device: torch.device) -> None:
    """Where every score is so low that cuDNN's backward pass gives NaN (pytorch/pytorch#196678)."""
    key = torch.randn(2, tokens, 4, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    query = (-100 * key.mean(dim=1, keepdim=True)).expand(-1, 64, -1, -1).clone()
    query, key = query.requires_grad_(), (key + 4 * key.mean(dim=1, keepdim=True)).requires_grad_()
    value = key.detach().clone().requires_grad_()
    sdpa(query, key, value).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value))


def test_training_never_uses_cudnn_attention(device: torch.device) -> None:
    inputs = [torch.randn(1, 64, 2, 32, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    functions, waiting = set(), [sdpa(*inputs).grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in functions:
            functions.add(function)
            waiting += [following for following, _ in function.next_functions]
    assert not any("Cudnn" in function.name() for function in functions)


def test_compiled(device: torch.device) -> None:
    network, inputs = unet().to(device), [x.to(device) for x in unet_inputs()]
    with torch.no_grad():
        expected = network(*inputs)
        found = torch.compile(network, backend="inductor" if device.type == "cuda" else "aot_eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_xformers_is_torchs_attention(device: torch.device) -> None:
    """Where xformers is not installed, the refusal says so and torch's kernel stays."""
    network, inputs = unet().to(device), [x.to(device) for x in unet_inputs()]
    with torch.no_grad():
        expected = network(*inputs)
        if device.type == "cuda" and importlib.util.find_spec("xformers"):
            set_attention_backend(network, "xformers")
        else:
            with pytest.raises(ValueError, match="xformers"):
                set_attention_backend(network, "xformers")
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-3, atol=1e-3)
