"""Samplers that solve a differential equation: DPM-Solver++ its flow, Euler–Maruyama its reverse-time SDE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.prediction import convert, split_variance
from ldm.diffusion.sampling import ClipX0, Noise, State, identity, predict, transitions
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, Step


def half_log_snr(alpha: float, sigma: float) -> float:
    """λ = log(α/σ), with its limits −∞ without signal and +∞ without noise."""
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)


def dpm_solver_pp_2m(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """DPM-Solver++(2M) (arXiv:2211.01095), Algorithm 2: second order, one evaluation a step.

    The first step is of first order, as the algorithm says. So are two more where a step in λ = log(α/σ) has no
    finite length and there is nothing to extrapolate along: the one that ends at ᾱ = 1 (it ends in x̂_0, as in
    diffusers with `final_sigmas_type="zero"`), and the one after a start at ᾱ = 0. All others are of second order
    (diffusers' `lower_order_final` drops to the first below 15 steps also where the end still has noise; we do not).

    Args:
        latents: x_T, [B, C, H, W] standard normal.

    Raises:
        ValueError: see `transitions`.
    """
    earlier, h_last = None, math.inf
    for index, (t, _, alpha, sigma, alpha_prev, sigma_prev) in enumerate(transitions(schedule, grid)):
        prediction, _ = split_variance(denoise(latents, t), latents)
        x_0 = clip_x0(convert(prediction, latents, prediction_type, "sample", alpha=alpha, sigma=sigma))
        h = half_log_snr(alpha_prev, sigma_prev) - half_log_snr(alpha, sigma)
        # Algorithm 2, line 7: 1 / (2 r_i) with r_i = h_{i−1} / h_i; it is 0 after an infinite h_{i−1} of its own
        extrapolation = 0.0 if math.isinf(h) else h / (2 * h_last)
        # Algorithm 2, line 8: D_i; in line 4 x̂_0 alone
        slope = x_0
        if earlier is not None and extrapolation > 0:
            slope = (1 + extrapolation) * x_0 - extrapolation * earlier
        # Algorithm 2, lines 4 and 9, with e^{−h} = α σ_prev / (σ α_prev), as h may be infinite
        latents = (sigma_prev / sigma) * latents + (alpha_prev - sigma_prev * alpha / sigma) * slope
        earlier, h_last = x_0, h
        yield State(index, t, latents, x_0)


def euler_maruyama(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    noise: Noise,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """Euler–Maruyama on the reverse-time VP-SDE of Song et al. (arXiv:2011.13456), Eq. 6 and 11.

    Its time is τ = ∫ β dt = −log ᾱ, read from the table: in it the forward SDE dx = −½ β x dt + √β dw is
    dx = −½ x dτ + dw_τ whatever the schedule, and the length of a step is log(ᾱ_prev / ᾱ_t).

    A start at ᾱ = 0 (zero terminal SNR) stands at τ = ∞, where no step is finite: the first step then is the limit that
    ancestral sampling has there, x_prev = α_prev x̂_0 + σ_prev z.

    Args:
        latents: x_T, [B, C, H, W] standard normal.

    Raises:
        ValueError: see `transitions`.
    """
    for index, (t, t_prev, alpha, sigma, alpha_prev, sigma_prev) in enumerate(transitions(schedule, grid)):
        x_0, epsilon = predict(denoise(latents, t), latents, alpha, sigma, prediction_type, clip_x0)
        if alpha == 0:
            latents, std = alpha_prev * x_0, sigma_prev
        else:
            duration = 2 * math.log(alpha_prev / alpha)
            # Eq. 6: dx = (−½ x − s) dτ + dw̄ with s = −ε/σ, and dτ = −duration
            latents = (1 + duration / 2) * latents - (duration / sigma) * epsilon
            std = math.sqrt(duration)
        if t_prev >= 0:  # the last step takes the mean, as in DDPM, Algorithm 2: no noise is left on the sample
            latents = latents + std * noise()
        yield State(index, t, latents, x_0)
