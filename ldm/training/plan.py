"""The plan of a run: its network, cost and expected result, and a warning if steps are slower than planned."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import AutoencoderTrainingConfig, DiffusionTrainConfig, LDMConfig, TrainConfig
from ldm.data import CaptionedImages
from ldm.progress import format_duration
from ldm.training.report import MAX_SHEETS, MAX_SHEETS_BYTES

MEASURED_RUNS = Path(__file__).parents[1] / "assets" / "measured_runs.json"
PACE_STEPS = 20
MAX_SLOWDOWN = 2.0


@dataclass(frozen=True)
class Costs:
    """Measured costs of the parts of a run.

    Attributes:
        step, validation, grid, checkpoint: seconds of an optimizer step, of a validation (with writing the best
            export), of a sample grid, of a checkpoint.
        memory: bytes at the peak.
        checkpoint_bytes, grid_bytes: on disk, each.
        once_bytes: on disk, written once.
        evaluation: seconds of an evaluation of generated images.
    """

    step: float
    validation: float
    grid: float
    checkpoint: float
    memory: int
    checkpoint_bytes: int
    grid_bytes: int
    once_bytes: int
    evaluation: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will do; sizes in bytes, times in seconds. Stored as plan.json."""

    data: str
    space: str
    network: str
    parameters: int
    trained_parameters: int
    batch: str
    epochs: float
    seconds_per_step: float
    expected_seconds: float
    memory_bytes: int
    fixed_bytes: int
    memory_of: int
    disk_bytes: int
    quality: str
    evaluation_seconds: float = 0.0
    threads: str = ""

    def text(self) -> str:
        """A few aligned lines."""
        time = (
            f"about {format_duration(self.expected_seconds)}; {self.seconds_per_step:.3g} s a step, measured just now "
            "(validation, sample grids and checkpoints are included)"
        )
        if self.evaluation_seconds:
            fraction = self.evaluation_seconds / self.expected_seconds
            time += f"; evaluations of generated images take {100 * fraction:.2g} % of it"
        memory = (
            f"about {format_bytes(self.memory_bytes)} at the peak, of {format_bytes(self.memory_of)}; "
            f"weights, gradients, optimizer and EMA alone are {format_bytes(self.fixed_bytes)}"
        )
        rows = {
            "data": self.data,
            "space": self.space,
            "network": self.network,
            "batch": self.batch,
            "time": time,
            **({"threads": self.threads} if self.threads else {}),
            "memory": memory,
            "disk": f"about {format_bytes(self.disk_bytes)} in the run folder",
            "expect": self.quality,
        }
        return "\n".join(["plan"] + [f"  {name:<8} {value}" for name, value in rows.items()])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    config: LDMConfig | AutoencoderTrainingConfig,
    images: CaptionedImages,
    held_out: CaptionedImages | None,
    model: nn.Module,
    *,
    step: int,
    space: str,
    costs: Costs,
    device: torch.device,
    threads: str = "",
    discriminator: nn.Module | None = None,
) -> Plan:
    """Add up the costs of the steps from `step` to the last.

    Args:
        space: a description of what is diffused, or of the first stage.
        threads: number of CPU threads and the reason for it.
    """
    train = config.train
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extra = sum(p.numel() for p in discriminator.parameters()) if discriminator else 0
    shape = f"{config.data.resolution}x{config.data.resolution} pixels"
    if config.data.bucketed:
        shape = f"about {shape}, in buckets of one aspect ratio"
    epoch = len(images) / train.batch_size
    return Plan(
        data=f"{len(images)} images to train on, {len(held_out) if held_out else 0} held out, {shape}",
        space=space,
        network=f"{format_millions(parameters)} parameters"
        + (f", {format_millions(trained)} of them trainable" if trained < parameters else "")
        + (f"; with a discriminator of {format_millions(extra)}" if discriminator else ""),
        parameters=parameters,
        trained_parameters=trained,
        batch=f"{train.batch_size} images; {epoch:.3g} steps per epoch; {train.max_steps} steps are "
        f"{train.max_steps / epoch:.3g} epochs or {train.max_steps * train.batch_size} samples",
        epochs=train.max_steps / epoch,
        seconds_per_step=costs.step,
        expected_seconds=_total_seconds(train, step, costs),
        memory_bytes=costs.memory,
        fixed_bytes=fixed_bytes(model) + 16 * extra,  # a discriminator has no EMA
        memory_of=_total_memory(device),
        disk_bytes=_disk_bytes(train, costs),
        quality=expected_result(config, images),
        evaluation_seconds=count_due(step, train.max_steps, _evaluate_every(train)) * costs.evaluation,
        threads=threads,
    )


def check_memory(model: nn.Module, device: torch.device) -> None:
    """Reject a run whose weights, gradients, optimizer and EMA alone do not fit.

    Raises:
        ValueError: with the memory they need and how to need less.
    """
    needed, total = fixed_bytes(model), _total_memory(device)
    if needed > total > 0:
        raise ValueError(
            f"weights, gradients, optimizer and EMA need {format_bytes(needed)} of {format_bytes(total)}; choose "
            "finetune.method=lora (with train.mixed_precision=bf16 half of it again), or a smaller unet"
        )


def fixed_bytes(model: nn.Module) -> int:
    """Bytes of the weights, plus gradient, two moments and EMA of the trainable ones in float32."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _total_seconds(train: TrainConfig, step: int, costs: Costs) -> float:
    seconds = (train.max_steps - step) * costs.step
    for every, cost in (
        (train.validate_every, costs.validation),
        (train.sample_every, costs.grid),
        (train.checkpoint_every, costs.checkpoint),
        (_evaluate_every(train), costs.evaluation),
    ):
        seconds += count_due(step, train.max_steps, every) * cost
    return seconds


def _evaluate_every(train: TrainConfig) -> int | None:
    return train.evaluate_every if isinstance(train, DiffusionTrainConfig) else None


def _disk_bytes(train: TrainConfig, costs: Costs) -> int:
    checkpoints = min(train.keep_checkpoints, count_due(0, train.max_steps, train.checkpoint_every))
    grids = count_due(0, train.max_steps, train.sample_every)
    # A grid is a file, a TensorBoard event, and a part of the report, whose base64 adds a third.
    in_report = min(grids * costs.grid_bytes, MAX_SHEETS_BYTES, MAX_SHEETS * costs.grid_bytes)
    return checkpoints * costs.checkpoint_bytes + costs.once_bytes + 2 * grids * costs.grid_bytes + in_report * 4 // 3


def count_due(first: int, last: int, every: int | None) -> int:
    """How often an event is due in steps `first` + 1 … `last`: every so many steps and at the last; None is never."""
    if every is None:
        return 0
    return last // every - first // every + (last % every != 0 and first < last)


def expected_result(config: LDMConfig | AutoencoderTrainingConfig, images: CaptionedImages) -> str:
    """The result of the measured run that is nearest in image size, images and samples seen (as ratios)."""
    if isinstance(config, AutoencoderTrainingConfig):
        kind = "first stage" if config.start_from is None else "first stage from another"
        kind += " with a codebook" if config.vq is not None else ""
    else:
        kind = "new" if config.start_from is None else "fine-tuning"
    samples = config.train.max_steps * config.train.batch_size

    def distance(run: dict[str, Any]) -> float:
        pairs = ((run["resolution"], config.data.resolution), (run["images"], len(images)), (run["samples"], samples))
        return sum(abs(math.log(a / b)) for a, b in pairs)

    runs = [run for run in json.loads(MEASURED_RUNS.read_text(encoding="utf-8")) if run["kind"] == kind]
    if not runs:
        return "no run of this kind has been measured yet"
    nearest = min(runs, key=distance)
    factor = nearest["samples"] / samples
    less = f"; this run sees {factor:.2g} times fewer samples: expect less" if factor > 1.5 else ""
    return (
        f"the nearest measured run ({nearest['name']}: {nearest['images']} images, {nearest['resolution']} pixels, "
        f"{nearest['samples']} samples): {nearest['result']}{less}"
    )


def format_bytes(count: float) -> str:
    """ "12 MB", "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def format_millions(count: int) -> str:
    """ "0.65 M", "11.5 M", "860 M"."""
    return f"{count / 1e6:.3g} M"


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


class Pace:
    """Compares the first steps with the plan.

    Args:
        threads: of a run on the CPU.
        clock: seconds since any time.
    """

    def __init__(self, plan: Plan, threads: int | None, clock: Callable[[], float] | None = None) -> None:
        self._plan, self._threads, self._clock = plan, threads, clock or time.perf_counter
        self._steps, self._start = 0, 0.0

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not part of a step."""
        self._start += seconds

    def step(self) -> str | None:
        """Count a step. After 20 steps, returns a warning if they took more than twice the planned time.

        The first step is not timed: worker processes start in it.
        """
        self._steps += 1
        if self._steps == 1:
            self._start = self._clock()
        if self._steps != PACE_STEPS:
            return None
        seconds = (self._clock() - self._start) / (PACE_STEPS - 1)
        if seconds <= MAX_SLOWDOWN * self._plan.seconds_per_step:
            return None
        return slow_step_message(self._plan, seconds, self._threads)


def slow_step_message(plan: Plan, seconds: float, threads: int | None) -> str:
    """One line: how long steps take, the new expected time, and what to do about it."""
    expected = plan.expected_seconds * seconds / plan.seconds_per_step
    line = (
        f"slower than planned: a step takes {seconds:.2g} s instead of {plan.seconds_per_step:.2g} s, and the run "
        f"about {format_duration(expected)} instead of {format_duration(plan.expected_seconds)}; other programs may be "
        f"using {'the GPU' if threads is None else 'the cores'}: end them"
    )
    if threads is not None and threads > 1:
        line += (
            f", or stop this run (Ctrl-C saves it) and resume with fewer threads than its {threads}: "
            "OMP_NUM_THREADS=1, --resume, --accept threads"
        )
    return f"{line}; or lower train.max_steps, or train.batch_size in a new run"
