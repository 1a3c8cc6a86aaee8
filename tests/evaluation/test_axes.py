"""What a model of scenes is asked for, and when a picture is right."""

import dataclasses

import pytest

from ldm.data import generator
from ldm.data.scenes import Concept, SceneSampler, load_catalog
from ldm.data.scenes.render import render_parts
from ldm.evaluation.composition import AXES, axis_prompts, correctness, is_on, is_placed, with_other_drawings
from ldm.evaluation.scene_classifier import OWN, Detection, ScenePrediction


@pytest.fixture(scope="module")
def sampler():
    return SceneSampler(load_catalog())


def look(x, y, width=0.3, height=0.3, rank=1, color=OWN):
    return Detection(rank, color, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def perfect(scene, draw):
    """The prediction of a perfect classifier."""
    _, drawn = render_parts(scene, draw, 64)
    looks = []
    for part in scene.all_parts:
        one = next(one for one in drawn if one.part is part)
        looks.append(Detection(1, part.color or OWN, one.box))
    return ScenePrediction(len(drawn), (), tuple(looks))


@pytest.mark.parametrize("axis", AXES)
def test_prompts_are_a_function_of_the_seed_and_real_scenes_of_them_are_right(sampler, axis):
    found = axis_prompts(axis, 12, 3, sampler)
    assert len(found) == 12 == len({prompt.caption for prompt in found})
    again, other = axis_prompts(axis, 6, 3, sampler), axis_prompts(axis, 6, 4, sampler)
    assert [p.caption for p in again] == [p.caption for p in found[:6]] != [p.caption for p in other]
    for prompt in found:
        draw = generator(0, prompt.caption)
        scene = with_other_drawings(prompt.scene, draw)
        results = correctness(prompt, perfect(scene, draw))
        assert all(results.values()), (prompt.caption, results)
        assert prompt.things == tuple(part.thing.name for part in scene.all_parts)


def test_all_things_are_asked_for_by_their_names(sampler):
    found = axis_prompts("one thing", None, 0, sampler)
    assert sorted(prompt.things[0] for prompt in found) == sorted(thing.name for thing in sampler.things)
    assert all(prompt.caption.endswith(prompt.things[0]) for prompt in found)


@pytest.mark.parametrize("axis", ["color", "relation", "worn", "two colors"])
def test_combinations_are_held_out(sampler, axis):
    for prompt in axis_prompts(axis, 25, 0, sampler):
        assert any(concept.is_held_out for concept in prompt.scene.concepts()), prompt.caption


def test_synonyms_and_phrasings_are_held_out_and_nothing_else_is(sampler):
    for prompt in axis_prompts("unseen synonym", None, 0, sampler):
        word = prompt.caption.removeprefix("a ").removeprefix("an ")
        assert Concept("synonym", (prompt.things[0], word)).is_held_out
    found = axis_prompts("unseen phrasing", 40, 0, sampler)
    assert len({prompt.scene.kind for prompt in found}) > 3
    for prompt in found:
        assert not any(concept.is_held_out for concept in prompt.scene.concepts())
        names = [part.thing.plural if prompt.scene.count > 1 else part.thing.name for part in prompt.scene.all_parts]
        assert all(name in prompt.caption for name in names)


def test_where_things_stand():
    left, right_, top, low = look(0.25, 0.6), look(0.75, 0.6), look(0.5, 0.25), look(0.5, 0.75)
    assert is_placed("left of", left, right_) and not is_placed("left of", right_, left)
    assert is_placed("right of", right_, left) and not is_placed("right of", left, right_)
    assert is_placed("next to", left, right_) and is_placed("next to", right_, left)
    assert not is_placed("next to", top, low) and not is_placed("left of", top, low)
    assert is_placed("above", top, low) and not is_placed("above", low, top) and not is_placed("above", left, right_)
    assert is_placed("under", low, top) and not is_placed("under", top, low)
    front, back = look(0.55, 0.75, 0.4, 0.4), look(0.45, 0.45, 0.6, 0.6)
    assert is_placed("in front of", front, back) and not is_placed("in front of", back, front)
    assert is_placed("behind", back, front) and not is_placed("behind", front, back)
    assert not is_placed("in front of", low, top) and not is_placed("in front of", left, right_)
    near = look(0.5, 0.5), look(0.55, 0.5)
    assert not any(is_placed(how, *near) for how in ("left of", "right of", "above", "under", "in front of", "behind"))


def test_what_is_worn_is_on_its_bearer():
    cat = look(0.5, 0.6, 0.5, 0.6)
    assert is_on(look(0.5, 0.25), cat, 0.25) and is_on(look(0.5, 0.5), cat, 0.25)
    assert not is_on(look(0.95, 0.6), cat, 0.25) and not is_on(look(0.5, 0.05), cat, 0.25)


@pytest.mark.parametrize(
    ("axis", "changes", "wrong"),
    [
        ("one thing", {"rank": 2}, {"top 1"}),
        ("one thing", {"rank": 6}, {"top 1", "top 5"}),
        ("color", {"color": OWN}, {"color", "right"}),
        ("color", {"rank": 6}, {"top 5", "right"}),
        ("two colors", {"color": OWN}, {"color", "right"}),
        ("two colors", {"rank": 6}, {"top 5", "right"}),
        ("relation", {"rank": 6}, {"top 5", "right"}),
        ("relation", {"box": (-6, 0, -5, 1)}, {"placed", "right"}),
        ("worn", {"box": (5, 5, 6, 6)}, {"on it", "right"}),
        ("count", {"rank": 6}, {"top 5", "right"}),
    ],
)
def test_what_is_wrong_is_said(sampler, axis, changes, wrong):
    prompt = next(p for p in axis_prompts(axis, 30, 0, sampler) if axis != "relation" or p.scene.relation == "left of")
    prediction = perfect(prompt.scene, generator(0, "wrong"))
    changed = dataclasses.replace(prediction.detections[-1], **changes)
    results = correctness(prompt, ScenePrediction(prediction.count, (), (*prediction.detections[:-1], changed)))
    assert {name for name, value in results.items() if not value} == wrong


def test_a_wrong_number_is_said(sampler):
    prompt = axis_prompts("count", 1, 0, sampler)[0]
    prediction = perfect(prompt.scene, generator(0, "count"))
    results = correctness(prompt, ScenePrediction(prediction.count + 1, (), prediction.detections))
    assert results == {"count": False, "top 5": True, "right": False}
