"""The processes of a run: joining them, the one reduction of a step, steps that are skipped, and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm

from ldm import disk
from ldm.config import TrainConfig
from ldm.data import CaptionedImages
from ldm.progress import printable
from ldm.training.threads import Threads, available_threads, resolve_threads

# The other processes wait while the main one validates, samples and saves. The launcher notices a process that dies.
TIMEOUT = timedelta(days=1)


class StepLosses(NamedTuple):
    """Losses of a micro-batch of B samples."""

    values: Tensor  # [B] float32; their mean is minimized and logged as the loss
    timesteps: Tensor | None = None  # [B] int64, where there are any
    figures: Mapping[str, Tensor] = MappingProxyType({})  # means are logged and have to be finite
    objectives: tuple[Tensor, ...] = ()  # minimized instead of that mean, each in its own backward pass

    def backward(self, accelerator: Accelerator) -> None:
        """Add the gradients of this micro-batch to those of the step."""
        for objective in self.objectives or (self.values.mean(),):
            accelerator.backward(objective)

    def detach(self) -> StepLosses:
        figures = {name: figure.detach().mean() for name, figure in self.figures.items()}
        return StepLosses(self.values.detach(), self.timesteps, figures)


class StepResult(NamedTuple):
    """What every process knows after a step; means are over the global batch."""

    loss: float
    gradient_norm: float  # before clipping
    figures: dict[str, float]
    is_finite: bool  # all of these, in every process
    stop: bool  # any process received a signal
    save: bool  # the main process requests a checkpoint


class Processes(NamedTuple):
    """The processes of a run, seen from one of them."""

    accelerator: Accelerator
    threads: Threads | None  # that the environment allows; None on a GPU

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def print(self, text: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)


def join_processes(train: TrainConfig, folder: Path) -> Processes:
    """Join the processes of a run; torch gets a first number of threads. Raises ValueError if not all launched
    processes joined.
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
        losses, stop, save: of this process.
        norm: of the gradient; `extra`: other numbers that have to be finite. Both are the same in all processes.
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


MAX_NAMES = 4


def log_skipped_step(
    path: Path,
    step: int,
    result: StepResult,
    images: CaptionedImages,
    positions: Sequence[tuple[int, int]],
    losses: Sequence[Sequence[float]],
) -> str:
    """Append a skipped step to `path` as a line of JSON; returns a message about it.

    It names the samples with a non-finite loss, or all samples if only the gradient was not finite: `positions` and
    `losses` are (epoch, index) and (loss, timestep or −1) of each sample of the global batch.
    """
    nonfinite: list[dict[str, Any]] = []
    finite: list[dict[str, Any]] = []
    for (epoch, index), (loss, timestep) in zip(positions, losses, strict=True):
        entry: dict[str, Any] = {"id": images.sample_at(epoch, index).id, "epoch": epoch}
        entry |= {"caption": images.caption_at(epoch, index)} | ({"timestep": int(timestep)} if timestep >= 0 else {})
        (finite if math.isfinite(loss) else nonfinite).append(entry | {"loss": str(loss)})
    samples = nonfinite or finite
    figures = {"loss": result.loss, "gradient_norm": result.gradient_norm, **result.figures}
    texts = {name: str(value) for name, value in figures.items()}
    disk.append_line(path, json.dumps({"step": step} | texts | {"samples": samples}))
    wrong = [f", {name} {value}" for name, value in result.figures.items() if not math.isfinite(value)]
    names = [entry["id"] + (f" at t = {entry['timestep']}" if "timestep" in entry else "") for entry in samples]
    more = f" and {len(samples) - MAX_NAMES} more" if len(samples) > MAX_NAMES else ""
    return printable(
        f"step {step} was skipped: its loss is {result.loss} and its gradient norm {result.gradient_norm}"
        f"{''.join(wrong)} ({', '.join(names[:MAX_NAMES])}{more}); weights, optimizer and EMA are unchanged"
    )


# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later.
EXIT_CODE = 75
# A launcher may repeat a signal that the terminal has already sent to all of its processes.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """A signal stopped the run, and nothing is unsaved."""


class Interruption:
    """Whether this process received a signal, and whether the present work may be aborted.

    If it `may_abort`, a signal raises `Stopped` at once; otherwise it is only recorded. A second SIGINT exits at once:
    files on disk are always complete.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the received signal
        self.may_abort = True  # before training has started, and while a model is validated or sampled
        self._since = 0.0
        self._process = 0

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle both signals inside the block; main thread only."""
        self.requested, self.may_abort, self._process = None, True, os.getpid()
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = None

    @contextmanager
    def abortable(self, allowed: bool) -> Iterator[None]:
        """A block that may be aborted, or may not."""
        before, self.may_abort = self.may_abort, allowed
        try:
            if allowed and self.requested is not None:
                raise Stopped
            yield
        finally:
            self.may_abort = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent ends it
            return
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
            action = "stopping" if self.may_abort else "finishing the step and saving it"
            _write(f"{self.requested}: {action} (Ctrl-C again exits at once)")
            if self.may_abort:
                raise Stopped
        elif number == signal.SIGINT and now - self._since > SAME_SIGNAL_SECONDS:
            _write("exiting at once; the newest checkpoint is valid")
            os._exit(128 + number)


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be closed
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())  # the signal may have interrupted a print


interruption = Interruption()
