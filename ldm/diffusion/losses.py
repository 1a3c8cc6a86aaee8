"""Training losses, their weights by timestep, and how timesteps are distributed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.likelihood import Decoder, gaussian_decoder, log_variance_tables, variational_terms
from ldm.diffusion.prediction import Denoiser, add_noise, split_variance, training_target
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, extract

Weighting = Literal["simple", "vlb", "min_snr", "hybrid"]
NOISE_BANDS = 4


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimized. The square of (prediction − target) is averaged over a sample and weighted by its timestep.

    Args:
        weighting: "simple": no weight (DDPM, Eq. 14, for whatever is predicted). "vlb": the term L_t of the variational
            bound (DDPM, Eq. 12), without what no network can change. "min_snr": min(SNR, γ) as seen in x_0
            (arXiv:2303.09556, section 3.4). "hybrid": L_simple + λ L_vlb with learned variances (Improved DDPM, Eq.
            16); the denoiser gives 2C channels.
        gamma: γ of "min_snr", above 0. The paper's 5.
        vlb_weight: λ of "hybrid", at least 0. The paper's 0.001.
        variance: σ_t² in the weights of "vlb": "small" is β̃_t, "large" is β_t (DDPM, section 3.2).
    """

    __pydantic_config__ = {"extra": "forbid"}

    weighting: Weighting = "simple"
    gamma: float = 5.0
    vlb_weight: float = 0.001
    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting is {self.weighting!r}; choose one of {', '.join(get_args(Weighting))}")
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance is {self.variance!r}; choose small or large (hybrid learns it)")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; it must be above 0 and finite")
        if not 0 <= self.vlb_weight < math.inf:
            raise ValueError(f"vlb_weight is {self.vlb_weight}; it must be at least 0 and finite")


SIMPLE = LossConfig()


def diffusion_loss(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    latents: Tensor,
    condition: Tensor,
    *,
    timesteps: Tensor,
    noise: Tensor,
    prediction_type: PredictionType = "epsilon",
    loss: LossConfig = SIMPLE,
    decoder: Decoder = gaussian_decoder,
) -> Tensor:
    """The loss [B] of each sample at its timestep: by default L_simple, DDPM, Eq. 14.

    With "vlb" its mean, over timesteps distributed uniformly, estimates the bound in bits per dimension, less what no
    network can change.

    Args:
        latents: x_0, [B, C, H, W] float32 (or float64, and then so is all else), of zero mean and unit variance.
        condition: [B, L, D].
        timesteps: [B] int64, 0 to T − 1, on the CPU.
        noise: ε, [B, C, H, W], on the device of `latents`.
        decoder: log p(x_0 | x_1), the term of "hybrid" at timestep 0.

    Raises:
        ValueError: if the denoiser's channels do not fit the loss, or the schedule does not fit `prediction_type`.
    """
    schedule.check_prediction(prediction_type)
    alpha, sigma = schedule.coefficients(timesteps, latents)  # [B, 1, 1, 1]
    noisy = add_noise(latents, noise, alpha, sigma)
    a, b = (extract(table, timesteps, latents) for table in schedule.posterior_mean_coefficients)
    target = training_target(latents, noise, alpha, sigma, prediction_type, posterior=(a, b))
    output = denoiser(noisy, timesteps.to(latents.device), condition).to(alpha.dtype)
    prediction, fraction = split_variance(output, latents)
    if (fraction is not None) != (loss.weighting == "hybrid"):
        raise ValueError(
            f"loss.weighting is {loss.weighting!r} but the denoiser gives {output.shape[1]} channels for "
            f"{latents.shape[1]}; hybrid learns the variance from twice as many, the others take as many"
        )
    squares = (prediction - target).square().flatten(1).mean(dim=1)  # [B]
    if loss.weighting == "simple":
        return squares
    if fraction is None:
        weights = loss_weights(schedule, prediction_type, loss)
        return extract(weights, timesteps, squares) * squares
    # Improved DDPM, section 3.1: L_vlb teaches the variance alone; the mean stands still in it.
    terms = variational_terms(
        torch.cat([prediction.detach(), fraction], dim=1),
        noisy,
        latents,
        schedule,
        timesteps,
        decoder=decoder,
        prediction_type=prediction_type,
        variance="learned",
    )
    # L_vlb is a sum over T terms, of which each sample sees one.
    return squares + loss.vlb_weight * schedule.num_train_timesteps * terms


def loss_weights(schedule: NoiseSchedule, prediction_type: PredictionType, loss: LossConfig) -> Tensor:
    """What the mean square of (prediction − target) is multiplied by, [T] float64; not for "hybrid".

    A weight is that of x_0 times the squared gain of an error in x̂_0. So "min_snr" is min(SNR, γ) for x_0,
    min(1, γ / SNR) for ε and min(SNR, γ) / (SNR + 1) for v; 0 where SNR is 0, so that this timestep is not trained.
    "vlb" is β_t² / (2 σ_t² α_t (1 − ᾱ_t)) for ε, times T / log 2; at timestep 0 the decoder is a Gaussian density, and
    the next β̃ replaces that of 0, as in `likelihood`.
    """
    gain = x0_error_gain(schedule, prediction_type)
    if loss.weighting == "simple":
        return torch.ones_like(gain)
    if loss.weighting == "min_snr":
        return schedule.snr.clamp(max=loss.gamma) * gain.square()
    if loss.weighting != "vlb":
        raise ValueError("loss.weighting is 'hybrid', which is no weight; choose simple, vlb or min_snr")
    small, large = log_variance_tables(schedule)
    variance = (small if loss.variance == "small" else large).exp()
    # DDPM, Eq. 8 with Eq. 7: L_t = ‖μ̃ − μ‖² / (2 σ_t²), and μ̃ holds x_0 times the first coefficient.
    in_original = schedule.posterior_mean_coefficients[0].square() / (2 * variance)
    return in_original * gain.square() * (schedule.num_train_timesteps / math.log(2))


def x0_error_gain(schedule: NoiseSchedule, prediction_type: PredictionType) -> Tensor:
    """By how much an error of the prediction grows in x̂_0, [T] float64: σ/α for ε, 1 for x_0, σ for v, and
    one over the weight of x_0 in μ̃."""
    schedule.check_prediction(prediction_type)
    if prediction_type == "epsilon":
        return schedule.sigma / schedule.alpha
    if prediction_type == "sample":
        return torch.ones_like(schedule.alpha)
    if prediction_type == "v_prediction":
        return schedule.sigma
    return 1 / schedule.posterior_mean_coefficients[0]


def stratified_timestep(index: int, batch_size: int, uniform: float, num_train_timesteps: int) -> int:
    """The timestep of sample `index` of a global batch: ⌊T (index + u) / B⌋, u in [0, 1), one of B strata of 0 … T − 1.

    Over index and u each timestep is exactly equally likely, whether or not B divides T. VDM (arXiv:2107.00630) shifts
    all strata by one u; here each sample has its own and depends on no other.
    """
    if not 0 <= index < batch_size:
        raise ValueError(f"index is {index}; it must be 0 to {batch_size - 1}, a place in the global batch")
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform is {uniform}; it must be at least 0 and below 1")
    # In integers: as floats, index + u may round up into the next stratum, and at the end to T itself.
    numerator, denominator = float(uniform).as_integer_ratio()
    return num_train_timesteps * (index * denominator + numerator) // (batch_size * denominator)


def logit_normal_timesteps(timesteps: Tensor, num_train_timesteps: int, *, mean: float, std: float) -> Tensor:
    """Evenly distributed timesteps [B] → timesteps with a logit-normal density (SD3, arXiv:2403.03206, Eq. 19).

    t / T = sigmoid(z) with z of this normal mean and std; the median is T · sigmoid(mean). Strata stay strata.
    """
    normal = torch.special.ndtri((timesteps.double() + 0.5) / num_train_timesteps)
    return (num_train_timesteps * torch.sigmoid(mean + std * normal)).long().clamp(max=num_train_timesteps - 1)


def noise_bands(num_train_timesteps: int) -> list[range]:
    """The timesteps in `NOISE_BANDS` equal bands, from little noise to much."""
    edges = [band * num_train_timesteps // NOISE_BANDS for band in range(NOISE_BANDS + 1)]
    return [range(first, end) for first, end in pairwise(edges)]


def without_variance(denoiser: Denoiser) -> Denoiser:
    """The denoiser without the variances that it may have learned."""
    return lambda x_t, timesteps, condition: split_variance(denoiser(x_t, timesteps, condition), x_t)[0]
