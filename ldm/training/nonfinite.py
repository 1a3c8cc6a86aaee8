"""Losses and gradients that are not finite: from which samples, and for how many steps in a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm import disk
from ldm.data import CaptionedImages
from ldm.data.captions import printable

NAMES_SHOWN = 4


class StepLosses(NamedTuple):
    """Losses of the samples of a micro-batch.

    Attributes:
        values: [B] float32; their mean is what is minimised, and logged as the loss.
        timesteps: [B] int64, where there are such.
        figures: name → tensor whose mean is logged too; it has to be finite as well.
        objectives: scalars that are minimised instead of the mean of `values`, each in a backward pass of its own.
    """

    values: Tensor
    timesteps: Tensor | None = None
    figures: Mapping[str, Tensor] = MappingProxyType({})
    objectives: tuple[Tensor, ...] = ()

    def backward(self, accelerator: Accelerator) -> None:
        """Adds the gradients of a micro-batch to those of the step."""
        for objective in self.objectives or (self.values.mean(),):
            accelerator.backward(objective)

    def detached(self) -> StepLosses:
        """The numbers alone."""
        figures = {name: figure.detach().mean() for name, figure in self.figures.items()}
        return StepLosses(self.values.detach(), self.timesteps, figures)


class StepResult(NamedTuple):
    """What all processes know after a step.

    Attributes:
        loss, gradient_norm: the mean over the batch, and the norm of its gradient before clipping.
        figures: the means of all others over the batch.
        is_finite: whether all of them are, in every process.
        stop: whether one of them was told to stop.
        save: whether the main process wants a checkpoint.
    """

    loss: float
    gradient_norm: float
    figures: dict[str, float]
    is_finite: bool
    stop: bool
    save: bool


def sync_step(
    accelerator: Accelerator,
    micro: Sequence[StepLosses],
    norm: Tensor,
    *,
    beside: Mapping[str, Tensor],
    stop: bool,
    save: bool,
) -> StepResult:
    """The moment of a step at which the processes hear of each other, and the host of its device.

    Args:
        micro: the losses of this process's micro-batches.
        norm: of the gradient, the same in all processes.
        beside: name → another number that has to be finite, the same in all processes.
        stop, save: what this process has to say.
    """
    names = list(micro[0].figures)
    loss, *figures = (
        torch.stack(values).mean()
        for values in zip(*([m.values.mean(), *(m.figures[name].mean() for name in names)] for m in micro), strict=True)
    )
    scaler = accelerator.scaler
    # Gradients that overflow in half precision are what a loss scaler looks for, until it has no scale to give up.
    watched = [loss, *figures, *beside.values()]
    watched += [] if scaler is not None and scaler.get_scale() > 1 else [norm]
    nonfinite = ~torch.stack([number.to(loss) for number in watched]).isfinite().all()
    said = torch.stack([number.to(loss) / accelerator.num_processes for number in (loss, *figures)])
    words = torch.cat([said, nonfinite.to(loss)[None], torch.tensor([float(stop), float(save)], device=loss.device)])
    if accelerator.num_processes > 1:
        words = accelerator.reduce(words, "sum")
    same = torch.stack([number.detach().to(words) for number in (norm, *beside.values())])
    mean, *rest = torch.cat([words, same]).tolist()
    means, (failures, stops, saves, largest, *others) = rest[: len(names)], rest[len(names) :]
    told = dict(zip([*names, *beside], [*means, *others], strict=True))
    return StepResult(mean, largest, told, failures == 0, stops > 0, saves > 0)


def gather_in_order(accelerator: Accelerator, micro: Sequence[StepLosses]) -> Tensor:
    """Loss and timestep (−1: none) of each sample of the global batch, [B, 2], in its order; all have to call this."""
    values = torch.cat([losses.values.float() for losses in micro])  # [M·b]
    timesteps = [losses.timesteps for losses in micro if losses.timesteps is not None]
    seen_at = torch.cat(timesteps).to(values) if timesteps else torch.full_like(values, -1)
    extract = accelerator.gather(torch.stack([values, seen_at], dim=1))  # [P·M·b, 2]
    assert isinstance(extract, Tensor)
    # Micro-batch m of process p is slice m·P + p of the batch.
    by_process = extract.unflatten(0, (accelerator.num_processes, len(micro), -1))  # [P, M, b, 2]
    return by_process.transpose(0, 1).flatten(0, 2)


def nonfinite_samples(
    images: CaptionedImages, positions: Sequence[tuple[int, int]], losses: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """The samples of a step whose loss is not finite; all of them where it was the gradient alone.

    Args:
        positions: (epoch, index) of the global batch, B of them.
        losses: loss and timestep (−1: none) of each, in the same order.
    """
    guilty: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for (epoch, index), (loss, timestep) in zip(positions, losses, strict=True):
        entry: dict[str, Any] = {"id": images.sample_at(epoch, index).id, "epoch": epoch}
        entry["caption"] = images.caption_at(epoch, index)
        if timestep >= 0:
            entry["timestep"] = int(timestep)
        (others if math.isfinite(loss) else guilty).append(entry | {"loss": str(loss)})
    return guilty or others


def log_skipped_step(path: Path, step: int, met: StepResult, samples: Sequence[dict[str, Any]]) -> str:
    """Appends a line of JSON with all of a skipped step, and returns what is said of it."""
    figures = {"loss": str(met.loss), "gradient_norm": str(met.gradient_norm)}
    figures |= {name: str(value) for name, value in met.figures.items()}
    wrong = [f", {name} {value}" for name, value in met.figures.items() if not math.isfinite(value)]
    disk.append_line(path, json.dumps({"step": step} | figures | {"samples": list(samples)}))
    names = [
        f"{entry['id']}" + (f" at t = {entry['timestep']}" if "timestep" in entry else "")
        for entry in samples[:NAMES_SHOWN]
    ]
    more = f" and {len(samples) - NAMES_SHOWN} more" if len(samples) > NAMES_SHOWN else ""
    return printable(
        f"step {step} was skipped: its loss is {met.loss} and its gradient norm {met.gradient_norm}"
        f"{''.join(wrong)} ({', '.join(names)}{more}); weights, moments and average are as before"
    )
