"""Arguments of the command line: shared options, output paths, several values after one option."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from ldm import disk

# Options of several commands.
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps; the model's default otherwise.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale; the model's default otherwise.")]
ImageColumn = Annotated[str | None, typer.Option(help="The column with images; detected by default.")]
CaptionColumn = Annotated[str | None, typer.Option(help="The column with captions; detected by default.")]
CaptionSource = Annotated[str | None, typer.Option(help="Which source of captions to use, if several: docs/data.md.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, …; an accelerator by default if there is one.")]
HeldOut = Annotated[float, typer.Option(help="The fraction that training held out: data.held_out.")]
Samples = Annotated[int | None, typer.Option(help="Number of images, sampled by --seed; all by default.")]
Weights = Annotated[
    str | None, typer.Option(help="For --features inception or clip: a file, or open_clip's MODEL:TAG.")
]
Background = Annotated[str, typer.Option(help="Color behind transparent images.")]

T = TypeVar("T")


def options_of(kind: type[T], given: Mapping[str, Any]) -> T:
    """Options of a dataclass from the parameters of a command, those with names of its fields."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in names})


def print_json(content: Mapping[str, Any]) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


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
    """The file to write; checks that it can be written, before anything is computed. Raises ValueError naming the
    option.

    Args:
        kinds: allowed suffixes.
        what: what is written, and as what.
    """
    path = disk.expand_user(path)
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{option} is {path}; {what}, so let it end in {' or '.join(kinds)}")
    if path.is_dir():
        raise ValueError(f"{option} is {path}, a folder; name a file in it")
    _check_writable(option, path)
    return path


def output_folder(option: str, path: Path) -> Path:
    """The folder to write into; checks that it can be written. Raises ValueError naming the option."""
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
        why = f"nothing can be written in {folder} ({error.strerror})"
        raise ValueError(f"{option} is {path}, and {why}; choose another place") from None
