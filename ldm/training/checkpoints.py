"""Checkpoints of a run on disk: from the first on there is always one that verifies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from ldm import checkpoint, disk
from ldm.training.distributed import sum_over_processes
from ldm.training.files import file_hashes, find_damage
from ldm.training.start_folder import resume_command

PREFIX = "step_"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first. A copy that someone keeps beside them has another name."""
    named = [path for path in run.glob(f"checkpoints/{PREFIX}*") if re.fullmatch(PREFIX + r"\d{8,}", path.name)]
    return sorted((path for path in named if (path / "manifest.json").is_file()), key=checkpoint_step)


def write_checkpoint(target: Path, fill: Callable[[Path], None]) -> None:
    """A folder that `fill` writes, and its manifest of sizes and hashes; read back before anyone relies on it.

    Whatever stands under that name, which is no checkpoint, is renamed as a damaged one is.

    Raises:
        OSError: if the disk does not take it, or gives it back otherwise; nothing of it stands then.
    """
    try:
        if target.exists() or target.is_symlink():
            rename_damaged([target])
        with disk.new_folder(target) as folder:
            fill(folder)
            disk.sync_tree(folder)
            checkpoint.write_json(folder / "manifest.json", {"files": file_hashes(folder)})  # the last file
        wrong = find_damage(target)
        if wrong is not None:
            disk.remove_folder(target)
            raise OSError(f"it does not read back as it was written: {wrong}")
    except OSError as error:
        raise OSError(
            f"the checkpoint of step {checkpoint_step(target)} cannot be written ({error}); "
            f"{describe_newest(target.parents[1])}; "
            f"mend that, and go on with {resume_command(target.parents[1])}"
        ) from error


def prune_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Removes all but the `keep` newest checkpoints and those of every `keep_every`-th step.

    One into which someone has put files of their own stays.
    """
    for old in list_checkpoints(run)[:-keep]:
        if (keep_every is None or checkpoint_step(old) % keep_every) and not _holds_more(old):
            disk.remove_folder(old)


def _holds_more(folder: Path) -> bool:
    """Whether a checkpoint holds files that are not in its manifest, apart from those that systems add."""
    try:
        named = checkpoint.read_json(folder / "manifest.json")["files"].keys() | {"manifest.json"}
    except (ValueError, KeyError, AttributeError):
        return True  # nobody knows
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in checkpoint.ADDED_BY_SYSTEMS)
    return any(path.relative_to(folder).as_posix() not in named for path in files)


def newest_intact_checkpoint(run: Path, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint whose files are those of its manifest, the newer ones that are damaged and were named).

    Raises:
        ValueError: if there are checkpoints but none is intact.
    """
    folders = list_checkpoints(run)
    damaged: list[Path] = []
    for folder in reversed(folders):
        wrong = find_damage(folder) or _misnamed(folder)
        if wrong is None:
            return folder, damaged
        say(f"{folder} is damaged ({wrong}); taking the one before")
        damaged.append(folder)
    if folders:
        raise ValueError(
            f"no checkpoint in {run / 'checkpoints'} is intact; restore one from a copy, or start a new run by leaving "
            "--resume out"
        )
    return None, []


def _misnamed(folder: Path) -> str | None:
    """What is wrong with a checkpoint that is whole but was made at another step, or None."""
    try:
        step = checkpoint.read_json(folder / "training" / "state.json").get("step")
    except ValueError as error:
        return str(error)
    return None if step == checkpoint_step(folder) else f"it was made at step {step}"


def find_checkpoint(accelerator: Accelerator, run: Path, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """What the main process finds with `newest_checkpoint`, told to all: they read the same one.

    Raises:
        ValueError: in each process, if there are checkpoints but none is intact.
    """
    newest: Path | None = None
    damaged: list[Path] = []
    wrong: ValueError | None = None
    if accelerator.is_main_process:
        try:
            newest, damaged = newest_intact_checkpoint(run, say)
        except ValueError as error:
            wrong = error
    found = -2 if wrong else -1 if newest is None else checkpoint_step(newest)
    (step,) = sum_over_processes(accelerator, [found if accelerator.is_main_process else 0])
    if step == -2:
        raise wrong or ValueError(f"no checkpoint in {run / 'checkpoints'} is intact")
    return (None if step == -1 else checkpoint_folder(run, step)), damaged


def describe_newest(run: Path) -> str:
    """What there is to go on from, for an error message."""
    newest = list_checkpoints(run)[-1:]
    return f"the newest checkpoint is {newest[0]}" if newest else "there is no earlier checkpoint"


def rename_damaged(damaged: list[Path]) -> None:
    """Renames damaged checkpoints, so that a new one of the same step can be written."""
    for folder in damaged:
        name = f"damaged.{folder.name}"
        taken = {path.name for path in folder.parent.iterdir()}
        folder.rename(
            folder.with_name(next(n for n in (name, *(f"{name}.{i}" for i in range(2, 10**6))) if n not in taken))
        )
