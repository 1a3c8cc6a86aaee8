"""How a picture is drawn: the settings of a run, checked in one place, and one closed table of samplers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.codecs import Codec
from ldm.diffusion import (
    Denoise,
    Denoiser,
    LogLikelihood,
    NoiseSchedule,
    PredictionType,
    State,
    Step,
    annealed_langevin,
    as_noise,
    classifier_free_guidance,
    classifier_guidance,
    conditioned,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    dynamic_threshold,
    euler_maruyama,
    guide_within,
    langevin_corrector,
    rescale_guidance,
)
from ldm.diffusion.guidance import check_interval, check_rescale
from ldm.diffusion.sampling import Noise, Project, check_sampler
from ldm.diffusion.thresholding import check_percentile
from ldm.pipelines.arguments import number, whole
from ldm.pipelines.schedulers import Scheduler, check_scheduler, is_scheduler, run_scheduler


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a sampler may ask for."""

    denoise: Denoise
    latents: Tensor
    schedule: NoiseSchedule
    grid: Sequence[Step]
    prediction_type: PredictionType
    project: Project
    noise: Noise
    eta: float
    learned_variance: bool
    options: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A row of the table.

    Attributes:
        start: begins the run.
        takes_eta: whether η means something to it.
        draws: whether it draws noise at every step (where it takes η: whether it does so at η = 0).
        options: what else may be set of it, by `sampler_options`.
    """

    start: Callable[[Run], Iterator[State]]
    takes_eta: bool = False
    draws: bool = False
    options: frozenset[str] = frozenset()


def _common(run: Run) -> dict[str, Any]:
    return {
        "denoise": run.denoise,
        "latents": run.latents,
        "schedule": run.schedule,
        "grid": run.grid,
        "project": run.project,
        "prediction_type": run.prediction_type,
        **run.options,
    }


def _ddpm(run: Run, *, variance: Literal["small", "large"]) -> Iterator[State]:
    learned = run.learned_variance and variance == "small"
    return ddpm(**_common(run), noise=run.noise, variance="learned" if learned else variance)


def _langevin(run: Run) -> Iterator[State]:
    """Annealed Langevin dynamics leaves the noise of its last level in the picture; it ends in x̂_0 instead.

    A grid that is a part of one ends in x_t, which the rest goes on from.
    """
    for state in annealed_langevin(**_common(run), noise=run.noise):
        ended = run.grid[state.index].t_prev == -1
        yield dataclasses.replace(state, latents=state.pred_original_sample) if ended else state


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(start=lambda run: ddim(**_common(run), eta=run.eta, noise=run.noise), takes_eta=True),
        "ddim-sigma-hat": Sampler(
            start=lambda run: ddim(**_common(run), eta=1.0, variance="sigma_hat", noise=run.noise), draws=True
        ),
        "ddpm": Sampler(start=partial(_ddpm, variance="small"), draws=True),
        "ddpm-large": Sampler(start=partial(_ddpm, variance="large"), draws=True),
        "dpm++2m": Sampler(start=lambda run: dpm_solver_pp_2m(**_common(run))),
        "euler-maruyama": Sampler(start=lambda run: euler_maruyama(**_common(run), noise=run.noise), draws=True),
        "langevin": Sampler(start=_langevin, draws=True, options=frozenset({"step_size", "num_langevin_steps"})),
        "predictor-corrector": Sampler(
            start=lambda run: langevin_corrector(**_common(run), noise=run.noise),
            draws=True,
            options=frozenset({"snr", "num_corrector_steps"}),
        ),
    }
)
"""Every sampler of our own, by the name that a user gives: those of `SAMPLER_NAMES`, which configs check as well. Any
other is a scheduler object of diffusers."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is drawn, apart from its text, size and noise. `Pipeline.__call__` explains each.

    Raises:
        ValueError: naming the setting, its value and the range.
    """

    num_inference_steps: int
    guidance_scale: float
    sampler: str | Scheduler = "ddim"
    sampler_options: Mapping[str, float] | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    dynamic_threshold: float | None = None
    classifier: LogLikelihood | None = None
    classifier_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("eta", "guidance_rescale", "dynamic_threshold", "classifier_scale"):
            if name != "dynamic_threshold" or self.dynamic_threshold is not None:
                number(name, getattr(self, name))
        if not math.isfinite(self.guidance_scale):
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; it must be a finite number (1 is no guidance, 7.5 usual)"
            )
        check_rescale(self.guidance_rescale)
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval)
        if self.dynamic_threshold is not None:
            check_percentile(self.dynamic_threshold)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must be 0 (deterministic DDIM) to 1 (the variance of DDPM)")
        if self.classifier is not None and not callable(self.classifier):
            raise ValueError(f"classifier is {self.classifier!r}; it must be a function (x_t, t) -> log p(y | x_t)")
        if isinstance(self.sampler, str):
            if not find_sampler(self.sampler).takes_eta and self.eta:
                raise ValueError(f"eta is {self.eta}, which sampler {self.sampler!r} does not have; use sampler 'ddim'")
            self._check_options(SAMPLERS[self.sampler].options)
        elif is_scheduler(self.sampler):
            if self.sampler_options:
                raise ValueError(f"sampler_options is {self.sampler_options}; a scheduler object has its own settings")
        else:
            raise ValueError(
                f"sampler is {shown(self.sampler)}; give a scheduler object of diffusers, or one of "
                f"{', '.join(SAMPLERS)}"
            )

    def _check_options(self, known: frozenset[str]) -> None:
        given = {} if self.sampler_options is None else self.sampler_options
        if not isinstance(given, Mapping):
            raise ValueError(f"sampler_options is {given!r}; give names with their numbers: {{'snr': 0.1}}")
        for name, value in given.items():
            if name not in known:
                has = f"has {' and '.join(sorted(known))}" if known else "has none"
                raise ValueError(f"sampler_options has {name!r}; sampler {self.sampler!r} {has}")
            (whole if name.startswith("num_") else number)(name, value)

    @property
    def draws(self) -> bool:
        """Whether one of our own samplers draws noise after x_T."""
        return isinstance(self.sampler, str) and (SAMPLERS[self.sampler].draws or self.eta > 0)


def find_sampler(name: str) -> Sampler:
    """The row of that name; ValueError with the nearest name where there is none."""
    check_sampler(name, others=", and diffusers' schedulers")
    return SAMPLERS[name]


def shown(sampler: object) -> str:
    """A sampler in an error: its name, or its class, for schedulers print all that they hold."""
    return repr(sampler) if isinstance(sampler, str | int | float | type | None) else type(sampler).__name__


def bounds(codec: Codec, percentile: float | None) -> Project:
    """What bounds x̂_0: the codec, or Imagen's dynamic threshold on the scale of images.

    Raises:
        ValueError: if a threshold is asked for latents.
    """
    if percentile is None:
        return codec.project
    if not codec.bounded:
        raise ValueError(
            f"dynamic_threshold is {percentile}, but this model diffuses latents, and no range bounds those: "
            "thresholding is for pixels in [-1, 1]; use guidance_rescale"
        )
    threshold = dynamic_threshold(percentile)
    return lambda original: codec.draw(threshold(codec.decode(original)))


def direct(
    network: Denoiser, schedule: NoiseSchedule, prediction_type: PredictionType
) -> tuple[Denoiser, PredictionType]:
    """The network and what it predicts, where that gives x_0 and ε directly; a network of μ̃ becomes one of ε."""
    if prediction_type != "posterior_mean":
        return network, prediction_type

    def predicts_noise(x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        t = int(timesteps[0])  # samplers ask about one timestep at a time
        if t != float(timesteps[0]):
            raise ValueError(
                f"the sampler asks at timestep {float(timesteps[0])}, but a posterior mean is known at whole ones; "
                "take another spacing, or one of our own samplers"
            )
        if schedule.alphas_cumprod[t] == 0:
            raise ValueError(
                f"this model predicts posterior_mean, which samplers read as noise, and at timestep {t}, where alpha "
                "is 0, noise says nothing about x_0; set timestep_spacing to leading, or train with v_prediction"
            )
        return as_noise(lambda x, _: network(x, timesteps, condition), schedule, prediction_type)(x_t, t)

    return predicts_noise, "epsilon"


def guided(
    network: Denoiser,
    condition: Tensor,
    null: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    settings: Settings,
) -> Denoise:
    """The network with all guidance of the settings around it. `condition` and `null` are [B, L, D]."""
    rescale = None
    if settings.guidance_rescale > 0:
        rescale = rescale_guidance(settings.guidance_rescale)
    unguided = conditioned(network, condition)
    denoise = classifier_free_guidance(network, condition, null, settings.guidance_scale, rescale=rescale)
    if settings.classifier is not None:
        denoise = classifier_guidance(
            denoise, settings.classifier, settings.classifier_scale, schedule, prediction_type=prediction_type
        )
    if settings.guidance_interval is not None:
        denoise = guide_within(schedule, settings.guidance_interval, denoise, unguided)
    return denoise


def walk(
    settings: Settings,
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    generators: Sequence[torch.Generator],
    project: Project,
    prediction_type: PredictionType,
    learned_variance: bool,
) -> Iterator[State]:
    """From `latents` [B, C, H, W] at the first step of `grid` to its end, with the sampler of the settings.

    Args:
        generators: one an image, on the CPU, so that an image does not depend on its batch.
        learned_variance: whether the network gives 2C channels; then "ddpm" takes its variance from them
            ("ddpm-large" is β all the same).
    """
    if not isinstance(settings.sampler, str):
        check_scheduler(settings.sampler, schedule, prediction_type, eta=settings.eta)
        return run_scheduler(
            settings.sampler,
            denoise,
            latents,
            schedule,
            settings.num_inference_steps,
            eta=settings.eta,
            generators=generators,
            project=project,
            prediction_type=prediction_type,
            learned_variance=learned_variance,
        )
    run = Run(
        denoise=denoise,
        latents=latents,
        schedule=schedule,
        grid=grid,
        prediction_type=prediction_type,
        project=project,
        noise=lambda: draw_noise(generators, latents),
        eta=settings.eta,
        learned_variance=learned_variance,
        options=settings.sampler_options or {},
    )
    return SAMPLERS[settings.sampler].start(run)


def draw_noise(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise, [B, C, H, W]: each image from its own generator, drawn in float32 on the CPU."""
    drawn = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])
    return drawn.to(like.device, like.dtype)
