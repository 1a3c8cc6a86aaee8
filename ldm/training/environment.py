"""What the bits of a run depend on besides its config and data: versions, code, machine, threads."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Those that compute what a network sees or learns.
PACKAGES = ("torch", "numpy", "pillow", "transformers", "accelerate")
PACKAGE = Path(__file__).parents[1]


def describe_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """A flat record; `Run` stores it with each checkpoint and compares it when it goes on."""
    return {
        "versions.python": platform.python_version(),
        **{f"versions.{name}": version(name) for name in PACKAGES},
        "code": code_digest(),
        "commit": commit(),
        "device": _name_of(device),
        "processes": processes,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def changed_keys(stored: dict[str, Any], present: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key → (then, now) of all that may change what a step computes.

    Another number of processes is meant to be possible, and changes the threads of each; the commit is that of the
    code, which is compared itself.
    """
    free = {"commit", "processes"}
    if stored.get("processes") != present["processes"]:
        free.add("threads")
    return {
        key: (stored[key], value)
        for key, value in present.items()
        if key in stored and key not in free and stored[key] != value
    }


@cache
def code_digest() -> str:
    """A hash of the source of this package and of the scripts beside it, the first 12 digits."""
    digest = hashlib.sha256()
    for folder in (PACKAGE, PACKAGE.parent / "train"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(PACKAGE.parent).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str | None:
    """The commit that is checked out, with a plus where files differ from it; None outside a repository."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        asked = [_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    except (OSError, subprocess.SubprocessError):
        return None
    return asked[0] + ("+" if asked[1] else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
