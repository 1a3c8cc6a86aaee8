"""Reads and checks tools/scenes/things.yaml: the things of scenes and their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ldm.data.scenes import COLORS

STANDS = ("ground", "sky", "water", "any")
WEARS = ("head", "face", "neck")

# Defaults of entries; a plural or article of None is derived.
DEFAULTS: dict[str, Any] = {
    "plural": None,
    "article": None,
    "tier": 2,
    "emoji": [],
    "synonyms": [],
    "kinds": [],
    "classes": [],
    "wears": None,
    "held": False,
    "bearer": False,
    "stands": "any",
    "tint": True,
    "color": [],
}
LISTS = ("emoji", "synonyms", "kinds", "classes", "color")


# Irregular plurals by the last word.
IRREGULAR = {
    **dict.fromkeys(("fish", "sheep", "deer", "aircraft", "spacecraft", "salmon", "trout", "tuna", "cod", "elk"), ""),
    **{word: word + "es" for word in ("hero", "superhero", "potato", "tomato", "volcano", "tornado", "buffalo")},
    "bacterium": "bacteria",
    "cactus": "cacti",
    "child": "children",
    "die": "dice",
    "elf": "elves",
    "foot": "feet",
    "fungus": "fungi",
    "goose": "geese",
    "half": "halves",
    "knife": "knives",
    "larva": "larvae",
    "leaf": "leaves",
    "loaf": "loaves",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "tooth": "teeth",
    "wolf": "wolves",
}
_PREPOSITIONS = "of with without in on covering blowing sticking licking baring lifting bouncing doing waving wearing"
_REST = re.compile(f"(?= (?:{_PREPOSITIONS.replace(' ', '|')}) )")


def plural_of(noun: str) -> str:
    """The plural of a name: "pairs of socks"; empty for two nouns joined by "and"."""
    if " and " in noun:
        return ""
    head, *rest = _REST.split(noun, maxsplit=1)
    before, space, last = head.rpartition(" ")
    return before + space + _plural_word(last) + "".join(rest)


def _plural_word(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word] or word
    if word.endswith("fish"):
        return word
    if word.endswith("man") and word not in ("human", "talisman"):
        return word[:-3] + "men"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def article_of(noun: str) -> str:
    """The indefinite article by the first letter."""
    return "an" if noun[0].lower() in "aeiou" else "a"


def read_things(path: Path) -> list[dict[str, Any]]:
    """All things in order, with all keys, and `forms`: article and plural of each name.

    Raises:
        ValueError: for unknown keys or values, and words of two things.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = document["groups"]
    things = [
        _resolved(entry, group, groups[group]) for group, entries in document["things"].items() for entry in entries
    ]
    articles = {word: article for article, listed in document["words"].items() for word in listed}
    for thing in things:
        thing["forms"] = {word: _forms(word, thing, articles) for word in _words(thing)}
    if unused := sorted(set(articles) - {word for thing in things for word in _words(thing)}):
        raise ValueError(f"{path.name}: words: no synonym or kind: {', '.join(unused)}")
    problems = [*_wrong_values(things), *_shared_words(things)]
    if problems:
        raise ValueError(f"{path.name}: " + "; ".join(problems))
    return things


def _words(thing: dict[str, Any]) -> list[str]:
    return [thing["name"], *thing["synonyms"], *thing["kinds"]]


def _forms(word: str, thing: dict[str, Any], articles: dict[str, str]) -> list[str]:
    """Article and plural of a word, "" if it has none."""
    if word == thing["name"]:
        return [thing["article"], thing["plural"]]
    article = articles.get(word, article_of(word))
    if article in ("no_article", "the"):
        return ["" if article == "no_article" else "the", ""]
    return [article, plural_of(word)]


def _resolved(entry: dict[str, Any], group: str, defaults: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(entry) - set(DEFAULTS) - {"name"}:
        raise ValueError(f"{entry.get('name')}: no such key: {', '.join(sorted(unknown))}")
    thing = {"name": entry["name"], "group": group, **DEFAULTS, **defaults, **entry}
    thing["classes"] = [*entry.get("classes", []), *defaults.get("classes", [])]
    for key in LISTS:
        thing[key] = [str(value) for value in thing[key]]
    if thing["plural"] is None:
        thing["plural"] = plural_of(thing["name"])
    if thing["article"] is None:
        thing["article"] = article_of(thing["name"])
    if not thing["tint"]:
        thing["color"] = []
    return thing


def _wrong_values(things: list[dict[str, Any]]) -> Iterator[str]:
    for thing in things:
        name = thing["name"]
        if thing["stands"] not in STANDS:
            yield f"{name}: stands: {thing['stands']} is none of {', '.join(STANDS)}"
        if thing["wears"] not in (None, *WEARS):
            yield f"{name}: wears: {thing['wears']} is none of {', '.join(WEARS)}"
        if wrong := set(thing["color"]) - set(COLORS):
            yield f"{name}: color: {', '.join(sorted(wrong))} is none of {', '.join(COLORS)}"
        if thing["tint"] and not thing["color"]:
            yield f"{name}: tint without color: give its usual colors"


def _shared_words(things: list[dict[str, Any]]) -> Iterator[str]:
    """Words and code points of two things."""
    owners: dict[str, str] = {}
    classes = {word.lower(): thing["name"] for thing in things for word in thing["classes"]}
    for thing in things:
        own = {thing["name"], *thing["synonyms"], *thing["kinds"], *thing["emoji"], thing["plural"]} - {""}
        listed = [thing["name"], *thing["synonyms"], *thing["kinds"], *thing["emoji"]]
        if len({word.lower() for word in listed}) < len(listed):
            yield f"{thing['name']}: a word or code point is named twice"
        for word in sorted({word.lower() for word in own}):
            if word in owners:
                yield f"“{word}” belongs to {owners[word]} and {thing['name']}"
            if word in classes:
                yield f"“{word}” is {thing['name']} and a class of {classes[word]}"
            owners[word] = thing["name"]
