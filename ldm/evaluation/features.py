"""What distances between sets of images are measured on: functions from images in [−1, 1] to features [B, D].

A number measured on one kind of features says nothing about another kind, nor about the same network on images resized
in another way: `FeatureSpace` carries both, and its label stands beside every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data import to_uint8
from ldm.evaluation.clip import load_clip
from ldm.evaluation.efficientnet import DIMENSIONS as EFFICIENTNET_DIMENSIONS
from ldm.evaluation.efficientnet import EfficientNetLite0
from ldm.evaluation.inception import DIMENSIONS as INCEPTION_DIMENSIONS
from ldm.evaluation.inception import SIZE as INCEPTION_SIZE
from ldm.evaluation.inception import load_inception

Features = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [−1, 1], C 1 or 3 → features [B, D], float64."""

PIXEL_DIMENSIONS = 64
GRID, GRADIENT_GRID = 8, 4
EFFICIENTNET_SIZE = 128
"""Chosen by how far OpenMoji of 64 pixels move that are made worse: the Fréchet distance of 50 held-out images to 300
training images, over that of the same images unharmed. The time is that of one image on one thread.

    resize                     64    128    224
    blur of 1 pixel          1.01   1.11   1.14
    blur of 2 pixels         1.09   1.36   1.46
    noise of 0.05            1.21   1.25   1.12
    JPEG, quality 50         1.03   1.06   1.10
    JPEG, quality 15         1.01   1.21   1.24
    turned upside down       0.99   1.02   0.99
    tiles of 16 pixels mixed 1.76   1.62   1.42
    flags only               1.29   1.23   1.32
    milliseconds                3     11     90

At 64 pixels blur and JPEG hardly show; 224 shows little more than 128, for eight times its time. None sees what is
upside down, and all see noise that people hardly notice.
"""
IMAGES_AT_ONCE = 16  # fastest on a CPU (11 ms an image at 128 pixels; 17 with 32), and memory stays small at 299


@dataclass(frozen=True)
class FeatureSpace:
    """Images as points, in which distances are measured.

    Attributes:
        name: "efficientnet", "pixel", "inception" or "clip".
        dimensions: D.
        resize: the side in pixels and the filter that `extract` brings images to, such as "128 bicubic"; or "none".
        extract: images [B, 3, H, W] in [−1, 1], on any device → features [B, D].
        title: what the features are called in print.
    """

    name: str
    dimensions: int
    resize: str
    extract: Callable[[Tensor], Tensor]
    title: str = ""

    @property
    def is_fid(self) -> bool:
        """Whether the Fréchet distance in this space is the FID of arXiv:1706.08500."""
        return self.name == "inception" and self.dimensions == INCEPTION_DIMENSIONS

    def label(self) -> str:
        """Such as "EfficientNet-Lite0 features (1280, images resized to 128 bicubic)"."""
        resized = "not resized" if self.resize == "none" else f"resized to {self.resize}"
        return f"{self.title or self.name} features ({self.dimensions}, images {resized})"

    def of(self, images: Iterable[Tensor]) -> Tensor:
        """Batches of images [B, 3, H, W] in [−1, 1] → features [N, D], float64 on the CPU.

        Sizes may differ between batches.

        Raises:
            ValueError: if there are none, for other shapes, and for images that are not floats in [−1, 1].
        """
        parts: list[Tensor] = []
        with torch.no_grad():
            for batch in images:
                _check_images(batch)
                parts += [self.extract(chunk).to("cpu", torch.float64) for chunk in batch.split(IMAGES_AT_ONCE)]
        if not parts:
            raise ValueError("there are no images to take features of; give at least one batch")
        return torch.cat(parts)


def feature_space(
    name: str = "efficientnet", *, device: torch.device, weights: Path | str | None = None
) -> FeatureSpace:
    """One of four spaces; nothing is downloaded but the weights of CLIP, where a tag of open_clip names them.

    name:
        "efficientnet": the 1280 pooled features of EfficientNet-Lite0, which come with packages, on images resized to
            128 pixels (bicubic, antialiased): see `EFFICIENTNET_SIZE`.
        "pixel": `pixel_features`, without any network.
        "inception": the 2048 pooled features of FID's network, on images rounded to 256 levels and resized as it
            resizes them. The Fréchet distance on these, and only on these, is FID.
        "clip": the image embeddings of an open_clip model, before they are brought to length 1: in the kernel of KID
            a length of 1 would leave nothing but the linear term.
    device: where the network computes.
    weights: for "inception" the path of its weights; for "clip" MODEL:TAG or MODEL:PATH.safetensors.

    Raises:
        ValueError: for another name, weights that are missing, not needed or not the known ones, and missing packages.
    """
    if name not in _SPACES:
        raise ValueError(f'there are no features "{name}"; choose one of {", ".join(_SPACES)}')
    if weights is not None and name in _WITHOUT_WEIGHTS:
        raise ValueError(f'features "{name}" take no weights, but {weights} is given; leave it out')
    return _SPACES[name](device, "" if weights is None else str(weights))


def _efficientnet(device: torch.device, _: str) -> FeatureSpace:
    network = EfficientNetLite0().to(device)

    def extract(images: Tensor) -> Tensor:
        return network(resized(images.to(device, torch.float32), EFFICIENTNET_SIZE))

    resize = f"{EFFICIENTNET_SIZE} bicubic"
    return FeatureSpace("efficientnet", EFFICIENTNET_DIMENSIONS, resize, extract, "EfficientNet-Lite0")


def _pixel(device: torch.device, _: str) -> FeatureSpace:
    # On the CPU, since some devices have no float64; the work is small.
    return FeatureSpace("pixel", PIXEL_DIMENSIONS, "none", lambda images: pixel_features(images.cpu()))


def _inception(device: torch.device, weights: str) -> FeatureSpace:
    network: nn.Module = load_inception(weights).to(device)

    def extract(images: Tensor) -> Tensor:
        return network(to_uint8(images.to(device, torch.float32)))

    resize = f"{INCEPTION_SIZE} bilinear as TensorFlow 1"
    return FeatureSpace("inception", INCEPTION_DIMENSIONS, resize, extract, "Inception v3")


def _clip(device: torch.device, weights: str) -> FeatureSpace:
    clip = load_clip(weights, device)
    return FeatureSpace("clip", clip.dimensions, clip.resize, clip.embed_images, f"CLIP {clip.name}")


_SPACES: dict[str, Callable[[torch.device, str], FeatureSpace]] = {
    "efficientnet": _efficientnet,
    "pixel": _pixel,
    "inception": _inception,
    "clip": _clip,
}
_WITHOUT_WEIGHTS = ("efficientnet", "pixel")


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] → [B, 3, side, side]: bicubic and antialiased, clamped to the range again."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be floats [B, 3, H, W] in [-1, 1]")
    largest = float(images.abs().max()) if images.numel() else 0.0
    if not largest <= 1 + 1e-3:  # also where it is not a number
        raise ValueError(f"images reach {largest:g}; they must be in [-1, 1], with no number that is not finite")


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
