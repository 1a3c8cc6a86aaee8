"""The 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from ldm.data.rng import content_hash
from ldm.data.sources import Decoded, Sample, Source, require

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SIZE = (8, 8)

_PHRASINGS = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "{word}",
    "{numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "the number {word}",
    "the number {numeral}",
    "a scan of the number {word}",
    "a scan of the digit {numeral}",
)


def open_digits() -> Source:
    """Real 8×8 scans of handwritten digits: white strokes on black, as they are, 17 greys spread over 0..255.

    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), the test part, as scikit-learn
    packs it. Every scan has the same ten phrasings for its digit, in words and numerals, and is a group of
    its own.
    """
    require("digits", "sklearn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    samples = []
    for index, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        name = f"digits/{index:04d}"
        greys = np.rint(scan * (255 / 16)).astype(np.uint8)
        stored = greys.tobytes()
        captions = digit_captions(int(digit))
        samples.append(Sample(name, captions, name, partial(bytes, stored), _decode, content_hash(stored), SIZE))
    return Source("digits", tuple(samples), curated=True)


def digit_captions(digit: int) -> tuple[str, ...]:
    """All phrasings for a digit 0..9; the first is "a handwritten three"."""
    return tuple(phrasing.format(word=DIGIT_WORDS[digit], numeral=digit) for phrasing in _PHRASINGS)


def _decode(stored: bytes) -> Decoded:
    greys = np.frombuffer(stored, np.uint8).reshape(SIZE)
    return Decoded(Image.fromarray(greys).convert("RGB"), "", "L")
