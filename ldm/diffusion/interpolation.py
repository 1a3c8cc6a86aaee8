"""Between two samples of noise. DDIM (arXiv:2010.02502), section 5.3 and appendix D.5."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical linear interpolation: on the arc between two points instead of the chord.

    Noise of many dimensions lies near a sphere of radius √N. Halfway along the chord it is 1/√2 as long, which
    no network was trained on; on the arc it keeps its length.

    Args:
        start, end: of one shape; each is one point, whatever its shape.
        fraction: 0 (exactly `start`) to 1 (exactly `end`).

    Raises:
        ValueError: for opposite points, between which no arc is shorter than another.
    """
    if fraction in (0, 1):
        return end if fraction else start
    a, b = start.cpu().double(), end.cpu().double()  # some devices have no float64
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if float(angle) > torch.pi - 1e-6:
        raise ValueError("the two points are opposite each other; no arc between them is the shortest")
    if float(angle) < 1e-6:  # the limit, where sin(θ) is 0
        return torch.lerp(a, b, fraction).to(start)
    weights = (torch.sin((1 - fraction) * angle), torch.sin(fraction * angle))
    return ((weights[0] * a + weights[1] * b) / torch.sin(angle)).to(start)
