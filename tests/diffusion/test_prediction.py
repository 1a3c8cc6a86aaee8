"""Round trips between ε, v and x_0."""

import pytest
import torch

from ldm.diffusion import NoiseSchedule, ScheduleConfig, add_noise, original_and_noise, training_target


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_float64_round_trip_at_every_timestep(kind, schedule):
    value = NoiseSchedule.from_config(ScheduleConfig(beta_schedule=schedule))
    generator = torch.Generator().manual_seed(0)
    original, noise = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    for t in range(value.num_train_timesteps):
        alpha, sigma = value.alpha_sigma(t)
        noisy = add_noise(original, noise, alpha, sigma)
        target = training_target(original, noise, alpha, sigma, kind)
        original_again, noise_again = original_and_noise(target, noisy, alpha, sigma, kind)
        torch.testing.assert_close(original_again, original, rtol=0, atol=1e-15 / alpha + 1e-14)
        torch.testing.assert_close(noise_again, noise, rtol=0, atol=1e-14)


def test_v_is_the_velocity_on_the_circle():
    # x = α x_0 + σ ε with α = cos φ and σ = sin φ: v is dx/dφ.
    original, noise = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 3.0]).double()
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for i in range(2):
        x = angle.cos() * original[i] + angle.sin() * noise[i]
        (slope,) = torch.autograd.grad(x, angle)
        v = training_target(original, noise, angle.cos(), angle.sin(), "v_prediction")[i]
        torch.testing.assert_close(v, slope)


def test_unknown_predictions_are_refused():
    x = torch.zeros(1)
    for function in (training_target, original_and_noise):
        with pytest.raises(ValueError, match="prediction_type is 'score'"):
            function(x, x, 0.6, 0.8, "score")
