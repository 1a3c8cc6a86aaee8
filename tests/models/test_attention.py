"""The kernels of attention and the choice between them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from ldm.models import AutoencoderConfig, AutoencoderKL, set_attention_backend
from ldm.models.blocks import SHORT, Attention, sdpa


def test_sdpa_is_the_softmax_of_scaled_scores() -> None:
    query = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 7, 3, 4, dtype=torch.float64)
    scores = torch.einsum("bnhd,blhd->bhnl", query, key) / 2
    expected = torch.einsum("bhnl,blhd->bnhd", scores.softmax(dim=-1), value)
    torch.testing.assert_close(sdpa(query, key, value), expected)


def test_scores_beyond_the_range_of_float16_do_not_overflow() -> None:
    # This is what lets the config key `upcast_attention` be accepted without any code for it.
    query = torch.full((1, 2, 1, 64), 100.0, dtype=torch.float16)
    key, value = query * torch.tensor([1.0, -1.0]).half().view(1, 2, 1, 1), torch.randn(1, 2, 1, 64).half()
    torch.testing.assert_close(sdpa(query, key, value), value[:, :1].expand(1, 2, 1, 64))


def test_each_head_attends_on_its_own_channels() -> None:
    attention = Attention(8, heads=2, context_channels=3).double()
    x, context = torch.randn(1, 5, 8).double(), torch.randn(1, 4, 3).double()
    heads = []
    for channels in (slice(0, 4), slice(4, 8)):
        query, key, value = (
            inputs @ layer.weight[channels].T
            for inputs, layer in ((x, attention.to_q), (context, attention.to_k), (context, attention.to_v))
        )
        heads.append((query @ key.transpose(1, 2) / 2).softmax(dim=-1) @ value)
    torch.testing.assert_close(attention(x, context), attention.to_out[0](torch.cat(heads, dim=2)))


def network() -> AutoencoderKL:
    return AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=2))


def test_the_kernel_of_every_attention_can_be_chosen() -> None:
    autoencoder = network()
    layers = [layer for layer in autoencoder.modules() if isinstance(layer, Attention)]
    assert len(layers) == 2
    for layer in layers:
        layer.kernel = lambda query, key, value: query
    set_attention_backend(autoencoder, "sdpa")
    assert all(layer.kernel is sdpa for layer in layers)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; choose 'sdpa' or 'xformers'"):
        set_attention_backend(network(), "flash")


def test_xformers_is_refused_off_cuda() -> None:
    with pytest.raises(ValueError, match="needs CUDA, but the network is on cpu; use 'sdpa'"):
        set_attention_backend(network(), "xformers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_xformers_agrees_with_sdpa_where_it_is_installed_and_is_refused_where_not() -> None:
    autoencoder, images = network().cuda(), torch.randn(2, 3, 8, 8, device="cuda")
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(ValueError, match=r"cannot be loaded.*pip install xformers, or use 'sdpa'"):
            set_attention_backend(autoencoder, "xformers")
        return
    expected = autoencoder.encode(images)
    set_attention_backend(autoencoder, "xformers")
    torch.testing.assert_close(autoencoder.encode(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [16, 200])  # of 100: short enough for the plain formula, and not
def test_bfloat16_on_a_cpu_has_the_values_and_gradients_of_torchs_kernel(length: int) -> None:
    torch.manual_seed(0)
    # Scores of deviation 8: rounded to bfloat16 before the softmax they would be off by more than is allowed here.
    drawn = [torch.randn(2, n, 4, 8) * scale for n, scale in ((100, 8), (length, 1), (length, 1))]
    inputs = [x.bfloat16().requires_grad_() for x in drawn]
    assert (100 * length <= SHORT) == (length == 16)
    outgoing = torch.randn(2, 100, 4, 8, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    kernel = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact)).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        values = sdpa(*inputs)
    assert float((values - kernel).norm() / kernel.norm()) < 0.005
    ours = torch.autograd.grad(values, inputs, outgoing)
    theirs = torch.autograd.grad(kernel, exact, outgoing.float())
    for own, other in zip(ours, theirs, strict=True):
        assert float((own - other).norm() / other.norm()) < 0.02
