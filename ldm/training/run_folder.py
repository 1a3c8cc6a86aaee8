"""The folder of a run: its lock, what a new session does with an existing one, and its relative paths."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm import disk, hub
from ldm.config import AutoencoderTrainingConfig, LDMConfig, read_config, to_yaml
from ldm.data.sources import BUILT_IN as BUILT_IN_DATA
from ldm.text.loading import OPEN_CLIP
from ldm.training.checkpoints import (
    checkpoint_step,
    file_hashes,
    first_difference,
    list_checkpoints,
    rename_damaged,
)
from ldm.training.resume import config_differences, flatten

# A killed process may hold its lock for a moment, while the system cleans up.
LOCK_SECONDS, RETRY_SECONDS = 3.0, 0.1
START_FILE = "started.json"
# Keys that may hold a path.
PATH_KEYS = ("data.path", "data.cache_dir", "first_stage", "start_from", "finetune.prior_prompts", "text.encoder")
BUILT_IN_NAMES = {*BUILT_IN_DATA, *hub.BUILT_IN, *hub.BUILT_IN_PIPELINES, "minilm"}

_lock_files: dict[Path, int] = {}


def _close_inherited() -> None:
    """In a forked process: a worker that outlives a killed run must not hold its lock."""
    for file in _lock_files.values():
        os.close(file)
    _lock_files.clear()


os.register_at_fork(after_in_child=_close_inherited)


def lock_folder(folder: Path) -> Callable[[], None]:
    """Lock a run folder, created if missing, until the returned function is called or the process ends. Raises
    ValueError if another process holds it.

    A failed run of the same process, in a notebook for example, loses its lock.
    """
    name, path = folder.resolve(), folder / ".lock"
    if name in _lock_files:
        os.close(_lock_files.pop(name))
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = None
        with suppress(FileNotFoundError):  # another process moves the folder aside
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # A file that was opened before the folder was moved aside is the lock of the moved folder.
            if try_lock(file) and os.path.samestat(os.fstat(file), path.stat()):
                break
        if file is not None:
            os.close(file)
        if time.monotonic() > deadline:
            holder = path.read_text(errors="replace").strip() if path.is_file() else ""
            raise ValueError(
                f"{folder} is being written by another run{f' ({holder})' if holder else ''}; wait for it, end it, or "
                "choose another output_dir"
            )
        time.sleep(RETRY_SECONDS)
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    _lock_files[name] = file

    def unlock() -> None:
        if _lock_files.get(name) == file:
            os.close(_lock_files.pop(name))

    return unlock


def try_lock(file: int) -> bool:
    """Lock an open file if no other process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_new(folder: Path) -> None:
    """ValueError if a folder holds files that no run has written."""
    if not folder.exists():
        if folder.is_symlink():
            raise ValueError(
                f"output_dir {folder} is a link to {os.readlink(folder)}, which does not exist; remove it or choose "
                "another"
            )
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; choose another output_dir")
    try:
        names = os.listdir(folder)  # once: another process may move the folder aside
    except FileNotFoundError:
        return
    if _has_content(names) and "config.yaml" not in names:
        raise ValueError(f"output_dir {folder} holds files that are not from a run of ldm; choose another output_dir")


def _has_content(names: list[str]) -> bool:
    """Whether a folder holds more than the remains of a process that was killed while opening it."""
    return any(name != ".lock" and not disk.is_partial(Path(name)) for name in names)


def open_folder(
    folder: Path,
    config: LDMConfig | AutoencoderTrainingConfig,
    step: int,
    *,
    resume: bool,
    damaged: list[Path],
    log: Callable[[str], None],
) -> Callable[[], None]:
    """Create or continue a run folder at `step`; another run in it is moved aside, and damaged checkpoints are renamed.
    Returns a function that unlocks it. Raises ValueError if it is no run folder, or another process is writing it.
    """
    check_new(folder)
    unlock = lock_folder(folder)
    try:
        check_new(folder)  # another process may have replaced it
        is_same = resume
        if resume and step == 0 and not list_checkpoints(folder) and (folder / "config.yaml").is_file():
            try:  # it stopped before its first checkpoint
                stored = read_config(folder / "config.yaml", type(config))
                is_same = not config_differences(stored, config)
            except ValueError:
                is_same = False
        if _has_content(os.listdir(folder)) and not is_same:
            target = folder.resolve()
            taken = set(os.listdir(target.parent))
            name = next(name for n in range(1, 10**6) if (name := f"{target.name}.{n}") not in taken)
            old_lock = _lock_files.pop(target)  # held until the new folder is locked
            try:
                target.rename(target.with_name(name))
                # A symbolic link stays and leads to the new folder.
                aside = (target if folder.is_symlink() else folder).with_name(name)
                log(f"{folder} held an earlier run, which is now {aside}")
                target.mkdir(exist_ok=True)
                unlock = lock_folder(folder)
            finally:
                os.close(old_lock)
        newest = next((path for path in reversed(list_checkpoints(folder)) if path not in damaged), None)
        if newest is not None and checkpoint_step(newest) != step:
            raise ValueError(f"another process has continued {folder} in the meantime, to {newest}; start again")
        if resume and not list_checkpoints(folder):
            log(f"{folder} has no checkpoint to resume; starting at step 0")
        for inside in (folder, folder / "checkpoints", folder / "samples"):
            disk.remove_partial(inside)
        rename_damaged(damaged)
        disk.write_text(folder / "config.yaml", to_yaml(config))
        record_start(folder, config)
    except BaseException:
        unlock()
        raise
    return unlock


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder in the first session of a run; later sessions compare. Raises ValueError if a later session would
    write something else.
    """
    aside = disk.partial(folder)
    try:
        write(aside)
        if not folder.exists():
            disk.sync_tree(aside)
            aside.rename(folder)
            disk.sync(folder.parent)
            return
        changed = first_difference(file_hashes(folder), file_hashes(aside))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if changed is not None:
        raise ValueError(
            f"{folder / changed} differs from what the config names today; restore the original files, "
            "or start a new run in another output_dir"
        )


# ---- relative paths


def record_start(run: Path, config: LDMConfig | AutoencoderTrainingConfig) -> None:
    """Store the working folder and the config's paths that are relative to it."""
    given = flatten(dataclasses.asdict(config))
    local = {key: given[key] for key in PATH_KEYS if is_relative_path(given.get(key), Path.cwd())}
    hub.write_json(run / START_FILE, {"folder": os.getcwd(), "paths": local})


def is_relative_path(value: Any, folder: Path) -> bool:
    """Whether a config value is a path relative to `folder` that exists, or that a first stage's run will create."""
    if not isinstance(value, str) or not value or value in BUILT_IN_NAMES:
        return False
    path = value.split(":", 2)[-1] if value.startswith(OPEN_CLIP) else value
    if path.startswith("~") or Path(path).is_absolute():
        return False
    target = folder / path
    return target.exists() or (target.name == "autoencoder" and (target.parent / "config.yaml").is_file())
