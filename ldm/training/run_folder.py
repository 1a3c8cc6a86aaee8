"""The folder of a run: who may write it, what a new session finds there, what is written once."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ldm import disk
from ldm.config import AutoencoderTrainingConfig, LDMConfig, read_config, to_yaml
from ldm.training import checkpoints, start_folder
from ldm.training.files import file_hashes, first_difference
from ldm.training.resume import config_differences

# A process that was killed may hold its lock a moment longer, while the system clears up after it.
LOCK_SECONDS, BETWEEN_TRIES = 3.0, 0.1

_held: dict[Path, int] = {}


def _close_inherited() -> None:
    """In a process that was forked: a worker that outlives a killed run must not hold its lock."""
    for file in _held.values():
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def lock_folder(folder: Path) -> Callable[[], None]:
    """Locks a run folder until the returned function is called or the process ends, however it ends.

    The folder is made if there is none. A run of this process that has failed, in a notebook say, gives way.

    Raises:
        ValueError: if another process holds it.
    """
    name = folder.resolve()
    if name in _held:
        os.close(_held.pop(name))
    deadline = time.monotonic() + LOCK_SECONDS
    while (file := _try_lock(folder)) is None:
        if time.monotonic() > deadline:
            holder = (folder / ".lock").read_text(errors="replace").strip() if (folder / ".lock").is_file() else ""
            raise ValueError(
                f"{folder} is being written by another run{f' ({holder})' if holder else ''}; wait for it, end it, or "
                "choose another output_dir"
            )
        time.sleep(BETWEEN_TRIES)
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held[name] = file

    def unlock() -> None:
        if _held.get(name) == file:
            os.close(_held.pop(name))

    return unlock


def _try_lock(folder: Path) -> int | None:
    """The lock of a folder, open and held; None if another process holds it, or moves the folder aside right now."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        # One that was opened before the folder was moved aside is the lock of the folder aside.
        if _try_flock(file) and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except FileNotFoundError:
        pass
    os.close(file)
    return None


def _try_flock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # not on Windows
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_new(folder: Path) -> None:
    """`ValueError` if a folder holds what no run has written."""
    if not folder.exists():
        if folder.is_symlink():
            raise ValueError(
                f"output_dir {folder} is a link to {os.readlink(folder)}, where nothing is; remove it or choose another"
            )
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; choose another output_dir")
    try:
        names = os.listdir(folder)  # once: another process may move the folder aside
    except FileNotFoundError:
        return
    if _is_begun(names) and "config.yaml" not in names:
        raise ValueError(f"output_dir {folder} holds files that are no run of ldm; choose another output_dir")


def _is_begun(names: list[str]) -> bool:
    """Whether a folder holds more than a process leaves that is killed as it opens it."""
    return any(name != ".lock" and not disk.is_partial(Path(name)) for name in names)


def open_folder(
    folder: Path,
    config: LDMConfig | AutoencoderTrainingConfig,
    step: int,
    *,
    resume: bool,
    damaged: list[Path],
    say: Callable[[str], None],
) -> Callable[[], None]:
    """Makes or goes on with a run folder at `step`; what holds another run is moved aside.

    Args:
        damaged: checkpoints that were passed over.

    Returns:
        What gives the folder's lock back.

    Raises:
        ValueError: if the folder is not ours, or another process writes it.
    """
    check_new(folder)
    unlock = lock_folder(folder)
    try:
        check_new(folder)  # it may be another one by now
        stays = resume and (step > 0 or bool(checkpoints.list_checkpoints(folder)) or _is_this_run(folder, config))
        if _is_begun(os.listdir(folder)) and not stays:
            unlock = _move_aside(folder, say)
        newest = next((path for path in reversed(checkpoints.list_checkpoints(folder)) if path not in damaged), None)
        if newest is not None and checkpoints.checkpoint_step(newest) != step:
            raise ValueError(f"another process has gone on with {folder} meanwhile, to {newest}; start again")
        if resume and not checkpoints.list_checkpoints(folder):
            say(f"{folder} has no checkpoint to resume; starting at step 0")
        for inside in (folder, folder / "checkpoints", folder / "samples"):
            disk.remove_partial(inside)
        checkpoints.rename_damaged(damaged)
        disk.write_text(folder / "config.yaml", to_yaml(config))
        start_folder.record_start(folder, config)
    except BaseException:
        unlock()
        raise
    return unlock


def _move_aside(folder: Path, say: Callable[[str], None]) -> Callable[[], None]:
    """Moves a folder that is locked aside, and locks the new one of its name; the old lock is held until then.

    Where the name is a link it stays, and leads to the new folder.
    """
    place = folder.resolve()
    taken = set(os.listdir(place.parent))
    aside = place.with_name(next(name for n in range(1, 10**6) if (name := f"{place.name}.{n}") not in taken))
    held = _held.pop(place)
    try:
        place.rename(aside)
        now = aside if folder.is_symlink() else folder.with_name(aside.name)
        say(f"{folder} held an earlier run, which is now {now}")
        place.mkdir(exist_ok=True)
        return lock_folder(folder)
    finally:
        os.close(held)


def _is_this_run(folder: Path, config: LDMConfig | AutoencoderTrainingConfig) -> bool:
    """Whether a run that was stopped before its first checkpoint had a config of the same meaning."""
    if not (folder / "config.yaml").is_file():
        return True  # stopped before it had one
    with suppress(ValueError):
        stored = read_config(folder / "config.yaml", type(config))
        return not config_differences(stored, config, str(folder / "config.yaml"))
    return False


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is written by the first session of a run and kept.

    Raises:
        ValueError: if a later session would write something else: what the run stands on has changed.
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
            f"{folder / changed} is not what the config names today; restore that part as it was, "
            "or start a new run in another output_dir"
        )
