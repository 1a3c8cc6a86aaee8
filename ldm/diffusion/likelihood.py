"""The variational bound on −log p(x_0), term by term. DDPM (arXiv:2006.11239), Eq. 5 and section 3.3.

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
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.prediction import convert, posterior_mean, split_variance
from ldm.diffusion.schedule import NoiseSchedule, PredictionType, extract

Variance = Literal["small", "large", "learned"]
"""σ_t² of p(x_{t−1} | x_t): β̃_t, β_t (DDPM, section 3.2), or learned between the two (Improved DDPM, Eq. 15)."""

Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_0, mean, log variance), all [B, C, H, W] → log p(x_0 | x_1) of each value, in nats."""

LEVELS = 256  # of a pixel; they lie 2/255 apart over [−1, 1]


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
        raise ValueError(
            f"variance is {variance!r} but the denoiser gives {output.shape[1]} channels for {x_t.shape[1]}; "
            "learned takes twice as many, small and large take as many"
        )
    a, b = (extract(table, timesteps, x_0) for table in schedule.posterior_mean_coefficients)
    small, large = log_variances(schedule, timesteps, x_0)
    if fraction is not None:
        log_variance = interpolated_log_variance(fraction.to(small.dtype), small, large)
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


def interpolated_log_variance(fraction: Tensor, small: Tensor | float, large: Tensor | float) -> Tensor:
    """log Σ = v log β + (1 − v) log β̃ with v = (ν + 1) / 2, ν the `fraction`, not clamped. Improved DDPM, Eq. 15."""
    share = (fraction + 1) / 2
    return share * large + (1 - share) * small


def gaussian_decoder(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x_0; mean, variance) of each value, nats: the decoder of continuous data."""
    squares = (x_0 - mean).square() * torch.exp(-log_variance)
    return -0.5 * (math.log(2 * math.pi) + log_variance + squares)


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
            raise ValueError(
                f"x_0 holds the pixel value {float(pixels[wrong][0]):.6g}; the discretized decoder knows only the "
                f"{LEVELS} values k / 127.5 - 1, k = 0 to 255; for continuous data take gaussian_decoder"
            )
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
