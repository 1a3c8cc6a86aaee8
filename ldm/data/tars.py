"""Webdataset shards: tar files of images and captions."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ldm.data.captions import MAX_TEXT_BYTES, printable, sidecar_captions
from ldm.data.file_types import CAPTION_FILES, IMAGES, nfc, unsupported_reason
from ldm.data.images import decode
from ldm.data.sources import DataConfig, Sample, Skipped

_KNOWN = IMAGES | {*CAPTION_FILES, ".json"}
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".xlsx"})


def list_tar(path: Path, name: str, config: DataConfig, captioned: bool = True) -> tuple[list[Sample], list[Skipped]]:
    """The samples of one shard: images with the .txt, .caption or .json of the same key.

    The key is the path up to the first dot of its last part, as in webdataset, or up to the last dot if the rest is no
    known suffix. Members of one key need not be neighbors. Only headers and captions are read; images are later read
    by their offset, so no file stays open.

    Args:
        name: of the shard, the prefix of ids: "00000.tar/000000012.jpg".
        captioned: leave out images without a caption.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    lost: set[str] = set()  # keys of skipped images
    with open(path, "rb") as file:
        for member in _members(file, name, skipped):
            _sort_member(member, name, os.fstat(file.fileno()).st_size, groups, lost, skipped)
        _join_spellings(groups)
        for key, members in groups.items():
            if key not in lost or any(kind in IMAGES for kind in members):
                _list_group(file, path, f"{name}/{key}", members, config, samples, skipped, captioned)
    return samples, skipped


def _join_spellings(groups: dict[str, dict[str, tarfile.TarInfo]]) -> None:
    """Joins captions and images whose keys differ in the Unicode normal form only."""
    bare = {nfc(key): key for key, members in groups.items() if IMAGES.issuperset(members)}
    for key, members in list(groups.items()):
        image = bare.get(nfc(key))
        if image is not None and image != key and IMAGES.isdisjoint(members):
            groups[image] |= groups.pop(key)


def _members(file: BinaryIO, name: str, skipped: list[Skipped]) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        # "r:" rejects compression, which has no random access.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isdir():
                    count += 1
                    yield member
    # Broken headers raise many types.
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        cause = f"cut off or broken after {count} members" if count else "not an uncompressed tar file"
        skipped.append(Skipped(name, f"{cause}: {error}"))
        return
    if not count:
        skipped.append(Skipped(name, "no files in it"))


def _sort_member(
    member: tarfile.TarInfo,
    name: str,
    size: int,
    groups: dict[str, dict[str, tarfile.TarInfo]],
    lost: set[str],
    skipped: list[Skipped],
) -> None:
    path = member.name.removeprefix("./")
    base = PurePosixPath(path).name
    if any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts):
        return
    key, kind = _key(path)
    fault = unsupported_reason(base)
    if fault is None and kind in _TABLES:
        fault = "a table within a tar, which is not read; unpack the tar, or give each image a .txt with its caption"
    if fault is None and kind not in _KNOWN:
        return
    if fault is None and (not member.isfile() or member.issparse()):
        fault = "a link or a sparse file within the tar; pack it as a plain file"
    if fault is None and member.offset_data + member.size > size:
        fault = "cut off at the end of the tar"
    if fault is not None:
        skipped.append(Skipped(f"{name}/{path}", fault))
        if kind not in (*CAPTION_FILES, ".json", *_TABLES):
            lost.add(key)
    else:
        before = groups.setdefault(key, {}).get(kind)
        if before is not None:
            skipped.append(Skipped(f"{name}/{path}", "twice in the tar; the last one is used"))
        groups[key][kind] = member


def _key(path: str) -> tuple[str, str]:
    folder, slash, base = path.rpartition("/")
    first, dot, rest = base.partition(".")
    if f".{rest.lower()}" not in _KNOWN:
        first, dot, rest = base.rpartition(".")
    return f"{folder}{slash}{first}", f"{dot}{rest.lower()}"


def _list_group(
    file: BinaryIO,
    path: Path,
    key: str,
    members: dict[str, tarfile.TarInfo],
    config: DataConfig,
    samples: list[Sample],
    skipped: list[Skipped],
    captioned: bool,
) -> None:
    images = [kind for kind in members if kind in IMAGES]
    if not images:
        if any(kind in CAPTION_FILES for kind in members):
            skipped.append(Skipped(key, "a caption without an image"))
        return

    def read_sidecar(kind: str) -> bytes:
        file.seek(members[kind].offset_data)
        # One byte more than allowed, so that the size is checked.
        return file.read(min(members[kind].size, MAX_TEXT_BYTES + 1))

    sidecars = [kind for kind in (*CAPTION_FILES, ".json") if kind in members]
    captions, faults = sidecar_captions(sidecars, read_sidecar, config.caption_column)
    for kind in images:
        if not captions and captioned:
            skipped.append(Skipped(key + kind, faults[0][1] if faults else "no caption"))
            continue
        member = members[kind]
        read = partial(read_span, str(path), member.offset_data, member.size)
        decoder = partial(decode, background=config.background_rgb)
        samples.append(Sample(key + kind, tuple(dict.fromkeys(captions)), key, read, decoder))
    if captions:
        skipped += [Skipped(key, f"{reason}; its other captions count") for _, reason in faults]


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises OSError if there are fewer."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{printable(path)} ends before byte {offset + size}")
    return data
