"""Guidance: functions from denoiser to denoiser, which compose; and the dropping in training that makes one possible.

classifier-free guidance   arXiv:2207.12598, with the rescaling of arXiv:2305.08891
classifier guidance        arXiv:2105.05233
a limited interval         arXiv:2404.07724: `guide_within(schedule, interval, guided, unguided)`

Of a network with 2C channels [prediction, ν] (arXiv:2102.09672) guidance changes the first C and hands ν on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.prediction import DIRECT, Denoise, Denoiser, split_variance
from ldm.diffusion.schedule import NoiseSchedule, PredictionType

Rescale = Callable[[Tensor, Tensor], Tensor]
"""(guided, conditional) → guided, all [B, C, H, W]."""

LogLikelihood = Callable[[Tensor, int], Tensor]
"""(x_t [B, C, H, W], t) → log p(y | x_t), [B], of the y asked for; differentiable in x_t."""


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
            raise ValueError(
                f"classifier guidance at timestep {t} divides by alpha, which is 0 there: x_t says nothing about x_0; "
                "leave that timestep out with a guidance interval of finite ends"
            )
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
                raise ValueError(
                    f"the classifier gives {shape} for x_t of shape {list(x.shape)}; it must give [{len(x)}], the log "
                    "probability of the wanted class for each image"
                )
            if not value.requires_grad:
                raise ValueError(
                    "the classifier's log probability does not depend on x_t, or was cut off from it; it must be "
                    "differentiable in x_t"
                )
            # Images do not see one another, so the gradient of the sum holds the gradient of each.
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError("the classifier's log probability does not depend on x_t, only on other things")
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"the gradient of the classifier's log probability is not finite at timestep {t}; x_t is noisy there, "
                "and the classifier must give a finite log p for noise too"
            )
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
