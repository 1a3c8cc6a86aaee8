"""The processes of a run: how they are joined, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from ldm.config import TrainConfig

# The others wait while the main process validates, samples and saves. A process that dies is noticed by the launcher.
PATIENCE = timedelta(days=1)


def join_processes(train: TrainConfig, folder: Path) -> Accelerator:
    """The accelerator of this process.

    Raises:
        ValueError: if not all processes that were launched have found each other.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    no_accelerator = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=no_accelerator and processes > 1,  # else several processes without a GPU do not find each other
        mixed_precision=train.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with="tensorboard",
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes != processes:
        raise ValueError(
            f"{processes} processes were launched but accelerate joined {accelerator.num_processes}; "
            "launch them with torchrun --nproc_per_node, or a single one"
        )
    return accelerator


def sum_over_processes(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """The sums of whole numbers over all processes, the same in each; all have to call this."""
    if accelerator.num_processes == 1:
        return list(values)
    # Whole numbers: float32 would round a step above 2^24.
    summed = accelerator.reduce(torch.tensor(values, dtype=torch.int64, device=accelerator.device), "sum")
    return [int(value) for value in summed.tolist()]
