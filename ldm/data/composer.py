"""Pictures composed of the owner's own, after arXiv:2502.21318: two side by side, one above the other, one small in the
corner of another, and what has no ground of its own on a plain colored one, with captions that say so.

Which sample is composed, of what and how is a function of (seed, epoch // renew_every, sample id), whichever process
asks, and however often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from ldm.data.composer_captions import Wording, grounded, joined, names_ground
from ldm.data.images import CLEAR_ALPHA, border_of, is_clear, resize_and_crop
from ldm.data.rng import generator
from ldm.data.scenes.render import RGB
from ldm.data.sources import DataConfig, Decoded, Sample

Layout = Literal["beside", "above", "inset", "ground"]

LAYOUT_FRACTIONS: dict[Layout, float] = {"beside": 0.38, "above": 0.24, "inset": 0.2, "ground": 0.18}
COLORED = 0.5  # of the pairs of which both can stand on any ground
TRIES = 4
COUNTED = 1024
# Of a picture that fills its place at least so much is to be seen: half of a square one is.
MIN_VISIBLE = 0.45
# What a thing has on the mean in color, and its ground.
MIN_CONTRAST = 90.0
# A border is of one color where so much of it is, so nearly: scanned digits touch the edge.
PLAIN_BORDER, PLAIN_TOLERANCE = 0.6, 14

Size = tuple[int, int]
Box = tuple[int, int, int, int]


class Composer:
    """Chooses which samples are composed, and of what.

    Args:
        samples: those of training; partners come from here alone.
        config: `compose` is the share of them.
        seed: any integer.

    Attributes:
        fits: whether a text encoder reads a caption to its end; a composition whose caption it cuts, in all shorter
            forms too, is not made. At first everything fits.
    """

    def __init__(self, samples: Sequence[Sample], config: DataConfig, seed: int) -> None:
        self.samples, self.config, self.seed = samples, config, seed
        self.fits: Callable[[str], bool] | None = None

    def compose(self, epoch: int, index: int, size: Size) -> Sample | None:
        """What takes the place of a sample in an epoch, as a picture of (height, width) `size`; None: nothing does."""
        sample = self.samples[index]
        rng = generator(self.seed, "compose", epoch // self.config.renew_every, sample.id)
        if rng.random() >= self.config.compose:
            return None
        for _ in range(TRIES):
            found = self._tried(sample, rng, size)
            if found is not None:
                return found
        return None

    def summary(self, size_of: Callable[[int], Size]) -> str:
        """How many samples are composed, counted over a part of the first epoch, and what to do where none is.

        Args:
            size_of: (height, width) by index.
        """
        indices = range(0, len(self.samples), max(1, len(self.samples) // COUNTED))
        made = sum(self.compose(0, index, size_of(index)) is not None for index in indices)
        every = self.config.renew_every
        told = f"{100 * made / len(indices):.3g} % of the samples are composed of others, anew every {every} epochs"
        if made > self.config.compose * len(indices) / 2:
            return told
        return (
            f"{told}; data.compose asks for {100 * self.config.compose:g} %, but captions that are joined are longer "
            "than text.max_length, or most images have the same"
        )

    def _tried(self, sample: Sample, rng: np.random.Generator, size: Size) -> Sample | None:
        partner = self.samples[int(rng.integers(len(self.samples)))]
        wording, place, turned = Wording.sample(rng), rng.random(4), bool(rng.integers(2))
        layout = _layout(rng.random(), sample, None if _alike(sample, partner) else partner, size)
        if layout is None:
            return None
        parts = (sample,) if layout == "ground" else (sample, partner)
        if turned and layout in ("beside", "above"):
            parts = parts[::-1]
        # An inset covers a part of the ground and stands on none.
        on_ground = parts[:1] if layout == "inset" else parts
        color = None
        if layout == "ground" or place[3] < COLORED:
            color = _ground(on_ground, float(rng.random()))
        if layout == "ground" and color is None:
            return None
        composition = Composition(layout, parts, color, self.config.background_rgb, tuple(place[:3].tolist()))
        text = self._caption(composition, wording)
        return None if text is None else composition.sample(text, size)

    def _caption(self, composition: Composition, wording: Wording) -> str | None:
        """The first that fits; "" where a part has none, as for an autoencoder; None where all are cut."""
        captions = [_own(part) for part in composition.parts]
        if not all(captions):
            return ""
        texts: Iterator[str]
        if composition.layout == "ground":
            assert composition.color is not None
            texts = grounded(captions[0], wording, composition.color)
        else:
            corner, color = composition.corner, composition.color
            texts = joined(composition.layout, captions[0], captions[1], wording, corner=corner, color=color)
        return next((text for text in texts if self.fits is None or self.fits(text)), None)


@dataclass(frozen=True)
class Composition:
    """A picture to be made.

    Args:
        parts: from left to right, from above to below, or the large one and the one inside of it.
        color: of the ground, by its name; None leaves each on its own, and transparent ones on
        background: that of the data.
        places: three numbers in [0, 1) that move things about by a little.
    """

    layout: Layout
    parts: tuple[Sample, ...]
    color: str | None
    background: tuple[int, int, int]
    places: tuple[float, ...]

    @property
    def corner(self) -> str:
        """Where an inset is."""
        return f"{'bottom' if self.places[0] >= 0.5 else 'top'} {'right' if self.places[1] >= 0.5 else 'left'}"

    def sample(self, caption: str, size: Size) -> Sample:
        """With its caption; its bytes only name it, and it has no digest."""
        names = [part.id for part in self.parts]
        key = json.dumps([names, self.layout, self.color, self.background, self.places, size]).encode()
        return Sample(
            id=" + ".join(names) if len(names) > 1 else f"{names[0]} on {self.color}",
            captions=(caption,) if caption else (),
            group=self.parts[0].group,
            read=partial(bytes, key),
            decode=partial(_picture, composition=self, size=size),
            size=size[::-1],
        )


# ---- choosing


def _own(sample: Sample) -> tuple[str, ...]:
    """Its captions without those that templates made of others."""
    return sample.captions[: len(sample.captions) - sample.templated]


def _alike(sample: Sample, partner: Sample) -> bool:
    """Whether two samples are of one picture, or would be told by the same words."""
    return sample.group == partner.group or not set(_own(sample)).isdisjoint(_own(partner))


def _layout(chance: float, sample: Sample, partner: Sample | None, size: Size) -> Layout | None:
    """One of those that are possible."""
    height, width = size
    possible: list[Layout] = []
    if partner is not None:
        for layout, cell in (("beside", (height, width / 2)), ("above", (height / 2, width))):
            if all(_kept(part, cell) >= MIN_VISIBLE for part in (sample, partner)):
                possible.append(layout)  # type: ignore[arg-type]
        possible.append("inset")
    if sample.cutout is not None:
        possible.append("ground")
    left = chance * sum(LAYOUT_FRACTIONS[layout] for layout in possible)
    for layout in possible:
        left -= LAYOUT_FRACTIONS[layout]
        if left < 0:
            return layout
    return possible[-1] if possible else None


def _kept(part: Sample, cell: tuple[float, float]) -> float:
    """How much of a picture is to be seen where it fills a cell (height, width); all of what stands on a ground."""
    if part.cutout is not None or part.size is None:
        return 1.0
    width, height = part.size
    ratio = width / height * cell[0] / cell[1]
    return min(ratio, 1 / ratio)


def _ground(parts: Sequence[Sample], chance: float) -> str | None:
    """The name of a color on which all of these can be seen; None where one of them brings a ground or names it."""
    cutouts = [part.cutout for part in parts]
    if any(one is None for one in cutouts) or any(names_ground(text) for part in parts for text in _own(part)):
        return None
    means = np.array(cutouts, dtype=np.float64)  # [P, 3]
    fit = [name for name, rgb in RGB.items() if np.linalg.norm(means - rgb, axis=1).min() >= MIN_CONTRAST]
    return fit[int(chance * len(fit))] if fit else None


# ---- drawing


@dataclass(frozen=True)
class _Piece:
    """A part as it is put on a canvas.

    Args:
        pixels: RGB on `behind`.
        alpha: mode L, of what can stand on any ground.
        behind: the color around what is shown; None where it fills its picture.
    """

    pixels: Image.Image
    alpha: Image.Image | None
    behind: tuple[int, int, int] | None


def _picture(key: bytes, composition: Composition, size: Size) -> Decoded:
    del key  # it names what `composition` says
    height, width = size
    pieces = [_piece(part.load_decoded(), composition.background) for part in composition.parts]
    color = composition.background if composition.color is None else RGB[composition.color]
    x, y, z = composition.places
    if composition.layout == "inset":
        canvas = _large(composition.parts[0], pieces[0], size, color if composition.color else None)
        _inset(canvas, pieces[1], right=y >= 0.5, bottom=x >= 0.5, share=0.3 + 0.15 * z)
        return Decoded(canvas, "", "RGB")
    canvas = Image.new("RGB", (width, height), color)
    if composition.layout == "ground":
        _place(canvas, pieces[0], (0, 0, width, height), color, (x, y), 0.6 + 0.36 * z)
        return Decoded(canvas, "", "RGB")
    cells = [(0, 0, width // 2, height), (width // 2, 0, width, height)]
    if composition.layout == "above":
        cells = [(0, 0, width, height // 2), (0, height // 2, width, height)]
    for piece, cell in zip(pieces, cells, strict=True):
        # Both of them at one height, or one below the other.
        _place(canvas, piece, cell, color, (0.3 + 0.4 * x, 0.3 + 0.4 * y), 0.9 + 0.08 * z)
    return Decoded(canvas, "", "RGB")


def _piece(decoded: Decoded, background: tuple[int, int, int]) -> _Piece:
    """Cut down to what is shown of it, where there is nothing around that."""
    image, alpha = decoded.image, decoded.alpha
    if alpha is not None and is_clear(alpha):
        box = alpha.point(lambda value: 255 * (value >= CLEAR_ALPHA)).getbbox() or (0, 0, *alpha.size)
        return _Piece(image.crop(box), alpha.crop(box), background)
    pixels = np.asarray(image)
    border = border_of(pixels).astype(np.int16)  # [N, 3]
    plain = np.median(border, axis=0)
    if float(np.mean(np.abs(border - plain).max(axis=1) <= PLAIN_TOLERANCE)) < PLAIN_BORDER:
        return _Piece(image, None, None)
    shown = np.abs(pixels.astype(np.int16) - plain).max(axis=2) > PLAIN_TOLERANCE  # [h, w]
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    red, green, blue = plain.astype(int).tolist()
    if len(rows):
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return _Piece(image, None, (red, green, blue))


def _large(part: Sample, piece: _Piece, size: Size, color: tuple[int, int, int] | None) -> Image.Image:
    """A picture as it is trained on alone, or on a ground."""
    height, width = size
    if color is None:
        return Image.fromarray(resize_and_crop(part.load(), size).permute(1, 2, 0).numpy())  # [h, w, 3]
    canvas = Image.new("RGB", (width, height), color)
    _place(canvas, piece, (0, 0, width, height), color, (0.5, 0.5), 0.92)
    return canvas


def _inset(canvas: Image.Image, piece: _Piece, *, right: bool, bottom: bool, share: float) -> None:
    """Puts a picture into a corner: `share` of the canvas's shorter side, by its area."""
    ratio = min(2.0, max(0.5, piece.pixels.width / piece.pixels.height))
    side = share * min(canvas.size)
    width, height = max(1, round(side * ratio**0.5)), max(1, round(side / ratio**0.5))
    left = canvas.width - width if right else 0
    top = canvas.height - height if bottom else 0
    _place(canvas, piece, (left, top, left + width, top + height), None, (0.5, 0.5), 0.96)


def _place(
    canvas: Image.Image,
    piece: _Piece,
    box: Box,
    ground: tuple[int, int, int] | None,
    where: tuple[float, float],
    share: float,
) -> None:
    """Puts a picture into a box: filling it, or with its ground around it.

    Args:
        ground: what a box is filled with where its picture is transparent; None leaves what is there.
        where: where in the room that is left, 0 to 1.
        share: how much of the box is taken by what does not fill it.
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
    scale = share * min(room[0] / piece.pixels.width, room[1] / piece.pixels.height)
    size = max(1, round(piece.pixels.width * scale)), max(1, round(piece.pixels.height * scale))
    corner = left + round((room[0] - size[0]) * where[0]), top + round((room[1] - size[1]) * where[1])
    pixels = piece.pixels.resize(size, Image.Resampling.BICUBIC)
    if piece.alpha is not None:
        # What is blended with one color is blended with another by adding their difference where it shines through.
        through = 1 - np.asarray(piece.alpha.resize(size, Image.Resampling.BICUBIC), np.float64)[..., None] / 255
        under = np.asarray(canvas.crop((*corner, corner[0] + size[0], corner[1] + size[1])), np.float64)  # [h, w, 3]
        blended = np.asarray(pixels, np.float64) + through * (under - np.array(piece.behind))
        pixels = Image.fromarray(np.clip(np.rint(blended), 0, 255).astype(np.uint8))
    canvas.paste(pixels, corner)
