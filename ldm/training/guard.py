"""Losses and gradients that are not finite: from which samples, and for how many steps in a row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm import disk
from ldm.data import CaptionedImages
from ldm.data.captions import printable

NAMES_SHOWN = 4


class Losses(NamedTuple):
    """Losses of the samples of a micro-batch.

    Attributes:
        values: [B] float32; their mean is what is minimised.
        timesteps: [B] int64, where there are such.
    """

    values: Tensor
    timesteps: Tensor | None = None


def suspects(
    images: CaptionedImages, positions: Sequence[tuple[int, int]], losses: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """The samples of a step whose loss is not finite; all of them where it was the gradient alone.

    Args:
        positions: (epoch, index) of the global batch, B of them.
        losses: loss and timestep (−1: none) of each, in the same order.
    """
    guilty: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for (epoch, index), (loss, timestep) in zip(positions, losses, strict=True):
        entry: dict[str, Any] = {"id": images.samples[index].id, "epoch": epoch}
        entry["caption"] = images.caption_at(epoch, index)
        if timestep >= 0:
            entry["timestep"] = int(timestep)
        (others if math.isfinite(loss) else guilty).append(entry | {"loss": str(loss)})
    return guilty or others


def line_of(step: int, loss: float, norm: float, samples: Sequence[dict[str, Any]]) -> str:
    """What is said of a step that was skipped."""
    names = [
        f"{entry['id']}" + (f" at t = {entry['timestep']}" if "timestep" in entry else "")
        for entry in samples[:NAMES_SHOWN]
    ]
    more = f" and {len(samples) - NAMES_SHOWN} more" if len(samples) > NAMES_SHOWN else ""
    return printable(
        f"step {step} was skipped: its loss is {loss} and its gradient norm {norm} ({', '.join(names)}{more}); "
        "weights, moments and average are as before"
    )


def note(path: Path, step: int, loss: float, norm: float, samples: Sequence[dict[str, Any]]) -> None:
    """Appends a line of JSON with all of it."""
    entry = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "samples": list(samples)}
    disk.append_line(path, json.dumps(entry))
