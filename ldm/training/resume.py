"""Resuming a run: comparing config, environment and data with the checkpoint, and truncating the log."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm import disk, hub
from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, to_yaml
from ldm.data import CaptionedImages
from ldm.progress import printable

# Config keys that may change on resume: they do not change which samples and noise a step sees. Whether the data is the
# same follows from the hashes of its samples, not from its path.
IGNORED_KEYS = (
    *("output_dir", "train.max_steps", "train.log_every", "train.validate_every", "train.validation_samples"),
    *("train.sample_every", "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints"),
    *("train.cooldown_steps", "train.keep_every", "train.num_workers", "train.max_nonfinite_steps", "sample."),
    *("train.evaluate_every", "train.evaluation_samples", "train.evaluation_features"),
    "train.final_weights",
    *("train.gradient_accumulation_steps", "train.gradient_checkpointing", "train.attention", "train.cpu_threads"),
    *("data.path", "data.cache_dir"),
)
MAX_NAMES = 5
# Names in metrics.jsonl: of metrics of generated images, and of their verdict, which is no number.
EVALUATION_PREFIX, VERDICT = "evaluation_", "verdict"
# Packages that compute what a network sees or learns.
PACKAGES = ("torch", "numpy", "pillow", "transformers", "accelerate")
PACKAGE = Path(__file__).parents[1]

Differences = dict[str, tuple[Any, Any]]
"""Key → (stored value, present value)."""


def find_differences(
    config: LDMConfig | AutoencoderTrainingConfig,
    environment: Mapping[str, Any],
    stored: Mapping[str, Any],
    log: Callable[[str], None],
) -> Differences:
    """Differences of config and environment (`describe_environment`) from those of a checkpoint (`stored`, its
    state.json) that change the run.
    """
    train, then = config.train, stored["config"]["train"]
    if train.lr_schedule == "cosine" and then["max_steps"] != train.max_steps:
        log(
            f"train.max_steps was {then['max_steps']} and is {train.max_steps}: the cosine learning rate schedule is "
            "stretched from here on"
        )
    changed = any(then.get(key, 0) != getattr(train, key) for key in ("max_steps", "cooldown_steps"))
    if changed and then["max_steps"] - then.get("cooldown_steps", 0) < stored["step"]:
        log("the learning rate was already cooling down; from here on it follows the present config")
    before = stored.get("environment", {})
    # The number of processes may change, and with it the threads of each. The commit is covered by the code hash.
    ignored = {"commit", "processes"}
    if before.get("processes") != environment["processes"]:
        ignored.add("threads")
        if before:
            log(
                f"the run had {before['processes']} processes and has {environment['processes']}: samples and noise "
                "are the same, sums are rounded differently"
            )
    return config_differences(stored["config"], config) | {
        key: (before[key], value)
        for key, value in environment.items()
        if key in before and key not in ignored and before[key] != value
    }


def config_differences(stored: dict[str, Any], config: LDMConfig | AutoencoderTrainingConfig) -> Differences:
    """The keys in which a stored config describes another run."""
    kind: Any = type(config)
    with suppress(ValueError):  # fills in defaults of keys that are newer than the run
        stored = yaml.safe_load(to_yaml(parse_config(stored, kind, "")))
    then, now = flatten(stored), flatten(yaml.safe_load(to_yaml(config)))
    found = {}
    for key in sorted(then.keys() | now.keys()):
        undecided = then.get("space") == "auto" and key in ("space", "first_stage")  # of a run that never began
        if then.get(key) != now.get(key) and not key.startswith(IGNORED_KEYS) and not undecided:
            found[key] = (then.get(key), now.get(key))
    return found


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_compatible(differences: Differences, accept: Iterable[str], folder: Path, log: Callable[[str], None]) -> None:
    """Reject differences from a checkpoint that are not in `accept`. Raises ValueError with each key, its stored and
    its present value.
    """

    def shorten(value: Any) -> str:
        text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return text if len(text) <= 80 else f"{text[:77]}…"

    accepted = set(accept)
    lines = {key: f"{key}: {shorten(then)} → {shorten(now)}" for key, (then, now) in differences.items()}
    rejected = [key for key in differences if key not in accepted]
    if rejected:
        raise ValueError(
            f"{folder} was made under other conditions ({'; '.join(lines[key] for key in rejected)}); restore them, "
            f"accept them with --accept {' '.join(rejected)}, or start a new run in another output_dir"
        )
    for line in lines.values():
        log(f"accepted: {line}")


# ---- the environment


def describe_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, code hash, device, processes and threads: what the bits of a run depend on besides config and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if name == "cpu":
        name = platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
        except OSError:
            name = platform.processor() or name
    return {
        "versions.python": platform.python_version(),
        **{f"versions.{name}": version(name) for name in PACKAGES},
        "code": code_digest(),
        "commit": commit(),
        "device": name,
        "processes": processes,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


@cache
def code_digest() -> str:
    """Hash of the source of this package and of train/, 12 hex digits."""
    digest = hashlib.sha256()
    for folder in (PACKAGE, PACKAGE.parent / "train"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(PACKAGE.parent).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str | None:
    """The checked-out commit, with a plus if files differ from it; None outside a repository."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    outputs = []
    try:
        for arguments in ("rev-parse HEAD", "status --porcelain --untracked-files=no"):
            command = ["git", "-C", str(PACKAGE.parent), *arguments.split()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            outputs.append(done.stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None
    return outputs[0] + ("+" if outputs[1] else "")


# ---- the data


def sample_fingerprints(images: CaptionedImages, held_out: CaptionedImages | None) -> dict[str, str]:
    """Sample id → hash of its image bytes and captions."""
    samples = (*images.samples, *(held_out.samples if held_out else ()))
    return {sample.id: _sha256(repr((sample.digest, sample.captions)))[:16] for sample in samples}


def data_fingerprint(images: CaptionedImages, held_out: CaptionedImages | None) -> str:
    """Hash of everything that decides which images and captions a step sees, and what it is validated on."""
    splits = (images.samples, held_out.samples if held_out else ())
    text = repr([[(sample.id, sample.digest, sample.captions) for sample in samples] for samples in splits])
    if len(images.buckets.sizes) > 1:  # the order of batches depends on them
        text += repr((images.buckets.sizes, images.buckets.assignment))
    return _sha256(text)


def data_differences(
    run: Path,
    stored: Mapping[str, Any],
    present: Mapping[str, Any],
    images: CaptionedImages,
    held_out: CaptionedImages | None,
) -> Differences:
    """{} for the same data, otherwise the one key `data` with a summary of both."""
    if stored == present:
        return {}
    then, now = f"{stored['samples']} images", f"{present['samples']} images"
    path = run / "fingerprints.json"
    if path.is_file():
        before, after = hub.read_json(path), sample_fingerprints(images, held_out)
        groups = {
            "changed": [name for name in after if name in before and before[name] != after[name]],
            "new": [name for name in after if name not in before],
            "gone": [name for name in before if name not in after],
        }
        for kind, names in groups.items():
            if names:
                first = ", ".join([*map(printable, names[:MAX_NAMES]), *(["…"] if len(names) > MAX_NAMES else [])])
                now += f", {len(names)} {kind} ({first})"
        if not any(groups.values()):
            now += ", in another order or with other aspect ratios"
    return {"data": (then, now)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---- the log


def log_step(line: str) -> int | None:
    """The step of a log line; None for a line that was cut short when the run was killed."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def logged_values(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of each logged value of a figure, in order."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if log_step(line) is not None]
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def truncate_log(path: Path, step: int, *, repeated: Sequence[str]) -> None:
    """Drop what was logged after the resumed step, and an incomplete last line.

    Args:
        repeated: prefixes of figures that will be measured again at that step, and are dropped too.
    """
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        at = log_step(line)
        is_repeated = at == step and any(f'"{name}' in line for name in repeated)
        if at is not None and at <= step and not is_repeated:
            lines.append(line)
    disk.write_text(path, "".join(f"{line}\n" for line in lines))
