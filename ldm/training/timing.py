"""Short measurements before the first step: what the parts of a run cost on this machine, with this data."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm.data import Batch, CaptionedImages, collate
from ldm.data.captions import plural
from ldm.training import threads
from ldm.training.finetune import precision_of
from ldm.training.nonfinite import StepLosses
from ldm.training.optimizer import adamw
from ldm.training.plan import format_bytes
from ldm.training.report import write_report
from ldm.training.run import Run
from ldm.training.training_state import TrainingState

ENOUGH_SECONDS = 1.0
MOST_REPEATS = 30
TIMED_SECONDS = 0.2  # of what the number of threads is chosen by: a part of a step, where that is slow
WRITTEN_BYTES = 2**24
# An optimizer takes time in proportion to the parameters, so that it is timed on some of them: timing must not need
# more memory than training.
TIMED_PARAMETERS = 2**24


def choose_threads(run: Run, networks: TrainingState, passes: Callable[[int], Callable[[], object]]) -> None:
    """Measures with how many threads this run computes, where that is open: once, and before anything is encoded.

    Args:
        passes: `passes(n)()` takes n images forward and back, as a step does; what it leaves behind is dropped.
    """
    if run.threads is None or run.threads.number is not None:
        return
    train = run.config.train

    def seconds(call: Callable[[], object]) -> float:
        took = threads.timed_call(call, run.accelerator)
        networks.discard_gradients()
        return took

    one = passes(1)
    seconds(one)
    micro_batch = train.batch_size // train.gradient_accumulation_steps // run.accelerator.num_processes
    count = max(1, min(micro_batch, int(TIMED_SECONDS / seconds(one))))
    several = passes(count)
    what = f"{plural(count, 'image')} forward and back"
    run.set_threads(threads.measure_threads(run.threads, lambda: seconds(several), what))


def step_seconds(
    run: Run,
    model: nn.Module,
    networks: TrainingState,
    images: CaptionedImages,
    losses_of: Callable[[nn.Module, Batch], StepLosses],
) -> float:
    """Seconds of an optimizer step: reading, forward, backward, AdamW and the moving average.

    Args:
        model: the network as the script calls it, `networks.model` or what accelerate put around it.

    Nothing is left behind: gradients are dropped, and the optimizer that is timed works on tensors of its own.
    """
    train = run.config.train
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))
    # Loading is spread over the worker processes.
    loading = _seconds(run, lambda: collate([images[position] for position in positions]))
    batch = collate([images[position] for position in positions])

    def forward_and_backward() -> None:
        losses_of(model, batch).backward(run.accelerator)

    try:
        learning = _seconds(run, forward_and_backward)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a micro-batch of {len(positions)} images does not fit into the memory of {run.device} "
            f"({str(error).splitlines()[0]}); raise train.gradient_accumulation_steps, or set "
            "train.gradient_checkpointing=true"
        ) from error
    updating = _update_seconds(run, networks)
    networks.discard_gradients()
    micro = max(learning, loading / train.num_workers) if train.num_workers else learning + loading
    return micro * train.gradient_accumulation_steps + updating


def _update_seconds(run: Run, networks: TrainingState) -> float:
    """Of clipping, AdamW and the moving average. The gradients that are there are scaled."""
    learning = networks.learning
    scratch: list[nn.Parameter] = []
    for parameter in learning:
        if not scratch or sum(p.numel() for p in scratch) + parameter.numel() <= TIMED_PARAMETERS:
            scratch.append(nn.Parameter(torch.zeros_like(parameter)))
            scratch[-1].grad = torch.zeros_like(parameter)
    averages = [torch.zeros_like(parameter) for parameter in scratch]
    optimizer = adamw([{"params": scratch}])

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.data for parameter in scratch], 0.1)

    def clip_and_look_up() -> None:
        nn.utils.clip_grad_norm_(learning, 1.0)
        for module in (networks.model, networks.ema.module):  # in small networks, that they are walked through counts
            list(module.parameters())
            list(module.buffers())

    share = sum(p.numel() for p in scratch) / networks.trainable_parameters
    return _seconds(run, update) / share + _seconds(run, clip_and_look_up)


@torch.no_grad()
def evaluation_seconds(
    run: Run, network: nn.Module, images: CaptionedImages, losses_of: Callable[[nn.Module, Batch], object]
) -> float:
    """Seconds of one evaluation of a network for one image, without gradients, in a batch."""
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))
    batch = collate([images[position] for position in positions])
    with precision_of(network):
        return _seconds(run, lambda: losses_of(network, batch), together=False) / len(positions)


def grid_seconds(draw: Callable[[int], object], steps: int) -> float:
    """Seconds of a sample grid: `draw(s)` draws one with s sampling steps, and is called with few, not with `steps`.

    That also shows what memory a grid takes.
    """
    shortest = seconds_of(lambda: draw(1))
    if shortest < ENOUGH_SECONDS:  # what a first call does besides would count
        shortest = seconds_of(lambda: draw(1))
    if steps == 1:
        return shortest
    few = min(steps, 1 + max(1, int(ENOUGH_SECONDS / shortest)))
    return shortest + (steps - 1) * max(0.0, seconds_of(lambda: draw(few)) - shortest) / (few - 1)


def write_seconds(folder: Path, written: int, hashed: int) -> float:
    """Seconds to write and sync `written` bytes in a folder and to hash `hashed` ones, from a sample of 16 MB."""
    block = os.urandom(WRITTEN_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

            writing = seconds_of(write)
    except OSError as error:  # writing does not say where
        raise OSError(
            error.errno, f"cannot write {format_bytes(WRITTEN_BYTES)} there: {error.strerror}", str(folder)
        ) from None
    hashing = seconds_of(lambda: hashlib.sha256(block).hexdigest())
    return (writing * written + hashing * hashed) / WRITTEN_BYTES


def checkpoint_seconds(run: Run, written: int, linked: int = 0) -> float:
    """Seconds of a checkpoint of `written` bytes beside hard links to `linked` ones; all are hashed, and the report is
    renewed.
    """
    return write_seconds(run.folder, written, written + linked) + seconds_of(lambda: write_report(run.folder))


def seconds_of(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_memory(run: Run, networks: TrainingState) -> int:
    """Bytes that this process will hold at the peak: those that it has held at most so far, after steps without an
    optimizer, and the two moments of AdamW where they are not there yet. Of the GPU, or else of main memory.
    """
    moments = 0 if networks.optimizer.state else 8 * networks.trainable_parameters
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) + moments
    try:
        import resource
    except ImportError:  # Windows, which keeps the peak where psutil finds it
        import psutil

        return int(psutil.Process().memory_info().peak_wset) + moments
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + moments


def _seconds(run: Run, action: Callable[[], object], together: bool = True) -> float:
    """The mean time of a call. Processes that make it `together` wait for each other inside, so all repeat it as
    often. There are never more repetitions than steps to come.
    """
    alone = run.accelerator.num_processes == 1 or not together
    most = max(1, min(MOST_REPEATS if alone else 3, run.config.train.max_steps - run.step))
    action()
    times: list[float] = []
    while not times or (len(times) < most and (not alone or sum(times) < _enough(len(times)))):
        _finish(run.device)
        started = time.perf_counter()
        action()
        _finish(run.device)
        times.append(time.perf_counter() - started)
    return sum(times) / len(times)  # a run is a sum of fast and slow ones too


def _enough(repeats: int) -> float:
    """Seconds after which no more is measured: a single call may have met another program on the machine."""
    return ENOUGH_SECONDS if repeats >= 3 else 10 * ENOUGH_SECONDS


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
