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

from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.data import CaptionedImages

MEASURED_RUNS = Path(__file__).parents[1] / "assets" / "measured_runs.json"


@dataclass(frozen=True)
class Costs:
    """Seconds of an optimizer step, of a validation, of a sample grid, of a checkpoint; bytes of memory at the peak."""

    step: float
    validation: float
    sheet: float
    checkpoint: float
    memory: int


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
    memory_of: int
    disk_bytes: int
    quality: str

    def text(self) -> str:
        """A few aligned lines."""
        time = (
            f"about {duration(self.expected_seconds)}; {self.seconds_per_step:.3g} s a step, measured just now "
            "(validation, sample grids and checkpoints are counted)"
        )
        memory = f"about {size(self.memory_bytes)} at the peak, of {size(self.memory_of)}"
        rows = {
            "data": self.data,
            "space": self.space,
            "network": self.network,
            "batch": self.batch,
            "time": time,
            "memory": memory,
            "disk": f"about {size(self.disk_bytes)} in the run folder",
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
    export_bytes: int,
    frozen_bytes: int,
    device: torch.device,
) -> Plan:
    """Adds up what `probe` measured over the steps from `step` to the last.

    Args:
        space: what is diffused, and why, in words; for a first stage what it is.
        export_bytes: of what a checkpoint exports beside frozen parts; `frozen_bytes`: of those, once a run.
    """
    train = config.train
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = train.max_steps - step
    seconds = steps * costs.step
    seconds += times_due(step, train.max_steps, train.validate_every) * costs.validation
    seconds += times_due(step, train.max_steps, train.sample_every) * costs.sheet
    seconds += times_due(step, train.max_steps, train.checkpoint_every) * costs.checkpoint
    # Weights, their average and two moments of AdamW; the newest checkpoints, and the best export.
    kept = min(train.keep_checkpoints, times_due(0, train.max_steps, train.checkpoint_every))
    best = export_bytes if held_out is not None and isinstance(config, LDMConfig) else 0
    disk = kept * (4 * 4 * trained + export_bytes) + best + frozen_bytes
    shape = f"{config.data.resolution}x{config.data.resolution} pixels"
    if config.data.bucketed:
        shape = f"about {shape}, in buckets of one aspect ratio"
    epoch = len(images) / train.batch_size
    return Plan(
        data=f"{len(images)} images to train on, {len(held_out) if held_out else 0} held out, {shape}",
        space=space,
        network=f"{millions(parameters)} parameters"
        + (f", of which {millions(trained)} learn" if trained < parameters else ""),
        parameters=parameters,
        trained_parameters=trained,
        batch=f"{train.batch_size} images; {epoch:.3g} steps an epoch; {train.max_steps} steps are "
        f"{train.max_steps / epoch:.3g} epochs or {train.max_steps * train.batch_size} samples",
        epochs=train.max_steps / epoch,
        seconds_per_step=costs.step,
        expected_seconds=seconds,
        memory_bytes=costs.memory,
        memory_of=_memory_of(device),
        disk_bytes=disk,
        quality=quality(config, images),
    )


def times_due(first: int, last: int, every: int) -> int:
    """How often something happens in steps `first` + 1 … `last`, every so many steps and at the last."""
    return last // every - first // every + (last % every != 0)


def quality(config: LDMConfig | AutoencoderTrainingConfig, images: CaptionedImages) -> str:
    """What the nearest of our own measured runs reached: nearest in image size, images and samples seen, as factors."""
    kind = (
        "first stage"
        if isinstance(config, AutoencoderTrainingConfig)
        else "fine-tuning"
        if config.start_from
        else "new"
    )
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


def size(count: float) -> str:
    """ "12 MB", "3.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def millions(count: int) -> str:
    """ "0.65 M", "11.5 M", "860 M"."""
    return f"{count / 1e6:.3g} M"


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
