"""Pictures as files: PIL from tensors, PNG with its settings, contact sheets with captions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm import disk


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] float in [−1, 1] (clamped) → PIL RGB images, rounded as diffusers rounds."""
    unit = (images.to(torch.float32) / 2 + 0.5).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    return [Image.fromarray(array) for array in pixels]


def save_png(image: Image.Image, path: Path, text: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with `text` (prompt, seed, settings) as its iTXt chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.new_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] | None = None, *, size: int = 96
) -> Image.Image:
    """Rows of pictures whose longer side becomes `size` pixels (hard-edged when small), a caption above each row."""
    if not rows or not any(rows):
        raise ValueError("a contact sheet needs at least one picture")
    margin, columns = 4, max(len(row) for row in rows)
    font = ImageFont.load_default(size=13)
    height_of_caption = 18 if captions else 0
    width = columns * (size + margin) + margin
    if captions:
        width = max(width, *(int(font.getlength(caption)) + 2 * margin for caption in captions))
    row_height = size + margin + height_of_caption
    sheet = Image.new("RGB", (width, len(rows) * row_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = margin + i * row_height
        if captions:
            draw.text((margin, top), captions[i], fill="black", font=font)
        for j, picture in enumerate(row):
            longer = max(picture.size)
            enlarge = Image.Resampling.NEAREST if longer <= size else Image.Resampling.LANCZOS
            w, h = (max(1, round(size * side / longer)) for side in picture.size)
            corner = margin + j * (size + margin) + (size - w) // 2, top + height_of_caption + (size - h) // 2
            sheet.paste(picture.resize((w, h), enlarge), corner)
    return sheet
