"""Tables that name image files: metadata.csv, metadata.jsonl, COCO's annotations, Flickr's lists and their like."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

from ldm.data.captions import (
    FILE_NAMES,
    TABLE_CAPTION_NAMES,
    captions,
    choose_column,
    match_column,
    parse_list,
    printable,
)
from ldm.data.folder import (
    DOCUMENTS,
    IMAGES,
    Candidate,
    FolderFiles,
    SampleListing,
    file_sample,
    nfc,
    stem,
    suffix,
    unsupported_reason,
)
from ldm.data.json_rows import JsonRows
from ldm.data.names import FileNames, parent_prefix
from ldm.data.rows import LISTS, SUFFIXES, Row, Rows, open_rows
from ldm.data.sources import DataConfig, Skipped

METADATA = "metadata"
# What else names images, mostly without a suffix. Other things are named so as well, so that it counts for less.
_ID_NAMES = ("image_id", "img_id", "id", "name")
_ROWS_TO_TRY = 100
# COCO's boxes have hundreds of MiB. Nothing of them is a caption, and reading them takes as many times the memory.
_LARGE = 2**26


@dataclass(frozen=True)
class NamingTable:
    """A table within a folder: its path, and what its names are relative to, as `FileNames.resolve` takes it."""

    path: str
    rows: Rows
    base: str
    anywhere: bool = False


def is_metadata(path: str) -> bool:
    """Whether a file is called metadata, which says what it is."""
    return PurePosixPath(path).stem.lower() == "metadata" and suffix(path) in SUFFIXES and suffix(path) not in LISTS


def list_metadata(found: FolderFiles, with_images: Collection[str], config: DataConfig) -> Candidate | None:
    """metadata.csv, .tsv, .jsonl, .json and .parquet, each for the folder it lies in; None where there is none.

    All of them count: an image that several rows name, of one file or of several, has all their captions.

    Args:
        with_images: tables with the images in them, which need not name files.
    """
    listing = SampleListing("metadata", uncovered="no caption: no metadata file names it")
    tables, names = [], FileNames(found)
    for path in found.ending(*SUFFIXES):
        if not is_metadata(path):
            continue
        try:
            table = NamingTable(path, open_rows(found.root / path), parent_prefix(path))
        except (OSError, ValueError) as error:
            # A .json of this name may be anything.
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
        return Candidate(
            METADATA, SampleListing(listing.kind), error=error, named=_named(names, tables, config), files=files
        )
    return Candidate(METADATA, listing, files=files)


def list_named_tables(
    found: FolderFiles, config: DataConfig, paths: Sequence[str] | None = None
) -> tuple[list[Candidate], dict[str, str]]:
    """Each other table whose rows name images of the folder, whatever it is called; COCO's count as one.

    Its names are relative to its own folder, or to another one of images: captions.csv beside Images/, and annotations/
    beside train2017/.

    Args:
        paths: the tables that may be one; None for all of the folder.

    Returns:
        the tables, and why others that could be opened are none.
    """
    names = FileNames(found)
    candidates: list[Candidate] = []
    coco: list[NamingTable] = []
    reasons: dict[str, str] = {}
    for path in _paths(found) if paths is None else paths:
        try:
            if _is_boxes(found, path):
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


def _paths(found: FolderFiles) -> Iterator[str]:
    """The files that may be a table of many images: not what stands beside one, nor what explains a folder."""
    owners = {nfc(owner) for path in found.files if suffix(path) in IMAGES for owner in (path, stem(path))}
    for path in found.ending(*SUFFIXES):
        beside = nfc(stem(path)) in owners or PurePosixPath(path).name.lower().startswith(DOCUMENTS)
        if not is_metadata(path) and not (beside and suffix(path) in (*LISTS, ".json")):
            yield path


def _is_boxes(found: FolderFiles, path: str) -> bool:
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
    """The images that tables name, whose captions cannot be told."""
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
    """Fills the listing; whether all captions are numbers in columns that are not named after captions."""
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
            unread = unsupported_reason(path)
            good, reasons = captions(parse_list(row.cells.get(text_column))) if unread is None else ([], [unread])
            listing.skipped += [Skipped(place, reason) for reason in reasons]
            words = words or any(re.search(r"[^\W\d_]", text) for text in good)
            if good:
                texts.setdefault(path, []).extend(good)
    listing.samples += [
        file_sample(names.found, path, texts[path], path, config.background_rgb) for path in sorted(texts)
    ]
    return bool(texts) and not words


def _columns(found: FolderFiles, table: NamingTable, config: DataConfig) -> tuple[str, str, bool]:
    """(column of files, column of captions, whether the latter has the name of one)."""
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


def _file_column(rows: Rows, config: DataConfig, others: tuple[str, ...] = ()) -> str | None:
    if config.image_column is not None:
        return config.image_column if config.image_column in rows.columns else None
    return match_column(rows.columns, FILE_NAMES) or match_column(rows.columns, others)


def _names(rows: Rows, column: str) -> Iterator[str]:
    return (name for row in rows.read([column]) if isinstance(name := row.cells.get(column), str) and name)


def _first_fault(names: FileNames, path: str, rows: Rows, column: str) -> str:
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
