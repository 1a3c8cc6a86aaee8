"""Whether the steps of a run take what was planned; said once, while there is time to do something about it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ldm.training.plan import Plan, duration

FIRST_STEPS = 20
TOO_SLOW = 2.0


class Pace:
    """Compares the first steps after a plan with it.

    Args:
        threads: of a run on the CPU.
        clock: seconds, from any start; `time.perf_counter` by default.
    """

    def __init__(self, plan: Plan, threads: int | None, clock: Callable[[], float] | None = None) -> None:
        self._plan, self._threads, self._clock = plan, threads, clock or time.perf_counter
        self._steps, self._since = 0, 0.0

    def leave_out(self, seconds: float) -> None:
        """Of time that did not go into a step."""
        self._since += seconds

    def step(self) -> str | None:
        """Counts a step that is done. After 20, once: what is to be said where they took more than twice as long.

        The first is not timed: processes that load images start in it.
        """
        self._steps += 1
        if self._steps == 1:
            self._since = self._clock()
        if self._steps != FIRST_STEPS:
            return None
        seconds = (self._clock() - self._since) / (FIRST_STEPS - 1)
        if seconds <= TOO_SLOW * self._plan.seconds_per_step:
            return None
        return slow_step_message(self._plan, seconds, self._threads)


def slow_step_message(plan: Plan, seconds: float, threads: int | None) -> str:
    """A line: how long steps take, what becomes of the time that was planned, and what may be done about it."""
    expected = plan.expected_seconds * seconds / plan.seconds_per_step
    line = (
        f"slower than planned: a step takes {seconds:.2g} s instead of {plan.seconds_per_step:.2g} s, and the run "
        f"about {duration(expected)} instead of {duration(plan.expected_seconds)}; other programs may be using "
        f"{'the GPU' if threads is None else 'the cores'}: end them"
    )
    if threads is not None and threads > 1:
        line += (
            f", or stop this run (Ctrl-C saves it) and go on with fewer threads than its {threads}: OMP_NUM_THREADS=1, "
            "--resume, --accept threads"
        )
    return f"{line}; or make train.max_steps fewer, or train.batch_size smaller in a new run"
