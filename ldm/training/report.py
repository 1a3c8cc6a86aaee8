"""`report.html`: a self-contained page about a run, from the files in its folder."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ldm import disk
from ldm.evaluation.verdict import Verdict
from ldm.progress import format_duration
from ldm.report.charts import MAX_MARKED_POINTS, Line, Point, smooth
from ldm.report.html import Figure, document, read_picture, write_page
from ldm.report.markup import Rows, format_number, read_object, shortened
from ldm.training.checkpoints import resume_command
from ldm.training.metrics import Metrics, describe_trend, metric_title, read_metrics

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


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html atomically, from what the run has written so far. Raises ValueError if there is no such
    folder.

    Any part of the folder may be missing or damaged; the page then says so.

    Returns:
        The path of the page, which is below 8 MB.
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
