"""Reading digits: are pictures of digits the digits that were asked for?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import DIGIT_WORDS, Sample
from ldm.data.builtin import digit_captions
from ldm.pipelines import Pipeline
from ldm.text import ignore_cut_prompts


@dataclass(frozen=True)
class DigitReader:
    """A support vector classifier fitted to real scans, on 8×8 greys whatever the size of the picture."""

    classifier: Any

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> DigitReader:
        """Fits to training samples of the `digits` data."""
        from sklearn.svm import SVC

        classifier = SVC(C=10, gamma=0.001)  # for greys 0 to 16, the range of the scans
        return cls(classifier.fit(_greys(sample.load() for sample in samples), [label(s) for s in samples]))

    def accuracy(self, pictures: Iterable[Image.Image], digits: Sequence[int]) -> float:
        """Share of the pictures that are read as the digit beside them, 0 to 1."""
        return float(np.mean(self.classifier.predict(_greys(pictures)) == np.asarray(digits)))


def label(sample: Sample) -> int:
    """The digit 0 to 9 that a sample of the `digits` data shows, from its first caption."""
    return DIGIT_WORDS.index(sample.captions[0].rsplit(" ", 1)[-1])


def draw_digits(
    pipeline: Pipeline, each: int, *, num_inference_steps: int, at_once: int = 100
) -> tuple[list[Image.Image], list[int]]:
    """`each` pictures of every digit, over all its phrasings in turn, and the digits asked for; seeds 0, 1, …"""
    digits = [digit for digit in range(10) for _ in range(each)]
    prompts = [digit_captions(digit)[i % len(digit_captions(digit))] for digit in range(10) for i in range(each)]
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        with ignore_cut_prompts():
            pictures += pipeline(chunk, seed=start, num_inference_steps=num_inference_steps).images
    return pictures, digits


def _greys(pictures: Iterable[Image.Image]) -> np.ndarray:
    small = [picture.convert("L").resize((8, 8), Image.Resampling.BOX) for picture in pictures]
    return np.stack([np.asarray(picture, dtype=np.float64).ravel() * (16 / 255) for picture in small])  # [N, 64]
