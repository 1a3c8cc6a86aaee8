"""Names of the figures that an evaluation logs while a model trains: a name carries all that its number stands on."""

from __future__ import annotations

import re

PREFIX = "evaluation_"
VERDICT = "verdict"  # stands in a line of its own, as it is no number
_TITLES = {
    "frechet_ratio": "Fréchet distance over that of as many held-out images (1 is as good as real images)",
    "frechet": "Fréchet distance (lower is better)",
    "kid": "KID (lower is better)",
    "precision": "Precision: the share of pictures among the training images",
    "recall": "Recall: the share of training images among the pictures",
    "within_10_training": "Own image among the 10 nearest, training captions",
    "within_10_held_out": "Own image among the 10 nearest, held-out captions",
    "read_as_asked_training": "Read as the digit asked for, training captions",
    "read_as_asked_held_out": "Read as the digit asked for, held-out captions",
    "suspected_copies": "Suspected copies of training images (0.05 of unseen real images would be)",
}
_NAME = re.compile(rf"{PREFIX}({'|'.join(_TITLES)})(?:_(efficientnet|pixel))?_n(\d{{1,9}})", re.ASCII)


def name_of(figure: str, *, samples: int, features: str | None = None) -> str:
    """Such as "evaluation_kid_efficientnet_n128".

    Args:
        figure: a key of the table above.
        samples: N, the pictures that it was measured on.
        features: by which they were compared, where it depends on them.
    """
    name = PREFIX + figure + (f"_{features}" if features else "") + f"_n{samples}"
    assert _NAME.fullmatch(name), name
    return name


def title_of(name: str) -> str | None:
    """The name in words; None where it is of no evaluation."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    features = f", {match[2]} features" if match[2] else ""
    return f"{_TITLES[match[1]]}; {int(match[3]):,} pictures{features}"
