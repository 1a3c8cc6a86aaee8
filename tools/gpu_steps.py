"""Runs a training script as it is, and writes how long its optimizer steps took.

    python -m tools.gpu_steps FILE STEPS SCRIPT ARGUMENTS...

Time goes from the end of one optimizer step to the end of the next. After STEPS of them FILE gets a JSON object, and
the script ends there: what it saves at last is not waited for.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Enough(BaseException):
    """Ends the script; no exception that it could catch as one of its own."""


class Clock:
    """Marks the ends of optimizer steps. Events of CUDA wait for nothing, so the script runs as fast as without them.

    Attributes:
        held: bytes on the card between two steps: weights, moments and average, without gradients.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[Any] = []
        self.held = 0

    def mark(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        cuda = torch.cuda.is_initialized()
        if not self.marks and cuda:
            torch.cuda.reset_peak_memory_stats()
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.held = torch.cuda.memory_allocated() - sum(grad.nbytes for grad in gradients)
        if cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        if len(self.marks) > self.steps:
            raise Enough

    def figures(self) -> dict[str, Any]:
        """Milliseconds of each step, and on a card the bytes that a step needs above what is held anyway."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not torch.cuda.is_initialized():
            return {"milliseconds": [1000 * (end - start) for start, end in pairs]}
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self.held
        return {"milliseconds": [start.elapsed_time(end) for start, end in pairs], "peak_bytes_above_weights": peak}


def main() -> None:
    file, steps, script, *arguments = sys.argv[1:]
    clock = Clock(int(steps))
    hook = register_optimizer_step_post_hook(clock.mark)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except Enough:
        Path(file).write_text(json.dumps(clock.figures()))
        return
    finally:
        hook.remove()
    raise SystemExit(f"{script} ended after {len(clock.marks)} optimizer steps; {clock.steps + 1} were needed")


if __name__ == "__main__":
    main()
