"""An evaluation in words, for the terminal and for the top of its page."""

from __future__ import annotations

import math

from ldm.evaluation.evaluate import Evaluation
from ldm.evaluation.loss_gap import LossGap

INDENT = "  "


def said(evaluation: Evaluation) -> list[str]:
    """A short account: what was asked, the verdict, and each figure with what it stands on."""
    lines = [asked_for(evaluation), "", "Verdict", INDENT + evaluation.verdict.sentence]
    if evaluation.copies is not None:
        lines.append(INDENT + copies(evaluation))
    if evaluation.gap is not None:
        lines += [INDENT + line for line in gap_table(evaluation.gap)]
    if evaluation.quality is not None:
        lines += ["", "How near to real images (brackets: 95 % intervals)"]
        lines += [INDENT + line for line in evaluation.quality.lines()]
    lines += ["", "Does it draw what the text says"]
    for side in evaluation.found:
        lines += [f"{INDENT}{side} captions", *(2 * INDENT + line for line in faithfulness(evaluation, side))]
    if evaluation.left_out:
        lines += ["", *evaluation.left_out]
    return lines


def asked_for(evaluation: Evaluation) -> str:
    """How many pictures there are, and how they were drawn."""
    settings = evaluation.settings
    counts = " and ".join(f"{count:,} of {side} captions" for side, count in settings["samples"].items())
    width, height = settings["size"]
    return (
        f"{sum(settings['samples'].values()):,} pictures of {width}x{height} pixels ({counts}): "
        f"{settings['num_inference_steps']} steps of {settings['sampler']}, guidance {settings['guidance_scale']:g}, "
        f"seed {settings['seed']}"
    )


def faithfulness(evaluation: Evaluation, side: str) -> list[str]:
    """All that was measured of the pictures of one side's captions."""
    lines = evaluation.found[side].lines(evaluation.settings["features"])
    if (read := evaluation.read.get(side)) is not None:
        lines.append(
            f"read as the digit asked for {100 * read.mean:5.1f} %  ({100 * read.low:.1f} to {100 * read.high:.1f}; by "
            "chance 10 %)"
        )
    if (score := evaluation.clip.get(side)) is not None:
        lines += score.lines()
    return lines


def copies(evaluation: Evaluation) -> str:
    """How often pictures are closer to a training image than training images are to each other."""
    found = evaluation.copies
    assert found is not None
    held_out = ""
    if found.held_out_closer is not None:
        held_out = f"; of {found.held_out_closer.total} held-out images {100 * found.held_out_closer.share:.1f} %"
    share = found.closer
    return (
        f"closer to a training image than that is to any other: {100 * share.share:.1f} % of {share.total} pictures of "
        f"training captions ({100 * share.low:.1f} to {100 * share.high:.1f}){held_out}"
    )


def gap_table(gap: LossGap) -> list[str]:
    """The loss of both sides, a line a band of noise."""
    lines = [
        f"loss by noise (t), {gap.training_images} training and {gap.held_out_images} held-out images, {gap.draws} "
        "looks each:",
        f"{INDENT}{'t':>9}  {'training':>9}  {'held-out':>9}  {'gap':>9}",
    ]
    for band in gap.bands:
        reach = "" if math.isnan(band.interval) else f" ± {band.interval:.4f}"
        span = f"{band.first}-{band.last}"
        lines.append(f"{INDENT}{span:>9}  {band.training:9.4f}  {band.held_out:9.4f}  {band.gap:+9.4f}{reach}")
    return lines
