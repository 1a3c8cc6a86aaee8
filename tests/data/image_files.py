"""Small files of pictures for the tests of layouts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data import DataConfig
from ldm.data.layouts import open_source
from ldm.data.sources import Source


def png(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(data, "PNG")
    return data.getvalue()


def save(path: Path, color: str = "red", caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def opened(path: Path, **changes: Any) -> Source:
    return open_source(DataConfig(path=str(path), resolution=8, **changes))


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {sample.id: sample.captions for sample in source.samples}


def reasons(source: Source) -> dict[str, str]:
    found = {entry.path: entry.reason for entry in source.skipped}
    assert len(found) == len(source.skipped), "one thing is skipped twice"
    return found


def color(source: Source, name: str) -> Any:
    sample = next(sample for sample in source.samples if sample.id == name)
    return sample.load().getpixel((1, 1))
