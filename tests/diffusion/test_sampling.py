"""Samplers step by step against diffusers, and against data whose exact denoiser is known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ldm.diffusion import NoiseSchedule, ScheduleConfig, ddim, ddpm

KEYS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x, t):
    """Some smooth function, other at every timestep."""
    return torch.tanh(x * 0.7 + 0.001 * t) + 0.1 * x.roll(1, -1)


def shared_noise(count, shape):
    drawn = iter(torch.randn(count, *shape, generator=torch.Generator().manual_seed(3)))
    return lambda: next(drawn)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "offset", "to_one"), [("trailing", 0, True), ("leading", 1, False)])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_that_of_diffusers_step_by_step(kind, eta, spacing, offset, to_one, clip):
    theirs = DDIMScheduler(
        **KEYS, prediction_type=kind, clip_sample=clip, set_alpha_to_one=to_one, steps_offset=offset,
        timestep_spacing=spacing,
    )  # fmt: skip
    schedule = NoiseSchedule.from_config(ScheduleConfig(set_alpha_to_one=to_one))
    theirs.set_timesteps(20)
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours_noise, their_noise = (shared_noise(20, start.shape) for _ in range(2))
    states = ddim(
        network, start, schedule, schedule.grid(20, spacing, steps_offset=offset), eta=eta, noise=ours_noise,
        project=(lambda x: x.clamp(-1, 1)) if clip else (lambda x: x), prediction_type=kind,
    )  # fmt: skip
    latents = start
    for state, t in zip(states, theirs.timesteps.tolist(), strict=True):
        step = theirs.step(
            network(latents, t), t, latents, eta=eta, use_clipped_model_output=clip,
            variance_noise=their_noise() if eta > 0 else None,
        )  # fmt: skip
        latents = step.prev_sample
        assert state.timestep == t
        torch.testing.assert_close(state.latents, latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.pred_original_sample, step.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_is_that_of_diffusers_step_by_step(variance, name, steps):
    theirs = DDPMScheduler(**KEYS, variance_type=name, clip_sample=False, timestep_spacing="trailing")
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    theirs.set_timesteps(steps)
    grid = schedule.grid(steps)
    assert [step.t for step in grid] == theirs.timesteps.tolist()
    latents = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for step in grid:
        # Theirs draws inside step(), ours asks for noise: the same numbers for both.
        drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step.t))
        (state,) = ddpm(network, latents, schedule, [step], noise=lambda drawn=drawn: drawn, variance=variance)
        after = theirs.step(network(latents, step.t), step.t, latents, generator=torch.Generator().manual_seed(step.t))
        if step.t_prev == -1 and step.t > 0 and variance == "large":
            # Algorithm 2 adds no noise in the last step; theirs does so only at t = 0.
            after.prev_sample = state.pred_original_sample
        torch.testing.assert_close(state.latents, after.prev_sample, rtol=1e-3, atol=1e-3)
        latents = state.latents


def exact_denoiser(schedule, mean, deviation):
    """ε̂ for data N(mean, deviation²): E[x_0 | x_t] in closed form."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        original = mean + gain * (x - alpha * mean)
        return (x - alpha * original) / sigma

    return denoise


@pytest.mark.parametrize("sampler", ["ddim 0", "ddim 1", "ddpm small", "ddpm large"])
def test_samples_of_gaussian_data_have_its_mean_and_deviation(sampler):
    mean, deviation = 0.7, 0.4
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20000, 1, generator=generator, dtype=torch.float64)

    def noise():
        return torch.randn(start.shape, generator=generator, dtype=torch.float64)

    denoise, grid = exact_denoiser(schedule, mean, deviation), schedule.grid(1000)
    name, option = sampler.split()
    if name == "ddim":
        states = ddim(denoise, start, schedule, grid, eta=float(option), noise=noise)
    else:
        states = ddpm(denoise, start, schedule, grid, noise=noise, variance=option)
    *_, last = states
    assert float(last.latents.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(20000))
    assert float(last.latents.std()) == pytest.approx(deviation, rel=0.03)


def test_deterministic_ddim_follows_the_exact_flow():
    # For Gaussian data the probability flow maps the quantile of x_T to the same quantile of x_0.
    mean, deviation = 0.7, 0.4
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    start = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.5], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(999)
    expected = mean + deviation * (start - alpha * mean) / math.sqrt(alpha**2 * deviation**2 + sigma**2)
    errors = []
    for steps in (125, 250, 500):
        denoise = exact_denoiser(schedule, mean, deviation)
        *_, last = ddim(denoise, start, schedule, schedule.grid(steps))
        errors.append(float((last.latents - expected).abs().max()))
    assert errors[-1] < 0.015
    # A solver of first order: half the stride, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    with pytest.raises(ValueError, match=f"eta is {eta}"):
        next(ddim(network, torch.zeros(1, 2), schedule, schedule.grid(2), eta=eta))


def test_an_unknown_variance_is_refused():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    with pytest.raises(ValueError, match="variance is 'medium'"):
        next(ddpm(network, torch.zeros(1, 2), schedule, schedule.grid(2), noise=lambda: 0, variance="medium"))
