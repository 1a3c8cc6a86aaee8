"""The number of CPU threads of a run: set by the user, stored by the run, or measured.

More threads are not always faster, since they wait for each other many times per step. The number changes how sums are
rounded, so a run keeps the number it started with.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from ldm.environment import usable_cores

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # if they differ, torch takes the second
ROUNDS, MEASURE_SECONDS = 5, 3.0
MAX_SLOWDOWN = 4.0  # a number that is so much slower in its first call is not measured again
# A smaller number is preferred if it is at most this much slower: it leaves cores to other programs.
MARGIN = 1.1


@dataclass(frozen=True)
class Threads:
    """The number of CPU threads of a process."""

    number: int | None  # None while it is undecided
    max_number: int  # cores per process, at most the number that torch was set to
    reason: str = ""  # what decided

    def __str__(self) -> str:
        return f"{self.number}, {self.reason}"


def available_threads() -> Threads:
    """The threads that `OMP_NUM_THREADS` and `MKL_NUM_THREADS` allow this process; undecided without them. Processes on
    one machine share its cores. Call it before a library changes torch's number.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    cores = max(1, usable_cores() // max(1, processes))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get(THREAD_VARIABLES[0]) == "1" and THREAD_VARIABLES[1] not in os.environ:
        with contextlib.suppress(psutil.Error):  # of another user
            launcher = psutil.Process(os.getppid())
            if THREAD_VARIABLES[0] not in launcher.environ() and "num_cpu_threads" not in " ".join(launcher.cmdline()):
                return Threads(None, cores)  # the default of `accelerate launch` or `torchrun`, not the user's choice
    set_by = [name for name in THREAD_VARIABLES if re.fullmatch(r"\s*0*[1-9]\d*\s*(,.*)?", os.environ.get(name, ""))]
    if set_by:
        return Threads(torch.get_num_threads(), cores, f"as {set_by[-1]} says")
    return Threads(None, min(cores, torch.get_num_threads()))


def resolve_threads(available: Threads, configured: int | None, stored: int | None) -> Threads:
    """The number of threads as far as it is known without measuring: as configured (`train.cpu_threads`), else as the
    environment allows, else as stored by the resumed run.
    """
    if configured is not None:
        overridden = available.number not in (None, configured)
        other = f" ({available.reason.removeprefix('as ')} {available.number})" if overridden else ""
        return Threads(configured, available.max_number, f"as train.cpu_threads says{other}")
    if available.number is not None:
        return available
    if stored is not None:
        return Threads(min(stored, available.max_number), available.max_number, "as the run started")
    if available.max_number == 1:
        return Threads(1, 1, "since there is one core for this process")
    return available


def agree_on_threads(found: Threads, accelerator: Accelerator) -> Threads:
    """The same number in all processes: the smallest decided one, else the smallest maximum. A collective call."""
    if accelerator.num_processes == 1:
        return found
    own = torch.tensor([[found.number or 0, found.number or found.max_number]], device=accelerator.device)
    gathered = accelerator.gather(own)  # [P, 2]
    assert isinstance(gathered, torch.Tensor)
    decided, smallest = bool(gathered[:, 0].any()), int(gathered[:, 1].min())
    return Threads(smallest, found.max_number, found.reason) if decided else Threads(None, smallest)


def measure_threads(available: Threads, seconds: Callable[[], float], what: str) -> Threads:
    """Choose an undecided number: the smallest that is about as fast as any. Changes torch's number. `seconds` times
    `what`, one call; processes that call together get the same result.
    """

    def seconds_with(number: int) -> float:
        torch.set_num_threads(number)
        return seconds()

    cores = available.max_number
    medians = median_seconds(sorted({1, max(1, cores // 4), max(1, cores // 2), cores}), seconds_with)
    number = min(count for count, median in medians.items() if median <= MARGIN * min(medians.values()))
    measured = ", ".join(f"{median:.2g} s with {count}" for count, median in medians.items())
    return Threads(number, cores, f"measured: {measured} ({what})")


def median_seconds(counts: list[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Number of threads → median seconds of a call. All take turns, so that they meet the same load.

    A number that is far too slow in its first call is not measured again.
    """
    first = {count: seconds(count) for count in counts}
    times = {count: [] if once < MAX_SLOWDOWN * min(first.values()) else [once] for count, once in first.items()}
    measured = [count for count in counts if not times[count]]
    for rounds in range(1, 1 + (ROUNDS if len(measured) > 1 else 1)):
        for count in measured:
            times[count].append(seconds(count))
        if sum(sum(times[count]) for count in measured) > MEASURE_SECONDS * (1 if rounds >= 3 else 10):
            break  # with fewer than three the median is no better than the mean
    return {count: statistics.median(values) for count, values in times.items()}


def timed_call(action: Callable[[], object], accelerator: Accelerator | None = None) -> float:
    """Seconds of a call; those of the main process if several processes call together."""
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    if accelerator is None or accelerator.num_processes == 1:
        return seconds
    own = torch.tensor(seconds if accelerator.is_main_process else 0.0, dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(own, "sum"))


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
