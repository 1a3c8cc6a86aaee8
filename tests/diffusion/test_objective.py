"""The simple loss against its definition, and the two halves of guidance."""

import pytest
import torch

from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    classifier_free_guidance,
    diffusion_loss,
    drop_conditioning,
)

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())


def draws(batch=5):
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, batch, 2, 3, 3, generator=generator)
    return latents, noise, torch.tensor([0, 10, 500, 900, 999])[:batch]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_denoiser_has_no_loss(kind):
    latents, noise, timesteps = draws()
    alpha, sigma = SCHEDULE.coefficients(timesteps, latents)

    def perfect(x_t, t, condition):
        assert torch.equal(t, timesteps)
        torch.testing.assert_close(x_t, alpha * latents + sigma * noise)
        return noise if kind == "epsilon" else alpha * noise - sigma * latents

    loss = diffusion_loss(
        perfect, SCHEDULE, latents, torch.zeros(5, 1, 1), timesteps=timesteps, noise=noise, prediction_type=kind
    )
    torch.testing.assert_close(loss, torch.zeros(5))


def test_the_loss_is_the_mean_square_of_each_sample():
    latents, noise, timesteps = draws()
    offset = torch.arange(5.0).view(5, 1, 1, 1)
    loss = diffusion_loss(
        lambda x, t, c: noise + offset, SCHEDULE, latents, torch.zeros(5, 1, 1), timesteps=timesteps, noise=noise
    )
    torch.testing.assert_close(loss, torch.arange(5.0) ** 2)
    assert loss.shape == (5,)


def test_captions_are_dropped_sample_by_sample():
    condition, null = torch.ones(3, 2, 4), torch.zeros(1, 2, 4)
    dropped = drop_conditioning(condition, null, torch.tensor([True, False, True]))
    assert dropped[:, 0, 0].tolist() == [0.0, 1.0, 0.0]


def linear_denoiser(calls):
    def denoise(x, t, condition):
        calls.append((len(x), t.tolist()))
        return x * condition.mean(dim=(1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)

    return denoise


@pytest.mark.parametrize(
    ("scale", "factor", "evaluated"), [(0, 2.0, 3), (1, 5.0, 3), (7.5, 2 + 7.5 * 3, 6), (-1.0, -1.0, 6)]
)
def test_guidance_is_the_formula(scale, factor, evaluated):
    calls = []
    x = torch.randn(3, 2, 4, 4)
    condition, null = torch.full((3, 2, 1), 5.0), torch.full((3, 2, 1), 2.0)
    guided = classifier_free_guidance(linear_denoiser(calls), condition, null, scale)(x, 4)
    torch.testing.assert_close(guided, factor * x + 4)
    assert calls == [(evaluated, [4] * evaluated)]  # what cancels is not computed
