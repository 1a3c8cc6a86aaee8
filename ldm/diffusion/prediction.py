"""Algebra between what a network may predict: ε, x_0, v, the posterior mean μ̃ and the score. Pure functions.

x_t = α x_0 + σ ε                 DDPM (arXiv:2006.11239), Eq. 4, with α = √ᾱ_t and σ = √(1 − ᾱ_t)
v   = α ε − σ x_0                 Progressive distillation (arXiv:2202.00512), appendix D
μ̃   = a x_0 + b x_t               DDPM, Eq. 7; a and b are `NoiseSchedule.posterior_mean_coefficients`
s   = −ε / σ                      NCSN (arXiv:1907.05600), Eq. 5, where x̃ − x is our x_t − α x_0 = σ ε

`alpha` and `sigma` are floats or tensors that broadcast against the images [B, C, H, W]. Where an equation divides by a
coefficient that is 0 there is no answer: ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, PredictionType


class Denoiser(Protocol):
    """(x_t [B, C, H, W], timestep [B] int64, condition [B, L, D]) → prediction [B, C or 2C, H, W]."""

    def __call__(self, sample: Tensor, timestep: Tensor, condition: Tensor, /) -> Any: ...


Denoise = Callable[[Tensor, int], Tensor]
"""(x_t [B, C, H, W], t) → prediction [B, C, H, W], or [B, 2C, H, W] with variances: a denoiser with its condition
inside. Those built in `guidance` also take a t between two timesteps, as some diffusers schedulers do."""

Coefficient = float | Tensor
Quantity = Literal["epsilon", "sample", "v_prediction", "posterior_mean", "score"]
"""What can be converted: all that a network may predict, and the score."""

DIRECT = ("epsilon", "sample", "v_prediction")  # what x_t, α and σ alone turn into x_0 and ε


def add_noise(x_0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """x_t from x_0 and ε: DDPM, Eq. 4."""
    return alpha * x_0 + sigma * noise


def velocity(x_0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """v from x_0 and ε: Progressive distillation, appendix D."""
    return alpha * noise - sigma * x_0


def posterior_mean(x_0: Tensor, x_t: Tensor, coefficients: tuple[Coefficient, Coefficient]) -> Tensor:
    """μ̃ = a x_0 + b x_t from (a, b): DDPM, Eq. 7."""
    a, b = coefficients
    return a * x_0 + b * x_t


def score_from_epsilon(noise: Tensor, sigma: Coefficient) -> Tensor:
    """s = −ε / σ, the gradient of log q(x_t | x_0): NCSN, Eq. 5. For E[ε | x_t] it is that of log q(x_t)."""
    return -noise / _divisor(sigma, "sigma", "x_t is x_0 itself and has no density around it")


def training_target(
    x_0: Tensor,
    noise: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    prediction_type: PredictionType,
    *,
    posterior: tuple[Coefficient, Coefficient] | None = None,
) -> Tensor:
    """What the network is trained to predict at x_t; `posterior` is (a, b) of μ̃, for "posterior_mean"."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return velocity(x_0, noise, alpha, sigma)
    if prediction_type == "posterior_mean":
        return posterior_mean(x_0, add_noise(x_0, noise, alpha, sigma), _given(posterior))
    raise ValueError(f"prediction_type is {prediction_type!r}; choose {', '.join(DIRECT)} or posterior_mean")


def epsilon_from_x0(x_t: Tensor, x_0: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """ε from x_t and x_0: DDPM, Eq. 4, solved for it."""
    return (x_t - alpha * x_0) / _divisor(sigma, "sigma", "x_t is x_0 itself and says nothing about the noise")


def x0_from_epsilon(x_t: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """x_0 from x_t and ε: DDPM, Eq. 15."""
    return (x_t - sigma * noise) / _divisor(alpha, "alpha", "x_t is the noise itself and says nothing about x_0")


def x0_and_epsilon(
    prediction: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂), both [B, C, H, W], from a prediction at x_t.

    From ε: x̂_0 = (x_t − σ ε) / α   (DDPM, Eq. 15).
    From x_0: ε̂ = (x_t − α x_0) / σ   (DDPM, Eq. 4).
    From v: x̂_0 = α x_t − σ v and ε̂ = σ x_t + α v   (Progressive distillation, appendix D).

    ValueError for μ̃, which needs t − 1 too: see `to_epsilon_model`.
    """
    if prediction_type not in DIRECT:
        way_out = "; to_epsilon_model converts it" if prediction_type == "posterior_mean" else ""
        raise ValueError(f"prediction_type is {prediction_type!r}; choose {' or '.join(DIRECT)}{way_out}")
    x_0 = convert(prediction, x_t, prediction_type, "sample", alpha=alpha, sigma=sigma)
    return x_0, convert(prediction, x_t, prediction_type, "epsilon", alpha=alpha, sigma=sigma)


def convert(
    prediction: Tensor,
    x_t: Tensor,
    source: Quantity,
    target: Quantity,
    *,
    alpha: Coefficient,
    sigma: Coefficient,
    posterior: tuple[Coefficient, Coefficient] | None = None,
) -> Tensor:
    """Any of ε, x_0, v, μ̃ and the score from any other, at one x_t; `posterior` is (a, b) of μ̃, if needed."""
    for name in (source, target):
        if name not in (*DIRECT, "posterior_mean", "score"):
            raise ValueError(f"{name!r} is no quantity; choose {', '.join(DIRECT)}, posterior_mean or score")
    if source == target:
        return prediction

    # x_0 and ε are computed only where the target needs them: from v at α = 0 to x_0, and so on, nothing divides.
    def x_0() -> Tensor:
        if source == "posterior_mean":
            a, b = _given(posterior)
            return (prediction - b * x_t) / _divisor(a, "the weight of x_0 in the posterior mean", "it is x_t itself")
        if source in ("epsilon", "score"):
            return x0_from_epsilon(x_t, noise(), alpha, sigma)
        return prediction if source == "sample" else alpha * x_t - sigma * prediction

    def noise() -> Tensor:
        if source == "epsilon":
            return prediction
        if source == "score":
            return -sigma * prediction
        if source == "v_prediction":
            return sigma * x_t + alpha * prediction
        return epsilon_from_x0(x_t, x_0(), alpha, sigma)

    if target == "epsilon":
        return noise()
    if target == "score":
        return score_from_epsilon(noise(), sigma)
    if target == "sample":
        return x_0()
    if target == "posterior_mean":
        return posterior_mean(x_0(), x_t, _given(posterior))
    return velocity(x_0(), noise(), alpha, sigma)


def to_epsilon_model(denoise: Denoise, schedule: NoiseSchedule, prediction_type: PredictionType) -> Denoise:
    """A denoiser of ε from one of any prediction type (μ̃: from t to t − 1); learned variances are passed on."""
    a, b = schedule.posterior_mean_coefficients

    def denoise_noise(x_t: Tensor, t: int) -> Tensor:
        prediction, rest = split_variance(denoise(x_t, t), x_t)
        alpha, sigma = schedule.alpha_sigma(t)
        posterior = (float(a[t]), float(b[t]))
        noise = convert(prediction, x_t, prediction_type, "epsilon", alpha=alpha, sigma=sigma, posterior=posterior)
        return noise if rest is None else torch.cat([noise, rest], dim=1)  # [B, C or 2C, H, W]

    return denoise_noise


def split_variance(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a denoiser gives for x_t [B, C, …], as (prediction, ν): ν is None for C channels, else they must be 2C."""
    if output.shape == x_t.shape:
        return output, None
    doubled = (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:])
    if tuple(output.shape) != doubled:
        raise ValueError(
            f"the denoiser gives {list(output.shape)} for latents {list(x_t.shape)}; it must give the same shape, or "
            f"{list(doubled)} with learned variances"
        )
    prediction, variance = output.chunk(2, dim=1)  # [B, C, H, W] each
    return prediction, variance


def _given(posterior: tuple[Coefficient, Coefficient] | None) -> tuple[Coefficient, Coefficient]:
    if posterior is None:
        raise ValueError("posterior_mean needs the two coefficients of this timestep: pass posterior=(a, b)")
    return posterior


def _divisor(value: Coefficient, name: str, reason: str) -> Coefficient:
    zero = bool((value == 0).any()) if isinstance(value, Tensor) else value == 0
    if zero:
        raise ValueError(f"{name} is 0: {reason}")
    return value
