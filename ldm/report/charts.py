"""Line charts over steps as SVG, or as PNG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm import disk
from ldm.pipelines import save_png
from ldm.report.markup import escaped, shortened

Point = tuple[int, float]
Size = tuple[int, int]
Position = Callable[[float, float], tuple[float, float]]

LEFT, RIGHT, BOTTOM, LEGEND_ROW, PNG_TOP = 60, 10, 40, 20, 30
MAX_POINTS = 500
MAX_MARKED_POINTS = 60  # up to so many points get a dot each
PNG_SCALE = 2  # pixels of a PNG per pixel of an SVG


@dataclass(frozen=True)
class Palette:
    """Lines have a contrast of at least 3 : 1 to the background (WCAG 2, 1.4.11), text 4.5 : 1."""

    background: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Palette("#ffffff", "#3c4350", "#dfe3ea", ("#2b66b1", "#b4531a", "#2f7a4d", "#7c4c9e", "#52606f", "#8a6a12"))
DARK = Palette("#16191f", "#c3cad6", "#303641", ("#7db0ee", "#ee9a63", "#74c795", "#c49be4", "#a5b3c4", "#d8b95c"))
DASHES = ("none", "9 4", "3 3", "12 3 3 3", "6 6", "2 5")  # lines differ in color and in dashes


def style(palette: Palette) -> str:
    """The CSS rules of the charts."""
    lines = "".join(f".curve .c{i}{{stroke:{c}}}.curve .d{i}{{fill:{c}}}" for i, c in enumerate(palette.lines))
    return (
        f".curve text{{fill:{palette.ink};font:14px sans-serif}}"
        f".curve .paper{{fill:{palette.background}}}.curve .grid{{stroke:{palette.grid}}}"
        f".curve .mark{{stroke:{palette.ink};stroke-dasharray:2 3}}"
        f".curve .halo{{stroke:{palette.background};stroke-width:4px;paint-order:stroke}}"
        f".curve polyline{{fill:none;stroke-width:1.8;stroke-linejoin:round}}"
        f".curve .raw{{stroke-width:1;opacity:.35}}{lines}"
    )


@dataclass(frozen=True)
class Line:
    """Finite (step, value) by rising step.

    Attributes:
        name: in the legend, unless empty.
        raw: the values before smoothing, in a pale color below.
    """

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
    """An SVG of lines over steps, from step 0.

    Args:
        lines: at least one, each with at least one point.
        title: for screen readers.
        logarithmic: if all values are positive, their axis is logarithmic.
        last_step: the steps reach at least this far, so that charts can share an axis.
        mark: a step to mark, and its label.
        axis: label of the steps.
        standalone: with its own style and background; otherwise the page has `style`.
    """
    assert lines and all(line.points for line in lines)
    width, height = size
    points = [point for line in lines for point in (*line.points, *line.raw)]
    steps = Axis(0, max(1, last_step, *(step for step, _ in points)), False)
    values = Axis.from_values([value for _, value in points], logarithmic=logarithmic, from_zero=from_zero)
    legend, top = _legend(lines, width - LEFT - RIGHT)
    position = _position(steps, values, (LEFT, top, width - RIGHT, height - BOTTOM))
    attributes = f'class="curve" role="img" aria-label="{escaped(title)}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>']
    if standalone:
        parts += [f"<style>{style(LIGHT)}</style>", f'<rect class="paper" width="{width}" height="{height}"/>']
    parts += _grid(steps, values, position, size, axis)
    for number, line in enumerate(lines):
        parts += _polylines(line, number % len(DASHES), position)
    if mark is not None:
        parts += _mark(mark, position(mark[0], values.low)[0], top, height - BOTTOM, width)
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


def save_chart(path: Path, line: Line, *, axis: str) -> None:
    """Writes one line as .svg or .png, its values on a logarithmic axis if all are positive.

    Args:
        line: its name is the title.
        axis: label of the steps.

    Raises:
        OSError: if the file cannot be written.
    """
    path = disk.expand_user(path)
    if path.suffix.lower() == ".png":
        save_png(rasterized(line, axis=axis), path, {"title": line.name})
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, line_chart([line], title=line.name, logarithmic=True, axis=axis, standalone=True))


def rasterized(line: Line, *, axis: str) -> Image.Image:
    """The chart of `save_chart` in pixels."""
    width, height = 640 * PNG_SCALE, 320 * PNG_SCALE
    left, right, bottom, top = (PNG_SCALE * margin for margin in (LEFT, RIGHT, BOTTOM, PNG_TOP))
    steps = Axis(0, max(1, *(step for step, _ in line.points)), False)
    values = Axis.from_values([value for _, value in line.points], logarithmic=True)
    position = _position(steps, values, (left, top, width - right, height - bottom))
    image = Image.new("RGB", (width, height), LIGHT.background)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=14 * PNG_SCALE)
    for value in values.ticks():
        _, y = position(0, value)
        canvas.line([(left, y), (width - right, y)], fill=LIGHT.grid, width=PNG_SCALE)
        canvas.text((left - 6 * PNG_SCALE, y), value_label(value), fill=LIGHT.ink, font=font, anchor="rm")
    for step in dict.fromkeys(int(tick) for tick in round_ticks(0, steps.high)):
        x, _ = position(step, values.low)
        anchor = "ra" if x > width - right - 20 * PNG_SCALE else "ma"
        canvas.text((x, height - bottom + 4 * PNG_SCALE), f"{step:,}", fill=LIGHT.ink, font=font, anchor=anchor)
    label = axis + _scale_note(values)
    canvas.text((width / 2, height - 2 * PNG_SCALE), label, fill=LIGHT.ink, font=font, anchor="md")
    canvas.text((left, 5 * PNG_SCALE), line.name, fill=LIGHT.ink, font=font, anchor="la")
    points = [position(*point) for point in thinned(line.points)]
    canvas.line(points, fill=LIGHT.lines[0], width=2 * PNG_SCALE, joint="curve")
    for point in points if len(points) <= MAX_MARKED_POINTS else ():
        canvas.circle(point, 2.6 * PNG_SCALE, fill=LIGHT.lines[0])
    return image


def _position(steps: Axis, values: Axis, box: tuple[int, int, int, int]) -> Position:
    """(step, value) → (x, y) in a box: left, top, right, bottom."""
    left, top, right, bottom = box

    def position(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * steps.fraction(step), top + (bottom - top) * (1 - values.fraction(value))

    return position


def _grid(steps: Axis, values: Axis, position: Position, size: Size, axis: str) -> list[str]:
    """A line at each round value, and the numbers on both axes."""
    width, height = size
    parts = []
    for value in values.ticks():
        _, y = position(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{value_label(value)}</text>')
    for step in dict.fromkeys(int(tick) for tick in round_ticks(0, steps.high)):
        x, _ = position(step, values.low)
        anchor = "end" if x > width - RIGHT - 20 else "middle"
        # Whole thousands are short, so that neighbors do not touch.
        label = f"{step // 1000:,}k" if step >= 10_000 and step % 1000 == 0 else f"{step:,}"
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="{anchor}">{label}</text>')
    label = escaped(axis) + _scale_note(values)
    parts.append(f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{label}</text>')
    return parts


def _scale_note(values: Axis) -> str:
    return "; values on a logarithmic scale" if values.logarithmic else ""


def _polylines(line: Line, number: int, position: Position) -> list[str]:
    def path(points: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (position(*point) for point in thinned(points)))

    parts = [f'<polyline class="raw c{number}" points="{path(line.raw)}"/>'] if line.raw else []
    dashes = f'stroke-dasharray="{DASHES[number]}"'
    parts.append(f'<polyline class="c{number}" {dashes} points="{path(line.points)}"/>')
    if len(line.points) <= MAX_MARKED_POINTS:
        dots = (position(*point) for point in line.points)
        parts += [f'<circle class="d{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    return parts


def _mark(mark: tuple[int, str], x: float, top: float, bottom: float, width: float) -> list[str]:
    anchor, offset = ("end", -6) if x > width / 2 else ("start", 6)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>',
        f'<text class="halo" x="{x + offset:.1f}" y="{top + 14}" text-anchor="{anchor}">{escaped(mark[1])}</text>',
    ]


def _legend(lines: Sequence[Line], width: float) -> tuple[list[str], int]:
    """Swatches and names above the plot, in as many rows as needed; and the top of the plot."""
    parts, x, row = [], 0.0, 0
    for number, line in enumerate(lines):
        if not line.name:
            continue
        name = shortened(line.name, 40)
        needed = 30 + 7.5 * len(name) + 16
        if x > 0 and x + needed > width:
            x, row = 0.0, row + 1
        y, left, kind = row * LEGEND_ROW + 10, LEFT + x, number % len(DASHES)
        parts.append(
            f'<line class="c{kind}" stroke-width="2" stroke-dasharray="{DASHES[kind]}" '
            f'x1="{left:.1f}" x2="{left + 24:.1f}" y1="{y}" y2="{y}"/>'
            f'<text x="{left + 30:.1f}" y="{y + 5}">{escaped(name)}</text>'
        )
        x += needed
    return parts, (row + 1) * LEGEND_ROW


def value_label(value: float) -> str:
    """0.00015 → "0.00015", 0.00001 → "1e-5", 1500.0 → "1,500"."""
    mantissa, _, exponent = f"{value:,.6g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
