"""Algebra between what a network may predict: ε, v and x_0. Pure functions of tensors.

x_t = α x_0 + σ ε                 DDPM (arXiv:2006.11239), Eq. 4, with α = √ᾱ_t and σ = √(1 − ᾱ_t)
v   = α ε − σ x_0                 Progressive distillation (arXiv:2202.00512), appendix D

`alpha` and `sigma` are floats or tensors that broadcast against the images [B, C, H, W].
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.schedule import PredictionType

Coefficient = float | Tensor


def add_noise(original: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """x_t from x_0 and ε: DDPM, Eq. 4."""
    return alpha * original + sigma * noise


def velocity(original: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """v from x_0 and ε: Progressive distillation, appendix D."""
    return alpha * noise - sigma * original


def training_target(
    original: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient, prediction_type: PredictionType
) -> Tensor:
    """What the network is trained to say about x_t."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(original, noise, alpha, sigma)
    raise ValueError(f"prediction_type is {prediction_type!r}; choose epsilon or v_prediction")


def noise_of(x_t: Tensor, original: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """ε from x_t and x_0: DDPM, Eq. 4, solved for it; σ must not be 0."""
    return (x_t - alpha * original) / sigma


def original_and_noise(
    prediction: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x̂_0, ε̂), both [B, C, H, W], from a prediction at x_t.

    From ε: x̂_0 = (x_t − σ ε) / α   (DDPM, Eq. 15).
    From v: x̂_0 = α x_t − σ v and ε̂ = σ x_t + α v   (Progressive distillation, appendix D).
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
    raise ValueError(f"prediction_type is {prediction_type!r}; choose epsilon or v_prediction")
