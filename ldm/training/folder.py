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
from ldm.training import resuming, saving, started
from ldm.training.files import difference, hashes

# A process that was killed may hold its lock a moment longer, while the system clears up after it.
LOCK_SECONDS = 3.0

_held: dict[Path, int] = {}


def _forget() -> None:
    """In a process that was forked: a worker that outlives a killed run must not hold its lock."""
    for file in _held.values():
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def lock(folder: Path) -> Callable[[], None]:
    """Locks a run folder until the returned function is called or the process ends, however it ends.

    A run of this process that has failed, in a notebook say, gives way.

    Raises:
        ValueError: if another process holds it.
    """
    name = folder.resolve()
    if name in _held:
        os.close(_held.pop(name))
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_SECONDS
    while not _lock(file):
        if time.monotonic() > deadline:
            holder = os.read(file, 100).decode(errors="replace").strip()
            os.close(file)
            raise ValueError(
                f"{folder} is being written by another run{f' ({holder})' if holder else ''}; wait for it, end it, or "
                "choose another output_dir"
            )
        time.sleep(0.1)
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    _held[name] = file

    def unlock() -> None:
        if _held.get(name) == file:
            os.close(_held.pop(name))

    return unlock


def _lock(file: int) -> bool:
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
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; choose another output_dir")
    # A process that is killed as it opens the folder leaves less than a config.
    begun = [path for path in folder.iterdir() if path.name != ".lock" and not disk.is_partial(path)]
    if begun and not (folder / "config.yaml").is_file():
        raise ValueError(f"output_dir {folder} holds files that are no run of ldm; choose another output_dir")


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
    if folder.exists() and any(folder.iterdir()):
        unlock = lock(folder)
        if not (resume and (step > 0 or saving.checkpoints(folder) or _is_this_run(folder, config))):
            unlock()
            aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(aside)
            say(f"{folder} held an earlier run, which is now {aside}")
            folder.mkdir()
            unlock = lock(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        unlock = lock(folder)
    newest = next((path for path in reversed(saving.checkpoints(folder)) if path not in damaged), None)
    if newest is not None and saving.step_of(newest) != step:
        unlock()
        raise ValueError(f"another process has gone on with {folder} meanwhile, to {newest}; start again")
    if resume and not saving.checkpoints(folder):
        say(f"{folder} has no checkpoint to resume; starting at step 0")
    for inside in (folder, folder / "checkpoints", folder / "samples"):
        disk.remove_partial(inside)
    saving.set_aside(damaged)
    disk.write_text(folder / "config.yaml", to_yaml(config))
    started.record(folder, config)
    return unlock


def _is_this_run(folder: Path, config: LDMConfig | AutoencoderTrainingConfig) -> bool:
    """Whether a run that was stopped before its first checkpoint had a config of the same meaning."""
    if not (folder / "config.yaml").is_file():
        return True  # stopped before it had one
    with suppress(ValueError):
        stored = read_config(folder / "config.yaml", type(config))
        return not resuming.config_differences(stored, config, str(folder / "config.yaml"))
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
        changed = difference(hashes(folder), hashes(aside))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if changed is not None:
        raise ValueError(
            f"{folder / changed} is not what the config names today; restore that part as it was, "
            "or start a new run in another output_dir"
        )
