"""The scene classifier: saving, loading, predictions."""

import dataclasses

import pytest
import torch

from ldm.data import generator
from ldm.data.scenes import SceneSampler, load_catalog
from ldm.evaluation.scene_classifier import (
    FOLDER,
    SceneClassifier,
    SceneClassifierConfig,
    SceneClassifierNetwork,
    box_of,
    load_scene_classifier,
    peaks,
)

THINGS = tuple(thing.name for thing in load_catalog().things if thing.tier == 1)
TINY = SceneClassifierConfig(things=THINGS, widths=(8, 16, 32), query=16, blocks=(0, 1))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return SceneClassifier(TINY, SceneClassifierNetwork(TINY))


def pictures(count):
    return torch.from_numpy(generator(0, "noise").integers(0, 256, (count, 3, 64, 64)).astype("uint8"))


def test_saving_and_loading(tiny, tmp_path):
    tiny.save(tmp_path / "classifier")
    again = SceneClassifier.load(tmp_path / "classifier")
    assert again.config == tiny.config
    asked = [("cat", "dog"), ("car",), ()]
    one, other = tiny.predict(pictures(3), asked), again.predict(pictures(3), asked)
    assert [len(prediction.detections) for prediction in other] == [2, 1, 0] and all(
        len(prediction.top_things) == 5 for prediction in other
    )
    assert [prediction.count for prediction in one] == [prediction.count for prediction in other]
    assert again.digest != tiny.digest  # half precision
    assert SceneClassifier.load(tmp_path / "classifier").digest == again.digest
    assert len(tiny.predict(pictures(1)[..., :32, :32], [("cat",)])) == 1  # any size is brought to 64


def test_the_five_first_have_the_ranks_one_to_five(tiny):
    (prediction,) = tiny.predict(pictures(1), [THINGS])
    ranks = {name: detection.rank for name, detection in zip(THINGS, prediction.detections, strict=True)}
    assert [ranks[name] for name in prediction.top_things] == [1, 2, 3, 4, 5]
    assert sorted(ranks.values()) == list(range(1, len(THINGS) + 1))


def test_errors_name_the_folder_and_the_thing(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"no scene classifier in .*none"):
        SceneClassifier.load(tmp_path / "none")
    with pytest.raises(ValueError, match='"unheard of"'):
        tiny.predict(pictures(1), [("unheard of",)])
    other = dataclasses.replace(TINY, things=("unheard of", *THINGS[1:]))
    SceneClassifier(other, SceneClassifierNetwork(other)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="other things than the catalog"):
        SceneClassifier.load(tmp_path / "other")


def test_peaks_are_the_highest_among_their_neighbors():
    center = torch.zeros(1, 8, 8)
    center[0, 1, 1], center[0, 1, 2], center[0, 6, 6], center[0, 4, 0] = 0.9, 0.8, 0.5, 0.3
    assert peaks(center, 0.4).nonzero().tolist() == [[0, 1, 1], [0, 6, 6]]


def test_a_box_is_around_its_center():
    assert box_of(8 * 2 + 4, [0.5, 0.5, 0.25, 0.5]) == (0.5625 - 0.125, 0.3125 - 0.25, 0.5625 + 0.125, 0.3125 + 0.25)


@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="there is no classifier yet")
def test_the_shipped_classifier_on_real_scenes():
    from ldm.evaluation.composition import IMAGES_PER_PROMPT, axis_prompts, correctness, real_scenes

    asked = axis_prompts("one thing", 25, 1, SceneSampler(load_catalog()))
    predictions = load_scene_classifier().predict(
        real_scenes(asked, 64, 1), [prompt.things for prompt in asked for _ in range(IMAGES_PER_PROMPT)]
    )
    good = [
        correctness(asked[place // IMAGES_PER_PROMPT], prediction)["top 5"]
        for place, prediction in enumerate(predictions)
    ]
    assert sum(good) > 0.85 * len(good)
