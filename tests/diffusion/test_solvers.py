"""DPM-Solver++ step by step against diffusers; Euler–Maruyama against its formula."""

import math

import pytest
import torch

from ldm.diffusion import NoiseSchedule, ScheduleConfig, Step, ddpm, dpm_solver_pp_2m, euler_maruyama

KEYS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
SHAPE = (2, 3, 4, 4)


def network(x, t):
    return torch.tanh(x * 0.7 + 0.001 * t) + 0.1 * x.roll(1, -1)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 7, 20, 33])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_dpm_solver_is_that_of_diffusers_on_its_own_timesteps(kind, spacing, steps, end):
    from diffusers import DPMSolverMultistepScheduler

    # lower_order_final is theirs alone below 15 steps; at sigma zero the last step is of first order in either case
    theirs = DPMSolverMultistepScheduler(
        **KEYS, prediction_type=kind, timestep_spacing=spacing, final_sigmas_type=end, lower_order_final=end == "zero"
    )
    schedule = NoiseSchedule.from_config(ScheduleConfig(set_alpha_to_one=end == "zero"))
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps.tolist()
    grid = [Step(t, t_prev) for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    if spacing == "trailing":
        assert tuple(grid) == schedule.grid(steps, spacing)
    latents = start()
    for state, t in zip(
        dpm_solver_pp_2m(network, start(), schedule, grid, prediction_type=kind), timesteps, strict=True
    ):
        latents = theirs.step(network(latents, t), t, latents).prev_sample
        assert state.timestep == t
        torch.testing.assert_close(state.latents, latents, rtol=2e-4, atol=2e-4)


def test_dpm_solver_ends_in_its_last_prediction_of_x_0():
    *_, last = dpm_solver_pp_2m(network, start(), SCHEDULE, SCHEDULE.grid(5), clip_x0=lambda x: x.clamp(-0.5, 0.5))
    assert torch.equal(last.latents, last.pred_original_sample)
    assert float(last.latents.abs().max()) == 0.5  # the projection counts


def test_dpm_solver_stands_still_where_the_end_is_the_first_noise_level():
    # set_alpha_to_one false, and a grid that walks down to t = 0: the last step has no length
    schedule = NoiseSchedule.from_config(ScheduleConfig(set_alpha_to_one=False))
    *_, before, last = dpm_solver_pp_2m(network, start(), schedule, schedule.grid(10, "linspace"))
    assert (before.timestep, last.timestep) == (111, 0)
    torch.testing.assert_close(last.latents, before.latents)


def test_euler_maruyama_is_its_formula():
    betas = [0.1, 0.2, 0.3]
    schedule = NoiseSchedule.from_betas(betas)
    x, z = start().double(), torch.ones(SHAPE, dtype=torch.float64)
    first, last = euler_maruyama(network, x, schedule, [Step(2, 0), Step(0, -1)], noise=lambda: z)
    # ∫ β dt over the stride of two steps
    duration = -math.log(0.8) - math.log(0.7)
    score = -network(x, 2) / math.sqrt(1 - 0.9 * 0.8 * 0.7)
    torch.testing.assert_close(first.latents, x + duration * (x / 2 + score) + math.sqrt(duration) * z)
    # the end has no noise
    duration = -math.log(0.9)
    score = -network(first.latents, 0) / math.sqrt(0.1)
    torch.testing.assert_close(last.latents, first.latents + duration * (first.latents / 2 + score))


def test_euler_maruyama_starts_without_signal_as_ancestral_sampling_does():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.4, 0.0]))
    x, z = start().double(), torch.full(SHAPE, 0.3, dtype=torch.float64)
    keys = {"noise": lambda: z, "prediction_type": "sample", "clip_x0": lambda x: x.clamp(-0.5, 0.5)}
    (state,) = euler_maruyama(network, x, schedule, [Step(2, 1)], **keys)
    alpha, sigma = schedule.alpha_sigma(1)
    torch.testing.assert_close(state.latents, alpha * network(x, 2).clamp(-0.5, 0.5) + sigma * z)
    (other,) = ddpm(network, x, schedule, [Step(2, 1)], **keys)
    torch.testing.assert_close(state.latents, other.latents)


def test_euler_maruyama_follows_a_projected_prediction():
    x = start().double()
    alpha, sigma = SCHEDULE.alpha_sigma(999)
    bounded = euler_maruyama(network, x, SCHEDULE, [Step(999, -1)], noise=start, clip_x0=lambda x: x.clamp(-1, 1))
    (state,) = bounded
    original = ((x - sigma * network(x, 999)) / alpha).clamp(-1, 1)
    epsilon = (x - alpha * original) / sigma
    duration = -2 * math.log(alpha)
    torch.testing.assert_close(state.latents, x + duration * (x / 2 - epsilon / sigma))


@pytest.mark.parametrize("sampler", [dpm_solver_pp_2m, euler_maruyama])
def test_a_network_of_learned_variance_serves(sampler):
    keys = {"noise": start} if sampler is euler_maruyama else {}

    def with_variance(x, t):
        return torch.cat([network(x, t), x], dim=1)

    for one, two in zip(
        sampler(with_variance, start(), SCHEDULE, SCHEDULE.grid(3), **keys),
        sampler(network, start(), SCHEDULE, SCHEDULE.grid(3), **keys),
        strict=True,
    ):
        assert torch.equal(one.latents, two.latents)


@pytest.mark.parametrize("sampler", [dpm_solver_pp_2m, euler_maruyama])
def test_an_empty_grid_is_refused(sampler):
    keys = {"noise": start} if sampler is euler_maruyama else {}
    with pytest.raises(ValueError, match="the grid has 0 steps; it must have 1 to 1000"):
        next(sampler(network, start(), SCHEDULE, [], **keys))
