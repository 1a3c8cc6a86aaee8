"""Tables that name image files: metadata.csv, metadata.jsonl, metadata.parquet and their like."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath

from ldm.data.captions import CAPTION_NAMES, captions, choose, listed, match, printable
from ldm.data.folder import IMAGES, Found, Listing, foreign, sample_of, stem, suffix
from ldm.data.rows import SUFFIXES, Row, Rows, open_rows
from ldm.data.sources import DataConfig, Skipped

FILE_NAMES = (
    *("file_name", "filename", "file", "image_file_name", "image_file", "image_path", "img_path", "image_name"),
    *("image", "img", "file_path", "filepath", "path"),
)
_ROWS_TO_TRY = 100


@dataclass(frozen=True)
class Table:
    """A table within a folder: its path, and the folder that its names are relative to, "" or ending in "/"."""

    path: str
    base: str
    rows: Rows


def list_metadata(found: Found, with_images: Collection[str], config: DataConfig) -> Listing | None:
    """metadata.csv, .tsv, .jsonl and .parquet, each for the folder it lies in; None where there is none.

    All of them count: an image that several rows name, of one file or of several, has all their captions.

    Args:
        with_images: tables with the images in them, which need not name files.
    """
    listing = Listing("metadata", uncovered="no caption: no metadata file names it")
    tables = []
    for path in found.ending(*SUFFIXES):
        if PurePosixPath(path).stem.lower() != "metadata":
            continue
        try:
            table = Table(path, _folder_of(path), open_rows(found.root / path))
        except (OSError, ValueError) as error:
            listing.skipped.append(Skipped(path, _reason(error)))
            continue
        if path not in with_images or _file_column(table, config) is not None:
            tables.append(table)
    if config.image_column is not None and tables and not any(_file_column(table, config) for table in tables):
        columns = tables[0].rows.columns
        choose(printable(tables[0].path), columns, columns, FILE_NAMES, "image_column", config.image_column)
    _list_tables(found, tables, config, listing)
    return listing if tables or listing.skipped else None


def list_named_table(found: Found, config: DataConfig, paths: Sequence[str] | None = None) -> Listing | None:
    """The one table whose rows name images of the folder, whatever it is called; None where there is none.

    Its names are relative to its own folder, or to one below it: captions.csv beside Images/.

    Args:
        paths: the tables that may be the one; None for all of the folder.

    Raises:
        ValueError: if there are several.
    """
    tables = []
    for path in found.ending(*SUFFIXES) if paths is None else paths:
        try:
            table = Table(path, _folder_of(path), open_rows(found.root / path))
        except (OSError, ValueError):
            continue  # not known to be a table of images; what it should caption is reported without a caption
        base = _base(found, table, _file_column(table, config))
        if base is not None:
            tables.append(Table(path, base, table.rows))
    if len(tables) > 1:
        names = ", ".join(printable(table.path) for table in tables)
        raise ValueError(
            f"{found.root} has several tables that name images: {names}; give one of them as data.path, or call "
            "those that count metadata.csv or metadata.jsonl"
        )
    if not tables:
        return None
    where = printable(tables[0].path)
    listing = Listing(where, uncovered=f"no caption: {where} does not name it")
    _list_tables(found, tables, config, listing)
    return listing


def _list_tables(found: Found, tables: list[Table], config: DataConfig, listing: Listing) -> None:
    disk = _Disk(found)
    texts: dict[str, list[str]] = {}
    for table in tables:
        file_column, text_column = _columns(found, table, config)
        for row in table.rows.read([file_column, text_column]):
            place = f"{table.path}:{row.number}"
            try:
                path = disk.locate(table.base, _name(row, file_column))
            except ValueError as error:
                listing.skipped.append(Skipped(place, str(error)))
                continue
            listing.covered.add(path)
            unread = foreign(path)
            good, reasons = captions(listed(row.cells.get(text_column))) if unread is None else ([], [unread])
            listing.skipped += [Skipped(place, reason) for reason in reasons]
            if good:
                texts.setdefault(path, []).extend(good)
    listing.samples += [sample_of(found, path, texts[path], path, config.background_rgb) for path in sorted(texts)]


def _columns(found: Found, table: Table, config: DataConfig) -> tuple[str, str]:
    columns = table.rows.columns
    where = printable(table.path)
    if config.image_column is None and _file_column(table, config) is None:
        raise ValueError(
            f"{found.root / where} has no column that names image files, such as file_name; its columns are "
            f"{', '.join(map(printable, columns))}; rename one, or set data.image_column"
        )
    files = choose(where, columns, columns, FILE_NAMES, "image_column", config.image_column)
    # pandas writes its index as a column without a name.
    rest = [column for column in columns if column != files and column.strip()]
    texts = choose(where, columns, rest, CAPTION_NAMES, "caption_column", config.caption_column)
    if columns.count(texts) > 1:
        raise ValueError(f'{where} has {columns.count(texts)} columns "{printable(texts)}"; rename all but one of them')
    return files, texts


def _file_column(table: Table, config: DataConfig) -> str | None:
    if config.image_column is not None:
        return config.image_column if config.image_column in table.rows.columns else None
    return match(table.rows.columns, FILE_NAMES)


def _name(row: Row, column: str) -> str:
    if row.fault is not None:
        raise ValueError(row.fault)
    name = row.cells.get(column)
    if name is None or name == "":
        raise ValueError(f"{column} is missing")
    if not isinstance(name, str):
        raise ValueError(f"{column} is not a text")
    return name


def _base(found: Found, table: Table, column: str | None) -> str | None:
    if column is None:
        return None
    own = _folder_of(table.path)
    folders = {_folder_of(path) for path in found.files if suffix(path) in IMAGES}
    disk = _Disk(found)
    rows = islice(table.rows.read([column]), _ROWS_TO_TRY)
    names = [name for row in rows if isinstance(name := row.cells.get(column), str)]
    for base in (own, *sorted(folder for folder in folders - {own} if folder.startswith(own))):
        if any(disk.holds(base, name) for name in names):
            return base
    return None


class _Disk:
    """From a name in a table to a file of the folder."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def holds(self, base: str, name: str) -> bool:
        """Whether the name leads to an image."""
        try:
            return suffix(self.locate(base, name)) in IMAGES
        except ValueError:
            return False

    def locate(self, base: str, name: str) -> str:
        """The path within the folder; ValueError with the reason if there is no such file in it."""
        shown = printable(name)
        if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
            raise ValueError(f"{shown[:80]} is a URL; URLs are not downloaded, give the name of a file")
        # A backslash is a letter here and a separator where many tables are made.
        spelled = [self._within(base, name), self._within(base, name.replace("\\", "/"))]
        for path in spelled:
            if path is not None and self._is_file(path):
                return path
        meant = spelled[-1]
        if meant is None:
            raise ValueError(f"{shown} lies outside the folder")
        # macOS decomposes accents in names and tables seldom do: the same letters in other code points.
        same = self._composed.get(unicodedata.normalize("NFC", meant))
        if same is not None:
            return same
        raise ValueError(f"there is no file {shown}{self._hint(meant)}")

    def _within(self, base: str, name: str) -> str | None:
        root = self.found.root
        if os.path.isabs(name):
            for top in (os.path.abspath(root), os.path.realpath(root)):
                if os.path.commonpath([top, os.path.normpath(name)]) == top:
                    return os.path.relpath(name, top)
            return None
        path = os.path.normpath(base + name)
        return None if path.split(os.sep)[0] == ".." or re.match(r"[A-Za-z]:[\\/]", name) else path

    def _is_file(self, path: str) -> bool:
        try:
            return os.path.isfile(self.found.root / path)
        except ValueError:  # a NUL in the name
            return False

    @cached_property
    def _composed(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", path): path for path in self.found.files if not path.isascii()}

    @cached_property
    def _folded(self) -> dict[str, str]:
        """How a name may have been meant: other case, or the suffix left out."""
        images = [path for path in self.found.files if suffix(path) in IMAGES]
        folded = {unicodedata.normalize("NFC", stem(path)).casefold(): path for path in images}
        return folded | {unicodedata.normalize("NFC", path).casefold(): path for path in images}

    def _hint(self, path: str) -> str:
        folded = unicodedata.normalize("NFC", path).casefold()
        near = self._folded.get(folded) or self._folded.get(stem(folded))
        return f"; did you mean {printable(near)}?" if near else ""


def _folder_of(path: str) -> str:
    return path[: path.rfind("/") + 1]


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
