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

# Pillow detects formats by their bytes and would start other programs for some (Ghostscript for EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] * AVIF))
# Raised when any source decodes the same bytes to other pixels; a part of the cache key of encoded images.
TRANSFORM_VERSION = 2
# Alpha below CLEAR_ALPHA of 255 is transparent; a cutout has at least this fraction of transparent border.
CLEAR_ALPHA, CLEAR_BORDER = 8, 0.5


def decode(data: bytes, background: tuple[int, int, int]) -> Decoded:
    """Decodes the first frame of an image file: upright, sRGB, mode RGB, on `background`.

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
            # Pillow converts 16-bit colors to 8 bits on loading.
            deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in image.tile)
            upright, found = to_srgb(ImageOps.exif_transpose(image))
            traits = tuple(_traits(image, deep, found or ignored_color_space(image)))
            rgb = to_rgb(upright, background)
            return Decoded(rgb, image.format or "", image.mode, traits, _alpha(upright))
    except UnidentifiedImageError as error:
        reason = unsupported_type(data) or f"not an image in a known format ({', '.join(FORMATS).lower()})"
        raise ValueError(reason) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of Pillow's error
        raise ValueError(f"more than {limit:,} pixels, which would fill memory; save it smaller") from error
    # Pillow's decoders raise many types for broken bytes: OSError, SyntaxError, struct.error, IndexError ….
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(reason or type(error).__name__) from error


def _traits(image: Image.Image, deep: bool, colors: str | None) -> Iterator[str]:
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):  # others are upright
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
    """Any mode → RGB: 16-bit grays scaled to 8 bits, transparent pixels blended with `background`.

    Raises:
        ValueError: for 32-bit grays, whose white is not defined, and modes that Pillow cannot convert.
    """
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257, rounded
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grays (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, mode L; None for opaque images."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    lowest, _ = alpha.getextrema()
    return None if lowest == 255 else alpha


def resize_and_crop(image: Image.Image, size: tuple[int, int], place: float = 0.5) -> Tensor:
    """Resizes an RGB image to cover `size` (antialiased bicubic) and crops it, in one pass; uint8 [3, h, w].

    Args:
        size: (h, w) in pixels.
        place: position of the crop in [0, 1), 0.5 for the center.
    """
    (height, width), (native_width, native_height) = size, image.size
    # Crop at whole pixels of the resized image, so that nothing is blurred at scale 1.
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


def cutout_color(alpha: Image.Image | None, image: Image.Image) -> tuple[int, int, int] | None:
    """The mean color of the motif of an image with a transparent border (`is_clear`); None for others.

    Args:
        alpha: mode L, of the size of `image`; None for opaque images.
        image: mode RGB.
    """
    if alpha is None or not is_clear(alpha):
        return None
    # Downscaled copies have the same mean.
    weights = np.asarray(alpha.resize((32, 32), Image.Resampling.BOX), dtype=np.float64)[..., None]  # [32, 32, 1]
    if weights.sum() == 0:
        return None
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float64)  # [32, 32, 3]
    red, green, blue = np.rint((pixels * weights).sum((0, 1)) / weights.sum()).astype(int).tolist()
    return red, green, blue


def is_clear(alpha: Image.Image) -> bool:
    """Whether at least half of the border is transparent."""
    return float(np.mean(border_pixels(np.asarray(alpha)) < CLEAR_ALPHA)) >= CLEAR_BORDER


def border_pixels(pixels: np.ndarray) -> np.ndarray:
    """[h, w, …] → the pixels at the edges, [N, …]."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


# Text chunks that may hold the orientation.
_UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")
# Printer profiles have a few MiB, more than Pillow accepts in a PNG.
_MAX_PROFILE = 2**24


def strip_text_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG → (the file without text chunks, the color profile if it is too large for Pillow). Pillow rejects valid
    images with long texts. Other files are unchanged. Profiles are cut at 16 MiB.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data, None
    view, pieces, profile = memoryview(data), [], None
    start, copied = 8, 0
    while start + 12 <= len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        content = view[start + 8 : end - 4]
        dropped = kind in (b"tEXt", b"zTXt", b"iTXt")
        if dropped and bytes(content[:80]).split(b"\0")[0] in _UPRIGHT:
            dropped = len(_unpacked(content, MAX_TEXT_CHUNK)) > MAX_TEXT_CHUNK
        if kind == b"iCCP" and len(_unpacked(content, MAX_TEXT_CHUNK)) > MAX_TEXT_CHUNK:
            profile, dropped = _unpacked(content, _MAX_PROFILE), True
        if dropped:
            pieces.append(view[copied:start])
            copied = end
        start = end
    return b"".join([*pieces, view[copied:]]) if pieces else data, profile


def _unpacked(content: memoryview, limit: int) -> bytes:
    """The decompressed content of a chunk, at most `limit` + 1 bytes; empty if it is not compressed."""
    _, _, rest = bytes(content).partition(b"\0")
    # iCCP and zTXt: a byte, and the data. iTXt: two bytes, language, NUL, translated name, NUL, and the data.
    for packed in (rest[1:], rest[2:].partition(b"\0")[2].partition(b"\0")[2]):
        try:
            return zlib.decompressobj().decompress(packed, limit + 1)
        except zlib.error:
            continue
    return b""
