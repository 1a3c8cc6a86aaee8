"""A chart as a file: SVG as `curves` draws it, or the same as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm import disk
from ldm.pipelines import save_png
from ldm.report import curves
from ldm.report.curves import BOTTOM, LEFT, LIGHT, RIGHT, Line, Size, axis_of, round_ticks, thinned

TOP = 30
SCALE = 2  # pixels of a PNG for one of an SVG


def save_plot(path: Path, line: Line, *, axis: str) -> None:
    """Writes one line over t, its values on a logarithmic axis where all are positive.

    Args:
        path: ends in .svg or .png.
        line: its name stands above it.
        axis: what is written under it.

    Raises:
        OSError: if the file cannot be written.
    """
    path = disk.expand_user(path)
    if path.suffix.lower() == ".png":
        save_png(raster(line, axis=axis), path, {"title": line.name})
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, curves.draw([line], title=line.name, logarithmic=True, axis=axis, standalone=True))


def raster(line: Line, *, axis: str, size: Size = (640, 320)) -> Image.Image:
    """The chart that `curves.draw` makes of one line, in pixels."""
    width, height = (SCALE * side for side in size)
    left, right, bottom, top = (SCALE * margin for margin in (LEFT, RIGHT, BOTTOM, TOP))
    steps = curves.Axis(0, max(1, *(step for step, _ in line.points)), False)
    values = axis_of([value for _, value in line.points], logarithmic=True, from_zero=False)
    image = Image.new("RGB", (width, height), LIGHT.background)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14 * SCALE)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * steps.share(step)
        return x, top + (height - top - bottom) * (1 - values.share(value))

    for value in values.ticks():
        _, y = place(0, value)
        draw.line([(left, y), (width - right, y)], fill=LIGHT.grid, width=SCALE)
        draw.text((left - 6 * SCALE, y), curves.value_label(value), fill=LIGHT.ink, font=font, anchor="rm")
    for step in dict.fromkeys(int(tick) for tick in round_ticks(0, steps.high)):
        x, _ = place(step, values.low)
        anchor = "ra" if x > width - right - 20 * SCALE else "ma"
        draw.text((x, height - bottom + 4 * SCALE), f"{step:,}", fill=LIGHT.ink, font=font, anchor=anchor)
    scale = curves.LOGARITHMIC if values.logarithmic else ""
    draw.text((width / 2, height - 2 * SCALE), axis + scale, fill=LIGHT.ink, font=font, anchor="md")
    draw.text((left, 5 * SCALE), line.name, fill=LIGHT.ink, font=font, anchor="la")
    _trace(draw, [place(*point) for point in thinned(line.points)])
    return image


def _trace(draw: ImageDraw.ImageDraw, places: Sequence[tuple[float, float]]) -> None:
    draw.line(places, fill=LIGHT.lines[0], width=2 * SCALE, joint="curve")
    if len(places) <= curves.POINTS_MARKED:
        for x, y in places:
            draw.circle((x, y), 2.6 * SCALE, fill=LIGHT.lines[0])
