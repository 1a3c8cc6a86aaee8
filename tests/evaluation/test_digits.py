"""The reader of digits: right on real held-out scans, and not fooled by wrong pictures."""

import pytest

from ldm.data import DataConfig, split
from ldm.data.layouts import open_source
from ldm.evaluation.prompt_alignment import DigitClassifier, digit_of
from tests import tiny
from tools.demo import generate_digits


@pytest.fixture(scope="module")
def scans():
    return split(open_source(DataConfig(path="digits", resolution=8)).samples, 0.1)


@pytest.fixture(scope="module")
def reader(scans):
    return DigitClassifier.fit(scans[0])


def test_held_out_scans_are_read_at_any_size(scans, reader):
    digits = [digit_of(sample) for sample in scans[1]]
    pictures = [sample.load() for sample in scans[1]]
    assert reader.accuracy(pictures, digits) >= 0.97
    assert reader.accuracy([picture.resize((32, 32), 3) for picture in pictures], digits) >= 0.97


def test_wrong_answers_count(scans, reader):
    pictures = [sample.load() for sample in scans[1]]
    wrong = [(digit_of(sample) + 1) % 10 for sample in scans[1]]
    assert reader.accuracy(pictures, wrong) < 0.02


def test_labels_are_those_of_scikit_learn(scans):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for sample in (*scans[0][:50], *scans[1][:50]):
        assert digit_of(sample) == target[int(sample.id.rpartition("/")[2])]


@pytest.mark.filterwarnings("ignore::ldm.text.encoder.CutPromptWarning")
def test_every_digit_is_drawn_with_its_own_seeds(tmp_path):
    pipeline = tiny.pipeline(tmp_path)
    pictures, digits = generate_digits(pipeline, 2, num_inference_steps=2, batch_size=7)
    assert digits == [digit for digit in range(10) for _ in range(2)]
    alone = pipeline("a handwritten 3", seed=7, num_inference_steps=2).images[0]  # the second phrasing of 3
    assert pictures[7].tobytes() == alone.tobytes()
