"""Compositions of training images with captions that name their layout, after arXiv:2502.21318.

Two images side by side, one above the other, one small in a corner of the other; or a cutout on a plain color. They are
functions of (seed, epoch // renew_every, sample id).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ldm.data.images import CLEAR_ALPHA, border_pixels, is_clear, resize_and_crop
from ldm.data.rng import generator
from ldm.data.scenes.captions import ON_COLOR, RELATION_PHRASES, with_article
from ldm.data.scenes.render import RGB
from ldm.data.sources import DataConfig, Decoded, Sample

Pair = Literal["beside", "above", "inset"]
Layout = Literal[Pair, "ground"]
T = TypeVar("T")

LAYOUT_FRACTIONS: dict[Layout, float] = {"beside": 0.38, "above": 0.24, "inset": 0.2, "ground": 0.18}
COLORED = 0.5  # fraction of pairs of cutouts on a plain color
MAX_TRIES = 4
COUNTED = 1024  # samples for the summary
MIN_VISIBLE = 0.45  # the minimum visible fraction of a cropped part; a square one keeps half
MIN_CONTRAST = 90.0  # the minimum RGB distance of a cutout's mean color and the ground
PLAIN_BORDER, PLAIN_TOLERANCE = 0.6, 14  # a plain border: this fraction is within the tolerance (scans touch the edge)

Size = tuple[int, int]
Box = tuple[int, int, int, int]


class Composer:
    """Decides which of the training samples are composed, and of what.

    `fits` tells whether a text encoder reads a caption completely; None accepts all. Compositions need such a caption.
    """

    def __init__(self, samples: Sequence[Sample], config: DataConfig, seed: int) -> None:
        self.samples, self.config, self.seed = samples, config, seed
        self.fits: Callable[[str], bool] | None = None

    def compose(self, epoch: int, index: int, size: Size) -> Sample | None:
        """The composition of `size` (height, width) that replaces a sample in an epoch; None keeps the sample."""
        sample, (height, width) = self.samples[index], size
        rng = generator(self.seed, "compose", epoch // self.config.renew_every, sample.id)
        if rng.random() >= self.config.compose:
            return None
        for _ in range(MAX_TRIES):
            partner = self.samples[int(rng.integers(len(self.samples)))]
            wording, place, swapped = Wording.sample(rng), rng.random(4), bool(rng.integers(2))
            is_alike = sample.group == partner.group or bool({*_own_captions(sample)} & {*_own_captions(partner)})
            possible: dict[Layout, bool] = {
                "beside": not is_alike and all(_fills(part, height, width / 2) for part in (sample, partner)),
                "above": not is_alike and all(_fills(part, height / 2, width) for part in (sample, partner)),
                "inset": not is_alike,
                "ground": sample.cutout is not None,
            }
            layouts = [layout for layout, can in possible.items() if can]
            left = rng.random() * sum(LAYOUT_FRACTIONS[layout] for layout in layouts)
            layout: Layout | None = None
            for layout in layouts:
                left -= LAYOUT_FRACTIONS[layout]
                if left < 0:
                    break
            if layout is None:
                continue
            parts = (sample,) if layout == "ground" else (sample, partner)
            if swapped and layout in ("beside", "above"):
                parts = parts[::-1]
            color = None
            if layout == "ground" or place[3] < COLORED:
                # An inset covers a part of the ground and needs none.
                color = _ground(parts[:1] if layout == "inset" else parts, float(rng.random()))
            if layout == "ground" and color is None:
                continue
            composition = Composition(layout, parts, color, self.config.background_rgb, tuple(place[:3].tolist()))
            texts = composition.captions(wording)
            text = next((text for text in texts if self.fits is None or self.fits(text)), None)
            if text is not None:
                return composition.sample(text, size)
        return None

    def summary(self, size_of: Callable[[int], Size]) -> str:
        """The fraction of composed samples, counted on a part of the first epoch, with advice if it is small; `size_of`
        gives (height, width) by index.
        """
        indices = range(0, len(self.samples), max(1, len(self.samples) // COUNTED))
        made = sum(self.compose(0, index, size_of(index)) is not None for index in indices)
        every = self.config.renew_every
        text = f"{100 * made / len(indices):.3g} % of the samples are composed of others, anew every {every} epochs"
        if made > self.config.compose * len(indices) / 2:
            return text
        why = "but joined captions are longer than text.max_length, or most images have the same caption"
        return f"{text}; data.compose is {100 * self.config.compose:g} %, {why}"


@dataclass(frozen=True)
class Composition:
    """The recipe of a composed image.

    Args:
        parts: left and right, above and below, or the large one and the inset.
        color: name of the ground color; None keeps the ground of each part, and `background` behind cutouts.
        places: three numbers in [0, 1) that vary the positions.
    """

    layout: Layout
    parts: tuple[Sample, ...]
    color: str | None
    background: tuple[int, int, int]
    places: tuple[float, ...]

    def captions(self, wording: Wording) -> Iterator[str]:
        """Possible captions in descending length; "" alone if a part has none."""
        first, *others = (_own_captions(part) for part in self.parts)
        if not all((first, *others)):
            return iter([""])
        if self.layout == "ground":
            assert self.color is not None
            return grounded(first, wording, self.color)
        corner = f"{'bottom' if self.places[0] >= 0.5 else 'top'} {'right' if self.places[1] >= 0.5 else 'left'}"
        return joined(self.layout, first, others[0], wording, corner=corner, color=self.color)

    def sample(self, caption: str, size: Size) -> Sample:
        """The composition as a sample. Its bytes are a key only, and it has no digest."""
        names = [part.id for part in self.parts]
        key = json.dumps([names, self.layout, self.color, self.background, self.places, size]).encode()
        return Sample(
            id=" + ".join(names) if len(names) > 1 else f"{names[0]} on {self.color}",
            captions=(caption,) if caption else (),
            group=self.parts[0].group,
            read=partial(bytes, key),
            decode=partial(self.render, size=size),
            size=size[::-1],
        )

    def render(self, key: bytes, *, size: Size) -> Decoded:
        """The image of `size` (height, width); the key of the sample is not needed."""
        height, width = size
        pieces = [_Piece.from_decoded(part.load_decoded(), self.background) for part in self.parts]
        color = self.background if self.color is None else RGB[self.color]
        x, y, z = self.places
        if self.layout == "inset" and self.color is None:
            canvas = Image.fromarray(resize_and_crop(self.parts[0].load(), size).permute(1, 2, 0).numpy())
        else:
            canvas = Image.new("RGB", (width, height), color)
        if self.layout == "inset":
            if self.color is not None:
                _paste(canvas, pieces[0], (0, 0, width, height), color, (0.5, 0.5), 0.92)
            inset = pieces[1]
            ratio = min(2.0, max(0.5, inset.pixels.width / inset.pixels.height))
            side = (0.3 + 0.15 * z) * min(width, height)
            w, h = max(1, round(side * ratio**0.5)), max(1, round(side / ratio**0.5))
            left, top = width - w if y >= 0.5 else 0, height - h if x >= 0.5 else 0
            _paste(canvas, inset, (left, top, left + w, top + h), None, (0.5, 0.5), 0.96)
        elif self.layout == "ground":
            _paste(canvas, pieces[0], (0, 0, width, height), color, (x, y), 0.6 + 0.36 * z)
        else:
            cells = [(0, 0, width // 2, height), (width // 2, 0, width, height)]
            if self.layout == "above":
                cells = [(0, 0, width, height // 2), (0, height // 2, width, height)]
            for piece, cell in zip(pieces, cells, strict=True):
                # Both at the same height, or exactly below each other.
                _paste(canvas, piece, cell, color, (0.3 + 0.4 * x, 0.3 + 0.4 * y), 0.9 + 0.08 * z)
        return Decoded(canvas, "", "RGB")


# ---- choosing


def _own_captions(sample: Sample) -> tuple[str, ...]:
    """The captions that do not come from templates."""
    return sample.captions[: len(sample.captions) - sample.templated]


def _fills(part: Sample, height: float, width: float) -> bool:
    """Whether enough is visible of an image that fills a cell."""
    if part.cutout is not None or part.size is None:
        return True
    ratio = part.size[0] / part.size[1] * height / width
    return min(ratio, 1 / ratio) >= MIN_VISIBLE


def _ground(parts: Sequence[Sample], chance: float) -> str | None:
    """The name of a color with contrast to all cutouts; None if a part is no cutout, or its caption names a ground."""
    cutouts = [part.cutout for part in parts]
    if any(one is None for one in cutouts) or any(names_ground(text) for part in parts for text in _own_captions(part)):
        return None
    means = np.array(cutouts, dtype=np.float64)  # [P, 3]
    fit = [name for name, rgb in RGB.items() if np.linalg.norm(means - rgb, axis=1).min() >= MIN_CONTRAST]
    return fit[int(chance * len(fit))] if fit else None


# ---- rendering


@dataclass(frozen=True)
class _Piece:
    """A part to paste: RGB `pixels` on the color `behind` (None: the motif fills it); `alpha`, mode L, of a cutout."""

    pixels: Image.Image
    alpha: Image.Image | None
    behind: tuple[int, int, int] | None

    @classmethod
    def from_decoded(cls, decoded: Decoded, background: tuple[int, int, int]) -> _Piece:
        """Crops an image to its motif, if that has a transparent or plain border."""
        image, alpha = decoded.image, decoded.alpha
        if alpha is not None and is_clear(alpha):
            box = alpha.point(lambda value: 255 * (value >= CLEAR_ALPHA)).getbbox() or (0, 0, *alpha.size)
            return cls(image.crop(box), alpha.crop(box), background)
        pixels = np.asarray(image)
        border = border_pixels(pixels).astype(np.int16)  # [N, 3]
        plain = np.median(border, axis=0)
        if float(np.mean(np.abs(border - plain).max(axis=1) <= PLAIN_TOLERANCE)) < PLAIN_BORDER:
            return cls(image, None, None)
        motif = np.abs(pixels.astype(np.int16) - plain).max(axis=2) > PLAIN_TOLERANCE  # [h, w]
        rows, columns = np.flatnonzero(motif.any(axis=1)), np.flatnonzero(motif.any(axis=0))
        red, green, blue = plain.astype(int).tolist()
        if len(rows):
            image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        return cls(image, None, (red, green, blue))


def _paste(
    canvas: Image.Image,
    piece: _Piece,
    box: Box,
    ground: tuple[int, int, int] | None,
    where: tuple[float, float],
    fraction: float,
) -> None:
    """Pastes an image into a box: cropped to fill it, or as a motif that takes a `fraction` of it, at `where` in [0, 1]
    of the remaining room, on its own ground, or as a cutout on `ground` (None keeps the canvas).
    """
    left, top, right, bottom = box
    room = right - left, bottom - top
    if piece.behind is None:
        canvas.paste(ImageOps.fit(piece.pixels, room, Image.Resampling.BICUBIC), (left, top))
        return
    if piece.alpha is None:
        canvas.paste(piece.behind, box)
    elif ground is not None:
        canvas.paste(ground, box)
    scale = fraction * min(room[0] / piece.pixels.width, room[1] / piece.pixels.height)
    size = max(1, round(piece.pixels.width * scale)), max(1, round(piece.pixels.height * scale))
    corner = left + round((room[0] - size[0]) * where[0]), top + round((room[1] - size[1]) * where[1])
    pixels = piece.pixels.resize(size, Image.Resampling.BICUBIC)
    if piece.alpha is not None:
        # Replace the color behind the motif by that of the canvas, as far as it is visible.
        through = 1 - np.asarray(piece.alpha.resize(size, Image.Resampling.BICUBIC), np.float64)[..., None] / 255
        under = np.asarray(canvas.crop((*corner, corner[0] + size[0], corner[1] + size[1])), np.float64)  # [h, w, 3]
        blended = np.asarray(pixels, np.float64) + through * (under - np.array(piece.behind))
        pixels = Image.fromarray(np.clip(np.rint(blended), 0, 255).astype(np.uint8))
    canvas.paste(pixels, corner)


# ---- captions: those of two images, joined by a small grammar
#
# Short noun phrases are joined into one ("red apple to the left of a dog"). Sentences and lists of tags become separate
# clauses ("on the left: …; on the right: …"), so that no words are attributed to the other image.

# Templates of scenes that imply contact or possession are left out.
_TOUCHING = {"{a} on top of {b}", "{a} over {b}", "{a} with {b}", "{a} by {b}", "{a} together with {b}"}
_PHRASES: dict[Pair, tuple[str, ...]] = {
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
_CLAUSES: dict[Pair, tuple[tuple[str, str], ...]] = {
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


class Wording(NamedTuple):
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
    layout: Pair, a: Sequence[str], b: Sequence[str], wording: Wording, *, corner: str = "", color: str | None = None
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
    for text, place in ((first, wording.ground), (first, None), (shortest, None), (brief(shortest), None)):
        yield _on_color(_bare(text), is_phrase(text), _is_sentence(text), color, place)


def names_ground(caption: str) -> bool:
    """Whether a caption names the background."""
    return bool(re.search(r"\b(backgrounds?|backdrop|(on|against) (an? )?(white|black|gr[ae]y))\b", caption, re.I))


def is_phrase(caption: str) -> bool:
    """Whether a caption is a short noun phrase, which can be a part of a longer one."""
    is_short = len(caption.split()) <= _MAX_PHRASE_WORDS
    return is_short and not _PUNCTUATION.search(caption) and not _NO_PHRASE.search(caption)


def brief(caption: str) -> str:
    """The first of several sentences, or the first three tags of a list."""
    sentences = re.split(r"(?<=[.!?])\s+", caption.strip())
    if len(sentences) > 1:
        return sentences[0]
    tags = [tag.strip() for tag in caption.split(",")]
    is_list = len(tags) > 3 and all(len(tag.split()) <= 4 for tag in tags)
    return ", ".join(tags[:3]) if is_list else caption


def _join(layout: Pair, a: str, b: str, wording: Wording, corner: str, color: str | None, *, shortest: bool) -> str:
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
        if wording.swapped and layout != "inset":  # the large image comes first
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
    return f"{text}{';' if '; ' in text else ','} {color} background"  # a separate clause, not a part of the last one


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
