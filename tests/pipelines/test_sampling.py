"""Samplers and guidance as a user of the pipeline asks for them; any scheduler of diffusers draws its own picture."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from ldm import Pipeline
from ldm.diffusion import NoiseSchedule, ScheduleConfig, dynamic_threshold, langevin_corrector
from ldm.pipelines import SAMPLERS
from ldm.pipelines.sampling import SamplingParams, sample
from tests import tiny

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def last(pipeline, prompt="a cat", **arguments):
    seen = []
    pipeline(prompt, on_step=seen.append, **({"seed": 1} | arguments))
    return seen[-1].latents


@pytest.fixture(scope="module", params=["pixel", "latent"])
def pipeline(request, tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), request.param)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), "pixel")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Stable Diffusion folder for each prediction."""
    target = tmp_path_factory.mktemp("stable_diffusion")
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False, steps_offset=1)
        tiny.stable_diffusion(scheduler).save_pretrained(target / kind)
    return target


THEIRS = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler, fractional timesteps": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm++ 2m karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++ 2m sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "lms": (LMSDiscreteScheduler, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim, eta 0.5": (DDIMScheduler, {}),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", THEIRS)
def test_any_scheduler_of_diffusers_draws_what_it_draws_there(name, kind, folders):
    from diffusers import StableDiffusionPipeline

    ours, theirs = Pipeline.from_pretrained(folders / kind), StableDiffusionPipeline.from_pretrained(folders / kind)
    theirs.set_progress_bar_config(disable=True)
    make, options = THEIRS[name]
    scheduler = make.from_pretrained(folders / kind, subfolder="scheduler", **options)
    theirs.scheduler = make.from_config(scheduler.config)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": ["", "zzz"], "latents": start}
    arguments["eta"] = 0.5 if "eta" in name else 0.0
    prompts = ["a corgi wearing a hat", "bb"]

    def drawn(kind_of_output):
        generators = [torch.Generator().manual_seed(s) for s in (4, 5)]
        size = {"height": 16, "width": 16}
        return theirs(prompts, generator=generators, output_type=kind_of_output, **size, **arguments).images

    seen, before = [], repr(vars(scheduler))
    images = ours(prompts, seed=[4, 5], sampler=scheduler, on_step=seen.append, **arguments).images
    expected = drawn("latent")
    torch.testing.assert_close(seen[-1].latents, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.std())))
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - drawn("np")).max() <= 1.01 / 255
    # x̂_0 is that of the scheduler: where a sampler ends without noise, its last x̂_0 is the picture.
    if name in ("euler", "ddpm", "dpm++ 2m karras"):
        torch.testing.assert_close(seen[-1].pred_original_sample, seen[-1].latents, rtol=1e-3, atol=1e-3)
    # The scheduler that was given keeps no trace of the run, and draws the same again.
    assert repr(vars(scheduler)) == before
    again = last(ours, prompts, sampler=scheduler, **(arguments | {"seed": [4, 5]}))
    assert torch.equal(again, seen[-1].latents)


@pytest.mark.parametrize("make", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_a_foreign_sampler_keeps_to_the_bounds_of_pixels(make, pixels):
    seen = []
    scheduler = make(**SD, timestep_spacing="trailing")
    pixels("a cat", seed=1, sampler=scheduler, num_inference_steps=8, guidance_scale=20.0, on_step=seen.append)
    for state in seen:
        assert float(pixels.codec.decode(state.pred_original_sample).abs().max()) <= 1 + 1e-4
    assert float(pixels.codec.decode(seen[-1].latents).abs().max()) <= 1 + 1e-3


def test_the_adapter_and_our_ddim_agree(pipeline):
    theirs = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    kind = {"num_inference_steps": 8, "guidance_scale": 3.0}
    torch.testing.assert_close(last(pipeline, sampler=theirs, **kind), last(pipeline, **kind), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: DDIMScheduler(clip_sample=False), "DDIMScheduler has other betas than this model"),
        (lambda: DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"), "prediction_type 'v_pred"),
        (lambda: DDIMScheduler(**SD), "DDIMScheduler has clip_sample True, which bounds latents"),
        (lambda: DDIMScheduler(**SD, clip_sample=False, thresholding=True), "has thresholding True"),
        (lambda: FlowMatchEulerDiscreteScheduler(), "is no scheduler|no alphas_cumprod|give a scheduler object"),
        (lambda: EulerDiscreteScheduler, "give a scheduler object of diffusers"),
        (lambda: 3, "sampler is 3; give a scheduler object of diffusers, or one of ddim"),
        (lambda: DDIMInverseScheduler(**SD, clip_sample=False), "goes from an image to noise, which pipeline.invert"),
        (
            lambda: DDIMScheduler(**SD, clip_sample=False, prediction_type="posterior_mean"),
            "'posterior_mean', which diffusers does not know; .* prediction_type='epsilon'",
        ),
    ],
)
def test_a_scheduler_of_another_process_is_refused(scheduler, message, pixels):
    with pytest.raises(ValueError, match=message):
        pixels("a cat", sampler=scheduler())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_and_an_image_depends_on_its_seed_alone(name, pipeline):
    kind = {"sampler": name, "num_inference_steps": 1 if name == "langevin" else 6}  # of 100 calls each
    together = last(pipeline, ["a cat", "a dog"], seed=[5, 9], **kind)
    assert bool(together.isfinite().all())
    torch.testing.assert_close(together[1:], last(pipeline, "a dog", seed=9, **kind), rtol=1e-3, atol=1e-3)
    assert not torch.equal(together[1:], last(pipeline, "a dog", seed=10, **kind))


def test_langevin_dynamics_ends_without_the_noise_of_its_last_level(pixels):
    seen = []
    pixels("a cat", seed=1, sampler="langevin", num_inference_steps=2, on_step=seen.append)
    assert torch.equal(seen[1].latents, seen[1].pred_original_sample)
    assert not torch.equal(seen[0].latents, seen[0].pred_original_sample)


def test_each_name_is_another_sampler(pipeline):
    kind = {"num_inference_steps": 6}
    drawn = {name: last(pipeline, sampler=name, **kind) for name in SAMPLERS if name != "langevin"}
    names = list(drawn)
    for i, one in enumerate(names):
        for other in names[:i]:
            # σ̂ is the large variance of DDPM: DDIM, Table 1
            assert torch.allclose(drawn[one], drawn[other], rtol=1e-3, atol=1e-3) == (
                {one, other} == {"ddim-sigma-hat", "ddpm-large"}
            ), (one, other)


def test_a_learned_variance_steers_ddpm_and_nothing_else(tmp_path):
    pipeline = tiny.pipeline(tmp_path, "pixel")
    plain = {name: last(pipeline, sampler=name) for name in ("ddim", "ddpm", "ddpm-large", "dpm++2m")}
    narrow = pipeline.unet.conv_out
    wide = torch.nn.Conv2d(narrow.in_channels, 6, 3, padding=1)
    with torch.no_grad():
        wide.weight[:3], wide.bias[:3] = narrow.weight, narrow.bias
        wide.weight[3:], wide.bias[3:] = 0, -1.0  # ν = −1 everywhere: β̃
    pipeline.unet.conv_out = wide
    pipeline.unet.config = dataclasses.replace(pipeline.unet.config, out_channels=6)
    for name, expected in plain.items():
        torch.testing.assert_close(last(pipeline, sampler=name), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        wide.bias[3:] = 1.0  # ν = 1: β
    torch.testing.assert_close(last(pipeline, sampler="ddpm"), plain["ddpm-large"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_schedulers_of_diffusers_take_learned_variances(space, tmp_path):
    pipeline = tiny.pipeline(tmp_path, space)
    made = {**SD, "timestep_spacing": "trailing"}
    learned = DDPMScheduler(**made, clip_sample=False, variance_type="learned_range")
    with pytest.raises(ValueError, match="'learned_range', but this model has no variances; set it to a fixed"):
        last(pipeline, sampler=learned)
    plain = last(pipeline, sampler=DPMSolverMultistepScheduler(**made))
    tiny.widened(pipeline)
    ours = last(pipeline, sampler="ddpm")
    torch.testing.assert_close(last(pipeline, sampler=learned), ours, rtol=1e-3, atol=1e-3)
    fixed = DDPMScheduler(**made, clip_sample=False)
    assert not torch.allclose(last(pipeline, sampler=fixed), ours, rtol=1e-2, atol=1e-2)
    # A solver draws with none, whatever its settings say.
    solver = DPMSolverMultistepScheduler(**made, variance_type="learned_range")
    torch.testing.assert_close(last(pipeline, sampler=solver), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="but this model has that of learned_range"):
        last(pipeline, sampler=DDPMScheduler(**made, clip_sample=False, variance_type="learned"))


@pytest.mark.parametrize(
    ("name", "options", "other", "count"),
    [
        ("langevin", {"num_langevin_steps": 3}, {"step_size": 0.1}, 6),
        ("predictor-corrector", {"num_corrector_steps": 4}, {"snr": 0.3}, 6),
    ],
)
def test_options_of_samplers_reach_them(name, options, other, count, pixels):
    calls, kind = [], {"sampler": name, "num_inference_steps": 2, "guidance_scale": 1.0}
    handle = pixels.unet.conv_in.register_forward_pre_hook(lambda module, given: calls.append(1))
    try:
        drawn = last(pixels, sampler_options=options, **kind)
    finally:
        handle.remove()
    assert len(calls) == count
    assert not torch.equal(last(pixels, sampler_options=options | other, **kind), drawn)


def test_a_network_of_the_posterior_mean_draws_what_one_of_the_noise_draws(tmp_path):
    pipeline = tiny.pipeline(tmp_path, "pixel")
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    kind = {"guidance_scale": 3.0, "guidance_rescale": 0.7, "num_inference_steps": 5}
    expected = last(pipeline, **kind)
    forward, (a, b) = pipeline.unet.forward, schedule.posterior_mean_coefficients

    def posterior_mean(x, timesteps, states):
        alpha, sigma = schedule.alpha_sigma(int(timesteps[0]))
        original = (x - sigma * forward(x, timesteps, states)) / alpha
        return float(a[timesteps[0]]) * original + float(b[timesteps[0]]) * x

    pipeline.unet.forward = posterior_mean
    pipeline.schedule = ScheduleConfig(prediction_type="posterior_mean")
    torch.testing.assert_close(last(pipeline, **kind), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_rescaling_draws_less_glaring_pictures_and_what_diffusers_draws(prediction, folders):
    from diffusers import StableDiffusionPipeline

    kind = {"num_inference_steps": 5, "guidance_scale": 9.0, "guidance_rescale": 0.7}
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = StableDiffusionPipeline.from_pretrained(folders / prediction)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a cat", latents=start, output_type="latent", height=16, width=16, **kind).images
    ours = Pipeline.from_pretrained(folders / prediction)
    actual = last(ours, latents=start, **kind)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    if prediction == "epsilon":  # where less of ε leaves more noise
        return
    kind["guidance_scale"] = 300.0
    deviations = [float(last(ours, **(kind | {"guidance_rescale": phi})).std()) for phi in (0.0, 0.5, 1.0)]
    assert deviations[0] > 1.1 * deviations[1] > 1.5 * deviations[2]


def test_the_unconditional_half_is_computed_inside_the_interval_only(pipeline):
    sizes, kind = [], {"num_inference_steps": 6, "guidance_scale": 3.0}
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    levels = [schedule.error_gain(step.t) for step in schedule.grid(6)]
    handle = pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    try:
        last(pipeline, guidance_interval=(levels[4], levels[1]), **kind)
    finally:
        handle.remove()
    assert sizes == [1, 2, 2, 2, 1, 1]
    assert torch.equal(last(pipeline, guidance_interval=(0.0, math.inf), **kind), last(pipeline, **kind))
    outside = last(pipeline, guidance_interval=(1e5, 1e6), **kind)
    assert torch.equal(outside, last(pipeline, **(kind | {"guidance_scale": 1.0})))


def test_a_threshold_is_on_the_scale_of_images(pixels):
    seen = []
    kind = {"guidance_scale": 9.0, "num_inference_steps": 6}
    pixels("a cat", seed=1, dynamic_threshold=0.9, on_step=seen.append, **kind)
    clip_x0, codec = dynamic_threshold(0.9), pixels.codec
    for state in seen:
        assert float(codec.decode(state.pred_original_sample).abs().max()) <= 1 + 1e-5
    # By hand, from the first step: x̂_0 in pixels, thresholded there, and back.
    first = []
    codec.bounded, unbound = True, codec.clip_x0
    codec.clip_x0 = lambda x: x
    try:
        pixels("a cat", seed=1, on_step=first.append, **kind)
    finally:
        codec.clip_x0 = unbound
    expected = codec.sample_latents(clip_x0(codec.decode(first[0].pred_original_sample)))
    torch.testing.assert_close(seen[0].pred_original_sample, expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_leads_the_picture(pipeline):
    def level(x, t):
        return x.flatten(1).mean(dim=1) * 100

    def drawn(**arguments):
        return float(last(pipeline, num_inference_steps=6, **arguments).mean())

    plain = drawn()
    assert drawn(classifier=level) > plain + 0.02
    assert drawn(classifier=level, classifier_scale=-1.0) < plain - 0.02
    assert drawn(classifier=level, classifier_scale=0.0) == pytest.approx(plain, abs=1e-6)
    with pytest.raises(ValueError, match=r"the classifier gives \[1, 7\] for x_t of shape \[1, "):
        last(pipeline, classifier=lambda x, t: x.flatten(1)[:, :7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sampler": "langevin", "sampler_options": {"snr": 1}},
            "sampler 'langevin' has num_langevin_steps and step_s",
        ),
        ({"sampler_options": {"snr": 1}}, "sampler_options has 'snr'; sampler 'ddim' has none"),
        ({"sampler": "langevin", "sampler_options": {"num_langevin_steps": 2.5}}, "num_langevin_steps is 2.5; it must"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
        ({"eta": None}, "eta is None; it must be a number"),
        ({"guidance_interval": (1, 2, 3)}, r"guidance_interval is \(1, 2, 3\); give two noise levels"),
        ({"guidance_interval": 2.0}, "guidance_interval is 2.0; give two noise levels"),
        ({"sampler": "langevin", "sampler_options": {"step_size": "x"}}, "step_size is 'x'; it must be a number"),
        ({"sampler_options": [("snr", 1)]}, r"sampler_options is \[\('snr', 1\)\]; give names with their numbers"),
        ({"sampler": EulerDiscreteScheduler(**SD), "sampler_options": {"snr": 1}}, "scheduler object has its own"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'; it must be a number"),
        ({"height": 8.0}, "height is 8.0; it must be a whole number"),
        ({"on_step": 3}, "on_step is 3; it must be a function"),
        ({"negative_prompt": 5}, "negative_prompt is 5; give a text"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed is 9223372036854775808; it must be"),
        ({"seed": torch.tensor(1.5)}, "seed is tensor.1.5000.; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"prompt": None}, "prompt is None; give a text"),
        ({"latents": np.zeros((1, 3, 8, 8))}, "latents is a ndarray; it must be a tensor"),
        ({"latents": torch.full((1, 3, 8, 8), math.nan)}, "latents is with nan or inf in it"),
        ({"classifier": 3}, "classifier is 3; it must be a function"),
        ({"classifier": lambda x, t: (x / 0).flatten(1).sum(dim=1)}, "classifier's log probability is not finite at"),
        ({"classifier": lambda x, t: torch.ones(len(x), requires_grad=True)}, "does not depend on x_t, only on other"),
        ({"sampler": "ddmp"}, "sampler is 'ddmp'; did you mean 'ddpm'"),
        ({"sampler": "DPM++2M"}, r"did you mean 'dpm\+\+2m'"),
        ({"sampler": "abacus"}, "sampler is 'abacus'; known are ddim, "),
        ({"sampler": "ddpm", "eta": 0.5}, "eta is 0.5, which sampler 'ddpm' does not have"),
        ({"sampler": EulerDiscreteScheduler(**SD), "eta": 0.5}, "eta is 0.5, which EulerDiscreteScheduler does not"),
        ({"eta": -0.5}, "eta is -0.5; it must be 0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be 0"),
        ({"guidance_interval": (5.0, 0.3)}, r"guidance_interval is \(5, 0.3\), turned round"),
        ({"dynamic_threshold": 99.5}, "dynamic_threshold is 99.5; it must be over 0"),
        ({"classifier": lambda x, t: x, "classifier_scale": math.nan}, "classifier scale is nan"),
    ],
)
def test_wrong_settings_are_named(arguments, message, pixels):
    with pytest.raises(ValueError, match=message):
        pixels(**({"prompt": "a cat"} | arguments))


def test_numbers_of_numpy_and_torch_are_numbers(pixels):
    expected = last(pixels, seed=3, guidance_scale=2.0, guidance_interval=(0.1, 5.0), num_inference_steps=3)
    for make in (np.array, torch.tensor):
        kind = {"num_inference_steps": make(3), "guidance_scale": make(2.0), "guidance_interval": make([0.1, 5.0])}
        assert torch.equal(last(pixels, seed=make([3]), **kind), expected)
        assert torch.equal(last(pixels, seed=make(3), **kind), expected)


def test_a_posterior_mean_that_is_read_as_noise_is_refused_where_nothing_is_left(tmp_path):
    pipeline = tiny.pipeline(tmp_path, "pixel")
    kind = {"prediction_type": "posterior_mean", "rescale_betas_zero_snr": True}
    pipeline.schedule = ScheduleConfig(**kind)
    with pytest.raises(ValueError, match="posterior_mean, which samplers read as noise, and at timestep 999"):
        last(pipeline)
    pipeline.schedule = ScheduleConfig(**kind, timestep_spacing="leading")
    assert bool(last(pipeline).isfinite().all())


def test_latents_have_no_range_to_threshold(tmp_path):
    with pytest.raises(ValueError, match=r"dynamic_threshold is 0\.995, but this model diffuses latents"):
        tiny.pipeline(tmp_path, "latent")("a cat", dynamic_threshold=0.995)


def test_zero_terminal_snr_is_drawn_from_by_every_sampler_that_can(tmp_path):
    pipeline = tiny.pipeline(tmp_path, "latent")
    pipeline.schedule = ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    kind = {"num_inference_steps": 5, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    for name in SAMPLERS:
        if name == "langevin":
            with pytest.raises(ValueError, match="cannot start at timestep 999"):
                last(pipeline, sampler=name, **kind)
        else:
            assert bool(last(pipeline, sampler=name, **kind).isfinite().all()), name
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**SD, **options, clip_sample=False)
    torch.testing.assert_close(last(pipeline, sampler=theirs, **kind), last(pipeline, **kind), rtol=1e-3, atol=1e-3)
    euler = last(pipeline, sampler=EulerDiscreteScheduler(**SD, **options), **kind)
    torch.testing.assert_close(euler, last(pipeline, **kind), rtol=0.02, atol=0.02)  # theirs starts at 2^-24, not 0


def test_langevin_dynamics_ends_in_x_0_and_a_part_of_it_in_x_t():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    grid, start = schedule.grid(4), torch.randn(1, 4, 8, 8)
    settings = SamplingParams(num_inference_steps=4, guidance_scale=1.0, sampler="langevin")

    def states(part):
        return list(
            sample(
                settings,
                lambda x, t: schedule.alpha_sigma(t)[1] * x,
                start,
                schedule,
                part,
                generators=[torch.Generator().manual_seed(0)],
                clip_x0=lambda x: x,
                prediction_type="epsilon",
                learned_variance=False,
            )
        )

    whole, part = states(grid), states(grid[:2])
    assert torch.equal(whole[-1].latents, whole[-1].pred_original_sample)
    assert torch.equal(part[-1].latents, whole[1].latents)
    assert not torch.equal(part[-1].latents, part[-1].pred_original_sample)


def test_variations_of_langevin_dynamics_go_on_from_x_t(pixels):
    """With as much noise as that level has; x̂_0 has hardly any."""
    kind = {"sampler": "langevin", "sampler_options": {"num_langevin_steps": 2}, "num_inference_steps": 4}
    seen = []
    handle = pixels.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].chunk(2)[0]))
    try:
        pixels.variations("a cat", shared_until=499, shared_seed=1, seed=[2, 3], count=2, **kind)
    finally:
        handle.remove()
    shared, own = [x for x in seen if len(x) == 1], [x for x in seen if len(x) == 2]
    assert (len(shared), len(own)) == (4, 4)  # two levels of two steps each
    whole = []
    pixels("a cat", seed=1, on_step=whole.append, **kind)
    torch.testing.assert_close(own[0][:1], whole[1].latents, rtol=1e-4, atol=1e-4)


def test_the_corrector_of_the_vp_process_hardly_widens_what_it_corrects(pixels):
    default = inspect.signature(langevin_corrector).parameters["snr"].default
    assert default == 0.01  # arXiv:2011.13456, Table 5: VP; 0.16 is for VE
    kind = {"sampler": "predictor-corrector", "num_inference_steps": 3}
    assert torch.equal(last(pixels, **kind), last(pixels, sampler_options={"snr": 0.01}, **kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_posterior_mean_in_half_precision_is_refused(dtype, tmp_path):
    pipeline = tiny.pipeline(tmp_path)
    pipeline.schedule = dataclasses.replace(pipeline.schedule, prediction_type="posterior_mean")
    name = str(dtype).removeprefix("torch.")
    pipeline("a cat", seed=1, num_inference_steps=1)
    with torch.autocast("cpu", dtype), pytest.raises(ValueError, match=f"posterior_mean, of which {name} leaves noise"):
        pipeline("a cat", seed=1, num_inference_steps=1)
    pipeline.to("cpu", dtype)
    for call in (
        lambda: pipeline("a cat", seed=1),
        lambda: pipeline.variations("a cat", shared_until=500, shared_seed=1),
        lambda: pipeline.invert(Image.new("RGB", (8, 8))),
        lambda: pipeline.save_pretrained(tmp_path / "half", dtype=dtype),
    ):
        with pytest.raises(ValueError, match=f"posterior_mean, of which {name} leaves noise"):
            call()
