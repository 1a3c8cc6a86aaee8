"""docs/ddim_tables.md from the results of ddim_tables.py: tables with intervals, a chart, and which claims hold.

Nothing here knows what should come out: each claim is checked against the numbers, and says so where it fails. What
stands under "## Reading" in an older page was written by a person and stays.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import disk, hub
from ldm.evaluation.stats import student_interval
from ldm.report.charts import DASHES, LIGHT, Axis, style
from ldm.report.html import escaped

READING = "## Reading"
COLUMNS = {"0": "η = 0", "0.2": "η = 0.2", "0.5": "η = 0.5", "1": "η = 1", "sigma_hat": "σ̂"}
GRID_TEXTS = {
    "leading": "Timesteps 0, c, 2c, … as in the code of DDIM: the step before the last ends at timestep 0, and what "
    "noise it leaves stays.",
    "trailing": "Timesteps from T − 1 down in strides of c: the last step, of full length, goes to x̂_0 and removes all "
    "noise. At S = T both grids are\none.",
}
FEW_STEPS = 20
ROWS = {
    "mean-L": "μ̃, L",
    "mean-simple": "μ̃, L_simple",
    "epsilon-L": "ε, L",
    "epsilon-simple": "ε, L_simple",
}
Results = Mapping[str, Any]


def write_page(everything: Results, output: Path) -> None:
    """Writes ddim_tables.json, .md and a chart for each data set that Table 1 was measured on."""
    output.mkdir(parents=True, exist_ok=True)
    hub.write_json(output / "ddim_tables.json", everything)
    path = output / "ddim_tables.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    _, found, reading = old.partition(READING)
    parts = [_introduction(everything)]
    for name, results in everything.items():
        parts += [f"## {name}", *_sections(name, results)]
        if "table_1" in results:
            for grid, rows in results["table_1"].items():
                if len(rows) > 1:  # a line needs two ends
                    disk.write_text(output / f"ddim_tables-{name}-{grid}.svg", chart(rows, results["floor"]))
    disk.write_text(path, "\n\n".join([*parts, READING + reading.rstrip() if found else ""]).rstrip() + "\n")


def values_of(cells: Sequence[Mapping[str, float]], key: str) -> list[float]:
    """One number a seed."""
    return [cell[key] for cell in cells]


def shown(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval over seeds; one value stands alone."""
    if len(values) < 2:
        return f"{_number(values[0])}"
    interval = student_interval(values)
    return f"{_number(interval.mean)} ± {_number(interval.high - interval.mean)}"


def _number(value: float) -> str:
    """Three digits that count: 12.3, 0.0123, 1.23e-5."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, 2 - exponent)}f}" if exponent >= -4 else f"{value:.2e}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _introduction(everything: Results) -> str:
    return (
        "# The tables of DDIM and DDPM, on our data\n\n"
        f"{_commands(everything)}\n\n"
        "Pixel models, trained by that program with DDPM's linear schedule (T = 1000), captions drawn as in the data, "
        "guidance 1. The pictures\nof one seed have the same x_T, captions and noise in every cell. x̂_0 is kept to the "
        "range of images. The **Fréchet distance** is that of FID\non other features, so that it compares within a "
        "table alone:\n\n"
        f"{_features(everything)}\n\n"
        "The reference are all images of the data, training and held out. ± is half of the 95 % interval (Student) "
        "over seeds of sampling, for\none trained model: it does not hold what another training would change. *Real "
        "pictures*: the distance of as many real images from the\nrest, over ten choices of them. A perfect model "
        "would get about as much: of few samples, no distance is 0.\n"
        f"Computed on {_machine(everything)}."
    )


FEATURES = {
    "digit": "the last hidden layer (32 numbers) of a classifier of the digits",
    "pixel": "64 random directions of 8×8 colours and 4×4 edges, without any network",
    "efficientnet": "64 random directions of the 1,280 features of EfficientNet-Lite0, which photographs taught "
    "to see,\n  for images enlarged to 64 pixels",
}


def _features(everything: Results) -> str:
    """What the distances are measured on, of those on the page."""
    names = dict.fromkeys(name for results in everything.values() for name in results["floor"])
    return ";\n".join(f"- *{name}*: {FEATURES.get(name, name)}" for name in names) + "."


def _commands(everything: Results) -> str:
    """What makes this page, number of pictures and all."""
    lines = []
    for name, results in everything.items():
        cells = [
            cells for grid in results.get("table_1", {}).values() for row in grid.values() for cells in row.values()
        ]
        cells += results.get("ablation", {}).values()
        parts = " ".join([name] * ("table_1" in results) + ["ablation"] * ("ablation" in results))
        seeds = max(map(len, cells))
        lines.append(
            f"    python -m experiments.ddim_tables --only {parts} --samples {results['samples']} --seeds {seeds}"
        )
    return "\n".join(lines)


def _machine(everything: Results) -> str:
    return " and ".join(dict.fromkeys(str(results["machine"]) for results in everything.values()))


def _sections(name: str, results: Results) -> list[str]:
    training = results["training"]
    size = "×".join(str(side) for side in results["size"])
    parts = [
        f"{results['images']} images of {size}, {results['held_out']} of them held out. Network: "
        f"{training['parameters'] / 1e6:.2f} M parameters, {training['steps']:,} steps of {training['batch_size']}. "
        f"{results['samples']} pictures a cell and seed."
    ]
    features = list(results["floor"])
    if "table_1" in results:
        for grid, rows in results["table_1"].items():
            seeds = max(len(cells) for row in rows.values() for cells in row.values())
            parts.append(f"### Fréchet distance against steps and noise (DDIM, Table 1): {grid} grid, {seeds} seeds")
            parts.append(GRID_TEXTS[grid])
            for feature in features:
                parts.append(_table_1(rows, feature, results["floor"][feature]))
                parts.append("\n".join(claims_of_table_1(rows, feature)))
            if len(rows) > 1:
                parts.append(f"![the distances](ddim_tables-{name}-{grid}.svg)")
        parts.append(f"A column of pictures has one x_T and one caption:\n\n![pictures](ddim_tables-{name}.png)")
    if "table_2" in results:
        parts += ["### Inversion and back (DDIM, Table 2)", _table_2(results["table_2"])]
        parts.append(claim_of_table_2(results["table_2"]))
    if "same_start" in results:
        parts += ["### One x_T, other numbers of steps (η = 0)", _same_start(results["same_start"])]
    if "ablation" in results:
        parts += ["### What is predicted, and by which loss (DDPM, Table 2)", _ablation(results)]
        parts += [claim_of_ablation(results["ablation"], feature) for feature in features]
    return parts


def _table_1(rows: Results, feature: str, floor: Sequence[float]) -> str:
    lines = [
        [steps, *(shown(values_of(row[column], feature)) if column in row else "" for column in COLUMNS)]
        for steps, row in rows.items()
    ]
    return table([f"S; *{feature}* features, real pictures: {shown(floor)}", *COLUMNS.values()], lines)


def _verdict(claim: str, holds: bool | str | None, facts: str) -> str:
    """None: the numbers do not say; a text is another verdict."""
    verdicts = {None: "is not decided by these seeds", True: "holds", False: "does not hold"}
    said = holds if isinstance(holds, str) else verdicts[holds]
    return f"- **{claim}: {said}.** {facts}"


def claims_of_table_1(rows: Results, feature: str) -> list[str]:
    """At few steps η = 0 is best; at the fewest σ̂ collapses; at the most they meet."""
    means = {
        steps: {column: statistics.fmean(values_of(cells, feature)) for column, cells in row.items()}
        for steps, row in rows.items()
    }
    few, many = min(rows, key=int), max(rows, key=int)
    collapse = means[few]["sigma_hat"] / means[few]["0"]
    spread, wide = (max(means[steps].values()) / min(means[steps].values()) for steps in (many, few))
    return [
        _claim_of_few_steps(rows, feature),
        _verdict(
            f"At S = {few} σ̂ collapses",
            max(means[few], key=means[few].__getitem__) == "sigma_hat" and collapse > 2,
            f"Its distance is {collapse:.1f} times that of η = 0 (called a collapse from 2 on, if none is larger).",
        ),
        _verdict(
            f"At S = {many} they meet",
            spread < 1.5 if wide >= 1.5 else "does not apply",
            f"The largest distance is {spread:.2f} times the smallest (called meeting below 1.5); at S = {few} it is "
            f"{wide:.2f} times" + ("." if wide >= 1.5 else ", so that they were not apart."),
        ),
    ]


def _claim_of_few_steps(rows: Results, feature: str) -> str:
    """Whether no column is below η = 0, seed by seed: the pictures of a seed share x_T, captions and noise."""
    beaten, best_everywhere, facts = False, True, []
    for steps in (steps for steps in rows if int(steps) <= FEW_STEPS):
        columns = {column: values_of(cells, feature) for column, cells in rows[steps].items()}
        best = min(columns, key=lambda column: statistics.fmean(columns[column]))
        fact = f"S = {steps}: lowest is {COLUMNS[best]}"
        if best != "0":
            differences = [value - zero for value, zero in zip(columns[best], columns["0"], strict=True)]
            best_everywhere = False
            beaten |= len(differences) > 1 and student_interval(differences).high < 0
            fact += f" ({shown(differences)} from η = 0)"
        facts.append(fact)
    holds = True if best_everywhere else False if beaten else None
    return _verdict(f"Up to S = {FEW_STEPS} η = 0 is best", holds, "; ".join(facts) + ".")


def _table_2(errors: Results) -> str:
    return table(["S", *errors], [["error", *(shown(each) for each in errors.values())]]) + (
        "\n\nMean square error of held-out images, pixels in [0, 1]; ± over the images. One grey level of 256 is "
        f"{1 / 255**2:.1e}."
    )


def claim_of_table_2(errors: Results) -> str:
    means = {steps: sum(values) / len(values) for steps, values in errors.items()}
    ordered = [means[steps] for steps in sorted(means, key=int)]
    falls = all(later < earlier for earlier, later in itertools.pairwise(ordered))
    few, many = min(means, key=int), max(means, key=int)
    facts = f"From {_number(means[few])} at S = {few} to {_number(means[many])} at S = {many}."
    return _verdict("The error falls with S", falls, facts)


def _same_start(rows: Results) -> str:
    keys = ("mse_same", "mse_other", "correlation_same", "correlation_other", "found")
    head = ["S", "error to S = 1000, same x_T", "other x_T", "correlation, same x_T", "other x_T", "found"]
    body = [[steps, *(shown(values_of(cells, key)) for key in keys)] for steps, cells in rows.items()]
    return table(head, body) + (
        "\n\nThe picture of S steps beside that of 1000 steps from the same x_T, and from the next x_T of the same "
        "kind. *found*: the share of\npictures whose nearest among all those of 1000 steps has their own x_T."
    )


def _ablation(results: Results) -> str:
    features = list(results["floor"])
    seeds = max(len(cells) for cells in results["ablation"].values())
    rows = [
        [ROWS[name], *(shown(values_of(cells, feature)) for feature in features)]
        for name, cells in results["ablation"].items()
    ]
    return table([f"prediction, loss ({seeds} seeds)", *(f"*{feature}* features" for feature in features)], rows) + (
        "\n\nOne training each, all alike but for prediction and loss; S = T = 1000 with η = 1, where a step of DDIM "
        "is one of DDPM with σ² = β̃."
    )


def claim_of_ablation(rows: Results, feature: str) -> str:
    means = {name: statistics.fmean(values_of(cells, feature)) for name, cells in rows.items()}
    best, *rest = sorted(means, key=lambda name: means[name])
    facts = f"The best is {ROWS[best]} with {_number(means[best])}"
    facts += f", then {ROWS[rest[0]]} with {_number(means[rest[0]])}." if rest else "."
    return _verdict(f"ε with L_simple wins (*{feature}* features)", best == "epsilon-simple", facts)


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 60, 15, 34, 42


def chart(rows: Results, floors: Mapping[str, Sequence[float]]) -> str:
    """Distance against S, both logarithmic, a line a column, a bar for each interval, as an SVG."""
    feature, floor = next((name, statistics.fmean(values)) for name, values in floors.items())
    measured = {
        column: [(int(steps), values_of(row[column], feature)) for steps, row in rows.items() if column in row]
        for column in COLUMNS
    }
    ends = [end for points in measured.values() for _, values in points for end in (min(values), max(values))]
    x_axis = Axis(min(map(int, rows)), max(map(int, rows)), True)
    y_axis = Axis(min(*ends, floor) / 1.1, max(ends) * 1.1, True)

    def place(steps: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * x_axis.fraction(steps)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y_axis.fraction(value)

    title = f"Fréchet distance ({feature} features) against S"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" role="img" aria-label="{escaped(title)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<style>{style(LIGHT)}</style><rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        *_axes(map(int, rows), y_axis, place),
        *_floor(place(x_axis.high, floor)[1]),
    ]
    for number, (column, points) in enumerate(measured.items()):
        parts += _line(number, column, points, place)
    label = f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">steps S; {escaped(title)}</text>'
    return "\n".join([*parts, label, "</svg>"]) + "\n"


def _axes(steps: Any, y_axis: Axis, place: Any) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        _, y = place(5, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{value:g}</text>')
    for step in steps:
        x, _ = place(step, y_axis.low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    return parts


def _floor(y: float) -> list[str]:
    return [
        f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="halo" x="{LEFT + 6}" y="{y - 5:.1f}">real pictures</text>',
    ]


def _line(number: int, column: str, points: Sequence[tuple[int, Sequence[float]]], place: Any) -> list[str]:
    """A column: its mean at each S, from the lowest to the highest seed, and its name in the legend."""
    dashes, means = f'stroke-dasharray="{DASHES[number]}"', [(s, sum(v) / len(v)) for s, v in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in means))
    parts = [f'<polyline class="c{number}" {dashes} points="{path}"/>']
    for (steps, mean), (_, values) in zip(means, points, strict=True):
        x, y = place(steps, mean)
        parts.append(f'<circle class="d{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
        low, high = place(steps, min(values))[1], place(steps, max(values))[1]
        parts.append(f'<line class="c{number}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    left = LEFT + 110 * number
    parts.append(f'<line class="c{number}" stroke-width="2" {dashes} x1="{left}" x2="{left + 24}" y1="14" y2="14"/>')
    parts.append(f'<text x="{left + 30}" y="19">{COLUMNS[column]}</text>')
    return parts
