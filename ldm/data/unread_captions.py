"""Files in a folder that look like captions and are not read: they are reported."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from ldm.data.captions import decode_text
from ldm.data.file_types import CAPTION_FILES, DOCUMENTS, IMAGES, nfc, parent_prefix, stem, suffix
from ldm.data.folder import FolderFiles
from ldm.data.sources import CaptionSource

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
_NAME = re.compile(rf"(?<![^\s\"'|,;:<>\\/])[^\s\"'|,;:<>\\/]{{1,255}}\.(?:{_ENDS})(?![a-z0-9])", re.IGNORECASE)
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
        name = _last(nfc(path))
        for owner in (name, stem(name)):
            by_stem.setdefault(owner.casefold(), set()).add(path)
        for word in _image_names(name)[-1:]:
            by_name.setdefault(word, set()).add(path)
    named_after: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (folder, suffix) → (file, its image)
    sources: list[CaptionSource] = []
    for path in found.files:
        if path in read or suffix(path) not in _CANDIDATES or _last(path).lower().startswith(DOCUMENTS):
            continue
        if nfc(stem(path)).casefold() in folded and suffix(path) in CAPTION_FILES:
            continue  # sidecars
        bare = stem(_last(nfc(path))).casefold()
        if suffix(path) and bare in by_stem:
            named_after.setdefault((parent_prefix(path), suffix(path)), []).append((path, bare))
            continue
        text = _text(found.root / path)
        images = {image for name in _image_names(nfc(text)) for image in by_name.get(name, ())}
        if not text and suffix(path) in _SHEETS:
            sources.append(CaptionSource(path, 0, reason=f"it cannot be opened; {_advice(path)}", doubtful=True))
        # A table may also name images that were moved or renamed.
        elif images or (path in reasons and _NAME.search(text)):
            sources.append(_source(path, images, captioned, text, reasons.get(path, _advice(path))))
        elif suffix(path) and (image := _image_part(bare, by_stem)) is not None:
            named_after.setdefault((parent_prefix(path), suffix(path)), []).append((path, image))
    for (folder, kind), named in named_after.items():
        images = {image for _, owner in named for image in by_stem[owner]}
        paths = [path for path, _ in named]
        text = "\n".join(_text(found.root / path) for path in paths[:_MAX_FILES])
        name = paths[0] if len(paths) == 1 else f"{folder}*{kind}"
        beside = all(nfc(stem(path)) in found.image_stems for path in paths)
        reason = f"{kind} beside images is not read" if beside else "named after images that it does not lie beside"
        if any(stem(_last(nfc(path))).casefold() != owner for path, owner in named):
            reason = f"its name is longer than that of the image; rename it, such as a{kind} of a.png"
        if kind == ".json" and beside:
            reason = "no caption under a usual name; set data.caption_column"
        sources.append(_source(name, images, captioned, text, reason))
    return sources


def _image_part(name: str, by_stem: Mapping[str, object]) -> str | None:
    """The image in a name such as "1_caption" or "caption-1"; None for other names."""
    parts = (re.sub(r"[._ -]+[^\W\d_]+$", "", name), re.sub(r"^[^\W\d_]+[._ -]+", "", name))
    return next((part for part in parts if part in by_stem), None)


def _image_names(text: str) -> list[str]:
    """The names of images in a text, in lower case, without opening brackets."""
    return [word.lstrip("([{=&").casefold() for word in _NAME.findall(text)]


def _source(name: str, images: set[str], captioned: Collection[str], text: str, reason: str) -> CaptionSource:
    return CaptionSource(name, len(images), len(images.difference(captioned)), reason, _has_words(name, text))


def _has_words(path: str, text: str) -> bool:
    """Whether a text has words besides names of images; a list of files is no source of captions."""
    if suffix(path) in _SHEETS:
        return True
    lines = (_CELL.sub("", line) for line in text.splitlines() if _CELL.search(line)) if suffix(path) != ".xml" else ()
    beside_names = suffix(path) != ".json" and any(re.search(r"[^\W\d_]{2,}", line) for line in lines)
    return beside_names or _WORDS.search(_CELL.sub("", text)) is not None


def _advice(path: str) -> str:
    kind = f"{suffix(path)} of this kind" if suffix(path) else "a file without a suffix"
    return f"{kind} is not read; save it as CSV with the columns file_name and text"


def _text(path: Path) -> str:
    """The readable text of a file of any format; most store file names as plain letters."""
    try:
        if path.suffix.lower() in _SHEETS:
            return _sheet_text(path)
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return decode_text(data[: len(data) // 4 * 4], "surrogateescape")
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return ""
    # UTF-16 without a mark has a NUL beside each letter.
    return data.replace(b"\0", b"").decode("utf-8", "replace")


def _sheet_text(path: Path) -> str:
    text = b""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = PurePosixPath(name).name in ("sharedStrings.xml", "content.xml")
            if content or name.startswith("xl/worksheets/sheet"):
                with archive.open(name) as part:
                    text += part.read(_MAX_BYTES - len(text))
    return text.decode("utf-8", "replace")


def _last(path: str) -> str:
    return path[path.rfind("/") + 1 :]
