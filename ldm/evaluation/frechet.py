"""The Fréchet distance between two sets of features, and an interval around what is measured over seeds.

FID (arXiv:1706.08500) is this distance on the features of one Inception network and tens of thousands of images. On
other features, or on fewer images, the number is another one: it is never called FID here, and two of them compare
only where features, reference and number of samples are the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NORMAL_95 = 1.959964  # standard deviations on both sides that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """From features [N, D] of any floating dtype.

        Raises:
            ValueError: for any other shape, for numbers that are not finite, and for D samples or fewer: their
                covariance is singular whatever they show, so that most of a distance would be the missing samples.
        """
        values = _finite(features)
        count, dimensions = values.shape
        if count <= dimensions:
            raise ValueError(
                f"there are {count} samples of {dimensions} features each; their covariance needs at least "
                f"{dimensions + 1}: give more samples, or project the features to fewer dimensions"
            )
        return cls(values.mean(dim=0), torch.cov(values.T).view(dimensions, dimensions))


def check_features(features: Tensor, reference: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Two sets of the same features [N, D] and [M, D], as float64 on the CPU.

    Raises:
        ValueError: for other shapes, numbers that are not finite, and fewer than `least` samples on a side.
    """
    one, other = _finite(features), _finite(reference)
    if one.shape[1] != other.shape[1]:
        raise ValueError(_unlike(one.shape[1], other.shape[1]))
    if min(len(one), len(other)) < least:
        raise ValueError(f"there are {len(one)} samples against {len(other)}; give at least {least} on either side")
    return one, other


def _finite(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"features have shape {list(features.shape)}; they must be [samples, dimensions]")
    values = features.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{int((~values.isfinite()).any(dim=1).sum())} of {len(values)} samples have features that "
            "are not finite; look at the pictures they come from"
        )
    return values


def _unlike(one: int, other: int) -> str:
    return f"the two sets have {one} and {other} features a sample; they must be the same features"


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The distance of Gaussians fitted to features [N, D] and reference [M, D]; ValueError as in `Gaussian.fit`."""
    return distance_between(Gaussian.fit(features), Gaussian.fit(reference))


def distance_between(one: Gaussian, other: Gaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½): arXiv:1706.08500, Eq. 6; at least 0.

    Σ₁ Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and not negative: no square root of a general
    matrix is taken, which can fail or turn complex where a covariance is nearly singular.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(_unlike(len(one.mean), len(other.mean)))
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # [D, D]
    product = root @ other.covariance @ root
    # What is below 0 in the eigenvalues, or in the sum, is rounding.
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    squares = (one.mean - other.mean).square().sum()
    return max(float(squares + one.covariance.trace() + other.covariance.trace() - 2 * shared), 0.0)


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def interval_over(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of what was measured with independent seeds (or on independent images).

    It says how far another set of seeds may lie. What all of them share (the trained model, the bias that N samples
    give a Fréchet distance) it does not see.

    Raises:
        ValueError: for fewer than two values, or a confidence outside (0, 1).
    """
    if len(values) < 2:
        raise ValueError(f"there is {len(values)} value; an interval needs at least 2 seeds")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = student_quantile(confidence, len(values) - 1) * error
    return Interval(mean, mean - reach, mean + reach)


@cache
def student_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence, for Student's distribution with `freedom` degrees of freedom.

    With t = √ν tan θ the density is cos^(ν−1) θ on (−π/2, π/2), which is smooth and bounded: the trapezoids of a fine
    grid are right to seven digits.
    """
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    share = torch.cumulative_trapezoid(angles.cos().pow(freedom - 1), angles)
    share = share / share[-1]  # [200000], at angles[1:]
    index = int(torch.searchsorted(share, confidence))
    below = float(share[index - 1]) if index else 0.0
    part = (confidence - below) / (float(share[index]) - below)
    return math.sqrt(freedom) * math.tan(float(torch.lerp(angles[index], angles[index + 1], part)))
