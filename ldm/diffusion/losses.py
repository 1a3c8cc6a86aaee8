"""Training losses, their weights by timestep, how timesteps are distributed, and the variational bound.

The bound on −log p(x_0) is that of DDPM (arXiv:2006.11239), Eq. 5 and section 3.3.

L = E_q[ L_T + Σ_{t>1} L_{t−1} + L_0 ], where
L_T     = KL(q(x_T | x_0) ‖ N(0, I)),
L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)),
L_0     = −log p(x_0 | x_1).

The paper counts t from 1 and this package from 0: the term seen from timestep t here is the paper's L_t. Terms are in
bits per dimension, computed in float64 where x_0 is float64, else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.denoiser import (
    Denoiser,
    add_noise,
    convert,
    log_variance_at,
    posterior_mean,
    split_variance,
    training_target,
)
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, extract

Weighting = Literal["simple", "vlb", "min_snr", "hybrid"]
Variance = Literal["small", "large", "learned"]
"""σ_t² of p(x_{t−1} | x_t): β̃_t, β_t (DDPM, section 3.2), or learned between the two (Improved DDPM, Eq. 15)."""

Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_0, mean, log variance), all [B, C, H, W] → log p(x_0 | x_1) of each value, in nats."""

LEVELS = 256  # of a pixel; they lie 2/255 apart over [−1, 1]
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


def gaussian_decoder(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x_0; mean, variance) of each value, nats: the decoder of continuous data."""
    squares = (x_0 - mean).square() * torch.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squares)


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
        weighting, channels = loss.weighting, f"the denoiser gives {output.shape[1]} channels for {latents.shape[1]}"
        raise ValueError(f"loss.weighting is {weighting!r} but {channels}; hybrid takes twice as many, others as many")
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


# ---- the variational bound


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of x_0 [B, …], [B] bits per dimension. DDPM, Eq. 5; 0 at zero terminal SNR."""
    remaining = float(schedule.alphas_cumprod[-1])  # ᾱ_T
    squares = x_0.to(torch.float64 if x_0.dtype == torch.float64 else torch.float32).square()
    return _bits(0.5 * (remaining * squares - remaining - math.log1p(-remaining)))


def variational_terms(
    output: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    *,
    decoder: Decoder,
    prediction_type: PredictionType = "epsilon",
    variance: Variance = "small",
    clip_x0: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """L_t [B] of each sample at its own timestep, as the KL between two Gaussians; at timestep 0 the decoder's L_0.

    Args:
        output: of the network at `x_t` [B, C, …]: [B, C, …], or [B, 2C, …] with "learned"; gradients flow to it.
        timesteps: [B] int64 on the CPU, 0 to T − 1.
        decoder: `gaussian_decoder` for continuous data, `discretized_decoder(mean, std)` for pixels.
        variance: for data with a density, "small" stays about 0.64 bits above its likelihood however large T is;
            "large" approaches it as 1/T.
        clip_x0: bounds x̂_0, as in sampling; None where nothing is known of its range.
    """
    schedule.check_prediction(prediction_type)
    if variance not in get_args(Variance):
        raise ValueError(f"variance is {variance!r}; choose {', '.join(get_args(Variance))}")
    prediction, fraction = split_variance(output, x_t)
    if (fraction is not None) != (variance == "learned"):
        channels = f"the denoiser gives {output.shape[1]} channels for {x_t.shape[1]}"
        raise ValueError(f"variance is {variance!r} but {channels}; learned takes twice as many, others as many")
    a, b = (extract(table, timesteps, x_0) for table in schedule.posterior_mean_coefficients)
    small, large = log_variances(schedule, timesteps, x_0)
    if fraction is not None:
        log_variance = log_variance_at(fraction.to(small.dtype), small, large)
    else:
        log_variance = small if variance == "small" else large
    alpha, sigma = schedule.coefficients(timesteps, x_0)
    kind, quantity = prediction_type, prediction.to(small.dtype)
    if clip_x0 is not None:
        quantity = clip_x0(convert(quantity, x_t, kind, "sample", alpha=alpha, sigma=sigma, posterior=(a, b)))
        kind = "sample"
    mean = convert(quantity, x_t, kind, "posterior_mean", alpha=alpha, sigma=sigma, posterior=(a, b))
    nats = gaussian_kl(posterior_mean(x_0, x_t, (a, b)), small, mean, log_variance)  # [B, C, …]
    first = timesteps == 0
    if bool(first.any()):
        chosen = first.to(nats.device)
        everywhere = log_variance.expand_as(mean)
        decoded = -decoder(x_0[chosen], mean[chosen], everywhere[chosen])
        nats = nats.index_put((chosen.nonzero().flatten(),), decoded.to(nats.dtype))
    return _bits(nats)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) ‖ N(other_mean, e^other_log_variance)) of each value, nats."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.expm1() - ratio + (mean - other_mean).square() * torch.exp(-other_log_variance))


def log_variances(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(log β̃_t, log β_t), each [B, 1, …] at timesteps [B], by `log_variance_tables`."""
    small, large = log_variance_tables(schedule)
    return extract(small, timesteps, like), extract(large, timesteps, like)


def log_variance_tables(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(log β̃, log β), each [T] float64, with the next for the 0 at timestep 0 of β̃ (Improved DDPM, section 3.1)."""
    if schedule.num_train_timesteps < 2:
        raise ValueError("num_train_timesteps is 1; the posterior variance of the first step is 0, so T must be 2")
    if schedule.alphas_cumprod[0] == 1:
        raise ValueError("alphas_cumprod is 1 at timestep 0; the first step must add noise for x_0 to have a density")
    small = schedule.posterior_variance.clone()
    small[0] = small[1]
    return small.log(), schedule.betas.log()


def discretized_decoder(mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> Decoder:
    """The decoder of pixels with 256 values in [−1, 1]: the Gaussian integrated over the bin of x_0. DDPM, Eq. 13.

    The outermost bins reach to ±∞, so that the 256 probabilities add up to 1. x_0 is (pixel − mean) / std per channel,
    as `PixelCodec` makes it.
    """
    if len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must have one entry a channel, std positive")
    half = 1 / (LEVELS - 1)

    def decode(x_0: Tensor, predicted: Tensor, log_variance: Tensor) -> Tensor:
        shift, scale = (torch.tensor(v, dtype=predicted.dtype).view(1, -1, 1, 1) for v in (mean, std))
        shift, scale = shift.to(predicted.device), scale.to(predicted.device)
        pixels = x_0 * scale + shift  # [B, C, H, W]
        places = (pixels + 1) * ((LEVELS - 1) / 2)  # 0 … 255
        nearest = places.round().clamp(0, LEVELS - 1)  # so that neighboring bins share their edge
        wrong = (places - nearest).abs() > 0.01
        if bool(wrong.any()):
            known = f"the {LEVELS} values k / 127.5 - 1; for continuous data take gaussian_decoder"
            raise ValueError(f"x_0 holds the pixel value {float(pixels[wrong][0]):.6g}, none of {known}")
        pixels = nearest / ((LEVELS - 1) / 2) - 1
        predicted_std = torch.exp(0.5 * log_variance) * scale
        center = pixels - (predicted * scale + shift)
        upper, lower = (center + half) / predicted_std, (center - half) / predicted_std
        inside = log_normal_between(lower, upper)
        ends = torch.where(pixels > 0, torch.special.log_ndtr(-lower), torch.special.log_ndtr(upper))
        return torch.where(pixels.abs() > 1 - half, ends, inside)

    return decode


def log_normal_between(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Φ(upper) − Φ(lower)) for lower < upper, precise in both tails."""
    # Φ(b) − Φ(a) = Φ(−a) − Φ(−b): in the right tail both are near 1 and their difference is lost; flipped it is not.
    flip = lower + upper > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


def _bits(nats: Tensor) -> Tensor:
    """[B, …] nats a value → [B] bits per dimension."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
