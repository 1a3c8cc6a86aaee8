"""Captions of the image files of a folder: beside them, in tables that name them, and names of sub-folders."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from ldm.data.captions import (
    FILE_NAMES,
    TABLE_CAPTION_NAMES,
    ReadOptions,
    caption,
    captions,
    choose_column,
    match_column,
    parse_list,
    sidecar_captions,
)
from ldm.data.images import (
    CAPTION_FILES,
    DOCUMENTS,
    IMAGES,
    FolderFiles,
    last_part,
    nfc,
    parent_prefix,
    read_file,
    stem,
    suffix,
    unsupported_reason,
)
from ldm.data.rows import LISTS, SUFFIXES, Table, open_table
from ldm.data.sources import Decode, Listing, Sample, Skipped
from ldm.progress import plural, printable

METADATA, SIDECARS, FOLDERS = "metadata", "sidecars", "folders"
# Names of folders that do not describe their images.
_CONTAINERS = frozenset(
    (
        *("data", "dataset", "image", "images", "img", "imgs", "pictures", "photos"),
        *("train", "training", "val", "valid", "validation", "test", "testing"),
    )
)
# Columns that may name images, mostly without a suffix; tables that have only these are weak listings.
_ID_NAMES = ("image_id", "img_id", "id", "name")
_ROWS_TO_TRY = 100
_FOLDERS_TO_TRY = 50
_LARGE = 2**26  # COCO's bounding boxes have hundreds of MiB and no captions; parsing them takes many times the memory
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
Key = TypeVar("Key")


def file_sample(found: FolderFiles, path: str, captions: list[str], group: str, decode: Decode) -> Sample:
    """A file of the folder as a sample, without repeated captions."""
    read = partial(read_file, os.path.join(found.root, path))
    return Sample(path, tuple(dict.fromkeys(captions)), group, read, decode)


def read_sidecars(found: FolderFiles, options: ReadOptions) -> Listing | None:
    """Captions in `a.txt`, `a.caption` or `a.png.txt` beside `a.png`, one per line; None if there are none.

    An image has the captions of all its text files, or else those in `a.json`. Images with the same stem share a group.
    """
    texts: dict[str, list[str]] = {}
    for kind in (*CAPTION_FILES, ".json"):
        for path in found.ending(kind):
            texts.setdefault(nfc(stem(path)), []).append(path)
    listing = Listing(SIDECARS)
    for image in found.images:
        beside = [*texts.get(nfc(image), ()), *texts.get(nfc(stem(image)), ())]
        # Two images may have names that differ in their code points only, each with its own captions.
        beside = [path for path in beside if stem(path) in (image, stem(image))] or beside
        good, faults = sidecar_captions(beside, lambda path: (found.root / path).read_bytes(), options)
        if good:
            listing.samples.append(file_sample(found, image, good, stem(image), options.decode))
            listing.covered.update(beside)
            rest = f"the other captions of {printable(image)} count"
            listing.skipped += [Skipped(path, f"{reason}; {rest}") for path, reason in faults]
        elif faults:
            listing.skipped.append(Skipped(image, faults[0][1]))
        if good or faults:
            listing.covered.add(image)
    if not listing.covered:
        return None
    orphans = {path for path in found.ending(*CAPTION_FILES) if nfc(stem(path)) not in found.image_stems}
    unsupported = {stem(path) for path in found.files if unsupported_reason(path)}
    for path in sorted(orphans):
        if stem(path) not in unsupported and not last_part(path).lower().startswith(DOCUMENTS):
            listing.skipped.append(Skipped(path, "a caption without an image"))
    folded = {nfc(stem(path)).casefold(): path for path in orphans}
    for image in found.images:
        near = folded.get(nfc(stem(image)).casefold())
        if image not in listing.covered and near is not None:
            listing.skipped.append(Skipped(image, f"no caption; {printable(near)} differs in upper and lower case"))
            listing.covered.add(image)
    return listing


def read_classes(found: FolderFiles, options: ReadOptions) -> Listing | None:
    """Images in sub-folders, captioned with the name of their folder; None if there are none.

    `_` and `-` become spaces, and the `10_` of "10_my dog" is dropped.
    """
    where = "in no sub-folder that names its class; put it into one, or a .txt with its caption beside it"
    listing = Listing(FOLDERS, uncovered=f"no caption: it is {where}")
    for image in [path for path in found.images if "/" in path]:
        folder = PurePosixPath(image).parent.name
        listing.covered.add(image)
        words = " ".join(re.split(r"[_\-\s]+", re.sub(r"^\d+_(?=.)", "", folder))).strip()
        try:
            text = caption("" if words.lower() in _CONTAINERS else words)
        except ValueError:
            reason = f'no caption: the name of its folder, "{printable(folder)}", does not describe the image'
            listing.skipped.append(Skipped(image, reason))
        else:
            listing.samples.append(file_sample(found, image, [text], stem(image), options.decode))
    return listing if listing.covered else None


def summary(found: FolderFiles) -> str:
    """The number of files by suffix: "12 .png files, 3 .txt files"."""
    counts = Counter(map(suffix, found.files)).most_common(6)
    return ", ".join(plural(count, f"{printable(kind) or 'other'} file") for kind, count in counts) or "no files"


# ---- tables that name images: metadata.csv, metadata.jsonl, COCO annotations, Flickr lists and similar


@dataclass(frozen=True)
class NamingTable:
    """A table in a folder: its path, rows, column of files, and what these are relative to (`FileNames.resolve`)."""

    path: str
    rows: Table
    column: str | None
    base: str
    anywhere: bool = False

    def names(self) -> Iterator[str]:
        """The names in the column of files."""
        column = self.column
        if column is not None:
            names = (row.cells.get(column) for row in self.rows.read([column]))
            yield from (name for name in names if isinstance(name, str) and name)


def is_metadata(path: str) -> bool:
    """Whether a file is a table named metadata."""
    return PurePosixPath(path).stem.lower() == METADATA and suffix(path) in SUFFIXES and suffix(path) not in LISTS


def read_metadata(found: FolderFiles, with_images: Collection[str], options: ReadOptions) -> Listing | None:
    """metadata.csv, .tsv, .jsonl, .json and .parquet, each for its folder; None if there are none.

    An image that several rows name has all their captions. Tables `with_images` need not name files.
    """
    tables, skipped, files = [], [], FileNames(found)
    for path in filter(is_metadata, found.ending(*SUFFIXES)):
        try:
            rows = open_table(found.root / path)
        except (OSError, ValueError) as error:
            if suffix(path) != ".json":  # a metadata.json may be anything
                skipped.append(Skipped(path, _reason(error)))
            continue
        table = NamingTable(path, rows, _file_column(rows, options), parent_prefix(path))
        if suffix(path) == ".json" and files.base_folder(path, table.names()) is None:
            continue
        if path not in with_images or table.column is not None:
            tables.append(table)
    if not tables and not skipped:
        return None
    listing = _read_tables(files, METADATA, "no metadata file names it", tables, options)
    listing.files += tuple(entry.path for entry in skipped)
    listing.numbers = False
    if listing.error is None:
        listing.skipped = skipped + listing.skipped
    return listing


def read_named_tables(
    found: FolderFiles, options: ReadOptions, paths: Sequence[str] | None = None
) -> tuple[list[Listing], dict[str, str]]:
    """Other tables whose rows name images, such as captions.csv beside Images/, and the reasons why readable ones are
    not used.

    All COCO annotations are one listing. `paths` are the tables to try; None tries all of the folder that are neither
    sidecars nor documents.
    """
    if paths is None:
        paths = [path for path in found.ending(*SUFFIXES) if not is_metadata(path)]
        others = {path for path in paths if nfc(stem(path)) in found.image_stems}
        others.update(path for path in paths if last_part(path).lower().startswith(DOCUMENTS))
        paths = [path for path in paths if path not in others or suffix(path) not in (*LISTS, ".json")]
    files = FileNames(found)
    groups: list[list[NamingTable]] = []
    coco: list[NamingTable] = []
    reasons: dict[str, str] = {}
    for path in paths:
        try:
            with open(found.root / path, "rb") as file:
                if suffix(path) == ".json" and os.fstat(file.fileno()).st_size > _LARGE:
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                        if data.find(b'"annotations"') >= 0 and data.find(b'"caption"') < 0:
                            continue
            rows = open_table(found.root / path)
        except (OSError, ValueError) as error:
            reasons[path] = _reason(error)
            continue
        column = _file_column(rows, options, () if is_metadata(path) else _ID_NAMES)
        if column is None:
            shown = ", ".join(printable(name)[:40] for name in rows.columns[:8])
            reasons[path] = f"no column names image files, such as file_name; its columns are {shown}"
            continue
        table = NamingTable(path, rows, column, parent_prefix(path))
        based = files.base_folder(path, table.names())
        if based is not None:
            table = NamingTable(path, rows, column, *based)
            if rows.is_coco:
                coco.append(table)
            else:
                groups.append([table])
            continue
        reasons[path] = "it names no image"
        for name in islice(table.names(), _ROWS_TO_TRY):
            try:
                files.resolve(table.base, name)
            except ValueError as error:
                reasons[path] = str(error)
                break
    listings = []
    for tables in [*groups, *([coco] if coco else [])]:
        where = ", ".join(printable(table.path) for table in tables)
        listing = _read_tables(files, where, f"{where} does not name it", tables, options)
        unusual = any(match_column(table.rows.columns, FILE_NAMES) is None for table in tables)
        listing.weak = listing.error is None and options.image is None and unusual
        listings.append(listing)
    return listings, reasons


def _read_tables(
    files: FileNames, name: str, uncovered: str, tables: list[NamingTable], options: ReadOptions
) -> Listing:
    listing = Listing(name, uncovered=f"no caption: {uncovered}", files=tuple(table.path for table in tables))
    texts: dict[str, list[str]] = {}
    words = False  # whether a column has a caption name, or a caption has letters
    try:
        if options.image is not None and tables and not any(table.column for table in tables):
            every = tables[0].rows.columns
            choose_column(printable(tables[0].path), every, every, FILE_NAMES, "image", options.image)
        for table in tables:
            columns, where, file_column = table.rows.columns, printable(table.path), table.column
            if options.image is None and file_column is None:
                raise ValueError(
                    f"{files.found.root / where} has no column that names image files, such as file_name; its columns "
                    f"are {', '.join(map(printable, columns))}; rename one, or set data.image_column"
                )
            if file_column is None:
                file_column = choose_column(where, columns, columns, FILE_NAMES, "image", options.image)
            # pandas writes its index as a column without a name.
            rest = [column for column in columns if column != file_column and column.strip()]
            text_column = choose_column(where, columns, rest, TABLE_CAPTION_NAMES, "caption", options.caption)
            if columns.count(text_column) > 1:
                count, shown = columns.count(text_column), printable(text_column)
                raise ValueError(f'{where} has {count} columns "{shown}"; rename all but one of them')
            words = words or text_column in (options.caption, match_column(rest, TABLE_CAPTION_NAMES))
            for row in table.rows.read([file_column, text_column]):
                place = f"{table.path}:{row.number}"
                try:
                    file = row.cells.get(file_column)
                    if row.fault is not None:
                        raise ValueError(row.fault)
                    if file is None or file == "":
                        raise ValueError(f"{file_column} is missing")
                    if not isinstance(file, str):
                        raise ValueError(f"{file_column} is not a text")
                    path = files.resolve(table.base, file, anywhere=table.anywhere)
                except ValueError as error:
                    listing.skipped.append(Skipped(place, str(error)))
                    continue
                listing.covered.add(path)
                unsupported = unsupported_reason(path)
                cell = parse_list(row.cells.get(text_column))
                good, reasons = captions(cell) if unsupported is None else ([], [unsupported])
                listing.skipped += [Skipped(place, reason) for reason in reasons]
                words = words or any(re.search(r"[^\W\d_]", text) for text in good)
                if good:
                    texts.setdefault(path, []).extend(good)
    except ValueError as error:
        listing = Listing(name, error=error, files=listing.files)
        for table in tables:
            table = replace(table, column=_file_column(table.rows, options, _ID_NAMES))
            for file in table.names():
                with suppress(ValueError):
                    listing.named.add(files.resolve(table.base, file, anywhere=table.anywhere))
        listing.named = {path for path in listing.named if suffix(path) in IMAGES}
        return listing
    listing.samples = [file_sample(files.found, path, texts[path], path, options.decode) for path in sorted(texts)]
    listing.numbers = bool(texts) and not words
    return listing


def _file_column(rows: Table, options: ReadOptions, others: tuple[str, ...] = ()) -> str | None:
    if options.image is not None:
        return options.image if options.image in rows.columns else None
    return match_column(rows.columns, FILE_NAMES) or match_column(rows.columns, others)


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


# ---- from names in tables to files


class FileNames:
    """Finds the files of a folder by the names that tables give them.

    A name is a path relative to a base folder, a full path, or a path with backslashes. Unicode normal forms, the case
    of the suffix, and a missing suffix may differ if only one file matches. Files outside the folder are never found.
    """

    def __init__(self, found: FolderFiles) -> None:
        self.found = found

    def resolve(self, base: str, name: str, *, anywhere: bool = False) -> str:
        """The path within the folder; ValueError, with the reason, if there is no such file.

        Args:
            base: the folder that names are relative to, "" or ending in "/".
            anywhere: `name` is the end of a path, which must be unique.
        """
        shown = printable(name)[:200]
        if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
            raise ValueError(f"{shown[:80]} is a URL; URLs are not downloaded, give the name of a file")
        slashed = name.replace("\\", "/")  # the separator on Windows, where many tables are made
        meant = None
        for meant in (self._within(base, name), self._within(base, slashed)):
            if meant is not None and self._is_file(meant):
                return meant
        if meant is None:
            moved: list[str] = []
            if (os.path.isabs(name) or _DRIVE.match(name)) and not os.path.exists(name):
                # The images with the longest common end of a path of another machine.
                parts = slashed.split("/")
                tails = ("/".join(parts[first:]) for first in range(1, len(parts)))
                moved = next((paths for tail in tails if tail and (paths := self._ending(tail))), [])
            if len(moved) == 1:
                return moved[0]
            raise ValueError(f"{shown} is outside the folder")
        meant = without_number(meant)
        if self._is_file(meant):
            return meant
        spelled, kind = nfc(meant), suffix(meant)  # in another normal form or suffix
        alike = [path for path in self._decomposed.get(spelled, ()) if suffix(path) == kind]
        if not alike and kind in IMAGES:
            alike = [path for path in self._stems.get(stem(spelled), ()) if suffix(path) == kind]
        elif not alike:
            alike = self._stems.get(spelled, [])
        alike = alike or (self._ending(meant) if anywhere else [])
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ValueError(f"{shown} may be {' or '.join(map(printable, alike[:2]))}; give the whole name")
        # A similar name that is not accepted as the same: other case, another suffix.
        folded = spelled.casefold()
        ends = self._last_parts.get(folded, [""])
        near = self._folded.get(folded) or self._folded.get(stem(folded)) or ends[0]
        raise ValueError(f"there is no file {shown}" + (f"; did you mean {printable(near)}?" if near else ""))

    def base_folder(self, table: str, names: Iterable[str]) -> tuple[str, bool] | None:
        """The `base` and `anywhere` for `resolve` with which most of the first hundred names in `table` are images.

        Bases are tried in the order: the table's folder, image folders that it is named after (captions_val2017.json:
        val2017/), folders below, above, and all others. `anywhere` is used if it finds more names, or as many in
        another folder than the table's. None if no name leads to an image.
        """

        def is_image(base: str, name: str, anywhere: bool = False) -> bool:
            try:
                return suffix(self.resolve(base, name, anywhere=anywhere)) in IMAGES
            except ValueError:
                return False

        found = ((name, self._ending(_last(without_number(name)))) for name in dict.fromkeys(names))
        ends = dict(islice(((name, paths) for name, paths in found if paths), _ROWS_TO_TRY))
        tried, own = list(ends), parent_prefix(table)
        holding = Counter(parent_prefix(path) for paths in ends.values() for path in paths)
        folders = sorted(folder for folder, _ in holding.most_common(_FOLDERS_TO_TRY))
        words = [word for word in re.split(r"[\W_]+", stem(_last(table)).casefold()) if len(word) > 2]
        of_last = {folder: _last(folder.rstrip("/")).casefold() for folder in folders}
        eponyms = [
            folder
            for folder, last in of_last.items()
            if len(last) > 2 and any(word.startswith(last) or last.startswith(word) for word in words)
        ]
        below = [folder for folder in folders if folder.startswith(own)]
        above = [own[: match.end()] for match in reversed(list(re.finditer("/", own.removesuffix("/"))))]
        best, best_count = own, 0
        for base in dict.fromkeys((own, *eponyms, *below, *above, "", *folders)):
            count = sum(is_image(base, name) for name in tried)
            if count > best_count:
                best, best_count = base, count
            if best_count == len(tried):
                break
        if best_count < len(tried):
            count = sum(is_image("", name, anywhere=True) for name in tried)
            if count > best_count or (count == best_count > 0 and best != own):
                return "", True
        return (best, False) if best_count else None

    def _within(self, base: str, name: str) -> str | None:
        root = self.found.root
        if os.path.isabs(name):
            for top in (os.path.abspath(root), os.path.realpath(root)):
                if os.path.commonpath([top, os.path.normpath(name)]) == top:
                    return os.path.relpath(name, top)
            return None
        path = os.path.normpath(base + name)
        return None if path.split(os.sep)[0] == ".." or _DRIVE.match(name) else path

    def _is_file(self, path: str) -> bool:
        try:
            return path in self._files or os.path.isfile(self.found.root / path)
        except ValueError:  # a NUL in the name
            return False

    def _ending(self, path: str) -> list[str]:
        """Images whose path ends with `path`, with or without suffix."""
        path = nfc(path)
        ends = self._last_parts.get(_last(path).casefold(), [])
        if suffix(path) in IMAGES:
            whole = [f"/{nfc(stem(other))}{suffix(other)}" for other in ends]
            path = stem(path) + suffix(path)
        else:
            whole = [f"/{nfc(stem(other))}" for other in ends]
        exact = [other for other, full in zip(ends, whole, strict=True) if full.endswith(f"/{path}")]
        return exact or (self._numbers.get(int(path), []) if re.fullmatch(r"[0-9]{1,18}", path) else [])

    @cached_property
    def _files(self) -> set[str]:
        return set(self.found.files)

    @cached_property
    def _decomposed(self) -> dict[str, list[str]]:
        return _grouped((nfc(path), path) for path in self.found.files if not path.isascii())

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        return _grouped((nfc(stem(path)), path) for path in self.found.images)

    @cached_property
    def _last_parts(self) -> dict[str, list[str]]:
        named = ((_last(nfc(path)).casefold(), path) for path in self.found.images)
        bare = ((_last(nfc(stem(path))).casefold(), path) for path in self.found.images)
        return _grouped((*named, *bare))

    @cached_property
    def _folded(self) -> dict[str, str]:
        folded = {nfc(stem(path)).casefold(): path for path in self.found.images}
        return folded | {nfc(path).casefold(): path for path in self.found.images}

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        """COCO stores image 139 as 000000000139.jpg, or COCO_train2014_000000000139.jpg."""
        return _grouped(
            (int(match[1]), path)
            for path in self.found.images
            if (match := re.fullmatch(r"(?:COCO_[a-z]+\d+_)?([0-9]{1,18})", _last(stem(path))))
        )


def without_number(name: str) -> str:
    """ "1000.jpg" of "1000.jpg#0", as Flickr's lists number the captions of an image."""
    return re.sub(r"#\d+$", "", name) if suffix(re.sub(r"#\d+$", "", name)) in IMAGES else name


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for key, path in pairs:
        if path not in groups.setdefault(key, []):
            groups[key].append(path)
    return groups


def _last(path: str) -> str:
    """The last part of a path with slashes or backslashes."""
    return PurePosixPath(path.replace("\\", "/")).name
