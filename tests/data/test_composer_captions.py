import re
from itertools import product

import numpy as np
import pytest

from ldm.data.composer import Wording, brief, grounded, is_phrase, joined, names_ground

PHRASES = ("red apple", "A dog", "flag of Germany", "a cup with a spoon")
OTHERS = (
    "A dog runs on the beach.",
    "1girl, solo, red hair, smile",
    "Two men talk. One of them has a hat.",
    "a cup to the left of a plate",
    "there is a cat",
    "an old wooden house with a red roof and a small garden",
)


def wordings(count: int = 40) -> list[Wording]:
    return [Wording.sample(np.random.default_rng(number)) for number in range(count)]


def test_noun_phrases_are_joined_into_one() -> None:
    said = {next(joined("beside", ["A dog"], ["red apple"], wording)) for wording in wordings(200)}
    assert {"a dog to the left of red apple", "a dog and red apple", "red apple next to a dog"} <= said
    assert not any(re.search(r"[.;:]|\{", text) for text in said)
    assert all(text.count("a dog") == text.count("red apple") == 1 for text in said)
    # Nothing says that one is on the right that is not.
    assert not any(re.search(r"red apple.* (left of|left side of) a dog|a dog.* right.* of red apple", x) for x in said)
    above = {next(joined("above", ["A dog"], ["red apple"], wording)) for wording in wordings(200)}
    assert {"a dog above red apple", "red apple below a dog"} <= above
    inset = {next(joined("inset", ["A dog"], ["red apple"], w, corner="top left")) for w in wordings(100)}
    assert all("top left" in text for text in inset)


@pytest.mark.parametrize("other", OTHERS)
def test_other_captions_become_clauses(other: str) -> None:
    assert not is_phrase(other)
    for wording in wordings():
        text = next(joined("beside", [other], ["A red apple"], wording))
        assert re.search(r"(?i)\bleft: " + re.escape(other.rstrip(".")), text), text
        assert re.search(r"(?i)\bright: a red apple", text), text
        assert text.endswith(".") == other.endswith("."), text
        assert ".." not in text


def test_words_keep_the_capitals_of_names() -> None:
    wording = wordings()[0]
    for a, shown in (("A dog", "a dog"), ("Paris at night", "Paris at night"), ("AB button", "AB button")):
        assert shown in next(joined("beside", [a], ["The T-shirt"], wording))
        assert "the T-shirt" in next(joined("beside", [a], ["The T-shirt"], wording))


def test_a_ground_is_named_once() -> None:
    for caption, wording, color in product((*PHRASES, *OTHERS), wordings(10), ("blue", "orange")):
        for text in grounded([caption], wording, color):
            assert text.count(color) == 1
            assert "an blue" not in text and "a orange" not in text and ".." not in text
        text = next(joined("above", [caption], ["a cat"], wording, color=color))
        assert text.count(color) == 1


def test_captions_that_follow_are_shorter() -> None:
    a = ["an old wooden house with a red roof and a small garden. It is winter.", "an old wooden house"]
    for wording in wordings():
        lengths = [len(text) for text in joined("inset", a, ["a, b, c, d, e"], wording, corner="bottom right")]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] < 70
    assert brief("A dog runs. It rains.") == "A dog runs."
    assert brief("1girl, solo, red hair, smile") == "1girl, solo, red hair"
    assert brief("a dog, which is old and has seen many things, and a cat, too") == (
        "a dog, which is old and has seen many things, and a cat, too"
    )


def test_a_ground_that_is_named_is_known() -> None:
    assert names_ground("a cup on a white background") and names_ground("icon, black background")
    assert names_ground("a cup on white")
    assert not names_ground("a white cup") and not names_ground("a cup on a table")
