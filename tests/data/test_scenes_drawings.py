"""The tracked file of drawings: what it holds for the things of tools/scenes/things.yaml."""

import json
import lzma
from pathlib import Path

import pytest

import ldm

ASSETS = Path(ldm.__file__).parent / "assets/scenes"
EMOJI = {"noto", "twemoji", "fluent", "openmoji"}


@pytest.fixture(scope="module")
def content():
    return json.loads(lzma.decompress((ASSETS / "drawings.json.xz").read_bytes()))


def test_it_stays_small():
    assert (ASSETS / "drawings.json.xz").stat().st_size < 6_000_000


def test_no_word_or_drawing_has_two_owners(content):
    words = [word.lower() for thing in content["things"] for word in thing["forms"]]
    assert len(set(words)) == len(words)
    classes = {word.lower() for thing in content["things"] for word in thing["classes"]}
    assert not classes & set(words)
    drawings = [drawing["id"] for drawing in content["drawings"]]
    assert len(set(drawings)) == len(drawings)


def test_common_things_have_drawings_of_several_families(content):
    families = {thing["name"]: set() for thing in content["things"]}
    for drawing in content["drawings"]:
        families[drawing["thing"]].add(drawing["family"])
    assert all(families.values())
    common = [thing["name"] for thing in content["things"] if thing["tier"] == 1]
    assert 300 <= len(common) <= 340
    assert [name for name in common if len(families[name] & EMOJI) < 3] == []


def test_drawings_fill_their_boxes_and_say_whose_they_are(content):
    named = {family["name"] for family in content["families"]}
    assert named == {*EMOJI, "clipart"}
    for drawing in content["drawings"]:
        assert drawing["family"] in named
        assert drawing["svg"].startswith("<svg ") and 0.02 < drawing["ratio"] < 50
        assert not any(tag in drawing["svg"] for tag in ("<text", "<flowRoot", "<image")), drawing["id"]
    licenses = (ASSETS / "LICENSES.md").read_text(encoding="utf-8")
    assert all(family["attribution"] in licenses for family in content["families"])


def test_places_lie_on_the_drawings(content):
    things = {thing["name"]: thing for thing in content["things"]}
    for drawing in content["drawings"]:
        for place, (x, y, *_) in drawing["anchors"].items():
            assert place in ("head", "eyes", "neck", "hand", "worn"), drawing["id"]
            assert -0.1 <= x <= 1.1 and -0.1 <= y <= 1.1, drawing["id"]
        thing = things[drawing["thing"]]
        if thing["bearer"] and thing["tier"] == 1 and drawing["family"] in EMOJI:
            assert "hand" in drawing["anchors"], drawing["id"]
