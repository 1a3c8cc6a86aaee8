"""With how many threads a run on the CPU computes: what its user says, else what it began with, else what is fastest.

More threads are not always faster: each waits for the others many times a step, and where another program has one of
the cores all of them do. The number changes how sums are rounded, so that a run keeps the one that it began with.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from ldm.cores import usable_cores

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # of two that differ torch takes the second
ROUNDS, ENOUGH_SECONDS = 5, 3.0
TOO_SLOW = 4.0  # times as slow as another number, in its first call: measured no more
# So much slower may a smaller number be, and is taken all the same: it leaves cores to others and does not wait.
MARGIN = 1.1


@dataclass(frozen=True)
class Threads:
    """How many threads a process of the run computes with.

    Args:
        number: None while it is open.
        most: of which to choose: cores for each process, and no more than torch was told.
        why: what decided, in words.
    """

    number: int | None
    most: int
    why: str = ""

    def __str__(self) -> str:
        return f"{self.number}, {self.why}"


def available_threads() -> Threads:
    """What the environment says of this process; asked before any library has changed the number of torch.

    `OMP_NUM_THREADS` and `MKL_NUM_THREADS` decide. Without them the number is open; processes on one machine share
    its cores.
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    cores = max(1, usable_cores() // max(1, sharing))
    if _is_of_the_launcher():
        return Threads(None, cores)
    said = [name for name in THREAD_VARIABLES if re.fullmatch(r"\s*0*[1-9]\d*\s*(,.*)?", os.environ.get(name, ""))]
    if said:
        return Threads(torch.get_num_threads(), cores, f"as {said[-1]} says")
    return Threads(None, min(cores, torch.get_num_threads()))


def _is_of_the_launcher() -> bool:
    """Whether `OMP_NUM_THREADS=1` is what `accelerate launch` and `torchrun` set where their user says nothing."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or os.environ.get(THREAD_VARIABLES[0]) != "1" or THREAD_VARIABLES[1] in os.environ:
        return False
    try:
        launcher = psutil.Process(os.getppid())
        asked = THREAD_VARIABLES[0] in launcher.environ() or "num_cpu_threads" in " ".join(launcher.cmdline())
    except psutil.Error:  # of another user
        return False
    return not asked


def resolve_threads(found: Threads, configured: int | None, begun_with: int | None) -> Threads:
    """What is known before anything is computed.

    Args:
        found: by `allowed`.
        configured: `train.cpu_threads`, which comes first.
        begun_with: by the run that is resumed; a user who says another number means that one.
    """
    if configured is not None:
        beside = f" ({found.why.removeprefix('as ')} {found.number})" if found.number not in (None, configured) else ""
        return Threads(configured, found.most, f"as train.cpu_threads says{beside}")
    if found.number is not None:
        return found
    if begun_with is not None:
        return Threads(min(begun_with, found.most), found.most, "as the run began")
    if found.most == 1:
        return Threads(1, 1, "for there is one core for this process")
    return found


def agree_on_threads(found: Threads, accelerator: Accelerator) -> Threads:
    """The same in all processes: the smallest number where any of them has one, else the smallest share."""
    if accelerator.num_processes == 1:
        return found
    own = torch.tensor([[found.number or 0, found.number or found.most]], device=accelerator.device)
    extract = accelerator.gather(own)  # [P, 2]
    assert isinstance(extract, torch.Tensor)
    decided, least = bool(extract[:, 0].any()), int(extract[:, 1].min())
    return Threads(least, found.most, found.why) if decided else Threads(None, least)


def measure_threads(found: Threads, seconds: Callable[[], float], what: str) -> Threads:
    """Chooses a number that is still open: the smallest that is about as fast as any. Torch has another afterwards.

    Args:
        seconds: makes a call and says how long it took. Processes that call together are told the same.
        what: that is, in words.
    """

    def seconds_with(number: int) -> float:
        torch.set_num_threads(number)
        return seconds()

    medians = median_seconds(candidates(found.most), seconds_with)
    measured = ", ".join(f"{median:.2g} s with {count}" for count, median in medians.items())
    return Threads(smallest_fast_enough(medians), found.most, f"measured: {measured} ({what})")


def candidates(most: int) -> list[int]:
    """Numbers to try, ascending: 1, and a quarter, a half and all of the cores."""
    return sorted({1, max(1, most // 4), max(1, most // 2), most})


def median_seconds(counts: list[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Number of threads → median seconds of a call with it; all are called in turn, so that they meet the same machine.

    One that is hopeless in its first call, which no median counts otherwise, is not called again.
    """
    first = {count: seconds(count) for count in counts}
    times = {count: [] if once < TOO_SLOW * min(first.values()) else [once] for count, once in first.items()}
    going = [count for count in counts if not times[count]]
    for rounds in range(1, 1 + (ROUNDS if len(going) > 1 else 1)):
        for count in going:
            times[count].append(seconds(count))
        if sum(sum(times[count]) for count in going) > ENOUGH_SECONDS * (1 if rounds >= 3 else 10):
            break  # of fewer than three the median is no better than the mean
    return {count: statistics.median(measured) for count, measured in times.items()}


def smallest_fast_enough(medians: Mapping[int, float]) -> int:
    """The smallest number of threads that is about as fast as the fastest."""
    return min(count for count, median in medians.items() if median <= MARGIN * min(medians.values()))


def timed_call(action: Callable[[], object], accelerator: Accelerator | None = None) -> float:
    """Seconds of a call; where several processes make it together, those of the main process in each."""
    started = time.perf_counter()
    action()
    took = time.perf_counter() - started
    if accelerator is None or accelerator.num_processes == 1:
        return took
    told = torch.tensor(took if accelerator.is_main_process else 0.0, dtype=torch.float64, device=accelerator.device)
    summed = accelerator.reduce(told, "sum")
    return float(summed)
