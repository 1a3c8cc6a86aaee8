"""Curves over the steps of a run as SVG, without any drawing library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ldm.report.markup import cut, escaped

Point = tuple[int, float]
Size = tuple[int, int]
Place = Callable[[float, float], tuple[float, float]]

LEFT, RIGHT, BOTTOM, LEGEND_ROW = 60, 10, 40, 20
POINTS_DRAWN = 500
LOGARITHMIC = "; values on a logarithmic scale"
POINTS_MARKED = 60  # so few points are measurements that stand alone, each with its dot


# Lines differ in colour and in dashes; all are at least 3 : 1 against the background (WCAG 2, 1.4.11), text 4.5 : 1.
@dataclass(frozen=True)
class Palette:
    background: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Palette("#ffffff", "#3c4350", "#dfe3ea", ("#2b66b1", "#b4531a", "#2f7a4d", "#7c4c9e", "#52606f", "#8a6a12"))
DARK = Palette("#16191f", "#c3cad6", "#303641", ("#7db0ee", "#ee9a63", "#74c795", "#c49be4", "#a5b3c4", "#d8b95c"))
DASHES = ("none", "9 4", "3 3", "12 3 3 3", "6 6", "2 5")


def style(palette: Palette) -> str:
    """The CSS rules of `draw`'s classes."""
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
    """(step, value) in the order of the steps, all finite. `raw` is drawn pale underneath, as it was measured.

    A line without a name is not in the legend.
    """

    name: str
    points: Sequence[Point]
    raw: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """low … high of the values; `logarithmic` only where all of them are positive."""

    low: float
    high: float
    logarithmic: bool

    def share(self, value: float) -> float:
        """0 at the lower end of the axis, 1 at the upper."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About five round values; on a logarithmic axis of several decades, powers of ten or 1, 2, 5."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(exponents) // 6)
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
                found = [digit * 10.0**exponent for exponent in exponents[::every] for digit in digits]
                found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
                if 4 <= len(found) <= 8:
                    return found
        return round_ticks(self.low, self.high)


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, `wanted` at most and at least two."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(power * digit for digit in (1, 2, 5, 10, 20) if (high - low) / (power * digit) <= wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [multiple * step for multiple in range(first, last + 1)]


def axis_of(values: Sequence[float], *, logarithmic: bool, from_zero: bool) -> Axis:
    """The axis that holds just these values; a constant gets some room on both sides."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= max(1e-4 * max(abs(low), abs(high)), 1e-100):
        room = abs(high) * 0.1 if abs(high) > 1e-100 else 1.0
        low, high = low - room, high + room
    return Axis(low, high, logarithmic and low > 0)


def smooth(points: Sequence[Point], share: float = 0.02) -> list[Point]:
    """A running mean over a share of the points on both sides of each, at 1000 places at most."""
    half = int(len(points) * share)
    every = max(1, len(points) // 1000)
    places = sorted({*range(0, len(points), every), *([len(points) - 1] if points else [])})
    windows = (points[max(0, i - half) : i + half + 1] for i in places)
    # No cumulative sum: after one huge spike it would have lost the digits of all that is small.
    return [(points[i][0], sum(v for _, v in w) / len(w)) for i, w in zip(places, windows, strict=True)]


def thinned(points: Sequence[Point], most: int = POINTS_DRAWN) -> Sequence[Point]:
    """At most `most` of the points: both ends, the lowest and the highest of each stretch. So no spike is lost."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]]


def draw(
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
    """An SVG of lines over steps, from step 0 to the last one.

    Args:
        lines: at least one, each with at least one point.
        title: what a screen reader says.
        logarithmic: where every value is positive, the values are on a logarithmic axis.
        last_step: the steps reach at least so far, so that several charts share their axis.
        mark: a step to point out, and what to write there.
        axis: what is written under the steps.
        standalone: with its own colours (a light page) and paper; otherwise the page has `style`.
    """
    assert lines and all(line.points for line in lines)
    width, height = size
    points = [point for line in lines for point in (*line.points, *line.raw)]
    steps = Axis(0, max(1, last_step, *(step for step, _ in points)), False)
    values = axis_of([value for _, value in points], logarithmic=logarithmic, from_zero=from_zero)
    legend, top = _legend(lines, width - LEFT - RIGHT)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (width - LEFT - RIGHT) * steps.share(step)
        return x, top + (height - top - BOTTOM) * (1 - values.share(value))

    attributes = f'class="curve" role="img" aria-label="{escaped(title)}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>']
    if standalone:
        parts += [f"<style>{style(LIGHT)}</style>", f'<rect class="paper" width="{width}" height="{height}"/>']
    parts += _grid(steps, values, place, size, axis)
    for number, line in enumerate(lines):
        parts += _polylines(line, number % len(DASHES), place)
    if mark is not None:
        parts += _mark(mark, place(mark[0], values.low)[0], top, height - BOTTOM, width)
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


def _grid(steps: Axis, values: Axis, place: Place, size: Size, axis: str) -> list[str]:
    """A line at each round value, and the numbers on both axes."""
    width, height = size
    parts = []
    for value in values.ticks():
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{value_label(value)}</text>')
    for step in dict.fromkeys(int(tick) for tick in round_ticks(0, steps.high)):
        x, _ = place(step, values.low)
        anchor = "end" if x > width - RIGHT - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="{anchor}">{_step_label(step)}</text>')
    scale = LOGARITHMIC if values.logarithmic else ""
    parts.append(f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{escaped(axis)}{scale}</text>')
    return parts


def _polylines(line: Line, number: int, place: Place) -> list[str]:
    def path(points: Sequence[Point]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thinned(points)))

    parts = [f'<polyline class="raw c{number}" points="{path(line.raw)}"/>'] if line.raw else []
    dashes = f'stroke-dasharray="{DASHES[number]}"'
    parts.append(f'<polyline class="c{number}" {dashes} points="{path(line.points)}"/>')
    if len(line.points) <= POINTS_MARKED:
        dots = (place(*point) for point in line.points)
        parts += [f'<circle class="d{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    return parts


def _mark(mark: tuple[int, str], x: float, top: float, bottom: float, width: float) -> list[str]:
    anchor, offset = ("end", -6) if x > width / 2 else ("start", 6)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>',
        f'<text class="halo" x="{x + offset:.1f}" y="{top + 14}" text-anchor="{anchor}">{escaped(mark[1])}</text>',
    ]


def _legend(lines: Sequence[Line], width: float) -> tuple[list[str], int]:
    """Swatches and names above the plot, in as many rows as they need; and where the plot begins."""
    parts, x, row = [], 0.0, 0
    for number, line in enumerate(lines):
        if not line.name:
            continue
        name = cut(line.name, 40)
        needed = 30 + 7.5 * len(name) + 16
        if x > 0 and x + needed > width:
            x, row = 0.0, row + 1
        y, left, look = row * LEGEND_ROW + 10, LEFT + x, number % len(DASHES)
        parts.append(
            f'<line class="c{look}" stroke-width="2" stroke-dasharray="{DASHES[look]}" '
            f'x1="{left:.1f}" x2="{left + 24:.1f}" y1="{y}" y2="{y}"/>'
            f'<text x="{left + 30:.1f}" y="{y + 5}">{escaped(name)}</text>'
        )
        x += needed
    return parts, (row + 1) * LEGEND_ROW


def _step_label(step: int) -> str:
    """100000 → "100k": whole thousands are short, so that neighbours do not touch."""
    return f"{step // 1000:,}k" if step >= 10_000 and step % 1000 == 0 else f"{step:,}"


def value_label(value: float) -> str:
    """0.00015 → "0.00015", 0.00001 → "1e-5", 1500.0 → "1,500"."""
    mantissa, _, exponent = f"{value:,.6g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
