"""Steps that are skipped because a loss or gradient is not finite, and their samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm import disk
from ldm.data import CaptionedImages
from ldm.data.captions import printable
from ldm.training.distributed import StepResult

MAX_NAMES = 4


def nonfinite_samples(
    images: CaptionedImages, positions: Sequence[tuple[int, int]], losses: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """The samples of a step with a non-finite loss; all samples if only the gradient was not finite.

    Args:
        positions: (epoch, index) of each sample of the global batch.
        losses: (loss, timestep or −1) of each, in the same order.
    """
    nonfinite: list[dict[str, Any]] = []
    finite: list[dict[str, Any]] = []
    for (epoch, index), (loss, timestep) in zip(positions, losses, strict=True):
        entry: dict[str, Any] = {"id": images.sample_at(epoch, index).id, "epoch": epoch}
        entry["caption"] = images.caption_at(epoch, index)
        if timestep >= 0:
            entry["timestep"] = int(timestep)
        (finite if math.isfinite(loss) else nonfinite).append(entry | {"loss": str(loss)})
    return nonfinite or finite


def log_skipped_step(path: Path, step: int, result: StepResult, samples: Sequence[dict[str, Any]]) -> str:
    """Append a skipped step to `path` as a line of JSON; returns a message about it."""
    figures = {"loss": str(result.loss), "gradient_norm": str(result.gradient_norm)}
    figures |= {name: str(value) for name, value in result.figures.items()}
    wrong = [f", {name} {value}" for name, value in result.figures.items() if not math.isfinite(value)]
    disk.append_line(path, json.dumps({"step": step} | figures | {"samples": list(samples)}))
    names = [
        f"{entry['id']}" + (f" at t = {entry['timestep']}" if "timestep" in entry else "")
        for entry in samples[:MAX_NAMES]
    ]
    more = f" and {len(samples) - MAX_NAMES} more" if len(samples) > MAX_NAMES else ""
    return printable(
        f"step {step} was skipped: its loss is {result.loss} and its gradient norm {result.gradient_norm}"
        f"{''.join(wrong)} ({', '.join(names)}{more}); weights, optimizer and EMA are unchanged"
    )
