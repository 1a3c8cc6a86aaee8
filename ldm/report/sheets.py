"""Pictures inside a page of bounded size: the sample sheets of a run, and any other PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ldm.report.markup import escaped

MOST_SHEETS = 12
MOST_BYTES = 5_000_000  # of all of them; base64 adds a third


@dataclass(frozen=True)
class Sheet:
    step: int
    path: Path


def find_sheets(folder: Path) -> list[Sheet]:
    """The sheets `step_XXXXXXXX.png` of a folder, oldest first."""
    named = ((re.fullmatch(r"step_(\d{1,12})\.png", path.name, re.ASCII), path) for path in folder.glob("step_*.png"))
    return sorted((Sheet(int(match[1]), path) for match, path in named if match), key=lambda sheet: sheet.step)


def spread(sheets: Sequence[Sheet], most: int = MOST_SHEETS) -> list[Sheet]:
    """At most so many of them, evenly over time, the first and the last included."""
    if len(sheets) <= most:
        return list(sheets)
    return [sheets[round(i * (len(sheets) - 1) / (most - 1))] for i in range(most)]


def figures(sheets: Sequence[Sheet]) -> str:
    """Each sheet as a `<figure>`, newest first. What cannot be read is named."""
    share = MOST_BYTES // max(1, len(sheets))
    return "".join(_figure(sheet, share) for sheet in reversed(sheets))


def _figure(sheet: Sheet, most_bytes: int) -> str:
    return figure(
        sheet.path,
        name=f"samples/{sheet.path.name}",
        alt=f"sample sheet of step {sheet.step:,}",
        caption=f"step {sheet.step:,}",
        most_bytes=most_bytes,
    )


def figure(path: Path, *, name: str, alt: str, caption: str, most_bytes: int) -> str:
    """A PNG file inside a page, as a `<figure>` of so many bytes at most (base64 adds a third).

    Args:
        name: what the page calls the file, where it cannot be read: its own path is nobody's business.
        alt: what a screen reader says.
        caption: below the picture; says too where it is smaller than its file.
    """
    name = escaped(name)
    try:
        content, media, shown, full = encoded(path, most_bytes)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all of these leave Pillow
        # That message holds the whole path, which is nobody's business on a page that is passed on.
        reason = "it is no PNG" if isinstance(error, UnidentifiedImageError) else error
        return f"<figure><p class='note'>{name} cannot be read ({escaped(reason)}).</p></figure>"
    note = ""
    if shown != full:
        note = f", shown at {shown[0]} × {shown[1]} of {full[0]} × {full[1]} pixels"
    elif media == "image/jpeg":
        note = ", shown as JPEG"
    source = f"data:{media};base64,{base64.b64encode(content).decode('ascii')}"
    size = f"width='{shown[0]}' height='{shown[1]}'"
    return (
        f"<figure><img src='{source}' {size} alt='{escaped(alt)}'/>"
        f"<figcaption>{escaped(caption)}{note}</figcaption></figure>"
    )


def embedded(image: Image.Image, most_bytes: int) -> str:
    """A picture in memory as the `src` of an `<img>`: PNG, or JPEG where that takes more bytes than it may."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    media = "image/png"
    if buffer.tell() > most_bytes:
        buffer, media = io.BytesIO(), "image/jpeg"
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return f"data:{media};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def encoded(path: Path, most_bytes: int) -> tuple[bytes, str, tuple[int, int], tuple[int, int]]:
    """A picture in at most so many bytes: as it is, else as JPEG, else as ever smaller JPEG.

    Returns:
        The bytes, their media type, the size in them and the size in the file (width, height in pixels).

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: if it is no picture that can be decoded.
    """
    with Image.open(path, formats=["PNG"]) as file:
        file.load()  # a truncated file is found here, not by whoever looks at the page
        if path.stat().st_size <= most_bytes:
            return path.read_bytes(), "image/png", file.size, file.size
        full = file.convert("RGB")
    shown, quality = full, 90
    while True:
        buffer = io.BytesIO()
        shown.save(buffer, format="JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= most_bytes or max(shown.size) <= 64:
            return buffer.getvalue(), "image/jpeg", shown.size, full.size
        factor = min(0.9, (most_bytes / buffer.tell()) ** 0.5)
        size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
        shown = full.resize(size, Image.Resampling.LANCZOS)
