"""How near generated images are to real ones: Fréchet distance, KID, precision and recall, with a yardstick.

None of these numbers has a scale of its own. So each is also measured for held-out images, which are as good as images
can be that are not the training images themselves, and it stands beside what it was measured on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.data import generator
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.few_samples import frechet_interval, frechet_ratio
from ldm.evaluation.frechet import Interval
from ldm.evaluation.kid import kid
from ldm.evaluation.precision import precision_recall

MINIMUM = 50
"""Generated, or training images, below which nothing is measured: with 25 OpenMoji the Fréchet ratio of real images to
real ones is 1 within ±0.20, which hides a blur of a pixel (1.11 to 1.21); with 50 it is ±0.15, and a share such as
precision is known to ±0.14 at worst."""

Images = Literal["generated", "held-out"]


@dataclass(frozen=True)
class Figure:
    """One number with all that it stands on.

    Attributes:
        name: "FID" for what is FID and nothing else.
        value, low, high: with the ends of its 95 % interval.
        images: which images were measured.
        samples: how many of them, N.
        yardstick: held-out images that the number is a ratio to, or None; they are as many.
        reference_samples: how many images of the training split they were compared with, M.
        features: label of the features, with their number and the resize.
    """

    name: str
    value: float
    low: float
    high: float
    images: Images
    samples: int
    yardstick: int | None
    reference_samples: int
    features: str

    def line(self) -> str:
        """The number and what it stands on, in one line."""
        measured = f"{self.samples:,} {self.images}"
        if self.yardstick:
            measured += f" over {self.yardstick:,} held-out"
        return (
            f"{self.name:<17} {self.value:9.4g}  ({self.low:.4g} to {self.high:.4g})  {measured} against "
            f"{self.reference_samples:,} training images, {self.features}"
        )


@dataclass(frozen=True)
class Figures:
    """What is measured of one kind of images, against the training images.

    Attributes:
        frechet: the distance itself; None where images or training images are not more than the feature dimension.
        kid, precision: on all images.
        recall: on as many generated as held-out images, since it grows with their number.
    """

    frechet: Figure | None
    kid: Figure
    precision: Figure
    recall: Figure


@dataclass(frozen=True)
class Quality:
    """The figures of generated images, those of held-out images as their yardstick, and why some are missing.

    Attributes:
        features: label of the features.
        frechet_ratio: distance to the training images over that of as many held-out images; None without these.
        left_out: a sentence for what is None, with what it would need.
    """

    features: str
    frechet_ratio: Figure | None
    generated: Figures
    held_out: Figures | None
    left_out: tuple[str, ...]

    def figures(self) -> list[Figure]:
        """Those that there are, a generated one before its yardstick."""
        sides = [self.generated] if self.held_out is None else [self.generated, self.held_out]
        found = [self.frechet_ratio]
        found += [getattr(side, field.name) for field in fields(Figures) for side in sides]
        return [figure for figure in found if figure is not None]

    def lines(self) -> list[str]:
        """For the terminal: a line a figure, then a line for each that is left out."""
        return [figure.line() for figure in self.figures()] + list(self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"left_out": list(self.left_out)}


def quality(
    generated: Tensor, training: Tensor, held_out: Tensor | None, space: FeatureSpace, *, seed: int = 0
) -> Quality:
    """Measures features of generated images [N, D] against those of training images [M, D].

    held_out: features [H, D] of images that the model was not trained on; None leaves out what needs a yardstick.
    space: what the features were taken with.
    seed: of the subsets that are drawn where one side has more images than the other.

    Raises:
        ValueError: for fewer than 50 generated or training images, features of another space, and features that are
            not finite.
    """
    _check(generated, training, held_out, space)
    found = 0 if held_out is None else len(held_out)
    left_out: list[str] = []
    if held_out is None or found < MINIMUM:
        held_out = None
        left_out.append(
            f"Left out: the Fréchet ratio and all figures of held-out images, of which there are {found}; at least "
            f"{MINIMUM} are needed, to show how good the other figures can be."
        )
    equal = len(generated) if held_out is None else min(len(generated), found)
    measure = _Measurement(training, space, equal, seed)
    return Quality(
        features=space.label(),
        frechet_ratio=None if held_out is None else measure.ratio(generated, held_out),
        generated=measure.figures(generated, "generated"),
        held_out=None if held_out is None else measure.figures(held_out, "held-out"),
        left_out=(*left_out, *measure.too_few(generated, held_out)),
    )


def frechet_name(space: FeatureSpace) -> str:
    """What the Fréchet distance in a space is called."""
    return "FID" if space.is_fid else "Fréchet distance"


def _check(generated: Tensor, training: Tensor, held_out: Tensor | None, space: FeatureSpace) -> None:
    for name, features in (("generated", generated), ("training", training), ("held-out", held_out)):
        if features is None:
            continue
        if features.ndim != 2 or features.shape[1] != space.dimensions:
            raise ValueError(
                f"features of the {name} images have shape {list(features.shape)}; {space.name} features are "
                f"[images, {space.dimensions}]"
            )
        if name != "held-out" and len(features) < MINIMUM:
            raise ValueError(
                f"there are {len(features)} {name} images; at least {MINIMUM} are needed, as the intervals say little "
                "below that"
            )


@dataclass(frozen=True)
class _Measurement:
    """Features of the training images, and N' for what depends on the number of images."""

    training: Tensor
    space: FeatureSpace
    equal: int
    seed: int

    def figures(self, features: Tensor, images: Images) -> Figures:
        count, shares = len(features), precision_recall(features, self.training)
        recall = shares.recall
        if self.equal < count:
            order = generator(self.seed, "recall", images).permutation(count)[: self.equal]
            recall = precision_recall(features[torch.from_numpy(order)], self.training).recall
        frechet = None
        if self._enough(features):
            frechet = self._figure(frechet_name(self.space), frechet_interval(features, self.training), images, count)
        return Figures(
            frechet=frechet,
            kid=self._figure("KID", kid(features, self.training), images, count),
            precision=self._figure("precision", shares.precision, images, count),
            recall=self._figure("recall", recall, images, self.equal),
        )

    def ratio(self, generated: Tensor, held_out: Tensor) -> Figure:
        interval = frechet_ratio(generated, held_out, self.training, seed=self.seed)
        return self._figure("Fréchet ratio", interval, "generated", self.equal, yardstick=self.equal)

    def too_few(self, generated: Tensor, held_out: Tensor | None) -> list[str]:
        """Why there is no Fréchet distance of generated, or of held-out images."""
        return [
            f"Left out: the Fréchet distance of {len(features):,} {images} images to {len(self.training):,} training "
            f"images; at {self.space.dimensions:,} features an image it needs at least "
            f"{self.space.dimensions + 1:,} of both, or it is mostly what is missing."
            for features, images in ((generated, "generated"), (held_out, "held-out"))
            if features is not None and not self._enough(features)
        ]

    def _enough(self, features: Tensor) -> bool:
        return min(len(features), len(self.training)) > self.space.dimensions

    def _figure(
        self, name: str, interval: Interval, images: Images, samples: int, yardstick: int | None = None
    ) -> Figure:
        return Figure(
            name=name,
            value=interval.mean,
            low=interval.low,
            high=interval.high,
            images=images,
            samples=samples,
            yardstick=yardstick,
            reference_samples=len(self.training),
            features=self.space.label(),
        )
