"""Draws what a run measured over its steps as an SVG, from its metrics.jsonl alone.

python tools/curve.py runs/openmoji loss held_out_loss -o docs/openmoji-loss.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.report import curves
from ldm.report.curves import Line, Point, smooth
from ldm.training.report.metrics import read_metrics


def read(run: Path, name: str) -> list[Point]:
    """(step, value) of one figure.

    Raises:
        ValueError: if the run never measured it.
    """
    points = read_metrics(run / "metrics.jsonl").points(name)
    if not points:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no {name}; name one of its keys")
    return points


def draw(figures: Mapping[str, Sequence[Point]]) -> str:
    """An SVG with one line a figure, the value on a logarithmic axis where all are positive."""
    lines = [Line(name, points) for name, points in figures.items()]
    return curves.draw(lines, title=", ".join(figures), logarithmic=True, standalone=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    svg = draw({name: smooth(read(arguments.run, name)) for name in arguments.names})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
