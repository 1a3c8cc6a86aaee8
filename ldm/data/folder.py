"""A folder of image files: its files, and captions from sidecar files or names of sub-folders."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

from ldm.data.captions import class_caption, plural, printable, sidecar_captions
from ldm.data.file_types import CAPTION_FILES, DOCUMENTS, IMAGES, nfc, stem, suffix, unsupported_reason
from ldm.data.images import decode
from ldm.data.sources import Sample, Skipped

# Names of folders that do not describe their images.
_CONTAINERS = frozenset(
    (
        *("data", "dataset", "image", "images", "img", "imgs", "pictures", "photos"),
        *("train", "training", "val", "valid", "validation", "test", "testing"),
    )
)


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder and its sub-folders, as sorted posix paths below `root`, and unreadable entries.

    Hidden files and folders (`.name`) and `__MACOSX` are left out.
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


@dataclass
class SampleListing:
    """The samples that one layout finds in a folder.

    Args:
        kind: the source of the captions, as in "the folder is read by …".
        covered: files that became a sample, or are in `skipped`.
        uncovered: why other images are skipped.
    """

    kind: str
    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    uncovered: str = "no caption"


@dataclass
class Candidate:
    """A possible source of captions of a folder.

    Args:
        name: as in data.caption_source: "metadata", "sidecars", or the path of a table.
        listing: its samples.
        error: why it has no captions, although it names images, which are in `named`.
        files: its tables.
        weak: images are named in an unusual column, so that others are preferred at a tie.
        numbers: its captions have no letters and are in a column without a caption name.
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
    """Lists a folder recursively. Links to files are followed, links to folders are not.

    Raises:
        ValueError: if the folder itself cannot be read.
    """
    files: list[str] = []
    skipped: list[Skipped] = []
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    try:
                        _add_entry(entry, below + entry.name, files, pending, skipped)
                    except OSError as error:  # such as a link to itself
                        skipped.append(Skipped(below + entry.name, f"cannot be read: {error.strerror}"))
        except OSError as error:
            if not below:
                raise ValueError(
                    f"the folder {folder} cannot be read: {error.strerror}; fix its permissions"
                ) from error
            skipped.append(Skipped(below, f"the folder cannot be read: {error.strerror}"))
    return FolderFiles(folder, sorted(files), skipped)


def _add_entry(
    entry: os.DirEntry[str], path: str, files: list[str], pending: list[str], skipped: list[Skipped]
) -> None:
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return
    if entry.is_dir(follow_symlinks=False):
        pending.append(path + "/")
    elif entry.is_file():
        files.append(path)
    elif entry.is_dir():
        skipped.append(Skipped(path, "a link to a folder, which is not followed; give that folder itself"))
    elif suffix(path) in IMAGES:
        # Reading a pipe would block forever.
        reason = "a broken link" if entry.is_symlink() else "not a regular file"
        skipped.append(Skipped(path, reason))


def file_sample(
    found: FolderFiles, path: str, captions: list[str], group: str, background: tuple[int, int, int]
) -> Sample:
    """A file of the folder as a sample, without repeated captions."""
    read = partial(read_file, os.path.join(found.root, path))
    return Sample(path, tuple(dict.fromkeys(captions)), group, read, partial(decode, background=background))


def read_file(path: str) -> bytes:
    """The bytes of a file."""
    return Path(path).read_bytes()


def list_sidecars(found: FolderFiles, column: str | None, background: tuple[int, int, int]) -> SampleListing | None:
    """Captions in `a.txt`, `a.caption` or `a.png.txt` beside `a.png`, one per line; None if there are none.

    An image has the captions of all its text files. If it has none, those in `a.json` under `column` or a usual name
    are used. Images with the same stem share a group.
    """
    texts: dict[str, list[str]] = {}
    for kind in (*CAPTION_FILES, ".json"):
        for path in found.ending(kind):
            texts.setdefault(nfc(stem(path)), []).append(path)
    listing = SampleListing("captions beside images")
    for image in found.images:
        beside = [*texts.get(nfc(image), ()), *texts.get(nfc(stem(image)), ())]
        # Two images may have names that differ in their code points only, each with its own captions.
        beside = [path for path in beside if stem(path) in (image, stem(image))] or beside
        _add_captioned(found, image, beside, column, background, listing)
    if not listing.covered:
        return None
    orphans = {path for path in found.ending(*CAPTION_FILES) if nfc(stem(path)) not in found.image_stems}
    unsupported = {stem(path) for path in found.files if unsupported_reason(path)}
    for path in sorted(orphans):
        if stem(path) not in unsupported and not PurePosixPath(path).name.lower().startswith(DOCUMENTS):
            listing.skipped.append(Skipped(path, "a caption without an image"))
    folded = {nfc(stem(path)).casefold(): path for path in orphans}
    for image in found.images:
        near = folded.get(nfc(stem(image)).casefold())
        if image not in listing.covered and near is not None:
            listing.skipped.append(Skipped(image, f"no caption; {printable(near)} differs in upper and lower case"))
            listing.covered.add(image)
    return listing


def _add_captioned(
    found: FolderFiles,
    image: str,
    beside: list[str],
    column: str | None,
    background: tuple[int, int, int],
    listing: SampleListing,
) -> None:
    captions, faults = sidecar_captions(beside, lambda path: (found.root / path).read_bytes(), column)
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


def list_classes(found: FolderFiles, background: tuple[int, int, int]) -> SampleListing | None:
    """Images in sub-folders, captioned with the name of their folder; None if there are none.

    `_` and `-` become spaces, and the `10_` of "10_my dog" is dropped.
    """
    listing = SampleListing(
        "the names of sub-folders",
        uncovered="no caption: it lies in no sub-folder that names its class; put it into one, "
        "or a .txt with its caption beside it",
    )
    for image in [path for path in found.images if "/" in path]:
        folder = PurePosixPath(image).parent.name
        listing.covered.add(image)
        try:
            words = class_caption(folder)
        except ValueError:
            words = ""
        if not words or words.lower() in _CONTAINERS:
            reason = f'no caption: the name of its folder, "{printable(folder)}", does not describe the image'
            listing.skipped.append(Skipped(image, reason))
        else:
            listing.samples.append(file_sample(found, image, [words], stem(image), background))
    return listing if listing.covered else None


def summary(found: FolderFiles) -> str:
    """The number of files by suffix: "12 .png files, 3 .txt files"."""
    counts = Counter(map(suffix, found.files)).most_common(6)
    return ", ".join(plural(count, f"{printable(kind) or 'other'} file") for kind, count in counts) or "no files"
