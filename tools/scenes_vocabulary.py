"""Reads and checks tools/scenes/things.yaml: the things that scenes are drawn of, and the words for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")
STANDS = ("ground", "sky", "water", "any")
WEARS = ("head", "face", "neck")

# What an entry is when neither it nor its group says otherwise; "" and None of plural and article are worked out below.
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


def plural_of(noun: str) -> str:
    """The regular plural."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article_of(noun: str) -> str:
    """The indefinite article by the first letter."""
    return "an" if noun[0].lower() in "aeiou" else "a"


def read_things(path: Path) -> list[dict[str, Any]]:
    """Every thing of the file, in its order, with all keys.

    Raises:
        ValueError: unknown keys or values, or a word with two owners.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = document["groups"]
    things = [_resolved(entry, group, groups[group]) for group, entries in document["things"].items() for entry in entries]
    problems = [*_wrong_values(things), *_shared_words(things)]
    if problems:
        raise ValueError(f"{path.name}: " + "; ".join(problems))
    return things


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
            yield f"{name}: tint without color: name the one or two that it usually has"


def _shared_words(things: list[dict[str, Any]]) -> Iterator[str]:
    """Words that mean two things, and code points that are drawn as two."""
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
