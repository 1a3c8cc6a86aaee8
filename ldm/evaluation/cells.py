"""The cells of a sweep: what was measured at each setting, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldm.evaluation.paired import jackknife_error


@dataclass(frozen=True)
class Grid:
    """What is tried: every guidance scale with every number of steps.

    Raises:
        ValueError: naming the value, for none, for one given twice, and for one out of range.
    """

    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0)
    steps: tuple[int, ...] = (5, 10, 20, 50)

    def __post_init__(self) -> None:
        for name, values in (("guidance_scales", self.guidance_scales), ("steps", self.steps)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} of a sweep are {list(values)}; give at least one, each once")
        for scale in self.guidance_scales:
            if not math.isfinite(scale):
                raise ValueError(f"guidance_scales of a sweep hold {scale}; each must be finite (1 is no guidance)")
        for steps in self.steps:
            if steps < 1:
                raise ValueError(f"steps of a sweep hold {steps}; each must be at least 1")

    def pairs(self) -> list[tuple[float, int]]:
        """(guidance scale, steps), the cheapest first."""
        every = [(float(scale), steps) for scale in self.guidance_scales for steps in self.steps]
        return sorted(every, key=lambda pair: (evaluations_of(*pair), pair))

    def evaluations(self, models: int, count: int) -> int:
        """Of the network, for `count` pictures a cell: what `progress` of `sweep` adds up to, with a sampler that asks
        once a step.
        """
        return models * count * sum(evaluations_of(*pair) for pair in self.pairs())


def evaluations_of(guidance_scale: float, steps: int) -> int:
    """Evaluations of the network for a picture: guidance asks twice a step, with the text and without."""
    return steps * (1 if guidance_scale in (0, 1) else 2)


@dataclass(frozen=True)
class Cell:
    """What was measured at one setting.

    Attributes:
        weights: whose they are: a key of the models of `sweep`.
        evaluations: of the network a picture, as counted.
        seconds: a picture.
        kid: KID to the held-out images asked for; `kid_without` its values without each of these images.
        log_rank: mean of ln(rank of the caption's own image); `log_rank_without` likewise. A mean of logarithms tells
            settings apart with far fewer captions than a median, or the share among the ten nearest.
        near: the share of captions whose rank is at most 10.
    """

    weights: str
    guidance_scale: float
    num_inference_steps: int
    evaluations: float
    seconds: float
    kid: float
    log_rank: float
    near: float
    kid_without: tuple[float, ...]
    log_rank_without: tuple[float, ...]

    @property
    def typical_rank(self) -> float:
        """The geometric mean of the ranks."""
        return math.exp(self.log_rank)

    @property
    def kid_error(self) -> float:
        """The standard error of `kid`. That of a difference of two cells is smaller: `difference`."""
        return jackknife_error(torch.tensor(self.kid_without, dtype=torch.float64))

    @property
    def setting(self) -> tuple[str, float, int]:
        """By which a cell is known among others."""
        return self.weights, self.guidance_scale, self.num_inference_steps

    def named(self) -> str:
        """The setting in words."""
        return f"guidance {self.guidance_scale:g}, {self.num_inference_steps} steps"

    def to_dict(self) -> dict[str, Any]:
        """For a report: without the values that leave out an image."""
        content = {key: value for key, value in asdict(self).items() if not key.endswith("_without")}
        return content | {"kid_error": self.kid_error, "typical_rank": self.typical_rank}


@dataclass(frozen=True)
class Choice:
    """The cell to take of some: `choose`.

    Attributes:
        best: the one with the lowest KID.
        equal: how many cannot be told from the best, in quality and in faithfulness.
        decided: whether any can: else the cheapest is merely the cheapest, and more pictures are needed.
    """

    cell: Cell
    best: Cell
    equal: int
    decided: bool


def choose(cells: Sequence[Cell]) -> Choice:
    """The cheapest cell that cannot be told from the best.

    1. Of all cells, those whose KID is at most one standard error (of the paired difference) above the lowest.
    2. Of these, those whose mean log rank is at most one standard error above the lowest among them.
    3. Of these, the fewest evaluations of the network; the lower KID where they are equal.

    One standard error is the usual measure for taking the simpler of two models (Breiman et al., Classification and
    Regression Trees, 1984): with a 95 % interval, few pictures would let nearly all pass, and the cheapest would win
    for want of evidence.
    """
    best = min(cells, key=lambda cell: cell.kid)
    good = [cell for cell in cells if not _is_above(cell, best, "kid")]
    nearest = min(good, key=lambda cell: cell.log_rank)
    equal = [cell for cell in good if not _is_above(cell, nearest, "log_rank")]
    chosen = min(equal, key=lambda cell: (cell.evaluations, cell.kid))
    return Choice(chosen, best, len(equal), decided=len(equal) < len(cells) or len(cells) == 1)


def difference(one: Cell, other: Cell, figure: str) -> tuple[float, float]:
    """`figure` ("kid" or "log_rank") of one cell less that of another, and its standard error."""
    without = [torch.tensor(getattr(cell, f"{figure}_without"), dtype=torch.float64) for cell in (one, other)]
    return getattr(one, figure) - getattr(other, figure), jackknife_error(without[0] - without[1])


def _is_above(one: Cell, other: Cell, figure: str) -> bool:
    above, error = difference(one, other, figure)
    return above > error


def front(cells: Sequence[Cell]) -> list[Cell]:
    """Those for which no other is as cheap and better, or as good and cheaper; by price, ascending."""
    kept: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.evaluations, cell.kid)):
        if not kept or cell.kid < kept[-1].kid:
            kept.append(cell)
    return kept
