"""The noise schedule: one value, ᾱ_t in float64 on the CPU, and everything that follows from it.

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I)      DDPM (arXiv:2006.11239), Eq. 4

`alpha` and `sigma` always mean √ᾱ and √(1 − ᾱ). Timesteps count from 0 to T − 1; −1 stands for the end of sampling,
where ᾱ is `final_alpha_cumprod`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "cosine", "plain_cosine", "sigmoid"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "posterior_mean"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]

# ε-prediction multiplies its error by σ/α in x̂_0. Past this gain the first step of a sampler is noise unless x̂_0 is
# bounded: digits in latents survive 157, that of DDPM's linear schedule, and not the 2e4 of a cosine.
MAX_ERROR_GAIN = 200.0
MAX_TIMESTEPS = 1_000_000


class Step(NamedTuple):
    """One step of a sampler: from the state at timestep `t` to the state at `t_prev` (−1: the end)."""

    t: int
    t_prev: int


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What `scheduler/scheduler_config.json` says: the schedule, what is predicted, and the grid of inference.

    Args:
        beta_schedule: "linear" (DDPM, section 4), "scaled_linear" (linear in √β: LDM, Stable Diffusion), "sigmoid"
            (GeoDiff), "cosine" (Improved DDPM, Eq. 17) or "plain_cosine" (ᾱ = (cos(πt/T) + 1) / 2 inside [1e-4, 1 −
            1e-4]); `beta_start` and `beta_end` have no meaning for the last two.
        num_train_timesteps: T, from 1 to a million.
        beta_start, beta_end: β_1 and β_T, 0 < beta_start <= beta_end < 1.
        trained_betas: a table of T betas in (0, 1) that replaces `beta_schedule`; the last may be 1.
        rescale_betas_zero_snr: whether ᾱ is rescaled so that the last is 0 (arXiv:2305.08891, Algorithm 1).
        prediction_type: what the network predicts: ε, x_0 ("sample"), v = α ε − σ x_0 (arXiv:2202.00512), or the mean
            of q(x_{t−1} | x_t, x_0) (DDPM, Eq. 7), for which diffusers has no name. Where ᾱ ends at 0, not ε.
        timestep_spacing: how S inference steps are laid over T (arXiv:2305.08891, Table 2).
        steps_offset: added to the timesteps of "leading"; 1 is what diffusers makes of every Stable Diffusion.
        set_alpha_to_one: whether sampling ends at ᾱ = 1 or, as Stable Diffusion 1.x does, at ᾱ_0.
    """

    __pydantic_config__ = {"extra": "forbid"}

    beta_schedule: BetaSchedule = "scaled_linear"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
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
        if not 1 <= self.num_train_timesteps <= MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; it must be 1 to {MAX_TIMESTEPS}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            ends = f"beta_start is {self.beta_start} and beta_end is {self.beta_end}"
            raise ValueError(f"{ends}; they must satisfy 0 < beta_start <= beta_end < 1")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset is {self.steps_offset}; it must not be negative")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            found, wanted = len(self.trained_betas), self.num_train_timesteps
            raise ValueError(f"trained_betas has {found} entries but num_train_timesteps is {wanted}; give as many")
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise ValueError("num_train_timesteps is 1; rescale_betas_zero_snr keeps the first step, so it needs 2")
        if self.rescale_betas_zero_snr or (self.trained_betas is not None and self.trained_betas[-1] == 1):
            check_no_signal(self.prediction_type, self.num_train_timesteps - 1)


class NoiseSchedule:
    """ᾱ_t for t = 0 … T − 1, [T] strictly falling inside [0, 1], and what follows from it. It never changes.

    `final_alpha_cumprod` is ᾱ at t_prev = −1, the end of sampling.
    """

    def __init__(self, alphas_cumprod: Tensor, *, final_alpha_cumprod: float = 1.0) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod has shape {list(table.shape)}; it must be one row of T numbers")
        for t in torch.nonzero(~((table >= 0) & (table <= 1))).flatten().tolist():
            raise ValueError(f"alphas_cumprod is {float(table[t])} at timestep {t}; it must be inside [0, 1]")
        for t in torch.nonzero(table.diff() >= 0).flatten().tolist():
            here = f"from {float(table[t])} to {float(table[t + 1])} at timestep {t + 1}"
            raise ValueError(f"alphas_cumprod goes {here}; it must fall strictly from step to step")
        self.alphas_cumprod = table  # [T]
        self.alpha = table.sqrt()  # [T]
        self.sigma = (1 - table).sqrt()  # [T]
        self.final_alpha_cumprod = float(final_alpha_cumprod)

    @classmethod
    def from_betas(
        cls, betas: Tensor | Sequence[float], *, set_alpha_to_one: bool = True, zero_snr: bool = False
    ) -> NoiseSchedule:
        """The schedule of a table of betas [T], each in (0, 1), the last in (0, 1]: ᾱ_t = ∏ (1 − β_s), DDPM Eq. 4."""
        table = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if table.ndim != 1:
            raise ValueError(f"betas have shape {list(table.shape)}; they must be one row of T numbers")
        for t in torch.nonzero(~((table > 0) & (table < 1))).flatten().tolist():
            if t < len(table) - 1 or table[t] != 1:
                wanted = "strictly between 0 and 1, or 1 at the last timestep (zero terminal SNR)"
                raise ValueError(f"beta is {float(table[t])} at timestep {t}; it must be {wanted}")
        alphas_cumprod = torch.cumprod(1 - table, dim=0)
        if zero_snr:
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        final = 1.0 if set_alpha_to_one or len(alphas_cumprod) == 0 else float(alphas_cumprod[0])
        return cls(alphas_cumprod, final_alpha_cumprod=final)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        zero_snr = config.rescale_betas_zero_snr
        return cls.from_betas(make_betas(config), set_alpha_to_one=config.set_alpha_to_one, zero_snr=zero_snr)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """β_t = 1 − ᾱ_t / ᾱ_{t−1}, [T] float64; exactly 1 where ᾱ_t is 0."""
        return betas_from_alphas_cumprod(self.alphas_cumprod)

    @property
    def posterior_variance(self) -> Tensor:
        """β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · β_t, [T] float64, the first is 0. DDPM, Eq. 7."""
        rest = (1 - self.alphas_cumprod[:-1]) / (1 - self.alphas_cumprod[1:]) * self.betas[1:]
        return torch.cat([torch.zeros(1, dtype=torch.float64), rest])

    @property
    def posterior_mean_coefficients(self) -> tuple[Tensor, Tensor]:
        """(a, b) of μ̃_t = a x_0 + b x_t, each [T] float64: DDPM, Eq. 7; (1, 0) at t = 0, before which stands the data.

        a = √ᾱ_{t−1} β_t / (1 − ᾱ_t) and b = √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t).
        """
        betas, previous, variance = self.betas[1:], self.alphas_cumprod[:-1], 1 - self.alphas_cumprod[1:]
        x_0 = previous.sqrt() * betas / variance
        noisy = (1 - betas).sqrt() * (1 - previous) / variance
        end = torch.tensor([1.0, 0.0], dtype=torch.float64)  # nothing is left of x_t where t − 1 is the data
        return torch.cat([end[:1], x_0]), torch.cat([end[1:], noisy])

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 − ᾱ), [T] float64 (VDM, arXiv:2107.00630, Eq. 2); 0 where ᾱ is 0."""
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
        """α and σ at timesteps [B]: `extract` of each."""
        return extract(self.alpha, timesteps, like), extract(self.sigma, timesteps, like)

    def error_gain(self, t: int) -> float:
        """By how much an error of a predicted ε grows in x̂_0 at timestep `t`: σ/α, infinite where α is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha if alpha > 0 else math.inf

    def check_prediction(self, prediction_type: PredictionType) -> None:
        """Raises `ValueError` for ε where ᾱ ends at 0."""
        if self.alphas_cumprod[-1] == 0:
            check_no_signal(prediction_type, self.num_train_timesteps - 1)

    def grid(
        self, num_inference_steps: int, spacing: TimestepSpacing = "trailing", *, steps_offset: int = 0
    ) -> tuple[Step, ...]:
        """The steps of sampling: S pairs (t, t_prev), each t_prev the next t, the last one −1.

        "leading" takes every ⌊T/S⌋-th timestep from `steps_offset` on, "linspace" S evenly spaced ones from 0 to T − 1,
        "trailing" goes back from T − 1 in strides of T/S (arXiv:2305.08891, Table 2). Each is the grid that diffusers
        prints, down to how its floating point falls at a half.
        """
        total, steps = self.num_train_timesteps, num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps is {steps}; it must be 1 to {total}, the number of timesteps")
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


def extract(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """The entries of a table [T] at timesteps [B] → [B, 1, …] for `like` [B, …]: its device, and float64 or float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = table[timesteps.to("cpu")].to(dtype)
    return values.to(like.device).view((-1,) + (1,) * (like.ndim - 1))


def make_betas(config: ScheduleConfig) -> Tensor:
    """β_t for t = 0 … T − 1, [T] float64, before any rescaling to zero terminal SNR."""
    steps, ends = config.num_train_timesteps, (config.beta_start, config.beta_end)
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64)
    if config.beta_schedule == "cosine":
        return cosine_betas(steps)
    if config.beta_schedule == "plain_cosine":
        return plain_cosine_betas(steps)
    between = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "sigmoid": sigmoid_betas}
    return between[config.beta_schedule](steps, *ends)


def check_no_signal(prediction_type: str, t: int) -> None:
    """Raises `ValueError` for a prediction that says nothing about x_0 where ᾱ is 0, at timestep `t`."""
    if prediction_type == "epsilon":
        raise ValueError(
            f"prediction_type is epsilon, but at timestep {t} alpha is 0: there x_t is the noise itself, and to know "
            "it says nothing about x_0 (arXiv:2305.08891, section 3.2); choose v_prediction or sample, or a schedule "
            "without rescale_betas_zero_snr"
        )


def check_precision(prediction_type: str, dtype: str) -> None:
    """Raises ValueError where a prediction or its weights have too few digits, "bf16" or "float16" for example.

    μ̃ differs from x_t by about β_t / σ_t, so that rounding it is some hundred times as large in ε: 0.06 to 0.38 of ε
    in bfloat16, 0.01 to 0.05 in float16, for normal data and the default schedule.
    """
    if prediction_type == "posterior_mean" and dtype in ("bf16", "fp16", "bfloat16", "float16"):
        why = f"prediction_type is posterior_mean, of which {dtype} leaves noise alone: it is nearly x_t"
        raise ValueError(f"{why}; take float32 (dtype, or train.mixed_precision=no), or predict epsilon or v")


def check_first_step(
    schedule: NoiseSchedule, grid: Sequence[Step], prediction_type: PredictionType, *, bounded: bool
) -> None:
    """ValueError where the first step has (almost) no signal for an ε-prediction, and nothing bounds x̂_0."""
    first = grid[0].t
    if schedule.alpha_cumprod_at(first) == 0:
        check_no_signal(prediction_type, first)
    gain = schedule.error_gain(first)
    if prediction_type == "epsilon" and not bounded and gain > MAX_ERROR_GAIN:
        raise ValueError(
            f"sampling starts at timestep {first}, where alpha is {schedule.alpha_sigma(first)[0]:.1e}: an error of "
            f"the predicted noise grows {gain:.0f}-fold in the predicted latents, and nothing bounds those; "
            "choose schedule.beta_schedule: scaled_linear, or schedule.prediction_type: v_prediction"
        )


COSINE_OFFSET = 0.008  # s of Improved DDPM, section 3.2
MAX_BETA = 0.999  # Improved DDPM, section 3.2: no singularity at the end

# ε of `plain_cosine`: σ/α = 100 at the end, below `MAX_ERROR_GAIN`; σ = 0.01 at the start, as with DDPM's β_1 = 1e-4.
PLAIN_COSINE_MARGIN = 1e-4


def linear_betas(steps: int, start: float, end: float) -> Tensor:
    """β in equal steps from `start` to `end`. DDPM (arXiv:2006.11239), section 4: from 1e-4 to 0.02."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float, end: float) -> Tensor:
    """Equal steps in √β. LDM (arXiv:2112.10752), as published with it and in Stable Diffusion."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()


def sigmoid_betas(steps: int, start: float, end: float) -> Tensor:
    """β = start + (end − start) · sigmoid(x), x in equal steps from −6 to 6. GeoDiff (arXiv:2203.02923), as published
    with it and in diffusers' DDPMScheduler; the ends are met to 0.25 % of their distance."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


def cosine_betas(steps: int) -> Tensor:
    """β = 1 − f(t) / f(t − 1) ≤ 0.999, f(t) = cos²((t/T + s) / (1 + s) · π/2). Improved DDPM, Eq. 17."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


def plain_cosine_betas(steps: int) -> Tensor:
    """The betas of ᾱ = (cos(πt/T) + 1) / 2, t = 1 … T, brought into [ε, 1 − ε] by ᾱ ↦ ε + (1 − 2ε) ᾱ.

    Clipping would hold ᾱ still at each end, where β would be 0; the affine map leaves it falling strictly.
    """
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    bare = torch.cos(time * (math.pi / 2)).square()  # (cos(πt/T) + 1) / 2, without cancellation near 0
    return betas_from_alphas_cumprod(PLAIN_COSINE_MARGIN + (1 - 2 * PLAIN_COSINE_MARGIN) * bare)


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """β_t = 1 − ᾱ_t / ᾱ_{t−1} with ᾱ = 1 before the first: DDPM, Eq. 4, read backwards. [T] → [T]."""
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ [T] shifted and scaled so that the last is exactly 0 and the first stays. arXiv:2305.08891, Algorithm 1."""
    assert len(alphas_cumprod) >= 2, "the first step stays and the last becomes 0"
    root = alphas_cumprod.sqrt()
    rescaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return rescaled.square()
