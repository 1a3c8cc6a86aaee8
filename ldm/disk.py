"""Atomic writing: a file or folder is complete or absent, whenever a process or a machine stops.

Everything is written to a temporary sibling, `.NAME.XXXXXXXX.partial`, synced, and renamed. `remove_partial` removes
what a killed process leaves. On file systems that cannot swap two names, the old folder is `.NAME.XXXXXXXX.old` for a
moment.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(partial|old)")
_LFS = b"version https://git-lfs.github.com/spec/"
# A file system, or its rules for files of others, that has no hard links.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
    """A temporary file to write, which then replaces `path` atomically."""
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
        with suppress(OSError):  # the error of the disk is already raised
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, in ASCII: file names may hold lone surrogates, which UTF-8 cannot encode."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError with its name if it is missing, damaged or not an object."""
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the folder is incomplete, copy, save or train it again") from None
    except (OSError, ValueError, RecursionError) as error:  # integers of thousands of digits are a ValueError
        check_not_pointer(path)
        raise ValueError(f"{path} cannot be read as JSON ({error}); copy, save or train it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object; copy, save or train it again")
    return content


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file in one write, so that a killed process leaves all of it or nothing.

    Raises OSError if the disk is full; it may then hold half a line.
    """
    rest = f"{line}\n".encode()
    with _naming(path), path.open("ab", buffering=0) as file:
        while rest:  # a nearly full disk takes some; the next write raises
            rest = rest[file.write(rest) :]


def writable_folder(name: str | os.PathLike[str]) -> Path:
    """The absolute path at which a folder is written, with `~` and links resolved.

    Raises ValueError for a file, a link to nothing, a mount point, and a folder that may not be written.
    """
    if not os.fspath(name):
        raise ValueError("the name of the folder is empty; name one, or . for the present one")
    given = expand_user(name)
    if given.is_symlink() and not given.exists():
        raise ValueError(f"{given} is a link to {os.readlink(given)}, where nothing is; name another folder")
    folder = given.resolve()
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    if not standing.is_dir():
        raise ValueError(f"{standing} is a file; name a folder")
    if standing == folder and os.path.ismount(folder):
        raise ValueError(f"{given} is a mount point, which cannot be replaced as a whole; name a folder in it")
    for place in {standing, folder.parent if standing == folder else standing}:  # it is written beside, then renamed
        if not os.access(place, os.W_OK):
            raise ValueError(f"{place} is read-only; allow writing to it or name another folder")
    return folder


def read_lines(what: str, path: Path | str) -> list[str]:
    """The lines of a text file that are not empty, stripped. Raises ValueError naming `what` and the file."""
    path = expand_user(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else "is not UTF-8 text"
        raise ValueError(f"{what} {path} {reason}") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{what} {path} is empty; write a prompt per line")
    return found


def expand_user(name: str | os.PathLike[str]) -> Path:
    """A path in which `~` is the home folder; ValueError for that of a user who is not known."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} names the home folder of a user that does not exist; write ./{name}") from None


@contextmanager
def new_folder(path: Path, replaces: Callable[[str], bool] = lambda _: True) -> Iterator[Path]:
    """An empty folder to fill, which then replaces `path` atomically.

    Where the file system cannot swap two names, an old folder is moved away first: `remove_partial` brings it back if
    the process is killed between the two renames.

    Args:
        replaces: whether a file of the old folder, by its path in it (`unet/config.json`), is removed. Others are in
            the new folder too: as hard links, or copies where there are none.

    Raises:
        ValueError: if they cannot be; the old folder stays then.
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
            _replace_folder(path, aside, replaces)
        else:
            aside.rename(path)
        if not _in_partial(path):
            sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_folder(path: Path, aside: Path, replaces: Callable[[str], bool]) -> None:
    """Puts a folder in the place of another, with what that does not replace."""
    inside = None
    with suppress(OSError, ValueError):
        inside = Path.cwd().relative_to(path.resolve())
    _keep(path, aside, replaces)
    for folder in (aside, *(place for place in aside.rglob("*") if place.is_dir() and not place.is_symlink())):
        before = path / folder.relative_to(aside)
        if before.is_dir():  # one that is its owner's alone, or shared with a group, stays so
            folder.chmod(stat.S_IMODE(before.stat().st_mode) | stat.S_IRWXU)
    old = path.with_name(f"{aside.name.removesuffix('partial')}old")
    # Swaps two names in one step, on Linux and most of its file systems.
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(at_cwd, os.fsencode(path), at_cwd, os.fsencode(aside), exchange) == 0:
        aside.rename(old)
    else:
        try:
            path.rename(old)
            aside.rename(path)
        except BaseException:  # a signal too
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    if inside is not None:  # a working folder is an inode, not a name
        os.chdir(path / inside if (path / inside).is_dir() else path)
    _keep(old, path, replaces)  # what has come meanwhile
    shutil.rmtree(old, ignore_errors=True)


def _keep(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    """Brings into `new` what stays of `old`, where it is still."""
    changed = set()
    for root, folders, files in os.walk(old):
        place, within = Path(root), Path(root).relative_to(old)
        links = [name for name in folders if (place / name).is_symlink()]
        kept = [name for name in files if not replaces((within / name).as_posix())] + links
        for folder in (*reversed(within.parents[:-1]), within) if kept or not (folders or files) else ():
            if not (new / folder).exists():
                (new / folder).mkdir()
                (new / folder).chmod(stat.S_IMODE((old / folder).stat().st_mode) | stat.S_IRWXU)
            elif not (new / folder).is_dir():
                raise ValueError(f"{old / folder} is a folder where a file is written; nothing was written, move it")
        for name in kept:
            source, target = place / name, new / within / name
            mode = source.lstat().st_mode
            if not (target.is_symlink() or target.exists()):
                changed.add(target.parent)
                if stat.S_ISLNK(mode):
                    os.symlink(os.readlink(source), target)
                    continue
                try:
                    os.link(source, target)
                except OSError as error:
                    if error.errno == errno.EXDEV:
                        why = "is on a file system of its own; nothing was written, move it"
                        raise ValueError(f"{source} {why}") from None
                    if error.errno not in _NO_LINKS or not stat.S_ISREG(mode):
                        raise
                    shutil.copy2(source, target)
                    sync(target)
                continue
            same = os.path.samestat(source.lstat(), target.lstat())
            same |= stat.S_ISLNK(mode) and target.is_symlink() and os.readlink(source) == os.readlink(target)
            if not same and not (stat.S_ISREG(mode) and target.is_file()):
                raise ValueError(f"{source} is not what a model has under that name; nothing was written, move it")
    for folder in changed:
        sync(folder)


def remove_folder(path: Path) -> None:
    """Removes a folder; its name is gone before its files."""
    old = partial(path)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Removes what a killed process has left in a folder that has no other writer, or brings it back."""
    for path in sorted(folder.glob(".*")):
        match = _PARTIAL.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        elif path.is_dir() and not path.is_symlink():
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
    """Whether a name is a temporary one of this module; a user's own `thesis.partial` is not."""
    return _PARTIAL.fullmatch(path.name) is not None


def file_stamp(path: Path) -> tuple[int, int] | None:
    """What changes where a file is written anew: its size and time; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def check_regular(path: Path) -> None:
    """`OSError` unless a name is that of a file with an end: a pipe would be waited for, a device read forever."""
    if not path.is_file():
        path.stat()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def check_not_pointer(path: Path) -> None:
    """`ValueError` if a file is a git-LFS pointer."""
    if not path.is_file():
        return
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(f"{path} is a git-LFS pointer, not the file; run `git lfs pull` in {path.parent}")
