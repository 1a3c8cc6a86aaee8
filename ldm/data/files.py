"""The files of a folder, and file types by suffix and first bytes: which images are read, and why others are not."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from PIL import features

from ldm.data.sources import Skipped

# Not every build of Pillow has libavif.
AVIF = bool(features.check("avif"))
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", *([".avif"] * AVIF)})
# Browsers save JPEG files as .jfif and .jpe.
IMAGES = SUFFIXES | {".jfif", ".jpe"}
CAPTION_FILES = (".txt", ".caption")
# Text files that explain a folder, by the beginning of their names.
DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "changelog", "credits", "attribution", "classes")

_UNSUPPORTED = frozenset(
    (
        *(".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".xcf", ".ico", ".tga", ".eps", ".exr", ".hdr"),
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
        (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
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
                raise ValueError(
                    f"the folder {folder} cannot be read: {error.strerror}; fix its permissions"
                ) from error
            skipped.append(Skipped(below, f"the folder cannot be read: {error.strerror}"))
    return FolderFiles(folder, sorted(files), skipped)
