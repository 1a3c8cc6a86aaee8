"""What a run measured (`metrics.jsonl`), and what its curves say in one sentence."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.evaluation.memorising import Verdict
from ldm.report.curves import Point
from ldm.training.report.names import VERDICT

LARGEST = 3.4e38  # of float32: what is measured on a network is no larger, unless it is infinite
FEWEST = 5  # measurements before anything is said about their course
WORTH_SAYING = 0.01  # a relative change below this is called none


@dataclass(frozen=True)
class Metrics:
    """The finite values of each figure by rising step.

    Attributes:
        figures: name → (step, value); a step that was measured twice counts with its last value.
        faults: name → the first step at which its value was not finite, and how many there were.
        damaged: lines that are no record, such as one that is just being written.
        verdict: the last one, and its step.
    """

    figures: dict[str, list[Point]]
    faults: dict[str, tuple[int, int]] = field(default_factory=dict)
    damaged: int = 0
    verdict: tuple[int, Verdict] | None = None

    def points(self, name: str) -> list[Point]:
        return self.figures.get(name, [])

    @property
    def last_step(self) -> int:
        """0 where nothing was measured."""
        return max((points[-1][0] for points in self.figures.values()), default=0)


def read_metrics(path: Path) -> Metrics:
    """Reads a `metrics.jsonl` as far as it can be read; none where there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return Metrics({})
    values: dict[str, dict[int, float]] = {}
    unusable: dict[str, list[int]] = {}
    damaged, verdict = 0, None
    for line in lines:
        record = _record(line)
        if record is None:
            damaged += 1
            continue
        step, entry = record
        if VERDICT in entry:
            with suppress(ValueError):
                verdict = (step, Verdict.read(entry[VERDICT]))
        for name, value in entry.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                continue  # a text is no figure
            if value is None or not abs(value) <= LARGEST:
                unusable.setdefault(name, []).append(step)
            else:
                values.setdefault(name, {})[step] = float(value)
    figures = {name: sorted(found.items()) for name, found in values.items()}
    return Metrics(figures, {name: (min(steps), len(steps)) for name, steps in unusable.items()}, damaged, verdict)


def _record(line: bytes) -> tuple[int, dict[str, object]] | None:
    """The step of one line and what was measured, or None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        return None
    return step, {name: value for name, value in entry.items() if name != "step"}


@dataclass(frozen=True)
class Course:
    """Where a figure that should fall is going.

    Attributes:
        kind: "rising" where the mean of the last measurements (three, or a tenth) is above the lowest value; else
            "falling" or "flat" by a straight line through the last third.
        change: relative to the lowest value (rising), or along that line (falling, flat).
        best: step of the lowest value.
        since: the step from which `change` counts.
    """

    kind: Literal["falling", "flat", "rising"]
    change: float
    best: int
    since: int


def course(points: Sequence[Point]) -> Course | None:
    """Where positive values are going, or None where there are too few to tell from their scatter.

    A change counts if it is larger than `WORTH_SAYING` and than what scatter alone would do: about one flat course in
    twenty is called something else.
    """
    if len(points) < FEWEST or min(value for _, value in points) <= 0:
        return None
    values = [value for _, value in points]
    lowest = min(range(len(values)), key=values.__getitem__)
    scatter = _scatter(values)
    recent = max(3, len(values) // 10)
    if len(values) - 1 - lowest >= recent:
        rise = math.fsum(values[-recent:]) / recent - values[lowest]
        # The lowest of n values of a flat course lies √(2 ln n) deviations below it by chance alone.
        chance = scatter * (math.sqrt(2 * math.log(len(values))) + 3 / math.sqrt(recent))
        if rise > max(WORTH_SAYING * values[lowest], chance):
            return Course("rising", rise / values[lowest], points[lowest][0], points[lowest][0])
    window = points[-max(3, math.ceil(len(points) / 3)) :]
    slope, spread = _line(window)
    mean = math.fsum(value for _, value in window) / len(window)
    difference = slope * (window[-1][0] - window[0][0])
    change = difference / max(mean, mean - difference / 2)  # a falling line is measured by where it starts
    clear = change < -WORTH_SAYING and slope < -3 * scatter / math.sqrt(spread)
    return Course("falling" if clear else "flat", change, points[lowest][0], window[0][0])


def _scatter(values: Sequence[float]) -> float:
    """The deviation of single values around their course, robust against a few far ones.

    From third differences, which know nothing of the level, slope and curvature of the course:
    Var[d − 3c + 3b − a] = 20 σ², and the median of the absolute value of a Gaussian is σ / 1.4826.
    """
    fours = zip(values, values[1:], values[2:], values[3:], strict=False)
    off = sorted(abs(d - 3 * c + 3 * b - a) for a, b, c, d in fours)
    return 1.4826 * statistics.median(off) / math.sqrt(20)


def _line(points: Sequence[Point]) -> tuple[float, float]:
    """Slope a step of the least-squares line, and Σ (step − mean)²: the slope's variance is σ² over it."""
    middle = math.fsum(step for step, _ in points) / len(points)
    spread = math.fsum((step - middle) ** 2 for step, _ in points)
    return math.fsum((step - middle) * value for step, value in points) / spread, spread


def training_change(points: Sequence[Point], since: int) -> float | None:
    """Relative change of the noisy training loss from around a step to the end; 0 if within three standard errors.

    None where there are too few values before and after it.
    """
    before = [value for step, value in points if step <= since]
    after = [value for step, value in points if step > since]
    count = min(len(before), len(after), max(10, len(points) // 10))
    if count < FEWEST:
        return None
    first, last = before[-count:], after[-count:]
    means = [math.fsum(part) / count for part in (first, last)]
    variances = [
        math.fsum((v - m) ** 2 for v in part) / (count - 1) for part, m in zip((first, last), means, strict=True)
    ]
    change, error = means[1] - means[0], math.sqrt(sum(variances) / count)
    return change / means[0] if means[0] > 0 and abs(change) > 3 * error else 0.0


def sentence(metrics: Metrics) -> str:
    """What the curves say about the state of the training, or why they do not say it."""
    for name, figure in (("held_out_loss", "Held-out loss"), ("held_out_psnr", "Held-out PSNR")):
        points = metrics.points(name)
        if not points:
            continue
        if name == "held_out_psnr":
            # As a mean squared error, which falls like a loss: PSNR = −10 log10(error) + constant.
            points = [(step, 10 ** (-min(max(value, -300.0), 300.0) / 10)) for step, value in points]
        found = course(points)
        if found is None:
            return (
                f"{figure} was measured {len(points)} time{'s' if len(points) != 1 else ''}, "
                f"which is too few to say where it is going (from {FEWEST} on)."
            )
        return _verdict(found, figure, training_change(metrics.points("loss"), found.since))
    if metrics.points("loss"):
        return "Nothing was measured on held-out images, so learning cannot be told from memorising here."
    return "Nothing has been measured yet."


def _verdict(found: Course, figure: str, training: float | None) -> str:
    worse, better = ("falling", "rising") if figure.endswith("PSNR") else ("rising", "falling")
    changed = _amount(found.change, figure)
    if found.kind == "falling":
        return (
            f"{figure} is still {better}, by {changed} since step {found.since:,}: it had not settled when the last "
            "measurement was made, so more steps may help."
        )
    if found.kind == "flat":
        best = f"Its best value was that of step {found.best:,}."
        if abs(found.change) > WORTH_SAYING:
            return f"{figure} has no direction since step {found.since:,} that stands out from its scatter. {best}"
        return (
            f"{figure} hardly moves since step {found.since:,} ({changed}): more steps of the same kind will "
            f"change little. {best}"
        )
    start = f"{figure} has been {worse} since step {found.best:,}, by {changed}"
    if training is None:
        return f"{start}; the training loss has too few values to say why. The best step was {found.best:,}."
    if training < -WORTH_SAYING:
        return (
            f"{start}, while the training loss fell on by {-100 * training:.1f} %: memorising sets in, and the "
            f"best step was {found.best:,}."
        )
    if training > WORTH_SAYING:
        return (
            f"{start}, and the training loss rose by {100 * training:.1f} % too: this is no memorising but "
            f"training that has become unstable; a lower learning rate may help. The best step was {found.best:,}."
        )
    return f"{start}, while the training loss hardly moves. The best step was {found.best:,}."


def _amount(change: float, figure: str) -> str:
    if figure.endswith("PSNR"):
        return f"{abs(10 * math.log10(1 + max(change, -0.999))):.2f} dB"
    return f"{abs(100 * change):.1f} %"
