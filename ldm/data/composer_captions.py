"""What is said of a picture that is composed of two: their captions, joined by a small grammar.

Captions of other people are noun phrases ("red apple"), sentences ("A dog runs on the beach.") or lists of tags. Noun
phrases are joined into one ("red apple to the left of a dog"); all else stands in clauses of its own ("on the left: …;
on the right: …"), where nothing can be taken for a part of the other.
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

# As scenes are told, without what would say that one touches the other, or belongs to it.
_TOUCHING = {"{a} on top of {b}", "{a} over {b}", "{a} with {b}", "{a} by {b}", "{a} together with {b}"}
_PHRASES: dict[Layout, tuple[str, ...]] = {
    "beside": (
        *(text for how in ("left of", "next to") for text in RELATION_PHRASES[how] if text not in _TOUCHING),
        # The first is always on the left here.
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
# Each a clause for the first and one for the second.
_CLAUSES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "beside": (("on the left: {a}", "on the right: {b}"), ("left: {a}", "right: {b}")),
    "above": (("at the top: {a}", "at the bottom: {b}"), ("above: {a}", "below: {b}"), ("top: {a}", "bottom: {b}")),
    "inset": (("{a}", "small, in the {corner} corner: {b}"), ("{a}", "in the {corner} corner: {b}")),
}
_LONGEST_PHRASE = 8  # words
_PUNCTUATION = re.compile(r"[,;:.!?()\[\]{}\"\n|/]")
# A caption with one of these says where something is, or is a sentence: "a cup on the left to the left of a dog".
_NO_PHRASE = re.compile(
    r"\b(is|are|was|were|has|have|there|this|left|right|above|below|under|beneath|behind|beside|between|next|front|top"
    r"|bottom|corner|background|foreground)\b",
    re.IGNORECASE,
)
# Words that bear a capital only because they come first.
_COMMON = re.compile(
    r"(a|an|the|this|that|these|those|there|here|it|he|she|they|we|some|one|two|three|four|five|six|several|many|few"
    r"|in|on|at|of|with|by|from|for|people|person|man|woman|men|women|boy|girl|child|photo|picture|image|drawing)"
)


@dataclass(frozen=True)
class Wording:
    """What chooses among the ways to say it, drawn once, so that a shorter caption does not draw anything anew."""

    caption: tuple[float, float]
    template: float
    turned: bool
    ground: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Wording:
        a, b, template, turned, ground = rng.random(5).tolist()
        return cls((a, b), template, turned < 0.5, ground)


def joined(
    layout: Layout, a: Sequence[str], b: Sequence[str], wording: Wording, *, corner: str = "", color: str | None = None
) -> Iterator[str]:
    """Captions of two pictures of which the first is on the left, above, or large; each is shorter than those before.

    Args:
        a, b: the captions of both, at least one each.
        corner: where an inset is, "top left".
        color: of the ground on which both stand, to be named.
    """
    first = _picked(a, wording.caption[0]), _picked(b, wording.caption[1])
    yield _said(layout, *first, wording, corner, color, shortest=False)
    shortest = min(a, key=len), min(b, key=len)
    for pair in (first, shortest, (brief(shortest[0]), brief(shortest[1]))):
        yield _said(layout, *pair, wording, corner, color, shortest=True)


def grounded(captions: Sequence[str], wording: Wording, color: str) -> Iterator[str]:
    """Captions of one picture on a plain ground; each is shorter than those before."""
    first, shortest = _picked(captions, wording.caption[0]), min(captions, key=len)
    yield _on_color(_bare(first), is_phrase(first), _is_sentence(first), color, wording.ground)
    for text in (first, shortest, brief(shortest)):
        yield _on_color(_bare(text), is_phrase(text), _is_sentence(text), color, None)


def names_ground(caption: str) -> bool:
    """Whether a caption says already what its picture stands on."""
    return bool(
        re.search(r"\bbackgrounds?\b|\bbackdrop\b|\b(on|against) (an? )?(white|black|gr[ae]y)\b", caption, re.I)
    )


def is_phrase(caption: str) -> bool:
    """Whether a caption is a few words for a thing, which can stand inside of a longer phrase."""
    # A period at the end makes it a sentence, whatever stands before it.
    return (
        len(caption.split()) <= _LONGEST_PHRASE and not _PUNCTUATION.search(caption) and not _NO_PHRASE.search(caption)
    )


def brief(caption: str) -> str:
    """The first of several sentences, or the first three of a list of tags."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    if len(sentences) > 1:
        return sentences[0]
    tags = [tag.strip() for tag in caption.split(",")]
    is_list = len(tags) > 3 and all(len(tag.split()) <= 4 for tag in tags)
    return ", ".join(tags[:3]) if is_list else caption


def _said(layout: Layout, a: str, b: str, wording: Wording, corner: str, color: str | None, *, shortest: bool) -> str:
    sentence = _is_sentence(a) or _is_sentence(b)
    phrases = is_phrase(a) and is_phrase(b)
    if phrases:
        templates = _PHRASES[layout]
        template = min(templates, key=len) if shortest else _picked(templates, wording.template)
        text = template.format(a=_lowered(_bare(a)), b=_lowered(_bare(b)), corner=corner)
    else:
        pairs = _CLAUSES[layout]
        pair = min(pairs, key=lambda pair: len("".join(pair))) if shortest else _picked(pairs, wording.template)
        told = [clause.format(a=_lowered(_bare(a)), b=_lowered(_bare(b)), corner=corner) for clause in pair]
        # What is large is told first.
        if wording.turned and layout != "inset":
            told.reverse()
        text = ". ".join(_raised(clause) for clause in told) + "." if sentence else "; ".join(told)
    if color is None:
        return text
    return _on_color(_bare(text), phrases, sentence, color, None if shortest else wording.ground)


def _on_color(text: str, phrase: bool, sentence: bool, color: str, place: float | None) -> str:
    """With its ground; `place` chooses among the ways to say it, None takes a short one."""
    if phrase:
        template = min(ON_COLOR[:1] + ON_COLOR[3:4], key=len) if place is None else _picked(ON_COLOR, place)
        return template.format(text=text, color=color, a_color=with_article(color))
    if sentence:
        return f"{text}. The background is {color}."
    # Behind clauses it is one more, and not a part of the last.
    return f"{text}{';' if '; ' in text else ','} {color} background"


def _picked(things: Sequence[T], place: float) -> T:
    return things[int(place * len(things))]


def _bare(caption: str) -> str:
    """Without line breaks and a period at the end."""
    return re.sub(r"\s+", " ", caption.strip()).rstrip(".").rstrip()


def _is_sentence(caption: str) -> bool:
    return caption.rstrip().endswith((".", "!", "?"))


def _lowered(text: str) -> str:
    """Without the capital of a beginning; names keep theirs."""
    head = re.match(r"[A-Z][a-z]*(?![\w'])", text)
    return text[0].lower() + text[1:] if head and _COMMON.fullmatch(head[0].lower()) else text


def _raised(text: str) -> str:
    return text[:1].upper() + text[1:]
