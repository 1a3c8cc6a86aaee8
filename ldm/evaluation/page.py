"""An evaluation as one self-contained page, with the pictures, beside its JSON and its sheets as PNG.

FOLDER/evaluation.html   all of it: text, pictures, curves
FOLDER/evaluation.json   every figure, and for every picture its caption and its nearest training image
FOLDER/samples.png       pictures; each row begins with a real image, whose caption the next picture was drawn for
FOLDER/nearest.png       pictures beside their nearest training images, the most suspect first
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import checkpoint, disk
from ldm.data import CaptionedImages, to_signed
from ldm.evaluation.evaluate import Asked, Evaluation
from ldm.evaluation.loss_gap import LossGap
from ldm.evaluation.memorising import nearest_sheet
from ldm.evaluation.reference import Reference
from ldm.evaluation.said import asked_for, copies, faithfulness, gap_table
from ldm.evaluation.sweep import Sweep
from ldm.pipelines import contact_sheet, save_png, to_pil
from ldm.report import curves, sheets
from ldm.report.curves import Line
from ldm.report.markup import Document, cut, escaped, number
from ldm.report.shell import write_page

SHOWN = 24  # pairs of each side on the page
SHEET_PAIRS, SHEET_COLUMNS = 48, 4
PICTURE_BYTES, SHEET_BYTES = 60_000, 2_000_000
SIDE = 96
LARGEST_SIDE = 256
DRAWN = "generated"


@dataclass(frozen=True)
class Account:
    """An evaluation, and what stands around it on its page.

    Attributes:
        title: of the page: the model.
        about: what all figures stand on: model, data, fingerprints.
        notes: sentences that a reader has to know before any figure.
    """

    title: str
    about: Mapping[str, Any]
    notes: Sequence[str]
    evaluation: Evaluation
    reference: Reference
    sweep: Sweep | None = None

    def write(self, folder: Path) -> Path:
        """Writes all four files, each whole or not at all; returns the path of the page.

        Raises:
            OSError: if the disk does not take them.
        """
        folder = disk.expand_user(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "evaluation.json", self.to_dict())
        save_png(self._samples(), folder / "samples.png", {"settings": self.evaluation.settings})
        if self.evaluation.copies is not None:
            save_png(self._nearest(), folder / "nearest.png", {"settings": self.evaluation.settings})
        parts = (self._head(), self._copies(folder), self._pictures(), self._figures(), self._sweep(), self._about())
        write_page(folder / "evaluation.html", self.title, "\n".join(line for part in parts for line in part))
        return folder / "evaluation.html"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        content = {**self.about, "notes": list(self.notes), **self.evaluation.to_dict()}
        content["sweep"] = None if self.sweep is None else self.sweep.to_dict()
        content["pictures"] = [entry for side in self.evaluation.asked for entry in self._entries(side)]
        return content

    def _entries(self, side: Asked) -> Iterator[dict[str, Any]]:
        images, copies = self._images(side), self.evaluation.copies
        for place, (caption, own) in enumerate(zip(side.captions, side.own, strict=True)):
            entry: dict[str, Any] = {"of": side.side, "caption": caption, "image": images.samples[own].id}
            if side.side == "training" and copies is not None:
                nearest = self.reference.training.samples[int(copies.nearest[place])]
                entry |= {"nearest": nearest.id, "ratio": float(copies.ratio[place])}
                entry |= {"suspect": bool(copies.suspect[place])}
            yield entry

    def _images(self, side: Asked) -> CaptionedImages:
        images = self.reference.training if side.side == "training" else self.reference.held_out
        assert images is not None
        return images

    # ---- pictures

    def _pairs(self, side: Asked, most: int) -> list[tuple[str, Image.Image, Image.Image]]:
        """(caption, its own image, the picture drawn for it), the first of them."""
        images, pairs = self._images(side), []
        for place in range(min(most, len(side.captions))):
            own = to_pil(to_signed(images.image_at(side.own[place]))[None])[0]
            pairs.append((side.captions[place], own, to_pil(to_signed(side.pictures[place])[None])[0]))
        return pairs

    def _samples(self) -> Image.Image:
        """Rows of pairs, held-out captions first: an image, and the picture that was drawn for its caption."""
        rows: list[list[Image.Image]] = []
        for side in reversed(self.evaluation.asked):
            pairs = self._pairs(side, SHEET_PAIRS // len(self.evaluation.asked))
            for start in range(0, len(pairs), SHEET_COLUMNS):
                rows.append([picture for _, *both in pairs[start : start + SHEET_COLUMNS] for picture in both])
        return contact_sheet(rows, size=_shown_size(rows[0][0]))

    def _nearest(self) -> Image.Image:
        copies, side = self.evaluation.copies, self.evaluation.asked[0]
        assert copies is not None
        training = _Pictures(self.reference.training)
        return nearest_sheet(to_pil(to_signed(side.pictures)), training, copies)

    # ---- the parts of the page, each yielding its lines

    def _head(self) -> Iterator[str]:
        evaluation = self.evaluation
        yield f"<h1 dir='auto'>{escaped(self.title)}</h1>"
        yield f"<p class='note'>{escaped(asked_for(evaluation))}.</p>"
        if self.notes:
            yield f"<div class='attention'>{''.join(f'<p>Note: {escaped(note)}.</p>' for note in self.notes)}</div>"
        yield f"<p class='say'>{escaped(evaluation.verdict.sentence)}</p>"
        tiles = "".join(
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(below)}</small></dd></div>"
            for name, value, below in self._tiles()
        )
        yield f"<dl class='figures'>{tiles}</dl>"

    def _tiles(self) -> Iterator[tuple[str, str, str]]:
        """Headline figures: name, value, what stands below it."""
        evaluation = self.evaluation
        figures = [] if evaluation.quality is None else evaluation.quality.figures()
        real = {
            figure.name: f"held-out images {number(figure.value)}; " for figure in figures if figure.images != DRAWN
        }
        for figure in figures:
            if figure.images == DRAWN:
                yardstick = "as far as held-out images are: 1; " if figure.yardstick else real.get(figure.name, "")
                below = (
                    f"{number(figure.low)} to {number(figure.high)}; {yardstick}{figure.samples:,} pictures against "
                )
                below += f"{figure.reference_samples:,} training images, {figure.features}"
                yield figure.name, number(figure.value), below
        for side, found in evaluation.found.items():
            share = found.within[10]
            below = f"{100 * share.low:.0f} to {100 * share.high:.0f} %; {side} captions, by chance "
            below += f"{100 * found.chance[10]:.2g} %"
            yield f"Own image among 10 of {found.gallery:,}", f"{100 * share.mean:.0f} %", below
        for side, read in evaluation.read.items():
            below = f"{100 * read.low:.0f} to {100 * read.high:.0f} %; {side} captions"
            yield "Read as the digit asked for", f"{100 * read.mean:.0f} %", below
        for side, score in evaluation.clip.items():
            below = f"with the captions of others {score.others:.1f}; {side} captions, {score.model}"
            yield "CLIP score", f"{score.hundred.mean:.1f}", below
        if evaluation.copies is not None:
            suspects = evaluation.copies.suspects
            below = f"{suspects.count} of {suspects.total} pictures of training captions; of unseen real images "
            below += f"{100 * evaluation.copies.expected:.0f} % would be"
            yield "Suspected copies", f"{100 * suspects.share:.0f} %", below

    def _copies(self, folder: Path) -> Iterator[str]:
        evaluation = self.evaluation
        if evaluation.copies is None and evaluation.gap is None:
            return
        yield "<h2>Learning or memorizing</h2>"
        if evaluation.copies is not None:
            yield f"<p>{escaped(copies(evaluation).capitalize())}.</p>"
            yield sheets.figure(
                folder / "nearest.png",
                name="nearest.png",
                alt="pictures beside their nearest training images",
                caption="Pictures drawn for training captions, each beside its nearest training image; the most "
                "suspect first",
                most_bytes=SHEET_BYTES,
            )
        if evaluation.gap is not None:
            yield _gap_chart(evaluation.gap)

    def _pictures(self) -> Iterator[str]:
        for side in reversed(self.evaluation.asked):
            shown = self._pairs(side, SHOWN)
            yield f"<h2>Drawn for {side.side} captions</h2>"
            yield f"<p class='note'>Left the real image, right the picture; {len(shown)} of {len(side.captions)}.</p>"
            figures = []
            for caption, own, picture in shown:
                size = _shown_size(own)
                source = sheets.embedded(contact_sheet([[own, picture]], size=size), PICTURE_BYTES)
                text = escaped(cut(caption, 120))
                image = f"<img src='{source}' alt='real image and generated picture'/>"
                figures.append(f"<figure>{image}<figcaption dir='auto'>{text}</figcaption></figure>")
            yield f"<div class='pairs'>{''.join(figures)}</div>"

    def _figures(self) -> Iterator[str]:
        evaluation = self.evaluation
        yield "<h2>All figures</h2>"
        lines = [] if evaluation.quality is None else [*evaluation.quality.lines(), ""]
        for side in evaluation.found:
            lines += [f"{side} captions", *(f"  {line}" for line in faithfulness(evaluation, side)), ""]
        lines += [] if evaluation.gap is None else gap_table(evaluation.gap)
        lines += evaluation.left_out
        yield f"<pre dir='ltr'>{escaped(chr(10).join(lines))}</pre>"

    def _sweep(self) -> Iterator[str]:
        if self.sweep is None:
            return
        yield "<h2>Guidance and steps</h2>"
        lines = [Line(name, [(round(x), y) for x, y in sorted(points)]) for name, points in self.sweep.curves().items()]
        title = "KID to held-out images (lower is better) against evaluations of the network for a picture"
        svg = curves.draw(lines, title=title, axis="evaluations of the network")
        yield f"<figure class='chart'><figcaption>{escaped(title)}</figcaption>{svg}</figure>"
        yield f"<pre dir='ltr'>{escaped(chr(10).join(self.sweep.lines()))}</pre>"

    def _about(self) -> Iterator[str]:
        yield "<h2>What these figures stand on</h2>"
        yield Document("evaluation.json").render({**self.about, **self.evaluation.settings})


class _Pictures(Sequence[Image.Image]):
    """Images of a data set as pictures, each made when it is asked for: all of them may not fit into memory."""

    def __init__(self, images: CaptionedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return to_pil(to_signed(self.images.image_at(int(index)))[None])[0]


def _shown_size(image: Image.Image) -> int:
    return max(SIDE, min(LARGEST_SIDE, *image.size))


def _gap_chart(gap: LossGap) -> str:
    """The loss of both sides over the noise, at the middle of each band."""
    places = [(band.first + band.last + 1) // 2 for band in gap.bands]
    lines = [
        Line("training images", list(zip(places, (band.training for band in gap.bands), strict=True))),
        Line("held-out images", list(zip(places, (band.held_out for band in gap.bands), strict=True))),
    ]
    title = (
        f"Loss by band of noise, on {gap.training_images} training and {gap.held_out_images} held-out images: where "
        "held-out images lie above, the model knows its training images better"
    )
    last = math.ceil(gap.bands[-1].last)
    svg = curves.draw(lines, title=title, logarithmic=True, axis="timestep t (0 is no noise)", last_step=last)
    return f"<figure class='chart'><figcaption>{escaped(title)}</figcaption>{svg}</figure>"
