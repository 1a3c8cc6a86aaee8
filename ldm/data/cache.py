"""Rows of numbers on disk, under keys, in shards that are written once and never changed.

A shard is a safetensors file of `keys` and `rows`, named by the hash of its own bytes. So a damaged one is known by
its name, writers never meet in one file, and no lock is needed: two that write the same row leave two equal copies.

Rows are read with plain reads, not through a memory map. Of 16 KB rows in 100 shards, 128 in random order took 0.48 ms
against 0.25 ms for a map, whose pages count as memory of the process until all data is in it; giving them back after
each batch took 0.6 ms. And where a mapped file is cut short the process dies without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm import disk
from ldm.cores import usable_cores


def _files_allowed() -> int:
    """How many files this process may have open: often 1,024, or 256."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**20 if limit == resource.RLIM_INFINITY else limit


KEY_BYTES = 16
SUFFIX, DAMAGED = ".safetensors", ".damaged"
VERIFIERS = min(8, usable_cores())
# Older than any write takes: what a killed process has left behind.
STALE_SECONDS = 3600
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# 100,000 rows are in 391 shards: a batch of 128 in random order took 2 to 3 ms with 512 files open, 6 with 64.
# A run has two stores, and other files.
OPEN_FILES = min(512, _files_allowed() // 4)
WAY_OUT = "choose another folder with $LDM_CACHE or data.cache_dir"


@dataclass(frozen=True, eq=False)
class _Shard:
    """Where the N rows of one file lie: the first at byte `start`, each of `row_bytes`; `keys` are S16 [N]."""

    path: Path
    keys: np.ndarray
    start: int
    row_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class RowCache:
    """Rows under keys, 32 hexadecimal digits each, in one folder.

    The rows of one `add` have one shape; others may have another. Only what is written is ever created: a folder
    that holds all that is asked for may be read-only.

    Args:
        folder: ends in what the rows have in common, KIND/KEY; a shard from elsewhere is not taken for one of them.
        print: is told of damaged shards.
    """

    def __init__(self, folder: Path, print: Callable[[str], None] = print) -> None:
        self.folder = folder = disk.expanded(folder)
        self._print = print
        self._name = "/".join(folder.parts[-2:])
        self._shards: dict[str, _Shard] = {}
        self._verified: set[str] = set()
        self._refused: set[str] = set()
        self._index: _Index | None = None
        self._files = _Files()

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys that have no row, each key once. Shards that hold the others are verified.

        A damaged shard is named, set aside, and its rows are missing.
        """
        wanted = _packed(keys)
        shards, _ = self._find(wanted)
        absent = np.flatnonzero(shards < 0)
        _, first = np.unique(wanted[absent], return_index=True)
        return [int(position) for position in absent[np.sort(first)]]

    def add(self, keys: Sequence[str], rows: Tensor, to_come: int = 0) -> None:
        """Writes rows [N, …] under N keys as one shard, complete or not at all.

        Args:
            to_come: how many more such rows will be added, which a disk too small for them is told by at once.

        Raises:
            ValueError: if the folder cannot be written, or the disk has no room.
        """
        assert len(keys) == len(rows) > 0, (len(keys), len(rows))
        packed = np.frombuffer(_packed(keys).tobytes(), np.uint8).reshape(-1, KEY_BYTES)
        tensors = {"keys": torch.from_numpy(packed.copy()), "rows": rows.detach().cpu().contiguous()}
        # One entry of metadata only: safetensors writes several in any order.
        content = save(tensors, {"store": self._name})
        path = self.folder / f"{_hash_name(hashlib.sha256(content))}{SUFFIX}"
        self._write(path, content, len(content) + to_come * rows[0].nbytes)
        self._verified.add(path.name)

    def open(self, keys: Sequence[str]) -> CachedRows:
        """The rows of these keys, in their order; keys may repeat.

        Raises:
            ValueError: if some are missing.
        """
        shards, rows = self._find(_packed(keys))
        lost = int((shards < 0).sum())
        if lost:
            raise ValueError(
                f"{lost} of {len(keys)} rows are gone from the cache {self.folder}; start again, to have them made"
            )
        assert self._index is not None
        return CachedRows(self._index.shards, shards, rows, self._files)

    # ---- finding rows

    def _find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) int32 of each key, −1 where there is none; every shard that is named is verified."""
        self._list()
        while True:
            self._index = self._index or _Index.of(list(self._shards.values()))
            shards, rows = self._index.find(wanted)
            named = [self._index.shards[n] for n in np.unique(shards) if n >= 0]
            unverified = [shard for shard in named if shard.path.name not in self._verified]
            # Hashing releases the interpreter lock.
            with ThreadPoolExecutor(VERIFIERS) as pool:
                faults = list(pool.map(_fault, (shard.path for shard in unverified)))
            for shard, fault in zip(unverified, faults, strict=True):
                if fault is None:
                    self._verified.add(shard.path.name)
                else:
                    self._refuse(shard.path, fault)
            if not any(faults):
                return shards, rows

    def _list(self) -> None:
        """Takes note of the shards that have come or gone, by the keys in their headers."""
        try:
            names = {entry.name for entry in os.scandir(self.folder)}
        except OSError:  # not made yet; `add` says what else is wrong with it
            names = set()
        for name in self._shards.keys() - names:
            del self._shards[name]
            self._index = None
        for name in sorted(names - self._shards.keys() - self._refused):
            path = self.folder / name
            if name.endswith(SUFFIX) and not name.startswith("."):
                try:
                    self._shards[name] = _read_header(path, self._name)
                    self._index = None
                # Bytes that are not ours make the parsers raise whatever comes up.
                except Exception as error:
                    self._refuse(path, error)
            elif name.startswith(".") and SUFFIX in name:
                _remove_stale(path)

    def _refuse(self, path: Path, fault: Exception) -> None:
        """Names a shard that cannot be used. A damaged one is set aside; one that only we cannot read stays."""
        self._shards.pop(path.name, None)
        self._refused.add(path.name)
        self._index = None
        if isinstance(fault, FileNotFoundError):  # another process has set it aside
            return
        done = "is passed over"
        if not isinstance(fault, OSError):
            with suppress(OSError):  # a read-only folder, or another process was first
                path.replace(path.with_suffix(DAMAGED))
                done = f"is now {path.stem}{DAMAGED}"
        self._print(f"the cache file {path} {_reason(fault)}; it {done}, and its rows are made again")

    # ---- writing

    def _write(self, path: Path, content: bytes, needed: int) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise ValueError(
                    f"the cache {self.folder} needs {_size(needed)} more and its disk has {_size(free)} left; "
                    f"free some, or {WAY_OUT}"
                )
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            disk.sync(self.folder)
        except OSError as error:
            raise ValueError(
                f"the cache {self.folder} cannot be written: {error.strerror or error} ({_size(needed)} more are "
                f"needed); mend that, or {WAY_OUT}"
            ) from None
        finally:
            with suppress(OSError):  # then it cannot be there either
                temporary.unlink(missing_ok=True)
        self._refused.discard(path.name)


class CachedRows:
    """Rows of a store by position: `rows[indices]` copies them into memory.

    Nothing is kept: memory does not grow with what is read.
    """

    def __init__(self, shards: list[_Shard], shard: np.ndarray, row: np.ndarray, files: _Files) -> None:
        self._shards, self._shard, self._row, self._files = shards, shard, row, files

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Tensor:
        """[N, …] for N ≥ 1 positions, which must have rows of one shape and dtype.

        Raises:
            ValueError: if a file has been cut short or removed since it was verified.
        """
        positions = np.asarray(indices, dtype=np.int64)
        chosen = self._shard[positions]
        first = self._shards[chosen[0]]
        for shard in (self._shards[n] for n in np.unique(chosen)):
            assert (shard.shape, shard.dtype) == (first.shape, first.dtype), (shard.shape, first.shape)
        found = torch.empty((len(positions), *first.shape), dtype=first.dtype)
        places = found.view(len(positions), -1).view(torch.uint8).numpy()  # [N, bytes of a row]
        for place in np.argsort(chosen, kind="stable"):  # shard by shard
            self._read(int(chosen[place]), int(self._row[positions[place]]), places[place])
        return found

    def _read(self, number: int, row: int, place: np.ndarray) -> None:
        shard = self._shards[number]
        try:
            file = self._files.open(shard.path)
            file.seek(shard.start + row * shard.row_bytes)
            count = file.readinto(place.data)
            fault = None if count == shard.row_bytes else "ends early"
        except OSError as error:
            fault = _reason(error)
        if fault is not None:
            raise ValueError(
                f"the cache file {shard.path} was changed during the run: it {fault}; start again, and what is "
                "missing is made again"
            )


class _Files:
    """The files of a store that were read last."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, FileIO] = OrderedDict()
        weakref.finalize(self, _close, self._open)

    def open(self, path: Path) -> FileIO:
        file = self._open.pop(path, None) or FileIO(path)
        self._open[path] = file  # the last one used stands last
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file


@dataclass(frozen=True, eq=False)
class _Index:
    """Keys in order, S16 [N], and for each the shard and its row: 24 bytes a row, all told."""

    shards: list[_Shard]
    keys: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, shards: list[_Shard]) -> _Index:
        counts = [len(shard.keys) for shard in shards]
        keys = np.concatenate([shard.keys for shard in shards]) if shards else np.empty(0, f"S{KEY_BYTES}")
        order = np.argsort(keys, kind="stable")
        shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        row = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.empty(0, np.int32)])
        return cls(shards, keys[order], shard[order], row[order])

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self.keys) == 0:
            return np.full(len(wanted), -1, np.int32), np.zeros(len(wanted), np.int32)
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        there = self.keys[place] == wanted
        return np.where(there, self.shard[place], np.int32(-1)), np.where(there, self.row[place], np.int32(0))


def _packed(keys: Sequence[str]) -> np.ndarray:
    """Hexadecimal digits → S16 [N]. (numpy compares all 16 bytes: a zero at the end counts as none, in all alike.)"""
    packed = bytes.fromhex("".join(keys))
    assert len(packed) == KEY_BYTES * len(keys), "a key has 32 hexadecimal digits"
    return np.frombuffer(packed, f"S{KEY_BYTES}")


def _read_header(path: Path, store: str) -> _Shard:
    """What a shard holds, by its header and its keys; any exception if they make no sense."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:
            raise ValueError("ends early")
        header: dict[str, Any] = json.loads(file.read(length))
        if header["__metadata__"]["store"] != store:
            raise ValueError(f"belongs to {header['__metadata__']['store']}")
        count, *shape = header["rows"]["shape"]
        key_start, key_end = header["keys"]["data_offsets"]
        start, end = header["rows"]["data_offsets"]
        if 8 + length + max(key_end, end) != size or key_end - key_start != KEY_BYTES * count:
            raise ValueError("ends early")
        file.seek(8 + length + key_start)
        keys = np.frombuffer(file.read(KEY_BYTES * count), f"S{KEY_BYTES}")
    dtype = DTYPES[header["rows"]["dtype"]]
    return _Shard(path, keys, 8 + length + start, (end - start) // count, dtype, tuple(shape))


def _fault(path: Path) -> Exception | None:
    """Why a shard cannot be used, or None if its bytes are those that its name was made from."""
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    try:
        with FileIO(path) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        return error
    return None if path.stem == _hash_name(digest) else ValueError("has changed since it was written")


def _hash_name(digest: Any) -> str:
    return str(digest.hexdigest()[: 2 * KEY_BYTES])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error) if type(error) is ValueError else "is no shard of a cache"


def _remove_stale(path: Path) -> None:
    with suppress(OSError):  # gone, or not ours to remove
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _close(files: OrderedDict[Path, FileIO]) -> None:
    for file in files.values():
        file.close()
