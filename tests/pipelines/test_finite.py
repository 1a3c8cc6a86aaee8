"""Samples that are not finite: the step is named, and no black picture drawn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion import NoiseSchedule, State
from ldm.pipelines import NotFinite
from ldm.pipelines.sampling import FiniteCheck, remedy
from tests import tiny


@pytest.fixture(params=["pixel", "latent"])
def pipeline(request, tmp_path):
    return tiny.pipeline(tmp_path / "parts", request.param)


def breaks_from(pipeline, step, number=math.nan, image=-1):
    """Spoils the prediction for one image of a batch from a call of the network on."""
    calls = []

    def spoil(module, given, output):
        calls.append(1)
        if len(calls) >= step:
            output = output.clone()
            output[image, 0, 0, 0] = number
        return output

    pipeline.unet.conv_out.register_forward_hook(spoil)


CALLS = {
    "call": lambda p: p(["a", "b"], seed=3),
    "call with previews": lambda p: p(["a", "b"], seed=3, on_step=lambda state: p.preview(state)),
    "call with ddpm": lambda p: p(["a", "b"], seed=3, sampler="ddpm"),
    "interpolate": lambda p: p.interpolate("a", (1, 2), steps=2),
    "variations": lambda p: p.variations("a", shared_until=999, shared_seed=1, seed=5, count=2),
}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", CALLS)
def test_the_step_and_the_picture_are_named(how, number, pipeline):
    breaks_from(pipeline, 3, number)
    timestep = NoiseSchedule.from_config(pipeline.schedule).grid(4)[2].t
    with pytest.raises(NotFinite, match=rf"image 1 left the finite numbers .* at step 3, timestep {timestep}; "):
        CALLS[how](pipeline)


def test_a_shared_part_and_an_inversion_are_looked_at_too(pipeline):
    breaks_from(pipeline, 2)
    with pytest.raises(NotFinite, match=r"image 0 left the finite numbers .* at step 2, timestep 749"):
        pipeline.variations("a", shared_until=300, shared_seed=1, seed=5, count=2)
    size = 8 * pipeline.codec.factor
    with pytest.raises(NotFinite, match=r"image 1 left the finite numbers .* at step 1, "):
        pipeline.invert([Image.new("RGB", (size, size))] * 2)


def test_huge_weights_are_an_error_that_names_the_cause(pipeline):
    with torch.no_grad():
        pipeline.unet.conv_out.weight.fill_(3e38)  # where pixels bound x̂_0, the states stay finite
    with pytest.raises(NotFinite, match=r"image 0 .* at step 1, .*guidance_scale is 99: lower it"):
        pipeline("a", seed=1, guidance_scale=99.0)


def test_text_states_and_decoded_pictures_are_looked_at(pipeline, tmp_path):
    latent = tiny.pipeline(tmp_path / "more", "latent")
    with torch.no_grad():
        latent.codec.autoencoder.decoder.conv_out.bias[1] = torch.inf
        pipeline.text_encoder.model.get_input_embeddings().weight.fill_(torch.nan)
    seen = []
    with pytest.raises(NotFinite, match=r"images 0, 1 left the finite numbers .* when decoded"):
        latent(["a", "b"], seed=1, on_step=seen.append)
    with pytest.raises(NotFinite, match="when decoded"):
        latent.preview(seen[0])
    with pytest.raises(NotFinite, match=r"the text encoder left the finite numbers .* at 'a cat'"):
        pipeline("a cat", seed=1)


def test_on_step_sees_finite_states_alone(pipeline):
    breaks_from(pipeline, 3)
    seen = []
    with pytest.raises(NotFinite):
        pipeline("a", seed=1, on_step=seen.append)
    assert [state.index for state in seen] == [0, 1]


def states(broken=(), seen=None):
    for index in range(4):
        if seen is not None:
            seen.append(index)
        x = torch.zeros(3, 2, 2, 2)
        if index in broken:
            x[1, 0, 1, 0] = torch.nan
        yield State(index, 900 - index, x, torch.zeros_like(x) + index)


def test_where_a_gpu_would_wait_the_first_step_is_found_at_the_end(monkeypatch):
    monkeypatch.setattr("ldm.pipelines.sampling.CHECKED_AT_ONCE", ())
    seen = []
    assert torch.equal(FiniteCheck().final_latents(states()), torch.zeros(3, 2, 2, 2))
    with pytest.raises(NotFinite, match=r"image 8 left .* at step 2, timestep 899"):
        FiniteCheck(first=7).final_latents(states({1, 2, 3}, seen))
    assert seen == [0, 1, 2, 3]  # to the end


def test_many_pictures_are_not_all_listed_and_half_precision_is_the_likely_cause():
    x = torch.full((9, 1, 1, 1), torch.nan)
    with pytest.raises(NotFinite, match=r"images 0, 1, 2, 3, 4, … left"):
        FiniteCheck().final_latents([State(0, 9, x, x)])
    assert "bfloat16 or float32" in remedy(torch.float16) and "float16" not in remedy(torch.bfloat16)


def test_a_float16_model_that_overflows_says_so(tmp_path):
    pipeline = tiny.pipeline(tmp_path, "latent")
    pipeline.to("cpu", torch.float16)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(60_000.0)
    with pytest.raises(NotFinite, match="float16 ends at 65504: open the model in bfloat16 or float32"):
        pipeline("a", seed=1)


def test_a_finite_run_draws_what_it_drew(pipeline):
    plain = [np.asarray(image) for image in pipeline(["a", "b"], seed=3).images]
    seen = []
    watched = pipeline(["a", "b"], seed=3, on_step=seen.append)
    assert all((a == np.asarray(b)).all() for a, b in zip(plain, watched.images, strict=True)) and len(seen) == 4
