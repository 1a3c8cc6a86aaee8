"""Short timings before the first step: what the parts of a run cost on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm.data import Batch, CaptionedImages, collate
from ldm.data.captions import plural
from ldm.models import FirstStage, UNet
from ldm.training.distributed import StepLosses
from ldm.training.plan import format_bytes
from ldm.training.report import write_report
from ldm.training.run import Run
from ldm.training.threads import measure_threads, timed_call
from ldm.training.trainable import adamw, weight_precision
from ldm.training.training_state import TrainingState

MIN_SECONDS = 1.0
MAX_REPEATS = 30
TRIAL_SECONDS, TRIAL_REPEATS = 2.0, 3
THREADS_SECONDS = 0.2  # of one call while the number of threads is chosen; a part of a step if that is slow
WRITTEN_BYTES = 2**24
# The time of an optimizer is proportional to its parameters, so only some are timed: timing must not need more memory
# than training.
TIMED_PARAMETERS = 2**24


# ---- before there is a run


def unet_seconds(
    unet: UNet, shape: tuple[int, int, int], text: tuple[int, int], batch: int, device: torch.device, precision: str
) -> float:
    """Seconds of forward and backward for `batch` latents of a shape (C, h, w).

    Args:
        text: (tokens, width) of the text states.
        precision: "no" or "bf16", as `train.mixed_precision`.
    """
    return _trial_seconds(unet_pass(unet, shape, text, batch, device, precision), unet, device)


def unet_pass(
    unet: nn.Module,
    shape: tuple[int, int, int],
    text: tuple[int, int],
    batch: int,
    device: torch.device,
    precision: str,
) -> Callable[[], None]:
    """A function that runs forward and backward on random inputs."""
    latents = torch.randn(batch, *shape, device=device)
    states = torch.randn(batch, *text, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)

    def forward_and_backward() -> None:
        autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = unet(latents, timesteps, states).float().square().mean()
        loss.backward()

    return forward_and_backward


def autoencoder_seconds(autoencoder: FirstStage, resolution: int, batch: int, device: torch.device) -> float:
    """Seconds of forward and backward for `batch` square images."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    return _trial_seconds(lambda: autoencoder(images)[0].square().mean().backward(), autoencoder, device)


def _trial_seconds(action: Callable[[], None], network: nn.Module, device: torch.device) -> float:
    """Median of a few calls, without the first unless it is the only one."""
    times: list[float] = []
    while len(times) < 1 + TRIAL_REPEATS and sum(times) < TRIAL_SECONDS:
        started = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - started)
        network.zero_grad(set_to_none=True)
    return statistics.median(times[1:] or times)


# ---- of a run


def choose_threads(run: Run, state: TrainingState, training_pass: Callable[[int], Callable[[], object]]) -> None:
    """Measure the best number of CPU threads if it is undecided: once, before anything is encoded.

    Args:
        training_pass: `training_pass(n)()` runs forward and backward on n images, as a step does.
    """
    if run.threads is None or run.threads.number is not None:
        return
    train = run.config.train

    def seconds(call: Callable[[], object]) -> float:
        measured = timed_call(call, run.accelerator)
        state.discard_gradients()
        return measured

    single = training_pass(1)
    seconds(single)
    micro_batch = train.batch_size // train.gradient_accumulation_steps // run.accelerator.num_processes
    count = max(1, min(micro_batch, int(THREADS_SECONDS / seconds(single))))
    several = training_pass(count)
    what = f"{plural(count, 'image')} forward and back"
    run.set_threads(measure_threads(run.threads, lambda: seconds(several), what))


def step_seconds(
    run: Run,
    model: nn.Module,
    state: TrainingState,
    images: CaptionedImages,
    losses_of: Callable[[nn.Module, Batch], StepLosses],
) -> float:
    """Seconds of an optimizer step: loading, forward, backward, AdamW and EMA. Changes no state.

    Args:
        model: the network as the script calls it: `state.model`, or what accelerate wrapped around it.
    """
    train = run.config.train
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))
    loading = _mean_seconds(run, lambda: collate([images[position] for position in positions]))
    batch = collate([images[position] for position in positions])

    def forward_and_backward() -> None:
        losses_of(model, batch).backward(run.accelerator)

    try:
        learning = _mean_seconds(run, forward_and_backward)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a micro-batch of {len(positions)} images does not fit into the memory of {run.device} "
            f"({str(error).splitlines()[0]}); raise train.gradient_accumulation_steps, or set "
            "train.gradient_checkpointing=true"
        ) from error
    updating = _update_seconds(run, state)
    state.discard_gradients()
    # Worker processes load in parallel.
    micro = max(learning, loading / train.num_workers) if train.num_workers else learning + loading
    return micro * train.gradient_accumulation_steps + updating


def _update_seconds(run: Run, state: TrainingState) -> float:
    """Seconds of clipping, AdamW and EMA. Scales the present gradients."""
    trainable = state.trainable
    scratch: list[nn.Parameter] = []
    for parameter in trainable:
        if not scratch or sum(p.numel() for p in scratch) + parameter.numel() <= TIMED_PARAMETERS:
            scratch.append(nn.Parameter(torch.zeros_like(parameter)))
            scratch[-1].grad = torch.zeros_like(parameter)
    averages = [torch.zeros_like(parameter) for parameter in scratch]
    optimizer = adamw([{"params": scratch}])

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.data for parameter in scratch], 0.1)

    def clip_and_traverse() -> None:
        nn.utils.clip_grad_norm_(trainable, 1.0)
        for module in (state.model, state.ema.module):  # traversing the modules takes time in small networks
            list(module.parameters())
            list(module.buffers())

    fraction = sum(p.numel() for p in scratch) / state.trainable_parameters
    return _mean_seconds(run, update) / fraction + _mean_seconds(run, clip_and_traverse)


@torch.no_grad()
def evaluation_seconds(
    run: Run, network: nn.Module, images: CaptionedImages, losses_of: Callable[[nn.Module, Batch], object]
) -> float:
    """Seconds per image of one evaluation of a network on a batch, without gradients."""
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))
    batch = collate([images[position] for position in positions])
    with weight_precision(network):
        return _mean_seconds(run, lambda: losses_of(network, batch), collective=False) / len(positions)


def grid_seconds(draw: Callable[[int], object], steps: int) -> float:
    """Seconds of a sample grid, extrapolated from grids of fewer sampling steps.

    Args:
        draw: makes a grid with the given number of sampling steps.
    """
    shortest = timed_call(lambda: draw(1))
    if shortest < MIN_SECONDS:  # without the overhead of a first call
        shortest = timed_call(lambda: draw(1))
    if steps == 1:
        return shortest
    few = min(steps, 1 + max(1, int(MIN_SECONDS / shortest)))
    return shortest + (steps - 1) * max(0.0, timed_call(lambda: draw(few)) - shortest) / (few - 1)


def write_seconds(folder: Path, written: int, hashed: int) -> float:
    """Seconds to write and sync `written` bytes in a folder and to hash `hashed` bytes, measured on 16 MB."""
    block = os.urandom(WRITTEN_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

            writing = timed_call(write)
    except OSError as error:  # its own message names no folder
        raise OSError(
            error.errno, f"cannot write {format_bytes(WRITTEN_BYTES)}: {error.strerror}", str(folder)
        ) from None
    hashing = timed_call(lambda: hashlib.sha256(block).hexdigest())
    return (writing * written + hashing * hashed) / WRITTEN_BYTES


def checkpoint_seconds(run: Run, written: int, linked: int = 0) -> float:
    """Seconds of a checkpoint of `written` bytes and `linked` bytes of hard links, all hashed, and of the report."""
    return write_seconds(run.folder, written, written + linked) + timed_call(lambda: write_report(run.folder))


def peak_memory(run: Run, state: TrainingState) -> int:
    """Estimated peak bytes of this process on the GPU, else in main memory: the peak so far, and the two moments of
    AdamW if they do not exist yet.
    """
    moments = 0 if state.optimizer.state else 8 * state.trainable_parameters
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) + moments
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + moments


def _mean_seconds(run: Run, action: Callable[[], object], collective: bool = True) -> float:
    """Mean seconds of a call. Processes repeat a `collective` call equally often, at most once per remaining step."""
    alone = run.accelerator.num_processes == 1 or not collective
    max_repeats = max(1, min(MAX_REPEATS if alone else 3, run.config.train.max_steps - run.step))
    action()
    times: list[float] = []
    # A single call may coincide with the load of another program, so a slow one is repeated too.
    while not times or (
        len(times) < max_repeats and (not alone or sum(times) < MIN_SECONDS * (1 if len(times) >= 3 else 10))
    ):
        _synchronize(run.device)
        started = time.perf_counter()
        action()
        _synchronize(run.device)
        times.append(time.perf_counter() - started)
    return sum(times) / len(times)  # not the median: a run is a sum of fast and slow calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
