"""Whether pictures are near to the data at all: nearer than noise, the mean image, and images of it that are blurred.

Precision alone does not tell. What lies in the middle of the data is inside the balls of real images, and noise may lie
in the ball of one odd image: on photographs noise had a precision of 1. Recall alone does not tell either: one odd
picture among noise has a ball that reaches far. So pictures count as near as the lesser of the two lets them, each as a
share of what unseen real images have, and they have to be clearly nearer than every control.

KID does not decide: its scale is that of the features. On pixel features of OpenMoji the mean image has 0.014, less
than many a model, and noise on photographs 0.27, less than other images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.evaluation.faithfulness import Retrieval
from ldm.evaluation.frechet import Interval

# Of the way from the nearest control to unseen real images: from here on pictures are taken for those of a model. Other
# images than those of the data came to 0.26 at most, held-out images through a first stage to 0.5 and more.
PART_OF_THE_WAY = 0.25
# Where features hardly tell a control from unseen images, it does not count for more: on pixel features of photographs,
# blurred images come to half of the way and, of 50 photographs, to nearly all of it.
MOST_OF_A_CONTROL = 0.5
ENOUGH_DISTINCT = 25
NEAREST = 10

Kind = Literal["far", "between", "near", "few"]


@dataclass(frozen=True)
class Shares:
    """Precision and recall against the training images, 0 to 1.

    Attributes:
        precision: of all `samples`; its interval is that of the distinct ones.
        recall: of the distinct ones, as pictures that repeat each other have balls without a size.
        distinct: how many of the samples are no near-duplicates of one before them.
    """

    precision: Interval
    recall: Interval
    distinct: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"precision": vars(self.precision), "recall": vars(self.recall)}


@dataclass(frozen=True)
class Standing:
    """Where pictures stand between what is none of the data and what is.

    Attributes:
        generated, unseen: of the pictures, and of real images that `reference_samples` do not hold.
        controls: name → of what is no model of the data: noise, the mean image, blurred images.
        reference_samples: how many training images all of these were compared with.
        found: side → retrieval of the pictures' own images.
    """

    generated: Shares
    unseen: Shares
    controls: Mapping[str, Shares]
    reference_samples: int
    found: Mapping[str, Retrieval]

    @property
    def kind(self) -> Kind:
        """- far: no nearer than a control; or clearly nearer, but not by much, and captions lead nowhere;
        - few: not far, but nearly all pictures repeat each other;
        - near: clearly a part of the way to unseen images, or about that and captions lead to their images;
        - between: neither is clear.
        """
        control = max((self._share(shares, "mean") for shares in self.controls.values()), default=0.0)
        control = min(control, MOST_OF_A_CONTROL)
        least = control + PART_OF_THE_WAY * (1 - control)
        low, share, high = (self._share(self.generated, end) for end in ("low", "mean", "high"))
        if (low <= control and share < least) or (high < least and not self.led_by_captions):
            return "far"
        if self._few:
            return "few"
        if low > least or (high >= least and self.led_by_captions):
            return "near"
        return "between"

    @property
    def led_by_captions(self) -> bool:
        """Whether the own images of the captions of one side rank above chance, by both figures of retrieval."""
        return any(
            found.within[NEAREST].low > found.chance[NEAREST] and found.median.high < found.median_by_chance
            for found in self.found.values()
        )

    @property
    def _few(self) -> bool:
        of_real = self.unseen.distinct / self.unseen.samples * self.generated.samples
        return self.generated.distinct < max(min(ENOUGH_DISTINCT, of_real / 2), of_real / 4)

    def _share(self, shares: Shares, end: str) -> float:
        """Of what unseen images have, 1 at most: the lesser of precision and recall."""
        parts = []
        for name in ("precision", "recall"):
            real = getattr(self.unseen, name).mean
            parts.append(getattr(getattr(shares, name), end) / real if real > 0 else 1.0)
        return float(min(*parts, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the retrieval, for JSON."""
        return {
            "kind": self.kind,
            "generated": self.generated.to_dict(),
            "unseen": self.unseen.to_dict(),
            "controls": {name: shares.to_dict() for name, shares in self.controls.items()},
            "reference_samples": self.reference_samples,
        }
