"""Draws what a run measured over its steps as an SVG, from its metrics.jsonl alone.

python tools/curve.py runs/openmoji loss held_out_loss -o docs/openmoji-loss.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 320, 60, 40, 20
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def read(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one figure.

    Raises:
        ValueError: if the run never measured it.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [(entry["step"], entry[name]) for entry in map(json.loads, lines) if name in entry]
    if not points:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no {name}; name one of its keys")
    return points


def smooth(points: list[tuple[int, float]], share: float = 0.02) -> list[tuple[int, float]]:
    """A running mean over a share of the points, on both sides of each."""
    half = int(len(points) * share)
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(step, sum(v for _, v in w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]


def draw(curves: dict[str, list[tuple[int, float]]]) -> str:
    """An SVG with one line a curve, the value on a logarithmic axis."""
    steps = [step for points in curves.values() for step, _ in points]
    logs = [math.log10(value) for points in curves.values() for _, value in points]
    low, high = min(logs), max(logs)
    span = max(high - low, 1e-9)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 10) * step / max(steps)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" ',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        value, step = 10 ** (low + span * i / 4), max(steps) * i // 4
        x, y = place(step, value)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>',
            f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{step}</text>',
        ]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{WIDTH - 20}" y="{TOP + 16 * (number + 1)}" text-anchor="end" fill="{colour}">{name}</text>',
        ]
    parts += [f'<text x="{WIDTH / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>', "</svg>"]
    return "\n".join(parts) + "\n"


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
