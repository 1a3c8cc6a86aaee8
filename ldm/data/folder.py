"""A folder of one's own: image files, with captions beside them or in one metadata file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ldm.data.images import SUFFIXES, decode
from ldm.data.sources import Sample, Skipped, Source

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class _Listed:
    """An image that a layout names: its posix path within the folder, its captions, its group."""

    path: str
    captions: tuple[str, ...]
    group: str


def open_folder(folder: Path, background: tuple[int, int, int]) -> Source:
    """Opens a folder of captioned images, in one of two layouts:

    - `metadata.jsonl` in the folder itself: one JSON object a line with `file_name`, a path within the
      folder, and `text`, its caption. Several lines for one file give it several captions.
    - otherwise `a.txt` beside `a.png`, in the folder and all folders below it: UTF-8, one caption. Images
      that share a caption file share a group.

    With both, metadata.jsonl counts alone. Hidden files and folders (`.name`) are passed over, links to
    folders are not followed. Every captioned image is decoded once, here, so that whatever cannot be trained
    on is named now.

    Raises:
        ValueError: if not one captioned image can be read.
    """
    files = _files(folder)
    images = [path for path in files if Path(path).suffix.lower() in SUFFIXES]
    read = _read_metadata if METADATA in files else _read_text_files
    listed, skipped = read(folder, files, images)
    captioned = {entry.path for entry in listed} | {entry.path for entry in skipped}
    skipped += [Skipped(path, "no caption") for path in images if path not in captioned]
    if not listed:
        raise ValueError(_no_captions(folder, read is _read_metadata, skipped))
    # Decoding releases the interpreter lock, so threads use all cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(lambda entry: _fault(folder / entry.path, background), listed))
    samples = tuple(
        Sample(
            entry.path,
            entry.captions,
            entry.group,
            (folder / entry.path).read_bytes,
            partial(decode, background=background),
        )
        for entry, fault in zip(listed, faults, strict=True)
        if fault is None
    )
    unreadable = [Skipped(entry.path, fault) for entry, fault in zip(listed, faults, strict=True) if fault is not None]
    if not samples:
        first = unreadable[0]
        raise ValueError(
            f"none of the {len(listed)} captioned images in {folder} can be read; the first is {first.path}: "
            f"{first.reason}; replace them with images that open elsewhere"
        )
    return Source(str(folder), samples, tuple(sorted(unreadable + skipped, key=lambda entry: entry.path)))


def _no_captions(folder: Path, has_metadata: bool, skipped: list[Skipped]) -> str:
    problems = [entry for entry in skipped if entry.reason != "no caption"]
    cause = f" ({problems[0].path}: {problems[0].reason})" if problems else ""
    if has_metadata:
        way_out = f'give {METADATA} a line {{"file_name": "a.png", "text": "a caption"}} for each image'
    else:
        way_out = f"put a.txt beside each a.png, or one {METADATA} with file_name and text into the folder"
    return f"no captioned image in {folder}{cause}; {way_out}"


def _files(folder: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder)
        found += [(below / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _read_text_files(folder: Path, files: list[str], images: list[str]) -> tuple[list[_Listed], list[Skipped]]:
    texts = {path[: -len(".txt")]: path for path in files if path.lower().endswith(".txt")}
    listed, skipped = [], []
    for image in images:
        stem = image[: -len(Path(image).suffix)]
        if stem not in texts:
            continue
        try:
            caption = _caption((folder / texts[stem]).read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError:
            skipped.append(Skipped(image, f"{texts[stem]} is not UTF-8 text"))
        except ValueError as error:
            skipped.append(Skipped(image, str(error)))
        else:
            listed.append(_Listed(image, (caption,), stem))
    return listed, skipped


def _read_metadata(folder: Path, files: list[str], images: list[str]) -> tuple[list[_Listed], list[Skipped]]:
    captions: dict[str, list[str]] = {}
    skipped = []
    for number, line in _lines(folder / METADATA):
        try:
            path, caption = _metadata_line(line)
            if not os.path.isfile(folder / path):
                raise ValueError(f"there is no file {path}")
        except ValueError as error:
            skipped.append(Skipped(f"{METADATA}:{number}", str(error)))
        else:
            captions.setdefault(path, []).append(caption)
    return [_Listed(path, tuple(dict.fromkeys(texts)), path) for path, texts in sorted(captions.items())], skipped


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _metadata_line(line: bytes) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object with file_name and text")
    for key in ("file_name", "text"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{key} is missing" if key not in record else f"{key} is not a text")
    path = os.path.normpath(record["file_name"])
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise ValueError(f"file_name {record['file_name']} lies outside the folder")
    return Path(path).as_posix(), _caption(record["text"])


def _caption(text: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError("empty caption")
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the caption is not valid Unicode (a lone surrogate)")
    return text


def _fault(path: Path, background: tuple[int, int, int]) -> str | None:
    try:
        decode(path.read_bytes(), background)
    except (OSError, ValueError) as error:
        return str(error)
    return None
