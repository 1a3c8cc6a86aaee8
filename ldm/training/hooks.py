"""What a launcher adds to training. The training loops know these types alone, and run without any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn

from ldm.config import LDMConfig
from ldm.data import Batch, CaptionedImages
from ldm.pipelines import Pipeline
from ldm.training.checkpoints import TrainingState
from ldm.training.distributed import StepLosses
from ldm.training.run import Run

LossesOf = Callable[[nn.Module, Batch], StepLosses]


class SampleEvaluator(Protocol):
    """Evaluates `samples` generated images of a pipeline: `ldm.training.evaluator.Evaluator`."""

    samples: int

    def __call__(self, pipeline: Pipeline) -> Mapping[str, float]:
        """Values to log."""

    def seconds(self, size: tuple[int, int]) -> float:
        """Seconds of all but generation, for images of this (height, width)."""


@dataclass(frozen=True)
class Workload:
    """The parts of a run, for an estimate of its cost."""

    task: str  # what is trained, in words
    network: nn.Module  # as the loop calls it
    phases: Sequence[tuple[int, TrainingState, LossesOf]]  # number, state and losses of the remaining steps, in order
    validate: Callable[[nn.Module, Batch], object]
    validated: int  # images per validation; 0 without held-out images
    grid: Callable[[int], Image.Image]  # makes a sample grid with a number of sampling steps
    export_bytes: int  # of an export without its frozen components
    grid_steps: int = 1
    grid_samples: int = 1
    frozen: Path | None = None  # folder of these components, if an export has any
    exported: int = 0  # images that `encode` is called with for each export
    encode: Callable[[nn.Module, Batch], object] = lambda network, batch: None
    evaluator: SampleEvaluator | None = None  # of generated images of `sample_size`
    sample_size: tuple[int, int] = (0, 0)
    keeps_best: bool = False


@dataclass(frozen=True)
class Hooks:
    """What plugs into a run of training."""

    # (the config with "auto" resolved by the training images, the reason or None); before there is a run.
    resolve: Callable[[LDMConfig, CaptionedImages, torch.device], tuple[LDMConfig, str | None]] | None = None
    # Measures what the parts of a run cost, and logs its plan, before the first step.
    estimate: Callable[[Run, TrainingState, Workload], None] | None = None
    # Makes the evaluator of generated images, before the model is made.
    evaluate: Callable[[Run], SampleEvaluator] | None = None
    on_checkpoint: Callable[[Path], Path | None] = lambda folder: None  # as in `Run`
