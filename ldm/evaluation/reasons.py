"""What a verdict stands on, in words: parts of one sentence, each empty where nothing was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ldm.evaluation.loss_gap import LossGap
from ldm.evaluation.standing import Standing

if TYPE_CHECKING:
    from ldm.evaluation.memorising import Copying


def counts(copying: Copying | None) -> str:
    """The numbers of the pictures, as the middle of a sentence."""
    if copying is None:
        return "copies were not looked for"
    share = copying.suspects
    held_out, left_out = copying.calibrated_on
    kinds = [f"{held_out} held-out images"] if held_out else []
    kinds += [f"{left_out} training images left out in turn"] if left_out else []
    own = f", of the held-out images {_percent(copying.held_out.share)}" if copying.held_out else ""
    return (
        f"{share.count} of {share.total} pictures ({_percent(share.share)}, 95 % interval {_percent(share.low)} to "
        f"{_percent(share.high)}) are as close to one training image as {_percent(copying.expected)} of unseen images "
        f"would be{own} (calibrated on {' and '.join(kinds)})"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def loss(gap: LossGap | None) -> str:
    """Where the loss on held-out images is furthest above that on training images."""
    if gap is None:
        return ""
    band = gap.widest()
    reach = "" if math.isnan(band.interval) else f" ± {band.interval:.2g}"
    return (
        f", and at timesteps {band.first} to {band.last} the loss is {band.training:.3g} on training and "
        f"{band.held_out:.3g} on held-out images (gap {band.gap:.2g}{reach})"
    )


def nearness(standing: Standing | None) -> str:
    """Precision and recall of the pictures, of unseen images and of all controls, and where captions led."""
    if standing is None:
        return ""
    drawn, real = standing.generated, standing.unseen
    controls = ", ".join(
        f"{name} {_percent(control.precision.mean)} and {_percent(control.recall.mean)}"
        for name, control in standing.controls.items()
    )
    ranks = " and ".join(
        f"{found.median.mean:g} of {found.gallery} for {side} captions (by chance {found.median_by_chance})"
        for side, found in standing.found.items()
    )
    repeated = f" ({drawn.distinct} of {drawn.samples} are different)" if drawn.distinct < drawn.samples else ""
    return (
        f", and their precision is {_percent(drawn.precision.mean)} and their recall {_percent(drawn.recall.mean)}"
        f"{repeated}, where unseen real images have {_percent(real.precision.mean)} and "
        f"{_percent(real.recall.mean)} ({controls}); the caption's own image has the median rank {ranks}"
    )
