"""Sampling with a scheduler object of diffusers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion import Denoise, NoiseSchedule, PredictionType, State, denoiser
from ldm.diffusion.samplers import ClipX0
from ldm.progress import error_reason


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
    """Raises ValueError for a scheduler that would sample another process than the network was trained for."""
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
        remedy = "give it as noise: from_pretrained(MODEL, subfolder='scheduler', prediction_type='epsilon')"
        raise ValueError(f"{name} has prediction_type 'posterior_mean', which diffusers does not know; {remedy}")
    if predicted != prediction_type:
        raise ValueError(f"{name} has prediction_type {predicted!r}; the model predicts {prediction_type}; {remedy}")
    for key in ("clip_sample", "thresholding"):
        if scheduler.config.get(key):
            why = "bounds latents as if they were pixels in [-1, 1]; set it to False"
            raise ValueError(f"{name} has {key} {scheduler.config[key]!r}, which {why} (the codec bounds pixels)")
    for key, wanted in (("use_flow_sigmas", False), ("timestep_type", "discrete")):
        if scheduler.config.get(key, wanted) != wanted:
            why = f"it samples another kind of diffusion than a DDPM schedule; set it to {wanted!r}"
            raise ValueError(f"{name} has {key} {scheduler.config[key]!r}: {why}")
    takes = inspect.signature(scheduler.step).parameters
    needed = [key for key, value in takes.items() if value.default is value.empty and value.kind in POSITIONAL][3:]
    needed += ["prev_timestep"] if "prev_timestep" in takes else []  # without it UnCLIPScheduler steps to t − 1
    if needed:
        raise ValueError(f"{name} needs {needed[0]} at every step, which nothing here can give; take another")
    if eta and "eta" not in takes:
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
    clip_x0: ClipX0,
    prediction_type: PredictionType,
    learned_variance: bool,
) -> Iterator[State]:
    """The loop that diffusers' pipelines run around a scheduler, as a generator of states, from `latents` [B, C, H, W].

    The scheduler is copied, because it keeps the state of a run. `scale_model_input` gives x_t = α x_0 + σ ε, so that
    x̂_0 follows for every scheduler alike; where `clip_x0` moves it, the prediction is made to agree. States hold
    `latents` as the scheduler does: x_t/α for Euler and its kin. A prediction of x_0, which some schedulers do not
    take, is passed to all of them as v.

    ValueError for one that goes from images to noise, leaves the timesteps or the noise levels of training, takes noise
    that is not of `generators` or another number of steps, or needs other variances.
    """
    scheduler, name = copy.deepcopy(scheduler), type(scheduler).__name__
    set_timesteps(scheduler, num_inference_steps, latents.device)
    if "Inverse" in name or scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from an image to noise, which pipeline.invert does; take one that generates")
    last = schedule.num_train_timesteps - 1
    for t in scheduler.timesteps.tolist():
        if not 0 <= t <= last:
            where = f"timestep {t:g} with {num_inference_steps} steps, outside 0 to {last}"
            raise ValueError(f"{name} asks at {where}; take another number of steps, or timestep_spacing")
    # Whether it samples with the variance of the network.
    kind = str(scheduler.config.get("variance_type"))
    uses_variance = kind.startswith("learned")
    if uses_variance and "variance_type" not in vars(scheduler):
        # A solver, which would cut a variance off that the prediction does not hold.
        cast(Any, scheduler).register_to_config(variance_type=None)
        uses_variance = False
    if uses_variance and not learned_variance:
        raise ValueError(f"{name} has variance_type {kind!r}, but this model has no variances; set it to a fixed one")
    if uses_variance and kind != "learned_range":
        raise ValueError(f"{name} has variance_type {kind!r}, but this model has that of learned_range; set that")
    given_as: PredictionType = "v_prediction" if prediction_type == "sample" else prediction_type
    if given_as != prediction_type:
        cast(Any, scheduler).register_to_config(prediction_type=given_as)
    takes = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": eta} if "eta" in takes else {}
    extra |= {"generator": list(generators)} if "generator" in takes else {}
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        t = float(timestep)
        x_t = scheduler.scale_model_input(latents, timestep)
        alpha, sigma = _level(scheduler, index, timestep, schedule)
        # Some ask between two timesteps of training; what guidance builds answers there.
        output = denoise(x_t, cast(int, int(t) if t.is_integer() else t))
        prediction, variance = denoiser.split_variance(output, x_t)
        x_0, _ = denoiser.x0_and_epsilon(prediction, x_t, alpha, sigma, prediction_type)
        projected = clip_x0(x_0)
        if projected is not x_0 or given_as != prediction_type:
            x_0 = projected
            noise = denoiser.epsilon_from_x0(x_t, x_0, alpha, sigma)
            prediction = denoiser.training_target(x_0, noise, alpha, sigma, given_as)
        if uses_variance and variance is not None:
            prediction = torch.cat([prediction, variance], dim=1)  # [B, 2C, H, W]
        with _failing_as(f"{name} fails at timestep {t:g} of {num_inference_steps} steps"), _Noise(name, generators):
            latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
        if not latents.isfinite().all() and prediction.isfinite().all():
            where = f"timestep {t:g} of {num_inference_steps} steps, as where two steps have one noise level"
            raise ValueError(f"{name} gives numbers that are not finite at {where}; take fewer, or another spacing")
        yield State(index, round(t), latents, x_0)


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
FAILURES = (ArithmeticError, AssertionError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever a scheduler raises about its own settings, as one ValueError."""
    try:
        yield
    except _ForeignNoiseError:
        raise
    except FAILURES as error:
        raise ValueError(f"{what} ({error_reason(error)}); take other steps, another spacing or scheduler") from error


class _ForeignNoiseError(ValueError):
    pass


class _Noise(TorchDispatchMode):
    """Refuses noise that comes from anywhere but the generators of the images, for no seed gives it again."""

    def __init__(self, name: str, generators: Sequence[torch.Generator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By seed, for what arrives below is another object around the same generator.
        self.name, self.seeds = name, {generator.initial_seed() for generator in generators}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            source = kwargs.get("generator")
            if source is None or source.initial_seed() not in self.seeds:
                why = "draws noise of its own, which depends on the batch and which no seed gives again"
                raise _ForeignNoiseError(f"{self.name} {why}; take another, such as EulerAncestralDiscreteScheduler")
        return func(*args, **kwargs)


class _Strided(int):
    """A number of steps S by which T / S is rounded up."""

    def __rtruediv__(self, total: float) -> float:
        return math.nextafter(total / int(self), math.inf)


def set_timesteps(scheduler: Scheduler, num_inference_steps: int, device: torch.device) -> None:
    """Lays the grid of a scheduler, without the timestep −1 that numpy appends to some "trailing" ones.

    diffusers' `np.arange(T, 0, -T / S)` has S + 1 entries where T / S was rounded down; with the next larger stride
    the timesteps are the same and end in time.
    """
    with _failing_as(f"{type(scheduler).__name__} has no grid of {num_inference_steps} steps"):
        scheduler.set_timesteps(num_inference_steps, device)
        if scheduler.timesteps[-1] == -1:
            scheduler.set_timesteps(_Strided(num_inference_steps), device)


def _level(scheduler: Any, index: int, timestep: Any, schedule: NoiseSchedule) -> tuple[float, float]:
    """(α, σ) of x_t at a step, as the scheduler itself has them: it may have rounded the timestep after that.

    `ValueError` where they are not those of the timestep, up to rounding: that is no schedule of DDPM.
    """
    t, last = float(timestep), schedule.num_train_timesteps - 1
    expected = denoiser.alpha_sigma_at(schedule, t)
    # Those that hold x_t/α scale by α.
    alpha = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
    if alpha == 1:
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or len(sigmas) != len(scheduler.timesteps) + 1:
            return expected  # it reads the table at the timestep
        alpha = 1 / math.hypot(1, float(sigmas[index]))
    below, above = max(math.floor(t) - 1, 0), min(math.ceil(t) + 1, last)
    most = 1.0 if t < 1 else schedule.alpha_sigma(below)[0]
    least = 0.0 if t > last - 1 else schedule.alpha_sigma(above)[0]
    if not least - 1e-3 <= alpha <= most + 1e-3:
        name, trained = type(scheduler).__name__, f"where this model was trained with {expected[0]:.3g}"
        asks = f"{name} asks at timestep {t:g} about alpha {alpha:.3g}, {trained}"
        raise ValueError(f"{asks}: it samples another kind of diffusion; choose one of DDPM's")
    return alpha, math.sqrt(1 - alpha**2)
