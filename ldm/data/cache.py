"""Tensors on disk by key, in immutable shards.

A shard is a safetensors file of `keys` and `rows`, named by the hash of its bytes: damage is detected, and processes
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ldm import disk
from ldm.environment import usable_cores

KEY_BYTES = 16
SUFFIX, DAMAGED = ".safetensors", ".damaged"
VERIFIERS = min(8, usable_cores())
STALE_SECONDS = 3600  # temporary files that are older belong to killed processes
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
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
    """Tensors (rows) by key, of 32 hexadecimal digits, in one folder. Reading needs no write permission.

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
        # Shards, their first positions in the order of all rows, and the order of these by key, with the keys.
        nothing = np.empty(0, np.int64)
        self._index: tuple[list[_Shard], np.ndarray, np.ndarray, np.ndarray] = [], nothing, nothing, nothing

    def keys(self) -> set[str]:
        """The keys of all shards, which are not verified."""
        self._list()
        return {key.ljust(KEY_BYTES, b"\0").hex() for shard in self._shards.values() for key in shard.keys.tolist()}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys without a row, without repetitions. The shards of the others are verified; damaged ones
        are reported and renamed.
        """
        wanted = _packed(keys)
        absent = np.flatnonzero(self._find(wanted)[1] < 0)
        _, first = np.unique(wanted[absent], return_index=True)
        return [int(position) for position in absent[np.sort(first)]]

    def open(self, keys: Sequence[str]) -> CachedRows:
        """The rows of these keys, in order, which may repeat. Raises ValueError if some are missing."""
        shards, number, row = self._find(_packed(keys))
        lost = int((number < 0).sum())
        if lost:
            raise ValueError(f"{lost} of {len(keys)} rows are missing in {self.folder}; start again to compute them")
        return CachedRows(shards, number, row)

    def add(self, keys: Sequence[str], rows: Tensor, to_come: int = 0) -> None:
        """Atomically writes rows [N, …] of one shape under N keys as one shard.

        `to_come` such rows will follow. Raises ValueError if the folder cannot be written, or the disk has no room for
        them.
        """
        assert len(keys) == len(rows) > 0, (len(keys), len(rows))
        packed = np.frombuffer(_packed(keys).tobytes(), np.uint8).reshape(-1, KEY_BYTES)
        tensors = {"keys": torch.from_numpy(packed.copy()), "rows": rows.detach().cpu().contiguous()}
        content = save(tensors, {"store": self._name})  # a single metadata entry, as safetensors does not sort them
        path = self.folder / f"{_hash_name(hashlib.sha256(content))}{SUFFIX}"
        needed = len(content) + to_come * rows[0].nbytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise ValueError(f"{self.folder} needs {_size(needed)}, {_size(free)} are free; {WAY_OUT}")
            with disk.new_file(path) as aside:
                aside.write_bytes(content)
        except OSError as error:
            reason = f"{error.strerror or error} ({_size(needed)} more are needed)"
            raise ValueError(f"the cache {self.folder} cannot be written: {reason}; {WAY_OUT}") from None
        self._refused.discard(path.name)
        self._verified.add(path.name)

    def _find(self, wanted: np.ndarray) -> tuple[list[_Shard], np.ndarray, np.ndarray]:
        """(shards, and of each key the number of its shard, −1 if missing, and its row); the shards are verified."""

        def fault_of(path: Path) -> Exception | None:  # None if its bytes match its name
            try:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
            except OSError as error:
                return error
            return None if path.stem == _hash_name(digest) else ValueError("has changed since it was written")

        while True:
            self._list()
            shards = list(self._shards.values())
            if shards != self._index[0]:
                keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(shard.keys for shard in shards)])
                order = np.argsort(keys, kind="stable")
                self._index = shards, np.cumsum([0, *(len(one.keys) for one in shards)]), order, keys[order]
            _, starts, order, ordered = self._index
            number, row = np.full(len(wanted), -1, np.int32), np.zeros(len(wanted), np.int32)
            if len(ordered):
                place = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
                there = ordered[place] == wanted
                position = order[place[there]]
                number[there] = np.searchsorted(starts, position, side="right") - 1
                row[there] = position - starts[number[there]]
            used = [shards[n].path for n in np.unique(number) if n >= 0]
            unverified = [path for path in used if path.name not in self._verified]
            with ThreadPoolExecutor(VERIFIERS) as pool:  # hashing releases the interpreter lock
                faults = list(pool.map(fault_of, unverified))
            for path, fault in zip(unverified, faults, strict=True):
                if fault is None:
                    self._verified.add(path.name)
                else:
                    self._refuse(path, fault)
            if not any(faults):
                return shards, number, row

    def _list(self) -> None:
        """Updates the list of shards."""
        try:
            names = {entry.name for entry in os.scandir(self.folder)}
        except OSError:  # does not exist yet; `add` raises other errors
            names = set()
        for name in self._shards.keys() - names:
            del self._shards[name]
        for name in sorted(names - self._shards.keys() - self._refused):
            path = self.folder / name
            if name.endswith(SUFFIX) and not name.startswith("."):
                try:
                    with open(path, "rb") as file:
                        size = os.fstat(file.fileno()).st_size
                        (length,) = struct.unpack("<Q", file.read(8))
                        if length > size:
                            raise ValueError("ends early")
                        header: dict[str, Any] = json.loads(file.read(length))
                        if header["__metadata__"]["store"] != self._name:
                            raise ValueError(f"belongs to {header['__metadata__']['store']}")
                        count, *shape = header["rows"]["shape"]
                        key_start, key_end = header["keys"]["data_offsets"]
                        start, end = header["rows"]["data_offsets"]
                        if 8 + length + max(key_end, end) != size or key_end - key_start != KEY_BYTES * count:
                            raise ValueError("ends early")
                        file.seek(8 + length + key_start)
                        keys = np.frombuffer(file.read(KEY_BYTES * count), f"S{KEY_BYTES}")
                    dtype, each = DTYPES[header["rows"]["dtype"]], (end - start) // count
                    self._shards[name] = _Shard(path, keys, 8 + length + start, each, dtype, tuple(shape))
                except Exception as error:  # foreign files raise many types
                    self._refuse(path, error)
            elif name.startswith(".") and SUFFIX in name:
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()

    def _refuse(self, path: Path, fault: Exception) -> None:
        """Reports an unusable shard, and renames it if it is damaged, not just unreadable."""
        self._shards.pop(path.name, None)
        self._refused.add(path.name)
        if isinstance(fault, FileNotFoundError):  # another process renamed it
            return
        action = "is ignored"
        if not isinstance(fault, OSError):
            with suppress(OSError):  # read-only, or another process was first
                path.replace(path.with_suffix(DAMAGED))
                action = f"was renamed to {path.stem}{DAMAGED}"
        self._print(f"the cache file {path} {_reason(fault)}; it {action}, and its rows are computed again")


class CachedRows:
    """Rows of a cache by position: `rows[indices]` copies them into memory, and keeps nothing there. Each has the
    `number` of its shard and its place `row` there.
    """

    def __init__(self, shards: list[_Shard], number: np.ndarray, row: np.ndarray) -> None:
        self._shards, self._number, self._row = shards, number, row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Tensor:
        """[N, …] for N ≥ 1 positions of rows of one shape and dtype. Raises ValueError if a file was truncated or
        removed since it was verified.
        """
        positions = np.asarray(indices, dtype=np.int64)
        numbers, rows = self._number[positions], self._row[positions]
        first = self._shards[numbers[0]]
        found = torch.empty((len(positions), *first.shape), dtype=first.dtype)
        places = found.view(len(positions), -1).view(torch.uint8).numpy()  # [N, bytes of a row]
        for number in np.unique(numbers):
            shard = self._shards[number]
            assert (shard.shape, shard.dtype) == (first.shape, first.dtype), (shard.shape, first.shape)
            try:
                with open(shard.path, "rb", buffering=0) as file:
                    for place in np.flatnonzero(numbers == number):
                        file.seek(shard.start + int(rows[place]) * shard.row_bytes)
                        if file.readinto(places[place].data) != shard.row_bytes:
                            raise ValueError("ends early")
            except (OSError, ValueError) as error:
                why = f"was changed during the run: it {_reason(error)}; start again to compute its rows"
                raise ValueError(f"the cache file {shard.path} {why}") from None
        return found


def _packed(keys: Sequence[str]) -> np.ndarray:
    """Hexadecimal digits → S16 [N]. (numpy drops zeros at the end, of all keys alike.)"""
    packed = bytes.fromhex("".join(keys))
    assert len(packed) == KEY_BYTES * len(keys), "a key has 32 hexadecimal digits"
    return np.frombuffer(packed, f"S{KEY_BYTES}")


def _hash_name(digest: Any) -> str:
    return str(digest.hexdigest()[: 2 * KEY_BYTES])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error) if type(error) is ValueError else "is no shard of a cache"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
