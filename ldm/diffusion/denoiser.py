"""Denoisers: what they may predict (ε, x_0, v, the posterior mean μ̃, the score), and guidance around them.

x_t = α x_0 + σ ε                 DDPM (arXiv:2006.11239), Eq. 4, with α = √ᾱ_t and σ = √(1 − ᾱ_t)
v   = α ε − σ x_0                 Progressive distillation (arXiv:2202.00512), appendix D
μ̃   = a x_0 + b x_t               DDPM, Eq. 7; a and b are `NoiseSchedule.posterior_mean_coefficients`
s   = −ε / σ                      NCSN (arXiv:1907.05600), Eq. 5, where x̃ − x is our x_t − α x_0 = σ ε

`alpha` and `sigma` are floats or tensors that broadcast against the images [B, C, H, W]. Where an equation divides by a
coefficient that is 0 there is no answer: ValueError.

Guidance is made of functions from denoiser to denoiser, which compose:

classifier-free guidance   arXiv:2207.12598, with the rescaling of arXiv:2305.08891
classifier guidance        arXiv:2105.05233
a limited interval         arXiv:2404.07724: `guide_within(schedule, interval, guided, unguided)`

Of a network with 2C channels [prediction, ν] (arXiv:2102.09672) guidance changes the first C and hands ν on.
"""

from __future__ import annotations

import math
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
inside. Those with guidance also take a t between two timesteps, as some diffusers schedulers do."""

Coefficient = float | Tensor
Quantity = Literal["epsilon", "sample", "v_prediction", "posterior_mean", "score"]
"""What can be converted: all that a network may predict, and the score."""

Rescale = Callable[[Tensor, Tensor], Tensor]
"""(guided, conditional) → guided, all [B, C, H, W]."""

LogLikelihood = Callable[[Tensor, int], Tensor]
"""(x_t [B, C, H, W], t) → log p(y | x_t), [B], of the y asked for; differentiable in x_t."""

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
        wanted = f"the same shape, or {list(doubled)} with learned variances"
        raise ValueError(f"the denoiser gives {list(output.shape)} for latents {list(x_t.shape)}; it must be {wanted}")
    prediction, variance = output.chunk(2, dim=1)  # [B, C, H, W] each
    return prediction, variance


def log_variance_at(fraction: Tensor, small: Tensor | float, large: Tensor | float) -> Tensor:
    """log Σ = v log β + (1 − v) log β̃ with v = (ν + 1) / 2, ν the `fraction`, not clamped. Improved DDPM, Eq. 15."""
    share = (fraction + 1) / 2
    return share * large + (1 - share) * small


def _given(posterior: tuple[Coefficient, Coefficient] | None) -> tuple[Coefficient, Coefficient]:
    if posterior is None:
        raise ValueError("posterior_mean needs the two coefficients of this timestep: pass posterior=(a, b)")
    return posterior


def _divisor(value: Coefficient, name: str, reason: str) -> Coefficient:
    zero = bool((value == 0).any()) if isinstance(value, Tensor) else value == 0
    if zero:
        raise ValueError(f"{name} is 0: {reason}")
    return value


# ---- guidance


def drop_conditioning(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """The null condition [1, L, D] where `dropped` [B], else `condition` [B, L, D]. Algorithm 1, line 3."""
    return torch.where(dropped.to(condition.device).view(-1, 1, 1), null, condition)  # [B, L, D]


def with_condition(denoiser: Denoiser, condition: Tensor) -> Denoise:
    """The denoiser with `condition` [B, L, D] inside, and no guidance."""

    def denoise(x_t: Tensor, t: float) -> Tensor:
        dtype = torch.int64 if float(t).is_integer() else torch.float32
        timesteps = torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)
        prediction: Tensor = denoiser(x_t, timesteps, condition)
        return prediction

    return denoise


def classifier_free_guidance(
    denoiser: Denoiser, condition: Tensor, null: Tensor, guidance_scale: float, *, rescale: Rescale | None = None
) -> Denoise:
    """ε_∅ + w (ε_c − ε_∅): Eq. 6 with the w of Imagen and diffusers, any finite number; w = 1 is no guidance.

    `condition` and `null` are [B, L, D], of the prompts and the empty or negative ones. Both halves are one batch; at w
    = 1 and w = 0 only the half that is left is computed. ε, v and x_0 are affine in one another at a given x_t, so one
    formula serves them all. Variances are those of the conditional half.
    """
    if guidance_scale == 1:
        return with_condition(denoiser, condition)
    if guidance_scale == 0 and rescale is None:
        return with_condition(denoiser, null)
    together = with_condition(denoiser, torch.cat([null, condition]))  # [2B, L, D]

    def guided(x_t: Tensor, t: int) -> Tensor:
        both = together(torch.cat([x_t, x_t]), t)  # [2B, C or 2C, H, W]
        unconditional, conditional = both.chunk(2)  # [B, C or 2C, H, W] each
        unconditional, _ = split_variance(unconditional, x_t)
        conditional, variance = split_variance(conditional, x_t)
        prediction = unconditional + guidance_scale * (conditional - unconditional)  # [B, C, H, W]
        if rescale is not None:
            prediction = rescale(prediction, conditional)
        return prediction if variance is None else torch.cat([prediction, variance], dim=1)

    return guided


def rescale_guidance(phi: float) -> Rescale:
    """Against over-exposure: brings the std of each guided output to that of the conditional one, by a fraction φ.

    arXiv:2305.08891, Eq. 14 to 16, on whatever the network predicts, as in diffusers. It works best for v, as in the
    paper (φ = 0.7): ε scaled by k leaves (1 − k) σ/α of the noise in x̂_0, so that an ε-model bears a small φ only.
    ValueError for φ outside [0, 1].
    """
    check_rescale(phi)

    def rescale(guided: Tensor, conditional: Tensor) -> Tensor:
        present, wanted = (each.flatten(1).std(dim=1, correction=0) for each in (guided, conditional))  # Eq. 14, [B]
        # A constant output, as a new network gives, has no deviation to correct.
        factor = torch.where(present > 0, wanted / present, torch.ones_like(present))  # Eq. 15
        return (phi * factor + 1 - phi).view(-1, *[1] * (guided.ndim - 1)) * guided  # Eq. 16

    return rescale


def guide_within(schedule: NoiseSchedule, interval: tuple[float, float], guided: Denoise, unguided: Denoise) -> Denoise:
    """`guided` where the noise level σ/α is in (low, high], `unguided` elsewhere: arXiv:2404.07724.

    ValueError unless 0 <= low < high <= inf.
    """
    low, high = check_interval(interval)

    def denoise(x_t: Tensor, t: int) -> Tensor:
        alpha, sigma = alpha_sigma_at(schedule, t)
        level = sigma / alpha if alpha > 0 else math.inf
        return guided(x_t, t) if low < level <= high else unguided(x_t, t)

    return denoise


def classifier_guidance(
    denoise: Denoise,
    log_likelihood: LogLikelihood,
    scale: float,
    schedule: NoiseSchedule,
    *,
    prediction_type: PredictionType = "epsilon",
) -> Denoise:
    """ε̂ = ε − s σ ∇ log p(y | x_t): arXiv:2105.05233, Algorithm 2, for any differentiable p.

    Scale 1 makes the score of p(x_t) that of p(x_t | y), by Bayes. The gradient is taken under `no_grad` and
    `inference_mode` too. ValueError unless the classifier gives [B] with a finite gradient in x_t, and where α is 0
    unless ε is predicted.
    """
    if not math.isfinite(scale):
        raise ValueError(f"classifier scale is {scale}; it must be a finite number (1 samples p(x | y))")
    if prediction_type not in DIRECT:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose {', '.join(DIRECT)}; see to_epsilon_model")

    def guided(x_t: Tensor, t: int) -> Tensor:
        prediction, variance = split_variance(denoise(x_t, t), x_t)
        alpha, sigma = alpha_sigma_at(schedule, t)
        if prediction_type != "epsilon" and alpha == 0:
            why = f"at timestep {t}, where alpha is 0, x_t says nothing about x_0"
            raise ValueError(f"{why}; leave it out of classifier guidance by a guidance interval of finite ends")
        # By how much a prediction changes when the score changes by 1. ε = −σ score, and x_0 and v follow from ε at
        # x_t: x_0 = (x_t − σ ε) / α, and v = α ε − σ x_0 = (ε − σ x_t) / α.
        if prediction_type == "epsilon":
            factor = -sigma
        else:
            factor = sigma**2 / alpha if prediction_type == "sample" else -sigma / alpha
        # A tensor of inference mode cannot be differentiated; a copy made outside it can.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            value = log_likelihood(x, t)
            if not isinstance(value, Tensor) or value.shape != (len(x),):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = f"[{len(x)}], the log probability of the wanted class for each image"
                given = f"{shape} for x_t of shape {list(x.shape)}"
                raise ValueError(f"the classifier gives {given}; it must give {wanted}")
            if not value.requires_grad:
                raise ValueError("the classifier's log probability must be differentiable in x_t, and is not")
            # Images do not see one another, so the gradient of the sum holds the gradient of each.
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError("the classifier's log probability does not depend on x_t, only on other things")
        if not bool(gradient.isfinite().all()):
            what = "the gradient of the classifier's log probability"
            raise ValueError(f"{what} is not finite at timestep {t}; it must give a finite log p for noise too")
        prediction = prediction + scale * factor * gradient.detach()  # [B, C, H, W]
        return prediction if variance is None else torch.cat([prediction, variance], dim=1)

    return guided


def alpha_sigma_at(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """(α, σ) at a timestep; between two, linear in σ/α, as the samplers that go there (Euler of diffusers) have it."""
    if float(t).is_integer():
        return schedule.alpha_sigma(int(t))
    below, above = schedule.alpha_sigma(math.floor(t)), schedule.alpha_sigma(math.ceil(t))
    if above[0] == 0:
        return above
    weight = t - math.floor(t)
    level = (1 - weight) * below[1] / below[0] + weight * above[1] / above[0]
    return 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)


def check_rescale(phi: float) -> None:
    if not 0 <= phi <= 1:
        raise ValueError(f"guidance_rescale is {phi}; it must be 0 (off) to 1 (0.7 is usual)")


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"guidance_interval is {interval!r}; give two noise levels sigma/alpha, (low, high)") from None
    if not 0 <= low < high:
        turned = f", turned round; give the lower noise level first: ({high:g}, {low:g})"
        wanted = "; it must be two noise levels sigma/alpha, 0 <= low < high"
        raise ValueError(f"guidance_interval is ({low:g}, {high:g}){turned if low > high else wanted}")
    return low, high


def dynamic_threshold(percentile: float) -> Callable[[Tensor], Tensor]:
    """A `clip_x0`: x̂_0 clamped to [−s, s] and divided by s. Imagen (arXiv:2205.11487), section 2.3.

    s is a percentile of |x̂_0| in (0, 1], usually 0.995, of each sample and at least 1, so that an image inside its
    range [−1, 1] stays as it is.
    """
    check_percentile(percentile)

    def clip_x0(x_0: Tensor) -> Tensor:
        sorted_ = x_0.to(torch.float32).abs().flatten(1).sort(dim=1).values  # [B, N]
        # torch.quantile does the same, but refuses more than 2^24 numbers.
        place = percentile * (sorted_.shape[1] - 1)
        below, above = sorted_[:, math.floor(place)], sorted_[:, math.ceil(place)]  # [B]
        threshold = torch.lerp(below, above, place - math.floor(place)).clamp(min=1)  # [B]
        s = threshold.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))  # [B, 1, 1, 1]
        return x_0.clamp(-s, s) / s

    return clip_x0


def check_percentile(percentile: float) -> None:
    if not 0 < percentile <= 1:
        raise ValueError(f"dynamic_threshold is {percentile}; it must be over 0 and at most 1 (0.995 is usual)")
