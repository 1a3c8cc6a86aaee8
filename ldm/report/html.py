"""Self-contained HTML pages by Jinja2 from `templates/`: no scripts, no network, light or dark as the system is.

Everything is well-formed XML as well, so that one parser can check a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from ldm import disk
from ldm.report import charts
from ldm.report.markup import Rows, format_number, is_nested, label, scalar, visible


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"scalar": scalar, "label": label, "number": format_number}
    environment.tests["nested"] = is_nested
    return environment


def write_page(path: Path, template: str, title: str, **content: Any) -> None:
    """Fills a template and writes it atomically; all text is escaped, except `Markup`."""
    styles = {"light_charts": Markup(charts.style(charts.LIGHT)), "dark_charts": Markup(charts.style(charts.DARK))}
    page = _environment().get_template(template).render(title=title, **styles, **content)
    disk.write_text(disk.expand_user(path), page)


def document(content: Mapping[str, Any], rows: Rows) -> Markup:
    """Any JSON object: one table of the scalars, then each list and object below its name; long ones are shortened."""
    return Markup(_environment().get_template("document.html").module.object(content, rows, 0))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Figure:
    """A chart, and the caption above it."""

    caption: str
    svg: Markup

    @classmethod
    def from_lines(cls, caption: str, lines: Sequence[charts.Line], **options: Any) -> Figure:
        """By `line_chart`."""
        return cls(caption, Markup(charts.line_chart(lines, title=caption, **options)))


@dataclass(frozen=True)
class Picture:
    """An image in a page: a data URL of an image of `size`, `alt` for screen readers, caption and note.

    Where the file cannot be read, `name` is shown with `fault`, since a page should not disclose paths.
    """

    name: str
    alt: str
    caption: str
    source: str = ""
    size: tuple[int, int] = (0, 0)
    note: str = ""
    fault: str = ""


def read_picture(path: Path, *, name: str, alt: str, caption: str, max_bytes: int) -> Picture:
    """A PNG file in at most `max_bytes` (base64 adds a third)."""
    try:
        content, media, shown, full = encoded(path, max_bytes)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        # The message of an unidentified image has the path.
        fault = "it is no PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        return Picture(name, alt, caption, fault=fault or type(error).__name__)
    note = ", shown as JPEG" if media == "image/jpeg" else ""
    if shown != full:
        note = f", shown at {shown[0]} × {shown[1]} of {full[0]} × {full[1]} pixels"
    return Picture(name, alt, caption, _data_url(content, media), shown, note)


def embedded(image: Image.Image, max_bytes: int) -> str:
    """The `src` of an `<img>`: PNG, or JPEG if PNG exceeds `max_bytes`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    media = "image/png"
    if buffer.tell() > max_bytes:
        buffer, media = io.BytesIO(), "image/jpeg"
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return _data_url(buffer.getvalue(), media)


def _data_url(content: bytes, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(content).decode('ascii')}"


def encoded(path: Path, max_bytes: int) -> tuple[bytes, str, tuple[int, int], tuple[int, int]]:
    """A PNG file in at most `max_bytes`: unchanged, else as JPEG, else as ever smaller JPEG.

    Returns the bytes, their media type, their size and that of the file (width, height); for a damaged file OSError,
    ValueError, SyntaxError or Image.DecompressionBombError.
    """
    with Image.open(path, formats=["PNG"]) as file:
        file.load()  # detects a truncated file
        if path.stat().st_size <= max_bytes:
            return path.read_bytes(), "image/png", file.size, file.size
        full = file.convert("RGB")
    shown, quality = full, 90
    while True:
        buffer = io.BytesIO()
        shown.save(buffer, format="JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= max_bytes or max(shown.size) <= 64:
            return buffer.getvalue(), "image/jpeg", shown.size, full.size
        factor = min(0.9, (max_bytes / buffer.tell()) ** 0.5)
        size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
        shown = full.resize(size, Image.Resampling.LANCZOS)
