"""Captions of the image files of a folder: beside them, in tables that name them, and names of sub-folders."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from ldm.data.captions import (
    FILE_NAMES,
    TABLE_CAPTION_NAMES,
    Columns,
    captions,
    choose_column,
    class_caption,
    match_column,
    parse_list,
    sidecar_captions,
)
from ldm.data.files import (
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
from ldm.data.rows import LISTS, SUFFIXES, JsonRows, RowReader, open_rows
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
# COCO's bounding boxes have hundreds of MiB and no captions; parsing them takes many times the memory.
_LARGE = 2**26
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
Key = TypeVar("Key")


def file_sample(found: FolderFiles, path: str, captions: list[str], group: str, decode: Decode) -> Sample:
    """A file of the folder as a sample, without repeated captions."""
    read = partial(read_file, os.path.join(found.root, path))
    return Sample(path, tuple(dict.fromkeys(captions)), group, read, decode)


def read_sidecars(found: FolderFiles, column: str | None, decode: Decode) -> Listing | None:
    """Captions in `a.txt`, `a.caption` or `a.png.txt` beside `a.png`, one per line; None if there are none.

    An image has the captions of all its text files. If it has none, those in `a.json` under `column` or a usual name
    are used. Images with the same stem share a group.
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
        good, faults = sidecar_captions(beside, lambda path: (found.root / path).read_bytes(), column)
        if good:
            listing.samples.append(file_sample(found, image, good, stem(image), decode))
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


def read_classes(found: FolderFiles, decode: Decode) -> Listing | None:
    """Images in sub-folders, captioned with the name of their folder; None if there are none.

    `_` and `-` become spaces, and the `10_` of "10_my dog" is dropped.
    """
    listing = Listing(
        FOLDERS,
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
            listing.samples.append(file_sample(found, image, [words], stem(image), decode))
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
    rows: RowReader
    column: str | None
    base: str
    anywhere: bool = False


def is_metadata(path: str) -> bool:
    """Whether a file is a table named metadata."""
    return PurePosixPath(path).stem.lower() == METADATA and suffix(path) in SUFFIXES and suffix(path) not in LISTS


def read_metadata(found: FolderFiles, with_images: Collection[str], columns: Columns, decode: Decode) -> Listing | None:
    """metadata.csv, .tsv, .jsonl, .json and .parquet, each for the folder it lies in; None if there are none.

    An image that several rows name has all their captions.

    Args:
        with_images: tables that contain images, which need not name files.
    """
    tables, skipped, names = [], [], FileNames(found)
    for path in found.ending(*SUFFIXES):
        if not is_metadata(path):
            continue
        try:
            rows = open_rows(found.root / path)
        except (OSError, ValueError) as error:
            # A metadata.json may be anything.
            if suffix(path) != ".json":
                skipped.append(Skipped(path, _reason(error)))
            continue
        column = _file_column(rows, columns)
        if suffix(path) == ".json" and (column is None or names.base_folder(path, _names(rows, column)) is None):
            continue
        if path not in with_images or column is not None:
            tables.append(NamingTable(path, rows, column, parent_prefix(path)))
    if not tables and not skipped:
        return None
    listing = _read_tables(names, METADATA, "no metadata file names it", tables, columns, decode)
    listing.files += tuple(entry.path for entry in skipped)
    listing.numbers = False
    if listing.error is None:
        listing.skipped = skipped + listing.skipped
    return listing


def read_named_tables(
    found: FolderFiles, columns: Columns, decode: Decode, paths: Sequence[str] | None = None
) -> tuple[list[Listing], dict[str, str]]:
    """Other tables whose rows name images, such as captions.csv beside Images/; all COCO annotations are one listing.

    Args:
        paths: the tables to try; None tries all of the folder that are neither sidecars nor documents.

    Returns:
        The listings, and the reasons why other readable tables are none.
    """
    names = FileNames(found)
    groups: list[list[NamingTable]] = []
    coco: list[NamingTable] = []
    reasons: dict[str, str] = {}
    for path in _table_paths(found) if paths is None else paths:
        try:
            if _is_large_without_captions(found, path):
                continue
            rows = open_rows(found.root / path)
        except (OSError, ValueError) as error:
            reasons[path] = _reason(error)
            continue
        column = _file_column(rows, columns, () if is_metadata(path) else _ID_NAMES)
        if column is None:
            shown = ", ".join(printable(name)[:40] for name in rows.columns[:8])
            reasons[path] = f"no column names image files, such as file_name; its columns are {shown}"
            continue
        based = names.base_folder(path, _names(rows, column))
        if based is None:
            reasons[path] = "it names no image"
            for name in islice(_names(rows, column), _ROWS_TO_TRY):
                try:
                    names.resolve(parent_prefix(path), name)
                except ValueError as error:
                    reasons[path] = str(error)
                    break
            continue
        table = NamingTable(path, rows, column, *based)
        if isinstance(rows, JsonRows) and rows.is_coco:
            coco.append(table)
        else:
            groups.append([table])
    listings = []
    for tables in [*groups, *([coco] if coco else [])]:
        where = ", ".join(printable(table.path) for table in tables)
        listing = _read_tables(names, where, f"{where} does not name it", tables, columns, decode)
        unusual = any(match_column(table.rows.columns, FILE_NAMES) is None for table in tables)
        listing.weak = listing.error is None and columns.image is None and unusual
        listings.append(listing)
    return listings, reasons


def _table_paths(found: FolderFiles) -> Iterator[str]:
    for path in found.ending(*SUFFIXES):
        is_other = nfc(stem(path)) in found.image_stems or last_part(path).lower().startswith(DOCUMENTS)
        if not is_metadata(path) and not (is_other and suffix(path) in (*LISTS, ".json")):
            yield path


def _is_large_without_captions(found: FolderFiles, path: str) -> bool:
    with open(found.root / path, "rb") as file:
        if suffix(path) != ".json" or os.fstat(file.fileno()).st_size <= _LARGE:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(b'"annotations"') >= 0 and data.find(b'"caption"') < 0


def _read_tables(
    names: FileNames, name: str, uncovered: str, tables: list[NamingTable], columns: Columns, decode: Decode
) -> Listing:
    listing = Listing(name, uncovered=f"no caption: {uncovered}", files=tuple(table.path for table in tables))
    texts: dict[str, list[str]] = {}
    words = False  # whether a column has a caption name, or a caption has letters
    try:
        if columns.image is not None and tables and not any(table.column for table in tables):
            every = tables[0].rows.columns
            choose_column(printable(tables[0].path), every, every, FILE_NAMES, "image", columns.image)
        for table in tables:
            file_column, text_column, by_name = _choose_columns(names.found, table, columns)
            words = words or by_name
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
                    path = names.resolve(table.base, file, anywhere=table.anywhere)
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
        named = set()
        for table in tables:
            column = _file_column(table.rows, columns, _ID_NAMES)
            for file in _names(table.rows, column) if column is not None else ():
                try:
                    named.add(names.resolve(table.base, file, anywhere=table.anywhere))
                except ValueError:
                    continue
        named = {path for path in named if suffix(path) in IMAGES}
        return Listing(name, error=error, named=named, files=listing.files)
    listing.samples = [file_sample(names.found, path, texts[path], path, decode) for path in sorted(texts)]
    listing.numbers = bool(texts) and not words
    return listing


def _choose_columns(found: FolderFiles, table: NamingTable, given: Columns) -> tuple[str, str, bool]:
    """(column of files, column of captions, whether the latter has a caption name)."""
    columns, files = table.rows.columns, table.column
    where = printable(table.path)
    if given.image is None and files is None:
        raise ValueError(
            f"{found.root / where} has no column that names image files, such as file_name; its columns are "
            f"{', '.join(map(printable, columns))}; rename one, or set data.image_column"
        )
    if files is None:
        files = choose_column(where, columns, columns, FILE_NAMES, "image", given.image)
    # pandas writes its index as a column without a name.
    rest = [column for column in columns if column != files and column.strip()]
    texts = choose_column(where, columns, rest, TABLE_CAPTION_NAMES, "caption", given.caption)
    if columns.count(texts) > 1:
        raise ValueError(f'{where} has {columns.count(texts)} columns "{printable(texts)}"; rename all but one of them')
    return files, texts, texts in (given.caption, match_column(rest, TABLE_CAPTION_NAMES))


def _file_column(rows: RowReader, columns: Columns, others: tuple[str, ...] = ()) -> str | None:
    if columns.image is not None:
        return columns.image if columns.image in rows.columns else None
    return match_column(rows.columns, FILE_NAMES) or match_column(rows.columns, others)


def _names(rows: RowReader, column: str) -> Iterator[str]:
    return (name for row in rows.read([column]) if isinstance(name := row.cells.get(column), str) and name)


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
        """The path within the folder.

        Args:
            base: the folder that names are relative to, "" or ending in "/".
            anywhere: `name` is the end of a path, which must be unique.

        Raises:
            ValueError: with the reason, if there is no such file.
        """
        shown = printable(name)[:200]
        if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
            raise ValueError(f"{shown[:80]} is a URL; URLs are not downloaded, give the name of a file")
        # A backslash is a letter on Linux, and the separator on Windows, where many tables are made.
        spelled = [self._within(base, name), self._within(base, name.replace("\\", "/"))]
        for path in spelled:
            if path is not None and self._is_file(path):
                return path
        meant = spelled[-1]
        if meant is None:
            moved = self._moved(name)
            if len(moved) == 1:
                return moved[0]
            raise ValueError(f"{shown} lies outside the folder")
        meant = without_number(meant)
        if self._is_file(meant):
            return meant
        alike = self._alike(meant) or (self._ending(meant) if anywhere else [])
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ValueError(f"{shown} may be {' or '.join(map(printable, alike[:2]))}; give the whole name")
        raise ValueError(f"there is no file {shown}{self._hint(meant)}")

    def base_folder(self, table: str, names: Iterable[str]) -> tuple[str, bool] | None:
        """The `base` and `anywhere` for `resolve` with which most of the first hundred names in `table` are images.

        Bases are tried in the order: the table's folder, image folders that it is named after (captions_val2017.json:
        val2017/), folders below, above, and all others. `anywhere` is used if it finds more names, or as many in
        another folder than the table's. None if no name leads to an image.
        """
        found = ((name, self._ending(_last(without_number(name)))) for name in dict.fromkeys(names))
        ends = dict(islice(((name, paths) for name, paths in found if paths), _ROWS_TO_TRY))
        tried, own = list(ends), parent_prefix(table)
        holding = Counter(parent_prefix(path) for paths in ends.values() for path in paths)
        best, best_count = own, 0
        for base in _bases(table, [folder for folder, _ in holding.most_common(_FOLDERS_TO_TRY)]):
            count = sum(self._is_image(base, name) for name in tried)
            if count > best_count:
                best, best_count = base, count
            if best_count == len(tried):
                break
        if best_count < len(tried):
            count = sum(self._is_image("", name, anywhere=True) for name in tried)
            if count > best_count or (count == best_count > 0 and best != own):
                return "", True
        return (best, False) if best_count else None

    def _is_image(self, base: str, name: str, anywhere: bool = False) -> bool:
        try:
            return suffix(self.resolve(base, name, anywhere=anywhere)) in IMAGES
        except ValueError:
            return False

    def _within(self, base: str, name: str) -> str | None:
        root = self.found.root
        if os.path.isabs(name):
            for top in (os.path.abspath(root), os.path.realpath(root)):
                if os.path.commonpath([top, os.path.normpath(name)]) == top:
                    return os.path.relpath(name, top)
            return None
        path = os.path.normpath(base + name)
        return None if path.split(os.sep)[0] == ".." or _DRIVE.match(name) else path

    def _moved(self, name: str) -> Sequence[str]:
        """The images with the longest common end of an absolute path that does not exist on this machine."""
        if not (os.path.isabs(name) or _DRIVE.match(name)) or os.path.exists(name):
            return ()
        parts = name.replace("\\", "/").split("/")
        tails = ("/".join(parts[first:]) for first in range(1, len(parts)))
        return next((paths for tail in tails if tail and (paths := self._ending(tail))), ())

    def _is_file(self, path: str) -> bool:
        try:
            return path in self._files or os.path.isfile(self.found.root / path)
        except ValueError:  # a NUL in the name
            return False

    def _alike(self, path: str) -> Sequence[str]:
        """Files with the same name in another normal form, suffix in another case, or with a suffix."""
        path = nfc(path)
        same = [other for other in self._decomposed.get(path, ()) if suffix(other) == suffix(path)]
        if same:
            return same
        if suffix(path) in IMAGES:
            return [other for other in self._stems.get(nfc(stem(path)), ()) if suffix(other) == suffix(path)]
        return self._stems.get(path, ())

    def _ending(self, path: str) -> Sequence[str]:
        """Images whose path ends with `path`, with or without suffix."""
        path = nfc(path)
        ends = self._last_parts.get(_last(path).casefold(), ())
        if suffix(path) in IMAGES:
            whole = [f"/{nfc(stem(other))}{suffix(other)}" for other in ends]
            path = stem(path) + suffix(path)
        else:
            whole = [f"/{nfc(stem(other))}" for other in ends]
        exact = [other for other, full in zip(ends, whole, strict=True) if full.endswith(f"/{path}")]
        return exact or (self._numbers.get(int(path), ()) if re.fullmatch(r"[0-9]{1,18}", path) else ())

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
    def _numbers(self) -> dict[int, list[str]]:
        """COCO stores image 139 as 000000000139.jpg, or COCO_train2014_000000000139.jpg."""
        return _grouped(
            (int(match[1]), path)
            for path in self.found.images
            if (match := re.fullmatch(r"(?:COCO_[a-z]+\d+_)?([0-9]{1,18})", _last(stem(path))))
        )

    @cached_property
    def _folded(self) -> dict[str, str]:
        folded = {nfc(stem(path)).casefold(): path for path in self.found.images}
        return folded | {nfc(path).casefold(): path for path in self.found.images}

    def _hint(self, path: str) -> str:
        """A similar name that is not accepted as the same: other case, another suffix."""
        folded = nfc(path).casefold()
        ends = self._last_parts.get(folded, [""])
        near = self._folded.get(folded) or self._folded.get(stem(folded)) or ends[0]
        return f"; did you mean {printable(near)}?" if near else ""


def _bases(table: str, folders: Sequence[str]) -> Iterable[str]:
    """Folders that names in a table may be relative to, in the order of `FileNames.base_folder`."""
    own, words = parent_prefix(table), [w for w in re.split(r"[\W_]+", stem(_last(table)).casefold()) if len(w) > 2]

    def is_eponym(folder: str) -> bool:
        name = _last(folder.rstrip("/")).casefold()
        return len(name) > 2 and any(word.startswith(name) or name.startswith(word) for word in words)

    eponyms = [folder for folder in sorted(folders) if is_eponym(folder)]
    above = [own[: match.end()] for match in reversed(list(re.finditer("/", own.removesuffix("/"))))]
    below = [folder for folder in sorted(folders) if folder.startswith(own)]
    return dict.fromkeys((own, *eponyms, *below, *above, "", *sorted(folders)))


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
