"""How fast the cache of encoded data is built and read, and that its memory does not grow with the data.

python tools/benchmark_cache.py --entries 10000 100000

Synthetic rows of 2×8×16×16 float32 (16 KiB: both flips of a 128-pixel image with four latent channels at factor 8), in
shards as training writes them. Each size is built in one process and opened and read by another, whose resident memory
is that of /proc/self/status (Linux): anonymous memory, and pages of files that are mapped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ldm.data.cache import RowCache
from ldm.training.latents import SHARD_ROWS

SHAPE = (2, 8, 16, 16)
BATCH = 128
BATCHES = 400


def keys(start: int, end: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(start, end)]


def row(index: int) -> torch.Tensor:
    """Numbers that tell which row it is, to see that reading finds the right ones."""
    return torch.full(SHAPE, float(index))


def memory() -> dict[str, float]:
    """Resident MiB of this process: anonymous, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[field].split()[0]) / 1024 for name, field in (("anonymous", "RssAnon"), ("files", "RssFile"))
    }


def build(folder: Path, entries: int) -> dict[str, float]:
    store = RowCache(folder / "moments" / "synthetic")
    started, before = time.perf_counter(), memory()["anonymous"]
    for start in range(0, entries, SHARD_ROWS):
        end = min(start + SHARD_ROWS, entries)
        store.add(keys(start, end), torch.stack([row(i) for i in range(start, end)]), entries - end)
    seconds = time.perf_counter() - started
    return {"rows/s": entries / seconds, "anonymous MiB more": memory()["anonymous"] - before}


def read(folder: Path, entries: int) -> dict[str, float]:
    every = keys(0, entries)
    before = memory()
    started = time.perf_counter()
    store = RowCache(folder / "moments" / "synthetic")
    assert store.missing(every) == []
    rows = store.open(every)
    opened, at_open = time.perf_counter() - started, memory()
    del store
    order = np.random.default_rng(0).integers(entries, size=(BATCHES, BATCH))
    started = time.perf_counter()
    for batch in order:
        found = rows[batch]
        assert (found[:, 0, 0, 0, 0].numpy() == batch).all()
    seconds = time.perf_counter() - started
    after = memory()
    return {
        "opening s": opened,
        "rows/s": BATCHES * BATCH / seconds,
        "ms a batch": 1000 * seconds / BATCHES,
        "anonymous MiB before": before["anonymous"],
        "anonymous MiB open": at_open["anonymous"],
        "anonymous MiB after": after["anonymous"],
        "mapped MiB before": before["files"],
        "mapped MiB after": after["files"],
        "open files": float(len(os.listdir("/proc/self/fd"))),
    }


def in_process(phase: str, folder: Path, entries: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder), "--entries", str(entries)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(printed)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where to build; by default the folder of temporary files")
    parser.add_argument("--phase", choices=("build", "read"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        phase = {"build": build, "read": read}[arguments.phase]
        print(json.dumps(phase(arguments.folder, arguments.entries[0])))
        return
    for entries in arguments.entries:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="ldm-benchmark-") as folder:
            for phase in ("build", "read"):
                figures = in_process(phase, Path(folder), entries)
                print(f"{entries:,} entries, {phase}: " + ", ".join(f"{k} {v:,.2f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
