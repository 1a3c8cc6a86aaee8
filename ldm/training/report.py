"""What a run has measured: the names of metrics, reading `metrics.jsonl`, the trend of a curve, and `report.html`, a
self-contained page of the files in its folder.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from ldm import disk
from ldm.evaluation.verdict import Verdict
from ldm.progress import format_duration
from ldm.report.charts import MAX_MARKED_POINTS, Figure, Line, Point, smooth
from ldm.report.html import Rows, document, format_number, read_object, read_picture, shortened, write_page
from ldm.training.checkpoints import resume_command
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
BAND = re.compile(r"held_out_loss_t(\d{1,9})_(\d{1,9})", re.ASCII)
KNOWN_CURVES: dict[str, tuple[str, dict[str, bool]]] = {
    "held_out_psnr": ("Held-out PSNR in dB", {}),
    "learning_rate": ("Learning rate", {"from_zero": True}),
    "gradient_norm": ("Gradient norm before clipping", {"logarithmic": True}),
    "samples_per_second": ("Samples per second", {"from_zero": True}),
}
MAX_OTHER_CURVES = 12
MAX_SENTENCE = 2000  # characters
MAX_SHEETS = 12
MAX_SHEETS_BYTES = 5_000_000  # of all of them; base64 adds a third


def metric_name(metric: str, *, samples: int, features: str | None = None) -> str:
    """Such as "evaluation_kid_efficientnet_n128": a key of `_TITLES`, the feature space if the metric depends on it,
    and the number of images.
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
    """The direction of a metric that should fall.

    Attributes:
        kind: "rising" if the mean of the last values (three, or a tenth) is above the lowest; otherwise "falling" or
            "flat", by a straight line through the last third.
        change: relative to the lowest value (rising), or along that line (falling, flat).
        best: step of the lowest value.
        since: the step from which `change` counts.
    """

    kind: Literal["falling", "flat", "rising"]
    change: float
    best: int
    since: int


def find_trend(points: Sequence[Point]) -> Trend | None:
    """The trend of positive values; None with too few. A change counts above `MIN_CHANGE` and three standard errors."""
    values = [value for _, value in points]
    if len(points) < MIN_POINTS or min(values) <= 0:
        return None
    lowest = min(range(len(values)), key=values.__getitem__)
    best = points[lowest][0]
    # A robust standard deviation around the curve: third differences remove its slope and curvature, and their variance
    # is 20 σ².
    fours = zip(values, values[1:], values[2:], values[3:], strict=False)
    noise = 1.4826 * statistics.median(abs(d - 3 * c + 3 * b - a) for a, b, c, d in fours) / math.sqrt(20)
    recent = max(3, len(values) // 10)
    rise = statistics.fmean(values[-recent:]) - values[lowest]
    # The lowest of n values is expected √(2 ln n) standard deviations below the mean.
    chance = noise * (math.sqrt(2 * math.log(len(values))) + 3 / math.sqrt(recent))
    if lowest < len(values) - recent and rise > max(MIN_CHANGE * values[lowest], chance):
        return Trend("rising", rise / values[lowest], best, best)
    steps, losses = zip(*points[-max(3, math.ceil(len(points) / 3)) :], strict=True)
    slope, start = statistics.linear_regression(steps, losses)
    change = slope * (steps[-1] - steps[0]) / max(statistics.fmean(losses), start + slope * steps[0])
    error = noise / (statistics.pstdev(steps) * math.sqrt(len(steps)))  # of the slope
    is_falling = change < -MIN_CHANGE and slope < -3 * error
    return Trend("falling" if is_falling else "flat", change, best, steps[0])


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
        if abs(found.change) > MIN_CHANGE:
            return f"{title} shows no trend since step {found.since:,} beyond its scatter. {best}"
        return f"{title} hardly changes since step {found.since:,} ({change}): more steps will change little. {best}"
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


# ---- the page


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html (below 8 MB) atomically, from what the run has written so far; returns its path. Raises
    ValueError if there is no such folder. Any part of it may be missing or damaged; the page then says so.
    """
    run_folder = disk.expand_user(run_folder)
    if not run_folder.is_dir():
        raise ValueError(f"{run_folder} is no folder; give a run folder, such as runs/openmoji")
    run = _Folder.read(run_folder)
    path = run_folder / "report.html"
    plan = document(run.plan, Rows("plan.json")) if run.plan else ""
    # What needs attention comes first; None where the file does not say.
    data, rows = dict(run.data), Rows("data.json")
    attention = data.pop("needs_attention", None)
    if attention is not None:
        is_list = isinstance(attention, list) and attention
        attention = document({"needs_attention": attention}, rows) if is_list else ""
    content = _curves(run) | {"attention": attention, "data": document(data, rows) if run.data else "", "plan": plan}
    planned = run.count("train", "max_steps")
    if planned is None:
        status = f"Step {run.step:,}."
    elif run.step >= planned:
        status = f"Finished: all {planned:,} steps."
    else:
        status = f"Step {run.step:,} of {planned:,} ({100 * run.step // planned} %): unfinished when this was written."
    content |= {
        "status": status,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "numbers": list(_tiles(run)),
        "trend": describe_trend(run.metrics),
        "verdicts": [(where, shortened(verdict.sentence, MAX_SENTENCE)) for where, verdict in run.verdicts],
        "problems": run.problems,
    }
    prompts = run.setting("sample", "prompts")
    texts = [text for text in prompts if isinstance(text, str)] if isinstance(prompts, list) else []
    # Sample sheets by rising step: at most MAX_SHEETS, evenly over time, with the first and the last.
    named = ((re.fullmatch(r"step_(\d{1,12})\.png", path.name, re.ASCII), path) for path in run.path.glob("samples/*"))
    sheets = sorted((int(match[1]), path) for match, path in named if match)
    last = len(sheets) - 1
    shown = [sheets[round(i * last / (MAX_SHEETS - 1))] for i in range(MAX_SHEETS)] if last >= MAX_SHEETS else sheets
    content["sheets"] = [
        read_picture(
            path,
            name=f"samples/{path.name}",
            alt=f"sample sheet of step {step:,}",
            caption=f"step {step:,}",
            max_bytes=MAX_SHEETS_BYTES // len(shown),
        )
        for step, path in reversed(shown)
    ]
    content["other_sheets"] = [f"{step:,}" for step, path in sheets if (step, path) not in shown]
    commands: list[tuple[str, str]] = []  # that use the results
    for inside, which in (("best", "with the lowest held-out loss"), ("", "newest weights")):
        folder = run.path / inside
        if (folder / "pipeline" / "model_index.json").is_file():
            first = texts[0] if texts and texts[0].isprintable() and 0 < len(texts[0]) < 200 else "a prompt"
            model = shlex.quote(str(folder / "pipeline"))
            commands.append((f"Generate ({which}):", f"ldm generate {shlex.quote(first)} --model {model}"))
        if (folder / "autoencoder" / "config.json").is_file():
            setting = shlex.quote(f"first_stage={folder / 'autoencoder'}")
            commands.append((f"Use as a first stage ({which}):", f"train/train_ldm.py --config … --set {setting}"))
        if (folder / "lora").is_dir():
            source = repr(str(folder / "lora"))
            commands.append((f"Load the adapter in diffusers ({which}):", f"pipeline.load_lora_weights({source})"))
    saved = sorted(path.name for path in run.path.glob("checkpoints/step_*"))[-20:]
    content |= {"commands": commands, "checkpoints": saved, "resume": resume_command(run.path)}
    content["prompts"] = [shortened(text) for text in texts[:50]]
    write_page(path, "run.html", run.name, **content, config=run.config_text)
    return path


@dataclass(frozen=True)
class _Folder:
    """The files of a run that the page shows; None or empty where missing."""

    path: Path
    metrics: Metrics
    config_text: str
    config: Any
    best: tuple[int, float] | None
    plan: dict[str, Any]
    data: dict[str, Any]
    verdicts: list[tuple[str, Verdict]]
    problems: list[str]

    @classmethod
    def read(cls, path: Path) -> _Folder:
        problems: list[str] = []

        def read(name: str) -> dict[str, Any]:
            try:
                return read_object(path / name)
            except FileNotFoundError:
                return {}
            except (ValueError, OSError) as error:
                problems.append(f"{error}.")
                return {}

        config_path = path / "config.yaml"
        text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            config = None
            problems.append("config.yaml is no YAML, so the planned number of steps is unknown.")
        measured = read_metrics(path / "metrics.jsonl")
        if measured.damaged:
            problems.append(f"Incomplete lines of metrics.jsonl that are left out: {measured.damaged:,}.")
        problems += [
            f"Non-finite values of {shortened(name, 60)} that are left out: {count:,}, the first at step {step:,}."
            for name, (step, count) in list(measured.nonfinite.items())[:20]
        ]
        best = read("best/best.json")
        step, loss = best.get("step"), best.get("held_out_loss")
        # The last evaluation during training, and that of `ldm evaluate` on the run folder.
        verdicts = []
        if measured.verdict is not None:
            verdicts.append((f"Evaluation of step {measured.verdict[0]:,}", measured.verdict[1]))
        evaluation = read("evaluation/evaluation.json").get("verdict")
        if evaluation is not None:
            try:
                verdicts.append(("evaluation/evaluation.json", Verdict.from_json(evaluation)))
            except ValueError:
                problems.append("evaluation/evaluation.json holds no valid verdict.")
        return cls(
            path=path,
            metrics=measured,
            config_text=text,
            config=config,
            best=(step, loss) if isinstance(step, int) and isinstance(loss, (int, float)) else None,
            plan=read("plan.json"),
            data=read("data.json"),
            verdicts=verdicts,
            problems=problems,
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name or str(self.path)

    def setting(self, *keys: str) -> Any:
        """A value of the config, or None."""
        value = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def count(self, *keys: str) -> int | None:
        """A positive integer of the config, or None."""
        value = self.setting(*keys)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else None

    @property
    def step(self) -> int:
        """The last step in the metrics or checkpoints."""
        names = (path.name.removeprefix("step_") for path in self.path.glob("checkpoints/step_*"))
        saved = [int(name) for name in names if re.fullmatch(r"\d{1,12}", name, re.ASCII)]
        return max([self.metrics.last_step, *saved])


# ---- the parts of the page: what the template fills in


def _tiles(run: _Folder) -> Iterator[tuple[str, str, str]]:
    """Headline numbers: name, value, text below it."""
    names = {"loss": "Training loss", "held_out_loss": "Held-out loss", "held_out_psnr": "Held-out PSNR"}
    for key, name in names.items():
        if points := run.metrics.points(key):
            step, value = points[-1]
            yield name, format_number(value) + (" dB" if key.endswith("psnr") else ""), f"step {step:,}"
    if run.best is not None:
        yield "Best held-out loss", format_number(run.best[1]), f"step {run.best[0]:,}, saved in best/"
    elif points := run.metrics.points("held_out_loss"):
        step, value = min(points, key=lambda point: point[1])
        yield "Best held-out loss", format_number(value), f"step {step:,}"
    rates = [point for point in run.metrics.points("samples_per_second") if point[1] > 0]
    if not rates:
        return
    rate = statistics.median(value for _, value in rates[-10:])
    yield "Samples per second", format_number(rate), "median of the last 10 measurements"
    batch, planned = run.count("train", "batch_size"), run.count("train", "max_steps")
    if batch is None:
        return
    previous = [0, *(step for step, _ in rates)]
    spent = sum((step - before) * batch / value for before, (step, value) in zip(previous, rates, strict=False))
    expected = run.plan.get("expected_seconds")
    below = "without samples and validation"
    if isinstance(expected, (int, float)) and 0 < expected < 1e9:
        below += f"; the plan for the whole run was {format_duration(expected)}"
    yield "Time in steps", format_duration(spent), below
    if planned is not None and run.step < planned:
        left = format_duration((planned - run.step) * batch / rate)
        yield "Remaining", left, "at the last speed, without samples and validation"


def _curves(run: _Folder) -> dict[str, Any]:
    found = run.metrics
    shown: list[Figure] = []
    losses = [Line("training loss (pale: not smoothed)", smooth(loss), loss)] if (loss := found.points("loss")) else []
    losses += [Line("held-out loss", points)] if (points := found.points("held_out_loss")) else []
    main: list[Figure] = []
    if losses:
        best = run.best[0] if run.best else min(points, key=lambda point: point[1])[0] if points else None
        mark = (best, f"best held-out: step {best:,}") if best is not None and 0 <= best <= found.last_step else None
        main.append(_chart(run, "Loss", losses, logarithmic=True, mark=mark, size=(640, 320)))
    bands = sorted((int(m[1]), int(m[2]), name) for name in found.values if (m := BAND.fullmatch(name)))
    if bands:
        lines = [Line(f"t {low}–{high}", found.points(name)) for low, high, name in bands]
        caption = (
            "Held-out loss by band of noise; a small t is little noise (fine detail), a large t mostly noise (layout)"
        )
        shown.append(_chart(run, caption, lines, logarithmic=True))
    for key, (title, options) in KNOWN_CURVES.items():
        if points := found.points(key):
            exact = key == "learning_rate"  # a function of the step, without any scatter to smooth
            shown.append(_chart(run, title, [Line("", points) if exact else _smoothed(points)], **options))
    evaluated = {name: words for name in found.values if (words := metric_title(name)) is not None}
    shown += [_chart(run, title, [Line("", found.points(name))]) for name, title in evaluated.items()]
    known = {"loss", "held_out_loss", *KNOWN_CURVES, *evaluated}
    others = [name for name in found.values if name not in known and not BAND.fullmatch(name)]
    shown += [_chart(run, shortened(name, 60), [_smoothed(found.points(name))]) for name in others[:MAX_OTHER_CURVES]]
    more = len(others) - MAX_OTHER_CURVES
    return {"has_curves": bool(found.values), "losses": main, "curves": shown, "more_curves": more}


def _smoothed(points: list[Point]) -> Line:
    """A running mean over the values; few values are shown as they are."""
    few = len(points) <= MAX_MARKED_POINTS
    return Line("", points) if few else Line("running mean (pale: measured values)", smooth(points), points)


def _chart(run: _Folder, caption: str, lines: list[Line], **options: Any) -> Figure:
    return Figure.from_lines(caption, lines, **{"size": (480, 280), "last_step": run.metrics.last_step} | options)
