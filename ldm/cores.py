"""How many cores this process may use, which can be fewer than the machine has."""

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
