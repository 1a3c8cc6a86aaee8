"""Reading captions: text files, JSON, table cells, and names of folders."""

from __future__ import annotations

import ast
import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence

from ldm.data.file_types import CAPTION_FILES

# In order of preference; case is ignored, "-" and " " count as "_".
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "title")
# For tables that name image files; Flickr30k has "comment".
TABLE_CAPTION_NAMES = (*CAPTION_NAMES, "comment")
FILE_NAMES = (
    *("file_name", "filename", "file", "image_file_name", "image_file", "image_path", "img_path", "image_name"),
    *("image", "img", "file_path", "filepath", "path"),
)

MAX_TEXT_BYTES = 2**20

# YOLO: a class number, and a box or a polygon.
_BOX = re.compile(r"\d+( [01]?\.\d+(e-?\d+)?){4,}")

_KINDS: dict[type, str] = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bytes: "bytes",
}

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def printable(text: str) -> str:
    """A text as one printable line; other characters are escaped as in Python."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def caption(text: object) -> str:
    """A caption without surrounding white space.

    Raises:
        ValueError: with the reason, if it is not a non-empty text.
    """
    if text is None or text != text:  # pandas writes a missing one as NaN
        raise ValueError("no caption")
    if not isinstance(text, str):
        raise ValueError(f"the caption is not a text but {_KINDS.get(type(text), type(text).__name__)}")
    text = text.strip()
    # str.strip keeps zero-width characters.
    if not any(character.isprintable() for character in text):
        raise ValueError("empty caption")
    # Undecodable bytes (surrogateescape), or half of a surrogate pair in JSON; no tokenizer accepts them.
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise ValueError("the caption is not UTF-8 text; save the file as UTF-8")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the caption is not valid Unicode (a lone surrogate)")
    if "\0" in text:
        raise ValueError("the caption holds NUL characters")
    return text


def captions(value: object) -> tuple[list[str], list[str]]:
    """A cell, a text or a list of texts → (captions, reasons why others are unusable)."""
    if not isinstance(value, list):
        value = [value]
    if not value:
        return [], ["no caption"]
    good, reasons = [], []
    for position, entry in enumerate(value, start=1):
        try:
            good.append(caption(entry))
        except ValueError as error:
            reasons.append(f"{error} (caption {position} of {len(value)})" if len(value) > 1 else str(error))
    return good, reasons


def parse_list(cell: object) -> object:
    """A cell that spells a list of texts, in JSON or Python → the list; other cells are returned unchanged."""
    if not (isinstance(cell, str) and re.match(r"\s*\[\s*['\"]", cell) and cell.rstrip().endswith("]")):
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
    return cell


def decode_text(data: bytes, errors: str = "strict") -> str:
    """Bytes → text, in UTF-8 or the encoding of the byte order mark.

    Raises:
        ValueError: with the reason.
    """
    name = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        # Errors in UTF-16 and UTF-32 are not repaired.
        return data.decode(name, errors if name.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"not {name.upper().removesuffix('-SIG')} text") from error


def caption_lines(data: bytes) -> list[str]:
    """The non-empty lines of a caption file.

    Raises:
        KeyError: if all lines are YOLO boxes.
        ValueError: with the reason as a predicate ("is not UTF-8 text"), or "empty caption".
    """
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"holds {len(data) / 2**20:.1f} MiB; a caption file has at most {MAX_TEXT_BYTES >> 20} MiB")
    try:
        text = decode_text(data)
    except ValueError as error:
        raise ValueError(f"is {error}") from error
    # ASCII as UTF-16 without a mark is valid UTF-8 with NULs.
    if "\0" in text:
        raise ValueError("is not UTF-8 text")
    lines = []
    for line in re.split(r"[\r\n]+", text):
        try:
            lines.append(caption(line))
        except ValueError:
            continue  # an empty line: UTF-8 has no surrogates
    if not lines:
        raise ValueError("empty caption")
    if all(map(_BOX.fullmatch, lines)):
        raise KeyError("boxes, which are no captions")
    return lines


def json_captions(data: bytes, column: str | None) -> tuple[list[str], list[str]]:
    """A JSON object → (captions, reasons), from its key `column`, or a usual one if that is None.

    Raises:
        KeyError: if it has no such key, or is not an object.
        ValueError: with the reason as a predicate, if it is not JSON.
    """
    try:
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"{len(data) / 2**20:.1f} MiB are more than a caption needs")
        record = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON that holds a caption: {error}") from error
    if not isinstance(record, dict):
        raise KeyError("text")
    key = column if column is not None else match_column(record, CAPTION_NAMES)
    if key is None or key not in record:
        raise KeyError(column or "text")
    return captions(record[key])


def sidecar_captions(
    paths: Sequence[str], read: Callable[[str], bytes], column: str | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """Files beside one image → (captions, [(path, reason)]). JSON files are used only if there are no text files."""
    texts = [path for path in paths if path.lower().endswith(CAPTION_FILES)]
    good: list[str] = []
    faults: list[tuple[str, str]] = []
    for path in texts or paths:
        name = printable(path[path.rfind("/") + 1 :])
        try:
            data = read(path)
            found, reasons = (caption_lines(data), []) if texts else json_captions(data, column)
        except KeyError:
            continue  # no captions, such as bounding boxes
        except OSError as error:
            faults.append((path, f"{name} cannot be read: {error.strerror}"))
        except ValueError as error:
            faults.append((path, str(error) if str(error) == "empty caption" else f"{name} {error}"))
        else:
            good += found
            faults += [(path, reason) for reason in reasons]
    return good, faults


def class_caption(folder: str) -> str:
    """The name of a folder as a caption: "10_golden-retriever" → "golden retriever".

    Raises:
        ValueError: if no words are left.
    """
    name = re.sub(r"^\d+_(?=.)", "", folder)  # kohya's number of repeats
    words = " ".join(re.split(r"[_\-\s]+", name)).strip()
    return caption(words)


def match_column(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """The column with the first of `names` that there is, or None."""
    found = {re.sub(r"[\s-]+", "_", column.strip()).casefold(): column for column in reversed(list(columns))}
    return next((found[name] for name in names if name in found), None)


def choose_column(
    where: str, columns: list[str], possible: list[str], names: tuple[str, ...], key: str, given: str | None
) -> str:
    """The column that the config gives, else the one with the first of `names`, else the only possible one.

    Args:
        where: name of the table, for messages.
        columns, possible: all columns, and those of a suitable type.
        names: usual names, in order of preference.
        key, given: "image_column" or "caption_column", and its value in the config.

    Raises:
        ValueError: listing the columns.
    """
    listed = ", ".join([*(printable(column)[:60] for column in columns[:30]), *(["…"] if len(columns) > 30 else [])])
    if given is not None:
        if given not in columns:
            raise ValueError(f'data.{key} is "{given}", but {where} has no such column; it has {listed}')
        return given
    found = match_column(possible, names)
    if found is not None:
        return found
    if len(possible) == 1:
        return possible[0]
    what = "image" if key == "image_column" else "caption"
    raise ValueError(
        f"{where}: which column holds the {what}s cannot be told from the columns {listed}; set data.{key}"
    )
