"""Writing to disk: what stands under a name is complete, whenever a process or a machine stops.

Everything is written under the name of a temporary sibling, `.NAME.XXXXXXXX.partial`, synced, and renamed. What a
killed process leaves behind is such a sibling, which `remove_partial` knows by its name.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows opens no folders, and syncs no file that is open for reading
        if path.is_dir():
            return
        flags = os.O_RDWR
    else:
        flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs a folder and all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then takes the place of `path`, old or new but never half."""
    aside = partial(path)
    try:
        with _naming(path):
            yield aside
            if not _in_partial(path):
                sync(aside)
            os.replace(aside, path)
            if not _in_partial(path):
                sync(path.parent)
    finally:
        with suppress(OSError):  # what is wrong with the disk has been said
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file of this name that is complete, or the one of before."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file in one write, so that a process that is killed leaves all of it or nothing.

    Raises:
        OSError: if the disk does not take all of it; it may then hold half a line.
    """
    rest = f"{line}\n".encode()
    with _naming(path), path.open("ab", buffering=0) as file:
        while rest:  # a disk that is nearly full takes some, and says why with the next write
            rest = rest[file.write(rest) :]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `path`.

    An old folder of this name is moved away first. Between the two renames nothing stands there, and a process
    that is killed in that moment leaves the old one under its temporary name.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        sync(path.parent.parent)  # else a first checkpoint could be lost with the folder that it is in
    aside = partial(path)
    try:
        aside.mkdir()
        yield aside
        if not _in_partial(path):
            sync_tree(aside)
        if path.exists():
            old = partial(path)
            try:
                path.rename(old)
                aside.rename(path)
            except BaseException:  # a signal too
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(path)
        if not _in_partial(path):
            sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that no half of it ever stands under its name."""
    old = partial(path)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Removes what a killed process has left in a folder that has no other writer."""
    for path in folder.glob(".*.partial"):
        if not is_partial(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds to an error of the disk the file that it is about: writing and syncing do not say."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _in_partial(path: Path) -> bool:
    """Whether a folder above is still under its temporary name: it will be synced as a whole."""
    return any(is_partial(folder) for folder in path.parents)


def partial(path: Path) -> Path:
    """A sibling of `path` that does not exist, to be written in its place."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def is_partial(path: Path) -> bool:
    """Whether a name is one that `partial` gives; a user's own `thesis.partial` is not."""
    return _PARTIAL.fullmatch(path.name) is not None
