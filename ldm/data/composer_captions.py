"""Captions of compositions: the captions of two images, joined by a small grammar.

Short noun phrases are joined into one ("red apple to the left of a dog"). Sentences and lists of tags become separate
clauses ("on the left: …; on the right: …"), so that no words are attributed to the other image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from ldm.data.scenes.captions import ON_COLOR, RELATION_PHRASES, with_article

Layout = Literal["beside", "above", "inset"]
T = TypeVar("T")

# Templates of scenes that imply contact or possession are left out.
_TOUCHING = {"{a} on top of {b}", "{a} over {b}", "{a} with {b}", "{a} by {b}", "{a} together with {b}"}
_PHRASES: dict[Layout, tuple[str, ...]] = {
    "beside": (
        *(text for how in ("left of", "next to") for text in RELATION_PHRASES[how] if text not in _TOUCHING),
        # Here, the first is always on the left.
        "{b} and {a}",
        "{b} next to {a}",
        "{b} beside {a}",
    ),
    "above": tuple(text for text in RELATION_PHRASES["above"] if text not in _TOUCHING),
    "inset": (
        "{a} and {b} in the {corner} corner",
        "{a} with {b} in the {corner} corner",
        "{a} and a small picture of {b} in the {corner} corner",
        "{a} with a small picture of {b} in the {corner}",
        "{a}, and in the {corner} corner {b}",
    ),
}
# Pairs of clauses, for the first and the second image.
_CLAUSES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "beside": (("on the left: {a}", "on the right: {b}"), ("left: {a}", "right: {b}")),
    "above": (("at the top: {a}", "at the bottom: {b}"), ("above: {a}", "below: {b}"), ("top: {a}", "bottom: {b}")),
    "inset": (("{a}", "small, in the {corner} corner: {b}"), ("{a}", "in the {corner} corner: {b}")),
}
_MAX_PHRASE_WORDS = 8
_PUNCTUATION = re.compile(r"[,;:.!?()\[\]{}\"\n|/]")
# Captions with these words are sentences or name a position ("a cup on the left to the left of a dog").
_NO_PHRASE = re.compile(
    r"\b(is|are|was|were|has|have|there|this|left|right|above|below|under|beneath|behind|beside|between|next|front|top"
    r"|bottom|corner|background|foreground)\b",
    re.IGNORECASE,
)
# Words that are capitalized only at the beginning.
_COMMON = re.compile(
    r"(a|an|the|this|that|these|those|there|here|it|he|she|they|we|some|one|two|three|four|five|six|several|many|few"
    r"|in|on|at|of|with|by|from|for|people|person|man|woman|men|women|boy|girl|child|photo|picture|image|drawing)"
)


@dataclass(frozen=True)
class Wording:
    """Random numbers for the choice of templates, sampled once for all lengths of a caption."""

    caption: tuple[float, float]
    template: float
    swapped: bool
    ground: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Wording:
        a, b, template, swapped, ground = rng.random(5).tolist()
        return cls((a, b), template, swapped < 0.5, ground)


def joined(
    layout: Layout, a: Sequence[str], b: Sequence[str], wording: Wording, *, corner: str = "", color: str | None = None
) -> Iterator[str]:
    """Captions of two images, of which the first is on the left, above, or large; in descending length.

    Args:
        a, b: the captions of both, at least one each.
        corner: of an inset, such as "top left".
        color: of the common ground, to be named.
    """
    first = _pick(a, wording.caption[0]), _pick(b, wording.caption[1])
    yield _join(layout, *first, wording, corner, color, shortest=False)
    shortest = min(a, key=len), min(b, key=len)
    for pair in (first, shortest, (brief(shortest[0]), brief(shortest[1]))):
        yield _join(layout, *pair, wording, corner, color, shortest=True)


def grounded(captions: Sequence[str], wording: Wording, color: str) -> Iterator[str]:
    """Captions of one image on a plain ground, in descending length."""
    first, shortest = _pick(captions, wording.caption[0]), min(captions, key=len)
    yield _on_color(_bare(first), is_phrase(first), _is_sentence(first), color, wording.ground)
    for text in (first, shortest, brief(shortest)):
        yield _on_color(_bare(text), is_phrase(text), _is_sentence(text), color, None)


def names_ground(caption: str) -> bool:
    """Whether a caption names the background."""
    return bool(
        re.search(r"\bbackgrounds?\b|\bbackdrop\b|\b(on|against) (an? )?(white|black|gr[ae]y)\b", caption, re.I)
    )


def is_phrase(caption: str) -> bool:
    """Whether a caption is a short noun phrase, which can be a part of a longer one."""
    return (
        len(caption.split()) <= _MAX_PHRASE_WORDS
        and not _PUNCTUATION.search(caption)
        and not _NO_PHRASE.search(caption)
    )


def brief(caption: str) -> str:
    """The first of several sentences, or the first three tags of a list."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    if len(sentences) > 1:
        return sentences[0]
    tags = [tag.strip() for tag in caption.split(",")]
    is_list = len(tags) > 3 and all(len(tag.split()) <= 4 for tag in tags)
    return ", ".join(tags[:3]) if is_list else caption


def _join(layout: Layout, a: str, b: str, wording: Wording, corner: str, color: str | None, *, shortest: bool) -> str:
    sentence = _is_sentence(a) or _is_sentence(b)
    phrases = is_phrase(a) and is_phrase(b)
    if phrases:
        templates = _PHRASES[layout]
        template = min(templates, key=len) if shortest else _pick(templates, wording.template)
        text = template.format(a=_lowered(_bare(a)), b=_lowered(_bare(b)), corner=corner)
    else:
        pairs = _CLAUSES[layout]
        pair = min(pairs, key=lambda pair: len("".join(pair))) if shortest else _pick(pairs, wording.template)
        clauses = [clause.format(a=_lowered(_bare(a)), b=_lowered(_bare(b)), corner=corner) for clause in pair]
        # The large image comes first.
        if wording.swapped and layout != "inset":
            clauses.reverse()
        text = "; ".join(clauses)
        if sentence:
            text = ". ".join(clause[:1].upper() + clause[1:] for clause in clauses) + "."
    if color is None:
        return text
    return _on_color(_bare(text), phrases, sentence, color, None if shortest else wording.ground)


def _on_color(text: str, phrase: bool, sentence: bool, color: str, place: float | None) -> str:
    """Adds the ground; `place` in [0, 1) chooses the template, None takes a short one."""
    if phrase:
        template = min(ON_COLOR[:1] + ON_COLOR[3:4], key=len) if place is None else _pick(ON_COLOR, place)
        return template.format(text=text, color=color, a_color=with_article(color))
    if sentence:
        return f"{text}. The background is {color}."
    # A separate clause, not a part of the last one.
    return f"{text}{';' if '; ' in text else ','} {color} background"


def _pick(things: Sequence[T], place: float) -> T:
    return things[int(place * len(things))]


def _bare(caption: str) -> str:
    """The text without line breaks and final period."""
    return re.sub(r"\s+", " ", caption.strip()).rstrip(".").rstrip()


def _is_sentence(caption: str) -> bool:
    return caption.rstrip().endswith((".", "!", "?"))


def _lowered(text: str) -> str:
    """Lower case for the first letter, except of names."""
    head = re.match(r"[A-Z][a-z]*(?![\w'])", text)
    return text[0].lower() + text[1:] if head and _COMMON.fullmatch(head[0].lower()) else text
