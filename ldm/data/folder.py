"""A folder of image files: what lies in it, and captions that stand in files beside images or in names of folders."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from ldm.data.captions import caption_lines, class_caption, json_captions, printable
from ldm.data.images import SUFFIXES, decode
from ldm.data.sources import Sample, Skipped

# .jfif and .jpe are names that browsers give to JPEG files.
IMAGES = SUFFIXES | {".jfif", ".jpe"}
CAPTION_FILES = (".txt", ".caption")

_PICTURES = frozenset(
    (
        *(".heic", ".heif", ".avif", ".svg", ".jxl", ".jp2", ".psd", ".xcf", ".ico", ".tga", ".eps", ".exr", ".hdr"),
        *(".heics", ".hif", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".dds", ".qoi", ".j2k", ".jxr", ".icns"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    )
).difference(IMAGES)
_VIDEOS = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp"))
_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")

# Texts that explain a folder are not captions of missing images.
DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "changelog", "credits", "attribution", "classes")
# Names that say where images are kept, or for what, and never what they show.
_CONTAINERS = frozenset(
    (
        *("data", "dataset", "image", "images", "img", "imgs", "pictures", "photos"),
        *("train", "training", "val", "valid", "validation", "test", "testing"),
    )
)


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder and all folders below it, as sorted posix paths within it, and what cannot be read.

    Hidden files and folders (`.name`) and macOS's copies of them (`__MACOSX`) are passed over.
    """

    root: Path
    files: list[str]
    skipped: list[Skipped]

    def ending(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in any case."""
        return [path for path in self.files if path.lower().endswith(suffixes)]


@dataclass
class SampleListing:
    """What a layout makes of a folder.

    Args:
        kind: what gives the captions, as in "the folder is read by …".
        covered: the files that became a sample, or whose fate `skipped` tells.
        uncovered: why an image that is not covered is skipped.
    """

    kind: str
    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    uncovered: str = "no caption"


@dataclass
class Candidate:
    """A source of captions that a folder has.

    Args:
        name: as data.caption_source takes it: "metadata", "sidecars", or the path of a table.
        listing: what it makes of the folder.
        error: why no captions come of it, though it names images: those in
        named.
        files: the tables that it is made of.
        weak: names of images stand in a column that seldom has them, so that of equals others are preferred.
        numbers: its captions have no letters, and stand in a column that is not named after captions.
    """

    name: str
    listing: SampleListing
    error: ValueError | None = None
    named: set[str] = field(default_factory=set)
    files: tuple[str, ...] = ()
    weak: bool = False
    numbers: bool = False

    @cached_property
    def images(self) -> set[str]:
        """The images that it captions, or names."""
        return {sample.id for sample in self.listing.samples} or self.named


def list_files(folder: Path) -> FolderFiles:
    """Lists a folder. Links to files are followed, links to folders are not.

    Raises:
        ValueError: if the folder itself cannot be read.
    """
    files: list[str] = []
    skipped: list[Skipped] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    try:
                        _sort_entry(entry, below + entry.name, files, waiting, skipped)
                    except OSError as error:  # such as a link to itself
                        reason = f"cannot be read: {error.strerror}"
                        skipped.append(Skipped(below + entry.name, reason))
        except OSError as error:
            if not below:
                raise ValueError(
                    f"the folder {folder} cannot be read: {error.strerror}; mend its permissions"
                ) from error
            skipped.append(Skipped(below, f"the folder cannot be read: {error.strerror}"))
    return FolderFiles(folder, sorted(files), skipped)


def _sort_entry(
    entry: os.DirEntry[str], path: str, files: list[str], waiting: list[str], skipped: list[Skipped]
) -> None:
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return
    if entry.is_dir(follow_symlinks=False):
        waiting.append(path + "/")
    elif entry.is_file():
        files.append(path)
    elif entry.is_dir():
        skipped.append(Skipped(path, "a link to a folder, which is not followed; give that folder itself"))
    elif suffix(path) in IMAGES:
        # Reading a pipe would wait for ever.
        reason = "a link that leads nowhere" if entry.is_symlink() else "not a file that can be read at any place"
        skipped.append(Skipped(path, reason))


def suffix(path: str) -> str:
    """ ".png" of "a/b.PNG"."""
    return path[len(stem(path)) :].lower()


def stem(path: str) -> str:
    """ "a/b" of "a/b.PNG"."""
    # What PurePosixPath says, for names of files in a tenth of the time: it is asked a million times.
    dot = path.rfind(".")
    return path[:dot] if path.rfind("/") + 1 < dot < len(path) - 1 else path


def nfc(path: str) -> str:
    """The same letters in the code points that most systems use (NFC); macOS decomposes accents in names."""
    return unicodedata.normalize("NFC", path)


def unsupported_reason(path: str) -> str | None:
    """Why a file of pictures in a format that is not read cannot be used; None for all other files."""
    name = PurePosixPath(path).name.lower()
    for archive in _ARCHIVES:
        if name.endswith(archive):
            return f"{archive} is an archive that cannot be read at any place; unpack it (.tar alone is read)"
    if suffix(path) in _PICTURES:
        return f"{suffix(path)} is not read; convert it to PNG or JPEG"
    if suffix(path) in _VIDEOS:
        return f"{suffix(path)} is a video; save frames of it as PNG or JPEG"
    return None


# How files of images begin; a name may end otherwise, as in "photo.jpg_large", or without any suffix.
_BEGINNINGS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), ".png"),
    (re.compile(rb"\xff\xd8\xff"), ".jpg"),
    (re.compile(rb"GIF8[79]a"), ".gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"II\*\0|MM\0\*"), ".tif"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), ".avif"),
)
_TEXTS = frozenset((*CAPTION_FILES, ".json", ".jsonl", ".csv", ".tsv"))


def misnamed_image(found: FolderFiles, path: str) -> str | None:
    """Why a file that is an image, but not by its name, is not used; None for all other files."""
    if suffix(path) in _TEXTS:  # there may be one for each image
        return None
    try:
        with open(found.root / path, "rb") as file:
            beginning = file.read(12)
    except OSError:
        return None
    kind = next((kind for pattern, kind in _BEGINNINGS if pattern.match(beginning) and kind in IMAGES), None)
    return kind and f"an image, but its name does not say so; let it end in {kind}"


def file_sample(
    found: FolderFiles, path: str, captions: list[str], group: str, background: tuple[int, int, int]
) -> Sample:
    """A file of the folder as a sample; equal captions count once."""
    read = partial(_read, os.path.join(found.root, path))
    return Sample(path, tuple(dict.fromkeys(captions)), group, read, partial(decode, background=background))


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def list_sidecars(found: FolderFiles, column: str | None, background: tuple[int, int, int]) -> SampleListing | None:
    """`a.txt`, `a.caption` (or `a.png.txt`) beside `a.png`, each line of it a caption; None where there are none.

    With several such files an image has the captions of all. Where it has none of them, but an `a.json` with a
    caption under `column` or a usual name, that counts. Images that share a stem share a group.
    """
    images = [path for path in found.files if suffix(path) in IMAGES]
    owners = {nfc(owner) for path in images for owner in (path, stem(path))}
    texts: dict[str, list[str]] = {}
    for kind in (*CAPTION_FILES, ".json"):
        for path in found.ending(kind):
            texts.setdefault(nfc(stem(path)), []).append(path)
    listing = SampleListing("captions beside images")
    for image in images:
        beside = [*texts.get(nfc(image), ()), *texts.get(nfc(stem(image)), ())]
        # Two files may have one name in other code points, each with captions of its own.
        beside = [path for path in beside if stem(path) in (image, stem(image))] or beside
        _caption_image(found, image, beside, column, background, listing)
    if not listing.covered:
        return None
    orphans = {path for path in found.ending(*CAPTION_FILES) if nfc(stem(path)) not in owners}
    foreigners = {stem(path) for path in found.files if unsupported_reason(path)}
    for path in sorted(orphans):
        if stem(path) not in foreigners and not PurePosixPath(path).name.lower().startswith(DOCUMENTS):
            listing.skipped.append(Skipped(path, "a caption without an image"))
    _hint_at_case(images, orphans, listing)
    return listing


def _caption_image(
    found: FolderFiles,
    image: str,
    beside: list[str],
    column: str | None,
    background: tuple[int, int, int],
    listing: SampleListing,
) -> None:
    captions: list[str] = []
    faults: list[tuple[str, str]] = []
    plain = [path for path in beside if suffix(path) in CAPTION_FILES]
    for path in plain or beside:
        name = PurePosixPath(path).name
        try:
            data = (found.root / path).read_bytes()
            good, reasons = (caption_lines(data), []) if plain else json_captions(data, column)
        except KeyError:
            continue  # of another kind, such as boxes
        except OSError as error:
            faults.append((path, f"{printable(name)} cannot be read: {error.strerror}"))
        except ValueError as error:
            empty = str(error) == "empty caption"
            faults.append((path, str(error) if empty else f"{printable(name)} {error}"))
        else:
            captions += good
            faults += [(path, reason) for reason in reasons]
    if captions:
        listing.samples.append(file_sample(found, image, captions, stem(image), background))
        listing.covered.update(beside)
        listing.skipped += [
            Skipped(path, f"{reason}; the other captions of {printable(image)} count") for path, reason in faults
        ]
    elif faults:
        listing.skipped.append(Skipped(image, faults[0][1]))
    if captions or faults:
        listing.covered.add(image)


def _hint_at_case(images: list[str], orphans: set[str], listing: SampleListing) -> None:
    folded = {nfc(stem(path)).casefold(): path for path in orphans}
    for image in images:
        near = folded.get(nfc(stem(image)).casefold())
        if image not in listing.covered and near is not None:
            listing.skipped.append(Skipped(image, f"no caption; {printable(near)} differs in upper and lower case"))
            listing.covered.add(image)


def list_classes(found: FolderFiles, background: tuple[int, int, int]) -> SampleListing | None:
    """Images in sub-folders, with the name of the folder that holds them as caption; None where there are none.

    `_` and `-` are read as spaces, and the `10_` of "10_my dog" is dropped.
    """
    listing = SampleListing(
        "the names of sub-folders",
        uncovered="no caption: it lies in no sub-folder that names its class; put it into one, "
        "or a .txt with its caption beside it",
    )
    for image in [path for path in found.files if suffix(path) in IMAGES and "/" in path]:
        folder = PurePosixPath(image).parent.name
        listing.covered.add(image)
        try:
            words = class_caption(folder)
        except ValueError:
            words = ""
        if not words or words.lower() in _CONTAINERS:
            reason = f'no caption: the name of its folder, "{printable(folder)}", does not say what it shows'
            listing.skipped.append(Skipped(image, reason))
        else:
            listing.samples.append(file_sample(found, image, [words], stem(image), background))
    return listing if listing.covered else None


def summary(found: FolderFiles) -> str:
    """What a folder holds, by suffix: "12 .png files, 3 .txt files"."""
    return ", ".join(_counts(found)) or "no files"


def _counts(found: FolderFiles) -> Iterator[str]:
    kinds: dict[str, int] = {}
    for path in found.files:
        kinds[suffix(path)] = kinds.get(suffix(path), 0) + 1
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1])[:6]:
        yield f"{count} {printable(kind) or 'other'} file{'s' if count > 1 else ''}"
