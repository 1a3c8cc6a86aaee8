"""The variational bound where the answer is known: Gaussian data, two points, and one sum over all pixel values."""

import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    add_noise,
    diffusion_loss,
    discretized_decoder,
    gaussian_decoder,
    variational_terms,
)
from ldm.diffusion.denoiser import convert
from ldm.diffusion.losses import LossConfig, log_normal_between, log_variance_tables
from tests.diffusion.bound import variational_bound

MEAN, DEVIATION = 0.1, 0.7
TRUE_BITS = 0.5 * math.log2(2 * math.pi * math.e * DEVIATION**2)  # of N(MEAN, DEVIATION²), per dimension

# Every term of Gaussian data under a linear denoiser is a polynomial of degree 2 in x_0 and in ε. For those the mean
# over ±1 deviation is the expectation, exactly: four samples stand for all.
NOISE = torch.tensor([-1, 1, -1, 1], dtype=torch.float64).view(4, 1, 1, 1)
DATA = MEAN + DEVIATION * torch.tensor([-1, -1, 1, 1], dtype=torch.float64).view(4, 1, 1, 1)


def fixed_forward_process(steps):
    """The same forward process in any number of steps: ᾱ at time τ is exp(−∫β), so that β_t falls as 1/T."""
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return NoiseSchedule(torch.exp(-(0.1 * time + 19.9 * time**2 / 2)))


def exact_noise(schedule, x_t, t):
    """E[ε | x_t] of Gaussian data."""
    alpha, sigma = schedule.alpha_sigma(t)
    original = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x_t - alpha * MEAN)
    return (x_t - alpha * original) / sigma


def excess_bits(steps, variance):
    schedule = fixed_forward_process(steps)
    bound = variational_bound(
        lambda x, t: exact_noise(schedule, x, t),
        schedule,
        DATA,
        noise=lambda: NOISE,
        decoder=gaussian_decoder,
        variance=variance,
    )
    return float(bound.total.mean()) - TRUE_BITS


def test_the_bound_of_the_exact_denoiser_approaches_the_likelihood_as_one_over_t():
    gaps = [excess_bits(steps, "large") for steps in (10, 40, 160, 640)]
    assert gaps[0] < 0.04
    assert all(gap > 0 for gap in gaps)  # it is a bound
    ratios = [wide / narrow for wide, narrow in pairwise(gaps)]
    assert all(ratio > 3.5 for ratio in ratios), gaps
    assert ratios[-1] == pytest.approx(4, abs=0.05)  # first order: four times the steps, a fourth of the gap


def test_the_posterior_variance_leaves_a_gap_on_continuous_data():
    # β̃ is right for data that is one point. Of data with a density it leaves, in nats, KL(β to β/2) of the decoder and
    # Σ (1/k − log(1 + 1/k)) / 2 = γ/2 of the early steps, in the limit of many.
    limit = ((1 - math.log(2)) / 2 + 0.5772156649 / 2) / math.log(2)
    assert excess_bits(640, "small") > limit
    assert excess_bits(1280, "small") == pytest.approx(limit, abs=0.2)


@pytest.mark.parametrize("steps", [2, 10])
def test_with_the_exact_variance_learned_the_bound_is_the_likelihood_itself(steps):
    schedule = fixed_forward_process(steps)
    previous = torch.cat([torch.ones(1).double(), schedule.alphas_cumprod[:-1]])
    spread = previous * DEVIATION**2 + 1 - previous  # variance of x_{t−1}
    exact = spread * schedule.betas / ((1 - schedule.betas) * spread + schedule.betas)  # of x_{t−1} given x_t
    small, large = log_variance_tables(schedule)
    fraction = 2 * (exact.log() - small) / (large - small) - 1  # Improved DDPM, Eq. 15, solved for ν

    def denoise(x, t):
        noise = exact_noise(schedule, x, t)
        return torch.cat([noise, torch.full_like(noise, float(fraction[t]))], dim=1)

    bound = variational_bound(
        denoise, schedule, DATA, noise=lambda: NOISE, decoder=gaussian_decoder, variance="learned"
    )
    last = float(schedule.alphas_cumprod[-1])
    variance = last * DEVIATION**2 + 1 - last
    mismatch = 0.5 * (variance - 1 - math.log(variance) + last * MEAN**2) / math.log(2)  # KL(q(x_T) ‖ N(0, I))
    assert float(bound.total.mean()) - TRUE_BITS == pytest.approx(mismatch, abs=1e-11)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_the_weighted_loss_is_the_divergence_of_gaussians(variance, kind):
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = torch.randn(3, 999, 3, 2, 2, generator=generator, dtype=torch.float64)
    timesteps = torch.arange(1, 1000)
    alpha, sigma = schedule.coefficients(timesteps, latents)
    posterior = tuple(table[timesteps].view(-1, 1, 1, 1) for table in schedule.posterior_mean_coefficients)
    noisy = add_noise(latents, noise, alpha, sigma)
    output = convert(noise + error, noisy, "epsilon", kind, alpha=alpha, sigma=sigma, posterior=posterior)
    weighted = diffusion_loss(
        lambda x, t, c: output,
        schedule,
        latents,
        torch.zeros(999, 1, 1),
        timesteps=timesteps,
        noise=noise,
        prediction_type=kind,
        loss=LossConfig(weighting="vlb", variance=variance),
    )
    terms = variational_terms(
        output,
        noisy,
        latents,
        schedule,
        timesteps,
        decoder=gaussian_decoder,
        prediction_type=kind,
        variance=variance,
    )
    # DDPM, Eq. 12 with the constant of Eq. 8: what the choice of σ² costs whatever the network says.
    small, large = schedule.posterior_variance[1:], schedule.betas[1:]
    constant = torch.zeros(999) if variance == "small" else (small / large - 1 - (small / large).log()) / 2
    expected = weighted / 1000 + constant / math.log(2)
    torch.testing.assert_close(terms, expected, rtol=1e-8, atol=1e-8)
    # And the weight as the paper prints it, from β alone.
    chosen = small if variance == "small" else large
    printed = schedule.betas[1:] ** 2 / (2 * chosen * (1 - schedule.betas[1:]) * (1 - schedule.alphas_cumprod[1:]))
    by_hand = printed * error.square().flatten(1).mean(dim=1) / math.log(2) + constant / math.log(2)
    torch.testing.assert_close(terms, by_hand, rtol=1e-8, atol=1e-8)


def test_a_divergence_is_that_of_torch():
    schedule = NoiseSchedule.from_betas([0.1, 0.3, 0.5])
    generator = torch.Generator().manual_seed(0)
    latents, noisy, predicted, fraction = torch.randn(4, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    output = torch.cat([predicted, fraction], dim=1)
    found = variational_terms(
        output,
        noisy,
        latents,
        schedule,
        torch.tensor([1, 2]),
        decoder=gaussian_decoder,
        prediction_type="sample",
        variance="learned",
    )
    for i, t in enumerate((1, 2)):
        a, b = (float(table[t]) for table in schedule.posterior_mean_coefficients)
        small, large = float(schedule.posterior_variance[t]), float(schedule.betas[t])
        share = (fraction[i] + 1) / 2
        learned = torch.exp(share * math.log(large) + (1 - share) * math.log(small))
        q = torch.distributions.Normal(a * latents[i] + b * noisy[i], math.sqrt(small))
        p = torch.distributions.Normal(a * predicted[i] + b * noisy[i], learned.sqrt())
        expected = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "posterior_mean"])
def test_the_bound_does_not_depend_on_what_is_predicted(kind):
    schedule = fixed_forward_process(20)
    a, b = schedule.posterior_mean_coefficients

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        posterior = (float(a[t]), float(b[t]))
        noise = 0.9 * exact_noise(schedule, x, t)
        return convert(noise, x, "epsilon", kind, alpha=alpha, sigma=sigma, posterior=posterior)

    def bound(denoise, kind):
        return variational_bound(
            denoise,
            schedule,
            DATA,
            noise=lambda: NOISE,
            decoder=gaussian_decoder,
            prediction_type=kind,
            clip_x0=lambda x_0: x_0.clamp(-0.5, 0.5),
        )

    expected = bound(lambda x, t: 0.9 * exact_noise(schedule, x, t), "epsilon")
    found = bound(denoise, kind)
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-9, atol=1e-12)
    assert found.terms.shape == (4, 20)
    torch.testing.assert_close(found.total, found.prior + found.terms.sum(1))


def test_a_projection_that_finds_x_0_leaves_the_decoder_alone():
    schedule = fixed_forward_process(20)
    bound = variational_bound(
        lambda x, t: torch.zeros_like(x),
        schedule,
        DATA,
        noise=lambda: NOISE,
        decoder=gaussian_decoder,
        clip_x0=lambda x_0: DATA,
    )
    torch.testing.assert_close(bound.terms[:, 1:], torch.zeros(4, 19).double(), rtol=0, atol=1e-12)
    peak = 0.5 * math.log2(2 * math.pi * float(schedule.posterior_variance[1]))  # −log₂ N(x_0; x_0, β̃_1)
    torch.testing.assert_close(bound.terms[:, 0], torch.full((4,), peak, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "posterior_mean"])
def test_without_terminal_signal_the_prior_costs_nothing(kind):
    schedule = NoiseSchedule.from_config(
        ScheduleConfig(num_train_timesteps=30, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    )
    a, b = schedule.posterior_mean_coefficients

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        v = alpha * NOISE - sigma * DATA  # of a network that knows both
        return convert(v, x, "v_prediction", kind, alpha=alpha, sigma=sigma, posterior=(float(a[t]), float(b[t])))

    bound = variational_bound(
        denoise, schedule, DATA, noise=lambda: NOISE, decoder=gaussian_decoder, prediction_type=kind
    )
    assert bound.prior.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(bound.terms[:, 1:], torch.zeros(4, 29).double(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="prediction_type is epsilon, but at timestep 29 alpha is 0"):
        variational_bound(denoise, schedule, DATA, noise=lambda: NOISE, decoder=gaussian_decoder)


def test_two_equally_likely_pixels_cost_one_bit():
    # x_0 is −1 or 1: E[x_0 | x_t] = tanh(α x_t / σ²). The expectation over ε is a fine sum over its axis.
    axis = torch.linspace(-7, 7, 281, dtype=torch.float64)
    weights = torch.exp(-(axis**2) / 2) / torch.exp(-(axis**2) / 2).sum()
    data = torch.ones(281, 1, 1, 1).double()  # by symmetry, x_0 = 1 speaks for both

    def bits(steps):
        # Even in log SNR, from where the noise is far finer than a pixel value to where nothing is left.
        schedule = NoiseSchedule(torch.linspace(16, -11, steps, dtype=torch.float64).sigmoid())

        def denoise(x, t):
            alpha, sigma = schedule.alpha_sigma(t)
            return torch.tanh(alpha * x / sigma**2)

        bound = variational_bound(
            denoise,
            schedule,
            data,
            noise=lambda: axis.view(-1, 1, 1, 1),
            decoder=discretized_decoder(),
            prediction_type="sample",
        )
        return float((weights * bound.total).sum())

    coarse, fine = bits(100), bits(400)
    assert 1 < fine < coarse
    assert fine == pytest.approx(1, abs=0.04)
    assert (coarse - 1) / (fine - 1) == pytest.approx(4, abs=0.5)


PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.01), (0.3, 1.0), (-1.2, 0.05), (0.999, 0.002), (5.0, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probabilities_of_all_pixel_values_add_up_to_one(mean, deviation, dtype):
    # Whitened as PixelCodec does it, with another mean and deviation in each of two channels.
    decode = discretized_decoder(mean=(0.2, -0.4), std=(0.5, 1.3))
    shift, scale = (
        torch.tensor([0.2, -0.4], dtype=torch.float64).view(1, 2, 1, 1),
        torch.tensor([0.5, 1.3], dtype=torch.float64).view(1, 2, 1, 1),
    )
    latents = ((PIXELS.view(256, 1, 1, 1) - shift) / scale).to(dtype)
    predicted = ((mean - shift) / scale).expand_as(latents).to(dtype)
    log_variance = (2 * (math.log(deviation) - scale.log())).expand_as(latents).to(dtype)
    logs = decode(latents, predicted, log_variance)
    assert bool(torch.isfinite(logs).all())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(logs.exp().sum(0).flatten(), torch.ones(2, dtype=dtype), rtol=0, atol=tolerance)
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), deviation)
    for k in (0, 1, 128, 254, 255):  # DDPM, Eq. 13, as it is printed
        upper = 1.0 if k == 255 else float(normal.cdf(PIXELS[k] + 1 / 255))
        lower = 0.0 if k == 0 else float(normal.cdf(PIXELS[k] - 1 / 255))
        assert float(logs[k, 1].exp()) == pytest.approx(upper - lower, abs=tolerance)


def test_the_rounding_of_whitening_changes_no_probability():
    pixels, predicted = PIXELS.view(256, 1, 1, 1), torch.zeros(256, 1, 1, 1).double()
    log_variance = torch.full_like(pixels, -6.0)
    decode = discretized_decoder()
    assert torch.equal(decode(pixels + 1e-6, predicted, log_variance), decode(pixels, predicted, log_variance))


def test_intervals_in_both_tails_keep_their_precision():
    lower = torch.tensor([30.0, -30.5, -0.1], dtype=torch.float64, requires_grad=True)
    logs = log_normal_between(lower, lower + 0.5)
    assert float(logs[0].detach()) == pytest.approx(float(logs[1].detach()), rel=1e-12)  # mirror images
    # log Φ(−30) from its asymptotic series; the rest of the tail is e^−15 of it.
    series = -450 - math.log(30 * math.sqrt(2 * math.pi)) + math.log1p(-1 / 900 + 3 / 810000)
    assert float(logs[0].detach()) == pytest.approx(series, rel=1e-8)
    (slope,) = torch.autograd.grad(logs.sum(), lower)
    assert bool(torch.isfinite(slope).all())


def test_continuous_data_is_refused_by_the_discretised_decoder():
    x = torch.full((1, 1, 1, 1), 0.3)
    for value in (0.3, 1.01):
        with pytest.raises(ValueError, match=f"x_0 holds the pixel value {value}"):
            discretized_decoder()(x / 0.3 * value, x, x)


@pytest.mark.parametrize(
    ("channels", "variance", "message"),
    [
        (2, "small", "variance is 'small' but the denoiser gives 2 channels for 1"),
        (1, "learned", "variance is 'learned' but the denoiser gives 1 channels for 1"),
        (3, "large", r"the denoiser gives \[4, 3, 1, 1\] for latents \[4, 1, 1, 1\]"),
        (1, "tiny", "variance is 'tiny'; choose small, large, learned"),
    ],
)
def test_channels_that_do_not_fit_the_variance_are_refused(channels, variance, message):
    with pytest.raises(ValueError, match=message):
        variational_bound(
            lambda x, t: x.expand(4, channels, 1, 1),
            fixed_forward_process(5),
            DATA,
            noise=lambda: NOISE,
            decoder=gaussian_decoder,
            variance=variance,
        )


@pytest.mark.parametrize(
    ("table", "message"), [([0.5], "num_train_timesteps is 1"), ([1.0, 0.5], "alphas_cumprod is 1 at timestep 0")]
)
def test_schedules_without_a_first_variance_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        log_variance_tables(NoiseSchedule(torch.tensor(table)))
