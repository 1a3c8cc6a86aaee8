"""The processes of a run: joining them, and the one reduction of a training step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from ldm.config import TrainConfig
from ldm.training.threads import Threads, available_threads, resolve_threads

# The other processes wait while the main one validates, samples and saves. The launcher notices a process that dies.
TIMEOUT = timedelta(days=1)


class StepLosses(NamedTuple):
    """Losses of a micro-batch of B samples.

    Attributes:
        values: [B] float32. Their mean is minimized and logged as the loss.
        timesteps: [B] int64, or None where there are none.
        figures: name → tensor. Means are logged and have to be finite.
        objectives: scalars to minimize instead of the mean of `values`, each in its own backward pass.
    """

    values: Tensor
    timesteps: Tensor | None = None
    figures: Mapping[str, Tensor] = MappingProxyType({})
    objectives: tuple[Tensor, ...] = ()

    def backward(self, accelerator: Accelerator) -> None:
        """Add the gradients of this micro-batch to those of the step."""
        for objective in self.objectives or (self.values.mean(),):
            accelerator.backward(objective)

    def detach(self) -> StepLosses:
        figures = {name: figure.detach().mean() for name, figure in self.figures.items()}
        return StepLosses(self.values.detach(), self.timesteps, figures)


class StepResult(NamedTuple):
    """What every process knows after a step.

    Attributes:
        loss: mean over the global batch.
        gradient_norm: before clipping.
        figures: means over the global batch.
        is_finite: whether all of these are finite in every process.
        stop: whether any process received a signal to stop.
        save: whether the main process requests a checkpoint.
    """

    loss: float
    gradient_norm: float
    figures: dict[str, float]
    is_finite: bool
    stop: bool
    save: bool


class Processes(NamedTuple):
    """The processes of a run, seen from one of them.

    Attributes:
        threads: that the environment allows; None on a GPU.
    """

    accelerator: Accelerator
    threads: Threads | None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def print(self, text: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)


def join_processes(train: TrainConfig, folder: Path) -> Processes:
    """Join the processes of a run; torch gets a first number of threads.

    Raises:
        ValueError: if not all launched processes joined.
    """
    available = available_threads()  # accelerate may change it
    processes = int(os.environ.get("WORLD_SIZE", 1))
    no_accelerator = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=no_accelerator and processes > 1,  # otherwise several processes without a GPU do not join
        mixed_precision=train.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with="tensorboard",
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    if accelerator.num_processes != processes:
        raise ValueError(
            f"{processes} processes were launched but accelerate joined {accelerator.num_processes}; "
            "launch them with torchrun --nproc_per_node, or start a single one"
        )
    if accelerator.device.type != "cpu":
        return Processes(accelerator, None)
    found = resolve_threads(available, train.cpu_threads, None)
    torch.set_num_threads(found.number or max(1, found.max_number // 2))
    return Processes(accelerator, available)


def sum_over_processes(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """Sums of integers over all processes, the same in each. A collective call."""
    if accelerator.num_processes == 1:
        return list(values)
    # int64: float32 would round a step above 2^24.
    summed = accelerator.reduce(torch.tensor(values, dtype=torch.int64, device=accelerator.device), "sum")
    return [int(value) for value in summed.tolist()]


def sync_step(
    accelerator: Accelerator,
    losses: Sequence[StepLosses],
    norm: Tensor,
    *,
    extra: Mapping[str, Tensor],
    stop: bool,
    save: bool,
) -> StepResult:
    """All-reduce the step's losses, finiteness and flags, and copy them to the host: the only sync of a step.

    Args:
        losses: of the micro-batches of this process.
        norm: of the gradient, the same in all processes.
        extra: name → another number that has to be finite, the same in all processes.
        stop, save: flags of this process.
    """
    names = list(losses[0].figures)
    loss, *figures = (
        torch.stack(values).mean()
        for values in zip(
            *([m.values.mean(), *(m.figures[name].mean() for name in names)] for m in losses), strict=True
        )
    )
    scaler = accelerator.scaler
    # A loss scaler expects gradients to overflow in half precision, until its scale cannot fall any further.
    checked = [loss, *figures, *extra.values()]
    checked += [] if scaler is not None and scaler.get_scale() > 1 else [norm]
    nonfinite = ~torch.stack([number.to(loss) for number in checked]).isfinite().all()
    means = torch.stack([number.to(loss) / accelerator.num_processes for number in (loss, *figures)])
    packed = torch.cat([means, nonfinite.to(loss)[None], torch.tensor([float(stop), float(save)], device=loss.device)])
    if accelerator.num_processes > 1:
        packed = accelerator.reduce(packed, "sum")
    same = torch.stack([number.detach().to(packed) for number in (norm, *extra.values())])
    mean, *rest = torch.cat([packed, same]).tolist()
    values, (failures, stops, saves, gradient_norm, *others) = rest[: len(names)], rest[len(names) :]
    named = dict(zip([*names, *extra], [*values, *others], strict=True))
    return StepResult(mean, gradient_norm, named, failures == 0, stops > 0, saves > 0)


def gather_in_order(accelerator: Accelerator, losses: Sequence[StepLosses]) -> Tensor:
    """Loss and timestep (−1: none) of each sample of the global batch, [B, 2], in its order. A collective call."""
    values = torch.cat([micro.values.float() for micro in losses])  # [M·b]
    timesteps = [micro.timesteps for micro in losses if micro.timesteps is not None]
    timestep = torch.cat(timesteps).to(values) if timesteps else torch.full_like(values, -1)
    gathered = accelerator.gather(torch.stack([values, timestep], dim=1))  # [P·M·b, 2]
    assert isinstance(gathered, Tensor)
    # Micro-batch m of process p is slice m·P + p of the batch.
    by_process = gathered.unflatten(0, (accelerator.num_processes, len(losses), -1))  # [P, M, b, 2]
    return by_process.transpose(0, 1).flatten(0, 2)
