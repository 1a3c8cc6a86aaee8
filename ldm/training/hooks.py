"""What a launcher adds to training. The training loops know these types alone, and run without any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ldm.config import LDMConfig
from ldm.data import CaptionedImages
from ldm.pipelines import Pipeline
from ldm.training.run import Run


class SampleEvaluator(Protocol):
    """Evaluates `samples` generated images of a pipeline: `ldm.training.evaluator.Evaluator`."""

    samples: int

    def __call__(self, pipeline: Pipeline) -> Mapping[str, float]:
        """Values to log."""

    def seconds(self, size: tuple[int, int]) -> float:
        """Seconds of all but generation, for images of this (height, width)."""


@dataclass(frozen=True)
class Hooks:
    """What plugs into a run of training."""

    # (the config with "auto" resolved by the training images, the reason or None); before there is a run.
    resolve: Callable[[LDMConfig, CaptionedImages, torch.device], tuple[LDMConfig, str | None]] | None = None
    # Measures what the parts of a run cost, and logs its plan, before the first step; called with parts of the loop.
    estimate: Callable[..., None] | None = None
    # Makes the evaluator of generated images, before the model is made.
    evaluate: Callable[[Run], SampleEvaluator] | None = None
    on_checkpoint: Callable[[Path], Path | None] = lambda folder: None  # as in `Run`
