"""The losses against their definitions, the draw of timesteps, and the two halves of guidance."""

import math
import statistics
from fractions import Fraction

import pytest
import torch

from ldm.diffusion import (
    LossConfig,
    NoiseSchedule,
    ScheduleConfig,
    classifier_free_guidance,
    diffusion_loss,
    discretized_decoder,
    drop_conditioning,
    logit_normal_timesteps,
    loss_weights,
    stratified_timestep,
    training_target,
    variational_terms,
)
from ldm.diffusion.denoiser import convert, score_from_epsilon

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
KINDS = ["epsilon", "sample", "v_prediction", "posterior_mean"]


def draws(batch=5):
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, batch, 2, 3, 3, generator=generator)
    return latents, noise, torch.tensor([0, 10, 500, 900, 999])[:batch]


def posterior_at(timesteps):
    return tuple(table[timesteps].float().view(-1, 1, 1, 1) for table in SCHEDULE.posterior_mean_coefficients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_denoiser_has_no_loss(kind):
    latents, noise, timesteps = draws()
    alpha, sigma = SCHEDULE.coefficients(timesteps, latents)

    def perfect(x_t, t, condition):
        assert torch.equal(t, timesteps)
        torch.testing.assert_close(x_t, alpha * latents + sigma * noise)
        a, b = posterior_at(timesteps)
        return {
            "epsilon": noise,
            "sample": latents,
            "v_prediction": alpha * noise - sigma * latents,
            "posterior_mean": a * latents + b * x_t,
        }[kind]

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


@pytest.mark.parametrize("kind", KINDS)
def test_every_simple_loss_is_the_square_in_its_own_quantity(kind):
    latents, noise, timesteps = draws()
    alpha, sigma = SCHEDULE.coefficients(timesteps, latents)
    target = training_target(latents, noise, alpha, sigma, kind, posterior=posterior_at(timesteps))
    keys = {"timesteps": timesteps, "noise": noise, "prediction_type": kind}
    loss = diffusion_loss(lambda x, t, c: target + 0.5, SCHEDULE, latents, torch.zeros(5, 1, 1), **keys)
    torch.testing.assert_close(loss, torch.full((5,), 0.25))


def test_denoising_score_matching_weighted_by_the_variance_is_the_simple_loss():
    # NCSN (arXiv:1907.05600), Eq. 5 and 6 with λ = σ²: the target is the gradient of log q(x_t | x_0), by autograd.
    latents, noise, timesteps = (x.double() if x.is_floating_point() else x for x in draws())
    alpha, sigma = SCHEDULE.coefficients(timesteps, latents)
    network = torch.nn.Conv2d(2, 2, 3, padding=1).double()
    x_t = (alpha * latents + sigma * noise).requires_grad_()
    log_density = torch.distributions.Normal(alpha * latents, sigma.expand_as(latents)).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_density, x_t)
    score = score_from_epsilon(network(x_t), sigma)
    matching = (sigma**2 * (score - gradient) ** 2).flatten(1).mean(dim=1)
    condition = torch.zeros(5, 1, 1)
    simple = diffusion_loss(lambda x, t, c: network(x), SCHEDULE, latents, condition, timesteps=timesteps, noise=noise)
    torch.testing.assert_close(matching, simple, rtol=1e-10, atol=0)


def test_weights_are_those_of_the_papers():
    ratio = SCHEDULE.snr
    capped = torch.minimum(ratio, torch.tensor(5.0).double())
    assert 0 < int((ratio > 5).sum()) < 1000
    # arXiv:2303.09556, section 3.4 and appendix: for x_0, ε and v.
    min_snr = LossConfig(weighting="min_snr")
    for kind, expected in (("sample", capped), ("epsilon", capped / ratio), ("v_prediction", capped / (ratio + 1))):
        torch.testing.assert_close(loss_weights(SCHEDULE, kind, min_snr), expected, rtol=1e-10, atol=0)
    # DDPM, Eq. 12, at t > 1 (here t > 0), in bits and for all T terms at once.
    betas, scale = SCHEDULE.betas, 1000 / math.log(2)
    for variance, squared in (("small", SCHEDULE.posterior_variance), ("large", betas)):
        expected = scale * betas**2 / (2 * squared * (1 - betas) * (1 - SCHEDULE.alphas_cumprod))
        found = loss_weights(SCHEDULE, "epsilon", LossConfig(weighting="vlb", variance=variance))
        torch.testing.assert_close(found[1:], expected[1:], rtol=1e-9, atol=0)
        # t = 0: −log N(x_0; x̂_0, σ²) as an error of ε sees it; β̃_0 = 0 is replaced by β̃_1.
        first = SCHEDULE.posterior_variance[1] if variance == "small" else betas[0]
        gain = (1 - SCHEDULE.alphas_cumprod[0]) / SCHEDULE.alphas_cumprod[0]
        assert float(found[0]) == pytest.approx(float(scale * gain / (2 * first)), rel=1e-10)
    with pytest.raises(ValueError, match="'hybrid', which is no weight"):
        loss_weights(SCHEDULE, "epsilon", LossConfig(weighting="hybrid"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["vlb", "min_snr"])
def test_weighted_losses_do_not_depend_on_what_is_predicted(kind, weighting):
    latents, noise, timesteps = (x.double() if x.is_floating_point() else x for x in draws())
    wrong = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    posterior = tuple(table[timesteps].view(-1, 1, 1, 1) for table in SCHEDULE.posterior_mean_coefficients)

    def loss_of(kind):
        def denoiser(x_t, t, condition):
            alpha, sigma = SCHEDULE.coefficients(timesteps, x_t)
            return convert(wrong, x_t, "sample", kind, alpha=alpha, sigma=sigma, posterior=posterior)

        keys = {"timesteps": timesteps, "noise": noise, "prediction_type": kind}
        loss = LossConfig(weighting=weighting, gamma=3.0)
        return diffusion_loss(denoiser, SCHEDULE, latents, torch.zeros(5, 1, 1), loss=loss, **keys)

    torch.testing.assert_close(loss_of(kind), loss_of("sample"), rtol=1e-8, atol=0)
    if weighting == "min_snr":
        expected = SCHEDULE.snr[timesteps].clamp(max=3.0) * (wrong - latents).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(loss_of(kind), expected, rtol=1e-8, atol=0)


def test_the_hybrid_loss_teaches_the_variance_alone_by_the_bound():
    latents, noise, timesteps = draws()
    latents = ((latents * 60).round().clamp(-127, 128) + 127) / 127.5 - 1  # pixels, for the decoder at timestep 0
    output = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def loss_of(weight):
        loss = LossConfig(weighting="hybrid", vlb_weight=weight)
        keys = {"timesteps": timesteps, "noise": noise, "loss": loss, "decoder": discretized_decoder()}
        return diffusion_loss(lambda x, t, c: output, SCHEDULE, latents, torch.zeros(5, 1, 1), **keys)

    prediction, fraction = output[:, :2], output[:, 2:]
    simple = (prediction - noise).square().flatten(1).mean(dim=1)
    alpha, sigma = SCHEDULE.coefficients(timesteps, latents)
    keys = {"decoder": discretized_decoder(), "variance": "learned"}
    terms = variational_terms(output, alpha * latents + sigma * noise, latents, SCHEDULE, timesteps, **keys)
    torch.testing.assert_close(loss_of(0.001), simple + 0.001 * 1000 * terms)  # Improved DDPM, Eq. 16
    (gradient,) = torch.autograd.grad(loss_of(10.0).sum(), output)
    (mean_gradient,) = torch.autograd.grad(simple.sum(), prediction)
    torch.testing.assert_close(gradient[:, :2], mean_gradient)
    assert bool((gradient[:, 2:].abs().flatten(1).sum(dim=1) > 0).all())
    assert fraction.shape == (5, 2, 3, 3)


def test_the_learned_variance_that_minimises_the_bound_is_the_mean_square():
    # The divergence from N(μ̃, β̃) to N(μ, e^l) is least where e^l = β̃ + (μ̃ − μ)².
    timesteps, noise = torch.tensor([400]), torch.ones(1, 1, 1, 1).double()
    latents, error = torch.full_like(noise, 0.3), 0.1
    beta, small = float(SCHEDULE.betas[400]), float(SCHEDULE.posterior_variance[400])
    weight = beta / math.sqrt((1 - beta) * (1 - float(SCHEDULE.alphas_cumprod[400])))  # of ε in μ, DDPM, Eq. 11
    best = math.log(small + (weight * error) ** 2)
    fraction = 2 * (best - math.log(small)) / (math.log(beta) - math.log(small)) - 1
    output = torch.cat([noise + error, torch.full_like(noise, fraction)], dim=1).requires_grad_()
    loss = LossConfig(weighting="hybrid", vlb_weight=1.0)
    keys = {"timesteps": timesteps, "noise": noise, "loss": loss}
    value = diffusion_loss(lambda x, t, c: output, SCHEDULE, latents, torch.zeros(1, 1, 1), **keys)
    (gradient,) = torch.autograd.grad(value.sum(), output)
    assert abs(float(gradient[0, 1])) < 1e-9
    assert abs(float(gradient[0, 0])) == pytest.approx(2 * error)


@pytest.mark.parametrize("weighting", ["simple", "vlb", "min_snr", "hybrid"])
def test_channels_that_do_not_fit_the_loss_are_refused(weighting):
    latents, noise, timesteps = draws()
    wrong = noise if weighting == "hybrid" else torch.cat([noise, noise], dim=1)
    keys = {"timesteps": timesteps, "noise": noise, "loss": LossConfig(weighting=weighting)}
    message = f"loss.weighting is '{weighting}' but the denoiser gives {wrong.shape[1]} channels for 2"
    with pytest.raises(ValueError, match=message):
        diffusion_loss(lambda x, t, c: wrong, SCHEDULE, latents, torch.zeros(5, 1, 1), **keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["simple", "vlb", "min_snr"])
def test_without_terminal_signal_all_but_the_noise_can_be_learned(kind, weighting):
    schedule = NoiseSchedule.from_config(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="sample"))
    latents, noise, timesteps = draws()
    keys = {"timesteps": timesteps, "noise": noise, "prediction_type": kind}
    loss = LossConfig(weighting=weighting)
    if kind == "epsilon":
        with pytest.raises(ValueError, match="prediction_type is epsilon, but at timestep 999 alpha is 0"):
            diffusion_loss(lambda x, t, c: x, schedule, latents, torch.zeros(5, 1, 1), loss=loss, **keys)
    else:
        value = diffusion_loss(lambda x, t, c: x, schedule, latents, torch.zeros(5, 1, 1), loss=loss, **keys)
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weighting": "p2"}, "weighting is 'p2'; choose one of simple, vlb, min_snr, hybrid"),
        ({"gamma": 0.0}, "gamma is 0.0; it must be above 0"),
        ({"gamma": math.inf}, "gamma is inf"),
        ({"vlb_weight": -1.0}, "vlb_weight is -1.0; it must be at least 0"),
        ({"vlb_weight": math.nan}, "vlb_weight is nan"),
        ({"variance": "learned"}, r"variance is 'learned'; choose small or large \(hybrid learns it\)"),
    ],
)
def test_wrong_loss_configs_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**keys)


@pytest.mark.parametrize(("batch", "total"), [(1, 10), (4, 12), (4, 10), (7, 10), (10, 10), (16, 10), (64, 1000)])
def test_stratified_timesteps_are_uniform_exactly(batch, total):
    # In index + u, timesteps change at multiples of B/T: so the middles of T equal parts of u stand for all of it.
    counts = [0] * total
    for index in range(batch):
        for part in range(total):
            t = stratified_timestep(index, batch, (part + 0.5) / total, total)
            # Sample i of B falls into stratum i, in exact numbers, whatever floating point makes of its ends.
            assert Fraction(index, batch) - Fraction(1, total) < Fraction(t, total) < Fraction(index + 1, batch)
            counts[t] += 1
    assert counts == [batch] * total


def test_a_stratum_is_not_left_by_rounding():
    below_one = math.nextafter(1.0, 0.0)
    assert stratified_timestep(9, 10, below_one, 1000) == 999  # 9 + u rounds to 10.0
    assert stratified_timestep(3, 10, below_one, 1000) == 399
    assert stratified_timestep(4, 10, 0.0, 1000) == 400
    assert stratified_timestep(0, 1, 0.25, 1000) == 250  # alone in its batch: uniform as ever


@pytest.mark.parametrize(
    ("index", "uniform", "message"),
    [(4, 0.5, "index is 4; it must be 0 to 3"), (-1, 0.5, "index is -1"), (0, 1.0, "uniform is 1.0; it must be")],
)
def test_places_outside_the_batch_are_refused(index, uniform, message):
    with pytest.raises(ValueError, match=message):
        stratified_timestep(index, 4, uniform, 1000)


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


def test_logit_normal_timesteps_have_the_density_of_the_paper():
    total, mean, std = 1000, 0.5, 1.2
    found = logit_normal_timesteps(torch.arange(total), total, mean=mean, std=std)
    assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < total
    assert bool((found.diff() >= 0).all())  # strata stay strata
    normal = statistics.NormalDist(mean, std)
    for t in (100, 300, 622, 900):
        expected = normal.cdf(math.log(t / (total - t)))
        assert float((found < t).double().mean()) == pytest.approx(expected, abs=2e-3)


def test_a_uniform_density_is_almost_that_of_a_logistic():
    """sigmoid of a logistic variable is uniform, and a normal one of std 1.7 is close to it."""
    found = logit_normal_timesteps(torch.arange(1000), 1000, mean=0.0, std=1.702)
    assert float((found - torch.arange(1000)).abs().max()) < 12
