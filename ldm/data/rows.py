"""Rows of CSV, TSV, JSON lines, JSON and parquet tables that give captions to image files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ldm.data.captions import CAPTION_NAMES, FILE_NAMES, decode_text, match_column
from ldm.data.images import IMAGES, suffix
from ldm.progress import error_reason

LISTS = (".txt", ".token")  # plain lists of file names and captions: img.jpg#0, a tab and the caption
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json", *LISTS)
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"} | dict.fromkeys(LISTS, "\t|,;")  # in order of preference
_NO_VALUE = frozenset({"nan", "null", "none", "n/a", "<na>", "#n/a"})  # missing values, as in pandas
_ROWS_FOR_COLUMNS = 1000


@dataclass(frozen=True)
class Row:
    """A row: `number` from 1 (line, parquet row or JSON entry), `cells` by column, and `fault`, why it is unusable."""

    number: int
    cells: dict[str, Any]
    fault: str | None = None


@dataclass(frozen=True)
class Table:
    """An open table: its columns (of parquet, texts and lists of texts), and `read`, which takes some of them and gives
    all rows in order with these cells, including unusable rows.
    """

    columns: list[str]
    read: Callable[[Sequence[str]], Iterator[Row]]
    is_coco: bool = False


def open_table(path: Path) -> Table:
    """Opens a table by its suffix.

    Raises:
        ValueError: with the reason, if it has no columns.
        OSError: if it cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"tables end in {', '.join(SUFFIXES)}")
    if kind == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            schema = parquet.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"not parquet: {error_reason(error)}") from error

        def read(columns: Sequence[str]) -> Iterator[Row]:
            number = 0
            with parquet.ParquetFile(path) as file:
                try:
                    for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
                        for values in zip(*(to_python(batch.column(name)) for name in columns), strict=True):
                            number += 1
                            yield Row(number, dict(zip(columns, values, strict=True)))
                except (pa.ArrowException, OSError) as error:
                    yield Row(number + 1, {}, f"this row and those after it cannot be read: {error_reason(error)}")

        return Table([field.name for field in schema if is_text(field.type) or is_texts(field.type)], read)
    # Invalid UTF-8 makes one row unusable, not the table; in file names it matches the names on disk.
    text = decode_text(path.read_bytes(), "surrogateescape")
    if kind == ".json":
        return _open_json(text)
    if kind in (".jsonl", ".ndjson"):
        return _json_table(lambda: _json_lines(text), "no line is a JSON object")
    lines = _Csv(text, _DELIMITERS[kind], kind in LISTS)
    return Table(lines.columns, lines.read)


class _Csv:
    """Lines with one of the `delimiters`, by preference. In a `plain`, handwritten list, quotes are letters and the
    last cell may contain the delimiter, unless that is a comma.
    """

    def __init__(self, text: str, delimiters: str, plain: bool) -> None:
        self.lines = list(io.StringIO(text, newline=None))  # StringIO splits lines as editors do
        self.plain = plain
        filled = [number for number, line in enumerate(self.lines) if line.strip()]
        # Excel's declaration of the delimiter.
        declared = re.fullmatch(r"""(['"]?)sep=(.)\1\s*""", self.lines[filled[0]], re.IGNORECASE) if filled else None
        if declared is not None:
            delimiters = declared[2]
            filled.pop(0)
        if not filled:
            raise ValueError("the file is empty")
        self.start = filled[0]
        try:
            heads = {mark: next(self._reader(self.start, mark)) for mark in delimiters}
        except csv.Error as error:  # such as an endless line
            raise ValueError(f"not CSV: {error}") from error

        def names_files(head: list[str]) -> bool:  # a column of files, or an image in the first cell
            return len(head) > 1 and (match_column(head, FILE_NAMES) is not None or is_image_name(head[0]))

        self.delimiter = max(heads, key=lambda mark: (names_files(heads[mark]), len(heads[mark])))
        self.columns = [cell.strip() for cell in heads[self.delimiter]]
        counted = len(self.columns) > 2 and self.columns[1].isdigit()  # Flickr: img.jpg| 0| a caption
        self.headless = is_image_name(self.columns[0]) and (
            len(self.columns) == 2 or (len(self.columns) > 2 and plain) or (len(self.columns) == 3 and counted)
        )
        if self.headless:
            self.columns = ["file_name", "number", "text"] if counted else ["file_name", "text"]
        files = match_column(self.columns, FILE_NAMES)
        self.files = None if files is None else self.columns.index(files)

    def read(self, columns: Sequence[str]) -> Iterator[Row]:
        places = {column: self.columns.index(column) for column in columns}
        width = len(self.columns)
        for number, cells, fault in islice(self._records(), 0 if self.headless else 1, None):
            if fault is None and len(cells) > width:
                if self.plain and '"' not in self.lines[number - 1]:
                    cells = [*cells[: width - 1], self.delimiter.join(cells[width - 1 :])]
                else:
                    fault = f"{len(cells)} cells for {width} columns; put quotes around a text with delimiters"
            picked = {name: cells[place] for name, place in places.items() if place < len(cells)}
            known = {name: cell for name, cell in picked.items() if cell.strip().casefold() not in _NO_VALUE}
            yield Row(number, known, fault)

    def _reader(self, start: int, delimiter: str, strict: bool = False) -> Any:
        quoting: Any = csv.QUOTE_NONE if self.plain and delimiter in "\t|" else csv.QUOTE_MINIMAL
        return csv.reader(islice(self.lines, start, None), delimiter=delimiter, quoting=quoting, strict=strict)

    def _records(self) -> Iterator[tuple[int, list[str], str | None]]:
        """(first line, cells, fault). An unclosed quote costs its own line only, or two lines if the quote of another
        row closes it.
        """

        def is_row(line: int) -> bool:  # inside a quoted cell: it names an image in the column of files
            cells = next(csv.reader([self.lines[line]], delimiter=self.delimiter), [])
            named = cells if self.files is None else cells[self.files : self.files + 1]
            return len(cells) > 1 and any(map(is_image_name, named))

        start = self.start
        closing: dict[int, int] = {}  # line with an extra quote → the line without it
        while start < len(self.lines):
            reader = self._reader(start, self.delimiter, strict=True)
            begun = 0
            try:
                for cells in reader:
                    first, last = start + begun, start + reader.line_num - 1
                    swallowed = next((line for line in range(first + 1, last + 1) if is_row(line)), None)
                    if swallowed is not None:
                        closing[last] = first
                        why = f"a quote that opens here is not closed before line {swallowed + 1}; close it"
                        yield first + 1, [], why
                        start = first + 1
                        break
                    if cells:
                        lacks = closing.get(first)
                        odd = lacks is not None and self.lines[first].count('"') % 2 == 1
                        fault = f"a quote that nothing opens; line {(lacks or 0) + 1} lacks one" if odd else None
                        yield first + 1, cells, fault
                    begun = reader.line_num
                else:
                    return
            except csv.Error as error:
                yield start + begun + 1, [], f"not CSV: {error}"
                start += begun + 1


def is_image_name(cell: str) -> bool:
    """Whether a cell is the name of an image, with or without Flickr's number."""
    name = re.sub(r"#\d+$", "", cell.strip())
    return suffix(name) in IMAGES and "\n" not in name


def to_python(array: Any) -> list[Any]:
    """An Arrow array as Python values; invalid UTF-8 becomes lone surrogates."""

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except UnicodeDecodeError:
            if is_text(scalar.type):
                return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
            return [value(entry) for entry in scalar.values]

    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [value(scalar) for scalar in array]


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is a text."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_texts(kind: Any) -> bool:
    """Whether an Arrow type is a list of texts."""
    import pyarrow as pa

    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return listed and is_text(kind.value_type)


Record = dict[str, Any] | str  # or why it is unusable


def _json_table(records: Callable[[], Iterable[tuple[int, Record]]], empty: str, is_coco: bool = False) -> Table:
    """A table of what `records` gives, (number, record); `empty` is the error if there are none."""
    known = islice((record for _, record in records() if isinstance(record, dict)), _ROWS_FOR_COLUMNS)
    found = list(dict.fromkeys(key for record in known for key in record))
    if not found:
        raise ValueError(empty)

    def read(columns: Sequence[str]) -> Iterator[Row]:
        for number, record in records():
            if isinstance(record, dict):
                yield Row(number, {name: record[name] for name in columns if name in record})
            else:
                yield Row(number, {}, record)

    return Table(found, read, is_coco)


def _json_lines(text: str) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
        else:
            yield number, record if isinstance(record, dict) else "not a JSON object"


def _open_json(text: str) -> Table:
    """A JSON file, one of:

    - COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; without "images", and in
      COCO results, the id is the file name
    - a list of objects, or an object with one such list: Karpathy's {"images": [{"filename", "sentences": [{"raw"}]}]}
    - captions by file name: texts, lists of texts, or kohya's {"caption", "tags"}; tags count if there is no caption
    - JSON lines

    Raises:
        ValueError: with the reason, if it is none of these.
    """

    def joined(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # values under a repeated key become one list
        plain = dict(pairs)
        if len(plain) == len(pairs):
            return plain
        several: dict[str, list[Any]] = {}
        for key, value in pairs:
            several.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        return {key: value if len(value) > 1 else value[0] for key, value in several.items()}

    records: list[Record]
    is_coco = False
    try:
        value = json.loads(text, object_pairs_hook=joined)
    except (ValueError, RecursionError) as error:
        records = [record for _, record in _json_lines(text)]
        if not any(isinstance(record, dict) and record for record in records):
            raise ValueError(f"not JSON: {error}") from error
    else:
        parts = value if isinstance(value, dict) else {}
        lists = {key: entry for key, entry in parts.items() if isinstance(entry, list)}
        images, annotations = lists.get("images", []), lists.get("annotations", [])
        entries = [entry for entry in annotations if isinstance(entry, dict)]
        is_coco = any({"image_id", "caption"} <= entry.keys() for entry in entries)
        if is_coco:
            names: dict[Any, Any] = {}
            for image in images:
                if isinstance(image, dict) and isinstance(image.get("id"), int | str):
                    key = match_column(image, FILE_NAMES)
                    names[image["id"]] = image[key] if key else _numbered(image["id"])
            records = []
            for entry in annotations:
                if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
                    records.append("no image_id")
                elif names and entry["image_id"] not in names:
                    records.append(f"image_id {entry['image_id']} is not among its images")
                else:
                    name = names.get(entry["image_id"], _numbered(entry["image_id"]))
                    records.append({"file_name": name, "caption": entry.get("caption")})
        elif (
            _is_list_of_named(images)
            and any("image_id" in entry for entry in entries)
            and not any(isinstance(image, dict) and match_column(image, CAPTION_NAMES) is not None for image in images)
        ):  # boxes or keypoints
            raise ValueError("its annotations have no captions")
        else:
            records = list(_records(value))
    return _json_table(lambda: enumerate(records, start=1), "no list or object of captions", is_coco)


def _numbered(number: int | str) -> str:
    return f"{number:012d}" if isinstance(number, int) else number


def _records(value: Any) -> Iterator[Record]:
    if isinstance(value, dict):
        lists = [entries for entries in value.values() if _is_list_of_named(entries)]
        if len(lists) > 1:  # such as images with captions, and boxes
            lists = [entries for entries in lists if match_column(entries[0], CAPTION_NAMES) is not None]
        if len(lists) != 1:
            for name, entry in value.items():
                yield {"file_name": name, **(_with_tags(entry) if isinstance(entry, dict) else {"caption": entry})}
            return
        (value,) = lists
    if not isinstance(value, list):
        return
    for entry in value:
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            yield {"file_name": entry[0], "caption": entry[1]}
        elif not isinstance(entry, dict):
            yield "not a JSON object"
        else:
            if match_column(entry, FILE_NAMES) is None and isinstance(entry.get("image_id"), int | str):
                entry = {"file_name": _numbered(entry["image_id"]), **entry}
            if isinstance(entry.get("sentences"), list) and match_column(entry, CAPTION_NAMES) is None:
                texts = [text.get("raw") if isinstance(text, dict) else text for text in entry["sentences"]]
                entry = {**entry, "caption": texts}
            yield _with_tags(entry)


def _is_list_of_named(entries: Any) -> bool:
    if not (isinstance(entries, list) and entries and isinstance(entries[0], dict)):
        return False
    return match_column(entries[0], FILE_NAMES) is not None or "image_id" in entries[0]


def _with_tags(entry: dict[str, Any]) -> dict[str, Any]:
    """kohya's tags become the caption if there is none."""
    tags = entry.get("tags")
    if tags is None or match_column(entry, CAPTION_NAMES) is not None:
        return entry
    return {**entry, "caption": ", ".join(map(str, tags)) if isinstance(tags, list) else tags}
