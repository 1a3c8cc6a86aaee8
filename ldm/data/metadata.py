"""Tables that name image files: metadata.csv, metadata.jsonl, COCO annotations, Flickr lists and similar."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from ldm.data.captions import (
    FILE_NAMES,
    TABLE_CAPTION_NAMES,
    captions,
    choose_column,
    match_column,
    parse_list,
    printable,
)
from ldm.data.file_types import DOCUMENTS, IMAGES, nfc, parent_prefix, stem, suffix, unsupported_reason
from ldm.data.folder import Candidate, FolderFiles, SampleListing, file_sample
from ldm.data.rows import LISTS, SUFFIXES, JsonRows, Row, RowReader, open_rows
from ldm.data.sources import DataConfig, Skipped

METADATA = "metadata"
# Columns that may name images, mostly without a suffix; tables that have only these are weak candidates.
_ID_NAMES = ("image_id", "img_id", "id", "name")
_ROWS_TO_TRY = 100
_FOLDERS_TO_TRY = 50
# COCO's bounding boxes have hundreds of MiB and no captions; parsing them takes many times the memory.
_LARGE = 2**26
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
Key = TypeVar("Key")


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


def _last(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for key, path in pairs:
        if path not in groups.setdefault(key, []):
            groups[key].append(path)
    return groups


# ---- tables


@dataclass(frozen=True)
class NamingTable:
    """A table in a folder: its path, rows, and what its names are relative to (`FileNames.resolve`)."""

    path: str
    rows: RowReader
    base: str
    anywhere: bool = False


def is_metadata(path: str) -> bool:
    """Whether a file is a table named metadata."""
    return PurePosixPath(path).stem.lower() == METADATA and suffix(path) in SUFFIXES and suffix(path) not in LISTS


def list_metadata(found: FolderFiles, with_images: Collection[str], config: DataConfig) -> Candidate | None:
    """metadata.csv, .tsv, .jsonl, .json and .parquet, each for the folder it lies in; None if there are none.

    An image that several rows name has all their captions.

    Args:
        with_images: tables that contain images, which need not name files.
    """
    listing = SampleListing(METADATA, uncovered="no caption: no metadata file names it")
    tables, names = [], FileNames(found)
    for path in found.ending(*SUFFIXES):
        if not is_metadata(path):
            continue
        try:
            table = NamingTable(path, open_rows(found.root / path), parent_prefix(path))
        except (OSError, ValueError) as error:
            # A metadata.json may be anything.
            if suffix(path) != ".json":
                listing.skipped.append(Skipped(path, _reason(error)))
            continue
        column = _file_column(table.rows, config)
        if suffix(path) == ".json" and (column is None or names.base_folder(path, _names(table.rows, column)) is None):
            continue
        if path not in with_images or column is not None:
            tables.append(table)
    if not tables and not listing.skipped:
        return None
    files = (*(table.path for table in tables), *(entry.path for entry in listing.skipped))
    try:
        if config.image_column is not None and tables and not any(_file_column(table.rows, config) for table in tables):
            columns = tables[0].rows.columns
            choose_column(printable(tables[0].path), columns, columns, FILE_NAMES, "image_column", config.image_column)
        _list_tables(names, tables, config, listing)
    except ValueError as error:
        named = _named(names, tables, config)
        return Candidate(METADATA, SampleListing(listing.kind), error=error, named=named, files=files)
    return Candidate(METADATA, listing, files=files)


def list_named_tables(
    found: FolderFiles, config: DataConfig, paths: Sequence[str] | None = None
) -> tuple[list[Candidate], dict[str, str]]:
    """Other tables whose rows name images, such as captions.csv beside Images/; all COCO annotations are one candidate.

    Args:
        paths: the tables to try; None tries all of the folder.

    Returns:
        The candidates, and the reasons why other readable tables are none.
    """
    names = FileNames(found)
    candidates: list[Candidate] = []
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
        column = _file_column(rows, config, _ID_NAMES)
        if column is None:
            shown = ", ".join(printable(name)[:40] for name in rows.columns[:8])
            reasons[path] = f"no column names image files, such as file_name; its columns are {shown}"
            continue
        based = names.base_folder(path, _names(rows, column))
        if based is None:
            reasons[path] = _first_fault(names, path, rows, column)
        elif isinstance(rows, JsonRows) and rows.is_coco:
            coco.append(NamingTable(path, rows, *based))
        else:
            candidates.append(_candidate(names, [NamingTable(path, rows, *based)], config))
    if coco:
        candidates.append(_candidate(names, coco, config))
    return candidates, reasons


def _table_paths(found: FolderFiles) -> Iterator[str]:
    """Files that may be a table of many images: neither sidecars nor documents."""
    for path in found.ending(*SUFFIXES):
        is_other = nfc(stem(path)) in found.image_stems or PurePosixPath(path).name.lower().startswith(DOCUMENTS)
        if not is_metadata(path) and not (is_other and suffix(path) in (*LISTS, ".json")):
            yield path


def _is_large_without_captions(found: FolderFiles, path: str) -> bool:
    with open(found.root / path, "rb") as file:
        if suffix(path) != ".json" or os.fstat(file.fileno()).st_size <= _LARGE:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(b'"annotations"') >= 0 and data.find(b'"caption"') < 0


def _candidate(names: FileNames, tables: list[NamingTable], config: DataConfig) -> Candidate:
    where = ", ".join(printable(table.path) for table in tables)
    listing = SampleListing(where, uncovered=f"no caption: {where} does not name it")
    files = tuple(table.path for table in tables)
    try:
        numbers = _list_tables(names, tables, config, listing)
    except ValueError as error:
        return Candidate(where, SampleListing(where), error=error, named=_named(names, tables, config), files=files)
    weak = any(match_column(table.rows.columns, FILE_NAMES) is None for table in tables) and config.image_column is None
    return Candidate(where, listing, files=files, weak=weak, numbers=numbers)


def _named(names: FileNames, tables: list[NamingTable], config: DataConfig) -> set[str]:
    """The images that tables without captions name."""
    named = set()
    for table in tables:
        column = _file_column(table.rows, config, _ID_NAMES)
        for name in _names(table.rows, column) if column is not None else ():
            try:
                named.add(names.resolve(table.base, name, anywhere=table.anywhere))
            except ValueError:
                continue
    return {path for path in named if suffix(path) in IMAGES}


def _list_tables(names: FileNames, tables: list[NamingTable], config: DataConfig, listing: SampleListing) -> bool:
    """Fills the listing. Returns whether all captions are numbers in columns without a caption name."""
    texts: dict[str, list[str]] = {}
    words = False
    for table in tables:
        file_column, text_column, by_name = _columns(names.found, table, config)
        words = words or by_name
        for row in table.rows.read([file_column, text_column]):
            place = f"{table.path}:{row.number}"
            try:
                path = names.resolve(table.base, _name(row, file_column), anywhere=table.anywhere)
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
    listing.samples += [
        file_sample(names.found, path, texts[path], path, config.background_rgb) for path in sorted(texts)
    ]
    return bool(texts) and not words


def _columns(found: FolderFiles, table: NamingTable, config: DataConfig) -> tuple[str, str, bool]:
    """(column of files, column of captions, whether the latter has a caption name)."""
    columns = table.rows.columns
    where = printable(table.path)
    files = _file_column(table.rows, config, () if is_metadata(table.path) else _ID_NAMES)
    if config.image_column is None and files is None:
        raise ValueError(
            f"{found.root / where} has no column that names image files, such as file_name; its columns are "
            f"{', '.join(map(printable, columns))}; rename one, or set data.image_column"
        )
    if files is None:
        files = choose_column(where, columns, columns, FILE_NAMES, "image_column", config.image_column)
    # pandas writes its index as a column without a name.
    rest = [column for column in columns if column != files and column.strip()]
    texts = choose_column(where, columns, rest, TABLE_CAPTION_NAMES, "caption_column", config.caption_column)
    if columns.count(texts) > 1:
        raise ValueError(f'{where} has {columns.count(texts)} columns "{printable(texts)}"; rename all but one of them')
    return files, texts, texts in (config.caption_column, match_column(rest, TABLE_CAPTION_NAMES))


def _file_column(rows: RowReader, config: DataConfig, others: tuple[str, ...] = ()) -> str | None:
    if config.image_column is not None:
        return config.image_column if config.image_column in rows.columns else None
    return match_column(rows.columns, FILE_NAMES) or match_column(rows.columns, others)


def _names(rows: RowReader, column: str) -> Iterator[str]:
    return (name for row in rows.read([column]) if isinstance(name := row.cells.get(column), str) and name)


def _first_fault(names: FileNames, path: str, rows: RowReader, column: str) -> str:
    for name in islice(_names(rows, column), _ROWS_TO_TRY):
        try:
            names.resolve(parent_prefix(path), name)
        except ValueError as error:
            return str(error)
    return "it names no image"


def _name(row: Row, column: str) -> str:
    if row.fault is not None:
        raise ValueError(row.fault)
    name = row.cells.get(column)
    if name is None or name == "":
        raise ValueError(f"{column} is missing")
    if not isinstance(name, str):
        raise ValueError(f"{column} is not a text")
    return name


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
