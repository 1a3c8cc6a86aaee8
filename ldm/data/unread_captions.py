"""Files of a folder that look as if they held captions and are not read: they are named, not passed by in silence."""

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
_KINDS = frozenset(
    (
        *(
            ".txt",
            ".caption",
            ".captions",
            ".cap",
            ".token",
            ".tags",
            ".prompt",
            ".text",
            ".lst",
            ".rtf",
            ".md",
            ".dat",
        ),
        *(
            ".json",
            ".jsonl",
            ".ndjson",
            ".csv",
            ".tsv",
            ".xml",
            ".yaml",
            ".yml",
            ".toml",
            ".parquet",
            ".arrow",
            ".feather",
        ),
        *(*_SHEETS, ".xls", ".sqlite", ".sqlite3", ".db", ""),
    )
)
_ENDS = "|".join(re.escape(end[1:]) for end in sorted(IMAGES, key=len, reverse=True))
# What a name of an image can be told by in any text: its last word. Here and below a match begins where a word or a
# cell does, and has the length of a name at most, so that a text without an end takes no more time than others.
_NAME = re.compile(rf"(?<![^\s\"'|,;:<>\\/])[^\s\"'|,;:<>\\/]{{1,255}}\.(?:{_ENDS})(?![a-z0-9])", re.IGNORECASE)
# The cell that a name stands in, which says nothing besides.
_CELL = re.compile(rf"(?<![^\t,;|\"<>\n])[^\t,;|\"<>\n]{{0,999}}\.(?:{_ENDS})(?:#\d+)?(?![a-z0-9])", re.IGNORECASE)
_WORDS = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,},? +[^\W\d_]{2}")  # or tags
_MOST = 2**24  # bytes of a file that are looked at
_LOOKED_AT = 20  # of files that are named after images


def find_unread_captions(
    found: FolderFiles, read: Collection[str], reasons: Mapping[str, str], captioned: Collection[str]
) -> list[CaptionSource]:
    """Files that name images of the folder, or are named after them, and that nothing reads.

    Args:
        read: the files that a source of captions was made of.
        reasons: why files that could be opened as tables are none.
        captioned: the images that have captions.
    """
    images = [path for path in found.files if suffix(path) in IMAGES]
    owners = {nfc(owner) for path in images for owner in (path, stem(path))}
    folded = {owner.casefold() for owner in owners}
    after: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for path in images:
        name = _last(nfc(path))
        for owner in (name, stem(name)):
            after.setdefault(owner.casefold(), set()).add(path)
        for word in _named(name)[-1:]:
            by_name.setdefault(word, set()).add(path)
    named_after: dict[tuple[str, str], list[tuple[str, str]]] = {}  # files, and what they are named after
    sources: list[CaptionSource] = []
    for path in found.files:
        if path in read or suffix(path) not in _KINDS or _last(path).lower().startswith(DOCUMENTS):
            continue
        if nfc(stem(path)).casefold() in folded and suffix(path) in CAPTION_FILES:
            continue  # captions beside images are a source, and named there if they are none
        bare = stem(_last(nfc(path))).casefold()
        if suffix(path) and bare in after:
            named_after.setdefault((parent_prefix(path), suffix(path)), []).append((path, bare))
            continue
        text = _text(found.root / path)
        about = {image for name in _named(nfc(text)) for image in by_name.get(name, ())}
        if not text and suffix(path) in _SHEETS:
            sources.append(CaptionSource(path, 0, reason=f"it cannot be opened; {_advice(path)}", doubtful=True))
        # Names of images that are not there are those of a table whose images were moved or renamed.
        elif about or (path in reasons and _NAME.search(text)):
            sources.append(_source(path, about, captioned, text, reasons.get(path, _advice(path))))
        elif suffix(path) and (part := _part(bare, after)) is not None:
            named_after.setdefault((parent_prefix(path), suffix(path)), []).append((path, part))
    for (folder, kind), named in named_after.items():
        about = {image for _, owner in named for image in after[owner]}
        paths = [path for path, _ in named]
        text = "\n".join(_text(found.root / path) for path in paths[:_LOOKED_AT])
        name = paths[0] if len(paths) == 1 else f"{folder}*{kind}"
        beside = all(nfc(stem(path)) in owners for path in paths)
        reason = f"{kind} beside images is not read" if beside else "named after images that it does not lie beside"
        if any(stem(_last(nfc(path))).casefold() != owner for path, owner in named):
            reason = f"its name has more to it than that of the image; call it like the image, as in a{kind} of a.png"
        if kind == ".json" and beside:
            reason = "no caption under a usual name; set data.caption_column"
        sources.append(_source(name, about, captioned, text, reason))
    return sources


def _part(name: str, after: Mapping[str, object]) -> str | None:
    """The name of an image in one with a word more at an end, such as "1_caption" or "caption-1"; None for others."""
    ways = (re.sub(r"[._ -]+[^\W\d_]+$", "", name), re.sub(r"^[^\W\d_]+[._ -]+", "", name))
    return next((way for way in ways if way in after), None)


def _named(text: str) -> list[str]:
    """The words of a text that end as names of images do, without the brackets and signs that they may stand in."""
    return [word.lstrip("([{=&").casefold() for word in _NAME.findall(text)]


def _source(name: str, about: set[str], captioned: Collection[str], text: str, reason: str) -> CaptionSource:
    return CaptionSource(name, len(about), len(about.difference(captioned)), reason, _says_something(name, text))


def _says_something(path: str, text: str) -> bool:
    """Whether there are words besides names of images: a list of files is no source of captions."""
    if suffix(path) in _SHEETS:
        return True
    lines = (_CELL.sub("", line) for line in text.splitlines() if _CELL.search(line)) if suffix(path) != ".xml" else ()
    beside_names = suffix(path) != ".json" and any(re.search(r"[^\W\d_]{2,}", line) for line in lines)
    return beside_names or _WORDS.search(_CELL.sub("", text)) is not None


def _advice(path: str) -> str:
    kind = f"{suffix(path)} of this kind" if suffix(path) else "a file without a suffix"
    return f"{kind} is not read; save it as CSV with the columns file_name and text"


def _text(path: Path) -> str:
    """What can be read of a file as text; names of files are in plain letters in most formats."""
    try:
        if path.suffix.lower() in _SHEETS:
            return _sheet(path)
        with open(path, "rb") as file:
            data = file.read(_MOST)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return decode_text(data[: len(data) // 4 * 4], "surrogateescape")
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return ""
    # UTF-16 without a mark has a NUL beside each letter.
    return data.replace(b"\0", b"").decode("utf-8", "replace")


def _sheet(path: Path) -> str:
    text = b""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if PurePosixPath(name).name in ("sharedStrings.xml", "content.xml") or name.startswith(
                "xl/worksheets/sheet"
            ):
                with archive.open(name) as part:
                    text += part.read(_MOST - len(text))
    return text.decode("utf-8", "replace")


def _last(path: str) -> str:
    return path[path.rfind("/") + 1 :]
