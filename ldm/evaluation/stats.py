"""Confidence intervals: Student, Wilson, jackknife and bootstrap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NORMAL_95 = 1.959964  # quantile: 95 % of a normal distribution lie within so many standard deviations
JACKKNIFE_GROUPS = 20


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    mean: float
    low: float
    high: float


def student_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of independent measurements, such as over seeds or images.

    ValueError for fewer than two values, or a confidence outside (0, 1).
    """
    if len(values) < 2:
        raise ValueError(f"there is {len(values)} value; an interval needs at least 2")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half_width = student_quantile(confidence, len(values) - 1) * error
    return Interval(mean, mean - half_width, mean + half_width)


@cache
def student_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """The t with P(|T| < t) = confidence, for Student's distribution.

    With t = √ν tan θ the density is cos^(ν−1) θ on (−π/2, π/2): trapezoids on a fine grid give seven digits.
    """
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angles.cos().pow(degrees_of_freedom - 1), angles)
    mass = mass / mass[-1]  # [200000], at angles[1:]
    index = int(torch.searchsorted(mass, confidence))
    below = float(mass[index - 1]) if index else 0.0
    weight = (confidence - below) / (float(mass[index]) - below)
    return math.sqrt(degrees_of_freedom) * math.tan(float(torch.lerp(angles[index], angles[index + 1], weight)))


def wilson_interval(fraction: float, count: float) -> Interval:
    """Wilson's 95 % interval for a fraction, 0 to 1, of `count` independent samples; valid near 0 and 1 too."""
    z = NORMAL_95
    middle = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half_width = z / (1 + z * z / count) * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
    # At 0 and 1 the ends are exact except for rounding.
    low, high = max(middle - half_width, 0.0), min(middle + half_width, 1.0)
    return Interval(fraction, low if fraction > 0 else 0.0, high if fraction < 1 else 1.0)


def fraction_interval(hits: Tensor, groups: Tensor | None = None) -> Interval:
    """The fraction of `hits` (0 or 1, float [N]) with Wilson's 95 % interval.

    Members of a group (int64 [N]) are correlated, so N is divided by the design effect: the variance of the fraction
    over groups, relative to that of N independent hits, if it is larger. Where all hits are equal the effect is
    unknown, and N is the number of groups.
    """
    count, fraction = len(hits), float(hits.mean())
    effective = float(count)
    if groups is not None:
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, hits.double() - fraction)
        present = len(groups.unique())
        independent = count * fraction * (1 - fraction)
        if independent > 0 and present > 1:
            grouped = float(sums.square().sum()) * present / (present - 1) * (count - 1) / count
            effective = min(max(count * independent / max(grouped, 1e-12), 1.0), count)
        else:
            effective = present
    return wilson_interval(fraction, round(effective))


def beta_binomial_tail(count: int, total: int, below: int, above: int) -> float:
    """P(X >= count), for X of `total` new values below the `below`-th of below + above − 1 old ones.

    If all have one distribution, X is beta-binomial: this accounts for the threshold being a sample itself.
    """

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    logs = (
        log_beta(x + below, total - x + above) - log_beta(x + 1, total - x + 1) for x in range(count, total + 1)
    )  # C(n, k) = 1 / ((n + 1) B(k + 1, n − k + 1))
    constant = math.log(total + 1) + log_beta(below, above)
    return min(math.fsum(math.exp(log - constant) for log in logs), 1.0)


def jackknife_variance(leave_one_out: Tensor) -> float:
    """The variance of an estimate from its values without each sample, or without each group: float64 [n]."""
    return (len(leave_one_out) - 1) * float(leave_one_out.var(unbiased=False))


def bootstrap_interval(estimate: float, resampled: Tensor) -> Interval:
    """The percentile interval: the middle 95 % of an estimate on resampled data, float64 [B]."""
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high)
