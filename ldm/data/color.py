"""Conversion of images from their color profile to sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

CONVERTED, UNUSABLE, GAMMA, ADOBE = "color-profile", "bad-profile", "png-gamma", "adobe-rgb"

# Relative colorimetric with black point compensation, the default of image editors.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
# LittleCMS samples gray curves too coarsely otherwise: linear 1 of 255 would become 6 instead of 13.
_EXACT = ImageCms.Flags.NOOPTIMIZE
# A profile that changes no color by more than this is sRGB.
_SAME = 2
_GRAYS = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_SRGB_WHITE_AND_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)

# uint8 RGB [256, 3] of each gray
Grays = NDArray[np.uint8]


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An image with an ICC profile → (the image in sRGB, the trait).

    The trait is CONVERTED, UNUSABLE for a profile that is damaged or of another kind of image, or None if the profile
    is sRGB or missing; then the pixels are unchanged.
    """
    if ("icc_profile" not in image.info and image.mode != "LAB") or image.mode in ("I", "F"):
        return image, None  # the white of I and F is not defined; they are rejected later
    try:
        convert = _conversion(image.info.get("icc_profile"), image.mode == "LAB")
        return (image, None) if convert is None else (convert(image), CONVERTED)
    # Errors of Pillow and LittleCMS for broken profiles.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return (_lab(None)(image), UNUSABLE) if image.mode == "LAB" else (image, UNUSABLE)


def ignored_color_space(image: Image.Image) -> str | None:
    """A sign, in an image without a profile, of another color space than sRGB, which is ignored: GAMMA (gAMA or cHRM of
    a PNG), ADOBE (EXIF of cameras), or None.
    """
    info = image.info
    if "icc_profile" in info:
        return None
    if image.format == "PNG" and "srgb" not in info:
        gamma, places = info.get("gamma"), info.get("chromaticity")
        if gamma and abs(gamma * 2.2 - 1) > 0.05:
            return GAMMA
        if places and np.abs(np.subtract(places, _SRGB_WHITE_AND_PRIMARIES)).max() > 0.01:
            return GAMMA
    try:
        # Adobe RGB without a profile (DCF 2.0).
        return ADOBE if image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03" else None
    except Exception:  # broken EXIF raises many types
        return None


@lru_cache(maxsize=64)  # images of one camera or scanner have one profile
def _conversion(profile: bytes | None, lab: bool) -> Callable[[Image.Image], Image.Image] | None:
    """The conversion to sRGB; None for the identity. Raises ValueError for an unsuitable profile."""
    if lab:
        return _lab(profile)
    if not profile:  # Pillow could not decompress it
        raise ValueError("damaged")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space == "RGB":
        rgb, rgba = _transform(source, "RGB", "RGB"), _transform(source, "RGBA", "RGBA")
        grid = _grid()
        if _change(grid, _applied(rgb, grid)) <= _SAME:
            return None
        grays = np.asarray(_applied(_transform(source, "RGB", "RGB", _EXACT), _ramp().convert("RGB")))[0]
        return lambda image: _from_rgb(image, rgb, rgba, grays)
    if space == "GRAY":
        converted = _applied(_transform(source, "L", "RGB", _EXACT), _ramp())
        if _change(_ramp().convert("RGB"), converted) <= _SAME:
            return None
        grays = np.asarray(converted)[0]
        return lambda image: _from_gray(image, grays)
    if space == "CMYK":
        cmyk = _transform(source, "CMYK", "RGB")

        def from_cmyk(image: Image.Image) -> Image.Image:
            if image.mode != "CMYK":
                raise ValueError(f"an image of {image.mode} with a profile of CMYK")
            return _applied(cmyk, image)

        return from_cmyk
    raise ValueError(f"a profile of {space}")


def _transform(source: Any, mode: str, into: str, flags: int = 0) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, into, _INTENT, _FLAGS | flags)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    converted.info = {}  # the profile and the transparent color no longer apply
    return converted


def _ramp() -> Image.Image:
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def _grid() -> Image.Image:
    """A grid of 17³ RGB colors."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3))


def _change(before: Image.Image, after: Image.Image) -> int:
    return int(np.abs(np.asarray(before).astype(int) - np.asarray(after)).max())


def _from_rgb(
    image: Image.Image, rgb: ImageCms.ImageCmsTransform, rgba: ImageCms.ImageCmsTransform, grays: Grays
) -> Image.Image:
    if image.mode in _GRAYS:
        return _from_gray(image, grays)
    if image.mode in ("CMYK", "LAB"):
        raise ValueError(f"an image of {image.mode} with a profile of RGB")
    if image.has_transparency_data:
        return _applied(rgba, image.convert("RGBA"))
    return _applied(rgb, image.convert("RGB"))


def _from_gray(image: Image.Image, grays: Grays) -> Image.Image:
    if image.mode not in _GRAYS:
        raise ValueError(f"an image of {image.mode} with a profile of grays")
    if image.mode.startswith("I;16"):
        return Image.fromarray(_deep(np.asarray(image), grays))
    plain = image.convert("RGBA") if image.has_transparency_data else None
    level = np.asarray(image.convert("L") if plain is None else plain.getchannel("R"))
    converted = Image.fromarray(grays[level])  # [h, w] → [h, w, 3]
    if plain is not None:
        converted.putalpha(plain.getchannel("A"))
    return converted


def _deep(levels: NDArray[Any], grays: Grays) -> NDArray[np.uint8]:
    """16-bit grays [h, w] → RGB [h, w, 3], interpolated between 256 converted grays in linear light."""
    unit = grays.astype(np.float64) / 255
    light = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
    between = [np.interp(levels / 257, np.arange(256), light[:, channel]) for channel in range(3)]
    linear = np.stack(between, axis=-1)
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (coded * 255).round().astype(np.uint8)


def _lab(profile: bytes | None) -> Callable[[Image.Image], Image.Image]:
    """The conversion of CIE L*a*b*; the profile is optional."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    transform = _transform(source, "LAB", "RGB")
    return lambda image: _applied(transform, image)
