"""Rendering of scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.scenes import PLACES, Anchor, Drawing, Part, Scene, rasterize

# sRGB, distinct enough to be named alike by people.
RGB = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 208, 20),
    "green": (56, 150, 60),
    "blue": (30, 100, 215),
    "purple": (130, 60, 170),
    "pink": (246, 130, 180),
    "brown": (125, 75, 40),
    "black": (45, 45, 50),
    "white": (247, 247, 247),
    "gray": (140, 143, 148),
}
# Default anchors of worn things. Their width becomes WORN_WIDTH times that of the head, eyes or neck.
WORN_ANCHORS = {"head": Anchor(0.5, 0.88, 0.9), "face": Anchor(0.5, 0.5, 0.9), "neck": Anchor(0.5, 0.25, 0.8)}
WORN_WIDTH = 1.05
MIN_WORN_SIZE = {"head": 0.36, "face": 0.32, "neck": 0.3}  # of the wearer's width: visible at 64 pixels
HELD_SIZE = 0.5
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class RenderedPart:
    """A rendered part and its box in fractions of the image; other parts may cover it."""

    part: Part
    box: Box


def render_scene(scene: Scene, rng: np.random.Generator, resolution: int) -> Image.Image:
    """An RGB image of `resolution` × `resolution` pixels; `rng` varies the positions."""
    return render_parts(scene, rng, resolution)[0]


def render_parts(scene: Scene, rng: np.random.Generator, resolution: int) -> tuple[Image.Image, list[RenderedPart]]:
    """The image of `render_scene`, and all parts, including attached ones and repetitions."""
    side = 2 * resolution  # 2× supersampling
    canvas = _ground(scene.background, rng, side)
    rendered = []
    for part, box, bottom in _boxes(scene, rng):
        unit, inside = _unit(part, round(1.5 * resolution))
        x, y, width, height = _paste(canvas, unit, box, bottom, side)
        for one, (left, top, right, low) in inside:
            across, down = width / unit.width / side, height / unit.height / side
            place = (x / side + left * across, y / side + top * down, x / side + right * across, y / side + low * down)
            rendered.append(RenderedPart(one, place))
    return canvas.reduce(2), rendered


def _boxes(scene: Scene, rng: np.random.Generator) -> list[tuple[Part, Box, bool]]:
    """(part, its box, whether it stands on the bottom of the box), from back to front."""
    first = scene.parts[0]
    if scene.kind == "count":
        return [(first, box, False) for box in _grid(scene.count, rng)]
    if len(scene.parts) == 1:
        side = {"small": rng.uniform(0.28, 0.42), "big": rng.uniform(0.94, 1.0), None: rng.uniform(0.74, 0.94)}
        size = side[first.size]
        x, y = rng.uniform(0, 1 - size, 2) if first.size == "small" else (1 - size) * rng.uniform(0.3, 0.7, 2)
        return [(first, (x, y, x + size, y + size), False)]
    if scene.kind == "three":
        y = rng.uniform(0.28, 0.4)
        xs = (0.01, 0.34, 0.67)
        return [(part, (x, y, x + 0.32, y + 0.34), True) for part, x in zip(scene.parts, xs, strict=True)]
    second = scene.parts[1]
    sizes = {"big": 1.1, "small": 0.62, None: 1.0}
    a, b = sizes[first.size], sizes[second.size]
    how = scene.relation
    if how in ("next to", "left of", "right of"):
        swapped = how == "right of" or (how == "next to" and rng.random() < 0.5)
        left, right, wl, wr = (second, first, b, a) if swapped else (first, second, a, b)
        wl, wr = 0.46 * wl, 0.46 * wr
        bottom = rng.uniform(0.72, 0.84)
        return [
            (left, (0.25 - wl / 2, bottom - 1.2 * wl, 0.25 + wl / 2, bottom), True),
            (right, (0.75 - wr / 2, bottom - 1.2 * wr, 0.75 + wr / 2, bottom), True),
        ]
    if how in ("above", "under"):
        top, low, ht, hl = (first, second, a, b) if how == "above" else (second, first, b, a)
        ht, hl = 0.46 * ht, 0.46 * hl
        x = 0.5 + rng.uniform(-0.05, 0.05)
        return [(top, (x - 0.34, 0.48 - ht, x + 0.34, 0.48), False), (low, (x - 0.34, 0.99 - hl, x + 0.34, 0.99), True)]
    front, back, f, k = (first, second, a, b) if how == "in front of" else (second, first, b, a)
    shift = rng.uniform(-0.12, 0.12)
    k, f = 0.68 * k, 0.46 * f
    return [
        (back, (0.5 - k / 2 - shift, 0.78 - k, 0.5 + k / 2 - shift, 0.78), True),
        (front, (0.5 - f / 2 + shift, 0.98 - f, 0.5 + f / 2 + shift, 0.98), True),
    ]


def _grid(count: int, rng: np.random.Generator) -> list[Box]:
    """Boxes for two to five repetitions."""
    row = rng.random() < 0.4
    if count == 2:
        centers, size = [(0.26, 0.5), (0.74, 0.5)], 0.44
    elif count == 3 and row:
        centers, size = [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)], 0.31
    elif count == 3:
        centers, size = [(0.5, 0.26), (0.26, 0.74), (0.74, 0.74)], 0.42
    elif count == 4:
        centers, size = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)], 0.42
    else:
        centers, size = [(0.18, 0.18), (0.82, 0.18), (0.5, 0.5), (0.18, 0.82), (0.82, 0.82)], 0.31
    size *= rng.uniform(0.88, 1.0)
    return [(x - size / 2, y - size / 2, x + size / 2, y + size / 2) for x, y in centers]


def _paste(canvas: Image.Image, unit: Image.Image, box: Box, bottom: bool, side: int) -> tuple[int, int, int, int]:
    """Pastes an image into a box, as large as it fits, centered or at the bottom → its (left, top, width, height)."""
    left, top, right, low = (edge * side for edge in box)
    scale = min((right - left) / unit.width, (low - top) / unit.height)
    width, height = max(1, round(unit.width * scale)), max(1, round(unit.height * scale))
    x = round((left + right - width) / 2)
    y = round(low - height) if bottom else round((top + low - height) / 2)
    x, y = min(max(x, 0), max(0, side - width)), min(max(y, 0), max(0, side - height))  # tall things move down
    resized = unit.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    canvas.paste(resized, (x, y), resized)
    return x, y, width, height


def _unit(part: Part, side: int) -> tuple[Image.Image, list[tuple[Part, Box]]]:
    """A part with attached parts as cropped RGBA, and the box of each in pixels."""
    body = _sprite(part.drawing, part.color, side)
    boxes: list[tuple[Part, Box]] = [(part, (0, 0, *body.size))]
    if part.worn is not None or part.held is not None:
        margin = side
        joined = Image.new("RGBA", (body.width + 2 * margin, body.height + 2 * margin))
        joined.alpha_composite(body, (margin, margin))
        boxes = [(part, (margin, margin, margin + body.width, margin + body.height))]
        if part.worn is not None:
            worn, place, name = part.worn, part.worn.thing.wears, part.worn.thing.anchor
            assert place is not None and name is not None
            anchor, own = part.drawing.anchors[name], worn.drawing.anchors.get("worn", WORN_ANCHORS[place])
            wide, longest = WORN_WIDTH * anchor.width * body.width / own.width, max(body.size)
            width = max(2, round(max(wide, MIN_WORN_SIZE[place] * longest)))
            sprite = _sprite(worn.drawing, worn.color, side)
            height = max(2, round(sprite.height * width / sprite.width))
            limit = round(0.9 * longest)
            if height > limit:
                width, height = max(2, round(width * limit / height)), limit
            sprite = sprite.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
            x, y = own.x * width, own.y * height
            angle = anchor.angle - own.angle
            if angle:
                rotated = sprite.rotate(-angle, Image.Resampling.BILINEAR, expand=True)
                radians = np.deg2rad(angle)
                dx, dy = x - width / 2, y - height / 2
                x = rotated.width / 2 + dx * np.cos(radians) - dy * np.sin(radians)
                y = rotated.height / 2 + dx * np.sin(radians) + dy * np.cos(radians)
                sprite = rotated
            left = max(0, round(margin + anchor.x * body.width - x))
            top = max(0, round(margin + anchor.y * body.height - y))
            joined.alpha_composite(sprite, (left, top))
            # Rotation leaves empty corners.
            inner = (sprite.getbbox() if angle else None) or (0, 0, *sprite.size)
            boxes.append((worn, (left + inner[0], top + inner[1], left + inner[2], top + inner[3])))
        if part.held is not None:
            hand = part.drawing.anchors["hand"]
            held = _sprite(part.held.drawing, part.held.color, max(1, round(HELD_SIZE * max(body.size))))
            x, y = margin + hand.x * body.width, margin + hand.y * body.height
            left, top = round(x - held.width / 2), round(y - 0.75 * held.height)
            joined.alpha_composite(held, (left, top))
            boxes.append((part.held, (left, top, left + held.width, top + held.height)))
        bounds = joined.getbbox()
        assert bounds is not None
        body = joined.crop(bounds)
        x, y = bounds[:2]
        boxes = [(one, (box[0] - x, box[1] - y, box[2] - x, box[3] - y)) for one, box in boxes]
    if part.mirrored:
        body = body.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = [(one, (body.width - box[2], box[1], body.width - box[0], box[3])) for one, box in boxes]
    return body, boxes


@lru_cache(maxsize=512)
def _sprite(drawing: Drawing, color: str | None, side: int) -> Image.Image:
    pixels = rasterize(drawing, side)
    return Image.fromarray(pixels if color is None else tint(pixels, RGB[color]), "RGBA")


def tint(pixels: np.ndarray, rgb: tuple[int, int, int]) -> np.ndarray:
    """Tints uint8 RGBA [h, w, 4]: the 60th percentile of lightness becomes `rgb`, other values darker or whiter."""
    values = pixels[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # [h, w]
    opaque = values[pixels[..., 3] > 127]
    middle = float(np.percentile(opaque, 60)) if opaque.size else 128.0
    middle = max(middle, 60.0)
    shade = np.clip(values / middle, 0.12, 1.0)[..., None]
    light = (0.75 * np.clip((values - middle) / max(255.0 - middle, 1.0), 0.0, 1.0))[..., None]
    color = np.array(rgb, np.float32)
    tinted = color * shade
    tinted += (255.0 - tinted) * light
    return np.concatenate([np.rint(tinted).astype(np.uint8), pixels[..., 3:]], axis=-1)


def _ground(background: str, rng: np.random.Generator, side: int) -> Image.Image:
    if background not in PLACES:
        return Image.new("RGB", (side, side), RGB[background] if background else (255, 255, 255))
    if background == "night sky":
        canvas = Image.new("RGB", (side, side), (18, 24, 66))
        pen = ImageDraw.Draw(canvas)
        for x, y in rng.integers(0, side, (24, 2)).tolist():
            pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(250, 246, 210))
        return canvas
    sky, ground = ((190, 226, 250), (106, 176, 76)) if background == "grass" else ((206, 234, 250), (45, 130, 200))
    canvas = Image.new("RGB", (side, side), sky)
    pen = ImageDraw.Draw(canvas)
    horizon = round(side * rng.uniform(0.58, 0.7))
    pen.rectangle((0, horizon, side, side), fill=ground)
    if background == "sea":
        for x, y in zip(rng.integers(0, side, 10), rng.integers(horizon, side, 10), strict=True):
            pen.arc((int(x) - 7, int(y) - 4, int(x) + 7, int(y) + 4), 200, 340, fill=(170, 215, 240), width=2)
    return canvas
