"""`metrics.jsonl`: the names of an evaluation's metrics, reading the file, and the trend of a curve."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.evaluation.verdict import Verdict
from ldm.report.charts import Point
from ldm.training.resume import EVALUATION_PREFIX, VERDICT

_TITLES = {
    "frechet_ratio": "Fréchet distance over that of as many held-out images (1 is as good as real images)",
    "frechet": "Fréchet distance (lower is better)",
    "kid": "KID (lower is better)",
    "precision": "Precision: fraction of generated images close to training images",
    "recall": "Recall: fraction of training images close to generated images",
    "within_10_training": "Own image among the 10 nearest, training captions",
    "within_10_held_out": "Own image among the 10 nearest, held-out captions",
    "read_as_asked_training": "Classified as the prompted digit, training captions",
    "read_as_asked_held_out": "Classified as the prompted digit, held-out captions",
    "suspected_copies": "Possible copies of training images (0.05 for unseen real images)",
}
_NAME = re.compile(rf"{EVALUATION_PREFIX}({'|'.join(_TITLES)})(?:_(efficientnet|pixel))?_n(\d{{1,9}})", re.ASCII)

MAX_VALUE = 3.4e38  # of float32: larger values are taken for infinite
MIN_POINTS = 5  # for a trend
MIN_CHANGE = 0.01  # relative; less counts as no change


def metric_name(metric: str, *, samples: int, features: str | None = None) -> str:
    """Such as "evaluation_kid_efficientnet_n128".

    Args:
        metric: a key of `_TITLES`.
        samples: N, the number of images.
        features: name of the feature space, if the metric depends on it.
    """
    name = EVALUATION_PREFIX + metric + (f"_{features}" if features else "") + f"_n{samples}"
    assert _NAME.fullmatch(name), name
    return name


def metric_title(name: str) -> str | None:
    """The name in words; None if it is not of an evaluation."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    features = f", {match[2]} features" if match[2] else ""
    return f"{_TITLES[match[1]]}; {int(match[3]):,} images{features}"


@dataclass(frozen=True)
class Metrics:
    """Finite values by rising step."""

    values: dict[str, list[Point]]  # name → (step, value); of a step that was measured twice, the last value
    nonfinite: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → the first step and the number of these
    damaged: int = 0  # lines that are no record, such as one that is being written
    verdict: tuple[int, Verdict] | None = None  # the last one, and its step

    def points(self, name: str) -> list[Point]:
        return self.values.get(name, [])

    @property
    def last_step(self) -> int:
        """0 without values."""
        return max((points[-1][0] for points in self.values.values()), default=0)


def read_metrics(path: Path) -> Metrics:
    """Reads the valid lines of a `metrics.jsonl`; a missing file is empty."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return Metrics({})
    values: dict[str, dict[int, float]] = {}
    nonfinite: dict[str, list[int]] = {}
    damaged, verdict = 0, None
    for line in lines:
        try:
            entry = json.loads(line)
            step = entry.pop("step")
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            step = None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            damaged += 1
            continue
        if VERDICT in entry:
            with suppress(ValueError):
                verdict = (step, Verdict.from_json(entry[VERDICT]))
        for name, value in entry.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                continue  # such as a text
            if value is None or not abs(value) <= MAX_VALUE:
                nonfinite.setdefault(name, []).append(step)
            else:
                values.setdefault(name, {})[step] = float(value)
    points = {name: sorted(found.items()) for name, found in values.items()}
    return Metrics(points, {name: (min(steps), len(steps)) for name, steps in nonfinite.items()}, damaged, verdict)


@dataclass(frozen=True)
class Trend:
    """The direction of a metric that should fall, by means of the last k values; k is three, or a tenth of them.

    Attributes:
        kind: "rising" if the last k are above the lowest value, "falling" if they are below the k before, else "flat".
        change: relative to the lowest value, or to the k before.
        best: step of the lowest value.
        since: the step from which `change` counts.
    """

    kind: Literal["falling", "flat", "rising"]
    change: float
    best: int
    since: int


def find_trend(points: Sequence[Point]) -> Trend | None:
    """The trend of positive values; None with too few of them. A change counts above `MIN_CHANGE` and chance."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    if len(points) < MIN_POINTS or min(values) <= 0:
        return None
    # A robust standard deviation: third differences remove slope and curvature, and their variance is 20 σ².
    fours = zip(values, values[1:], values[2:], values[3:], strict=False)
    noise = 1.4826 * statistics.median(abs(d - 3 * c + 3 * b - a) for a, b, c, d in fours) / math.sqrt(20)
    count = max(3, len(values) // 10)
    last, before = statistics.fmean(values[-count:]), statistics.fmean(values[-2 * count : -count])
    lowest = min(range(len(values)), key=values.__getitem__)
    rise = last / values[lowest] - 1
    # The lowest of n values is expected √(2 ln n) standard deviations below the mean.
    chance = noise * (math.sqrt(2 * math.log(len(values))) + 3 / math.sqrt(count))
    if lowest < len(values) - count and rise > max(MIN_CHANGE, chance / values[lowest]):
        return Trend("rising", rise, steps[lowest], steps[lowest])
    fall = 1 - last / before
    is_falling = fall > max(MIN_CHANGE, 3 * noise * math.sqrt(2 / count) / before)
    return Trend("falling" if is_falling else "flat", -fall, steps[lowest], steps[max(0, len(values) - 2 * count)])


def training_change(points: Sequence[Point], since: int) -> float | None:
    """Relative change of the training loss from around a step to the end; 0 if within three standard errors.

    None with too few values before or after it.
    """
    before = [value for step, value in points if step <= since]
    after = [value for step, value in points if step > since]
    count = min(len(before), len(after), max(10, len(points) // 10))
    if count < MIN_POINTS:
        return None
    first, last = before[-count:], after[-count:]
    change = statistics.fmean(last) - (start := statistics.fmean(first))
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / count)
    return change / start if start > 0 and abs(change) > 3 * error else 0.0


def describe_trend(metrics: Metrics) -> str:
    """The state of the training in one sentence, from its held-out curves."""
    is_psnr = not metrics.points("held_out_loss")
    title, points = ("Held-out loss", metrics.points("held_out_loss"))
    if is_psnr:  # as a mean squared error, which falls like a loss: PSNR = −10 log10(error) + constant
        title, psnr = "Held-out PSNR", metrics.points("held_out_psnr")
        points = [(step, 10 ** (-min(max(value, -300.0), 300.0) / 10)) for step, value in psnr]
    if not points:
        known = "There are no held-out images, so learning cannot be told from memorizing here."
        return known if metrics.points("loss") else "There are no measurements yet."
    found = find_trend(points)
    if found is None:
        times = f"{len(points)} time{'s' if len(points) != 1 else ''}"
        return f"{title} was measured {times}, too few for a trend (at least {MIN_POINTS})."
    change = f"{100 * abs(found.change):.1f} %"
    if is_psnr:
        change = f"{abs(10 * math.log10(1 + max(found.change, -0.999))):.2f} dB"
    worse, better = ("falling", "rising") if is_psnr else ("rising", "falling")
    if found.kind == "falling":
        return f"{title} is still {better}, by {change} since step {found.since:,}: more steps may help."
    best = f"The best step was {found.best:,}."
    if found.kind == "flat":
        return f"{title} has no clear trend since step {found.since:,} ({change}): more steps may change little. {best}"
    start = f"{title} has been {worse} since step {found.best:,}, by {change}"
    training = training_change(metrics.points("loss"), found.since)
    if training is None:
        return f"{start}; the training loss has too few values to explain it. {best}"
    if training < -MIN_CHANGE:
        return f"{start}, while the training loss fell by {-100 * training:.1f} %: the model starts to memorize. {best}"
    if training > MIN_CHANGE:
        return (
            f"{start}, and the training loss rose by {100 * training:.1f} % too: training has become unstable, and the "
            f"model does not memorize; a lower learning rate may help. {best}"
        )
    return f"{start}, while the training loss hardly changes. {best}"
