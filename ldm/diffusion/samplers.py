"""Samplers: generators of states over explicit (t, t_prev) pairs that know only a callable.

A sampler turns the prediction of `denoise(x_t, t)` into x̂_0 and ε̂, lets `clip_x0` bound x̂_0, and yields the state at
t_prev. All check their grid with `transitions` when the first state is requested.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, convert, epsilon_from_x0, log_variance_at, split_variance, x0_and_epsilon
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, Step

# log β̃ is −∞ where the step ends without noise; diffusers and the code of Improved DDPM clip it too.
MIN_VARIANCE = 1e-20

SAMPLER_NAMES = (
    *("ddim", "ddim-sigma-hat", "ddpm", "ddpm-large", "dpm++2m", "euler-maruyama", "langevin", "predictor-corrector"),
)
"""Names of the samplers for users; `ldm.pipelines.SAMPLERS` says what each stands for."""


def check_sampler(name: str, *, others: str = "") -> None:
    """Raises `ValueError` with the nearest name for one that is unknown; `others` is what else would do."""
    if name not in SAMPLER_NAMES:
        close = difflib.get_close_matches(name.lower(), SAMPLER_NAMES, n=1)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"sampler is {name!r}; {advice}known are {', '.join(SAMPLER_NAMES)}{others}")


@dataclass(frozen=True)
class State:
    """One step of sampling, index 0 … S − 1, to `latents` [B, C, H, W] at its other end.

    `timestep` is the one that was left (t, in inversion t_prev), `pred_original_sample` x̂_0 as seen from there.
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
    """The steps of a grid with their noise levels; ValueError unless it falls without gaps, from some noise."""
    total = schedule.num_train_timesteps
    if not 1 <= len(grid) <= total:
        raise ValueError(f"the grid has {len(grid)} steps; it must have 1 to {total}, the number of training timesteps")
    found = []
    for index, (t, t_prev) in enumerate(grid):
        if t <= t_prev:
            raise ValueError(f"step {index} of the grid goes from timestep {t} to {t_prev}; t_prev must be below t")
        if index and t != grid[index - 1].t_prev:
            last = f"the one before ends at {grid[index - 1].t_prev}"
            raise ValueError(f"step {index} of the grid starts at timestep {t} but {last}; it must start there")
        found.append(Transition(t, t_prev, *schedule.alpha_sigma(t), *schedule.alpha_sigma(t_prev)))
        if found[-1].sigma == 0:
            raise ValueError(f"alphas_cumprod is 1 at timestep {t}: no noise is left there to step down from")
    return found


def predict(
    output: Tensor, latents: Tensor, alpha: float, sigma: float, kind: PredictionType, clip_x0: ClipX0
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂), both [B, C, H, W], from what a denoiser gives at x_t; where `clip_x0` moves x̂_0, ε̂ follows."""
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
    """DDIM (arXiv:2010.02502) from x_T [B, C, H, W] with any η: 0 is deterministic, 1 has the variance of DDPM.

    `variance` of the noise: "ddim" is σ_t(η)²; "sigma_hat" is the row σ̂ of Table 1: the direction of η = 1, the
    variance σ̂² = 1 − ᾱ_t / ᾱ_prev, and as in `ddpm` with variance β none in the step to the end.
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
            # At the last step too, where std is 0, so that the stream of numbers does not depend on it.
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

    The grid of sampling is followed backwards; states hold `latents` at t. Each step evaluates the network at
    x_{t_prev} with the timestep t_prev, as Euler's method does; an image without noise has none, and takes t.
    (diffusers' DDIMInverseScheduler always takes t; compared in docs/ddim_tables.md.) x̂_0 is never projected: sampling
    could not undo that.
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

    `variance` σ_t² is β̃_t ("small") or β_t ("large"), the two choices of DDPM, section 3.2, or "learned" between them
    (Improved DDPM, arXiv:2102.09672, Eq. 15), where `denoise` gives [B, 2C, H, W]: the prediction and ν.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance is {variance!r}; choose small (the posterior's), large (beta) or learned")
    for index, (t, t_prev, alpha, sigma, alpha_prev, sigma_prev) in enumerate(transitions(schedule, grid)):
        prediction, interpolation = split_variance(denoise(latents, t), latents)
        if variance == "learned" and interpolation is None:
            channels = f"the network gives {prediction.shape[1]} channels for as many of the latents"
            raise ValueError(f"variance is learned but {channels}; choose variance small or large")
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
            log_variance = log_variance_at(interpolation, log_small, log_large)
            latents = mean + torch.exp(0.5 * log_variance) * noise()
        else:
            latents = mean + math.sqrt(posterior if variance == "small" else beta) * noise()
        yield State(index, t, latents, x_0)


def dpm_solver_pp_2m(
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """DPM-Solver++(2M) (arXiv:2211.01095), Algorithm 2: second order, one evaluation a step, from x_T [B, C, H, W].

    The first step is of first order. So are those without a finite step in λ = log(α/σ) to extrapolate along: the one
    that ends at ᾱ = 1 (in x̂_0, as in diffusers with `final_sigmas_type="zero"`), and the one after a start at ᾱ = 0.
    (diffusers' `lower_order_final` also makes the last of fewer than 15 steps one of first order.)
    """

    def half_log_snr(alpha: float, sigma: float) -> float:  # λ, and its limits without signal and without noise
        if alpha == 0:
            return -math.inf
        return math.inf if sigma == 0 else math.log(alpha / sigma)

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
    """Euler–Maruyama on the reverse-time VP-SDE of Song et al. (arXiv:2011.13456), Eq. 6 and 11, from x_T [B, C, H, W].

    Its time is τ = ∫ β dt = −log ᾱ, read from the table: in it the forward SDE dx = −½ β x dt + √β dw is dx = −½ x dτ +
    dw_τ whatever the schedule, and the length of a step is log(ᾱ_prev / ᾱ_t). At ᾱ = 0 (zero terminal SNR) τ = ∞: the
    step from there is the limit that ancestral sampling has, x_prev = α_prev x̂_0 + σ_prev z.
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

    NCSN adds noise without shrinking the data: its x̃ is our x/α and its σ_i our σ/α. There a step is x̃ ← x̃ + (α_i/2)
    s(x̃, σ_i) + √α_i z with α_i = ε σ_i²/σ_L²; with k = ε/σ_L² and s = −ε̂/σ_i, and times our α, it is x ← x − (k/2) σ
    ε̂ + √k σ z. From level to level x̃ stays, so x is scaled by α_prev/α. As in the paper the sample keeps the noise of
    the last level: take a grid that ends near 0, or the last `pred_original_sample`.

    Args:
        step_size: k = ε/σ_L², in (0, 4); 0.2 in NCSN (ε = 2e-5, σ_L = 0.01).
        num_langevin_steps: T of the algorithm, at least 1; 100 in NCSN. Each is one call of the network.
    """
    if not 0 < step_size < 4:
        raise ValueError(f"step_size is {step_size}; it must lie between 0 and 4, from where on the steps diverge")
    if num_langevin_steps < 1:
        raise ValueError(f"num_langevin_steps is {num_langevin_steps}; it must be at least 1")
    steps = transitions(schedule, grid)
    if steps[0].alpha == 0:
        where = f"timestep {steps[0].t}, where alphas_cumprod is 0"
        raise ValueError(f"annealed Langevin dynamics cannot start at {where}; start lower, or take another sampler")
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
    predictor: Callable[..., Iterator[State]] = ddpm,
    snr: float = 0.01,
    num_corrector_steps: int = 1,
    clip_x0: ClipX0 = identity,
    prediction_type: PredictionType = "epsilon",
) -> Iterator[State]:
    """Predictor–corrector sampling, Song et al. (arXiv:2011.13456) Algorithms 1, 3 and 5.

    After each step of the predictor (`ddpm`, `euler_maruyama` or `ddim`), Langevin steps at the level t_prev that it
    reached: x ← x + ε s + √(2ε) z with ε = 2 (1 − β_i) (r ‖z‖ / ‖s‖)², β_i that of the table at t_prev, and norms of
    each sample alone; none at the end (t_prev = −1). As unadjusted Langevin dynamics the steps are biased: on Gaussian
    data their variance is 1 + r² (1 − β_i) times the right one.

    Args:
        snr: r, above 0; 0.01 for VP, the process here, and 0.16 for VE (Table 5).
        num_corrector_steps: M, at least 1, each one call of the network.
    """
    if not 0 < snr < math.inf:
        raise ValueError(f"snr is {snr}; it must be a finite number above 0 (0.01 is usual)")
    if num_corrector_steps < 1:
        raise ValueError(f"num_corrector_steps is {num_corrector_steps}; it must be at least 1")
    betas = schedule.betas.tolist()
    for index, (t, t_prev, _, _, alpha, sigma) in enumerate(transitions(schedule, grid)):
        shared = {"noise": noise, "clip_x0": clip_x0, "prediction_type": prediction_type}
        (state,) = predictor(denoise, latents, schedule, [Step(t, t_prev)], **shared)
        latents = state.latents
        if t_prev >= 0:
            for _ in range(num_corrector_steps):
                prediction = denoise(latents, t_prev)
                _, epsilon = predict(prediction, latents, alpha, sigma, prediction_type, clip_x0)
                z = noise()
                # Algorithm 5; √(ε/2) = √(1 − β_i) r ‖z‖ / ‖s‖, with s = −ε̂/σ
                scale = math.sqrt(1 - betas[t_prev]) * snr * sigma
                length = sample_norm(epsilon)
                # Where ‖s‖ is 0 nothing says how long a step is: none is taken.
                root = torch.where(length > 0, scale * sample_norm(z) / length, 0)  # [B, 1, …]
                latents = latents - (2 / sigma) * root.square() * epsilon + 2 * root * z
        yield State(index, t, latents, state.pred_original_sample)


def sample_norm(x: Tensor) -> Tensor:
    """‖x‖₂ of each sample, [B, 1, …]; in float32 at least, as half precision overflows at 65504 squared."""
    norm = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))  # [B]
    return norm.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical linear interpolation, on the arc: `fraction` 0 is exactly `start`, 1 exactly `end`.

    Noise of N dimensions lies near a sphere of radius √N; halfway along the chord it would be 1/√2 as long.
    ValueError for opposite points.
    """
    if fraction in (0, 1):
        return end if fraction else start
    a, b = start.cpu().double(), end.cpu().double()  # some devices have no float64
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if float(angle) > torch.pi - 1e-6:
        raise ValueError("the two points are opposite each other; no arc between them is the shortest")
    if float(angle) < 1e-6:  # the limit, where sin(θ) is 0
        return torch.lerp(a, b, fraction).to(start)
    weights = (torch.sin((1 - fraction) * angle), torch.sin(fraction * angle))
    return ((weights[0] * a + weights[1] * b) / torch.sin(angle)).to(start)
