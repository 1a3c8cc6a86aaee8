"""Where a run was started, for its relative paths are read from there ever after; and what goes on with it."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import checkpoint
from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.data.sources import BUILT_IN as BUILT_IN_DATA
from ldm.text.open_clip import PREFIX as OPEN_CLIP

START_FILE = "started.json"
# Keys that may hold a path; hub ids and the names of what is built in are no files.
PATHS = ("data.path", "data.cache_dir", "first_stage", "start_from", "text.encoder")


BUILT_IN_NAMES = {*BUILT_IN_DATA, *checkpoint.BUILT_IN, *checkpoint.BUILT_IN_PIPELINES, "minilm"}


def resume_command(run: Path) -> str:
    """What a person types to go on with a run."""
    return f"ldm train --resume {shlex.quote(str(run))}"


def record_start(run: Path, config: LDMConfig | AutoencoderTrainingConfig) -> None:
    """Writes down the working folder, and which keys of the config name files or folders relative to it."""
    given = {key: nested_value(dataclasses.asdict(config), key) for key in PATHS}
    local = {key: value for key, value in given.items() if is_relative_path(value, Path.cwd())}
    checkpoint.write_json(run / START_FILE, {"folder": os.getcwd(), "paths": local})


def base_folder(run: Path, content: Mapping[str, Any], overridden: Collection[str] = ()) -> Path:
    """The folder that the relative paths in a run's config are read from: where it was started, or if they are gone
    from there, the working folder.

    Args:
        content: of its config.
        overridden: keys that are given anew.

    Raises:
        ValueError: if a path of the run stands in neither.
    """
    here = Path.cwd()
    if not (run / START_FILE).is_file():  # of an older version
        return here
    known = checkpoint.read_json(run / START_FILE)
    then, paths = Path(known.get("folder", here)), known.get("paths", {})
    needed = {key: path for key, path in paths.items() if key not in overridden and nested_value(content, key) == path}
    if not needed or then == here:
        return here
    missing = [key for key, path in needed.items() if not is_relative_path(path, then)]
    if not missing:
        return then
    if all(is_relative_path(path, here) for path in needed.values()):
        return here
    raise ValueError(
        f"{missing[0]} of {run} is {needed[missing[0]]}, relative to {then}, where the run was started, and it is no "
        f"longer there; put it back, go to the folder where it is now, or name it with --set {missing[0]}=PATH"
    )


def with_absolute_paths(config: LDMConfig, run: Path) -> LDMConfig:
    """The config of a run with data and start model under absolute paths, where it was started in another folder.

    Raises:
        ValueError: as `base_of`.
    """
    base = base_folder(run, dataclasses.asdict(config), set(PATHS) - {"data.path", "start_from"})
    if base == Path.cwd():
        return config
    if is_relative_path(config.data.path, base):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(base / config.data.path)))
    if config.start_from is not None and is_relative_path(config.start_from, base):
        config = dataclasses.replace(config, start_from=str(base / config.start_from))
    return config


def is_relative_path(value: Any, folder: Path) -> bool:
    """Whether a value of the config is a path relative to `folder`, and there is something, or a first stage's run that
    will put it there.
    """
    if not isinstance(value, str) or not value or value in BUILT_IN_NAMES:
        return False
    path = value.split(":", 2)[-1] if value.startswith(OPEN_CLIP) else value
    if path.startswith("~") or Path(path).is_absolute():
        return False
    place = folder / path
    return place.exists() or (place.name == "autoencoder" and (place.parent / "config.yaml").is_file())


def nested_value(content: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key of a nested mapping; None where there is none."""
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Goes to another working folder for the time of the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
