"""One adapter: any scheduler of diffusers, run on our denoiser."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ldm.diffusion import (
    Denoise,
    NoiseSchedule,
    PredictionType,
    State,
    alpha_sigma_at,
    original_and_noise,
    split_variance,
    training_target,
)
from ldm.diffusion.sampling import Project


class Scheduler(Protocol):
    """What all schedulers of diffusers have."""

    config: Any
    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: Any, /) -> Any: ...

    def scale_model_input(self, sample: Tensor, timestep: Any, /) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, /) -> Any: ...


def is_scheduler(value: object) -> bool:
    wanted = ("config", "init_noise_sigma", "set_timesteps", "scale_model_input", "step")
    return not isinstance(value, type) and all(hasattr(value, name) for name in wanted)


def check_scheduler(
    scheduler: Scheduler, schedule: NoiseSchedule, prediction_type: PredictionType, *, eta: float
) -> None:
    """Refuses a scheduler that would sample another process than the one the network was trained for.

    Raises:
        ValueError: naming the scheduler, the key and its value, and the way out.
    """
    name = type(scheduler).__name__
    remedy = "build it with from_pretrained(MODEL, subfolder='scheduler')"
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(f"{name} has no alphas_cumprod: it samples another kind of diffusion; choose one of DDPM's")
    ours = schedule.alphas_cumprod
    # Theirs is a product in float32, and ends at 2^-24 instead of 0.
    if len(table) != len(ours) or not torch.allclose(table.double().cpu(), ours, rtol=1e-3, atol=1e-6):
        raise ValueError(f"{name} has other betas than this model was trained with; {remedy}")
    predicted = scheduler.config.get("prediction_type", "epsilon")
    if predicted == "posterior_mean":
        raise ValueError(
            f"{name} has prediction_type 'posterior_mean', which diffusers does not know; give it as noise: "
            "from_pretrained(MODEL, subfolder='scheduler', prediction_type='epsilon')"
        )
    if predicted != prediction_type:
        raise ValueError(
            f"{name} has prediction_type {predicted!r}, but the model predicts {prediction_type}; {remedy}"
        )
    for key in ("clip_sample", "thresholding"):
        if scheduler.config.get(key):
            raise ValueError(
                f"{name} has {key} {scheduler.config[key]!r}, which bounds latents as if they were pixels in [-1, 1]; "
                f"set it to False (pixel models are bounded by their codec)"
            )
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta is {eta}, which {name} does not have; leave it out")


def run_scheduler(
    scheduler: Scheduler,
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    eta: float,
    generators: Sequence[torch.Generator],
    project: Project,
    prediction_type: PredictionType,
    learned_variance: bool,
) -> Iterator[State]:
    """The loop that the pipelines of diffusers run around a scheduler, as a generator of states.

    The scheduler is copied first, because it keeps the state of a run. `scale_model_input` gives what the network
    was trained on, x_t = α x_0 + σ ε, so x̂_0 is computed here for every scheduler alike, and where `project` moves
    it, the prediction is made to agree. The states' `latents` are as the scheduler keeps them: Euler and its kin hold
    x_t/α. Each image draws from its own generator; a scheduler whose `step` takes none must be deterministic.

    Args:
        latents: standard normal, [B, C, H, W].
        num_inference_steps: as `set_timesteps` takes it; some schedulers evaluate more often than that.
        generators: one an image, on the CPU.
        learned_variance: whether the network gives 2C channels.

    Raises:
        ValueError: for a scheduler that walks from pictures to noise, and one of learned variances where the network
            gives none, or not as diffusers' "learned_range" has them.
    """
    scheduler, name = copy.deepcopy(scheduler), type(scheduler).__name__
    scheduler.set_timesteps(num_inference_steps, latents.device)
    if "Inverse" in name or scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from a picture to noise, which pipeline.invert does; take one that draws")
    draws_learned = _draws_learned(scheduler, learned_variance)
    takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "eta" in takes:
        extra["eta"] = eta
    if "generator" in takes:
        extra["generator"] = list(generators)
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        t = float(timestep)
        x_t = scheduler.scale_model_input(latents, timestep)
        # Some ask between two timesteps of training; what guidance builds answers there.
        output = denoise(x_t, cast(int, int(t) if t.is_integer() else t))
        prediction, variance = split_variance(output, x_t)
        alpha, sigma = alpha_sigma_at(schedule, t)
        original, _ = original_and_noise(prediction, x_t, alpha, sigma, prediction_type)
        projected = project(original)
        if projected is not original:
            noise = (x_t - alpha * projected) / sigma
            original, prediction = projected, training_target(projected, noise, alpha, sigma, prediction_type)
        if draws_learned and variance is not None:
            prediction = torch.cat([prediction, variance], dim=1)  # [B, 2C, H, W]
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
        yield State(index, round(t), latents, original)


def _draws_learned(scheduler: Any, learned_variance: bool) -> bool:
    """Whether a scheduler draws with the variance of the network; one that has no use for it is set to none."""
    kind = str(scheduler.config.get("variance_type"))
    if not kind.startswith("learned"):
        return False
    if "variance_type" not in vars(scheduler):
        # A solver, which would cut a variance off that the prediction does not hold.
        scheduler.register_to_config(variance_type=None)
        return False
    name = type(scheduler).__name__
    if not learned_variance:
        raise ValueError(f"{name} has variance_type {kind!r}, but this model has no variances; set it to a fixed one")
    if kind != "learned_range":
        raise ValueError(
            f"{name} has variance_type {kind!r}, but this model has those of learned_range; set it to that"
        )
    return True
