"""Short measurements before the first step: what the parts of a run cost on this machine, with this data."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.data import Batch, CaptionedImages, collate
from ldm.training.finetune import precision_of
from ldm.training.run import Run

ENOUGH_SECONDS = 1.0
MOST_REPEATS = 12
WRITTEN_BYTES = 2**24


def step_seconds(
    run: Run, model: nn.Module, images: CaptionedImages, loss_of: Callable[[nn.Module, Batch], Tensor]
) -> float:
    """Seconds of an optimizer step: reading, forward, backward, AdamW and the moving average.

    Nothing is left behind: gradients are dropped, and the optimizer that is timed works on tensors of its own.
    """
    train = run.config.train
    (positions,) = [next(iter(run.micro_batches(images, run.step, run.step + 1)))]
    # Loading is spread over the worker processes.
    loading = _seconds(run, lambda: collate([images[position] for position in positions]))
    batch = collate([images[position] for position in positions])

    def forward_and_backward() -> None:
        loss_of(model, batch).backward()

    learning = _seconds(run, forward_and_backward)
    model.zero_grad(set_to_none=True)
    micro = max(learning, loading / train.num_workers) if train.num_workers else learning + loading
    return micro * train.gradient_accumulation_steps + _optimizer_seconds(run, model)


def _optimizer_seconds(run: Run, model: nn.Module) -> float:
    scratch = [nn.Parameter(torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]
    averages = [torch.zeros_like(parameter) for parameter in scratch]
    for parameter in scratch:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(scratch)

    @torch.no_grad()
    def update() -> None:
        nn.utils.clip_grad_norm_(scratch, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, [parameter.data for parameter in scratch], 0.1)

    return _seconds(run, update)


@torch.no_grad()
def evaluation_seconds(
    run: Run, network: nn.Module, images: CaptionedImages, loss_of: Callable[[nn.Module, Batch], Tensor]
) -> float:
    """Seconds of one evaluation of a network for one image, without gradients, in a batch."""
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))
    batch = collate([images[position] for position in positions])
    with precision_of(network):
        return _seconds(run, lambda: loss_of(network, batch), together=False) / len(positions)


def write_seconds(folder: Path, size: int) -> float:
    """Seconds to write, sync and hash `size` bytes in a folder, from a sample of 16 MB."""
    block = os.urandom(WRITTEN_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        hashlib.sha256(block).hexdigest()
        return (time.perf_counter() - started) * size / WRITTEN_BYTES


def seconds_of(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most so far: of the GPU where it computes there, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seconds(run: Run, action: Callable[[], object], together: bool = True) -> float:
    """The median time of a call. Processes that make it `together` wait for each other inside, so all repeat it as
    often.
    """
    alone = run.accelerator.num_processes == 1 or not together
    action()
    times: list[float] = []
    while not times or (len(times) < (MOST_REPEATS if alone else 3) and (not alone or sum(times) < ENOUGH_SECONDS)):
        _finish(run.device)
        started = time.perf_counter()
        action()
        _finish(run.device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
