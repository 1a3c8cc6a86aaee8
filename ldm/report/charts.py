"""Line charts over steps as SVG, which resvg turns into PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from markupsafe import Markup
from PIL import Image, ImageFont

from ldm import disk
from ldm.pipelines import save_png
from ldm.report.html import LIGHT, escaped, shortened, style

Point = tuple[int, float]
Size = tuple[int, int]

LEFT, RIGHT, BOTTOM, LEGEND_ROW = 60, 10, 40, 20
MAX_POINTS = 500
MAX_MARKED_POINTS = 60  # up to so many points get a dot each
DASHES = ("none", "9 4", "3 3", "12 3 3 3", "6 6", "2 5")  # lines differ in color and in dashes
PNG_SCALE = 2  # pixels of a PNG per pixel of an SVG


@dataclass(frozen=True)
class Line:
    """Finite (step, value) by rising step, a name for the legend, and the values before smoothing, in a pale color."""

    name: str
    points: Sequence[Point]
    raw: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """From low to high; `logarithmic` only if both are positive."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def from_values(cls, values: Sequence[float], *, logarithmic: bool, from_zero: bool = False) -> Axis:
        """The tight axis of these values; around a constant it has some room."""
        low, high = min(values), max(values)
        if from_zero:
            low = min(low, 0.0)
        if high - low <= max(1e-4 * max(abs(low), abs(high)), 1e-100):
            room = abs(high) * 0.1 if abs(high) > 1e-100 else 1.0
            low, high = low - room, high + room
        return cls(low, high, logarithmic and low > 0)

    def fraction(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About five round values; on a logarithmic axis over several decades, powers of ten or 1, 2, 5."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(exponents) // 6)
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
                found = [digit * 10.0**exponent for exponent in exponents[::every] for digit in digits]
                found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
                if 4 <= len(found) <= 8:
                    return found
        return round_ticks(self.low, self.high)


def round_ticks(low: float, high: float) -> list[float]:
    """Two to five multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * digit for digit in (1, 2, 5, 10, 20) if (high - low) / (power * digit) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [multiple * step for multiple in range(first, last + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean over 2 % of the points on both sides of each, at up to 1000 steps."""
    half = int(len(points) * 0.02)
    every = max(1, len(points) // 1000)
    indices = sorted({*range(0, len(points), every), *([len(points) - 1] if points else [])})
    windows = (points[max(0, i - half) : i + half + 1] for i in indices)
    # No cumulative sum: a huge spike would cost the precision of all later values.
    return [(points[i][0], sum(v for _, v in w) / len(w)) for i, w in zip(indices, windows, strict=True)]


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `MAX_POINTS` points: both ends, and the lowest and highest of each stretch, so that spikes remain."""
    if len(points) <= MAX_POINTS:
        return points
    inner, stretches = points[1:-1], (MAX_POINTS - 2) // 2
    chosen = [points[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        chosen += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*chosen, points[-1]]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    logarithmic: bool = False,
    from_zero: bool = False,
    last_step: int = 0,
    mark: tuple[int, str] | None = None,
    size: Size = (640, 320),
    axis: str = "step",
    standalone: bool = False,
) -> str:
    """An SVG of one or more lines, each with at least one point, over steps from 0.

    Args:
        title: for screen readers.
        logarithmic: if all values are positive, their axis is logarithmic.
        last_step: the steps reach at least this far, so that charts can share an axis.
        mark: a step to mark, and its label.
        axis: label of the steps.
        standalone: with its own style and background; otherwise the page has `style`.
    """
    assert lines and all(line.points for line in lines)
    width, height = size
    right, bottom = width - RIGHT, height - BOTTOM
    points = [point for line in lines for point in (*line.points, *line.raw)]
    steps = Axis(0, max(1, last_step, *(step for step, _ in points)), False)
    values = Axis.from_values([value for _, value in points], logarithmic=logarithmic, from_zero=from_zero)
    legend, x, row = list[str](), 0.0, 0  # swatches and names above the plot, in as many rows as needed
    for number, line in enumerate(lines):
        if not line.name:
            continue
        name = shortened(line.name, 40)
        needed = 30 + 7.5 * len(name) + 16
        if x > 0 and x + needed > right - LEFT:
            x, row = 0.0, row + 1
        middle, left, kind = row * LEGEND_ROW + 10, LEFT + x, number % len(DASHES)
        legend.append(
            f'<line class="c{kind}" stroke-width="2" stroke-dasharray="{DASHES[kind]}" '
            f'x1="{left:.1f}" x2="{left + 24:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<text x="{left + 30:.1f}" y="{middle + 5}">{escaped(name)}</text>'
        )
        x += needed
    top = (row + 1) * LEGEND_ROW

    def positions(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """(x, y) of each (step, value)."""
        across, up = right - LEFT, bottom - top
        return [(LEFT + across * steps.fraction(x), top + up * (1 - values.fraction(y))) for x, y in points]

    def path(points: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in positions(thinned(points)))

    attributes = f'class="curve" role="img" aria-label="{escaped(title)}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>']
    if standalone:
        parts += [f"<style>{style(LIGHT)}</style>", f'<rect class="paper" width="{width}" height="{height}"/>']
    ticks = values.ticks()
    for value, (_, y) in zip(ticks, positions([(0, value) for value in ticks]), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{value_label(value)}</text>')
    for step in dict.fromkeys(int(tick) for tick in round_ticks(0, steps.high)):
        ((x, _),) = positions([(step, values.low)])
        anchor = "end" if x > right - 20 else "middle"
        # Whole thousands are short, so that neighbors do not touch.
        label = f"{step // 1000:,}k" if step >= 10_000 and step % 1000 == 0 else f"{step:,}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{label}</text>')
    label = escaped(axis) + ("; values on a logarithmic scale" if values.logarithmic else "")
    parts.append(f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{label}</text>')
    for number, line in enumerate(lines):
        kind = number % len(DASHES)
        if line.raw:
            parts.append(f'<polyline class="raw c{kind}" points="{path(line.raw)}"/>')
        parts.append(f'<polyline class="c{kind}" stroke-dasharray="{DASHES[kind]}" points="{path(line.points)}"/>')
        if len(line.points) <= MAX_MARKED_POINTS:
            dots = (f'cx="{x:.1f}" cy="{y:.1f}"' for x, y in positions(line.points))
            parts += [f'<circle class="d{kind}" {dot} r="2.6"/>' for dot in dots]
    if mark is not None:
        ((x, _),) = positions([(mark[0], values.low)])
        anchor, offset = ("end", -6) if x > width / 2 else ("start", 6)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        place = f'x="{x + offset:.1f}" y="{top + 14}" text-anchor="{anchor}"'
        parts.append(f'<text class="halo" {place}>{escaped(mark[1])}</text>')
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Figure:
    """A chart, and the caption above it."""

    caption: str
    svg: Markup

    @classmethod
    def from_lines(cls, caption: str, lines: Sequence[Line], **options: Any) -> Figure:
        """By `line_chart`."""
        return cls(caption, Markup(line_chart(lines, title=caption, **options)))


def save_chart(path: Path, line: Line, *, axis: str) -> None:
    """Writes one line, whose name is the title, as .svg or .png, on a logarithmic axis if all values are positive."""
    path, size = disk.expand_user(path), (640, 320)
    svg = line_chart([line], title=line.name, logarithmic=True, size=size, axis=axis, standalone=True)
    if path.suffix.lower() != ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_text(path, svg)
        return
    from resvg_py import svg_to_bytes

    font = ImageFont.load_default(size=14)  # the one in Pillow: a machine may have none
    assert isinstance(font, ImageFont.FreeTypeFont)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "font.ttf"
        file.write_bytes(font.font_bytes)
        fonts: Any = {"skip_system_fonts": True, "font_files": [str(file)], "sans_serif_family": font.getname()[0]}
        png = svg_to_bytes(svg_string=svg, width=size[0] * PNG_SCALE, **fonts)
    save_png(Image.open(io.BytesIO(bytes(png))).convert("RGB"), path, {"title": line.name})


def value_label(value: float) -> str:
    """0.00015 → "0.00015", 0.00001 → "1e-5", 1500.0 → "1,500"."""
    mantissa, _, exponent = f"{value:,.6g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
