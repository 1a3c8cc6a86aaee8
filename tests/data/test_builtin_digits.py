from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from ldm.data import CaptionedImages, DataConfig
from ldm.data.builtin import DIGIT_WORDS
from ldm.data.layouts import open_source

CONFIG = DataConfig(path="digits", resolution=8)


def test_all_scans_are_there_each_by_itself() -> None:
    source = open_source(CONFIG)
    assert len(source.samples) == 1797
    assert len({sample.id for sample in source.samples}) == len({sample.group for sample in source.samples}) == 1797
    assert (source.name, source.skipped, source.samples[1].id) == ("digits", (), "digits/0001")


def test_captions_name_their_digit_only() -> None:
    counts: Counter[int] = Counter()
    for sample, digit in zip(open_source(CONFIG).samples, load_digits().target, strict=True):
        word = DIGIT_WORDS[digit]
        assert sample.captions[0] == f"a handwritten {word}"
        assert {f"a handwritten {digit}", word, str(digit), f"the digit {digit}"} <= set(sample.captions)
        assert all((word in caption.split()) != (str(digit) in caption.split()) for caption in sample.captions)
        counts[digit] += 1
    assert sorted(counts) == list(range(10))
    assert min(counts.values()) >= 174


def test_digit_scans_are_exact_and_smooth_when_enlarged() -> None:
    samples = open_source(CONFIG).samples[:3]
    scan = load_digits().images[2]
    exact = CaptionedImages(samples, CONFIG, seed=0).image_at(2).numpy()
    assert np.array_equal(exact, np.broadcast_to(np.rint(scan * 255 / 16), (3, 8, 8)))
    assert (exact.min(), exact.max()) == (0, 255)
    large = CaptionedImages(samples, DataConfig(path="digits", resolution=32), seed=0).image_at(2).numpy()
    assert large.shape == (3, 32, 32)
    assert len(np.unique(large)) > 50  # nearest-neighbor copies would have at most 17 grays
    assert abs(float(large.mean()) - float(exact.mean())) < 6
