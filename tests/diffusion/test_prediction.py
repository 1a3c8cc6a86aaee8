"""Round trips between ε, x_0, v, μ̃ and the score, at every timestep of every schedule."""

from typing import get_args

import pytest
import torch

from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    add_noise,
    split_variance,
    to_epsilon_model,
    training_target,
    x0_and_epsilon,
)
from ldm.diffusion.denoiser import Quantity, convert, score_from_epsilon
from ldm.diffusion.schedule import BetaSchedule

QUANTITIES = get_args(Quantity)
SCHEDULES = [(name, rescaled) for name in get_args(BetaSchedule) for rescaled in (False, True)]


def schedule_of(name, rescaled=False):
    return NoiseSchedule.from_config(
        ScheduleConfig(beta_schedule=name, rescale_betas_zero_snr=rescaled, prediction_type="v_prediction")
    )


def table_of_quantities(schedule):
    """For one x_0 and ε, each quantity at every timestep [T, 4], from its definition."""
    generator = torch.Generator().manual_seed(0)
    original, noise = torch.randn(2, 1000, 4, dtype=torch.float64, generator=generator)
    alpha, sigma = schedule.alpha.view(-1, 1), schedule.sigma.view(-1, 1)
    a, b = (table.view(-1, 1) for table in schedule.posterior_mean_coefficients)
    noisy = alpha * original + sigma * noise
    values = {
        "epsilon": noise,
        "sample": original,
        "v_prediction": alpha * noise - sigma * original,
        "posterior_mean": a * original + b * noisy,
        "score": -(noisy - alpha * original) / sigma**2,
    }
    return noisy, alpha, sigma, (a, b), values


@pytest.mark.parametrize(("name", "rescaled"), SCHEDULES)
@pytest.mark.parametrize("source", QUANTITIES)
@pytest.mark.parametrize("target", QUANTITIES)
def test_float64_round_trip_at_every_timestep(name, rescaled, source, target):
    schedule = schedule_of(name, rescaled)
    noisy, alpha, sigma, (a, b), values = table_of_quantities(schedule)
    # By what rounding errors of about 1e-15 grow: on the way to x_0, and from there.
    inward = {"epsilon": 1 / alpha, "score": 1 / alpha, "posterior_mean": 1 / a}
    outward = {"epsilon": 1 / sigma, "v_prediction": 1 / sigma, "score": 1 / sigma**2}
    one = torch.ones_like(alpha)
    last = {source, target} & {"epsilon", "score"} and {source, target} - {"epsilon", "score"}
    rows = slice(0, 999 if rescaled and last else 1000)  # what is singular at the end has a test of its own
    for first, second in ((source, target), (target, source)):
        found = convert(
            values[first][rows],
            noisy[rows],
            first,
            second,
            alpha=alpha[rows],
            sigma=sigma[rows],
            posterior=(a[rows], b[rows]),
        )
        growth = (inward.get(first, one) * outward.get(second, one)).clamp(min=1)[rows]
        error = (found - values[second][rows]).abs() / (growth + values[second][rows].abs())
        assert float(error.max()) < 2e-14


@pytest.mark.parametrize("source", QUANTITIES)
@pytest.mark.parametrize("target", QUANTITIES)
def test_without_signal_only_the_noise_is_known_from_the_noise(source, target):
    schedule = schedule_of("linear", rescaled=True)
    noisy, _, _, (a, b), values = table_of_quantities(schedule)
    alpha, sigma = schedule.alpha_sigma(999)
    assert (alpha, sigma) == (0, 1)
    keys = {"alpha": alpha, "sigma": sigma, "posterior": (float(a[-1]), float(b[-1]))}
    known = {"epsilon", "score"}
    if source in known and target not in known:
        with pytest.raises(ValueError, match="alpha is 0: x_t is the noise itself and says nothing about x_0"):
            convert(values[source][-1], noisy[-1], source, target, **keys)
    else:
        found = convert(values[source][-1], noisy[-1], source, target, **keys)
        torch.testing.assert_close(found, values[target][-1], rtol=0, atol=1e-13)


def test_without_noise_x_0_does_not_say_what_the_noise_was():
    x = torch.ones(2)
    assert torch.equal(convert(x, x, "sample", "posterior_mean", alpha=1.0, sigma=0.0, posterior=(1.0, 0.0)), x)
    for target in ("epsilon", "v_prediction", "score"):
        with pytest.raises(ValueError, match="sigma is 0: x_t is x_0 itself"):
            convert(x, x, "sample", target, alpha=torch.ones(2), sigma=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="sigma is 0"):
        score_from_epsilon(x, 0.0)
    with pytest.raises(ValueError, match="the weight of x_0 in the posterior mean is 0"):
        convert(x, x, "posterior_mean", "sample", alpha=0.6, sigma=0.8, posterior=(0.0, 1.0))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("name", "rescaled"), SCHEDULES)
def test_a_target_says_what_x_0_and_the_noise_were(kind, name, rescaled):
    schedule = schedule_of(name, rescaled)
    generator = torch.Generator().manual_seed(0)
    original, noise = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    for t in range(1000 if kind != "epsilon" else 1000 - rescaled):
        alpha, sigma = schedule.alpha_sigma(t)
        noisy = add_noise(original, noise, alpha, sigma)
        target = training_target(original, noise, alpha, sigma, kind)
        original_again, noise_again = x0_and_epsilon(target, noisy, alpha, sigma, kind)
        gain = 1 / alpha if kind == "epsilon" else 1
        torch.testing.assert_close(original_again, original, rtol=0, atol=1e-15 * gain + 1e-14)
        torch.testing.assert_close(noise_again, noise, rtol=0, atol=1e-14 / sigma)


def test_v_is_the_velocity_on_the_circle():
    # x = α x_0 + σ ε with α = cos φ and σ = sin φ: v is dx/dφ.
    original, noise = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 3.0]).double()
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for i in range(2):
        x = angle.cos() * original[i] + angle.sin() * noise[i]
        (slope,) = torch.autograd.grad(x, angle)
        v = training_target(original, noise, angle.cos(), angle.sin(), "v_prediction")[i]
        torch.testing.assert_close(v, slope)


def test_the_posterior_mean_is_that_of_bayes():
    # q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0): precisions add, and means by their precision.
    schedule = NoiseSchedule.from_betas([0.1, 0.3, 0.6])
    original, noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, 2):
        alpha, sigma = schedule.alpha_sigma(t)
        noisy = add_noise(original, noise, alpha, sigma)
        beta, previous = float(schedule.betas[t]), float(schedule.alphas_cumprod[t - 1])
        precision = (1 - beta) / beta + 1 / (1 - previous)
        mean = ((1 - beta) ** 0.5 / beta * noisy + previous**0.5 / (1 - previous) * original) / precision
        posterior = tuple(float(table[t]) for table in schedule.posterior_mean_coefficients)
        found = training_target(original, noise, alpha, sigma, "posterior_mean", posterior=posterior)
        torch.testing.assert_close(found, mean, rtol=1e-13, atol=1e-13)
        assert float(schedule.posterior_variance[t]) == pytest.approx(1 / precision, rel=1e-12)
    assert [float(table[0]) for table in schedule.posterior_mean_coefficients] == [1, 0]  # before t = 0 stands x_0
    assert float(schedule.posterior_variance[0]) == 0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("learned", [False, True])
def test_any_denoiser_becomes_one_that_predicts_the_noise(kind, learned):
    schedule = schedule_of("linear")
    original, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = schedule.posterior_mean_coefficients

    def denoise(x_t, t):
        posterior = (float(a[t]), float(b[t]))
        prediction = training_target(original, noise, *schedule.alpha_sigma(t), kind, posterior=posterior)
        return torch.cat([prediction, torch.full_like(prediction, t)], dim=1) if learned else prediction

    for t in (0, 1, 500, 999):
        output = to_epsilon_model(denoise, schedule, kind)(add_noise(original, noise, *schedule.alpha_sigma(t)), t)
        torch.testing.assert_close(output[:, :3], noise, rtol=0, atol=1e-10)
        assert output.shape[1] == (6 if learned else 3)
        assert bool((output[:, 3:] == t).all())  # what says the variance is passed on


def test_channels_that_are_neither_c_nor_2c_are_refused():
    with pytest.raises(ValueError, match=r"gives \[1, 3, 4, 4\] for latents \[1, 2, 4, 4\]; .* or \[1, 4, 4, 4\]"):
        split_variance(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4))


def test_unknown_predictions_are_refused():
    x = torch.zeros(1)
    for function in (training_target, x0_and_epsilon):
        with pytest.raises(ValueError, match="prediction_type is 'score'"):
            function(x, x, 0.6, 0.8, "score")
    with pytest.raises(ValueError, match=r"prediction_type is 'posterior_mean'; .*to_epsilon_model"):
        x0_and_epsilon(x, x, 0.6, 0.8, "posterior_mean")
    with pytest.raises(ValueError, match="'flow' is no quantity"):
        convert(x, x, "epsilon", "flow", alpha=0.6, sigma=0.8)
    for source, target in (("epsilon", "posterior_mean"), ("posterior_mean", "sample")):
        with pytest.raises(ValueError, match="posterior_mean needs the two coefficients"):
            convert(x, x, source, target, alpha=0.6, sigma=0.8)
