"""Captions of scenes, up to thirty words, from a grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.data.rng import pick
from ldm.data.scenes import CLIP_ART, INVERSE_RELATIONS, PLACES, Concept, Part, Scene, Thing

NUMBERS = ("", "one", "two", "three", "four", "five")
# Phrases can be parts of other phrases, clauses cannot. The first of each list is the plain one.
ONE_PHRASES = (
    *("{a}", "{a}", "{bare}", "a picture of {a}", "a drawing of {a}", "an image of {a}", "an illustration of {a}"),
    *("an icon of {a}", "a simple drawing of {a}", "{a} alone", "a cartoon of {a}"),
)
ONE_CLAUSES = ("here is {a}", "this is {a}", "only {a}")
COUNT_PHRASES = (
    *("{n} {many}", "{n} {many}", "a group of {n} {many}", "a picture of {n} {many}", "exactly {n} {many}"),
    *("{n} {many} together", "a drawing of {n} {many}", "a set of {n} {many}"),
)
COUNT_CLAUSES = ("there are {n} {many}", "here are {n} {many}")
THREE_PHRASES = (
    *("{a}, {b} and {c}", "{a}, {b}, and {c}", "{a} next to {b} next to {c}", "{a}, {b} and {c} in a row"),
    *("{b} between {a} and {c}", "a picture of {a}, {b} and {c}"),
)
THREE_CLAUSES = ("from left to right: {a}, {b}, {c}",)
# Every relation is named from both sides; the order of "next to" is random.
RELATION_PHRASES = {
    "left of": (
        *("{a} to the left of {b}", "{a} left of {b}", "{a} on the left side of {b}"),
        *("{a} on the left and {b} on the right", "{a} on the left of {b}", "{b} to the right of {a}"),
        *("{b} right of {a}", "{b} on the right side of {a}", "{b} on the right and {a} on the left"),
    ),
    "above": (
        *("{a} above {b}", "{a} over {b}", "{a} on top of {b}", "{b} under {a}", "{b} below {a}"),
        *("{b} beneath {a}", "{a} at the top and {b} at the bottom", "{a} higher than {b}", "{b} underneath {a}"),
    ),
    "next to": (
        *("{a} next to {b}", "{a} and {b}", "{a} and {b}", "{a} beside {b}", "{a} with {b}", "{a} by {b}"),
        *("{a} near {b}", "{a} and {b} side by side", "{a} together with {b}"),
    ),
    "in front of": (
        *("{a} in front of {b}", "{b} behind {a}", "{a} with {b} behind it", "{a} before {b}"),
        *("{b} in the back and {a} in front", "{a} in the foreground, {b} in the background"),
    ),
}
RELATION_CLAUSES = {
    "left of": ("on the left {a}, on the right {b}", "{a} is to the left of {b}", "{b} is to the right of {a}"),
    "above": ("{a} is above {b}", "{b} is under {a}"),
    "next to": ("{a} is next to {b}", "there are {a} and {b}"),
    "in front of": ("{a} is in front of {b}", "{b} is behind {a}"),
}
WORN_PHRASES = {
    "head": (
        *("{a} wearing {w}", "{a} wearing {w}", "{a} in {w}", "{a} with {w} on its head", "{a} with {w}"),
        *("{a} that wears {w}", "{a} with {w} on"),
    ),
    "face": (
        *("{a} wearing {w}", "{a} wearing {w}", "{a} with {w}", "{a} in {w}", "{a} that wears {w}"),
        "{a} with {w} on",
    ),
    "neck": (
        *("{a} wearing {w}", "{a} wearing {w}", "{a} with {w}", "{a} in {w}", "{a} that wears {w}"),
        "{a} with {w} around its neck",
    ),
}
WORN_CLAUSES = {
    "head": ("{a} wears {w}", "{a} has {w} on its head", "{w} on {a}", "{w} on the head of {a}"),
    "face": ("{a} wears {w}", "{w} on the face of {a}", "{a} has {w} on"),
    "neck": ("{a} wears {w}", "{a} has {w} around its neck"),
}
HELD_PHRASES = ("{a} holding {w}", "{a} holding {w}", "{a} with {w}", "{a} carrying {w}", "{a} that holds {w}")
HELD_CLAUSES = ("{a} holds {w}", "{a} is holding {w}")
ON_COLOR = (
    *("{text} on {a_color} background", "{text} on {color}", "{text} in front of {a_color} background"),
    *("{text}, {color} background", "{text} against {a_color} background"),
)
ON_PLACE = {
    "grass": ("{text} on the grass", "{text} in a meadow", "{text} on a green meadow", "{text} on a lawn"),
    "sea": ("{text} at sea", "{text} on the water", "{text} in the sea", "{text} on the ocean"),
    "night sky": (
        *("{text} in the night sky", "{text} at night", "{text} under the stars", "{text} in front of the stars"),
    ),
}
STYLE = ("{text}, {style} style", "{text} in {style} style", "{text} in the style of {style}")
STYLE_PHRASES = ("{style} style: {text}", "{a_style} drawing of {text}")
STYLE_OF_MANY = ("{text}, clip art", "{text} as clip art")
STYLE_OF_MANY_PHRASES = ("clip art of {text}", "a clip art of {text}")
COLOR_SENTENCES = ("the {noun} is {color}", "the color of the {noun} is {color}")
CLASS_SENTENCES = ("the {noun} is {a_class}", "{a_noun} is {a_class}")
GROUND_SENTENCES = {
    "": ("nothing else is there",),
    "grass": ("the ground is green grass and the sky is light",),
    "sea": ("below is the blue sea",),
    "night sky": ("it is night and there are stars",),
}
LONG_OPENINGS = ("a picture of {text}", "this is a drawing of {text}", "the picture shows {text}", "we see {text}")


@dataclass
class Caption:
    """A caption, and its concepts that may be held out."""

    text: str = ""
    concepts: list[Concept] = field(default_factory=list)


class CaptionWriter:
    """Writes captions of scenes.

    Args:
        rng: chooses phrasings and names.
        held_out: kinds of concepts of which held-out ones may occur, for prompts that no training caption contains.
    """

    def __init__(self, rng: np.random.Generator, held_out: frozenset[str] = frozenset()) -> None:
        self.rng = rng
        self.held_out = held_out

    def caption(self, scene: Scene, *, plain: bool = False) -> Caption:
        """A caption of a scene.

        Args:
            plain: with all tints, main names and first phrasings, without style and background.
        """
        caption = Caption()
        is_long = not plain and self.rng.random() < 0.1
        may_be_clause = not plain and not is_long and self.rng.random() < 0.2
        text = self._parts(scene, caption, plain, is_long, may_be_clause)
        if is_long:
            caption.text = self._long(text, scene, caption)
            return caption
        if not plain:
            ground, family = scene.background, scene.family
            if ground and self.rng.random() < 0.85:
                templates = ON_PLACE[ground] if ground in PLACES else ON_COLOR
                template = self._template(templates, caption)
                text = template.format(text=text, color=ground, a_color=with_article(ground))
            if family is not None and self.rng.random() < 0.15:
                is_art = family == CLIP_ART
                styles, phrases = (STYLE_OF_MANY, STYLE_OF_MANY_PHRASES) if is_art else (STYLE, STYLE_PHRASES)
                is_phrase = not may_be_clause and not _PICTURED.match(text)  # no "drawing of a cartoon of"
                template = self._template((*styles, *phrases) if is_phrase else styles, caption)
                text = template.format(text=text, style=family, a_style=with_article(family))
        caption.text = text
        return caption

    def _parts(self, scene: Scene, caption: Caption, plain: bool, is_long: bool, clause: bool) -> str:
        """The things of a scene, as a phrase or a clause."""
        first, only_first = scene.parts[0], plain or is_long
        if len(scene.parts) == 1 and scene.kind != "count" and (first.worn is not None or first.held is not None):
            return self._noun_phrase(first, caption, plain, clause)
        if scene.kind == "count":
            color = f"{first.color} " if first.color else ""
            number = NUMBERS[scene.count] if only_first or self.rng.random() < 0.85 else str(scene.count)
            many = color + self._name(first.thing, caption, plain, plural=True)
            return self._choice(COUNT_PHRASES, COUNT_CLAUSES, clause, only_first, caption).format(n=number, many=many)
        parts = [self._noun_phrase(part, caption, plain) for part in scene.parts]
        if scene.kind == "three":
            a, b, c = parts
            return self._choice(THREE_PHRASES, THREE_CLAUSES, clause, only_first, caption).format(a=a, b=b, c=c)
        if len(parts) == 2:
            how = INVERSE_RELATIONS.get(scene.relation, scene.relation)
            swapped = how != scene.relation
            a, b = parts[::-1] if swapped else parts
            if how == "left of" and not plain and self.rng.random() < 0.15:  # "left of" implies "next to"
                how = "next to"
            template = self._choice(RELATION_PHRASES[how], RELATION_CLAUSES[how], clause, plain, caption)
            second = template.startswith("{b}")  # the subject of a clause
            if _is_many(scene.parts[second != swapped].thing, b if second else a):
                template = template.replace("} is ", "} are ")
            return template.format(a=a, b=b)
        template = self._choice(ONE_PHRASES, ONE_CLAUSES, clause, only_first, caption)
        if _is_many(first.thing, parts[0]):
            template = template.replace("this is", "these are").replace("here is", "here are")
        return template.format(a=parts[0], bare=_without_article(parts[0]))

    def _choice(
        self, phrases: Sequence[str], clauses: Sequence[str], clause: bool, only_first: bool, caption: Caption
    ) -> str:
        if only_first:
            return phrases[0]
        return self._template(clauses if clause else phrases, caption, plain_first=not clause)

    def _template(self, templates: Sequence[str], caption: Caption, *, plain_first: bool = True) -> str:
        concepts = [Concept("phrasing", (template,)) for template in templates]
        # The first phrase is never held out.
        may_be_unseen = [not (plain_first and concept == concepts[0]) for concept in concepts]
        unseen = [place for place, may in enumerate(may_be_unseen) if may and concepts[place].is_held_out]
        allowed = [place for place in range(len(templates)) if place not in unseen]
        if unseen and "phrasing" in self.held_out:
            allowed = unseen
        place = pick(allowed, self.rng)
        if not plain_first or concepts[place] != concepts[0]:
            caption.concepts.append(concepts[place])
        return templates[place]

    def _noun_phrase(
        self, part: Part, caption: Caption, plain: bool, clause: bool = False, broader: float = 0.03
    ) -> str:
        """ "a small red car", and what it wears or holds; `broader` is the probability of a name of its class."""
        words = []
        if part.size is not None and (plain or self.rng.random() < 0.9):
            big = ("big", "large") if plain or self.rng.random() < 0.9 else ("huge", "giant")
            small = ("small", "little") if plain or self.rng.random() < 0.9 else ("tiny", "little")
            words.append((big if part.size == "big" else small)[int(self.rng.integers(2))])
        if part.color is not None and (plain or self.rng.random() < 0.92):
            words.append(part.color)
        elif part.color is None and not plain and self.rng.random() < 0.12:
            # The color of the drawing, if it is usual for the thing.
            words += [color for color in part.drawing.colors[:1] if part.thing.tint and color in part.thing.colors]
        name = self._name(part.thing, caption, plain, broader=broader)
        text = _thing_with_article(part.thing, words, name)
        if part.worn is not None:
            place = part.worn.thing.wears
            assert place is not None
            template = self._choice(WORN_PHRASES[place], WORN_CLAUSES[place], clause, plain, caption)
            # Headwear is mostly called a hat.
            text = template.format(a=text, w=self._noun_phrase(part.worn, caption, plain, broader=0.2))
        if part.held is not None:
            template = self._choice(HELD_PHRASES, HELD_CLAUSES, clause, plain, caption)
            text = template.format(a=text, w=self._noun_phrase(part.held, caption, plain))
        return text

    def _name(self, thing: Thing, caption: Caption, plain: bool, plural: bool = False, broader: float = 0.03) -> str:
        if plural:
            others = [Concept("synonym", (thing.name, word)) for word, (_, many) in thing.forms.items() if many]
            others = [concept for concept in others if not concept.is_held_out]
            if plain or not others or self.rng.random() >= 0.25:
                return thing.plural
            caption.concepts.append(pick(others, self.rng))
            return thing.forms[caption.concepts[-1].names[1]][1]
        if plain:
            return thing.name
        chance = self.rng.random()
        if chance < broader and thing.classes:
            return pick(thing.classes, self.rng)
        others = [Concept("synonym", (thing.name, word)) for word in (*thing.synonyms, *thing.kinds)]
        unseen = [concept for concept in others if concept.is_held_out]
        if unseen and "synonym" in self.held_out:
            others = unseen
        elif chance < broader + 0.27:
            others = [concept for concept in others if not concept.is_held_out]
        else:
            return thing.name
        if not others:
            return thing.name
        caption.concepts.append(pick(others, self.rng))
        return caption.concepts[-1].names[1]

    def _long(self, text: str, scene: Scene, caption: Caption) -> str:
        """Sentences of up to thirty words."""
        opening = self._template(LONG_OPENINGS, caption)
        sentences = [opening.format(text=text)]
        for part in scene.parts if scene.count == 1 else ():
            noun = part.thing.name
            if part.color is not None:
                template = self._template(COLOR_SENTENCES, caption)
                if _is_many(part.thing, noun) and template.startswith("the {noun}"):
                    template = template.replace(" is ", " are ")
                sentences.append(template.format(noun=noun, color=part.color))
            counted = [word for word in part.thing.classes if word not in _UNCOUNTED]
            if counted and part.thing.forms[noun][0]:
                broader = pick(counted, self.rng)
                template = self._template(CLASS_SENTENCES, caption)
                a_noun = _thing_with_article(part.thing, [], noun)
                sentences.append(template.format(noun=noun, a_noun=a_noun, a_class=with_article(broader)))
        if scene.background in PLACES or (not scene.background and self.rng.random() < 0.5):
            sentences.append(self._template(GROUND_SENTENCES[scene.background], caption))
        else:
            sentences.append(f"the background is {scene.background or 'white'}")
        if scene.family is not None:
            style = "clip art" if scene.family == CLIP_ART else f"in {scene.family} style"
            sentences.append(f"it is {style}" if scene.family == CLIP_ART else f"it is drawn {style}")
        caption_sentences = [sentences[0]]
        for sentence in sentences[1:]:
            whole = ". ".join([*caption_sentences, sentence])
            if len(whole.split()) <= MAX_WORDS and len(re.findall(r"\w+|[^\w\s]", whole)) <= MAX_TOKENS:
                caption_sentences.append(sentence)
        return ". ".join(one[0].upper() + one[1:] for one in caption_sentences) + "."


MAX_WORDS = 30
MAX_TOKENS = 30  # words and punctuation marks, so that `text.max_length: 48` truncates nothing
_PICTURED = re.compile(r"an? (simple )?(picture|drawing|image|illustration|icon|cartoon) of ")
_UNCOUNTED = ("clothes", "breakfast", "baked goods", "fast food", "meat", "furniture", "jewelry", "candy", "clothing")


def _thing_with_article(thing: Thing, adjectives: Sequence[str], word: str) -> str:
    """ "a red car", "an orange", "jeans"."""
    text = " ".join([*adjectives, word])
    if word not in thing.forms:
        return with_article(text) if word not in _UNCOUNTED else text
    article = thing.forms[word][0]
    if not article:
        return text
    return with_article(text) if adjectives else f"{article} {text}"


def with_article(words: str) -> str:
    """ "a red car", "an hour", "furniture"."""
    if words in _UNCOUNTED:
        return words
    word = words.lower()
    vowel = word[0] in "aeiou" or word.startswith(("hour", "honest", "heir"))
    if word.startswith(("uni", "eu", "ewe", "use", "one", "ufo", "uk")):
        vowel = word.startswith(("unin", "unim"))
    return f"{'an' if vowel else 'a'} {words}"


def _is_many(thing: Thing, words: str) -> bool:
    """Whether a verb is plural: "blue jeans are", but "a pair of jeans is", "Santa Claus is"."""
    is_plural = not thing.forms[thing.name][0] and thing.name.endswith("s") and thing.name.islower()
    return is_plural and words == _without_article(words)


def _without_article(text: str) -> str:
    head, _, rest = text.partition(" ")
    return rest if head in ("a", "an") and rest else text
