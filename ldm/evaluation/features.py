"""What a Fréchet distance is measured on: functions from images [B, C, H, W] in [−1, 1] to features [B, D]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Features = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [−1, 1], C 1 or 3 → features [B, D], float64."""

PIXEL_DIMENSIONS = 64
GRID, GRADIENT_GRID = 8, 4


def pixel_features(images: Tensor) -> Tensor:
    """What can be had without any network: colours and edges, as 64 random directions. [B, 1 or 3, H, W] → [B, 64].

    Colours are averaged to 8×8 places, the sizes of vertical and horizontal differences to 4×4; orthonormal directions,
    the same at every call, make 64 numbers of these 224, so that a few hundred images are enough for a covariance.
    Blind to what a picture means: a distance on them sees noise, blur, wrong colours and missing variety.

    Raises:
        ValueError: for images below 8×8.
    """
    if min(images.shape[-2:]) < GRID:
        raise ValueError(
            f"images are {images.shape[-2]}x{images.shape[-1]}; pixel features need at least {GRID}x{GRID}"
        )
    images = images.to(torch.float64).expand(-1, 3, -1, -1)
    grey = images.mean(dim=1, keepdim=True)  # [B, 1, H, W]
    parts = [F.adaptive_avg_pool2d(images, GRID)]
    parts += [F.adaptive_avg_pool2d(grey.diff(dim=axis).abs(), GRADIENT_GRID) for axis in (-2, -1)]
    described = torch.cat([part.flatten(1) for part in parts], dim=1)  # [B, 224]
    return described @ random_directions(described.shape[1], PIXEL_DIMENSIONS)


def random_directions(dimensions: int, kept: int) -> Tensor:
    """[dimensions, kept] orthonormal columns, always the same ones; float64."""
    drawn = torch.randn(dimensions, kept, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@dataclass(frozen=True)
class DigitFeatures:
    """The last hidden layer, 32 numbers, of a small classifier of 8×8 scans of digits.

    The reader of `evaluation.digits` is a support vector machine, which has no layer to take features from; its
    kernel would compare pixels again. This network of 64, 64 and 32 units is trained to tell the ten digits apart, so
    its last layer knows shapes.

    Attributes:
        layers: (weight [in, out], bias [out]) of the hidden layers, float64.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def fit(cls, images: Tensor, digits: Sequence[int]) -> DigitFeatures:
        """Fits to scans [N, C, H, W] in [−1, 1] and the digits that they show; the same at every call."""
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier((64, 32), alpha=1e-2, max_iter=1000, random_state=0)
        network.fit(_greys(images).numpy(), np.asarray(digits))
        weights = [torch.from_numpy(weight) for weight in network.coefs_[:-1]]
        return cls(tuple(zip(weights, map(torch.from_numpy, network.intercepts_[:-1]), strict=True)))

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [−1, 1] → [B, 32]."""
        hidden = _greys(images)  # [B, 64]
        for weight, bias in self.layers:
            hidden = F.relu(hidden @ weight + bias)
        return hidden


def _greys(images: Tensor) -> Tensor:
    grey = images.to(torch.float64).mean(dim=1, keepdim=True)  # [B, 1, H, W]
    return F.adaptive_avg_pool2d(grey, GRID).flatten(1)  # [B, 64]
