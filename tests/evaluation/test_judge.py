"""The judge of scenes: how it is kept, what it reads."""

import dataclasses

import pytest
import torch

from ldm.data import generator
from ldm.data.scenes.catalog import load_catalog
from ldm.data.scenes.scene import SceneSampler
from ldm.evaluation.judge import FOLDER, Judge, JudgeConfig, JudgeNetwork, box_of, load_judge, peaks

THINGS = tuple(thing.name for thing in load_catalog().things if thing.tier == 1)
TINY = JudgeConfig(things=THINGS, widths=(8, 16, 32), query=16, blocks=(0, 1))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Judge(TINY, JudgeNetwork(TINY))


def pictures(count):
    return torch.from_numpy(generator(0, "noise").integers(0, 256, (count, 3, 64, 64)).astype("uint8"))


def test_a_judge_is_read_as_it_was_saved(tiny, tmp_path):
    tiny.save(tmp_path / "judge")
    again = Judge.load(tmp_path / "judge")
    assert again.config == tiny.config
    asked = [("cat", "dog"), ("car",), ()]
    one, other = tiny.read(pictures(3), asked), again.read(pictures(3), asked)
    assert [len(reading.looks) for reading in other] == [2, 1, 0] and all(len(reading.first) == 5 for reading in other)
    assert [reading.count for reading in one] == [reading.count for reading in other]
    assert again.digest != tiny.digest  # half precision
    assert Judge.load(tmp_path / "judge").digest == again.digest
    assert len(tiny.read(pictures(1)[..., :32, :32], [("cat",)])) == 1  # any size is brought to 64


def test_the_five_first_have_the_ranks_one_to_five(tiny):
    (reading,) = tiny.read(pictures(1), [THINGS])
    ranks = {name: look.rank for name, look in zip(THINGS, reading.looks, strict=True)}
    assert [ranks[name] for name in reading.first] == [1, 2, 3, 4, 5]
    assert sorted(ranks.values()) == list(range(1, len(THINGS) + 1))


def test_what_is_wrong_with_a_judge_is_said(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"there is no judge in .*tools/scene_judge\.py"):
        Judge.load(tmp_path / "none")
    with pytest.raises(ValueError, match='the judge knows no "unheard of"'):
        tiny.read(pictures(1), [("unheard of",)])
    other = dataclasses.replace(TINY, things=("unheard of", *THINGS[1:]))
    Judge(other, JudgeNetwork(other)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="does not know the things that are drawn now"):
        Judge.load(tmp_path / "other")


def test_peaks_are_the_highest_among_their_neighbors():
    center = torch.zeros(1, 8, 8)
    center[0, 1, 1], center[0, 1, 2], center[0, 6, 6], center[0, 4, 0] = 0.9, 0.8, 0.5, 0.3
    assert peaks(center, 0.4).nonzero().tolist() == [[0, 1, 1], [0, 6, 6]]


def test_a_box_is_around_its_center():
    assert box_of(8 * 2 + 4, [0.5, 0.5, 0.25, 0.5]) == (0.5625 - 0.125, 0.3125 - 0.25, 0.5625 + 0.125, 0.3125 + 0.25)


@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="no judge is there yet")
def test_the_judge_of_the_package_reads_real_scenes():
    from ldm.evaluation.axes import axis_prompts, right
    from ldm.evaluation.composition import EACH, real_scenes

    asked = axis_prompts("one thing", 25, 1, SceneSampler(load_catalog()))
    readings = load_judge().read(real_scenes(asked, 64, 1), [prompt.asked for prompt in asked for _ in range(EACH)])
    good = [right(asked[place // EACH], reading)["top 5"] for place, reading in enumerate(readings)]
    assert sum(good) > 0.85 * len(good)
