"""What a user calls: pictures, seeds, defaults, folders, and what is refused."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from PIL import Image

from ldm import Pipeline
from ldm.diffusion import NoiseSchedule
from ldm.pipelines import CutPromptWarning
from ldm.pipelines.pipeline import default_device, usable_device
from tests import tiny


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(params=["pixel", "latent"])
def pipeline(request, tmp_path):
    return tiny.pipeline(tmp_path / "parts", request.param)


def states(pipeline, prompt, **arguments):
    seen = []
    output = pipeline(prompt, on_step=seen.append, **arguments)
    return output, seen


def test_pictures_have_the_size_of_training(pipeline):
    output = pipeline("a cat", seed=3)
    assert [image.mode for image in output.images] == ["RGB"]
    size = 8 * pipeline.codec.factor
    assert output.images[0].size == (size, size)
    assert output.seeds == [3]
    wide = pipeline("a cat", height=size, width=2 * size, seed=3)
    assert wide.images[0].size == (2 * size, size)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_picture_of_a_batch_is_what_its_seed_gives_alone(pipeline, eta):
    prompts = ["a cat", "a dog"]
    together, seen = states(pipeline, prompts, num_images_per_prompt=2, seed=5, eta=eta)
    assert together.seeds == [5, 6, 7, 8]
    for i, seed in enumerate(together.seeds):
        _, alone = states(pipeline, prompts[i // 2], seed=seed, eta=eta)
        torch.testing.assert_close(seen[-1].latents[i : i + 1], alone[-1].latents, rtol=1e-5, atol=1e-5)
    listed = pipeline(prompts, num_images_per_prompt=2, seed=[5, 6, 7, 8], eta=eta)
    assert (pixels(listed.images) == pixels(together.images)).all()


def test_a_seed_is_that_of_a_torch_generator(pipeline):
    shape = pipeline.codec.latent_shape(8 * pipeline.codec.factor, 8 * pipeline.codec.factor)
    start = torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(11))
    assert (pixels(pipeline("a", seed=11).images) == pixels(pipeline("a", seed=0, latents=start).images)).all()


def test_seeds_that_were_not_given_are_reported_and_repeat(pipeline):
    first = pipeline("a cat", num_images_per_prompt=2)
    assert first.seeds[1] == first.seeds[0] + 1
    again, before = (
        pixels(images).astype(int) for images in (pipeline("a cat", seed=first.seeds[1]).images, first.images[1:])
    )
    assert np.abs(again - before).max() <= 1  # alone and in a batch sums are rounded otherwise: a level of 256 at most
    assert pipeline("a cat").seeds != first.seeds[:1]


def test_prompt_negative_prompt_and_guidance_all_matter(pipeline):
    def last(**arguments):
        return states(pipeline, "a cat", seed=1, **arguments)[1][-1].latents

    base = last()
    assert not torch.equal(base, last(negative_prompt="dog"))
    assert not torch.equal(base, last(guidance_scale=1.0))
    torch.testing.assert_close(base, last(guidance_scale=2.0, negative_prompt="", num_inference_steps=4))
    # Led away from itself by nothing: the null state equals the condition.
    torch.testing.assert_close(last(negative_prompt="a cat"), last(guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_steps_are_those_of_the_grid_and_bound_by_the_codec(pipeline):
    _, seen = states(pipeline, "a cat", num_inference_steps=7, seed=0)
    grid = NoiseSchedule.from_config(pipeline.schedule).grid(7)
    assert [state.timestep for state in seen] == [step.t for step in grid]
    originals = torch.stack([state.pred_original_sample for state in seen])
    if pipeline.codec.bounded:
        decoded = pipeline.codec.decode(originals.flatten(0, 1))
        assert float(decoded.abs().max()) <= 1 + 1e-5
    assert bool(originals.isfinite().all())


def test_a_folder_gives_the_same_pictures(pipeline, tmp_path):
    expected = pixels(pipeline("a cat", seed=1).images)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = Pipeline.from_pretrained(tmp_path / "saved")
    assert (loaded.guidance_scale, loaded.num_inference_steps) == (2.0, 4)
    assert (pixels(loaded("a cat", seed=1).images) == expected).all()
    loaded.save_pretrained(tmp_path / "again")
    files = {
        path.relative_to(tmp_path / "saved"): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "saved").rglob("*.safetensors")
    }
    assert len(files) >= 2
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / "again" / name).read_bytes()).hexdigest() == digest
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "the prompt list is empty"),
        ({"prompt": [3]}, "a prompt is 3"),
        ({"prompt": "a cat \ud83d"}, r"a prompt has half of a surrogate pair at place 6 \('a cat \\ud83d'\)"),
        ({"negative_prompt": "\udcff"}, "a negative prompt has half of a surrogate pair at place 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3; it must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"latents": torch.zeros(1, 1, 2, 2)}, r"latents have shape \[1, 1, 2, 2\]"),
        ({"latents": torch.full((1, 1, 2, 2), math.nan)}, "latents is with nan or inf in it; it must be a tensor"),
        ({"latents": torch.zeros(1, 1, 2, 2, device="meta")}, "latents is a tensor of torch.float32 on meta; it must"),
        ({"latents": torch.zeros(1, 1, 2, 2, dtype=torch.complex64)}, "latents is a tensor of torch.complex64 on cpu"),
        ({"latents": [1.0]}, "latents is a list; it must be a tensor"),
        ({"height": 0}, "image size 0x"),
        ({"width": -8}, "-8"),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**({"prompt": "a cat"} | arguments))


def test_a_size_that_the_factor_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="15x16 is not divisible by the codec's factor 2; the nearest size is 16x16"):
        tiny.pipeline(tmp_path, "latent")("a", height=15, width=16)


def test_parts_of_different_models_are_refused(tmp_path):
    pixel, latent = tiny.pipeline(tmp_path / "a", "pixel"), tiny.pipeline(tmp_path / "b", "latent")
    with pytest.raises(ValueError, match="in_channels 3 but the codec makes 4"):
        Pipeline(unet=pixel.unet, codec=latent.codec, text_encoder=pixel.text_encoder, schedule=pixel.schedule)


def test_pictures_are_rounded_to_the_nearest_level(tmp_path):
    from ldm.pipelines import to_pil

    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    (image,) = to_pil(levels)
    assert isinstance(image, Image.Image)
    assert np.asarray(image)[..., 0].ravel().tolist() == list(range(256))


def test_files_that_are_no_model_are_left_alone(tmp_path):
    pipeline = tiny.pipeline(tmp_path / "parts")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds files that are no model"):
        pipeline.save_pretrained(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.save_pretrained(tmp_path / "model")  # an older model makes way


LONG = "a very long prompt"  # tiny encoders have room for ten letters


def test_words_that_are_cut_are_named_once_a_call_where_it_was_made(pipeline):
    with pytest.warns(CutPromptWarning) as caught:
        pipeline(["a cat", LONG, f"{LONG} cat"], negative_prompt="an ugly monster", num_images_per_prompt=2, seed=1)
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        f"the text encoder reads {tiny.LENGTH} tokens of a text; lost: 'prompt' of '{LONG}'; "
        f"'prompt cat' of '{LONG} cat'; 'monster' of 'an ugly monster'"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(["a cat", ""], negative_prompt="a dog", seed=1)


def as_accelerate():
    """The device on which accelerate would train."""
    return PartialState.default_device.fget(None)


def test_without_a_name_the_device_is_that_of_accelerate(monkeypatch):
    assert default_device().type == usable_device(None).type == as_accelerate().type
    # Apple's, as torch says it where there is one; accelerate asks the backend, and sets a variable for it.
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    for there, expected in ((True, "mps"), (False, as_accelerate().type)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
        assert (usable_device(None).type, as_accelerate().type) == (expected, expected)
    assert usable_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device is 'abacus', which cannot be used"):
        usable_device("abacus")


def test_weights_that_the_stored_dtype_cannot_hold_are_not_written(tmp_path):
    pipeline = tiny.pipeline(tmp_path / "parts")
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"unet: conv_in.bias holds 1e\+05, which is too large for float16"):
        pipeline.save_pretrained(tmp_path / "model", dtype=torch.float16)
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"unet: conv_in.bias holds numbers that are not finite"):
        pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"dtype is torch.int8; it must be one of"):
        pipeline.save_pretrained(tmp_path / "model", dtype=torch.int8)
    assert not (tmp_path / "model").exists()


def test_numbers_of_numpy_and_latents_of_any_dtype_are_taken(pipeline):
    expected = pixels(pipeline("a", num_images_per_prompt=2, seed=4, num_inference_steps=1).images)
    numbers = {"num_images_per_prompt": np.int64(2), "seed": np.int64(4), "num_inference_steps": np.int64(1)}
    assert (pixels(pipeline("a", **numbers).images) == expected).all()
    zeros = torch.zeros(1, *pipeline._blank(1, None, None).shape[1:])
    kind = {"num_inference_steps": 1}
    for dtype in (torch.float64, torch.int64, torch.float8_e4m3fn):
        drawn = pipeline("a", latents=zeros.to(dtype), **kind).images
        assert (pixels(drawn) == pixels(pipeline("a", latents=zeros, **kind).images)).all()
    assert len(pipeline.interpolate("a", (1, 2), np.int64(3), **kind).images) == 3
    several = pipeline.variations("a", shared_until=np.int64(999), shared_seed=1, count=np.int64(2), **kind)
    assert len(several.images) == 2
