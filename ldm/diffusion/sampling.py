"""Samplers: each a generator of states over explicit (t, t_prev) pairs, knowing only a callable.

A sampler asks `denoise(x_t, t)` for a prediction, turns it into x̂_0 and ε̂, lets `clip_x0` bound x̂_0, and
yields the state at t_prev. What guides the prediction, and what the states decode to, it does not know.

Here stand the samplers of the two papers DDPM and DDIM; `solvers.py` has those that solve a differential equation and
`langevin.py` those that walk along the score. All refuse a wrong grid with the words of `transitions`, at the first
state that is asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.likelihood import interpolated_log_variance
from ldm.diffusion.prediction import convert, epsilon_from_x0, split_variance, x0_and_epsilon
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, Step

# log β̃ is −∞ where the step ends without noise; diffusers and the code of Improved DDPM clip it too.
MIN_VARIANCE = 1e-20


SAMPLER_NAMES = (
    *("ddim", "ddim-sigma-hat", "ddpm", "ddpm-large", "dpm++2m", "euler-maruyama", "langevin", "predictor-corrector"),
)
"""What users call the samplers of this package; `ldm.pipelines.SAMPLERS` says what each stands for."""


def check_sampler(name: str, *, others: str = "") -> None:
    """Raises `ValueError` with the nearest name for one that is unknown; `others` is what else would do."""
    if name not in SAMPLER_NAMES:
        close = difflib.get_close_matches(name.lower(), SAMPLER_NAMES, n=1)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"sampler is {name!r}; {advice}known are {', '.join(SAMPLER_NAMES)}{others}")


@dataclass(frozen=True)
class State:
    """One step of sampling.

    Attributes:
        index: 0 … S − 1.
        timestep: the one that was left: t, in inversion t_prev.
        latents: the state at the other end of the step, [B, C, H, W].
        pred_original_sample: x̂_0 as seen from the timestep that was left (projected), [B, C, H, W].
    """

    index: int
    timestep: int
    latents: Tensor
    pred_original_sample: Tensor


Noise = Callable[[], Tensor]
"""Fresh standard normal noise of the shape of the latents, one generator an image."""

ClipX0 = Callable[[Tensor], Tensor]
"""Bounds x̂_0; the identity where nothing is known about its range."""


def identity(x_0: Tensor) -> Tensor:
    return x_0


class Transition(NamedTuple):
    """A step with α and σ at both of its ends, as Python floats."""

    t: int
    t_prev: int
    alpha: float
    sigma: float
    alpha_prev: float
    sigma_prev: float


def transitions(schedule: NoiseSchedule, grid: Sequence[Step]) -> list[Transition]:
    """The steps of a grid with their noise levels.

    Raises:
        ValueError: if the grid is empty, has more than T steps, leaves the table, does not fall, has a gap between
            two steps, or starts a step where there is no noise.
    """
    total = schedule.num_train_timesteps
    if not 1 <= len(grid) <= total:
        raise ValueError(f"the grid has {len(grid)} steps; it must have 1 to {total}, the number of training timesteps")
    found = []
    for index, (t, t_prev) in enumerate(grid):
        if t <= t_prev:
            raise ValueError(f"step {index} of the grid goes from timestep {t} to {t_prev}; t_prev must be below t")
        if index and t != grid[index - 1].t_prev:
            raise ValueError(
                f"step {index} of the grid starts at timestep {t} but the one before ends at "
                f"{grid[index - 1].t_prev}; each step must start where the last one ended"
            )
        found.append(Transition(t, t_prev, *schedule.alpha_sigma(t), *schedule.alpha_sigma(t_prev)))
        if found[-1].sigma == 0:
            raise ValueError(f"alphas_cumprod is 1 at timestep {t}: no noise is left there to step down from")
    return found


def predict(
    output: Tensor, latents: Tensor, alpha: float, sigma: float, kind: PredictionType, clip_x0: ClipX0
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂), both [B, C, H, W], from what a denoiser gives at x_t. Where `clip_x0` moves x̂_0, ε̂ follows.

    So the two still add up to x_t. (On digits in pixels at guidance scale 3, 99.8 % of the pictures were right with
    this and 68 % with the ε̂ that was predicted.)
    """
    prediction, _ = split_variance(output, latents)
    x_0, epsilon = x0_and_epsilon(prediction, latents, alpha, sigma, kind)
    projected = clip_x0(x_0)
    if projected is x_0:
        return x_0, epsilon
    return projected, epsilon_from_x0(latents, projected, alpha, sigma)


def ddim(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    eta: float = 0.0,
    variance: Literal["ddim", "sigma_hat"] = "ddim",
    noise: Noise | None = None,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """DDIM (arXiv:2010.02502) with any η: 0 is deterministic, 1 has the variance of DDPM.

    Args:
        latents: x_T, [B, C, H, W] standard normal.
        eta: η, 0 to 1.
        variance: "ddim" adds noise of variance σ_t(η)²; "sigma_hat" is the row σ̂ of Table 1: the direction of
            η = 1 but noise of variance σ̂² = 1 − ᾱ_t / ᾱ_prev. That is `ddpm` with variance β, and as there the step
            to the end adds none.
        noise: where the noise of η > 0 comes from.

    Raises:
        ValueError: if η is outside [0, 1], or not 1 with "sigma_hat", or `variance` is unknown; see `transitions`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be 0 (deterministic DDIM) to 1 (the variance of DDPM)")
    if variance not in ("ddim", "sigma_hat"):
        raise ValueError(f"variance is {variance!r}; choose ddim (that of eta) or sigma_hat (DDIM, Table 1)")
    if variance == "sigma_hat" and eta != 1:
        raise ValueError(f"eta is {eta} with variance sigma_hat, which takes the direction of eta 1; give eta 1")
    assert eta == 0 or noise is not None, "eta > 0 needs a source of noise"
    for index, (t, t_prev, alpha, sigma, alpha_prev, sigma_prev) in enumerate(transitions(schedule, grid)):
        x_0, epsilon = predict(denoise(latents, t), latents, alpha, sigma, prediction_type, clip_x0)
        # DDIM, Eq. 16: σ_t(η) = η √((1 − ᾱ_prev) / (1 − ᾱ_t)) √(1 − ᾱ_t / ᾱ_prev)
        stride_std = math.sqrt(max(0.0, 1 - (alpha / alpha_prev) ** 2))
        std = eta * (sigma_prev / sigma) * stride_std
        # DDIM, Eq. 12
        direction = math.sqrt(max(0.0, sigma_prev**2 - std**2))
        latents = alpha_prev * x_0 + direction * epsilon
        if eta > 0 and noise is not None:
            if variance == "sigma_hat":
                std = stride_std if t_prev >= 0 else 0.0
            # Drawn at the last step too, where the deviation is 0, so that the stream does not depend on it.
            latents = latents + std * noise()
        yield State(index, t, latents, x_0)


def ddim_inversion(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """DDIM run forwards, from x_0 to x_T: the ODE of DDIM, Eq. 14, by Euler's method with growing noise (section 4.3).

    Each step asks the network about x_{t_prev} under its own label, as Euler's method does; an image without noise has
    none, and is asked about under that of the end it goes to. diffusers' DDIMInverseScheduler asks under t at every
    step, which is of first order too. On digits that comes back closer up to S = 20, and less close from 50 on
    (docs/ddim_tables.md). x̂_0 is never projected: sampling could not undo that.

    Args:
        latents: x_0, [B, C, H, W]: the state at the last t_prev of `grid`.
        grid: the grid of sampling; it is walked from its last step to its first.

    Yields:
        States whose `latents` are at t; the last is x_T.

    Raises:
        ValueError: see `transitions`.
    """
    steps = reversed(transitions(schedule, grid))
    for index, (t, t_prev, alpha, sigma, alpha_prev, sigma_prev) in enumerate(steps):
        # Before timestep 0 stands a state without noise, or with that of timestep 0 (set_alpha_to_one).
        label = t_prev if t_prev >= 0 else 0 if sigma_prev > 0 else t
        prediction, _ = split_variance(denoise(latents, label), latents)
        # Read with α and σ of the label: the network took x for a state there.
        alpha_seen, sigma_seen = schedule.alpha_sigma(label)
        epsilon = convert(prediction, latents, prediction_type, "epsilon", alpha=alpha_seen, sigma=sigma_seen)
        x_0 = (latents - sigma_prev * epsilon) / alpha_prev  # DDIM, Eq. 9
        latents = alpha * x_0 + sigma * epsilon
        yield State(index, t_prev, latents, x_0)


def ddpm(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    noise: Noise,
    variance: Literal["small", "large", "learned"] = "small",
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """Ancestral sampling, DDPM (arXiv:2006.11239) Algorithm 2, on any grid: the posterior q(x_prev | x_t, x̂_0).

    Args:
        latents: x_T, [B, C, H, W] standard normal.
        variance: σ_t² = β̃_t ("small") or β_t ("large"), the two choices of DDPM, section 3.2, or between them, as
            the network says ("learned": Improved DDPM, arXiv:2102.09672, Eq. 15). `denoise` then gives
            [B, 2C, H, W]: the prediction, and ν in [−1, 1] with (ν + 1) / 2 the weight of log β_t.

    Raises:
        ValueError: if `variance` is unknown, or learned and the network gives no ν; see `transitions`.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance is {variance!r}; choose small (the posterior's), large (beta) or learned")
    for index, (t, t_prev, alpha, sigma, alpha_prev, sigma_prev) in enumerate(transitions(schedule, grid)):
        prediction, interpolation = split_variance(denoise(latents, t), latents)
        if variance == "learned" and interpolation is None:
            raise ValueError(
                f"variance is learned but the network gives {prediction.shape[1]} channels for as many of the latents, "
                "so that none are left for the variance; choose variance small or large"
            )
        x_0 = clip_x0(convert(prediction, latents, prediction_type, "sample", alpha=alpha, sigma=sigma))
        # β of the whole stride from t_prev to t; on the full grid it is β_t.
        ratio = alpha / alpha_prev
        beta = 1 - ratio**2
        # DDPM, Eq. 7
        mean = (alpha_prev * beta / sigma**2) * x_0 + (ratio * sigma_prev**2 / sigma**2) * latents
        posterior = sigma_prev**2 / sigma**2 * beta
        if t_prev < 0:  # Algorithm 2, line 3: no noise in the last step
            latents = mean
        elif variance == "learned":
            assert interpolation is not None
            # Improved DDPM, Eq. 15
            log_small, log_large = math.log(max(posterior, MIN_VARIANCE)), math.log(beta)
            log_variance = interpolated_log_variance(interpolation, log_small, log_large)
            latents = mean + torch.exp(0.5 * log_variance) * noise()
        else:
            latents = mean + math.sqrt(posterior if variance == "small" else beta) * noise()
        yield State(index, t, latents, x_0)
