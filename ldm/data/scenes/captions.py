"""What is said of a scene: captions of a few words up to thirty, from a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ldm.data.scenes.catalog import CLIP_ART, Thing
from ldm.data.scenes.held_out import Fact
from ldm.data.scenes.scene import PLACES, Part, Scene

NUMBERS = ("", "one", "two", "three", "four", "five")

ONE = (
    "{a}",
    "{a}",
    "{bare}",
    "a picture of {a}",
    "a drawing of {a}",
    "an image of {a}",
    "an illustration of {a}",
    "an icon of {a}",
    "a simple drawing of {a}",
    "{a} alone",
    "here is {a}",
    "this is {a}",
    "only {a}",
    "a cartoon of {a}",
)
COUNT = (
    "{n} {many}",
    "{n} {many}",
    "a group of {n} {many}",
    "a picture of {n} {many}",
    "there are {n} {many}",
    "exactly {n} {many}",
    "{n} {many} together",
    "a drawing of {n} {many}",
    "a set of {n} {many}",
)
THREE = (
    "{a}, {b} and {c}",
    "{a}, {b}, and {c}",
    "{a} next to {b} next to {c}",
    "{a}, {b} and {c} in a row",
    "{b} between {a} and {c}",
    "from left to right: {a}, {b}, {c}",
    "a picture of {a}, {b} and {c}",
)
# Said of the first and the second; every relation is said from both sides.
HOW = {
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{a} on the left side of {b}",
        "{a} on the left and {b} on the right",
        "{a} on the left of {b}",
        "{b} to the right of {a}",
        "{b} right of {a}",
        "{b} on the right side of {a}",
        "on the left {a}, on the right {b}",
        "{b} on the right and {a} on the left",
    ),
    "above": (
        "{a} above {b}",
        "{a} over {b}",
        "{a} on top of {b}",
        "{b} under {a}",
        "{b} below {a}",
        "{b} beneath {a}",
        "{a} at the top and {b} at the bottom",
        "{a} higher than {b}",
        "{b} underneath {a}",
    ),
    "next to": (
        "{a} and {b}",
        "{a} and {b}",
        "{a} next to {b}",
        "{a} beside {b}",
        "{a} with {b}",
        "{a} by {b}",
        "{a} near {b}",
        "{a} and {b} side by side",
        "{a} together with {b}",
        "{b} and {a}",
        "{b} next to {a}",
        "{b} beside {a}",
    ),
    "in front of": (
        "{a} in front of {b}",
        "{b} behind {a}",
        "{a} with {b} behind it",
        "{a} before {b}",
        "{b} in the back and {a} in front",
        "{a} in the foreground, {b} in the background",
    ),
}
_TURNED = {"right of": "left of", "under": "above", "behind": "in front of"}
WORN = {
    "head": (
        "{a} wearing {w}",
        "{a} wearing {w}",
        "{a} in {w}",
        "{a} with {w} on its head",
        "{a} with {w}",
        "{a} that wears {w}",
        "{w} on {a}",
        "{a} wears {w}",
        "{a} has {w} on its head",
        "{w} on the head of {a}",
    ),
    "face": (
        "{a} wearing {w}",
        "{a} wearing {w}",
        "{a} with {w}",
        "{a} in {w}",
        "{a} that wears {w}",
        "{a} wears {w}",
        "{a} with {w} on",
        "{w} on the face of {a}",
    ),
    "neck": (
        "{a} wearing {w}",
        "{a} wearing {w}",
        "{a} with {w}",
        "{a} in {w}",
        "{a} that wears {w}",
        "{a} wears {w}",
        "{a} with {w} around its neck",
    ),
}
HELD = (
    "{a} holding {w}",
    "{a} holding {w}",
    "{a} with {w}",
    "{a} carrying {w}",
    "{a} that holds {w}",
    "{a} holds {w}",
    "{a} with {w} in its hand",
)
ON_COLOR = (
    "{text} on {a_color} background",
    "{text} on {color}",
    "{text} in front of {a_color} background",
    "{text}, {color} background",
    "{text} against {a_color} background",
)
ON_PLACE = {
    "grass": ("{text} on the grass", "{text} in a meadow", "{text} on a green meadow", "{text} on a lawn"),
    "sea": ("{text} at sea", "{text} on the water", "{text} in the sea", "{text} on the ocean"),
    "night sky": ("{text} in the night sky", "{text} at night", "{text} under the stars", "{text} in front of the stars"),
}
STYLE = ("{text}, {style} style", "{text} in {style} style", "{text} in the style of {style}", "{style} style {text}")
STYLE_OF_MANY = ("clip art of {text}", "{text}, clip art", "a clip art of {text}", "{text} as clip art")
COLOR_SENTENCES = ("the {noun} is {color}", "the color of the {noun} is {color}")
GROUND_SENTENCES = {
    "": ("the background is white", "nothing else is there"),
    "grass": ("the ground is green grass and the sky is light",),
    "sea": ("below is the blue sea",),
    "night sky": ("it is night and there are stars",),
}
LONG_OPENINGS = ("a picture of {text}", "this is a drawing of {text}", "the picture shows {text}", "we see {text}")


@dataclass
class Caption:
    """Text as it grows, and what of it may be held out."""

    text: str = ""
    facts: list[Fact] = field(default_factory=list)


class Writer:
    """Writes captions of scenes.

    Args:
        draw: chooses among phrasings and names.
        held_out: kinds of facts that may be held out ones; of the others, those are left out. For tests of what a model
            has never seen.
    """

    def __init__(self, draw: np.random.Generator, held_out: frozenset[str] = frozenset()) -> None:
        self.draw = draw
        self.held_out = held_out

    def caption(self, scene: Scene, *, plain: bool = False) -> Caption:
        """A caption of a scene.

        Args:
            plain: with everything that can be seen of colors, by the things' own names, and without style and ground.
        """
        caption = Caption()
        is_long = not plain and self.draw.random() < 0.1
        # A long one opens in its own way, and a plain one does not.
        first_only = plain or is_long
        parts = [self._noun_phrase(part, caption, plain) for part in scene.parts]
        first = scene.parts[0]
        if scene.kind == "count":
            color = f"{first.color} " if first.color else ""
            number = NUMBERS[scene.count] if first_only or self.draw.random() < 0.85 else str(scene.count)
            many = color + self._name(first.thing, caption, plain, plural=True)
            template = self._template(COUNT[: 1 if first_only else None], caption)
            text = template.format(n=number, many=many)
        elif scene.kind == "three":
            text = self._template(THREE, caption).format(a=parts[0], b=parts[1], c=parts[2])
        elif len(parts) == 2:
            how = _TURNED.get(scene.how, scene.how)
            a, b = parts if how == scene.how else parts[::-1]
            # Who stands side by side is also next to each other, and one of them is left.
            if how == "left of" and not plain and self.draw.random() < 0.15:
                how = "next to"
            text = self._template(HOW[how], caption).format(a=a, b=b)
        elif first.worn is not None or first.held is not None:
            text = parts[0]
        else:
            template = self._template(ONE[: 1 if first_only else None], caption)
            text = template.format(a=parts[0], bare=_without_article(parts[0]))
        if is_long:
            caption.text = self._long(text, scene, caption)
            return caption
        if not plain:
            if scene.background and self.draw.random() < 0.85:
                text = self._on_ground(text, scene.background, caption)
            if scene.family is not None and self.draw.random() < 0.15:
                text = self._styled(text, scene.family, caption)
        caption.text = text
        return caption

    def _template(self, templates: Sequence[str], caption: Caption) -> str:
        facts = [Fact("phrasing", (template,)) for template in templates]
        # The first of each list is the plain one, and never held out.
        unseen = [place for place, fact in enumerate(facts) if place and fact.is_held_out]
        allowed = [place for place in range(len(templates)) if place not in unseen]
        if unseen and "phrasing" in self.held_out:
            allowed = unseen
        place = allowed[int(self.draw.integers(len(allowed)))]
        if place:
            caption.facts.append(facts[place])
        return templates[place]

    def _noun_phrase(self, part: Part, caption: Caption, plain: bool) -> str:
        """ "a small red car", and what it wears or holds."""
        words = []
        if part.size is not None and (plain or self.draw.random() < 0.9):
            big = ("big", "large") if plain or self.draw.random() < 0.9 else ("huge", "giant")
            small = ("small", "little") if plain or self.draw.random() < 0.9 else ("tiny", "little")
            words.append((big if part.size == "big" else small)[int(self.draw.integers(2))])
        if part.color is not None and (plain or self.draw.random() < 0.92):
            words.append(part.color)
        name = self._name(part.thing, caption, plain)
        text = _with_article(part.thing, " ".join([*words, name]), bool(words) or name != part.thing.name)
        if part.worn is not None:
            place = part.worn.thing.wears
            assert place is not None
            template = self._template(WORN[place], caption)
            text = template.format(a=text, w=self._noun_phrase(part.worn, caption, plain))
        if part.held is not None:
            text = self._template(HELD, caption).format(a=text, w=self._noun_phrase(part.held, caption, plain))
        return text

    def _name(self, thing: Thing, caption: Caption, plain: bool, plural: bool = False) -> str:
        own = thing.plural if plural else thing.name
        if plain or plural:
            return own
        chance = self.draw.random()
        if chance < 0.03 and thing.classes:
            return thing.classes[int(self.draw.integers(len(thing.classes)))]
        others = [*thing.synonyms, *thing.kinds]
        if "synonym" in self.held_out:
            unseen = [word for word in others if Fact("synonym", (thing.name, word)).is_held_out]
            if unseen:
                word = unseen[int(self.draw.integers(len(unseen)))]
                caption.facts.append(Fact("synonym", (thing.name, word)))
                return word
        others = [word for word in others if not Fact("synonym", (thing.name, word)).is_held_out]
        if chance < 0.25 and others:
            word = others[int(self.draw.integers(len(others)))]
            caption.facts.append(Fact("synonym", (thing.name, word)))
            return word
        return own

    def _on_ground(self, text: str, background: str, caption: Caption) -> str:
        if background in PLACES:
            return self._template(ON_PLACE[background], caption).format(text=text)
        article = "an" if _sounds_open(background) else "a"
        return self._template(ON_COLOR, caption).format(text=text, color=background, a_color=f"{article} {background}")

    def _styled(self, text: str, family: str, caption: Caption) -> str:
        if family == CLIP_ART:
            return self._template(STYLE_OF_MANY, caption).format(text=text)
        return self._template(STYLE, caption).format(text=text, style=family)

    def _long(self, text: str, scene: Scene, caption: Caption) -> str:
        """Whole sentences, up to thirty words."""
        opening = self._template(LONG_OPENINGS, caption)
        sentences = [opening.format(text=text)]
        for part in scene.parts:
            if part.color is not None and scene.count == 1:
                template = self._template(COLOR_SENTENCES, caption)
                sentences.append(template.format(noun=part.thing.name, color=part.color))
        if scene.background in GROUND_SENTENCES:
            sentences.append(self._template(GROUND_SENTENCES[scene.background], caption))
        else:
            sentences.append(f"the background is {scene.background}")
        if scene.family is not None:
            style = "clip art" if scene.family == CLIP_ART else f"in {scene.family} style"
            sentences.append(f"it is {style}" if scene.family == CLIP_ART else f"it is drawn {style}")
        kept = [sentences[0]]
        for sentence in sentences[1:]:
            if sum(len(one.split()) for one in [*kept, sentence]) <= LONGEST:
                kept.append(sentence)
        return ". ".join(one[0].upper() + one[1:] for one in kept) + "."


LONGEST = 30  # words


def _with_article(thing: Thing, words: str, changed: bool) -> str:
    """ "a red car", "an orange", "jeans"."""
    if not thing.article:
        return words
    if not changed:
        return f"{thing.article} {words}"
    return f"{'an' if _sounds_open(words) else 'a'} {words}"


def _sounds_open(words: str) -> bool:
    """Whether a word begins with the sound of a vowel, so that "an" stands before it."""
    word = words.lower()
    if word.startswith(("uni", "eu", "use", "one", "ufo", "uk")):
        return word.startswith(("unin", "unim"))
    if word.startswith(("hour", "honest", "heir")):
        return True
    return word[0] in "aeiou"


def _without_article(text: str) -> str:
    head, _, rest = text.partition(" ")
    return rest if head in ("a", "an") and rest else text
