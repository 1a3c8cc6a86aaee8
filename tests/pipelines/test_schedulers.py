"""Scheduler objects of diffusers on an analytic denoiser: each walks as in diffusers' own loop, or is refused."""

import copy
import functools
import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UnCLIPScheduler

from ldm.diffusion import NoiseSchedule, ScheduleConfig, alpha_sigma_at, ddim, ddpm
from ldm.diffusion.diffusers_schedulers import SCHEDULERS
from ldm.pipelines.schedulers import check_scheduler, run_scheduler, set_timesteps

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS, SPACINGS = ("epsilon", "sample", "v_prediction"), ("leading", "linspace", "trailing")
# The two that need torchsde, and those for distilled networks.
NAMES = [name for name in (*SCHEDULERS, "LCMScheduler", "TCDScheduler") if name != "DPMSolverSDEScheduler"]
ONE_TOO_MANY = [s for s in range(1, 1001) if len(np.arange(1000, 0, -1000 / s)) > s]


@functools.cache
def _built(name, total):
    # The constructor of KDPM2 searches a table a thousand times.
    kind = getattr(diffusers, name)
    has = inspect.signature(kind.__init__).parameters
    keys = SD | {"clip_sample": False, "num_train_timesteps": total}
    return kind(**{key: value for key, value in keys.items() if key in has}), has


def made(name, total=1000, **keys):
    """The scheduler with those of the keys that it has."""
    scheduler, has = _built(name, total)
    scheduler = copy.deepcopy(scheduler)
    scheduler.register_to_config(**{key: value for key, value in keys.items() if key in has})
    return scheduler


def network(kind, schedule=SCHEDULE):
    """About that of data N(0.7, 0.4²)."""

    def denoise(x, t):
        alpha, sigma = alpha_sigma_at(schedule, float(t))
        variance = 0.16 * alpha**2 + sigma**2
        noise = sigma / variance * (x - 0.7 * alpha) + 0.05 * torch.tanh(x.roll(1, -1))
        original = (x - sigma * noise) / alpha
        return {"epsilon": noise, "sample": original, "v_prediction": alpha * noise - sigma * original}[kind]

    return denoise


def start(images=2):
    return torch.randn(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(scheduler, kind, x, steps, seeds, schedule=SCHEDULE, **changed):
    check_scheduler(scheduler, schedule, kind, eta=0.0)
    keys = {"clip_x0": lambda x: x, "denoise": network(kind, schedule), "learned_variance": False} | changed
    return list(
        run_scheduler(
            scheduler,
            latents=x,
            schedule=schedule,
            num_inference_steps=steps,
            eta=0.0,
            generators=generators(*seeds),
            prediction_type=kind,
            **keys,
        )
    )


def loop_of_diffusers(scheduler, kind, x, steps, seeds, schedule=SCHEDULE):
    scheduler, denoise = copy.deepcopy(scheduler), network(kind, schedule)
    scheduler.set_timesteps(steps)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"eta": 0.0} if "eta" in takes else {}
    extra |= {"generator": generators(*seeds)} if "generator" in takes else {}
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
    return x


def steps_of(name):
    # PNDM begins with Runge-Kutta steps on four timesteps.
    return (4, 7) if name == "PNDMScheduler" else (1, 2, 7)


WITHOUT_SAMPLE = ("EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
WITHOUT_SAMPLE = (*WITHOUT_SAMPLE, "PNDMScheduler")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_walks_as_in_the_loop_of_diffusers_alone_and_in_a_batch(name, kind):
    for spacing, steps in itertools.product(SPACINGS, steps_of(name)):
        scheduler = made(name, prediction_type=kind, timestep_spacing=spacing, steps_offset=1)
        states = run(scheduler, kind, start(), steps, (4, 5))
        latents = states[-1].latents
        assert bool(latents.isfinite().all())
        # These do not take a prediction of x_0 in diffusers; v at the same x_t is the same.
        asked = "v_prediction" if kind == "sample" and name in WITHOUT_SAMPLE else kind
        theirs = made(name, prediction_type=asked, timestep_spacing=spacing, steps_offset=1)
        expected = loop_of_diffusers(theirs, asked, start(), steps, (4, 5))
        most = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * most, msg=f"{spacing} {steps}")
        alone = run(scheduler, kind, start()[1:], steps, (5,))[-1].latents
        torch.testing.assert_close(alone, latents[1:], rtol=1e-5, atol=1e-5)
        # x̂_0 is that of the network at x_t.
        assert float((states[0].pred_original_sample - 0.7).abs().max()) < 12  # at the last noise level


LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@pytest.mark.parametrize(("name", "key"), [(n, key) for n in NAMES for key in LEVELS if key in SCHEDULERS.get(n, ())])
def test_other_noise_levels_are_walked_as_in_diffusers(name, key):
    for kind in ("sample", "v_prediction"):
        if kind == "sample" and name in WITHOUT_SAMPLE:
            continue
        scheduler = made(name, prediction_type=kind, **{key: True})
        states = run(scheduler, kind, start(), 6, (4, 5))
        expected = loop_of_diffusers(scheduler, kind, start(), 6, (4, 5))
        torch.testing.assert_close(states[-1].latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "KDPM2DiscreteScheduler"])
def test_x_0_is_computed_at_the_noise_level_of_the_scheduler_and_not_of_its_rounded_timestep(name):
    scheduler, asked = made(name, use_karras_sigmas=True), []

    def denoise(x, t):
        asked.append((x, network("epsilon")(x, t)))
        return asked[-1][1]

    states = run(scheduler, "epsilon", start(), 4, (), denoise=denoise)
    laid = copy.deepcopy(scheduler)
    laid.set_timesteps(4)
    for index, (state, (x, noise)) in enumerate(zip(states, asked, strict=True)):
        between = name.startswith("KDPM2") and index % 2  # it asks in the middle of each step too
        level = float((laid.sigmas_interpol if between else laid.sigmas)[index])
        alpha = 1 / (1 + level**2) ** 0.5
        original = (x - level * alpha * noise) / alpha
        torch.testing.assert_close(state.pred_original_sample, original, rtol=1e-4, atol=1e-4)
    # And the bounds of x̂_0 are kept by what the scheduler makes of it.
    last = run(scheduler, "epsilon", start(), 8, (), clip_x0=lambda x: x.clamp(0.5, 0.9))[-1]
    torch.testing.assert_close(last.pred_original_sample, last.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_learned_variances_are_drawn_as_by_our_ddpm_but_for_the_last_step_of_a_trailing_grid(spacing):
    def denoise(x, t):
        return torch.cat([network("epsilon")(x, t), torch.tanh(x)], dim=1)

    keys = {"clip_sample": False, "variance_type": "learned_range", "timestep_spacing": spacing}
    scheduler = diffusers.DDPMScheduler(**SD, **keys)
    states = run(scheduler, "epsilon", start(1), 20, (5,), denoise=denoise, learned_variance=True)
    (source,) = generators(5)
    ours = list(
        ddpm(
            denoise,
            start(1),
            SCHEDULE,
            SCHEDULE.grid(20, spacing),
            noise=lambda: torch.randn(1, 3, 4, 4, generator=source),
            variance="learned",
        )
    )
    torch.testing.assert_close(states[-2].latents, ours[-2].latents, rtol=1e-4, atol=1e-5)
    # diffusers adds noise wherever t > 0, and 20 trailing timesteps end at 49.
    same = torch.allclose(states[-1].latents, ours[-1].latents, rtol=1e-4, atol=1e-5)
    assert same == (spacing != "trailing")


def test_numpy_makes_one_timestep_too_many_at_62_counts():
    assert len(ONE_TOO_MANY) == 62
    assert ONE_TOO_MANY[:3] == [61, 103, 121]


TRAILING = [name for name in NAMES if "timestep_spacing" in SCHEDULERS.get(name, ())]


@pytest.mark.parametrize("name", TRAILING)
def test_a_trailing_grid_ends_in_time_at_all_of_them(name):
    every = 20 if name.startswith("KDPM2") else 1  # which search a table for each timestep
    for steps in ONE_TOO_MANY[::every]:
        scheduler = made(name, timestep_spacing="trailing")
        set_timesteps(scheduler, steps, torch.device("cpu"))
        walked = list(dict.fromkeys(scheduler.timesteps.tolist()))
        grid = [step.t for step in SCHEDULE.grid(steps, "trailing")]
        assert min(walked) == grid[-1] >= 0
        if name.startswith("KDPM2"):  # between them as well
            assert set(grid) <= set(walked)
        elif name != "PNDMScheduler":
            assert walked == grid
        assert scheduler.num_inference_steps == steps


@pytest.mark.parametrize("name", [name for name in TRAILING if name != "LMSDiscreteScheduler"])  # which integrates
def test_a_walk_with_such_a_count_is_that_of_its_neighbor(name):
    steps, kind, clip_x0 = 61, "v_prediction", lambda x: x.clamp(-1, 1)
    pictures = []
    for count in (steps, steps + 1):
        scheduler = made(name, timestep_spacing="trailing", prediction_type=kind, skip_prk_steps=True)
        pictures.append(run(scheduler, kind, start(), count, (4, 5), clip_x0=clip_x0))
    assert all(0 <= state.timestep <= 999 for state in pictures[0])
    if not any(mark in name for mark in ("DDPM", "Ancestral", "SASolver")):  # those draw other noise
        torch.testing.assert_close(pictures[0][-1].latents, pictures[1][-1].latents, rtol=0, atol=0.05)
    assert abs(float(pictures[0][-1].latents.mean()) - 0.7) < 0.3


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_euler_is_our_ddim_at_such_a_count(name):
    scheduler = made(name, timestep_spacing="trailing")
    latents = start() * (1 if name == "DDIMScheduler" else 1 / float(SCHEDULE.sigma[-1]))  # theirs starts from x/α
    *_, ours = ddim(network("epsilon"), start(), SCHEDULE, SCHEDULE.grid(61))
    theirs = run(scheduler, "epsilon", latents, 61, ())[-1]
    # diffusers' DDIM steps to t − T // S instead of the next timestep.
    torch.testing.assert_close(theirs.latents, ours.latents, rtol=0, atol=0.05 if name == "DDIMScheduler" else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAILING)
def test_such_counts_draw(name):
    for steps in ONE_TOO_MANY[:12]:
        scheduler = made(name, timestep_spacing="trailing", skip_prk_steps=True)
        last = run(scheduler, "epsilon", start(1), steps, (4,), clip_x0=lambda x: x.clamp(-1, 1))[-1]
        assert bool(last.latents.isfinite().all())
        assert abs(float(last.latents.mean()) - 0.7) < 0.4, steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [10, 50])
def test_at_each_number_of_steps_it_walks_as_there_or_is_refused(name, total):
    schedule = NoiseSchedule.from_config(ScheduleConfig(num_train_timesteps=total))
    for spacing, steps in itertools.product(SPACINGS, (1, 3, 9, 10)):
        scheduler = made(name, total, steps_offset=1, timestep_spacing=spacing, original_inference_steps=10)
        latents, refusal = None, ""
        try:
            latents = run(scheduler, "epsilon", start(), steps, (4, 5), schedule)[-1].latents
        except ValueError as error:
            refusal = str(error)
        if latents is None:
            assert name in refusal and "\n" not in refusal
        else:
            expected = loop_of_diffusers(scheduler, "epsilon", start(), steps, (4, 5), schedule)
            torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


class _Drawing(EulerDiscreteScheduler):
    """Adds noise of the process, with no generator."""

    def step(self, *arguments, **named):
        result = super().step(*arguments, **named)
        result.prev_sample = result.prev_sample + torch.randn_like(result.prev_sample)
        return result


class _DrawingFromASeed(EulerDiscreteScheduler):
    """Adds noise from a generator of its own, as a Brownian tree with a seed does."""

    def step(self, *arguments, **named):
        result = super().step(*arguments, **named)
        noise = torch.randn(result.prev_sample.shape, generator=torch.Generator().manual_seed(3))
        result.prev_sample = result.prev_sample + noise
        return result


@pytest.mark.parametrize("kind", [_Drawing, _DrawingFromASeed])
def test_noise_that_is_not_of_the_images_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} draws noise of its own, which depends on the batch"):
        run(kind(**SD), "epsilon", start(), 3, (4, 5))
    # A network may draw what it likes.
    state = run(EulerDiscreteScheduler(**SD), "epsilon", start(), 2, (), denoise=lambda x, t: torch.randn_like(x))[-1]
    assert bool(state.latents.isfinite().all())


def test_the_noise_of_dpm_solver_sde_is_refused():
    pytest.importorskip("torchsde")
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    for seed in (None, 4):
        with pytest.raises(ValueError, match="DPMSolverSDEScheduler draws noise of its own"):
            run(DPMSolverSDEScheduler(**SD, noise_sampler_seed=seed), "epsilon", start(), 3, (4, 5))


CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.02, "sigma_max": 5.0}


@pytest.mark.parametrize(
    ("name", "keys", "steps", "message"),
    [
        ("EulerDiscreteScheduler", CONTINUOUS | {"use_karras_sigmas": True}, 6, "timestep_type 'continuous'"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, 6, "has use_flow_sigmas True: it samples another"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, 6, "has use_flow_sigmas True"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, 6, "about alpha .*, where this model was"),
        ("PNDMScheduler", {}, 3, r"PNDMScheduler has no grid of 3 steps \(operands could not"),
        ("LCMScheduler", {}, 60, "LCMScheduler has no grid of 60 steps"),
        ("DDIMScheduler", {"steps_offset": 1}, 1000, "DDIMScheduler asks at timestep 1000 with 1000 steps, outside 0"),
        ("RePaintScheduler", {}, 5, "RePaintScheduler needs original_image at every step"),
        ("CogVideoXDDIMScheduler", {}, 5, "CogVideoXDDIMScheduler has other betas"),
        ("IPNDMScheduler", {}, 5, "IPNDMScheduler has no alphas_cumprod"),
    ],
)  # fmt: skip
def test_what_would_walk_another_way_is_refused_by_name(name, keys, steps, message):
    kind = keys.get("prediction_type", "epsilon")
    with pytest.raises(ValueError, match=message):
        run(made(name, **keys), kind, start(), steps, (4, 5))


def test_unclip_which_steps_by_one_timestep_is_refused():
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="cosine"))
    with pytest.raises(ValueError, match="UnCLIPScheduler needs prev_timestep at every step"):
        check_scheduler(UnCLIPScheduler(clip_sample=False), schedule, "epsilon", eta=0.0)


def test_numbers_that_are_not_finite_are_refused_and_those_of_the_network_are_not_blamed_on_it():
    # Eleven evenly spaced timesteps of ten: two are one, and a step between them has no length.
    schedule = NoiseSchedule.from_config(ScheduleConfig(num_train_timesteps=10))
    scheduler = made("DPMSolverMultistepScheduler", 10)
    with pytest.raises(ValueError, match=r"not finite at timestep \d of 10 steps, as where two steps have one noise"):
        run(scheduler, "epsilon", start(), 10, (4, 5), schedule)
    nan = run(EulerDiscreteScheduler(**SD), "epsilon", start(), 2, (), denoise=lambda x, t: x * torch.nan)
    assert bool(nan[-1].latents.isnan().all())
