"""How well a model composes: figures, and what they stand beside."""

import json

import pytest
import torch

from ldm.data.scenes.catalog import load_catalog
from ldm.data.scenes.scene import SceneSampler
from ldm.evaluation.axes import AXES, axis_prompts
from ldm.evaluation.composition import EACH, compose, figure_of, part_of, real_scenes, through
from ldm.evaluation.judge import Judge, JudgeConfig, JudgeNetwork
from tests import tiny


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    things = tuple(thing.name for thing in load_catalog().things if thing.tier == 1)
    config = JudgeConfig(things=things, widths=(8, 16, 32), query=16, blocks=(0, 1))
    return Judge(config, JudgeNetwork(config))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("parts"), num_inference_steps=1, guidance_scale=1.0)


def test_every_axis_is_measured_and_said_as_json(pipeline, judge):
    found = compose(pipeline, judge, count=2, seen=40)
    assert [part.axis for part in found.parts] == list(AXES)
    for part in found.parts:
        assert part.pictures.shape[0] == part.real.shape[0] == EACH * len(part.prompts) == 2 * EACH
        for figure in part.figures:
            assert 0 <= figure.generated.low <= figure.generated.mean <= figure.generated.high <= 1
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["axes"]["relation"]["figures"][-1]["what"] == "right"
    assert len(content["axes"]["color"]["prompts"][0]["right"]["color"]) == EACH
    assert content["nearest"]["seen"] == [40, 40] and content["judge"] == judge.digest
    assert 0 <= content["nearest"]["nearer"]["mean"] <= 1
    again = compose(pipeline, judge, count=2, axes=("color",))
    assert torch.equal(again.parts[0].pictures, found.parts[AXES.index("color")].pictures) and again.nearest is None


def test_a_model_that_drew_real_scenes_has_all_that_is_read_of_them(pipeline, judge):
    asked = axis_prompts("color", 3, 0, SceneSampler(load_catalog()))
    scenes = real_scenes(asked, 64, 0)
    assert len({scenes[place].numpy().tobytes() for place in range(len(scenes))}) > 2 * len(asked)
    part = part_of("color", asked, through(pipeline.codec, scenes), pipeline.codec, judge, 0)
    for figure in part.figures:
        assert figure.generated == figure.real and (figure.ratio is None or figure.ratio.mean == 1)


def test_a_figure_is_a_share_of_what_is_read_of_real_scenes():
    yes, no = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    half = torch.tensor([True, False]).repeat(20)
    figure = figure_of("color", "right", half, yes, yes, 0)
    assert figure.generated.mean == figure.ratio.mean == figure.ratio.low == 0.5 and figure.real.mean == 1
    assert figure_of("color", "right", half, half, yes, 0).ratio.mean == 1
    assert figure_of("color", "right", half, no, yes, 0).ratio is None
    mixed = torch.arange(40) < 20  # all pictures of one half of the prompts
    wide = figure_of("color", "right", mixed, yes, yes, 0)
    assert wide.ratio.low < 0.35 and wide.generated.low < figure.generated.low


def test_what_cannot_be_measured_is_said(pipeline, judge):
    with pytest.raises(ValueError, match="0 prompts of an axis"):
        compose(pipeline, judge, count=0)
    with pytest.raises(ValueError, match="the judge knows the common things alone"):
        compose(pipeline, judge, tier=2, count=1)
