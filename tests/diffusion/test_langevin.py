"""Annealed Langevin dynamics and the corrector: their formulas, and where their steps come to rest."""

import math
from functools import partial

import pytest
import torch

from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    Step,
    annealed_langevin,
    ddpm,
    euler_maruyama,
    langevin_corrector,
)
from tests.diffusion.gaussian import DEVIATION, MEAN, Coefficients, exact, interior_grid, log_snr_uniform, marginal

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
SHAPE = (2, 3, 4, 4)


def network(x, t):
    return torch.tanh(x * 0.7 + 0.001 * t) + 0.1 * x.roll(1, -1)


def stream(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def test_annealed_langevin_is_algorithm_1_in_the_coordinates_of_ncsn():
    grid = SCHEDULE.grid(4, "leading", steps_offset=3)
    ratio = [sigma / alpha for alpha, sigma in (SCHEDULE.alpha_sigma(step.t) for step in grid)]
    epsilon = 0.3 * ratio[-1] ** 2
    start, theirs_noise = stream()(), stream(seed=1)
    x = start / SCHEDULE.alpha_sigma(grid[0].t)[0]
    states = annealed_langevin(
        network, start, SCHEDULE, grid, noise=stream(seed=1), step_size=0.3, num_langevin_steps=3
    )
    for state, step, level in zip(states, grid, ratio, strict=True):
        alpha = SCHEDULE.alpha_sigma(step.t)[0]
        step_size = epsilon * level**2 / ratio[-1] ** 2
        for _ in range(3):
            score = -network(alpha * x, step.t) / level
            x = x + step_size / 2 * score + math.sqrt(step_size) * theirs_noise()
        assert state.timestep == step.t
        torch.testing.assert_close(state.latents, SCHEDULE.alpha_sigma(step.t_prev)[0] * x)


@pytest.mark.parametrize("step_size", [0.2, 2.0])
def test_langevin_at_one_level_rests_at_its_known_variance(step_size):
    schedule = log_snr_uniform(5, largest=0.5)
    mean, variance = marginal(schedule.alpha_sigma(4))
    rows = Coefficients(302, (0.0, 1.0))  # a wrong start: mean 0.7, variance 1
    step = annealed_langevin(
        rows.denoiser(schedule), rows.latents, schedule, [Step(4, 3)], noise=rows.noise, step_size=step_size,
        num_langevin_steps=300,
    )  # fmt: skip
    scale = schedule.alpha_sigma(3)[0] / schedule.alpha_sigma(4)[0]
    found_mean, found_variance = rows.moments(next(step).latents / scale)
    assert found_mean == pytest.approx(mean, rel=1e-9)
    # x ← x − (k/2) σ² (x − μ)/v + √k σ z has its fixed point at v / (1 − k σ² / 4v)
    sigma = schedule.alpha_sigma(4)[1]
    assert found_variance == pytest.approx(variance / (1 - step_size * sigma**2 / (4 * variance)), rel=1e-9)


def test_annealing_reaches_the_last_level():
    fine = log_snr_uniform()
    errors = []
    for levels in (16, 64):
        rows = Coefficients(levels * 50 + 2, (0.0, 1.0))
        states = annealed_langevin(
            rows.denoiser(fine),
            rows.latents,
            fine,
            interior_grid(fine, levels),
            noise=rows.noise,
            num_langevin_steps=50,
        )
        *_, last = states
        mean, variance = rows.moments(last.latents)
        assert mean == pytest.approx(MEAN, abs=0.01)
        errors.append(abs(math.sqrt(variance) - DEVIATION))
    assert errors[1] < errors[0] < 0.03
    assert errors[1] < 0.01


def test_the_corrector_is_algorithm_5():
    betas = [0.1, 0.5, 0.3]
    schedule = NoiseSchedule.from_betas(betas)
    start = stream()()
    (state,) = langevin_corrector(
        network, start, schedule, [Step(2, 1)], noise=stream(seed=1), snr=0.2, num_corrector_steps=2
    )
    theirs = stream(seed=1)
    (predicted,) = ddpm(network, start, schedule, [Step(2, 1)], noise=theirs)
    x = predicted.latents
    for _ in range(2):
        z = theirs()
        score = -network(x, 1) / math.sqrt(1 - 0.9 * 0.5)
        for i in range(len(x)):
            step_size = 2 * (1 - 0.5) * (0.2 * z[i].norm() / score[i].norm()) ** 2
            x[i] = x[i] + step_size * score[i] + (2 * step_size).sqrt() * z[i]
    torch.testing.assert_close(state.latents, x)
    assert torch.equal(state.pred_original_sample, predicted.pred_original_sample)


def test_a_corrected_sample_does_not_depend_on_its_batch():
    grid, start, drawn = SCHEDULE.grid(4), stream()(), stream(seed=1)
    # ddpm asks for no noise in its last step, and the end has no corrector: three draws for each of the two
    noises = [drawn() for _ in range(6)]

    def run(rows):
        left = iter(noises)
        *_, last = langevin_corrector(network, start[rows], SCHEDULE, grid, noise=lambda: next(left)[rows])
        assert next(left, None) is None
        return last.latents

    torch.testing.assert_close(run(slice(0, 2))[:1], run(slice(0, 1)))


@pytest.mark.parametrize("snr", [0.1, 0.6])
def test_the_corrector_rests_at_its_known_variance(snr):
    schedule = NoiseSchedule.from_betas([0.2, 0.4, 0.3])
    mean, variance = marginal(schedule.alpha_sigma(1))
    noise = stream((20, 1000))
    # One step of the predictor from a wrong start, then only the corrector
    (state,) = langevin_corrector(
        exact(schedule), 3 * noise(), schedule, [Step(2, 1)], noise=noise, predictor=euler_maruyama, snr=snr,
        num_corrector_steps=600,
    )  # fmt: skip
    # Four standard errors of 20000 numbers; the samples drawn along one chain add nothing.
    assert float(state.latents.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 20000))
    assert float(state.latents.var()) == pytest.approx(variance * (1 + 0.6 * snr**2), rel=4 * math.sqrt(2 / 20000))


def test_the_corrector_mends_a_coarse_predictor():
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))
    grid = schedule.grid(20, "leading")
    errors = []
    for sampler in (ddpm, partial(langevin_corrector, snr=0.16, num_corrector_steps=20)):
        noise = stream((20, 1000))
        *_, last = sampler(exact(schedule), noise(), schedule, grid, noise=noise)
        errors.append(abs(float(last.latents.std()) - DEVIATION))
    assert errors[0] > 0.03
    assert errors[1] < errors[0] / 3


def with_variance(x, t):
    return torch.cat([network(x, t), torch.sin(x)], dim=1)


def test_where_the_score_is_0_no_corrector_step_is_taken():
    # A network whose last layer is new predicts zero.
    def blind(x, t):
        return torch.zeros_like(x)

    grid, start, kind = SCHEDULE.grid(3), stream()(), {"noise": stream(seed=1)}
    *_, last = langevin_corrector(blind, start, SCHEDULE, grid, predictor=partial(ddpm, variance="small"), **kind)
    drawn = stream(seed=1)

    def every_other():  # the corrector draws too, and leaves it
        found = drawn()
        drawn()
        return found

    *_, expected = ddpm(blind, start, SCHEDULE, grid, noise=every_other)
    torch.testing.assert_close(last.latents, expected.latents)


@pytest.mark.parametrize("sampler", [annealed_langevin, langevin_corrector])
def test_a_network_of_learned_variance_serves(sampler):
    for one, two in zip(
        sampler(with_variance, stream()(), SCHEDULE, SCHEDULE.grid(3), noise=stream(seed=1)),
        sampler(network, stream()(), SCHEDULE, SCHEDULE.grid(3), noise=stream(seed=1)),
        strict=True,
    ):
        assert torch.equal(one.latents, two.latents)


def test_the_corrector_follows_a_predictor_of_learned_variance():
    step = [Step(999, 500)]
    predictor = partial(ddpm, variance="learned")
    (predicted,) = predictor(with_variance, stream()(), SCHEDULE, step, noise=stream(seed=1))
    # With a tiny r the corrector hardly moves what the predictor gave.
    (state,) = langevin_corrector(
        with_variance, stream()(), SCHEDULE, step, noise=stream(seed=1), predictor=predictor, snr=1e-9
    )
    torch.testing.assert_close(state.latents, predicted.latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "keys", "message"),
    [
        (langevin_corrector, {"snr": 0.0}, r"snr is 0\.0; it must be a finite number above 0"),
        (langevin_corrector, {"snr": math.inf}, "snr is inf"),
        (langevin_corrector, {"num_corrector_steps": 0}, "num_corrector_steps is 0; it must be at least 1"),
        (annealed_langevin, {"step_size": 0.0}, r"step_size is 0\.0; it must lie between 0 and 4"),
        (annealed_langevin, {"step_size": 4.0}, r"step_size is 4\.0"),
        (annealed_langevin, {"num_langevin_steps": 0}, "num_langevin_steps is 0; it must be at least 1"),
    ],
)
def test_arguments_outside_their_range_are_refused(sampler, keys, message):
    with pytest.raises(ValueError, match=message):
        next(sampler(network, stream()(), SCHEDULE, SCHEDULE.grid(2), noise=stream(), **keys))
    with pytest.raises(ValueError, match="the grid has 0 steps"):
        next(sampler(network, stream()(), SCHEDULE, [], noise=stream()))


def test_annealed_langevin_cannot_start_without_signal():
    schedule = NoiseSchedule.from_config(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"timestep 999, where alphas_cumprod is 0; start lower"):
        next(annealed_langevin(network, stream()(), schedule, schedule.grid(5), noise=stream()))
    assert next(annealed_langevin(network, stream()(), schedule, schedule.grid(5, "leading"), noise=stream()))


def test_the_corrector_starts_without_signal():
    schedule = NoiseSchedule.from_config(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    noise = stream((20, 500))
    *_, last = langevin_corrector(
        exact(schedule, "v_prediction"), noise(), schedule, schedule.grid(100), noise=noise, snr=0.1,
        predictor=partial(ddpm, variance="large"), prediction_type="v_prediction",
    )  # fmt: skip
    assert float(last.latents.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(last.latents.std()) == pytest.approx(DEVIATION, rel=0.05)
