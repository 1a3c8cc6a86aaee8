"""Tensors on disk by key, in immutable shards.

A shard is a safetensors file of `keys` and `rows`, named by the hash of its bytes. So damage is detected, and processes
write without locks. Rows are read with plain reads: a memory map would count as memory of the process, and a truncated
file would kill it.
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


def _max_open_files() -> int:
    """The limit of open files of this process, often 1,024 or 256."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**20 if limit == resource.RLIM_INFINITY else limit


KEY_BYTES = 16
SUFFIX, DAMAGED = ".safetensors", ".damaged"
VERIFIERS = min(8, usable_cores())
# Temporary files that are older belong to killed processes.
STALE_SECONDS = 3600
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# 100,000 rows in 391 shards: 128 random rows take 2 to 3 ms with 512 open files, 6 ms with 64.
OPEN_FILES = min(512, _max_open_files() // 4)
WAY_OUT = "choose another folder with $LDM_CACHE or data.cache_dir"


@dataclass(frozen=True, eq=False)
class _Shard:
    """A file of N rows of `row_bytes`, from byte `start`; `keys` S16 [N]."""

    path: Path
    keys: np.ndarray
    start: int
    row_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class RowCache:
    """Tensors (rows) by key, of 32 hexadecimal digits, in one folder.

    The rows of one `add` have the same shape. Reading needs no write permission.

    Args:
        folder: ends in KIND/KEY, what the rows have in common; shards of other folders are rejected.
        print: called with messages about damaged shards.
    """

    def __init__(self, folder: Path, print: Callable[[str], None] = print) -> None:
        self.folder = folder = disk.expand_user(folder)
        self._print = print
        self._name = "/".join(folder.parts[-2:])
        self._shards: dict[str, _Shard] = {}
        self._verified: set[str] = set()
        self._refused: set[str] = set()
        self._index: _Index | None = None
        self._files = _Files()

    def keys(self) -> set[str]:
        """The keys of all shards, which are not verified."""
        self._list()
        return {key.ljust(KEY_BYTES, b"\0").hex() for shard in self._shards.values() for key in shard.keys.tolist()}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys without a row, without repetitions. Shards with the other rows are verified; damaged
        ones are reported and renamed.
        """
        wanted = _packed(keys)
        shards, _ = self._find(wanted)
        absent = np.flatnonzero(shards < 0)
        _, first = np.unique(wanted[absent], return_index=True)
        return [int(position) for position in absent[np.sort(first)]]

    def add(self, keys: Sequence[str], rows: Tensor, to_come: int = 0) -> None:
        """Atomically writes rows [N, …] under N keys as one shard.

        Args:
            to_come: number of such rows that will follow, to check the free disk space.

        Raises:
            ValueError: if the folder cannot be written, or the disk is too full.
        """
        assert len(keys) == len(rows) > 0, (len(keys), len(rows))
        packed = np.frombuffer(_packed(keys).tobytes(), np.uint8).reshape(-1, KEY_BYTES)
        tensors = {"keys": torch.from_numpy(packed.copy()), "rows": rows.detach().cpu().contiguous()}
        # A single metadata entry, as safetensors does not sort them.
        content = save(tensors, {"store": self._name})
        path = self.folder / f"{_hash_name(hashlib.sha256(content))}{SUFFIX}"
        self._write(path, content, len(content) + to_come * rows[0].nbytes)
        self._verified.add(path.name)

    def open(self, keys: Sequence[str]) -> CachedRows:
        """The rows of these keys, in order, which may repeat. Raises ValueError if some are missing."""
        shards, rows = self._find(_packed(keys))
        lost = int((shards < 0).sum())
        if lost:
            raise ValueError(
                f"{lost} of {len(keys)} rows are missing in the cache {self.folder}; start again to compute them"
            )
        assert self._index is not None
        return CachedRows(self._index.shards, shards, rows, self._files)

    # ---- finding rows

    def _find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) int32 per key, −1 if missing; the shards are verified."""
        self._list()
        while True:
            self._index = self._index or _Index.from_shards(list(self._shards.values()))
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
        """Updates the list of shards."""
        try:
            names = {entry.name for entry in os.scandir(self.folder)}
        except OSError:  # does not exist yet; `add` raises other errors
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
                # Foreign files raise many types.
                except Exception as error:
                    self._refuse(path, error)
            elif name.startswith(".") and SUFFIX in name:
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()

    def _refuse(self, path: Path, fault: Exception) -> None:
        """Reports an unusable shard, and renames it if it is damaged, not just unreadable."""
        self._shards.pop(path.name, None)
        self._refused.add(path.name)
        self._index = None
        if isinstance(fault, FileNotFoundError):  # another process renamed it
            return
        action = "is ignored"
        if not isinstance(fault, OSError):
            with suppress(OSError):  # read-only, or another process was first
                path.replace(path.with_suffix(DAMAGED))
                action = f"was renamed to {path.stem}{DAMAGED}"
        self._print(f"the cache file {path} {_reason(fault)}; it {action}, and its rows are computed again")

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
                f"needed); fix that, or {WAY_OUT}"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._refused.discard(path.name)


class CachedRows:
    """Rows of a cache by position: `rows[indices]` copies them into memory, and keeps nothing there."""

    def __init__(self, shards: list[_Shard], shard: np.ndarray, row: np.ndarray, files: _Files) -> None:
        self._shards, self._shard, self._row, self._files = shards, shard, row, files

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Tensor:
        """[N, …] for N ≥ 1 positions of rows of one shape and dtype.

        Raises:
            ValueError: if a file was truncated or removed since it was verified.
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
                f"the cache file {shard.path} was changed during the run: it {fault}; start again to compute its rows"
            )


class _Files:
    """Open files, least recently used first."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, FileIO] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def open(self, path: Path) -> FileIO:
        file = self._open.pop(path, None) or FileIO(path)
        self._open[path] = file
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file


@dataclass(frozen=True, eq=False)
class _Index:
    """Sorted keys, S16 [N], with shard and row: 24 bytes per row."""

    shards: list[_Shard]
    keys: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @classmethod
    def from_shards(cls, shards: list[_Shard]) -> _Index:
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
    """Hexadecimal digits → S16 [N]. (numpy drops zeros at the end, of all keys alike.)"""
    packed = bytes.fromhex("".join(keys))
    assert len(packed) == KEY_BYTES * len(keys), "a key has 32 hexadecimal digits"
    return np.frombuffer(packed, f"S{KEY_BYTES}")


def _read_header(path: Path, store: str) -> _Shard:
    """The header and the keys of a shard; invalid files raise any exception."""
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
    """Why a shard cannot be used; None if its bytes match its name."""
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


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _close_all(files: OrderedDict[Path, FileIO]) -> None:
    for file in files.values():
        file.close()
