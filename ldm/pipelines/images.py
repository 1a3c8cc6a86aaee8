"""Images as files: PIL from tensors, PNG with its settings, contact sheets with captions."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm import disk
from ldm.data.images import to_srgb
from ldm.diffusion import State


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] float in [−1, 1] (clamped) → PIL RGB images, rounded as diffusers rounds."""
    unit = (images.to(torch.float32) / 2 + 0.5).clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    return [Image.fromarray(array) for array in pixels]


def from_pil(images: Sequence[Image.Image]) -> Tensor:
    """PIL images (`check_images`) → [B, 3, H, W] float32 in [−1, 1]; an ICC profile is followed (to sRGB)."""
    check_images(images)
    pixels = [np.asarray(to_srgb(image)[0].convert("RGB")) for image in images]
    tensor = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # [B, 3, H, W]
    return tensor.to(torch.float32) / 127.5 - 1


def check_images(images: Sequence[Image.Image]) -> None:
    """Raises ValueError for none, for different sizes, and for transparency."""
    if not images:
        raise ValueError("the image list is empty; give at least one")
    sizes = list(dict.fromkeys(image.size for image in images))
    if len(sizes) > 1:
        raise ValueError(f"the images have sizes {sizes[0]} and {sizes[1]}; images of one call have one size")
    for image in images:
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"an image has mode {image.mode}; bring it to RGB on a background first")


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with `text` (prompt, seed, settings) as its iTXt chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # The name of a file may hold half of a surrogate pair; JSON escapes one in the same way.
        info.add_itxt(key, content.encode("utf-8", "backslashreplace").decode())
    path = disk.expand_user(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.new_file(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


class ProgressStrip:
    """x̂_0 at up to eight evenly spaced steps, a row for each image; give it to `on_step`.

    Args:
        preview: `Pipeline.preview`.
        steps: states of the run: S, or `len(scheduler.timesteps)` of a scheduler that evaluates more often (Heun's,
            PNDM).
    """

    def __init__(self, preview: Callable[[State], list[Image.Image]], steps: int) -> None:
        columns = min(8, steps)
        self._shown = {round((i + 1) * steps / columns) - 1 for i in range(columns)}
        self._preview = preview
        self._columns: dict[int, list[Image.Image]] = {}  # by the index of the step
        self._timesteps: dict[int, int] = {}

    def __call__(self, state: State) -> None:
        if state.index in self._shown:
            self._timesteps[state.index] = state.timestep
            self._columns.setdefault(state.index, []).extend(self._preview(state))

    @property
    def timesteps(self) -> list[int]:
        """Those of the steps that are shown, in their order."""
        return list(self._timesteps.values())

    def sheet(self, captions: Sequence[str]) -> Image.Image:
        """One row an image, under its caption and the timesteps."""
        rows = list(zip(*self._columns.values(), strict=True))
        steps = ", ".join(map(str, self.timesteps))
        return contact_sheet(rows, [f"{caption}, t = {steps}" for caption in captions], size=max(rows[0][0].width, 96))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] | None = None, *, size: int = 96
) -> Image.Image:
    """Rows of images whose longer side becomes `size` pixels (hard-edged when small), a caption above each row."""
    if not rows or not any(rows):
        raise ValueError("a contact sheet needs at least one image")
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
        for j, image in enumerate(row):
            longer = max(image.size)
            enlarge = Image.Resampling.NEAREST if longer <= size else Image.Resampling.LANCZOS
            w, h = (max(1, round(size * side / longer)) for side in image.size)
            corner = margin + j * (size + margin) + (size - w) // 2, top + height_of_caption + (size - h) // 2
            sheet.paste(image.resize((w, h), enlarge), corner)
    return sheet
