"""Going on with a run: which of its checkpoints, whether the config still means the same, what its log keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ldm import checkpoint
from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, to_yaml
from ldm.training.files import damage, flattened, step_of

# What may differ when a run is resumed: which samples a step sees, and with which noise, stays the same.
FREE_TO_CHANGE = (
    *("output_dir", "train.max_steps", "train.log_every", "train.validate_every", "train.validation_samples"),
    *("train.sample_every", "train.checkpoint_every", "train.keep_checkpoints", "train.num_workers", "sample."),
    *("train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.attention", "train.cpu_threads"),
    "data.cache_dir",
)


def checkpoints(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step_*") if (path / "manifest.json").is_file())


def newest_checkpoint(run: Path, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint whose files are those of its manifest, the newer ones that are damaged and were named).

    Raises:
        ValueError: if there are checkpoints but none is intact.
    """
    folders = checkpoints(run)
    damaged: list[Path] = []
    for folder in reversed(folders):
        wrong = damage(folder)
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


def check_config(config: LDMConfig | AutoencoderTrainingConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Refuses to go on from the checkpoint `folder` under a config that means another run.

    Raises:
        ValueError: naming the key, what it was and what it is.
    """
    content = checkpoint.read_json(folder / "training" / "state.json")["config"]
    kind: Any = type(config)
    with suppress(ValueError):  # keys that are newer than the checkpoint stood at their defaults
        content = yaml.safe_load(to_yaml(parse_config(content, kind, str(folder))))
    stored, present = flattened(content), flattened(yaml.safe_load(to_yaml(config)))
    if config.train.lr_schedule == "cosine" and stored["train.max_steps"] != config.train.max_steps:
        say(
            f"train.max_steps was {stored['train.max_steps']} and is {config.train.max_steps}: the cosine of the "
            "learning rate is stretched to it from here on"
        )
    for key in sorted(stored.keys() | present.keys()):
        open_still = present.get("space") == "auto" and key in ("space", "first_stage")  # see `Run.settle`
        if stored.get(key) != present.get(key) and not key.startswith(FREE_TO_CHANGE) and not open_still:
            raise ValueError(
                f"{key} is {present.get(key)!r} but {folder} was trained with {stored.get(key)!r}; "
                "resume with the same value, or start a new run in another output_dir"
            )


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure as often as it was logged, in the order of the log."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if step_of(line) is not None]
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def cut_log(run: Path, step: int) -> None:
    """Drops what was logged after the step that is resumed."""
    path = run / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if step_of(line) is not None and (step_of(line) or 0) <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
