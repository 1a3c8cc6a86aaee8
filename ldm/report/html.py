"""Self-contained HTML pages, light or dark as the system is, with charts and images; no scripts, no network.

Everything here is well-formed XML as well, so that one parser can check a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ldm import disk
from ldm.report import charts
from ldm.report.markup import escaped

PAGE = """<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

LAYOUT = """
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif;background:var(--paper);color:var(--ink)}
main{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}h4,h5,h6{font-size:.95rem;margin:1rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
.note,figcaption{color:var(--quiet);font-size:.875rem}
.say{border-left:3px solid var(--accent);padding:.1rem 0 .1rem .75rem}
.attention{border:1px solid var(--accent);border-radius:6px;padding:.5rem 1rem;margin:.75rem 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1.25rem 0}
.figures div{border:1px solid var(--rule);border-radius:6px;padding:.5rem .75rem}
dt{color:var(--quiet);font-size:.875rem}
dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dd small{display:block;font-size:.8rem;color:var(--quiet)}
figure{margin:0 0 1rem;min-width:0}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.5rem 1.5rem}
.chart{overflow-x:auto}.chart svg{display:block;width:100%;min-width:23rem;height:auto}
main>.chart svg{min-width:32rem;max-width:48rem}
.sheets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:1rem}
.sheets figure:first-child{grid-column:1/-1}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.5rem 1rem}
img{max-width:100%;height:auto;background:#fff;display:block;border-radius:4px}
table{border-collapse:collapse;font-size:.9rem}.wide{overflow-x:auto}
th,td{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:600}td{overflow-wrap:anywhere;min-width:6rem;font-variant-numeric:tabular-nums}
ul{margin:.4rem 0;padding-left:1.25rem}li{overflow-wrap:anywhere}
pre{overflow-x:auto;padding:.75rem;border:1px solid var(--rule);border-radius:6px;font-size:.85rem;line-height:1.4}
summary{cursor:pointer}
"""
LIGHT = "--paper:#ffffff;--ink:#1d222b;--quiet:#59616e;--rule:#dfe3ea;--accent:#b4531a"
DARK = "--paper:#16191f;--ink:#e4e8ee;--quiet:#a3acb9;--rule:#303641;--accent:#ee9a63"


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page atomically.

    Args:
        title: any text.
        body: well-formed XHTML, with all foreign text `escaped`.
    """
    dark = f"@media (prefers-color-scheme:dark){{:root{{{DARK}}}{charts.style(charts.DARK)}}}"
    style = f":root{{{LIGHT}}}{LAYOUT}{charts.style(charts.LIGHT)}{dark}"
    disk.write_text(disk.expand_user(path), PAGE.format(title=escaped(title), style=style, body=body))


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: name, value, text below it."""
    cells = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(below)}</small></dd></div>"
        for name, value, below in rows
    )
    return f"<dl class='figures'>{cells}</dl>" if cells else ""


def chart_figure(caption: str, svg: str) -> str:
    """A chart below its caption."""
    return f"<figure class='chart'><figcaption>{escaped(caption)}</figcaption>{svg}</figure>"


def image_figure(path: Path, *, name: str, alt: str, caption: str, max_bytes: int) -> str:
    """A PNG file inside a page, as a `<figure>` of at most `max_bytes` (base64 adds a third).

    Args:
        name: shown if the file cannot be read, since a page should not disclose paths.
        alt: for screen readers.
        caption: below the image; a note is added if the image is smaller than the file.
    """
    name = escaped(name)
    try:
        content, media, shown, full = encoded(path, max_bytes)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        reason = "it is no PNG" if isinstance(error, UnidentifiedImageError) else error  # its message has the path
        return f"<figure><p class='note'>{name} cannot be read ({escaped(reason)}).</p></figure>"
    note = ""
    if shown != full:
        note = f", shown at {shown[0]} × {shown[1]} of {full[0]} × {full[1]} pixels"
    elif media == "image/jpeg":
        note = ", shown as JPEG"
    size = f"width='{shown[0]}' height='{shown[1]}'"
    return (
        f"<figure><img src='{_data_url(content, media)}' {size} alt='{escaped(alt)}'/>"
        f"<figcaption>{escaped(caption)}{note}</figcaption></figure>"
    )


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

    Returns:
        The bytes, their media type, their size and that of the file (width, height in pixels).

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: for a file that cannot be decoded.
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
