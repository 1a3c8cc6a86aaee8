"""How well a model composes: figures, and what they stand beside."""

import json

import pytest
import torch

from ldm.data.scenes import SceneSampler, load_catalog
from ldm.evaluation.composition import (
    AXES,
    IMAGES_PER_PROMPT,
    axis_accuracy,
    axis_prompts,
    evaluate_composition,
    measure_axis,
    real_scenes,
    reconstruct,
)
from ldm.evaluation.scene_classifier import SceneClassifier, SceneClassifierConfig, SceneClassifierNetwork
from tests import tiny


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    things = tuple(thing.name for thing in load_catalog().things if thing.tier == 1)
    config = SceneClassifierConfig(things=things, widths=(8, 16, 32), query=16, blocks=(0, 1))
    return SceneClassifier(config, SceneClassifierNetwork(config))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), num_inference_steps=1, guidance_scale=1.0)


def test_every_axis_is_measured_and_said_as_json(pipeline, classifier):
    found = evaluate_composition(pipeline, classifier, max_prompts=2, scenes_seen=40)
    assert [part.axis for part in found.parts] == list(AXES)
    for part in found.parts:
        assert (
            part.images.shape[0] == part.real.shape[0] == IMAGES_PER_PROMPT * len(part.prompts) == 2 * IMAGES_PER_PROMPT
        )
        for accuracy in part.accuracies:
            assert 0 <= accuracy.generated.low <= accuracy.generated.mean <= accuracy.generated.high <= 1
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["axes"]["relation"]["figures"][-1]["what"] == "right"
    assert len(content["axes"]["color"]["prompts"][0]["right"]["color"]) == IMAGES_PER_PROMPT
    assert content["nearest"]["seen"] == [40, 40] and content["judge"] == classifier.digest
    assert 0 <= content["nearest"]["nearer"]["mean"] <= 1
    again = evaluate_composition(pipeline, classifier, max_prompts=2, axes=("color",))
    assert torch.equal(again.parts[0].images, found.parts[AXES.index("color")].images) and again.nearest is None


def test_a_model_that_drew_real_scenes_has_all_that_is_read_of_them(pipeline, classifier):
    asked = axis_prompts("color", 3, 0, SceneSampler(load_catalog()))
    scenes = real_scenes(asked, 64, 0)
    assert len({scenes[place].numpy().tobytes() for place in range(len(scenes))}) > 2 * len(asked)
    part = measure_axis("color", asked, reconstruct(pipeline.codec, scenes), pipeline.codec, classifier, 0)
    for accuracy in part.accuracies:
        assert accuracy.generated == accuracy.real and (accuracy.ratio is None or accuracy.ratio.mean == 1)


def test_a_figure_is_a_share_of_what_is_read_of_real_scenes():
    yes, no = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    half = torch.tensor([True, False]).repeat(20)
    accuracy = axis_accuracy("color", "right", half, yes, yes, 0)
    assert accuracy.generated.mean == accuracy.ratio.mean == accuracy.ratio.low == 0.5 and accuracy.real.mean == 1
    assert axis_accuracy("color", "right", half, half, yes, 0).ratio.mean == 1
    assert axis_accuracy("color", "right", half, no, yes, 0).ratio is None
    mixed = torch.arange(40) < 20  # all pictures of one half of the prompts
    wide = axis_accuracy("color", "right", mixed, yes, yes, 0)
    assert wide.ratio.low < 0.35 and wide.generated.low < accuracy.generated.low


def test_what_cannot_be_measured_is_said(pipeline, classifier):
    with pytest.raises(ValueError, match="0 prompts"):
        evaluate_composition(pipeline, classifier, max_prompts=0)
    with pytest.raises(ValueError, match="common things"):
        evaluate_composition(pipeline, classifier, tier=2, max_prompts=1)
