"""Guidance on data whose densities are known; rescaling and thresholding beside diffusers."""

import functools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    Step,
    alpha_sigma_at,
    classifier_free_guidance,
    classifier_guidance,
    ddim,
    ddpm,
    dynamic_threshold,
    guide_within,
    rescale_guidance,
    slerp,
    split_variance,
    training_target,
    with_condition,
    x0_and_epsilon,
)
from tests.diffusion import mixture

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
TIMESTEPS = [*range(0, 999, 27), 999]
TYPES = ["epsilon", "v_prediction", "sample"]
SIDE = torch.linspace(-4, 4, 9, dtype=torch.float64)
# 200 steps, the finer the less noise is left.
DOWN = sorted({round(999 * (i / 220) ** 2) for i in range(221)}, reverse=True)
FINE = [Step(t, t_prev) for t, t_prev in zip(DOWN, [*DOWN[1:], -1], strict=True)]
POINTS = torch.cartesian_prod(SIDE, SIDE).view(-1, 2, 1, 1)


def network(prediction_type, schedule=SCHEDULE, calls=None):
    """The exact denoiser as a network: (x_t, timesteps, states) → what is predicted."""

    def denoise(x, timesteps, states):
        if calls is not None:
            calls.append(len(x))
        (t,) = timesteps.unique().tolist()
        alpha, sigma = alpha_sigma_at(schedule, t)
        noise = mixture.exact_noise(x, states, alpha, sigma)
        return training_target((x - sigma * noise) / alpha, noise, alpha, sigma, prediction_type)

    return denoise


def score_from_epsilon(prediction, x, t, prediction_type):
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    return -x0_and_epsilon(prediction, x, alpha, sigma, prediction_type)[1] / sigma


def classifier(label):
    return lambda x, t: mixture.log_class(label, *alpha_sigma_at(SCHEDULE, t))(x)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("kind", ["classifier-free", "classifier"])
def test_guided_scores_are_the_closed_form_everywhere(kind, scale, prediction_type):
    count = len(POINTS)
    for label in range(mixture.CLASSES):
        chosen, every = mixture.of_class(label, count), mixture.of_all(count)
        if kind == "classifier-free":
            guided = classifier_free_guidance(network(prediction_type), chosen, every, scale)
        else:
            unguided = with_condition(network(prediction_type), every)
            guided = classifier_guidance(unguided, classifier(label), scale, SCHEDULE, prediction_type=prediction_type)
        for t in TIMESTEPS:
            alpha, sigma = SCHEDULE.alpha_sigma(t)
            conditional, unconditional = (mixture.score(POINTS, s, alpha, sigma) for s in (chosen, every))
            # By Bayes the gradient of log p(y | x_t) is the difference of the two scores.
            expected = unconditional + scale * (conditional - unconditional)
            actual = score_from_epsilon(guided(POINTS, t), POINTS, t, prediction_type)
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8 / sigma)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    ("label", "mode"), [(label, torch.no_grad) for label in range(mixture.CLASSES)] + [(0, torch.inference_mode)]
)
def test_classifier_guidance_at_scale_1_samples_the_class(sampler, label, mode):
    count, generator = 2000, torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)

    with mode():
        start = noise()
        unguided = with_condition(network("epsilon"), mixture.of_all(count))
        guided = classifier_guidance(unguided, classifier(label), 1.0, SCHEDULE)
        run = ddim if sampler == "ddim" else functools.partial(ddpm, noise=noise)
        *_, last = run(guided, start, SCHEDULE, FINE)
    points = last.latents.flatten(1)
    distance = (points[:, None] - mixture.MEANS).norm(dim=-1)  # [B, 4]
    nearest = distance.argmin(dim=1)
    assert float((mixture.CLASS_OF[nearest] == label).double().mean()) > 0.99
    members = torch.eq(mixture.CLASS_OF, label).nonzero().flatten().tolist()
    for which in members:
        own = points[nearest == which]
        expected = float(mixture.WEIGHTS[which] / mixture.WEIGHTS[members].sum())
        assert len(own) / count == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count) + 0.01)
        # x_T begins at mean 0, not at α_T times that of the class; the ODE keeps that, times the deviation.
        kept = SCHEDULE.alpha_sigma(999)[0] * mixture.DEVIATIONS[which] * mixture.MEANS[which].norm()
        bound = 0.05 if label == 0 else 0.05 + float(kept)
        torch.testing.assert_close(own.mean(0), mixture.MEANS[which], rtol=0, atol=bound)
        torch.testing.assert_close(own.std(0), mixture.DEVIATIONS[which].expand(2), rtol=0.12, atol=0)


def flow(start, scale, label, level_from, level_to, steps=160):
    """x_t of the guided ODE at noise level `level_to`, by Runge-Kutta of fourth order in log(σ/α).

    d(x/α) / d(σ/α) = ε̂: DDIM, Eq. 14. The densities are known at every level, so no timestep is involved.
    """

    def slope(x_bar, log_level):
        alpha = 1 / math.sqrt(1 + math.exp(2 * log_level))
        sigma, x = alpha * math.exp(log_level), alpha * x_bar
        scores = [mixture.score(x, s, alpha, sigma) for s in (mixture.of_class(label, len(x)), mixture.of_all(len(x)))]
        guided = scores[1] + scale * (scores[0] - scores[1])
        return -sigma * guided * math.exp(log_level)

    x_bar = start * math.sqrt(1 + level_from**2)
    position, h = math.log(level_from), math.log(level_to / level_from) / steps
    for _ in range(steps):
        a = slope(x_bar, position)
        b = slope(x_bar + h / 2 * a, position + h / 2)
        c = slope(x_bar + h / 2 * b, position + h / 2)
        d = slope(x_bar + h * c, position + h)
        x_bar, position = x_bar + h / 6 * (a + 2 * b + 2 * c + d), position + h
    return x_bar / math.sqrt(1 + level_to**2)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_other_scales_agree_with_an_integrated_ode(scale):
    start = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = flow(start, scale, 0, SCHEDULE.error_gain(999), SCHEDULE.error_gain(0))
    torch.testing.assert_close(
        flow(start, scale, 0, SCHEDULE.error_gain(999), SCHEDULE.error_gain(0), steps=80), expected, rtol=0, atol=1e-4
    )
    free = classifier_free_guidance(network("epsilon"), mixture.of_class(0, 8), mixture.of_all(8), scale)
    with_classifier = classifier_guidance(
        with_condition(network("epsilon"), mixture.of_all(8)), classifier(0), scale, SCHEDULE
    )
    for guided in (free, with_classifier):
        errors = []
        for steps in (125, 250, 500):
            grid = [step for step in SCHEDULE.grid(steps, "linspace") if step.t_prev >= 0]
            assert (grid[0].t, grid[-1].t_prev) == (999, 0)
            *_, last = ddim(guided, start, SCHEDULE, grid)
            errors.append(float((last.latents - expected).norm(dim=1).mean()))
        assert errors[-1] < 0.02
        # A solver of first order: half the stride, half the error.
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
        assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda x: torch.zeros(len(x), 10), r"gives \[4, 10\] for x_t of shape \[4, 2, 1, 1\]; it must give \[4\]"),
        (lambda x: x.sum(), r"gives \[\] for x_t of shape \[4, 2, 1, 1\]"),
        (lambda x: 3.0, "gives float for x_t"),
        (lambda x: torch.zeros(len(x)), "differentiable in x_t"),
    ],
)
def test_a_classifier_of_the_wrong_kind_is_refused(give, message):
    guided = classifier_guidance(lambda x, t: x, lambda x, t: give(x), 1.0, SCHEDULE)
    with pytest.raises(ValueError, match=message):
        guided(POINTS[:4], 500)


def test_a_classifier_has_no_say_where_alpha_is_0():
    ending = NoiseSchedule.from_config(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    unguided = with_condition(lambda x, t, states: x, mixture.of_all(4))
    guided = classifier_guidance(
        unguided, lambda x, t: x.flatten(1).sum(1), 1.0, ending, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="timestep 999, where alpha is 0"):
        guided(POINTS[:4], 999)
    within = guide_within(ending, (0.0, 100.0), guided, unguided)
    assert torch.equal(within(POINTS[:4], 999), POINTS[:4])
    assert not torch.equal(within(POINTS[:4], 500), POINTS[:4])
    everywhere = guide_within(ending, (0.0, math.inf), unguided, guided)
    assert torch.equal(everywhere(POINTS[:4], 999), POINTS[:4])


def test_outside_the_interval_only_the_condition_is_evaluated():
    calls = []
    denoiser = network("epsilon", calls=calls)
    chosen, every = mixture.of_class(1, 5), mixture.of_all(5)
    guided = classifier_free_guidance(denoiser, chosen, every, 4.0)
    unguided = with_condition(denoiser, chosen)
    levels = [SCHEDULE.error_gain(t) for t in range(1000)]
    within = guide_within(SCHEDULE, (levels[200], levels[600]), guided, unguided)
    x = POINTS[:5]
    for t, inside in [(0, False), (200, False), (201, True), (400, True), (600, True), (601, False), (999, False)]:
        calls.clear()
        actual = within(x, t)
        assert calls == [10 if inside else 5], t
        assert torch.equal(actual, (guided if inside else unguided)(x, t)), t
    # The same levels mean the same on a schedule with half as many timesteps.
    half = NoiseSchedule(SCHEDULE.alphas_cumprod[::2])
    within = guide_within(half, (levels[200], levels[600]), lambda x, t: "in", lambda x, t: "out")
    assert [t for t in range(500) if within(x, t) == "in"] == list(range(101, 301))


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((5.0, 0.3), r"guidance_interval is \(5, 0.3\), turned round; give the lower noise level first: \(0.3, 5\)"),
        ((-1.0, 2.0), r"guidance_interval is \(-1, 2\); it must be"),
        ((2.0, 2.0), r"guidance_interval is \(2, 2\); it must be"),
        ((math.nan, 2.0), r"guidance_interval is \(nan, 2\); it must be"),
    ],
)
def test_an_interval_that_is_none_is_refused(interval, message):
    with pytest.raises(ValueError, match=message):
        guide_within(SCHEDULE, interval, lambda x, t: x, lambda x, t: x)


def images(seed, channels=3):
    return torch.randn(4, channels, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_a_prediction_is_rescaled_as_in_diffusers(phi):
    guided, conditional = 3 * images(0) + 0.2, images(1) * torch.tensor([0.1, 1, 2, 5]).view(-1, 1, 1, 1)
    actual = rescale_guidance(phi)(guided, conditional)
    torch.testing.assert_close(actual, rescale_noise_cfg(guided, conditional, phi))


def test_rescaling_is_part_of_guidance_and_leaves_flat_predictions_alone():
    states = torch.tensor([0.0, 3.0]).view(2, 1, 1).double()
    denoiser = lambda x, t, s: x.tanh() + 0.1 * s[:, :, :, None] * x.roll(1, -1)  # noqa: E731
    x = images(0)[:1]
    rescale = rescale_guidance(1.0)
    for scale in (0.0, 1.0, 6.0):
        conditional = with_condition(denoiser, states[1:])(x, 300)
        plain = classifier_free_guidance(denoiser, states[1:], states[:1], scale)(x, 300)
        actual = classifier_free_guidance(denoiser, states[1:], states[:1], scale, rescale=rescale)(x, 300)
        torch.testing.assert_close(actual, plain * conditional.std() / plain.std())
    assert torch.equal(rescale(torch.zeros_like(x), torch.zeros_like(x)), torch.zeros_like(x))


def test_the_posterior_mean_is_turned_into_noise_first():
    with pytest.raises(ValueError, match="prediction_type is 'posterior_mean'; choose epsilon"):
        classifier_guidance(lambda x, t: x, classifier(0), 1.0, SCHEDULE, prediction_type="posterior_mean")


@pytest.mark.parametrize("phi", [-0.1, 1.5, math.nan])
def test_a_share_outside_its_range_is_refused(phi):
    with pytest.raises(ValueError, match=f"guidance_rescale is {phi}"):
        rescale_guidance(phi)


def test_learned_variances_come_from_the_condition_and_are_not_guided():
    def denoiser(x, timesteps, states):
        return torch.cat([x * states[:, :, :, None], states[:, :, :, None].expand_as(x)], dim=1)

    x, c, null = images(0), torch.full((4, 1, 1), 2.0).double(), torch.full((4, 1, 1), 0.5).double()
    rescale = rescale_guidance(0.5)
    for scale in (1.0, 3.0):
        prediction, variance = split_variance(classifier_free_guidance(denoiser, c, null, scale)(x, 9), x)
        torch.testing.assert_close(prediction, x * (0.5 + scale * 1.5))
        assert torch.equal(variance, torch.full_like(x, 2.0))
    rescaled = classifier_free_guidance(denoiser, c, null, 3.0, rescale=rescale)(x, 9)
    assert rescaled.shape == (4, 6, 6, 5) and torch.equal(rescaled[:, 3:], torch.full_like(x, 2.0))
    by_classifier = classifier_guidance(with_condition(denoiser, c), lambda x, t: x.flatten(1).sum(1), 2.0, SCHEDULE)(
        x, 9
    )
    torch.testing.assert_close(by_classifier[:, :3], 2 * x - 2 * SCHEDULE.alpha_sigma(9)[1])
    assert torch.equal(by_classifier[:, 3:], torch.full_like(x, 2.0))


def test_between_two_timesteps_the_noise_level_is_linear():
    assert alpha_sigma_at(SCHEDULE, 7.0) == SCHEDULE.alpha_sigma(7)
    alpha, sigma = alpha_sigma_at(SCHEDULE, 7.25)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    assert sigma / alpha == pytest.approx(0.75 * SCHEDULE.error_gain(7) + 0.25 * SCHEDULE.error_gain(8), rel=1e-12)
    seen = []
    with_condition(lambda x, t, s: seen.append(t), torch.zeros(2, 1, 1))(POINTS[:2], 7.25)
    assert seen[0].tolist() == [7.25, 7.25]
    with_condition(lambda x, t, s: seen.append(t), torch.zeros(2, 1, 1))(POINTS[:2], 7)
    assert seen[1].dtype == torch.int64


@pytest.mark.parametrize("percentile", [0.25, 0.9, 0.995, 1.0])
def test_the_dynamic_threshold_is_that_of_diffusers(percentile):
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9)
    x = images(0).float() * torch.tensor([0.1, 1, 3, 20]).view(-1, 1, 1, 1)
    actual = dynamic_threshold(percentile)(x)
    torch.testing.assert_close(actual, theirs._threshold_sample(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(actual[0], x[0])  # all inside its range
    alone = dynamic_threshold(percentile)(x[2:3])
    assert torch.equal(actual[2:3], alone)
    assert float(actual.abs().max()) <= 1


def test_the_dynamic_threshold_keeps_the_shades_that_a_clamp_loses():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2)
    assert dynamic_threshold(1.0)(x).flatten().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert dynamic_threshold(0.5)(x).flatten().tolist() == pytest.approx([0, 2 / 3, 1, 1])  # s = 1.5


@pytest.mark.parametrize("percentile", [0.0, 1.01, -1, 99.5, math.nan])
def test_a_percentile_outside_its_range_is_refused(percentile):
    with pytest.raises(ValueError, match=f"dynamic_threshold is {percentile}"):
        dynamic_threshold(percentile)


def test_the_arc_keeps_the_length_of_noise():
    a, b = (torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert slerp(a, b, 0) is a and slerp(a, b, 1) is b
    for fraction in (0.1, 0.5, 0.8):
        assert float(slerp(a, b, fraction).norm()) == pytest.approx(64, rel=0.03)
    # On the unit circle a third of a right angle is 30 degrees.
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(east, north, 1 / 3), torch.tensor([math.cos(math.pi / 6), 0.5]))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    with pytest.raises(ValueError, match="opposite"):
        slerp(east, -east, 0.5)
