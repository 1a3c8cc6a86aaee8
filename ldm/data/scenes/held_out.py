"""Which combinations, words and phrasings no training scene ever shows: a function of their names alone."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

ConceptKind = Literal["color", "relation", "worn", "synonym", "phrasing"]

HELD_OUT_FRACTIONS: dict[ConceptKind, float] = {
    "color": 0.1,
    "relation": 0.1,
    "worn": 0.1,
    "synonym": 0.05,
    "phrasing": 0.1,
}
# Two ways to say the same place, and the one that it is kept under.
INVERSE_RELATIONS = {"right of": "left of", "under": "above", "behind": "in front of"}
_BOTH_WAYS = ("next to",)


class Concept(NamedTuple):
    """What a scene shows or a caption says, as far as it may be held out: its kind, and the names in it."""

    kind: ConceptKind
    names: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether training may not see it."""
        key = "\0".join(("scenes", self.kind, *self.names)).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return number / 2**64 < HELD_OUT_FRACTIONS[self.kind]


def relation_concept(first: str, how: str, second: str) -> Concept:
    """`first` stands `how` ("left of", "above", "in front of", "next to" or their opposites) `second`."""
    if how in INVERSE_RELATIONS:
        first, how, second = second, INVERSE_RELATIONS[how], first
    elif how in _BOTH_WAYS:
        first, second = sorted((first, second))
    return Concept("relation", (first, how, second))
