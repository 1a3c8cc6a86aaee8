"""Plots metrics of a run over its steps as an SVG, from its metrics.jsonl.

python tools/curve.py runs/openmoji loss held_out_loss -o docs/openmoji-loss.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.report.charts import Line, Point, line_chart, smooth
from ldm.training.report import read_metrics


def read(run: Path, name: str) -> list[Point]:
    """(step, value) of one metric.

    Raises:
        ValueError: if the run has none.
    """
    points = read_metrics(run / "metrics.jsonl").points(name)
    if not points:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no {name}; name one of its keys")
    return points


def plot(metrics: Mapping[str, Sequence[Point]]) -> str:
    """An SVG with one line per metric, on a logarithmic axis if all values are positive."""
    lines = [Line(name, points) for name, points in metrics.items()]
    return line_chart(lines, title=", ".join(metrics), logarithmic=True, standalone=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    svg = plot({name: smooth(read(arguments.run, name)) for name in arguments.names})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
