"""Evaluation of generated images during training."""

from __future__ import annotations

import time
from functools import cached_property

import torch

from ldm.config import LDMConfig
from ldm.evaluation.evaluate import (
    Evaluation,
    GeneratedImages,
    check_samples,
    evaluate_pipeline,
    measure_generated,
    select_captions,
)
from ldm.evaluation.features import feature_space
from ldm.evaluation.fidelity import MIN_IMAGES
from ldm.evaluation.images import Reference, subset
from ldm.evaluation.verdict import baselines_of
from ldm.pipelines import Pipeline
from ldm.training.report import metric_name
from ldm.training.resume import VERDICT
from ldm.training.run import Run

# Features take 17 ms per image: a minute and a half before a run.
REFERENCE_IMAGES = 5000


class Evaluator:
    """Generates `train.evaluation_samples` images with the settings of `sample` and compares them with the data. Raises
    ValueError before training, for too few samples or a missing package.

    Captions and noise are the same each time, so that steps compare and a resumed run measures the same.

    At most 5,000 training and held-out images of the run are compared with, chosen by its seed.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        assert isinstance(config, LDMConfig)
        train = config.train
        try:
            check_samples(train.evaluation_samples)
        except ValueError as error:
            raise ValueError(f"train.evaluation_{error}") from None
        self.samples, self.seed = train.evaluation_samples, config.seed
        self._run = run
        self._space = feature_space(train.evaluation_features, device=run.device)

    @cached_property
    def reference(self) -> Reference:
        """The images to compare with and their features, computed on first access."""
        images, held_out = (
            part and subset(part, REFERENCE_IMAGES, self.seed)
            for part in (self._run.data.train, self._run.data.held_out)
        )
        assert images is not None
        return Reference.from_data(images, held_out, self._space, log=self._run.print)

    def __call__(self, pipeline: Pipeline) -> dict[str, float]:
        """Values to log. Prints the verdict and logs it as JSON."""
        found = evaluate_pipeline(pipeline, self.reference, samples=self.samples, seed=self.seed, with_loss_gap=False)
        self._run.print(f"step {self._run.step}: {found.verdict.sentence}")
        self._run.log_json({VERDICT: vars(found.verdict)})
        return log_values(found, self._space.name)

    def seconds(self, size: tuple[int, int]) -> float:
        """Seconds of all but generation, measured with noise in place of images of this (height, width)."""
        reference = self.reference
        rng = torch.Generator().manual_seed(0)  # its own: a plan must not change the random numbers of a run
        noise = tuple(
            GeneratedImages(
                side,
                tuple(captions),
                tuple(indices),
                torch.randint(0, 256, (len(indices), 3, *size), generator=rng).byte(),
            )
            for side, (captions, indices) in select_captions(reference, self.samples, self.seed).items()
        )
        if len(reference.features) >= MIN_IMAGES:
            baselines_of(reference, self.samples, size, self.seed)  # evaluations share it
        started = time.perf_counter()
        measure_generated(noise, reference, seed=self.seed, sampling={})
        return time.perf_counter() - started


def log_values(found: Evaluation, features: str) -> dict[str, float]:
    """The values of an evaluation, with names that contain their number of samples and features."""
    values: dict[str, float] = {}
    if found.fidelity is not None:
        metrics = {"frechet_ratio": found.fidelity.frechet_ratio, **vars(found.fidelity.generated)}
        for name, metric in metrics.items():
            if metric is not None:
                values[metric_name(name, samples=metric.samples, features=features)] = metric.value
    for side in found.generated:
        name, count = side.side.replace("-", "_"), len(side.captions)
        recall = found.retrieval[side.side].within[10].mean
        values[metric_name(f"within_10_{name}", samples=count, features=features)] = recall
        if side.side in found.digit_accuracy:
            values[metric_name(f"read_as_asked_{name}", samples=count)] = found.digit_accuracy[side.side].mean
    if found.copying is not None:
        flagged = found.copying.flagged_fraction
        values[metric_name("suspected_copies", samples=flagged.total)] = flagged.fraction
    return values
