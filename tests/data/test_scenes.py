"""Scenes that code composes: the same for all, without end, told as they are, and never what is held out."""

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from ldm.data import CaptionedImages, DataConfig, generator, split
from ldm.data.builtin import held_out_scene, training_scene
from ldm.data.layouts import open_source
from ldm.data.scenes import (
    COLORS,
    FEW_SINGLES_FROM,
    HELD_OUT_FRACTIONS,
    PLACES,
    RELATIONS,
    Concept,
    SceneSampler,
    captions,
    load_catalog,
    relation_concept,
)
from ldm.data.scenes.captions import CaptionWriter
from ldm.data.scenes.render import render_scene, tint
from ldm.text import load_text_encoder
from tests.training.runs import ROOT

CONFIG = DataConfig(path="scenes", resolution=32, scenes=6, renew_every=2, held_out=0.5)
# Over the course of a training, from single things to scenes.
NUMBERS = range(0, 3_000_000, 1_000)
MANY = range(FEW_SINGLES_FROM - 50_000, FEW_SINGLES_FROM + 50_000)


@pytest.fixture(scope="module")
def sampler():
    return SceneSampler(load_catalog())


@pytest.mark.parametrize(("first", "expected"), [(0, 0.75), (FEW_SINGLES_FROM - 1000, 0.67), (FEW_SINGLES_FROM, 0.3)])
def test_single_things_become_fewer(first, expected):
    kinds = [training_scene(number)[0].kind for number in range(first, first + 1000)]
    assert kinds.count("one") / len(kinds) == pytest.approx(expected, abs=0.05)


def phrasings():
    """Lists of templates of which one is chosen, and whether their first is never held out."""
    yield from (
        (one, True)
        for one in (captions.ONE_PHRASES, captions.COUNT_PHRASES, captions.THREE_PHRASES, captions.HELD_PHRASES)
    )
    yield from (
        (one, True)
        for of in (captions.RELATION_PHRASES, captions.WORN_PHRASES, captions.ON_PLACE)
        for one in of.values()
    )
    yield captions.ON_COLOR, True
    yield captions.LONG_OPENINGS, True
    yield (*captions.STYLE, *captions.STYLE_PHRASES), True
    yield (*captions.STYLE_OF_MANY, *captions.STYLE_OF_MANY_PHRASES), True
    clauses = (captions.ONE_CLAUSES, captions.COUNT_CLAUSES, captions.THREE_CLAUSES, captions.HELD_CLAUSES)
    yield from ((one, False) for one in clauses)
    yield from ((one, False) for of in (captions.RELATION_CLAUSES, captions.WORN_CLAUSES) for one in of.values())
    yield captions.COLOR_SENTENCES, True
    yield captions.CLASS_SENTENCES, True
    yield from ((one, True) for one in captions.GROUND_SENTENCES.values())


def unseen_phrasings():
    for templates, first in phrasings():
        yield from (one for one in templates[first:] if Concept("phrasing", (one,)).is_held_out and one != templates[0])


def as_pattern(template):
    numbers = "|".join((*captions.NUMBERS[2:], *"2345"))
    words = [re.escape(part) for part in re.split(r"({\w+})", template)]
    known = {r"\{n\}": f"(?:{numbers})", r"\{many\}": r"\w+"}
    return re.compile(r"\b" + "".join(known.get(w, ".+" if w.startswith(r"\{") else w) for w in words), re.IGNORECASE)


def has_word(text, word):
    return f" {word.lower()} " in " " + re.sub(r"[.,;:]", "", text.lower()) + " "


def check_nothing_is_held_out(numbers):
    """Reads scenes and captions by itself: it asks neither for `Scene.concepts` nor for `Caption.concepts`."""
    unseen, said = {}, {}
    for thing in load_catalog().things:
        words = {word: Concept("synonym", (thing.name, word)).is_held_out for word in (*thing.synonyms, *thing.kinds)}
        unseen[thing.name] = [word for word, is_held_out in words.items() if is_held_out]
        others = [word for word, is_held_out in words.items() if not is_held_out]
        said[thing.name] = [thing.name, thing.plural, *thing.classes, *others]
    patterns = {template: as_pattern(template) for template in unseen_phrasings()}
    assert len(patterns) > 8
    for number in numbers:
        scene, caption = training_scene(number)
        names = [part.thing.name for part in scene.parts]
        for part in scene.all_parts:
            if part.color and part.color not in part.thing.colors:
                assert not Concept("color", (part.thing.name, part.color)).is_held_out, (number, caption)
            if part.worn:
                assert not Concept("worn", (part.thing.name, part.worn.thing.name)).is_held_out, (number, caption)
        if len(names) == 2:
            assert not relation_concept(names[0], scene.relation, names[1]).is_held_out, (number, caption)
        if len(names) == 3:
            for first, second in ((0, 1), (0, 2), (1, 2)):
                assert not relation_concept(names[first], "left of", names[second]).is_held_out, (number, caption)
        # A word of one thing may be an allowed one of another, or a part of it.
        allowed = [word for part in scene.all_parts for word in said[part.thing.name]]
        for word in (word for part in scene.all_parts for word in unseen[part.thing.name]):
            if not any(has_word(other, word) for other in allowed):
                assert not has_word(caption, word), (number, word, caption)
        for template, pattern in patterns.items():
            assert not pattern.search(caption), (number, template, caption)


def test_every_list_of_phrasings_has_one_that_may_be_said():
    for templates, first in phrasings():
        assert first or not all(Concept("phrasing", (one,)).is_held_out for one in templates), templates


def test_no_training_scene_shows_or_says_what_is_held_out():
    check_nothing_is_held_out(NUMBERS)


@pytest.mark.slow
def test_no_held_out_concept_in_100000_scenes():
    check_nothing_is_held_out(MANY)


@pytest.mark.parametrize("numbers", [NUMBERS, pytest.param(MANY, marks=pytest.mark.slow)])
def test_no_caption_is_cut(numbers):
    config = yaml.safe_load((ROOT / "configs" / "scenes-64.yaml").read_text())
    encoder = load_text_encoder(config["text"]["encoder"], config["text"]["max_length"])
    found = [training_scene(number, tier)[1] for number in numbers for tier in (1, 2)]
    assert max(encoder.truncated_tokens(found)) == 0
    long = [caption for caption in found if len(caption.split()) > 30]
    assert not long, long[0]


def test_shares_are_held_out_of_each_kind(sampler):
    things = sampler.things
    color = [Concept("color", (thing.name, color)).is_held_out for thing in things for color in COLORS]
    pairs = [
        relation_concept(a.name, how, b.name).is_held_out for a in things[:60] for b in things[:60] for how in RELATIONS
    ]
    worn = [Concept("worn", (a.name, b.name)).is_held_out for a in sampler.characters for b in sampler.worn]
    synonyms = [Concept("synonym", (a.name, word)).is_held_out for a in things for word in (*a.synonyms, *a.kinds)]
    for share, found in zip(HELD_OUT_FRACTIONS.values(), (color, pairs, worn, synonyms), strict=False):
        spread = 4 * (share * (1 - share) / len(found)) ** 0.5
        assert abs(np.mean(found) - share) < spread


def test_a_relation_is_one_fact_from_both_sides():
    assert relation_concept("cat", "left of", "dog") == relation_concept("dog", "right of", "cat")
    assert (
        relation_concept("cat", "above", "dog")
        == relation_concept("dog", "under", "cat")
        != relation_concept("dog", "above", "cat")
    )
    assert relation_concept("cat", "in front of", "dog") == relation_concept("dog", "behind", "cat")
    assert relation_concept("cat", "next to", "dog") == relation_concept("dog", "next to", "cat")


def test_held_out_scenes_each_show_something_new():
    for number in range(60):
        scene, caption = held_out_scene(number)
        assert any(concept.is_held_out for concept in scene.concepts()), caption


def test_a_scene_is_a_function_of_its_number():
    first = open_source(CONFIG).samples
    training_scene.cache_clear()
    again = open_source(CONFIG).samples
    assert [one.captions for one in first] == [one.captions for one in again]
    assert [one.digest for one in first] == [one.digest for one in again]
    for one, other in zip(first, again, strict=True):
        assert one.load().tobytes() == other.load().tobytes()
    assert len({one.digest for one in first}) == len(first) == 9


def test_others_take_their_places():
    training, held_out = split(open_source(CONFIG).samples, CONFIG.held_out)
    images = CaptionedImages(training, CONFIG, seed=0)
    assert (len(images), len(held_out)) == (6, 3)
    ids = [[images[epoch, index].id for index in range(6)] for epoch in range(6)]
    assert ids[0] == ids[1] == [f"scenes/{number}" for number in range(6)]
    assert ids[2] == ids[3] == [f"scenes/{number}" for number in range(6, 12)]
    assert images[5, 2].caption == training_scene(14)[1]
    later = CaptionedImages(split(open_source(replace(CONFIG, first_scene=12)).samples, 0.5)[0], CONFIG, seed=0)
    assert later[0, 2].caption == training_scene(14)[1]
    assert np.array_equal(later[0, 2].image, images[5, 2].image)
    # Workers load what is new, and nothing twice, for those who keep it.
    images.with_images, images.renewed_cached = False, len(images)
    assert [images[epoch, 2].image is not None for epoch in range(6)] == [True, False] * 3
    images.reload_epochs = (3, 4)  # whoever goes on in the middle of epoch 3 keeps nothing yet
    assert [images[epoch, 2].image is not None for epoch in range(7)] == [True, False, True, True, True, False, True]


def test_a_plain_caption_names_all_that_can_be_seen(sampler):
    rng = generator(1, "plain")
    for kind in ("count", "pair", "worn", "three"):
        for _ in range(40):
            scene = sampler.sample_kind(kind, rng)
            text = CaptionWriter(rng).caption(scene, plain=True).text
            for part in scene.all_parts:
                name = part.thing.plural if kind == "count" else part.thing.name
                assert f"{part.color} {name}" in text if part.color else name in text
            if kind == "count":
                assert text.startswith(("two", "three", "four", "five"))


def test_articles_and_plurals(sampler):
    rng = generator(2, "articles")
    wrong = (" a a", " a e", " a i", " a o", " an b", " an c", " an d", " an p", " an t", " a an ", " an a ")
    for number in range(4_000):
        text = f" {training_scene(number * 311)[1].lower()} ".replace(" a ewe", "")
        assert not any(pair in text for pair in wrong), text
    thing = load_catalog().thing("mouse")
    scene = replace(sampler.sample_kind("count", rng), count=3)
    scene = replace(scene, parts=(replace(scene.parts[0], thing=thing, drawing=thing.drawings[0], color="red"),))
    assert CaptionWriter(rng).caption(scene, plain=True).text == "three red mice"


def test_relations_are_drawn_as_they_are_told(sampler):
    """One thing is tinted red, the other blue: where the colors lie is where the things are."""
    rng = generator(3, "relations")
    for how in ("left of", "right of", "above", "under"):
        for _ in range(12):
            scene = sampler.sample_kind("pair", rng)
            first, second = (replace(part, size=None) for part in scene.parts)
            parts = (replace(first, color="red"), replace(second, color="blue"))
            scene = replace(scene, parts=parts, relation=how, background="")
            red, _, blue = np.moveaxis(np.asarray(render_scene(scene, rng, 64), np.int64), -1, 0)
            (red_y, red_x), (blue_y, blue_x) = (
                [places.mean() for places in np.nonzero(one > other + 60)] for one, other in ((red, blue), (blue, red))
            )
            apart = {"left of": blue_x - red_x, "right of": red_x - blue_x}
            apart |= {"above": blue_y - red_y, "under": red_y - blue_y}
            assert apart[how] > 12


def test_a_tint_keeps_light_and_shade():
    ramp = np.zeros((1, 256, 4), np.uint8)
    ramp[..., :3] = np.arange(256, dtype=np.uint8)[:, None]
    ramp[..., 3] = 255
    tinted = tint(ramp, (30, 100, 215)).astype(int)
    brightness = tinted[0, :, :3].sum(axis=-1)
    assert (np.diff(brightness) >= 0).all()
    assert tinted[0, 153, :3].tolist() == [30, 100, 215]  # what 60 % of it are darker than
    assert (tinted[..., 3] == 255).all()


def test_nothing_disappears_in_front_of_its_ground(sampler):
    rng = generator(4, "ground")
    for _ in range(300):
        scene = sampler.sample_kind("one", rng)
        if scene.parts[0].color and scene.background not in PLACES:
            assert scene.parts[0].color != (scene.background or "white")


def test_settings_of_scenes_are_for_scenes(tmp_path):
    for key, value in (("scenes", 5), ("renew_every", 2), ("first_scene", 7), ("things", "all")):
        with pytest.raises(ValueError, match=rf"data\.{key} is {value!r}, which is for"):
            DataConfig(path=str(tmp_path), resolution=8, **{key: value})
    with pytest.raises(ValueError, match=r"data\.flip"):
        DataConfig(path="scenes", resolution=8, flip=True)
    with pytest.raises(ValueError, match=r"data\.scenes is 0"):
        DataConfig(path="scenes", resolution=8, scenes=0)
