"""Sampling: parameters and arguments, checked in one place, the table of samplers, and the check of their samples."""

from __future__ import annotations

import dataclasses
import math
import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import Tensor

from ldm.codecs import Codec
from ldm.diffusion import Denoise, Denoiser, NoiseSchedule, PredictionType, State, Step, denoiser, samplers
from ldm.pipelines.schedulers import Scheduler, check_scheduler, is_scheduler, run_scheduler
from ldm.text import check_text

USUAL_SCALE = 30  # of guidance; what is above is the likely cause of numbers that are not finite
MAX_NAMED = 5  # images in an error
# Where states are checked at every step: elsewhere the CPU would wait for the device.
CHECKED_AT_ONCE = ("cpu",)


@dataclass(frozen=True)
class Sampler:
    """A row of the table; `stochastic`: adds noise at every step, at η = 0 too; `options`: of `sampler_options`."""

    run: Callable[..., Iterator[State]]
    takes_eta: bool = False
    stochastic: bool = False
    options: frozenset[str] = frozenset()


def _langevin(grid: Sequence[Step], **inputs: Any) -> Iterator[State]:
    """Annealed Langevin dynamics; at the end of sampling x̂_0, for the sample has the noise of the last level."""
    for state in samplers.annealed_langevin(grid=grid, **inputs):
        ended = grid[state.index].t_prev == -1
        yield dataclasses.replace(state, latents=state.pred_original_sample) if ended else state


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(samplers.ddim, takes_eta=True),
        "ddim-sigma-hat": Sampler(partial(samplers.ddim, eta=1.0, variance="sigma_hat"), stochastic=True),
        "ddpm": Sampler(partial(samplers.ddpm, variance="small"), stochastic=True),
        "ddpm-large": Sampler(partial(samplers.ddpm, variance="large"), stochastic=True),
        "dpm++2m": Sampler(samplers.dpm_solver_pp_2m),
        "euler-maruyama": Sampler(samplers.euler_maruyama, stochastic=True),
        "langevin": Sampler(_langevin, stochastic=True, options=frozenset({"step_size", "num_langevin_steps"})),
        "predictor-corrector": Sampler(
            samplers.langevin_corrector, stochastic=True, options=frozenset({"snr", "num_corrector_steps"})
        ),
    }
)
"""Our samplers by name, those of `SAMPLER_NAMES`; any other sampler is a scheduler object of diffusers."""


class SamplingKwargs(TypedDict, total=False):
    """The sampling arguments of `Pipeline.__call__`, `interpolate` and `variations`; None is the default."""

    num_inference_steps: int | None
    """S, 1 to the number of training timesteps; the model's default."""
    guidance_scale: float | None
    """w of ε_∅ + w (ε_c − ε_∅), finite; 1 is no guidance; the model's default."""
    guidance_rescale: float
    """φ, 0 to 1, against the over-exposure of large scales (arXiv:2305.08891, Eq. 16); 0.7 is usual for v."""
    guidance_interval: tuple[float, float] | None
    """(low, high), noise levels σ/α with 0 <= low < high; outside them the scale is 1 (arXiv:2404.07724)."""
    dynamic_threshold: float | None
    """p in (0, 1] of Imagen's dynamic thresholding of x̂_0, for pixel models; 0.995 is usual."""
    classifier: denoiser.LogLikelihood | None
    """(x_t [B, C, h, w], t) → log p(y | x_t), [B], whose gradient guides (arXiv:2105.05233); x_t is what is diffused.
    Such a call is not cut into chunks, as y may differ between images."""
    classifier_scale: float
    """1 samples p(x | prompt, y)."""
    sampler: str | Scheduler | None
    """A name of `SAMPLERS`, or a scheduler object of diffusers; the model's default."""
    sampler_options: Mapping[str, float] | None
    """`step_size` and `num_langevin_steps` of "langevin" (0.2, 100), `snr` and `num_corrector_steps` of
    "predictor-corrector" (0.01, 1)."""
    eta: float
    """η of DDIM: 0 (deterministic) to 1 (the variance of DDPM)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, apart from prompt, size and noise; `SamplingKwargs` explains each, ValueError its range."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str | Scheduler = "ddim"
    sampler_options: Mapping[str, float] | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    dynamic_threshold: float | None = None
    classifier: denoiser.LogLikelihood | None = None
    classifier_scale: float = 1.0

    @classmethod
    def resolve(cls, given: SamplingKwargs, **defaults: Any) -> SamplingParams:
        """The given parameters; `defaults` (those of a model) stand for steps, scale and sampler that are None."""
        always = ("num_inference_steps", "guidance_scale", "sampler")
        return cls(**defaults | {key: value for key, value in given.items() if value is not None or key not in always})

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_inference_steps", as_int("num_inference_steps", self.num_inference_steps))
        object.__setattr__(self, "guidance_scale", as_float("guidance_scale", self.guidance_scale))
        for name in ("eta", "guidance_rescale", "classifier_scale"):
            as_float(name, getattr(self, name))
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be finite (1 is no guidance)")
        denoiser.check_rescale(self.guidance_rescale)
        if self.guidance_interval is not None:
            denoiser.check_interval(self.guidance_interval)
        if self.dynamic_threshold is not None:
            denoiser.check_percentile(as_float("dynamic_threshold", self.dynamic_threshold))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must be 0 (deterministic DDIM) to 1 (the variance of DDPM)")
        if self.classifier is not None and not callable(self.classifier):
            raise ValueError(f"classifier is {self.classifier!r}; it must be a function (x_t, t) -> log p(y | x_t)")
        if isinstance(self.sampler, str):
            if not find_sampler(self.sampler).takes_eta and self.eta:
                raise ValueError(f"eta is {self.eta}, which sampler {self.sampler!r} does not have; use sampler 'ddim'")
            given: Any = {} if self.sampler_options is None else self.sampler_options
            known = SAMPLERS[self.sampler].options
            if not isinstance(given, Mapping):
                raise ValueError(f"sampler_options is {given!r}; give names with their numbers: {{'snr': 0.1}}")
            for name, value in given.items():
                if name not in known:
                    has = f"has {' and '.join(sorted(known))}" if known else "has none"
                    raise ValueError(f"sampler_options has {name!r}; sampler {self.sampler!r} {has}")
                (as_int if name.startswith("num_") else as_float)(name, value)
        elif is_scheduler(self.sampler):
            if self.sampler_options:
                raise ValueError(f"sampler_options is {self.sampler_options}; a scheduler object has its own settings")
        else:
            described, ours = describe_sampler(self.sampler), ", ".join(SAMPLERS)
            raise ValueError(f"sampler is {described}; give a scheduler object of diffusers, or one of {ours}")

    @property
    def stochastic(self) -> bool:
        """Whether one of our own samplers adds noise after x_T."""
        return isinstance(self.sampler, str) and (SAMPLERS[self.sampler].stochastic or self.eta > 0)


def find_sampler(name: str) -> Sampler:
    """The row of that name; ValueError with the nearest name where there is none."""
    samplers.check_sampler(name, others=", and diffusers' schedulers")
    return SAMPLERS[name]


def describe_sampler(sampler: object) -> str:
    """A sampler in an error: its name, or its class, for schedulers print all that they hold."""
    return repr(sampler) if isinstance(sampler, str | int | float | type | None) else type(sampler).__name__


def x0_bounds(codec: Codec, percentile: float | None) -> samplers.ClipX0:
    """What bounds x̂_0: the codec, or Imagen's dynamic threshold on the scale of images; ValueError for latents."""
    if percentile is None:
        return codec.clip_x0
    if not codec.bounded:
        why = "this model diffuses latents, and thresholding is for pixels in [-1, 1]"
        raise ValueError(f"dynamic_threshold is {percentile}, but {why}; use guidance_rescale")
    threshold = denoiser.dynamic_threshold(percentile)
    return lambda x_0: codec.sample_latents(threshold(codec.decode(x_0)))


def as_epsilon_model(
    network: Denoiser, schedule: NoiseSchedule, prediction_type: PredictionType
) -> tuple[Denoiser, PredictionType]:
    """The network and what it predicts, where that gives x_0 and ε directly; a network of μ̃ becomes one of ε."""
    if prediction_type != "posterior_mean":
        return network, prediction_type

    def predicts_noise(x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        t = int(timesteps[0])  # samplers ask about one timestep at a time
        if t != float(timesteps[0]):
            where = f"timestep {float(timesteps[0])}, but a posterior mean is known at whole ones"
            raise ValueError(f"the sampler asks at {where}; take another spacing, or one of our own samplers")
        if schedule.alphas_cumprod[t] == 0:
            why = f"this model predicts posterior_mean, which samplers read as noise, and at timestep {t} alpha is 0"
            raise ValueError(f"{why}; set timestep_spacing to leading, or train with v_prediction")
        model = denoiser.to_epsilon_model(lambda x, _: network(x, timesteps, condition), schedule, prediction_type)
        return model(x_t, t)

    return predicts_noise, "epsilon"


def with_guidance(
    network: Denoiser,
    condition: Tensor,
    null: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    params: SamplingParams,
) -> Denoise:
    """The network with all guidance of the params around it. `condition` and `null` are [B, L, D]."""
    rescale = denoiser.rescale_guidance(params.guidance_rescale) if params.guidance_rescale > 0 else None
    denoise = denoiser.classifier_free_guidance(network, condition, null, params.guidance_scale, rescale=rescale)
    if params.classifier is not None:
        denoise = denoiser.classifier_guidance(
            denoise, params.classifier, params.classifier_scale, schedule, prediction_type=prediction_type
        )
    if params.guidance_interval is not None:
        unguided = denoiser.with_condition(network, condition)
        denoise = denoiser.guide_within(schedule, params.guidance_interval, denoise, unguided)
    return denoise


def sample(
    params: SamplingParams,
    denoise: Denoise,
    latents: Tensor,
    schedule: NoiseSchedule,
    grid: Sequence[Step],
    *,
    generators: Sequence[torch.Generator],
    clip_x0: samplers.ClipX0,
    prediction_type: PredictionType,
    learned_variance: bool,
) -> Iterator[State]:
    """From `latents` [B, C, H, W] at the first step of `grid` to its end, with the sampler of the params.

    There is one generator per image, on the CPU, so that an image does not depend on its batch. With `learned_variance`
    the network gives 2C channels, from which "ddpm" takes its variance ("ddpm-large" is β all the same).
    """
    shared: dict[str, Any] = {"clip_x0": clip_x0, "prediction_type": prediction_type}
    if not isinstance(params.sampler, str):
        check_scheduler(params.sampler, schedule, prediction_type, eta=params.eta)
        shared |= {"eta": params.eta, "generators": generators, "learned_variance": learned_variance}
        return run_scheduler(params.sampler, denoise, latents, schedule, params.num_inference_steps, **shared)
    row = SAMPLERS[params.sampler]
    inputs: dict[str, Any] = {**(params.sampler_options or {})}
    if row.stochastic or row.takes_eta:
        inputs["noise"] = lambda: sample_noise(generators, latents)
    if row.takes_eta:
        inputs["eta"] = params.eta
    if params.sampler == "ddpm" and learned_variance:
        inputs["variance"] = "learned"
    return row.run(denoise=denoise, latents=latents, schedule=schedule, grid=grid, **shared, **inputs)


# ---- samples that are not finite end in an error that names the step, not in a black image


class NotFinite(ValueError):
    """A sample, its text states or its image hold nan or inf."""


class FiniteCheck:
    """Checks what a sampler computes for a batch of images, at every step; on an accelerator at the end.

    An `on_step` sees finite states alone. The guidance scale and the number of the first image are for the error.
    """

    def __init__(self, guidance_scale: float = 1.0, first: int = 0) -> None:
        self._scale, self._first = guidance_scale, first
        self._predictions: list[Tensor] = []  # [B] bool each, since the last step
        self._seen: list[tuple[int, int, Tensor]] = []  # number and timestep of a step, and what was finite: [B] bool

    def wrap(self, denoise: Denoise) -> Denoise:
        """The same function, its predictions checked: where pixels bound x̂_0, states do not show an infinite one."""

        def watched(x_t: Tensor, t: int) -> Tensor:
            prediction = denoise(x_t, t)
            self._predictions = [torch.stack([*self._predictions, is_finite(prediction)]).all(dim=0)]
            return prediction

        return watched

    def final_latents(self, states: Iterable[State], on_step: Callable[[State], None] | None = None) -> Tensor:
        """The latents [B, C, h, w] of the last state; `NotFinite` names images and the first step."""
        latents = None
        for state in states:
            latents = state.latents
            sound = [is_finite(latents), is_finite(state.pred_original_sample), *self._predictions]
            self._predictions = []
            self._seen.append((state.index + 1, state.timestep, torch.stack(sound).all(dim=0)))
            if on_step is not None or latents.device.type in CHECKED_AT_ONCE:
                self._check(latents.dtype)
            if on_step is not None:
                on_step(state)
        assert latents is not None
        self._check(latents.dtype)
        return latents

    def _check(self, dtype: torch.dtype) -> None:
        if not self._seen:
            return
        sound = torch.stack([is_finite for *_, is_finite in self._seen]).tolist()
        for (number, timestep, _), finite in zip(self._seen, sound, strict=True):
            if not all(finite):
                where = f"left the finite numbers (nan or inf) at step {number}, timestep {timestep}"
                raise NotFinite(f"{image_names(finite, self._first)} {where}; {remedy(dtype, self._scale)}")
        self._seen = []


def is_finite(values: Tensor) -> Tensor:
    """Which of the entries of [B, ...] are finite in all of their numbers: [B] bool."""
    return values.isfinite().flatten(1).all(dim=1)


def image_names(sound: Sequence[bool], first: int) -> str:
    """ "image 3", "images 0, 1, …": those that are not finite, counted from `first`."""
    wrong = [str(first + place) for place, good in enumerate(sound) if not good]
    more = ", …" if len(wrong) > MAX_NAMED else ""
    return f"image{'s' if len(wrong) > 1 else ''} {', '.join(wrong[:MAX_NAMED])}{more}"


def remedy(dtype: torch.dtype, guidance_scale: float = 1.0) -> str:
    """What the likely cause is, and what to do."""
    likely = []
    if dtype == torch.float16:
        likely.append("float16 ends at 65504: open the model in bfloat16 or float32")
    if abs(guidance_scale) > USUAL_SCALE:
        likely.append(f"guidance_scale is {guidance_scale:g}: lower it")
    usual = "lower guidance_scale and the weights of LoRAs, or train or download the model again"
    return ", or ".join(likely) or f"its numbers are too large for this model: {usual}"


# ---- the arguments of a call


def cpu_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One per image, on the CPU: the same noise on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def sample_noise(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise, [B, C, H, W]: each image from its own generator, in float32 on the CPU."""
    noise = torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])
    return noise.to(like.device, like.dtype)


def image_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, num_images_per_prompt: int
) -> tuple[list[str], list[str]]:
    """The prompts and one negative prompt for each; image i is of prompt i // num_images_per_prompt."""
    prompts = [prompt] if isinstance(prompt, str) else as_list("prompt", prompt, "a text, or a list of texts")
    if not prompts:
        raise ValueError("the prompt list is empty; give at least one text")
    if as_int("num_images_per_prompt", num_images_per_prompt) < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
    if negative is None or isinstance(negative, str):
        negatives = [negative or ""] * len(prompts)
    else:
        negatives = as_list("negative_prompt", negative, "a text, or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(f"there are {len(negatives)} negative prompts for {len(prompts)} prompts; give one or as many")
    for what, texts in (("a prompt", prompts), ("a negative prompt", negatives)):
        for text in texts:
            check_text(what, text)
    return prompts, negatives


def image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """One seed an image: seed + i from one number, fresh ones from None."""
    if seed is None:
        seed = secrets.randbelow(2**31 - images)
    # A list, or an array of numpy or torch.
    several: Any = seed if isinstance(seed, Sequence) or getattr(seed, "ndim", None) else None
    seeds = [as_int("seed", s) for s in several] if several is not None else []
    if several is None:
        first = as_int("seed", seed)
        seeds = list(range(first, first + images))
    if len(seeds) != images:
        raise ValueError(f"there are {len(seeds)} seeds for {images} images; give one int, or one an image")
    for s in seeds:
        if not 0 <= s < 2**63:
            raise ValueError(f"seed is {s}; it must be a whole number from 0 to 2**63 - 1")
    return seeds


def check_size(height: int | None, width: int | None) -> None:
    """Raises ValueError for a side below 1 pixel."""
    for name, side in (("height", height), ("width", width)):
        if side is not None and side < 1:
            raise ValueError(f"{name} is {side}; it is a number of pixels, at least 1")


def as_list(name: str, values: Iterable[Any], wanted: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}; give {wanted}") from None


def as_int(name: str, value: Any) -> int:
    """The value as an int, of whatever package; no float, and no truth value."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}; it must be a whole number")


def as_float(name: str, value: Any) -> float:
    """The value as a float, of whatever package; no text, and no truth value."""
    try:
        if not isinstance(value, bool | str):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}; it must be a number")
