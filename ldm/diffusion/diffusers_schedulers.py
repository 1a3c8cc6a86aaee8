"""`scheduler_config.json` of diffusers: supported schedulers, their keys, conversion from and to `ScheduleConfig`.

As in diffusers, keys that the constructor of a scheduler lacks are ignored. Of its own keys, some go into
`ScheduleConfig`, some concern its solver only, and the others must be at the value that keeps the training timesteps.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ldm.diffusion.schedule import BetaSchedule, ScheduleConfig, make_betas

COMMON: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
COMMON |= {"beta_schedule": "linear", "trained_betas": None, "prediction_type": "epsilon"}
SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
THRESHOLD: dict[str, Any] = {"thresholding": False}
LEVELS: dict[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
FLOW: dict[str, Any] = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
CLIPPED: dict[str, Any] = {"lambda_min_clipped": -math.inf}
END: dict[str, Any] = {"final_sigmas_type": "zero"}

_DDIM = COMMON | LEADING | ZERO_SNR | THRESHOLD | {"set_alpha_to_one": True}
_DDPM = COMMON | LEADING | ZERO_SNR | THRESHOLD | {"variance_type": "fixed_small"}
_SECOND_ORDER = COMMON | SD_BETAS | LINSPACE | LEVELS
_MULTISTEP = COMMON | LINSPACE | LEVELS | THRESHOLD | FLOW

SCHEDULERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "DDIMScheduler": _DDIM,
        "DDIMParallelScheduler": _DDIM,
        "DDPMScheduler": _DDPM,
        "DDPMParallelScheduler": _DDPM,
        "PNDMScheduler": COMMON | LEADING | {"set_alpha_to_one": False},
        "EulerDiscreteScheduler": COMMON
        | LINSPACE
        | LEVELS
        | ZERO_SNR
        | END
        | {"interpolation_type": "linear", "timestep_type": "discrete"},
        "EulerAncestralDiscreteScheduler": COMMON | LINSPACE | ZERO_SNR,
        "LMSDiscreteScheduler": COMMON | LINSPACE | LEVELS,
        "HeunDiscreteScheduler": _SECOND_ORDER,
        "KDPM2DiscreteScheduler": _SECOND_ORDER,
        "KDPM2AncestralDiscreteScheduler": _SECOND_ORDER,
        "DPMSolverSDEScheduler": _SECOND_ORDER,
        "DPMSolverMultistepScheduler": _MULTISTEP | ZERO_SNR | CLIPPED | END | {"use_lu_lambdas": False},
        "DPMSolverSinglestepScheduler": COMMON | LEVELS | THRESHOLD | FLOW | CLIPPED | END,
        "UniPCMultistepScheduler": _MULTISTEP | ZERO_SNR | END,
        "DEISMultistepScheduler": _MULTISTEP,
        "SASolverScheduler": COMMON | LINSPACE | LEVELS | THRESHOLD | CLIPPED | {"use_flow_sigmas": False},
    }
)
"""The schedulers that walk a DDPM schedule: the keys of each that mean something here, with its defaults."""

ENDS_AT_SIGMA_MIN = ("DEISMultistepScheduler", "SASolverScheduler")  # as set_alpha_to_one false: no key says so

IGNORED_KEYS = frozenset(
    (
        # These steer the steps of one solver; a sampler of our own has its own.
        *("skip_prk_steps", "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
        *("predict_x0", "solver_p", "disable_corrector", "predictor_order", "corrector_order", "tau_func"),
        *("noise_sampler_seed", "variance_type"),
        # Clamps pixels; StableDiffusionPipeline turns it off whatever the file says, and our codecs know their bounds.
        *("clip_sample", "clip_sample_range"),
        # Without thresholding, other noise levels or flow matching, which are refused, these do nothing.
        *("dynamic_thresholding_ratio", "sample_max_value", "sigma_min", "sigma_max"),
        *("flow_shift", "shift_terminal", "time_shift_type"),
        # Of consistency models, whose schedulers are refused; another class ignores them.
        *("original_inference_steps", "timestep_scaling"),
        # In files of 2022; no release of today reads them.
        *("tensor_format", "timestep_values"),
    )
)
"""Keys that change nothing for our samplers."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (*LEVELS, "use_lu_lambdas", "interpolation_type", "lambda_min_clipped"),
            "which samples at other noise levels than our samplers do",
        ),
        **dict.fromkeys(
            (*FLOW, "timestep_type"), "which is not the process of a DDPM schedule, the only one that is supported"
        ),
        "thresholding": "which bounds the predicted x_0 as if it were pixels",
    }
)
"""The keys that have to be at their default, and what they ask for otherwise."""

LEGACY_DEFAULTS = {"predict_epsilon": True}  # the only value of an old key that says nothing new

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


def read_keys(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of `SCHEDULERS[name]` with the values of a file or its defaults; ValueError for unsupported ones."""
    if name not in SCHEDULERS:
        if name.startswith(("LCM", "TCD")):
            raise ValueError(
                f"scheduler {name} is for a network that was distilled for it; our samplers would generate something "
                'else; set "_class_name" in the file, and "scheduler" in model_index.json, to DDIMScheduler, and give '
                f"diffusers.{name}.from_pretrained(FOLDER, subfolder='scheduler') as sampler"
            )
        near = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=0.9)
        mistyped = near and not name.endswith(near[0])  # IPNDMScheduler is another one
        advice = f"did you mean {near[0]}?" if mistyped else f"supported are {', '.join(SCHEDULERS)}"
        raise ValueError(f"scheduler {name} does not sample a DDPM schedule, or is not known here; {advice}")
    known = SCHEDULERS[name]
    for key, value in sorted(config.items()):
        # diffusers leaves keys alone that begin with an underscore; so do we, for our own.
        if key.startswith("_") or key in IGNORED_KEYS or any(key in keys for keys in SCHEDULERS.values()):
            continue
        # A switch of a later release that is off changes nothing.
        if value is not None and value is not LEGACY_DEFAULTS.get(key, False):
            advice = "take it out of the file if the samples are right without it"
            if key == "predict_epsilon":
                advice = 'set "prediction_type" to "sample" in its place'
            raise ValueError(f"scheduler {name} has {key} {value!r}, a key that is not known here; {advice}")
    found = {key: config.get(key, default) for key, default in known.items()}
    for key, value in found.items():
        off = value is None or value is False  # both are off to diffusers
        if key in REFUSED and not (off if known[key] is False else value == known[key]):
            neutral = "-Infinity" if key == "lambda_min_clipped" else repr(known[key]).lower().replace("'", '"')
            way_out = f"set it to {neutral} in the file"
            if key in (*FLOW, "timestep_type"):
                way_out = "take a model that was trained with a DDPM schedule"
            elif key == "thresholding":
                way_out += " (for models of pixels there is dynamic_threshold)"
            else:
                its_own = f"diffusers.{name}.from_pretrained(FOLDER, subfolder='scheduler', {key}=...)"
                way_out += f", and to sample as it says give the scheduler itself as sampler: {its_own}"
            raise ValueError(f"scheduler {name} has {key} {value!r}, {REFUSED[key]}; {way_out}")
        if key not in REFUSED:
            _check_type(name, key, value, known[key])
    if found.get("variance_type", VARIANCES[0]) not in VARIANCES:
        kind = found["variance_type"]
        raise ValueError(f"scheduler {name} has variance_type {kind!r}; supported are {', '.join(VARIANCES)}")
    return found


def _check_type(name: str, key: str, value: Any, default: Any) -> None:
    numbers = isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
    wanted, fits = {
        "trained_betas": ("null or a list of numbers", value is None or numbers),
        bool: ("true or false", value is None or isinstance(value, bool)),  # diffusers takes null for false
        int: ("a whole number", isinstance(value, int) and not isinstance(value, bool)),
        float: ("a number", isinstance(value, int | float) and not isinstance(value, bool)),
        str: ("a text", isinstance(value, str)),
    }["trained_betas" if key == "trained_betas" else type(default)]
    if not fits:
        raise ValueError(f"scheduler {name} has {key} {value!r}; it must be {wanted}")


def config_from_diffusers(config: dict[str, Any], class_name: str | None = None) -> ScheduleConfig:
    """Reads the `scheduler_config.json` of a diffusers scheduler: its schedule, prediction and grid.

    Each of `SCHEDULERS` solves the equation of one DDPM schedule, so that our samplers on the same schedule and spacing
    sample the same model. Absent keys have the default of the class: `class_name`, or the `_class_name` of the file.
    """
    name = class_name or str(config.get("_class_name", "DDIMScheduler"))
    keys = read_keys(config, name)
    written = keys["beta_schedule"]
    if written not in NAMES:
        raise ValueError(f"scheduler beta_schedule is {written!r}; supported are {', '.join(NAMES)}")
    ends = {"zero": True, "sigma_min": False}
    end = keys.get("final_sigmas_type", "sigma_min" if name in ENDS_AT_SIGMA_MIN else "zero")
    if end not in ends:
        raise ValueError(f"scheduler final_sigmas_type is {end!r}; supported are {', '.join(ends)}")
    trained = keys["trained_betas"]
    read = ScheduleConfig(
        beta_schedule=NAMES[written],
        num_train_timesteps=keys["num_train_timesteps"],
        beta_start=keys["beta_start"],
        beta_end=keys["beta_end"],
        trained_betas=None if trained is None else tuple(trained),
        rescale_betas_zero_snr=bool(keys.get("rescale_betas_zero_snr")),
        prediction_type=keys["prediction_type"],
        timestep_spacing=keys.get("timestep_spacing", "linspace"),  # that of DPMSolverSinglestep, which has no key
        steps_offset=keys.get("steps_offset", 0),
        set_alpha_to_one=bool(keys.get("set_alpha_to_one", ends[end])),
    )
    if OUR_KEY not in config:
        return read
    # The table of betas has its name again, unless the two do not agree.
    ours: Any = config[OUR_KEY]
    if trained is None or not isinstance(ours, dict):
        raise ValueError(f"scheduler {OUR_KEY} is {ours!r}, which is no name for a table trained_betas; drop {OUR_KEY}")
    schedule: Any = ours.get("beta_schedule")  # ScheduleConfig checks it
    named = replace(read, beta_schedule=schedule)
    if ours.get("own_betas"):
        return named
    named = replace(named, trained_betas=None)
    # The last digits of a cosine differ between machines.
    if not torch.allclose(make_betas(named), make_betas(read), rtol=1e-9, atol=1e-15):
        raise ValueError(
            f"scheduler trained_betas are not those of {OUR_KEY}.beta_schedule {named.beta_schedule!r}; drop {OUR_KEY}"
        )
    return named


# What diffusers' files call our schedules. Its DDIMScheduler does not know "sigmoid"; its DDPMScheduler does.
NAMES: dict[str, BetaSchedule] = {"linear": "linear", "scaled_linear": "scaled_linear"}
NAMES |= {"squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
OUR_KEY = "_ldm"  # diffusers leaves keys alone that begin with an underscore


def scheduler_class(learned_variance: bool) -> str:
    """The scheduler of diffusers that a folder names: DDIM, or the one that knows of learned variances."""
    return "DDPMScheduler" if learned_variance else "DDIMScheduler"


def config_to_diffusers(config: ScheduleConfig, *, learned_variance: bool = False) -> dict[str, Any]:
    """The `scheduler_config.json` that diffusers' DDIMScheduler reads as the same schedule and grid.

    Learned variances need a DDPMScheduler with `variance_type` "learned_range" (Improved DDPM, Eq. 15). A schedule that
    diffusers has no name for is the table of its betas, with its name in `_ldm`.
    """
    names: dict[str, str] = {ours: theirs for theirs, ours in NAMES.items() if ours != "sigmoid"}
    named = config.beta_schedule in names
    table = make_betas(config).tolist() if not named else config.trained_betas
    ours = {"beta_schedule": config.beta_schedule, "own_betas": config.trained_betas is not None}
    return {
        "_class_name": scheduler_class(learned_variance),
        "beta_schedule": names.get(config.beta_schedule, "linear"),
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "trained_betas": None if table is None else list(table),
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": False,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "thresholding": False,
        **({"variance_type": "learned_range"} if learned_variance else {}),
        **({} if named else {OUR_KEY: ours}),
    }
