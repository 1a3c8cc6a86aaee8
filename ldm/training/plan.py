"""The plan of a run, printed before its first step: what will be trained, what it costs, what to expect of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import AutoencoderTrainingConfig, DiffusionTrainConfig, LDMConfig, TrainConfig
from ldm.data import CaptionedImages
from ldm.report.sheets import MOST_BYTES, MOST_SHEETS

MEASURED_RUNS = Path(__file__).parents[1] / "assets" / "measured_runs.json"


@dataclass(frozen=True)
class Costs:
    """What the parts of a run cost, as `probe` measured it.

    Args:
        step, validation, sheet, checkpoint: seconds of an optimizer step, of a measurement on held-out images (and of
            writing the best export), of a sample grid, of a checkpoint.
        evaluation: seconds of an evaluation of drawn pictures.
        memory: bytes at the peak.
        checkpoint_bytes, sheet_bytes: on disk, each; `once_bytes`: of what is there once, whatever is written.
    """

    step: float
    validation: float
    sheet: float
    checkpoint: float
    memory: int
    checkpoint_bytes: int
    sheet_bytes: int
    once_bytes: int
    evaluation: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will do, in words and numbers; sizes in bytes, times in seconds."""

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
            f"about {duration(self.expected_seconds)}; {self.seconds_per_step:.3g} s a step, measured just now "
            "(validation, sample grids and checkpoints are counted)"
        )
        if self.evaluation_seconds:
            share = self.evaluation_seconds / self.expected_seconds
            time += f"; evaluations of drawn pictures take {100 * share:.2g} % of it"
        memory = (
            f"about {format_bytes(self.memory_bytes)} at the peak, of {format_bytes(self.memory_of)}; "
            f"weights, gradients, moments and average alone are {format_bytes(self.fixed_bytes)}"
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
    beside: nn.Module | None = None,
) -> Plan:
    """Adds up what `probe` measured over the steps from `step` to the last.

    Args:
        space: what is diffused, and why, in words; for a first stage what it is.
        threads: how many compute on the CPU, and why so many.
        beside: a discriminator, which learns too.
    """
    train = config.train
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    judging = sum(p.numel() for p in beside.parameters()) if beside else 0
    shape = f"{config.data.resolution}x{config.data.resolution} pixels"
    if config.data.bucketed:
        shape = f"about {shape}, in buckets of one aspect ratio"
    epoch = len(images) / train.batch_size
    return Plan(
        data=f"{len(images)} images to train on, {len(held_out) if held_out else 0} held out, {shape}",
        space=space,
        network=f"{format_millions(parameters)} parameters"
        + (f", of which {format_millions(trained)} learn" if trained < parameters else "")
        + (f"; a discriminator of {format_millions(judging)} beside it" if beside else ""),
        parameters=parameters,
        trained_parameters=trained,
        batch=f"{train.batch_size} images; {epoch:.3g} steps an epoch; {train.max_steps} steps are "
        f"{train.max_steps / epoch:.3g} epochs or {train.max_steps * train.batch_size} samples",
        epochs=train.max_steps / epoch,
        seconds_per_step=costs.step,
        expected_seconds=_seconds(train, step, costs),
        memory_bytes=costs.memory,
        fixed_bytes=fixed_bytes(model) + 16 * judging,  # it has no average
        memory_of=_memory_of(device),
        disk_bytes=_bytes_on_disk(train, costs),
        quality=expected_result(config, images),
        evaluation_seconds=count_due(step, train.max_steps, _evaluate_every(train)) * costs.evaluation,
        threads=threads,
    )


def check_memory(model: nn.Module, device: torch.device) -> None:
    """Refuses a run whose weights, gradients, moments of AdamW and average alone do not fit.

    Raises:
        ValueError: with what they take and what would take less.
    """
    needed, there = fixed_bytes(model), _memory_of(device)
    if needed > there > 0:
        raise ValueError(
            f"weights, gradients, optimizer and moving average take {format_bytes(needed)} and there are "
            f"{format_bytes(there)}; "
            "choose finetune.method=lora (with train.mixed_precision=bf16 half of it again), or a smaller unet"
        )


def fixed_bytes(model: nn.Module) -> int:
    """Bytes of the weights, and for those that learn of a gradient, two moments and an average, all float32."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _seconds(train: TrainConfig, step: int, costs: Costs) -> float:
    seconds = (train.max_steps - step) * costs.step
    for every, cost in (
        (train.validate_every, costs.validation),
        (train.sample_every, costs.sheet),
        (train.checkpoint_every, costs.checkpoint),
        (_evaluate_every(train), costs.evaluation),
    ):
        seconds += count_due(step, train.max_steps, every) * cost
    return seconds


def _evaluate_every(train: TrainConfig) -> int | None:
    return train.evaluate_every if isinstance(train, DiffusionTrainConfig) else None


def _bytes_on_disk(train: TrainConfig, costs: Costs) -> int:
    checkpoints = min(train.keep_checkpoints, count_due(0, train.max_steps, train.checkpoint_every))
    sheets = count_due(0, train.max_steps, train.sample_every)
    # A sheet is a file, an event for TensorBoard, and a part of the report, whose base64 adds a third.
    in_report = min(sheets * costs.sheet_bytes, MOST_BYTES, MOST_SHEETS * costs.sheet_bytes)
    return checkpoints * costs.checkpoint_bytes + costs.once_bytes + 2 * sheets * costs.sheet_bytes + in_report * 4 // 3


def count_due(first: int, last: int, every: int | None) -> int:
    """How often something happens in steps `first` + 1 … `last`, every so many steps and at the last; None is never."""
    if every is None:
        return 0
    return last // every - first // every + (last % every != 0 and first < last)


def expected_result(config: LDMConfig | AutoencoderTrainingConfig, images: CaptionedImages) -> str:
    """What the nearest of our own measured runs reached: nearest in image size, images and samples seen, as factors."""
    if isinstance(config, AutoencoderTrainingConfig):
        # One that goes on from a model begins where another ends: samples seen from nothing say little of it.
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
        f"the nearest run we measured ({nearest['name']}: {nearest['images']} images, {nearest['resolution']} pixels, "
        f"{nearest['samples']} samples): {nearest['result']}{less}"
    )


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """ "12 MB", "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def format_millions(count: int) -> str:
    """ "0.65 M", "11.5 M", "860 M"."""
    return f"{count / 1e6:.3g} M"


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
