"""Between pictures, back from a picture, several from one x_t, and what is seen on the way."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from ldm.diffusion import NoiseSchedule, slerp
from ldm.pipelines import CutPromptWarning, ProgressStrip, from_pil, to_pil
from tests import tiny


@pytest.fixture(scope="module", params=["pixel", "latent"])
def pipeline(request, tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), request.param)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), "pixel")


def arrays(output):
    return np.stack([np.asarray(image) for image in output.images]).astype(int)


def same(one, other):
    """Pictures of one run in different batches: sums in another order may move a pixel by a level."""
    return np.abs(one - other).max() <= 1


def test_a_row_goes_from_one_picture_to_the_other(pipeline):
    row = pipeline.interpolate(["a cat", "a dog"], seeds=(3, 8), steps=5)
    pictures = arrays(row)
    assert (len(pictures), row.seeds) == (5, [3, 8])
    assert same(pictures[0], arrays(pipeline("a cat", seed=3))[0])
    assert same(pictures[-1], arrays(pipeline("a dog", seed=8))[0])
    assert all((pictures[i] != pictures[i + 1]).any() for i in range(4))


def test_between_the_ends_it_is_spherical_in_noise_and_linear_in_text(pipeline):
    shape = pipeline._blank(1, None, None).shape
    ends = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (3, 8)]
    row = arrays(pipeline.interpolate("a cat", seeds=(3, 8), steps=5, sampler="dpm++2m"))
    by_hand = pipeline("a cat", latents=slerp(*ends, 0.25), sampler="dpm++2m")
    assert same(row[1], arrays(by_hand)[0])
    # One seed: only the text changes, and its states move evenly.
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, given: seen.append(given[2].chunk(2)[1]))
    try:
        pipeline.interpolate(["a cat", "a dog"], seeds=(3, 3), steps=5)
    finally:
        handle.remove()
    first, last = pipeline._encode(["a cat", "a dog"])
    torch.testing.assert_close(seen[0], torch.stack([torch.lerp(first, last, i / 4) for i in range(5)]))


def test_inversion_and_reconstruction_get_closer_with_more_steps(pixels):
    picture = pixels("a cat", seed=3, num_inference_steps=20).images[0]
    errors = []
    for steps in (5, 20, 80):
        noise = pixels.invert(picture, "a cat", steps)
        again = pixels("a cat", latents=noise, guidance_scale=1, num_inference_steps=steps)
        errors.append(np.abs(arrays(again)[0] - np.asarray(picture).astype(int)).mean())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 3  # of 255 levels
    # Another prompt draws another picture from the same noise.
    edited = pixels("a dog", latents=noise, guidance_scale=30.0, num_inference_steps=80)
    assert (arrays(edited)[0] != arrays(again)[0]).any()


def test_inversion_takes_pictures_of_any_size_the_codec_takes(pipeline):
    factor = pipeline.codec.factor
    pictures = [pipeline("a cat", seed=s, height=16 * factor, width=12 * factor).images[0] for s in (1, 2)]
    noise = pipeline.invert(pictures, ["a cat", "a dog"], 4)
    assert noise.shape == (2, pipeline.codec.channels, 16, 12)
    again = pipeline(["a cat", "a dog"], latents=noise, guidance_scale=1)
    assert [image.size for image in again.images] == [(12 * factor, 16 * factor)] * 2
    torch.testing.assert_close(pipeline.invert(pictures[1], "a dog", 4), noise[1:], rtol=1e-3, atol=1e-3)
    # x_0 is what the codec makes of the picture.
    images = from_pil(pictures)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(to_pil(images), pictures, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim", "eta": 0.7},
        {"sampler": "euler-maruyama"},
        {"sampler": "predictor-corrector", "sampler_options": {"snr": 0.05}},
    ],
)
def test_variations_share_their_noise_down_to_a_timestep(pipeline, options):
    kind = {"num_inference_steps": 10, "shared_seed": 1} | options
    grid = NoiseSchedule.from_config(pipeline.schedule).grid(10)

    def spread(t):
        four = pipeline.variations("a cat", shared_until=t, seed=[5, 6, 7, 8], **kind)
        assert four.seeds == [5, 6, 7, 8]
        return arrays(four)

    early, late = spread(grid[0].t), spread(grid[-2].t)
    assert (early[0] != early[1]).any() and (late[0] != late[1]).any()
    assert early.std(axis=0).mean() > late.std(axis=0).mean()
    # Each picture is what the two seeds give, whatever the others are.
    alone = pipeline.variations("a cat", shared_until=grid[-2].t, seed=7, count=1, **kind)
    assert same(arrays(alone)[0], late[2])
    assert not same(
        arrays(pipeline.variations("a cat", shared_until=grid[-2].t, seed=7, count=1, **(kind | {"shared_seed": 2})))[
            0
        ],
        late[2],
    )


def test_variations_are_one_run_that_changes_its_noise_on_the_way(pixels):
    # With the same generator state after the split, the pictures are those of an unbroken run.
    grid = NoiseSchedule.from_config(pixels.schedule).grid(4)
    shape = pixels._blank(1, None, None).shape
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(9)
    drawn = [torch.randn(shape, generator=shared) for _ in range(3)] + [torch.randn(shape, generator=own)]
    stream = iter(drawn[1:])
    from ldm.diffusion import classifier_free_guidance, ddpm

    with torch.inference_mode():
        denoise = classifier_free_guidance(pixels.unet, pixels._encode(["a"]), pixels._encode([""]), 2.0)
        *_, last = ddpm(
            denoise, drawn[0], NoiseSchedule.from_config(pixels.schedule), grid,
            noise=lambda: next(stream), clip_x0=pixels.codec.clip_x0,
        )  # fmt: skip
        expected = np.asarray(to_pil(pixels.codec.decode(last.latents))[0]).astype(int)
    # Two steps are shared, t_0 → t_1 → t_2; the third draws from the picture's own seed, the last draws nothing.
    actual = pixels.variations("a", shared_until=grid[2].t, shared_seed=1, seed=9, count=1, num_inference_steps=4)
    assert same(arrays(actual)[0], expected)


def test_previews_show_the_predicted_picture(pipeline):
    strip, states = ProgressStrip(pipeline.preview, 12), []

    def on_step(state):
        states.append(state)
        strip(state)

    output = pipeline("a cat", seed=[1, 2], num_images_per_prompt=2, num_inference_steps=12, on_step=on_step)
    assert len(strip.timesteps) == 8 and strip.timesteps[-1] == states[-1].timestep
    last = pipeline.preview(states[-1])
    assert same(np.stack([np.asarray(image) for image in last]).astype(int), arrays(output))  # ᾱ ends at 1
    sheet = strip.sheet(["one", "two"])
    assert sheet.width >= 8 * 100 and sheet.height >= 2 * 96
    heun, states = HeunDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), []
    heun.set_timesteps(4)
    long = ProgressStrip(pipeline.preview, len(heun.timesteps))
    kind = {"num_inference_steps": 4, "sampler": heun}
    pipeline("a cat", seed=1, on_step=lambda state: (long(state), states.append(state)), **kind)
    assert long.timesteps == [state.timestep for state in states] and len(states) == 7
    short = ProgressStrip(pipeline.preview, 3)
    pipeline("a cat", seed=1, num_inference_steps=3, on_step=short)
    assert len(short.timesteps) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.interpolate(["a", "b", "c"], seeds=(1, 2)), "there are 3 prompts; give one, or the two"),
        (lambda p: p.interpolate("a", seeds=(1, 2, 3)), "there are 3 seeds for 2 images"),
        (lambda p: p.interpolate("a", (1, 2), eta=0.5), "eta is 0.5"),
        (lambda p: p.interpolate("a", 3), "seeds is 3; give two, those of the ends"),
        (
            lambda p: p.interpolate("a", (1, 2), negative_prompt=["x", "y"]),
            r"negative_prompt is \['x', 'y'\]; give one",
        ),
        (lambda p: p.interpolate(["a", "\ud800"], (1, 2)), "a prompt has half of a surrogate pair at place 0"),
        (
            lambda p: p.variations("a", shared_until=500, shared_seed=1, negative_prompt="x\udfff"),
            "a negative prompt has half of a surrogate pair at place 1",
        ),
        (lambda p: p.invert(Image.new("RGB", (8, 8)), "\udc80"), "a prompt has half of a surrogate pair"),
        (lambda p: p.variations(None, shared_until=500, shared_seed=1), "prompt is None; give one text"),
        (lambda p: p.interpolate(None, (1, 2)), "prompt is None; give one text, or two"),
        (lambda p: p.invert(None), "image is None"),
        (lambda p: p.invert(Image.new("RGB", (8, 8)), None), "prompt is None; give one text"),
        (lambda p: p.variations(["a", "b"], shared_until=500, shared_seed=1), r"prompt is \['a', 'b'\]; give one text"),
        (lambda p: p.variations("a", shared_until=500, shared_seed=None), "shared_seed is None; it must be a whole"),
        (
            lambda p: p.variations("a", shared_until=500, shared_seed=2, seed=1),
            "shared_seed is .*so is the seed of image 1",
        ),
        (lambda p: p.interpolate("a", seeds=(1, 2), steps=1), "steps is 1; it must be at least 2"),
        (lambda p: p.interpolate("a", seeds=(1, 2), sampler="ddpm"), "sampler is 'ddpm'"),
        (
            lambda p: p.interpolate("a", seeds=(1, 2), sampler=EulerDiscreteScheduler()),
            "sampler is EulerDiscreteScheduler.*ddim",
        ),
        (lambda p: p.variations("a", shared_until=500, shared_seed=1, sampler="ddim"), "sampler is 'ddim' with eta 0"),
        (lambda p: p.variations("a", shared_until=1000, shared_seed=1), "shared_until is 1000; it must be a timestep"),
        (lambda p: p.variations("a", shared_until=3, shared_seed=1), r"shared_until is 3; .* from 249 \(the last"),
        (
            lambda p: p.variations("a", shared_until=500, shared_seed=1, count=0),
            "count is 0; it must be at least 1",
        ),
        (lambda p: p.invert([]), "the image list is empty"),
        (lambda p: p.invert(Image.new("RGBA", (8, 8))), "an image has mode RGBA; bring it to RGB"),
        (lambda p: p.invert([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))]), r"sizes \(8, 8\) and \(8, 16\)"),
        (lambda p: p.invert([Image.new("RGB", (8, 8))], ["a", "b"]), "there are 2 prompts for 1 images"),
        (lambda p: p.invert(Image.new("RGB", (8, 8)), "a", 0), "num_inference_steps is 0"),
    ],
)
def test_wrong_arguments_are_named(call, message, pixels):
    with pytest.raises(ValueError, match=message):
        call(pixels)


def test_a_picture_that_the_codec_cannot_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image size 15x16 is not divisible by the codec's factor 2"):
        tiny.pipeline(tmp_path, "latent").invert(Image.new("RGB", (16, 15)))


def test_words_that_are_cut_are_named_by_every_method(pipeline):
    long = "a very long prompt"
    picture = pipeline("a cat", seed=3).images[0]
    calls = {
        "interpolate": lambda: pipeline.interpolate(["a cat", long], seeds=(3, 8), steps=2, negative_prompt="a dog"),
        "variations": lambda: pipeline.variations(long, shared_until=500, shared_seed=1, seed=2, count=1),
        "invert": lambda: pipeline.invert(picture, long),
    }
    for call in calls.values():
        with pytest.warns(CutPromptWarning, match="lost: 'prompt' of 'a very long prompt'$") as caught:
            call()
        (warning,) = caught
        assert warning.filename == __file__
