"""Evaluation of generated images during training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property

import torch

from ldm.config import LDMConfig
from ldm.data import CaptionedImages
from ldm.evaluation.controls import yardstick_of
from ldm.evaluation.evaluate import Asked, Evaluation, captions_wanted, check_samples, evaluate, measure
from ldm.evaluation.features import feature_space
from ldm.evaluation.quality import MINIMUM
from ldm.evaluation.reference import Reference, some_of
from ldm.pipelines import Pipeline
from ldm.training.report.names import VERDICT, name_of
from ldm.training.run import Run

# Features take 17 ms per image: a minute and a half before a run.
REFERENCE_IMAGES = 5000


class Evaluator:
    """Generates `train.evaluation_samples` images with the settings of `sample` and compares them with the data.

    Captions and noise are the same each time, so that steps compare and a resumed run measures the same.

    Args:
        images, held_out: at most 5,000 of each are compared with, chosen by the run's seed.

    Raises:
        ValueError: before training, for too few samples or a missing package.
    """

    def __init__(self, config: LDMConfig, images: CaptionedImages, held_out: CaptionedImages | None, run: Run) -> None:
        train = config.train
        try:
            check_samples(train.evaluation_samples)
        except ValueError as error:
            raise ValueError(f"train.evaluation_{error}") from None
        self.samples, self.seed = train.evaluation_samples, config.seed
        self._images, self._held_out, self._run = images, held_out, run
        self._space = feature_space(train.evaluation_features, device=run.device)

    @cached_property
    def reference(self) -> Reference:
        """The images to compare with and their features, computed on first access."""
        images, held_out = (
            part and some_of(part, REFERENCE_IMAGES, self.seed) for part in (self._images, self._held_out)
        )
        assert images is not None
        return Reference.of(images, held_out, self._space, print=self._run.print)

    def __call__(self, pipeline: Pipeline) -> dict[str, float]:
        """Values to log. Prints the verdict and logs it as JSON."""
        found = evaluate(pipeline, self.reference, samples=self.samples, seed=self.seed, with_loss_gap=False)
        self._run.print(f"step {self._run.step}: {found.verdict.sentence}")
        self._run.log_json({VERDICT: vars(found.verdict)})
        return log_values(found, self._space.name)

    def seconds(self, size: tuple[int, int]) -> float:
        """Seconds of all but generation, measured with noise in place of images of this (height, width)."""
        reference = self.reference
        rng = torch.Generator().manual_seed(0)  # its own: a plan must not change the random numbers of a run
        noise = tuple(
            Asked(side, tuple(captions), tuple(own), torch.randint(0, 256, (len(own), 3, *size), generator=rng).byte())
            for side, (captions, own) in captions_wanted(reference, self.samples, self.seed).items()
        )
        if len(reference.features) >= MINIMUM:
            yardstick_of(reference, self.samples, size, self.seed)  # evaluations share it
        started = time.perf_counter()
        measure(noise, reference, seed=self.seed, how={})
        return time.perf_counter() - started


def log_values(found: Evaluation, features: str) -> dict[str, float]:
    """The values of an evaluation, with names that contain their number of samples and features."""
    values: dict[str, float] = {}
    if found.quality is not None:
        generated = found.quality.generated
        fields: Mapping[str, object] = {"frechet_ratio": found.quality.frechet_ratio, **vars(generated)}
        for name, figure in fields.items():
            if figure is not None:
                values[name_of(name, samples=figure.samples, features=features)] = figure.value  # type: ignore[attr-defined]
    for side in found.asked:
        name, count = side.side.replace("-", "_"), len(side.captions)
        recall = found.found[side.side].within[10].mean
        values[name_of(f"within_10_{name}", samples=count, features=features)] = recall
        if side.side in found.read:
            values[name_of(f"read_as_asked_{name}", samples=count)] = found.read[side.side].mean
    if found.copies is not None:
        copies = found.copies.suspects
        values[name_of("suspected_copies", samples=copies.total)] = copies.share
    return values
