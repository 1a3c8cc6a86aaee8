"""Going on with a run: whether config, data and machine are still what it was, and what its log keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ldm import checkpoint, disk
from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, to_yaml
from ldm.data import CaptionedImages
from ldm.data.captions import printable
from ldm.training.environment import changed_keys
from ldm.training.files import flatten, log_step

# What may differ when a run is resumed: which samples a step sees, and with which noise, stays the same. That the data
# under another path is the same data, the hashes of its samples say.
IGNORED_KEYS = (
    *("output_dir", "train.max_steps", "train.log_every", "train.validate_every", "train.validation_samples"),
    *("train.sample_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints"),
    *("train.cooldown_steps", "train.keep_every", "train.num_workers", "train.max_nonfinite_steps", "sample."),
    *("train.evaluate_every", "train.evaluation_samples", "train.evaluation_features"),
    *("train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.attention", "train.cpu_threads"),
    *("data.path", "data.cache_dir"),
)
MAX_NAMES = 5

Differences = dict[str, tuple[Any, Any]]
"""Key → (what it was, what it is)."""


def find_differences(
    config: LDMConfig | AutoencoderTrainingConfig, present: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> Differences:
    """In what config and environment differ from those of the checkpoint `folder`, where that changes its meaning.

    Args:
        present: the environment of this process.
    """
    state = checkpoint.read_json(folder / "training" / "state.json")
    stored = state["config"]
    if config.train.lr_schedule == "cosine" and stored["train"]["max_steps"] != config.train.max_steps:
        say(
            f"train.max_steps was {stored['train']['max_steps']} and is {config.train.max_steps}: the cosine of the "
            "learning rate is stretched to it from here on"
        )
    begun = stored["train"]["max_steps"] - stored["train"].get("cooldown_steps", 0)
    falls = any(stored["train"].get(key, 0) != getattr(config.train, key) for key in ("max_steps", "cooldown_steps"))
    if falls and begun < state["step"]:
        say("the learning rate was cooling down already; from here on it is as the config says now")
    before = state.get("environment", {})
    if before and before["processes"] != present["processes"]:
        say(
            f"the run had {before['processes']} processes and has {present['processes']}: it sees the same samples and "
            "noise, and sums are rounded otherwise"
        )
    return config_differences(stored, config, str(folder)) | changed_keys(before, dict(present))


def stored_threads(folder: Path, processes: int) -> int | None:
    """The threads with which the run of a checkpoint computed; None on a GPU, and with another number of processes."""
    before = checkpoint.read_json(folder / "training" / "state.json").get("environment", {})
    threads: int | None = before.get("threads") if before.get("processes") == processes else None
    return threads


def config_differences(
    stored: dict[str, Any], config: LDMConfig | AutoencoderTrainingConfig, where: str
) -> Differences:
    """The keys in which a stored config means another run."""
    kind: Any = type(config)
    with suppress(ValueError):  # keys that are newer than the run stood at their defaults
        stored = yaml.safe_load(to_yaml(parse_config(stored, kind, where)))
    then, now = flatten(stored), flatten(yaml.safe_load(to_yaml(config)))
    found = {}
    for key in sorted(then.keys() | now.keys()):
        open_still = now.get("space") == "auto" and key in ("space", "first_stage")  # see `Run.settle`
        if then.get(key) != now.get(key) and not key.startswith(IGNORED_KEYS) and not open_still:
            found[key] = (then.get(key), now.get(key))
    return found


def check_compatible(found: Differences, accept: Iterable[str], folder: Path, say: Callable[[str], None]) -> None:
    """Refuses to go on from a checkpoint under other conditions than those that were accepted one by one.

    Raises:
        ValueError: naming each key, what it was and what it is.
    """
    accepted = set(accept)
    shown = {key: f"{key}: {_shown(then)} → {_shown(now)}" for key, (then, now) in found.items()}
    refused = [key for key in found if key not in accepted]
    if refused:
        raise ValueError(
            f"{folder} was made under other conditions ({'; '.join(shown[key] for key in refused)}); restore them, "
            f"accept them with --accept {' '.join(refused)}, or start a new run in another output_dir"
        )
    for key in found:
        say(f"accepted: {shown[key]}")


def _shown(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}…"


# ---- the data


def sample_fingerprints(images: CaptionedImages, held_out: CaptionedImages | None) -> dict[str, str]:
    """Sample id → a hash of its picture's bytes and its captions."""
    samples = (*images.samples, *(held_out.samples if held_out else ()))
    return {sample.id: _hash(repr((sample.digest, sample.captions)))[:16] for sample in samples}


def data_fingerprint(images: CaptionedImages, held_out: CaptionedImages | None) -> str:
    """A hash of all that decides which pictures and captions a step sees, and what it is measured on."""
    sides = (images.samples, held_out.samples if held_out else ())
    text = repr([[(sample.id, sample.digest, sample.captions) for sample in samples] for samples in sides])
    if len(images.buckets.sizes) > 1:  # the order of batches follows from them
        text += repr((images.buckets.sizes, images.buckets.assignment))
    return _hash(text)


def data_differences(
    run: Path,
    stored: Mapping[str, Any],
    present: Mapping[str, Any],
    images: CaptionedImages,
    held_out: CaptionedImages | None,
) -> Differences:
    """{} if the data is what it was, or the one key `data` with a summary of both."""
    if stored == present:
        return {}
    then, now = f"{stored['samples']} images", f"{present['samples']} images"
    known = run / "fingerprints.json"
    if known.is_file():
        before, after = checkpoint.read_json(known), sample_fingerprints(images, held_out)
        groups = {
            "changed": [name for name in after if name in before and before[name] != after[name]],
            "new": [name for name in after if name not in before],
            "gone": [name for name in before if name not in after],
        }
        now += "".join(f", {len(names)} {kind} ({_some(names)})" for kind, names in groups.items() if names)
        if not any(groups.values()):
            now += ", in another order or with other aspect ratios"
    return {"data": (then, now)}


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MAX_NAMES])
    return shown + (", …" if len(names) > MAX_NAMES else "")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- the log


def logged_values(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure as often as it was logged, in the order of the log."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if log_step(line) is not None]
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def truncate_log(path: Path, step: int, *, again: Sequence[str]) -> None:
    """Drops what was logged after the step that is resumed, and half a line at the end.

    Args:
        again: how the names of figures begin that are about to be measured again at that step.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        at = log_step(line)
        repeated = at == step and any(f'"{name}' in line for name in again)
        if at is not None and at <= step and not repeated:
            kept.append(line)
    disk.write_text(path, "".join(f"{line}\n" for line in kept))
