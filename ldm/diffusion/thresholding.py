"""Dynamic thresholding of a predicted x_0, for models of pixels. Imagen (arXiv:2205.11487), section 2.3."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dynamic_threshold(percentile: float) -> Callable[[Tensor], Tensor]:
    """A `clip_x0` for samplers: x̂_0 is clamped to [−s, s] and divided by s, where s is a percentile of |x̂_0|.

    s is that of each sample, and never less than 1: an image that keeps to its range is only clamped to it. Where a
    static clamp would saturate what guidance pushes past the range, this pulls all pixels inwards.

    Args:
        percentile: p, in (0, 1]; 0.995 is usual. 1 divides by the largest and clamps nothing else.

    Returns:
        x̂_0 [B, …] on the scale of images, [−1, 1] → the same shape, inside [−1, 1].

    Raises:
        ValueError: if p is outside (0, 1].
    """
    check_percentile(percentile)

    def clip_x0(x_0: Tensor) -> Tensor:
        sorted_ = x_0.to(torch.float32).abs().flatten(1).sort(dim=1).values  # [B, N]
        # torch.quantile does the same, but refuses more than 2^24 numbers.
        place = percentile * (sorted_.shape[1] - 1)
        below, above = sorted_[:, math.floor(place)], sorted_[:, math.ceil(place)]  # [B]
        threshold = torch.lerp(below, above, place - math.floor(place)).clamp(min=1)  # [B]
        s = threshold.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))  # [B, 1, 1, 1]
        return x_0.clamp(-s, s) / s

    return clip_x0


def check_percentile(percentile: float) -> None:
    if not 0 < percentile <= 1:
        raise ValueError(
            f"dynamic_threshold is {percentile}; it must be a share of pixels, over 0 and at most 1 (0.995 is usual)"
        )
