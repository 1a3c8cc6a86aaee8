"""Samplers that walk along the score s = −ε/σ: annealed Langevin dynamics, and a corrector for other samplers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.sampling import ClipX0, Noise, State, ddpm, identity, predict, transitions
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, Step


class Predictor(Protocol):
    """A sampler that can take one step at a time: `ddpm`, `euler_maruyama`, `ddim`, or a `partial` of these."""

    def __call__(
        self,
        denoise: Denoise,
        latents: Tensor,
        schedule: NoiseSchedule,
        grid: Sequence[Step],
        /,
        *,
        noise: Noise,
        clip_x0: ClipX0,
        prediction_type: PredictionType,
    ) -> Iterator[State]: ...


def annealed_langevin(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    noise: Noise,
    step_size: float = 0.2,
    num_langevin_steps: int = 100,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """Annealed Langevin dynamics, NCSN (arXiv:1907.05600) Algorithm 1, one noise level for each t of the grid.

    NCSN adds noise without shrinking the data: its x̃ is our x/α and its σ_i our σ/α. There a step is
    x̃ ← x̃ + (α_i/2) s(x̃, σ_i) + √α_i z with α_i = ε σ_i²/σ_L²; with k = ε/σ_L² and s = −ε̂/σ_i, and times our α,
    it is x ← x − (k/2) σ ε̂ + √k σ z. From level to level x̃ stays, so x is scaled by α_prev/α.

    As in the paper the sample keeps the noise of the last level, σ/α at the last t: take a grid that ends near 0, or
    the last `pred_original_sample`. The network is called `num_langevin_steps` times for each step of the grid.

    Args:
        latents: x_T, [B, C, H, W] standard normal.
        step_size: k = ε/σ_L², in (0, 4); 0.2 in NCSN (ε = 2e-5, σ_L = 0.01).
        num_langevin_steps: T of the algorithm, at least 1; 100 in NCSN.

    Raises:
        ValueError: if an argument is outside its range, or the grid starts at ᾱ = 0, where x/α does not exist; see
            `transitions`.
    """
    if not 0 < step_size < 4:
        raise ValueError(f"step_size is {step_size}; it must lie between 0 and 4, from where on the steps diverge")
    if num_langevin_steps < 1:
        raise ValueError(f"num_langevin_steps is {num_langevin_steps}; it must be at least 1")
    steps = transitions(schedule, grid)
    if steps[0].alpha == 0:
        raise ValueError(
            f"annealed Langevin dynamics cannot start at timestep {steps[0].t}, where alphas_cumprod is 0 and the "
            "noise of x/alpha infinite; start lower (timestep_spacing leading does), or take another sampler"
        )
    for index, (t, _, alpha, sigma, alpha_prev, _) in enumerate(steps):
        drift, std = 0.5 * step_size * sigma, math.sqrt(step_size) * sigma
        for _ in range(num_langevin_steps):
            x_0, epsilon = predict(denoise(latents, t), latents, alpha, sigma, prediction_type, clip_x0)
            latents = latents - drift * epsilon + std * noise()
        latents = (alpha_prev / alpha) * latents
        yield State(index, t, latents, x_0)


def langevin_corrector(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    noise: Noise,
    predictor: Predictor = ddpm,
    snr: float = 0.01,
    num_corrector_steps: int = 1,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """Predictor–corrector sampling, Song et al. (arXiv:2011.13456) Algorithms 1, 3 and 5.

    After each step of the predictor, Langevin steps at the level t_prev that it reached:
    x ← x + ε s + √(2ε) z with ε = 2 (1 − β_i) (r ‖z‖ / ‖s‖)², β_i that of the table at t_prev. The norms are those of
    each sample alone, so that it does not depend on its batch. At the end (t_prev = −1) there is no score, and no
    corrector. The steps are biased, as all unadjusted Langevin dynamics is: at rest on Gaussian data their variance
    is 1 + r² (1 − β_i) times the right one.

    Args:
        latents: x_T, [B, C, H, W] standard normal.
        predictor: takes one step at a time, so that a multistep solver would be of first order.
        snr: r, above 0; 0.01 for VP, the process here, and 0.16 for VE (Table 5).
        num_corrector_steps: M, at least 1, each one call of the network.

    Raises:
        ValueError: if an argument is outside its range; see `transitions`.
    """
    if not 0 < snr < math.inf:
        raise ValueError(f"snr is {snr}; it must be a finite number above 0 (0.01 is usual)")
    if num_corrector_steps < 1:
        raise ValueError(f"num_corrector_steps is {num_corrector_steps}; it must be at least 1")
    betas = schedule.betas.tolist()
    for index, (t, t_prev, _, _, alpha, sigma) in enumerate(transitions(schedule, grid)):
        step = predictor(
            denoise, latents, schedule, [Step(t, t_prev)], noise=noise, clip_x0=clip_x0, prediction_type=prediction_type
        )
        (state,) = step
        latents = state.latents
        if t_prev >= 0:
            for _ in range(num_corrector_steps):
                prediction = denoise(latents, t_prev)
                _, epsilon = predict(prediction, latents, alpha, sigma, prediction_type, clip_x0)
                drawn = noise()
                # Algorithm 5; √(ε/2) = √(1 − β_i) r ‖z‖ / ‖s‖, with s = −ε̂/σ
                scale = math.sqrt(1 - betas[t_prev]) * snr * sigma
                length = sample_norm(epsilon)
                # Where ‖s‖ is 0 nothing says how long a step is: none is taken.
                root = torch.where(length > 0, scale * sample_norm(drawn) / length, 0)  # [B, 1, …]
                latents = latents - (2 / sigma) * root.square() * epsilon + 2 * root * drawn
        yield State(index, t, latents, state.pred_original_sample)


def sample_norm(x: Tensor) -> Tensor:
    """‖x‖₂ of each sample, [B, 1, …]; in float32 at least, as half precision overflows at 65504 squared."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))  # [B]
    return norm.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
