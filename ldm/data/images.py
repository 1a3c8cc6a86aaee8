"""Image files: those of a folder, by suffix and first bytes, and decoding to upright sRGB on a background."""

from __future__ import annotations

import io
import os
import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from PIL.PngImagePlugin import MAX_TEXT_CHUNK
from torch import Tensor

from ldm.data.sources import Decoded, Skipped

AVIF = bool(features.check("avif"))  # not every build of Pillow has libavif
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", *([".avif"] * AVIF)})
IMAGES = SUFFIXES | {".jfif", ".jpe", ".svg"}  # browsers save JPEG files as .jfif and .jpe
CAPTION_FILES = (".txt", ".caption")
# Text files that explain a folder, by the beginning of their names.
DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "changelog", "credits", "attribution", "classes")
_UNSUPPORTED = frozenset(
    (
        *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".xcf", ".ico", ".tga", ".eps", ".exr", ".hdr"),
        *(".heics", ".hif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".dds", ".qoi", ".j2k", ".jxr", ".icns"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    )
).difference(IMAGES)
_VIDEOS = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp"))
_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_TEXTS = frozenset((*CAPTION_FILES, ".json", ".jsonl", ".csv", ".tsv"))
_IMAGE_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), ".png"),
    (re.compile(rb"\xff\xd8\xff"), ".jpg"),
    (re.compile(rb"GIF8[79]a"), ".gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"II\*\0|MM\0\*"), ".tif"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), ".avif"),
)
_UNSUPPORTED_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "a HEIC image"),
        (rb"....ftypavi[fs]", "an AVIF image"),
        (rb"....ftypqt|....moov", "a QuickTime video"),
        (rb"....ftyp", "an MP4 video"),
        (rb"\x1aE\xdf\xa3", "a Matroska or WebM video"),
        (rb"RIFF....AVI ", "an AVI video"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
        (rb"8BPS", "a Photoshop document"),
        (rb"gimp xcf", "a GIMP document"),
        (rb"%PDF", "a PDF document"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript document"),
        (rb"\x76\x2f\x31\x01", "an OpenEXR image"),
        (rb"#\?RADIANCE", "a Radiance image"),
        (rb"DDS ", "a DDS texture"),
        (rb"qoif", "a QOI image"),
        (rb"P[1-7]\s", "a PNM image"),
        (rb"\0\0\x01\0", "a Windows icon"),
        (rb"PK\x03\x04", "a zip archive"),
        (rb"\x1f\x8b", "a gzip archive"),
        (rb"version https://git-lfs", "a pointer of git-LFS"),
        (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "a web page"),
    )
)
_ADVICE = {
    "video": "save frames of it as PNG or JPEG",
    "archive": "unpack it",
    "page": "download the image itself",
    "git-LFS": "run: git lfs pull",
}


def suffix(path: str) -> str:
    """ ".png" of "a/b.PNG"."""
    return path[len(stem(path)) :].lower()


def stem(path: str) -> str:
    """ "a/b" of "a/b.PNG", like PurePosixPath.stem, but ten times faster."""
    dot = path.rfind(".")
    return path[:dot] if path.rfind("/") + 1 < dot < len(path) - 1 else path


def last_part(path: str) -> str:
    """ "b.png" of "a/b.png"."""
    return path[path.rfind("/") + 1 :]


def parent_prefix(path: str) -> str:
    """ "a/" of "a/b.png", "" of "b.png"."""
    return path[: path.rfind("/") + 1]


def nfc(path: str) -> str:
    """A path in Unicode NFC; macOS decomposes accents in file names."""
    return unicodedata.normalize("NFC", path)


def unsupported_reason(path: str) -> str | None:
    """Why an image, video or archive cannot be read, by its suffix; None for other files."""
    name = PurePosixPath(path).name.lower()
    for archive in _ARCHIVES:
        if name.endswith(archive):
            return f"{archive} is an archive without random access; unpack it (only .tar is read)"
    if suffix(path) in _UNSUPPORTED:
        return f"{suffix(path)} is not read; convert it to PNG or JPEG"
    if suffix(path) in _VIDEOS:
        return f"{suffix(path)} is a video; save frames of it as PNG or JPEG"
    return None


def misnamed_image(path: Path) -> str | None:
    """Why an image is not used whose name does not end like one ("photo.jpg_large"); None for other files."""
    if suffix(path.name) in _TEXTS:  # not opened: there may be one per image
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return None
    kind = next((kind for pattern, kind in _IMAGE_SIGNATURES if pattern.match(start) and kind in IMAGES), None)
    return kind and f"an image without its suffix; rename it to end in {kind}"


def unsupported_type(data: bytes) -> str | None:
    """The type and the advice for bytes that are not read ("a HEIC image, which is not read; convert it to PNG or
    JPEG"); None if unknown.
    """
    for signature, kind in _UNSUPPORTED_SIGNATURES:
        if signature.match(data[:1024]):
            return f"{kind}, which is not read; {_ADVICE.get(kind.split()[-1], 'convert it to PNG or JPEG')}"
    return None


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder and its sub-folders, as sorted posix paths below `root`, and unreadable entries, without
    hidden files and folders (`.name`) and `__MACOSX`.
    """

    root: Path
    files: list[str]
    skipped: list[Skipped]

    def ending(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in any case."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    @cached_property
    def images(self) -> list[str]:
        """The files with the suffix of an image."""
        return [path for path in self.files if suffix(path) in IMAGES]

    @cached_property
    def image_stems(self) -> set[str]:
        """The images with and without suffix, in NFC: a file with one of these stems is a sidecar."""
        return {nfc(name) for path in self.images for name in (path, stem(path))}


def read_file(path: str) -> bytes:
    """The bytes of a file."""
    return Path(path).read_bytes()


def list_files(folder: Path) -> FolderFiles:
    """Lists a folder recursively. Links to files are followed, links to folders are not. Raises ValueError if the
    folder itself cannot be read.
    """
    files: list[str] = []
    skipped: list[Skipped] = []
    pending = [""]

    def add(entry: os.DirEntry[str], path: str) -> None:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            return
        if entry.is_dir(follow_symlinks=False):
            pending.append(path + "/")
        elif entry.is_file():
            files.append(path)
        elif entry.is_dir():
            skipped.append(Skipped(path, "a link to a folder, which is not followed; give that folder itself"))
        elif suffix(path) in IMAGES:  # reading a pipe would block forever
            skipped.append(Skipped(path, "a broken link" if entry.is_symlink() else "not a regular file"))

    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    try:
                        add(entry, below + entry.name)
                    except OSError as error:  # such as a link to itself
                        skipped.append(Skipped(below + entry.name, f"cannot be read: {error.strerror}"))
        except OSError as error:
            if not below:
                raise ValueError(f"the folder {folder} cannot be read: {error.strerror}; fix that") from error
            skipped.append(Skipped(below, f"the folder cannot be read: {error.strerror}"))
    return FolderFiles(folder, sorted(files), skipped)


# Pillow detects formats by their bytes and would start other programs for some (Ghostscript for EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] * AVIF))
TRANSFORM_VERSION = 2  # raised when bytes are decoded to other pixels; in the cache key of encoded images
CLEAR_ALPHA, CLEAR_BORDER = 8, 0.5  # of 255; fraction of the border of a cutout that is below
CONVERTED, UNUSABLE, GAMMA, ADOBE = "color-profile", "bad-profile", "png-gamma", "adobe-rgb"

_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC  # as in image editors
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_EXACT = ImageCms.Flags.NOOPTIMIZE  # LittleCMS samples gray curves too coarsely otherwise: 1 of 255 would be 6, not 13
_SAME = 2  # a profile that changes no color by more than this is sRGB
_GRAYS = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_SRGB_WHITE_AND_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)


_SVG = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?(<!--.*?-->\s*)*<svg", re.DOTALL
)
SVG_SIDE, MAX_SVG_BYTES = 1024, 2**22  # of the longer side in pixels; larger than what is trained on


def render_svg(data: bytes) -> bytes:
    """An SVG file → PNG with transparency. Raises ValueError with the reason."""
    from resvg_py import svg_to_bytes

    if len(data) > MAX_SVG_BYTES:
        raise ValueError(f"an SVG of more than {MAX_SVG_BYTES >> 20} MiB; convert it to PNG")
    text = data.decode("utf-8", "replace")
    if re.search(r"<(\w+:)?text\b", text):
        raise ValueError("an SVG with text, for which fonts differ by machine; convert its text to paths")
    # resvg reads any file of the machine that an image names, whatever its suffix.
    if re.search(r"""<(\w+:)?(image|feImage)\b[^>]*href\s*=\s*["']\s*(?!data:|\#)""", text):
        raise ValueError("an SVG that refers to another file; embed it")
    try:
        return bytes(svg_to_bytes(svg_string=text, width=SVG_SIDE, height=SVG_SIDE, skip_system_fonts=True))  # fits in
    except BaseException as error:  # a panic of resvg is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"not an SVG that can be drawn: {error}") from error


def decode(data: bytes, background: tuple[int, int, int]) -> Decoded:
    """Decodes the first frame of an image file: upright, sRGB, mode RGB, on `background`. Raises ValueError with the
    reason.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        is_svg = _SVG.match(data[:65536]) is not None
        data, profile = strip_text_chunks(render_svg(data) if is_svg else data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if profile is not None:
                image.info["icc_profile"] = profile
            # Pillow converts 16-bit colors to 8 bits on loading.
            deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in image.tile)
            upright, found = to_srgb(ImageOps.exif_transpose(image))
            colors = found or ignored_color_space(image)
            traits = {
                "rotated": image.getexif().get(ExifTags.Base.Orientation) in range(2, 9),  # others are upright
                str(colors): colors is not None,
                "cmyk": image.mode == "CMYK" and colors != CONVERTED,
                "16-bit": deep,
                "palette": image.mode in ("P", "PA"),
                "transparent": image.has_transparency_data,
                "animated": getattr(image, "n_frames", 1) > 1,
            }
            rgb = to_rgb(upright, background)
            alpha = upright.convert("RGBA").getchannel("A") if _has_alpha(upright) else None
            if alpha is not None and alpha.getextrema()[0] == 255:
                alpha = None
            found_traits = tuple(trait for trait, applies in traits.items() if applies)
            return Decoded(rgb, "SVG" if is_svg else image.format or "", image.mode, found_traits, alpha)
    except UnidentifiedImageError as error:
        reason = unsupported_type(data) or f"not an image in a known format ({', '.join(FORMATS).lower()})"
        raise ValueError(reason) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of Pillow's error
        raise ValueError(f"more than {limit:,} pixels, which would fill memory; save it smaller") from error
    except Exception as error:  # broken bytes raise many types in Pillow
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(reason or type(error).__name__) from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode → RGB: 16-bit grays scaled to 8 bits, transparent pixels blended with `background`.

    Raises ValueError for 32-bit grays, whose white is not defined, and modes that Pillow cannot convert.
    """
    if image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257, rounded
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grays (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    if _has_alpha(image):
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def resize_and_crop(image: Image.Image, size: tuple[int, int], place: float = 0.5) -> Tensor:
    """Resizes an RGB image to cover `size` (h, w) and crops it, in one pass of antialiased bicubic; uint8 [3, h, w].

    The crop is at `place` in [0, 1), 0.5 for the center.
    """
    (height, width), (native_width, native_height) = size, image.size
    if native_width * height > native_height * width:  # at whole pixels: no blur at scale 1
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
    """The mean color of the motif of an RGB image with a transparent border (`is_clear`) by its `alpha`, mode L; None
    for others.
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


_UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # text chunks that may hold the orientation
_MAX_PROFILE = 2**24  # printer profiles have a few MiB, more than Pillow accepts in a PNG


def strip_text_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG → (the file without text chunks, the color profile if it is too large for Pillow, cut at 16 MiB). Pillow
    rejects valid images with long texts. Other files are unchanged.
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


# ---- color profiles


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
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):  # broken profiles
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
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])

    def is_same(image: Image.Image, converted: Image.Image) -> bool:
        return int(np.abs(np.asarray(image).astype(int) - np.asarray(converted)).max()) <= _SAME

    if space == "RGB":
        rgb, rgba = _transform(source, "RGB"), _transform(source, "RGBA", "RGBA")
        levels = np.linspace(0, 255, 17).round().astype(np.uint8)
        colors = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3))
        if is_same(colors, _applied(rgb, colors)):
            return None
        grays = np.asarray(_applied(_transform(source, "RGB", flags=_EXACT), ramp.convert("RGB")))[0]

        def from_rgb(image: Image.Image) -> Image.Image:
            if image.mode in _GRAYS:
                return _from_gray(grays, image)
            if image.mode in ("CMYK", "LAB"):
                raise ValueError(f"an image of {image.mode} with a profile of RGB")
            if image.has_transparency_data:
                return _applied(rgba, image.convert("RGBA"))
            return _applied(rgb, image.convert("RGB"))

        return from_rgb
    if space == "GRAY":
        converted = _applied(_transform(source, "L", flags=_EXACT), ramp)
        return None if is_same(ramp.convert("RGB"), converted) else partial(_from_gray, np.asarray(converted)[0])
    if space == "CMYK":
        cmyk = _transform(source, "CMYK")

        def from_cmyk(image: Image.Image) -> Image.Image:
            if image.mode != "CMYK":
                raise ValueError(f"an image of {image.mode} with a profile of CMYK")
            return _applied(cmyk, image)

        return from_cmyk
    raise ValueError(f"a profile of {space}")


def _transform(source: Any, mode: str, into: str = "RGB", flags: int = 0) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, into, _INTENT, _FLAGS | flags)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    converted.info = {}  # the profile and the transparent color no longer apply
    return converted


def _from_gray(grays: NDArray[np.uint8], image: Image.Image) -> Image.Image:
    """An image of grays in sRGB; `grays`, uint8 [256, 3], has the color of each level."""
    if image.mode not in _GRAYS:
        raise ValueError(f"an image of {image.mode} with a profile of grays")
    if image.mode.startswith("I;16"):  # interpolate in linear light
        unit = grays.astype(np.float64) / 255
        light = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
        levels = np.asarray(image) / 257
        linear = np.stack([np.interp(levels, np.arange(256), light[:, channel]) for channel in range(3)], axis=-1)
        coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        return Image.fromarray((coded * 255).round().astype(np.uint8))  # [h, w, 3]
    plain = image.convert("RGBA") if image.has_transparency_data else None
    level = np.asarray(image.convert("L") if plain is None else plain.getchannel("R"))
    converted = Image.fromarray(grays[level])  # [h, w] → [h, w, 3]
    if plain is not None:
        converted.putalpha(plain.getchannel("A"))
    return converted


def _lab(profile: bytes | None) -> Callable[[Image.Image], Image.Image]:
    """The conversion of CIE L*a*b*; the profile is optional."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    return partial(_applied, _transform(source, "LAB"))
