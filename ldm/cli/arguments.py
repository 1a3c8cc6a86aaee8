"""Arguments of the command line: paths with `~`, files that can be written, several values after one option."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from ldm import disk

# KEY=VALUE; a folder of such a name is written ./KEY=VALUE.
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


class RepeatedOptionsCommand(TyperCommand):
    """Takes `--set a=1 b=2` and `--accept a b`, as the scripts in train/ do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_options(args))


def repeat_options(args: Sequence[str]) -> list[str]:
    """The same arguments with `--set` or `--accept` before each of its values."""
    found: list[str] = []
    option, waiting = "", False
    for i, argument in enumerate(args):
        if waiting:
            waiting = False
        elif argument == "--":
            return [*found, *args[i:]]
        elif argument in ("--set", "--accept"):
            option, waiting = argument, True
        elif argument.startswith(("--set=", "--accept=")):
            option = argument.partition("=")[0]
        elif option and not argument.startswith("-") and (option == "--accept" or _ASSIGNMENT.match(argument)):
            found.append(option)
        else:
            option = ""
        found.append(argument)
    return found


def output_file(option: str, path: Path, kinds: Sequence[str], what: str) -> Path:
    """The file to write, once sure that it can be: nothing is computed for a picture that cannot be kept.

    Args:
        kinds: the endings that it may have.
        what: what is written, and as what.

    Raises:
        ValueError: naming the option.
    """
    path = disk.expand_user(path)
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{option} is {path}; {what}, so let it end in {' or '.join(kinds)}")
    if path.is_dir():
        raise ValueError(f"{option} is {path}, a folder; name a file in it")
    _check_writable(option, path)
    return path


def output_folder(option: str, path: Path) -> Path:
    """The folder to write into, once sure that it can be made.

    Raises:
        ValueError: naming the option.
    """
    path = disk.expand_user(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} is {path}, a file; name a folder")
    _check_writable(option, path / "any")
    return path


def _check_writable(option: str, path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} is {path}, and nothing can be written in {folder} ({error.strerror}); choose another place"
        ) from None
