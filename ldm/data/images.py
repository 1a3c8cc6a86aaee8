"""Decode image files to RGB, and resize RGB images to uint8 tensors."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_CHUNK
from torch import Tensor

from ldm.data.color import CONVERTED, ignored_color_space, to_srgb
from ldm.data.file_types import AVIF, unsupported_type
from ldm.data.sources import Decoded

# What is decoded is told by the bytes, not by the suffix, so the formats are limited here too: Pillow knows
# some that start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] * AVIF))
# Raised when the way from stored bytes to pixels changes what comes out, in any source: encoded images are kept under
# their bytes and this.
TRANSFORM_VERSION = 2
# What is less opaque, of 255, is transparent; with so much of its border an image has no ground of its own.
CLEAR_ALPHA, CLEAR_BORDER = 8, 0.5


def decode(data: bytes, background: tuple[int, int, int]) -> Decoded:
    """Decodes an image file completely: its first frame, upright, in sRGB and mode RGB, on `background`.

    Raises:
        ValueError: with the reason, if the bytes cannot be read as an image.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        data, profile = strip_text_chunks(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if profile is not None:
                image.info["icc_profile"] = profile
            # Pillow hands out 16-bit colors as 8 bits, and forgets about it once they are loaded.
            deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in image.tile)
            upright, found = to_srgb(ImageOps.exif_transpose(image))
            traits = tuple(_traits(image, deep, found or ignored_color_space(image)))
            rgb = to_rgb(upright, background)
            return Decoded(rgb, image.format or "", image.mode, traits, _alpha(upright))
    except UnidentifiedImageError as error:
        reason = unsupported_type(data) or f"not an image in a known format ({', '.join(FORMATS).lower()})"
        raise ValueError(reason) from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where Pillow stops warning and refuses
        raise ValueError(f"more than {most:,} pixels, which would fill memory; save it smaller") from error
    # Pillow's decoders raise whatever comes up in the code that meets the broken bytes: OSError, SyntaxError,
    # struct.error, IndexError and more.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(reason or type(error).__name__) from error


def _traits(image: Image.Image, deep: bool, colors: str | None) -> Iterator[str]:
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):  # all else turns nothing, such as 0
        yield "rotated"
    if colors is not None:
        yield colors
    if image.mode == "CMYK" and colors != CONVERTED:
        yield "cmyk"
    if deep:
        yield "16-bit"
    if image.mode in ("P", "PA"):
        yield "palette"
    if image.has_transparency_data:
        yield "transparent"
    if getattr(image, "n_frames", 1) > 1:
        yield "animated"


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode → RGB: 16-bit greys scaled to 8 bits, transparent pixels blended with `background`.

    Raises:
        ValueError: for 32-bit greys, whose white is not defined, and modes that Pillow cannot convert.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257, rounded
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit greys (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, in mode L; None where all are."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    lowest, _ = alpha.getextrema()
    return None if lowest == 255 else alpha


def resize_and_crop(image: Image.Image, size: tuple[int, int], place: float = 0.5) -> Tensor:
    """The largest part of an RGB image with the shape of `size`, resized (antialiased bicubic) to uint8 [3, h, w].

    The same as resizing until both sides cover `size`, and no further, and then cropping at whole pixels, in one
    pass.

    Args:
        size: (h, w) in pixels.
        place: where the part lies along the side that is cropped, in [0, 1): 0 at its start, 0.5 in the middle, just
            below 1 at its end.
    """
    (height, width), (native_width, native_height) = size, image.size
    # Whole pixels of the resized image: where the scale is 1 already, a crop must not blur.
    if native_width * height > native_height * width:
        spare = native_width * height // native_height - width
        scale, extent = native_height / height, native_height * width / height
        left, top = int(place * (spare + 1)) * scale, 0.0
        right, bottom = min(left + extent, native_width), float(native_height)
    else:
        spare = native_height * width // native_width - height
        scale, extent = native_width / width, native_width * height / width
        left, top = 0.0, int(place * (spare + 1)) * scale
        right, bottom = float(native_width), min(top + extent, native_height)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # [h, w, 3] → [3, h, w]


def cutout_of(alpha: Image.Image | None, image: Image.Image) -> tuple[int, int, int] | None:
    """The mean color of what an image shows whose border is transparent, at least half of it; None for others.

    Args:
        alpha: mode L, of the size of `image`; None for an opaque one.
        image: RGB.
    """
    if alpha is None or not is_clear(alpha):
        return None
    # Of small ones, which have the same mean.
    weights = np.asarray(alpha.resize((32, 32), Image.Resampling.BOX), dtype=np.float64)[..., None]  # [32, 32, 1]
    if weights.sum() == 0:
        return None
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float64)  # [32, 32, 3]
    red, green, blue = np.rint((pixels * weights).sum((0, 1)) / weights.sum()).astype(int).tolist()
    return red, green, blue


def is_clear(alpha: Image.Image) -> bool:
    """Whether at least half of the border is transparent."""
    return float(np.mean(border_of(np.asarray(alpha)) < CLEAR_ALPHA)) >= CLEAR_BORDER


def border_of(pixels: np.ndarray) -> np.ndarray:
    """[h, w, …] → the pixels at its edges, [N, …]."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


# The texts that say how a picture is turned, where nothing else does.
_UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")
# Profiles of printers have a few MiB, more than Pillow takes of a PNG.
_MAX_PROFILE = 2**24


def strip_text_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG → (it without its texts, its color profile if that is too large for Pillow); other files stay as they are.

    A profile of more than 16 MiB is cut off, and so damaged.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data, None
    view, kept, profile = memoryview(data), [], None
    start, copied = 8, 0
    while start + 12 <= len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        content = view[start + 8 : end - 4]
        dropped = kind in (b"tEXt", b"zTXt", b"iTXt") and not _says_upright(content)
        if kind == b"iCCP" and len(_unpacked(content, MAX_TEXT_CHUNK)) > MAX_TEXT_CHUNK:
            profile, dropped = _unpacked(content, _MAX_PROFILE), True
        if dropped:
            kept.append(view[copied:start])
            copied = end
        start = end
    return b"".join([*kept, view[copied:]]) if kept else data, profile


def _says_upright(content: memoryview) -> bool:
    name = bytes(content[:80]).split(b"\0")[0]
    return name in _UPRIGHT and len(_unpacked(content, MAX_TEXT_CHUNK)) <= MAX_TEXT_CHUNK


def _unpacked(content: memoryview, most: int) -> bytes:
    """What is compressed in a chunk, at most a byte more than `most`; nothing if nothing is."""
    _, _, rest = bytes(content).partition(b"\0")
    # iCCP and zTXt: a byte, and the data. iTXt: two bytes, language, NUL, translated name, NUL, and the data.
    for packed in (rest[1:], rest[2:].partition(b"\0")[2].partition(b"\0")[2]):
        try:
            return zlib.decompressobj().decompress(packed, most + 1)
        except zlib.error:
            continue
    return b""
