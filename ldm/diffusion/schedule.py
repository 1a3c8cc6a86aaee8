"""The noise schedule: one value, ᾱ_t in float64 on the CPU, and everything that follows from it.

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I)      DDPM (arXiv:2006.11239), Eq. 4

`alpha` and `sigma` always mean √ᾱ and √(1 − ᾱ). Timesteps count from 0 to T − 1; −1 stands for the end
of sampling, where ᾱ is `final_alpha_cumprod`. Samplers walk over explicit `Step(t, t_prev)` pairs made by
`NoiseSchedule.grid`, so that no sampler knows a stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
PredictionType = Literal["epsilon", "v_prediction"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]

# ε-prediction multiplies its error by σ/α in x̂_0. Past this gain the first step of a sampler is noise unless
# x̂_0 is bounded (measured on digits in latents: a cosine schedule, gain 2e4, ruins the picture; the linear
# schedule of DDPM, gain 157, does not).
MAX_ERROR_GAIN = 200.0


class Step(NamedTuple):
    """One step of a sampler: from the state at timestep `t` to the state at `t_prev` (−1: the end)."""

    t: int
    t_prev: int


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What `scheduler/scheduler_config.json` says: the schedule, what is predicted, and the grid of inference.

    Args:
        beta_schedule: "linear" (DDPM, section 4), "scaled_linear" (linear in √β: LDM, Stable Diffusion) or
            "cosine" (Improved DDPM, Eq. 17; `beta_start` and `beta_end` have no meaning there).
        num_train_timesteps: T, at least 1.
        beta_start, beta_end: β_1 and β_T, 0 < beta_start <= beta_end < 1.
        trained_betas: a table of T betas in (0, 1) that replaces `beta_schedule`.
        prediction_type: what the network predicts: ε, or v = α ε − σ x_0 (arXiv:2202.00512).
        timestep_spacing: how S inference steps are laid over T (arXiv:2305.08891, Table 2).
        steps_offset: added to the timesteps of "leading"; 1 is what diffusers makes of every Stable Diffusion.
        set_alpha_to_one: whether sampling ends at ᾱ = 1 or, as Stable Diffusion 1.x does, at ᾱ_0.

    Raises:
        ValueError: names the key, its value, and the range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    beta_schedule: BetaSchedule = "scaled_linear"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        for key, choices in (
            ("beta_schedule", get_args(BetaSchedule)),
            ("prediction_type", get_args(PredictionType)),
            ("timestep_spacing", get_args(TimestepSpacing)),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end is {self.beta_end}; "
                "they must satisfy 0 < beta_start <= beta_end < 1"
            )
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset is {self.steps_offset}; it must not be negative")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(self.trained_betas)} entries but num_train_timesteps is "
                f"{self.num_train_timesteps}; give one beta a timestep"
            )


class NoiseSchedule:
    """ᾱ_t for t = 0 … T − 1, and what is derived from it. A value: nothing in it ever changes.

    Args:
        alphas_cumprod: [T], strictly falling inside (0, 1]; kept as float64 on the CPU.
        final_alpha_cumprod: ᾱ at t_prev = −1, the end of sampling.

    Raises:
        ValueError: if ᾱ is not one falling row of numbers in (0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor, *, final_alpha_cumprod: float = 1.0) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod has shape {list(table.shape)}; it must be one row of T numbers")
        if not bool(((table > 0) & (table <= 1)).all()) or not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly from step to step inside (0, 1]")
        self.alphas_cumprod = table  # [T]
        self.alpha = table.sqrt()  # [T]
        self.sigma = (1 - table).sqrt()  # [T]
        self.final_alpha_cumprod = float(final_alpha_cumprod)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], *, set_alpha_to_one: bool = True) -> NoiseSchedule:
        """The schedule of a table of betas [T], each in (0, 1): ᾱ_t = ∏ (1 − β_s), DDPM Eq. 4."""
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be one row of numbers strictly between 0 and 1")
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        return cls(alphas_cumprod, final_alpha_cumprod=1.0 if set_alpha_to_one else float(alphas_cumprod[0]))

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        return cls.from_betas(make_betas(config), set_alpha_to_one=config.set_alpha_to_one)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """β_t = 1 − ᾱ_t / ᾱ_{t−1}, [T] float64."""
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / previous

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ), [T] float64 (VDM, arXiv:2107.00630, Eq. 2)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def alpha_cumprod_at(self, t: int) -> float:
        """ᾱ at timestep `t`; at −1, the end of sampling, `final_alpha_cumprod`."""
        if not -1 <= t < self.num_train_timesteps:
            raise ValueError(f"timestep {t} is outside the schedule; it must be -1 to {self.num_train_timesteps - 1}")
        return self.final_alpha_cumprod if t == -1 else float(self.alphas_cumprod[t])

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """(√ᾱ_t, √(1 − ᾱ_t)) as Python floats, for samplers."""
        alpha_cumprod = self.alpha_cumprod_at(t)
        return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ for a batch, each [B, 1, …] in float32 on the device of `like` [B, …].

        Args:
            timesteps: [B] int64, 0 to T − 1, best on the CPU where the table is.
        """
        index = timesteps.to("cpu")
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (
            table[index].to(torch.float32).to(like.device).view(shape) for table in (self.alpha, self.sigma)
        )
        return alpha, sigma

    def error_gain(self, t: int) -> float:
        """By how much an error of a predicted ε grows in x̂_0 at timestep `t`: σ/α."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def grid(
        self, num_inference_steps: int, spacing: TimestepSpacing = "trailing", *, steps_offset: int = 0
    ) -> tuple[Step, ...]:
        """The steps of sampling: S pairs (t, t_prev), each t_prev the next t, the last one −1.

        "leading" takes every ⌊T/S⌋-th timestep from `steps_offset` on, "linspace" S evenly spaced ones from
        0 to T − 1, "trailing" goes back from T − 1 in strides of T/S (arXiv:2305.08891, Table 2). Each is
        the grid that diffusers prints, down to how its floating point falls at a half.

        Raises:
            ValueError: if S is not 1 to T, or the grid leaves the table.
        """
        total, steps = self.num_train_timesteps, num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(
                f"num_inference_steps is {steps}; it must be 1 to {total}, the number of training timesteps"
            )
        if spacing == "leading":
            timesteps = [i * (total // steps) + steps_offset for i in reversed(range(steps))]
        elif spacing == "linspace":
            stride = (total - 1) / max(steps - 1, 1)
            timesteps = [round(i * stride) for i in reversed(range(steps))]
        elif spacing == "trailing":
            stride = total - (total - total / steps)  # as numpy's arange steps: from the first difference
            timesteps = [round(total - i * stride) - 1 for i in range(steps)]
        else:
            raise ValueError(f"timestep_spacing is {spacing!r}; choose leading, linspace or trailing")
        if timesteps[0] >= total:
            raise ValueError(
                f"num_inference_steps {steps} with steps_offset {steps_offset} starts at timestep {timesteps[0]}, "
                f"outside the {total} of training; take fewer steps"
            )
        return tuple(Step(t, t_prev) for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True))


def make_betas(config: ScheduleConfig) -> Tensor:
    """β_t for t = 0 … T − 1, [T] float64."""
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64)
    if config.beta_schedule == "linear":
        # DDPM, section 4: β from 1e-4 to 0.02 in equal steps.
        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        # LDM (arXiv:2112.10752), its published code and Stable Diffusion: equal steps in √β.
        ends = (math.sqrt(config.beta_start), math.sqrt(config.beta_end))
        return torch.linspace(*ends, steps, dtype=torch.float64).square()
    # Improved DDPM (arXiv:2102.09672), Eq. 17, s = 0.008, β clipped to 0.999.
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def check_start(
    schedule: NoiseSchedule, grid: Sequence[Step], prediction_type: PredictionType, *, bounded: bool
) -> None:
    """Refuses a start of sampling at which an ε-prediction says nothing about x_0.

    Args:
        bounded: whether the codec bounds x̂_0 (pixels do, latents do not).

    Raises:
        ValueError: with the reason and what to choose.
    """
    first = grid[0].t
    gain = schedule.error_gain(first)
    if prediction_type == "epsilon" and not bounded and gain > MAX_ERROR_GAIN:
        raise ValueError(
            f"sampling starts at timestep {first}, where alpha is {schedule.alpha_sigma(first)[0]:.1e}: an error of "
            f"the predicted noise grows {gain:.0f}-fold in the predicted latents, and nothing bounds those; "
            "choose schedule.beta_schedule: scaled_linear, or schedule.prediction_type: v_prediction"
        )


def config_from_diffusers(config: dict[str, Any]) -> ScheduleConfig:
    """Reads the `scheduler_config.json` of any diffusers scheduler: its schedule and prediction; DDIM runs.

    Keys that steer another sampler (`skip_prk_steps`, `use_karras_sigmas`, …) mean nothing to DDIM and are
    ignored. A key that is absent has the default of DDIM, DDPM or PNDM where one of these wrote the file, else of
    Euler and DPM-Solver. `clip_sample` is ignored too: it clamps pixels, the StableDiffusionPipeline of diffusers
    turns it off, and our codecs know their bounds.

    Raises:
        ValueError: if the file asks for a schedule or prediction that is not supported, naming key and value.
    """
    name = str(config.get("_class_name", "DDIMScheduler"))
    betas = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    written = config.get("beta_schedule", "linear")
    if written not in betas:
        raise ValueError(f"scheduler beta_schedule is {written!r}; supported are {', '.join(betas)}")
    for key in ("rescale_betas_zero_snr", "thresholding"):
        if config.get(key):
            raise ValueError(f"scheduler {key} is {config[key]!r}, which is not supported yet; it must be false")
    leading = name.startswith(("DDIM", "DDPM", "PNDM"))
    trained = config.get("trained_betas")
    return ScheduleConfig(
        beta_schedule=betas[written],  # type: ignore[arg-type]
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        trained_betas=None if trained is None else tuple(trained),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing=config.get("timestep_spacing", "leading" if leading else "linspace"),
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get("set_alpha_to_one", not name.startswith("PNDM")),
    )


def config_to_diffusers(config: ScheduleConfig) -> dict[str, Any]:
    """The `scheduler_config.json` that diffusers' DDIMScheduler reads as the same schedule and grid."""
    names = {"cosine": "squaredcos_cap_v2"}
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": names.get(config.beta_schedule, config.beta_schedule),
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "trained_betas": None if config.trained_betas is None else list(config.trained_betas),
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": config.steps_offset,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": False,
        "rescale_betas_zero_snr": False,
        "thresholding": False,
    }
