"""An evaluation as text, and as a self-contained page with its images, JSON and sheets.

FOLDER/evaluation.html   everything: text, images, charts
FOLDER/evaluation.json   every number, and for each image its caption and its nearest training image
FOLDER/samples.png       pairs of a real image and the image generated for its caption
FOLDER/nearest.png       generated images beside their nearest training images, the likeliest copies first
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import disk
from ldm.data import CaptionedImages, to_signed
from ldm.evaluation.evaluate import Evaluation, GeneratedImages
from ldm.evaluation.images import Reference
from ldm.evaluation.memorization import nearest_sheet
from ldm.evaluation.sweep import Sweep
from ldm.pipelines import contact_sheet, save_png, to_pil
from ldm.report.charts import Figure, Line
from ldm.report.html import Rows, document, embedded, escaped, format_number, read_picture, shortened, write_page
from ldm.report.text import alignment_lines, describe_closer, describe_settings, fidelity_lines, gap_lines, sweep_lines

PAGE_PAIRS = 24  # of each side
SHEET_PAIRS, SHEET_COLUMNS = 48, 4
MAX_IMAGE_BYTES, MAX_SHEET_BYTES = 60_000, 2_000_000
MIN_SIDE, MAX_SIDE = 96, 256


# ---- as a page


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """An evaluation and its context: title, model and data (`about`), sentences to read first, folder."""

    title: str
    about: Mapping[str, Any]
    notes: Sequence[str]
    evaluation: Evaluation
    reference: Reference
    sweep: Sweep | None
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "evaluation.html"

    def __repr__(self) -> str:
        fidelity, numbers = self.evaluation.fidelity, ""
        if fidelity is not None:
            found = fidelity.generated
            numbers = f"KID {found.kid.value:.4g}, precision {found.precision.value:.2f}, "
        return f"EvaluationResult({self.title}: {self.evaluation.verdict.kind}, {numbers}page {self.page})"

    def _repr_html_(self) -> str:
        page = escaped(self.page.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width:100%;height:40rem;border:0"></iframe>'

    def write(self) -> None:
        """Writes all four files, each atomically; OSError if they cannot be written."""
        folder, evaluation = self.folder, self.evaluation
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_json(folder / "evaluation.json", self.to_dict())
        settings = {"settings": evaluation.settings}
        rows: list[list[Image.Image]] = []  # of pairs, held-out captions first
        for side in reversed(evaluation.generated):
            pairs = self._first_pairs(side, SHEET_PAIRS // len(evaluation.generated))
            for start in range(0, len(pairs), SHEET_COLUMNS):
                rows.append([image for _, *both in pairs[start : start + SHEET_COLUMNS] for image in both])
        save_png(contact_sheet(rows, size=_shown_size(rows[0][0])), folder / "samples.png", settings)
        closer = nearest = None
        if evaluation.copying is not None:
            generated = to_pil(to_signed(evaluation.generated[0].images))
            opened = partial(_opened, self.reference.training)
            save_png(nearest_sheet(generated, opened, evaluation.copying), folder / "nearest.png", settings)
            closer = describe_closer(evaluation.copying).capitalize()
            nearest = read_picture(
                folder / "nearest.png",
                name="nearest.png",
                alt="generated images beside their nearest training images",
                caption="Images generated for training captions, each beside its nearest training image; the likeliest "
                "copies first",
                max_bytes=MAX_SHEET_BYTES,
            )
        gap = sweep = None
        if evaluation.gap is not None:  # the loss of both sides over the noise, at the middle of each band
            bands = evaluation.gap.bands
            middles = [(band.first + band.last + 1) // 2 for band in bands]
            sides = [("training images", (band.training for band in bands))]
            sides += [("held-out images", (band.held_out for band in bands))]
            gap = Figure.from_lines(
                f"Loss by band of noise, on {evaluation.gap.training_images} training and "
                f"{evaluation.gap.held_out_images} held-out images: a higher loss on held-out images is a sign of "
                "memorization",
                [Line(kind, list(zip(middles, losses, strict=True))) for kind, losses in sides],
                logarithmic=True,
                axis="timestep t (0 is no noise)",
                last_step=bands[-1].last,
            )
        if self.sweep is not None:
            title = "KID to held-out images (lower is better) against evaluations of the network per image"
            curves = self.sweep.curves().items()
            lines_of = [Line(name, [(round(x), y) for x, y in sorted(points)]) for name, points in curves]
            sweep = Figure.from_lines(title, lines_of, axis="evaluations of the network")
        shown = []
        for side in reversed(evaluation.generated):
            images = [
                (shortened(caption, 120), embedded(contact_sheet([pair], size=_shown_size(pair[0])), MAX_IMAGE_BYTES))
                for caption, *pair in self._first_pairs(side, PAGE_PAIRS)
            ]
            shown.append({"name": side.side, "count": len(side.captions), "pairs": images})
        lines = [] if evaluation.fidelity is None else [*fidelity_lines(evaluation.fidelity), ""]
        for name in evaluation.retrieval:
            lines += [f"{name} captions", *(f"  {line}" for line in alignment_lines(evaluation, name)), ""]
        lines += [] if evaluation.gap is None else gap_lines(evaluation.gap)
        lines += evaluation.left_out
        write_page(
            self.page,
            "evaluation.html",
            self.title,
            settings=describe_settings(evaluation),
            notes=self.notes,
            verdict=evaluation.verdict.sentence,
            numbers=list(self._tiles()),
            closer=closer,
            nearest=nearest,
            gap=gap,
            sides=shown,
            lines="\n".join(lines),
            sweep=sweep,
            sweep_lines="" if self.sweep is None else "\n".join(sweep_lines(self.sweep)),
            about=document({**self.about, **evaluation.settings}, Rows("evaluation.json")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        content = {**self.about, "notes": list(self.notes), **self.evaluation.to_dict()}
        content["sweep"] = None if self.sweep is None else self.sweep.to_dict()
        content["pictures"] = [entry for side in self.evaluation.generated for entry in self._entries(side)]
        return content

    def _entries(self, side: GeneratedImages) -> Iterator[dict[str, Any]]:
        images, copying = self._real(side), self.evaluation.copying
        for row, (caption, index) in enumerate(zip(side.captions, side.indices, strict=True)):
            entry: dict[str, Any] = {"of": side.side, "caption": caption, "image": images.samples[index].id}
            if side.side == "training" and copying is not None:
                nearest = self.reference.training.samples[int(copying.nearest[row])]
                entry |= {"nearest": nearest.id, "ratio": float(copying.ratio[row])}
                entry |= {"suspect": bool(copying.flagged[row])}
            yield entry

    def _real(self, side: GeneratedImages) -> CaptionedImages:
        images = self.reference.training if side.side == "training" else self.reference.held_out
        assert images is not None
        return images

    def _first_pairs(self, side: GeneratedImages, count: int) -> list[tuple[str, Image.Image, Image.Image]]:
        """The first (caption, its own image, the image generated for it)."""
        real = self._real(side)
        generated = to_pil(to_signed(side.images[:count]))
        rows = zip(side.captions[:count], side.indices[:count], generated, strict=True)
        return [(caption, _opened(real, index), image) for caption, index, image in rows]

    def _tiles(self) -> Iterator[tuple[str, str, str]]:
        """Headline numbers: name, value, text below it."""
        evaluation = self.evaluation
        metrics = [] if evaluation.fidelity is None else evaluation.fidelity.metrics()
        of_real = [metric for metric in metrics if metric.images == "held-out"]
        real = {metric.name: f"held-out images {format_number(metric.value)}; " for metric in of_real}
        for metric in (metric for metric in metrics if metric.images == "generated"):
            compared = "1 is as good as held-out images; " if metric.yardstick else real.get(metric.name, "")
            below = (
                f"{format_number(metric.low)} to {format_number(metric.high)}; {compared}{metric.samples:,} images "
                f"against {metric.reference_samples:,} training images, {metric.features}"
            )
            yield metric.name, format_number(metric.value), below
        for side, found in evaluation.retrieval.items():
            recall = found.within[10]
            below = f"{100 * recall.low:.0f} to {100 * recall.high:.0f} %; {side} captions, by chance "
            below += f"{100 * found.chance[10]:.2g} %"
            yield f"Own image among 10 of {found.gallery:,}", f"{100 * recall.mean:.0f} %", below
        for side, accuracy in evaluation.digit_accuracy.items():
            below = f"{100 * accuracy.low:.0f} to {100 * accuracy.high:.0f} %; {side} captions"
            yield "Classified as the prompted digit", f"{100 * accuracy.mean:.0f} %", below
        for side, score in evaluation.clip_scores.items():
            below = f"with the captions of others {score.others:.1f}; {side} captions, {score.model}"
            yield "CLIP score", f"{score.hundred.mean:.1f}", below
        if evaluation.copying is not None:
            flagged = evaluation.copying.flagged_fraction
            below = f"{flagged.count} of {flagged.total} images for training captions; of unseen real images "
            below += f"{100 * evaluation.copying.expected:.0f} % would be"
            yield "Possible copies", f"{100 * flagged.fraction:.0f} %", below


def _opened(images: CaptionedImages, index: int) -> Image.Image:
    """One at a time: all of them may not fit into memory."""
    return to_pil(to_signed(images.image_at(index))[None])[0]


def _shown_size(image: Image.Image) -> int:
    return max(MIN_SIDE, min(MAX_SIDE, *image.size))
