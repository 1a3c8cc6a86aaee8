"""Where the drawing says that things are."""

import dataclasses

import numpy as np
import pytest

from ldm.data import generator
from ldm.data.scenes import Part, Scene, SceneSampler, load_catalog
from ldm.data.scenes.render import render_parts, render_scene


@pytest.fixture(scope="module")
def sampler():
    return SceneSampler(load_catalog())


@pytest.mark.parametrize("kind", ["one", "count", "pair", "three", "worn", "held", "worn pair"])
def test_every_part_has_a_box_and_pixels_match(sampler, kind):
    for number in range(4):
        scene = sampler.sample_kind(kind, generator(number, "scene"))
        image, drawn = render_parts(scene, generator(number, "pixels"), 64)
        assert np.array_equal(image, render_scene(scene, generator(number, "pixels"), 64))
        expected = scene.all_parts * scene.count
        assert sorted(one.part.thing.name for one in drawn) == sorted(part.thing.name for part in expected)
        for one in drawn:
            left, top, right, bottom = one.box
            assert left < right and top < bottom
            assert -0.02 <= (left + right) / 2 <= 1.02 and -0.02 <= (top + bottom) / 2 <= 1.02


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_box_is_what_is_not_ground(sampler, mirrored):
    thing = load_catalog().thing("cat")
    for drawing in thing.drawings[:3]:
        part = Part(thing, drawing, color="blue", size="small", mirrored=mirrored)
        image, drawn = render_parts(Scene("one", (part,)), generator(1, "pixels"), 64)
        rows, columns = np.nonzero((np.asarray(image) != 255).any(axis=2))
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert np.abs(seen - drawn[0].box).max() < 2.5 / 64


def test_box_of_worn_things_is_where_pixels_change(sampler):
    for number, mirrored in enumerate((False, True, False, True)):
        scene = sampler.sample_kind("worn", generator(number, "worn"))
        bearer = dataclasses.replace(scene.parts[0], mirrored=mirrored)
        red = dataclasses.replace(bearer, worn=dataclasses.replace(bearer.worn, color="red"))
        blue = dataclasses.replace(bearer, worn=dataclasses.replace(bearer.worn, color="blue"))
        images = []
        for part in (red, blue):
            image, drawn = render_parts(Scene("worn", (part,)), generator(1, "pixels"), 64)
            images.append(np.asarray(image).astype(int))
        rows, columns = np.nonzero(np.abs(images[0] - images[1]).max(axis=2) > 40)
        left, top, right, bottom = drawn[1].box
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert drawn[1].part.thing is bearer.worn.thing
        assert (seen[:2] > np.array([left, top]) - 0.05).all() and (seen[2:] < np.array([right, bottom]) + 0.05).all()
        assert seen[2] - seen[0] > 0.5 * (min(right, 1) - max(left, 0))
