"""Words and short SVG of the built-in scenes."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from tools import scenes_svg, scenes_vocabulary

THINGS = Path(scenes_vocabulary.__file__).parent / "scenes/things.yaml"


def test_the_vocabulary_is_sound():
    things = {thing["name"]: thing for thing in scenes_vocabulary.read_things(THINGS)}
    assert things["dog"]["forms"]["husky"] == ["a", "huskies"]
    assert things["glasses"]["forms"]["glasses"] == ["", "pairs of glasses"]
    assert things["car"]["forms"]["SUV"] == ["an", "SUVs"]
    assert things["fox"]["classes"] == ["forest animal", "wild animal", "animal"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"synonyms": ["cat"]}, "“cat” belongs to"),
        ({"classes": ["dog"]}, "a class of"),
        ({"stands": "on its head"}, "is none of ground"),
        ({"colour": ["brown"]}, "no such key: colour"),
        ({"color": []}, "tint without color"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    document = yaml.safe_load(THINGS.read_text(encoding="utf-8"))
    animals = document["things"]["animal"]
    document = {"groups": document["groups"], "words": {}, "things": {"animal": [animals[0] | change, *animals[1:2]]}}
    (tmp_path / "things.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        scenes_vocabulary.read_things(tmp_path / "things.yaml")


def test_plurals():
    words = {
        "fox": "foxes",
        "pony": "ponies",
        "monkey": "monkeys",
        "policewoman": "policewomen",
        "bowl of soup": "bowls of soup",
        "slice of cake": "slices of cake",
        "nut and bolt": "",
        "reef fish": "reef fish",
    }
    assert {word: scenes_vocabulary.plural_of(word) for word in words} == words


def test_rounding_reads_flags_of_arcs_and_lets_no_error_add_up():
    svg = scenes_svg.round_numbers('<path d="M0 0a1.04 1.04 0 01.5.5l.44.44.44.44.44.44z"/>', 1)
    assert svg == '<path d="M0 0a1.04 1.04 0 0 1 .5 .5l.4 .4 .5 .5 .4 .4z"/>'


def test_a_shortened_drawing_looks_the_same_and_fills_its_box():
    pytest.importorskip("resvg_py")
    body = '<g id="unused"><circle cx="60.123456" cy="40.987654" r="20.000001" fill="#f00" id="used"/></g>'
    whole = scenes_svg.document(body, (0, 0, 100, 100))
    short = scenes_svg.shorten(whole)
    assert "id=" not in short and len(short) < len(whole)
    assert scenes_svg.view_box(short) == pytest.approx((40, 21, 40, 40), abs=0.8)
    seen = scenes_svg.render(short, 64)[..., 3]
    assert seen[[0, -1], 32].all() and seen[32, [0, -1]].all() and np.ptp(seen.shape) <= 1
    assert scenes_svg.colors(short) == ["red"]
