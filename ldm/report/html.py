"""Self-contained HTML pages by Jinja2 from `templates/`: no scripts, no network, light or dark as the system is.

Everything is well-formed XML as well, so that one parser can check a page; text of unknown origin (captions, file
names, prompts, configs) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from ldm import disk
from ldm.progress import format_duration

MAX_CHARACTERS = 300  # of one text in a table
MAX_LIST = 200  # entries of one list
MAX_ROWS = 2000  # of one document


@dataclass(frozen=True)
class Palette:
    """Lines have a contrast of at least 3 : 1 to the background (WCAG 2, 1.4.11), text 4.5 : 1."""

    background: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Palette("#ffffff", "#3c4350", "#dfe3ea", ("#2b66b1", "#b4531a", "#2f7a4d", "#7c4c9e", "#52606f", "#8a6a12"))
DARK = Palette("#16191f", "#c3cad6", "#303641", ("#7db0ee", "#ee9a63", "#74c795", "#c49be4", "#a5b3c4", "#d8b95c"))


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
    styles = {"light_charts": Markup(style(LIGHT)), "dark_charts": Markup(style(DARK))}
    page = _environment().get_template(template).render(title=title, **styles, **content)
    disk.write_text(disk.expand_user(path), page)


def document(content: Mapping[str, Any], rows: Rows) -> Markup:
    """Any JSON object: one table of the scalars, then each list and object below its name; long ones are shortened."""
    return Markup(_environment().get_template("document.html").module.object(content, rows, 0))  # type: ignore[attr-defined]


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


# ---- text and JSON


def visible(text: object) -> str:
    """`str(text)` with the characters that would break markup or reorder text as escapes: U+001B → `\\x1b`."""

    def escape(match: re.Match[str]) -> str:
        # Controls, invisible formatting, lone surrogates, and the noncharacters U+FFFE and U+FFFF. The joiners U+200C
        # and U+200D are of these categories too, but Persian words and compound emoji need them.
        character = match[0]
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"
        hidden = hidden or ord(character) & 0xFFFE == 0xFFFE
        return character.encode("unicode_escape").decode() if hidden else character

    return re.sub(r"[^\n\t\x20-\x7e]", escape, str(text))


def escaped(text: object) -> str:
    """`visible` text for element content and quoted attributes."""
    return html.escape(visible(text), quote=True)


def shortened(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """The text, or its start and its length."""
    return text if len(text) <= max_characters else f"{text[:max_characters]}… ({len(text):,} characters)"


def format_number(value: float) -> str:
    """Floats with 4 digits, integers with separated thousands."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else shortened(str(value), 20)
    return f"{value:.4g}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError, or ValueError with its name for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not a JSON object")
    return content


@dataclass
class Rows:
    """How many rows of a document are left, and the file (`name`) with all of it."""

    name: str
    left: int = MAX_ROWS
    most: int = MAX_LIST

    def take(self, entries: Sequence[Any]) -> Sequence[Any]:
        """The first entries, as many as one list may have and are left."""
        taken = entries[: max(0, min(self.most, self.left))]
        self.left -= len(taken)
        return taken

    @staticmethod
    def columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
        """The first eight keys."""
        return list(dict.fromkeys(key for record in records for key in record))[:8]


def is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def label(key: str) -> str:
    """A key as a heading."""
    return shortened(key.replace("_", " "), 60)


def scalar(value: Any, key: str = "") -> str:
    """A value on one line; a list or object in a cell as short JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        in_words = key.endswith("seconds") and 60 <= value < 1e9
        return format_number(value) + (f" ({format_duration(value)})" if in_words else "")
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return shortened(", ".join(value))
    try:
        return shortened(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return "(nested too deeply to show)"
