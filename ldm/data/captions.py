"""Captions: text files, JSON, table cells, names of folders; and files that look like captions and are not read."""

from __future__ import annotations

import ast
import codecs
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data.images import CAPTION_FILES, DOCUMENTS, IMAGES, FolderFiles, last_part, nfc, parent_prefix, stem, suffix
from ldm.data.sources import CaptionSource, Decode
from ldm.progress import printable

# In order of preference; case is ignored, "-" and " " count as "_".
ENGLISH = "en"
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "title")
TABLE_CAPTION_NAMES = (*CAPTION_NAMES, "comment")  # for tables that name image files; Flickr30k has "comment"
FILE_NAMES = (
    *("file_name", "filename", "file", "image_file_name", "image_file", "image_path", "img_path", "image_name"),
    *("image", "img", "file_path", "filepath", "path"),
)
MAX_TEXT_BYTES = 2**20
_BOX = re.compile(r"\d+( [01]?\.\d+(e-?\d+)?){4,}")  # YOLO: a class number, and a box or a polygon
_KINDS: dict[type, str] = {bool: "a truth value", int: "a number", float: "a number", dict: "an object", list: "a list"}
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def caption(text: object) -> str:
    """A caption without surrounding white space. Raises ValueError, with the reason, if it is not a non-empty text."""
    if text is None or text != text:  # pandas writes a missing one as NaN
        raise ValueError("no caption")
    if not isinstance(text, str):
        raise ValueError(f"the caption is not a text but {_KINDS.get(type(text), type(text).__name__)}")
    text = text.strip()
    if not any(character.isprintable() for character in text):  # str.strip keeps zero-width characters
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
    """Bytes → text, in UTF-8 or the encoding of the byte order mark. Raises ValueError with the reason."""
    name = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(name, errors if name.startswith("utf-8") else "strict")  # those are not repaired
    except UnicodeDecodeError as error:
        raise ValueError(f"not {name.upper().removesuffix('-SIG')} text") from error


# "de.utf8=Ein Hund", as Tux Paint has it, or "pt_BR=Um cachorro": without ".utf8" only two letters are a language.
_KEYED = re.compile(
    r"(?=[a-z]{2}([\s=_-]|$)|[^=]*\.utf-?8)"
    r"(?P<language>[a-z]{2,3}([_-][a-z]{2,4})?(@\w+)?)(?P<encoding>\.utf-?8)?\s*=\s*(?P<text>.*)",
    re.IGNORECASE,
)


def in_language(lines: Sequence[str], options: ReadOptions) -> list[str]:
    """The lines in the language of the options (`data.caption_language`); lines without a key are taken as English.

    None takes English, or all lines if there are none; lines of a file that do not look keyed are returned as they are.
    `options.languages` counts the lines by language.
    """
    found = [(_KEYED.fullmatch(line), line) for line in lines]
    keyed = [match for match, _ in found if match]
    if len(keyed) < 2 and not any(match["encoding"] for match in keyed):
        return list(lines)
    by_language: dict[str, list[str]] = {}
    for match, line in found:
        language = match["language"].replace("-", "_") if match else ENGLISH
        by_language.setdefault(language, []).append(match["text"].strip() if match else line)
    options.languages.update({language: len(texts) for language, texts in by_language.items()})
    if options.language is None:
        return by_language.get(ENGLISH) or [text for texts in by_language.values() for text in texts]
    wanted = options.language.replace("-", "_")
    chosen = by_language.get(wanted) or [
        text for language, texts in by_language.items() if language.split("_")[0] == wanted for text in texts
    ]
    if not chosen:
        raise ValueError(f"without a caption in {options.language}, the data.caption_language")
    return chosen


def sidecar_captions(
    paths: Sequence[str], read: Callable[[str], bytes], options: ReadOptions
) -> tuple[list[str], list[tuple[str, str]]]:
    """Files beside one image → (captions, [(path, reason)]).

    JSON files are used only if there are no text files: their key `options.caption`, or a usual one if that is None.
    Files that are not about captions give neither.
    """
    column = options.caption
    texts = [path for path in paths if path.lower().endswith(CAPTION_FILES)]
    good: list[str] = []
    faults: list[tuple[str, str]] = []
    for path in texts or paths:
        name = printable(last_part(path))
        try:
            data = read(path)
            if len(data) > MAX_TEXT_BYTES:
                size, most = f"{len(data) / 2**20:.1f} MiB", f"{MAX_TEXT_BYTES >> 20} MiB"
                raise ValueError(f"longer than {most} ({size}), the most that a caption file may have")
            text = decode_text(data)
            if texts:
                if "\0" in text:  # ASCII as UTF-16 without a mark is valid UTF-8 with NULs
                    raise ValueError("not UTF-8 text")
                lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
                lines = [line for line in lines if any(map(str.isprintable, line))]
                if not lines:
                    raise ValueError("empty caption")
                good += [] if all(map(_BOX.fullmatch, lines)) else in_language(lines, options)
                continue
            record = json.loads(text)
        except OSError as error:
            faults.append((path, f"{name} cannot be read: {error.strerror}"))
        except (ValueError, RecursionError) as error:
            reason = str(error) if texts else f"not JSON that holds a caption: {error}"
            faults.append((path, reason if reason == "empty caption" else f"{name} is {reason}"))
        else:
            names = record if isinstance(record, dict) else {}
            usual = match_column(names, CAPTION_NAMES) if column is None else column
            if usual in names:
                found, reasons = captions(names[usual])
                good += found
                faults += [(path, reason) for reason in reasons]
    return good, faults


def match_column(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """The column with the first of `names` that there is, or None."""
    found = {re.sub(r"[\s-]+", "_", column.strip()).casefold(): column for column in reversed(list(columns))}
    return next((found[name] for name in names if name in found), None)


@dataclass(frozen=True)
class ReadOptions:
    """The columns that the data config names, of images or their files and of captions (None finds them), what decodes
    the images, and whether those without a caption are left out.
    """

    image: str | None
    caption: str | None
    decode: Decode
    captioned: bool
    language: str | None = None  # `data.caption_language`
    languages: Counter[str] = field(default_factory=Counter)  # lines of captions by language, where they have a key


def choose_column(
    where: str, columns: list[str], possible: list[str], names: tuple[str, ...], what: str, given: str | None
) -> str:
    """The `given` column, else the one with the first of the usual `names`, else the only `possible` one.

    Args:
        where, what: for messages: the name of the table, and "image" or "caption".
        columns, possible: all columns, and those of a suitable type.

    Raises:
        ValueError: listing the columns.
    """
    listed = ", ".join([*(printable(column)[:60] for column in columns[:30]), *(["…"] if len(columns) > 30 else [])])
    if given is not None:
        if given not in columns:
            raise ValueError(f'data.{what}_column is "{given}", but {where} has no such column; it has {listed}')
        return given
    found = match_column(possible, names)
    if found is not None:
        return found
    if len(possible) == 1:
        return possible[0]
    raise ValueError(
        f"{where}: which column holds the {what}s cannot be told from the columns {listed}; set data.{what}_column"
    )


# ---- files that look like captions and are not read

_SHEETS = (".xlsx", ".ods", ".xlsm")
# Suffixes of files that may hold captions.
_CANDIDATES = frozenset(
    (
        *(".txt", ".caption", ".captions", ".cap", ".token", ".tags", ".prompt", ".text", ".lst", ".rtf", ".md"),
        *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".dat", ""),
        *(".parquet", ".arrow", ".feather", ".xls", ".sqlite", ".sqlite3", ".db", *_SHEETS),
    )
)
_ENDS = "|".join(re.escape(end[1:]) for end in sorted(IMAGES, key=len, reverse=True))
# File names of images. These patterns begin at a word or cell and have a limited length, so that they stay fast on
# texts without line ends.
_IMAGE_NAME = re.compile(rf"(?<![^\s\"'|,;:<>\\/])[^\s\"'|,;:<>\\/]{{1,255}}\.(?:{_ENDS})(?![a-z0-9])", re.IGNORECASE)
# The whole cell with a file name.
_CELL = re.compile(rf"(?<![^\t,;|\"<>\n])[^\t,;|\"<>\n]{{0,999}}\.(?:{_ENDS})(?:#\d+)?(?![a-z0-9])", re.IGNORECASE)
_WORDS = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,},? +[^\W\d_]{2}")  # or tags
_MAX_BYTES = 2**24  # read of each file
_MAX_FILES = 20  # read of files that are named after images


def find_unread_captions(
    found: FolderFiles, read: Collection[str], reasons: Mapping[str, str], captioned: Collection[str]
) -> list[CaptionSource]:
    """Unread files that name images of the folder, or are named after them.

    Args:
        read: the files of the sources of captions.
        reasons: why readable tables are not used.
        captioned: the images that have captions.
    """
    folded = {owner.casefold() for owner in found.image_stems}
    by_stem: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for path in found.images:
        name = last_part(nfc(path))
        for owner in (name, stem(name)):
            by_stem.setdefault(owner.casefold(), set()).add(path)
        for word in _image_names(name)[-1:]:
            by_name.setdefault(word, set()).add(path)
    named_after: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (folder, suffix) → (file, its image)
    sources: list[CaptionSource] = []

    def add(name: str, images: set[str], text: str, reason: str) -> None:
        lines = (_CELL.sub("", line) for line in text.splitlines() if _CELL.search(line))
        # A list of files is no source of captions: there are words besides names of images.
        has_words = suffix(name) in _SHEETS or _WORDS.search(_CELL.sub("", text)) is not None
        if not has_words and suffix(name) not in (".xml", ".json"):
            has_words = any(re.search(r"[^\W\d_]{2,}", line) for line in lines)
        sources.append(CaptionSource(name, len(images), len(images.difference(captioned)), reason, has_words))

    for path in found.files:
        kind = suffix(path)
        if path in read or kind not in _CANDIDATES or last_part(path).lower().startswith(DOCUMENTS):
            continue
        if kind in CAPTION_FILES and nfc(stem(path)).casefold() in folded:
            continue  # sidecars
        bare = stem(last_part(nfc(path))).casefold()
        key = parent_prefix(path), kind
        if kind and bare in by_stem:
            named_after.setdefault(key, []).append((path, bare))
            continue
        text = _text(found.root / path)
        images = {image for name in _image_names(nfc(text)) for image in by_name.get(name, ())}
        advice = f"{kind} of this kind" if kind else "a file without a suffix"
        advice += " is not read; save it as CSV with the columns file_name and text"
        # "1_caption" and "caption-1" are of image 1.
        owners = (re.sub(r"[._ -]+[^\W\d_]+$", "", bare), re.sub(r"^[^\W\d_]+[._ -]+", "", bare))
        if not text and kind in _SHEETS:
            add(path, set(), "", f"it cannot be opened; {advice}")
        elif images or (path in reasons and _IMAGE_NAME.search(text)):  # of images that were moved
            add(path, images, text, reasons.get(path, advice))
        elif kind and (image := next((one for one in owners if one in by_stem), None)) is not None:
            named_after.setdefault(key, []).append((path, image))
    for (folder, kind), named in named_after.items():
        images = {image for _, owner in named for image in by_stem[owner]}
        paths = [path for path, _ in named]
        text = "\n".join(_text(found.root / path) for path in paths[:_MAX_FILES])
        is_beside = all(nfc(stem(path)) in found.image_stems for path in paths)
        reason = f"{kind} beside images is not read" if is_beside else "named after images in other folders"
        if any(stem(last_part(nfc(path))).casefold() != owner for path, owner in named):
            reason = f"its name is longer than that of the image; rename it, such as a{kind} of a.png"
        if kind == ".json" and is_beside:
            reason = "no caption under a usual name; set data.caption_column"
        add(paths[0] if len(paths) == 1 else f"{folder}*{kind}", images, text, reason)
    return sources


def _image_names(text: str) -> list[str]:
    """The names of images in a text, in lower case, without opening brackets."""
    return [word.lstrip("([{=&").casefold() for word in _IMAGE_NAME.findall(text)]


def _text(path: Path) -> str:
    """The readable text of a file of any format; most store file names as plain letters."""
    try:
        if path.suffix.lower() in _SHEETS:
            data = b""
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    content = last_part(name) in ("sharedStrings.xml", "content.xml")
                    if content or name.startswith("xl/worksheets/sheet"):
                        with archive.open(name) as part:
                            data += part.read(_MAX_BYTES - len(data))
            return data.decode("utf-8", "replace")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return decode_text(data[: len(data) // 4 * 4], "surrogateescape")
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return ""
    return data.replace(b"\0", b"").decode("utf-8", "replace")  # UTF-16 without a mark has a NUL beside each letter
