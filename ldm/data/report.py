"""Dataset report: every entry is used, skipped with a reason, or an exact duplicate."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ldm.data.dataset import split
from ldm.data.images import ADOBE, CONVERTED, GAMMA, UNUSABLE
from ldm.data.inspection import Duplicate, Inspection
from ldm.data.sources import WAYS_OUT, CaptionSource, DataConfig, Sample, Skipped
from ldm.progress import plural, printable

_MAX_REPEATED = 10  # captions shared by most images
_FEW_IMAGES = 100
_MANY_CAPTIONS = 10  # per image
_MAX_NON_LATIN = 0.05  # a larger fraction of captions needs attention
# Width to height; an image counts for the nearest ratio.
_SHAPES = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))
_MAX_SMALL = 0.1  # a larger fraction of images below half of the resolution needs attention
_MIN_RESOLUTION = 8  # for advice
_EXTREME = 4  # beyond this ratio cropping removes more than half of an image, even with buckets
_NARROWER, _WIDER = f"narrower than 1:{_EXTREME}", f"wider than {_EXTREME}:1"
_SPLITS = {"test", "testing", "val", "valid", "validation", "dev", "eval"}
# Colors that are not converted, although they are not sRGB.
_UNCERTAIN = {
    UNUSABLE: "a color profile that is damaged or of another kind of image",
    GAMMA: "gAMA or cHRM of another space than sRGB, and no color profile",
    ADOBE: "Adobe RGB in EXIF, and no color profile",
}
Size = tuple[int, int]


@dataclass(frozen=True)
class TooLong:
    """A caption that the text encoder truncates: one image that has it, and the words that are lost."""

    image: str
    caption: str
    lost: str


@dataclass(frozen=True)
class Captions:
    """Captions of the used images.

    Args:
        total, distinct, templated: number of captions, of different texts, and of those from `data.caption_templates`.
        without: used images without a caption, if captions are not required.
        missing, empty: entries skipped for that reason.
        words: minimum, median and maximum per text; None without captions.
        repeated: (text, number of images) of the most shared texts, at most ten.
        too_long: truncated captions; None if not checked, for the reason in `uncounted`.
        many: images with more than ten captions of their own.
        non_latin: distinct texts with more letters of other scripts than of the Latin one.
        languages: lines of caption files by language, where they have a key (`data.caption_language`).
    """

    total: int
    distinct: int
    missing: int
    empty: int
    words: tuple[int, float, int] | None
    repeated: tuple[tuple[str, int], ...]
    too_long: tuple[TooLong, ...] | None
    uncounted: str
    templated: int = 0
    without: int = 0
    many: int = 0
    non_latin: int = 0
    languages: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_inspection(
        cls, inspection: Inspection, truncated_words: Callable[[Sequence[str]], list[str]] | None, uncounted: str
    ) -> Captions:
        """Counts the captions; the arguments are those of `dataset_report`."""
        first_image: dict[str, str] = {}
        images: Counter[str] = Counter()
        for sample in inspection.used:
            for text in sample.captions:
                first_image.setdefault(text, sample.display_name)
            images.update(dict.fromkeys(sample.captions).keys())  # in a fixed order
        texts = list(first_image)
        words = [len(text.split()) for text in texts]
        too_long = None
        if truncated_words is not None:
            lost = zip(texts, truncated_words(texts) if texts else [], strict=True)
            too_long = tuple(TooLong(first_image[text], text, missing) for text, missing in lost if missing)
        return cls(
            total=sum(len(sample.captions) for sample in inspection.used),
            distinct=len(texts),
            missing=sum(entry.reason.startswith("no caption") for entry in inspection.skipped),
            empty=sum(entry.reason.startswith("empty caption") for entry in inspection.skipped),
            words=(min(words), statistics.median(words), max(words)) if words else None,
            repeated=tuple((text, count) for text, count in images.most_common(_MAX_REPEATED) if count > 1),
            too_long=too_long,
            uncounted="" if truncated_words is not None else uncounted,
            templated=sum(sample.templated for sample in inspection.used),
            without=sum(not sample.captions for sample in inspection.used),
            many=sum(len(sample.captions) - sample.templated > _MANY_CAPTIONS for sample in inspection.used),
            non_latin=sum(map(_is_non_latin, texts)),
            languages=inspection.languages,
        )


@dataclass(frozen=True)
class Sizes:
    """Upright sizes of the used images in pixels, as far as they are known.

    Args:
        smallest, median, largest: (width, height), by number of pixels; None without images.
        enlarged, much_enlarged: number of images below the resolution, and below half of it.
        shapes: number of images by aspect ratio (width to height), narrow to wide.
    """

    smallest: Size | None
    median: Size | None
    largest: Size | None
    enlarged: int
    much_enlarged: int
    shapes: dict[str, int]

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], config: DataConfig) -> Sizes:
        """The sizes of these samples."""
        sizes = sorted((sample.size for sample in samples if sample.size), key=lambda size: (size[0] * size[1], size))
        shapes: Counter[str] = Counter()
        for width, height in sizes:
            if max(width, height) > _EXTREME * min(width, height):
                shapes[_WIDER if width > height else _NARROWER] += 1
            else:
                w, h = min(_SHAPES, key=lambda shape: abs(math.log2(width * shape[1] / (height * shape[0]))))
                shapes[f"{w}:{h}"] += 1
        sides = [_side(size, config) for size in sizes]
        ratios = (_NARROWER, *(f"{width}:{height}" for width, height in _SHAPES), _WIDER)
        return cls(
            smallest=sizes[0] if sizes else None,
            median=sizes[len(sizes) // 2] if sizes else None,
            largest=sizes[-1] if sizes else None,
            enlarged=sum(side < config.resolution for side in sides),
            much_enlarged=sum(side < config.resolution / 2 for side in sides),
            shapes={name: shapes[name] for name in ratios if shapes[name]},
        )


@dataclass(frozen=True)
class DatasetReport:
    """The contents and problems of a data set; total == used + skipped + duplicate.

    Args:
        training, held_out: the two parts of `used`.
        skipped_files, duplicate_files: those entries, with reasons and originals.
        contradictory: duplicates with captions that their original does not have.
        near_duplicates: used images that are copies of one image, changed; one tuple each.
        formats, modes, traits: number of used images for each (`Decoded`).
        treatment: the conversion for each trait that occurs.
        caption_sources: used and unused sources of captions, and files that may be one.
        composed: fraction of the samples of an epoch that are composed of several images.
        notes: one line each; `needs_attention`: problems and their solutions, one line each.
    """

    name: str
    resolution: int
    total: int
    used: int
    skipped: int
    duplicate: int
    training: int
    held_out: int
    skipped_files: tuple[Skipped, ...]
    duplicate_files: tuple[Duplicate, ...]
    contradictory: tuple[str, ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    captions: Captions
    sizes: Sizes
    formats: dict[str, int]
    modes: dict[str, int]
    traits: dict[str, int]
    treatment: dict[str, str]
    notes: tuple[str, ...]
    needs_attention: tuple[str, ...]
    caption_sources: tuple[CaptionSource, ...] = ()
    composed: float = 0.0

    def __repr__(self) -> str:
        problems = plural(len(self.needs_attention), "problem") if self.needs_attention else "no problems"
        return f"DatasetReport({self.summary()}; {problems})"

    def summary(self) -> str:
        """One line for the start of a training."""
        # A skipped entry may also be a table row or a caption.
        what = plural(self.total, "entry", "entries") if self.skipped else plural(self.total, "image")
        return printable(
            f"{self.name}: {what}: {self.used} used ({self.training} to train on, {self.held_out} held "
            f"out), {self.skipped} skipped, {plural(self.duplicate, 'duplicate')}"
            + (f"; {self.captions.without} without a caption" if self.captions.without else "")
            + (f"; {100 * self.composed:g} % of the samples of an epoch are composed" if self.composed else "")
        )

    def unused_captions(self, *, harmless: bool = False) -> tuple[str, ...]:
        """One line per unused source of captions that may be missed; with `harmless`, per other one."""
        what = {"sidecars": "text beside images (sidecars)", "folders": "the name of its sub-folder (folders)"}
        lines = []
        for one in self.caption_sources:
            missed = one.doubtful and (one.more > 0 or not one.images)  # no other source has them
            if not one.reason or missed == harmless:
                continue
            about = f"{what.get(one.name, one.name)} {'captions' if one.name in what else 'names'}"
            about += f" {plural(one.images, 'image')}" if one.images else " no existing image"
            about += f" ({one.more} of them without a caption)" if one.images and one.more else ""
            choice = "; data.caption_source chooses what is" if self.used else ""
            lines.append(printable(f"{about} and is not used: {one.reason}{choice}"))
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the keys are the field names. No number is NaN or infinite."""
        plain: dict[str, Any] = asdict(self)
        return plain


def dataset_report(
    inspection: Inspection,
    config: DataConfig,
    *,
    truncated_words: Callable[[Sequence[str]], list[str]] | None = None,
    uncounted: str = "",
) -> DatasetReport:
    """Makes the report of an inspection.

    Args:
        truncated_words: `TextEncoder.truncated_words`: captions → the words of each that the encoder does not read.
        uncounted: the reason, if there is no `truncated_words`.
    """
    used = inspection.used
    names = {sample.id: sample.display_name for sample in used}
    training, held_out = split(used, config.held_out) if used else ((), ())
    traits = _counts(trait for stored in inspection.formats for trait in stored.traits)
    treatment = {
        "rotated": "turned upright by EXIF",
        CONVERTED: "converted from their color profiles to sRGB",
        **{trait: f"{what}; taken as sRGB" for trait, what in _UNCERTAIN.items()},
        "cmyk": "converted to RGB without a color profile, so colors may shift",
        "16-bit": "scaled to 8 bits",
        "palette": "converted to RGB",
        "transparent": f"laid on {config.background}; data.background chooses another color",
        "animated": "the first frame is used",
    }
    report = DatasetReport(
        name=inspection.name,
        resolution=config.resolution,
        total=inspection.total,
        used=len(used),
        skipped=len(inspection.skipped),
        duplicate=len(inspection.duplicates),
        training=len(training),
        held_out=len(held_out),
        skipped_files=inspection.skipped,
        duplicate_files=inspection.duplicates,
        contradictory=tuple(copy.path for copy in inspection.duplicates if copy.captions),
        near_duplicates=tuple(tuple(names[id] for id in cluster) for cluster in inspection.near_duplicates),
        captions=Captions.from_inspection(inspection, truncated_words, uncounted),
        sizes=Sizes.from_samples(used, config),
        formats=_counts(stored.format or "made here" for stored in inspection.formats),
        modes=_counts(stored.mode for stored in inspection.formats),
        traits=traits,
        treatment={trait: treatment.get(trait, "converted to RGB") for trait in traits},
        notes=(),
        needs_attention=(),
        caption_sources=inspection.caption_sources,
        composed=config.compose,
    )
    return replace(
        report,
        notes=tuple(printable(line) for line in _notes(report, config, inspection)),
        needs_attention=tuple(printable(line) for line in _needs_attention(report, config, inspection)),
    )


def quoted(caption: str) -> str:
    """A caption in quotation marks, cut at 60 characters."""
    return f'"{printable(caption)}"' if len(caption) <= 60 else f'"{printable(caption[:60].rstrip())}…"'


def _side(size: Size, config: DataConfig) -> float:
    """The side to compare with the resolution: by area with buckets, else the shorter one."""
    return math.sqrt(size[0] * size[1]) if config.bucketed else min(size)


def _is_non_latin(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(unicodedata.name(letter, "").startswith("LATIN ") for letter in letters) < len(letters)


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _notes(report: DatasetReport, config: DataConfig, inspection: Inspection) -> Iterable[str]:
    if report.captions.uncounted:
        yield f"the lengths of captions were not checked: {report.captions.uncounted}"
    if 0 < report.used < _FEW_IMAGES:
        yield f"{plural(report.used, 'image')}: few for a model from scratch, enough to fine-tune one"
    if report.captions.languages.keys() - {"en"}:
        counts = [f"{language} {count:,}" for language, count in report.captions.languages.items()]
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        yield (
            f"caption files have lines in {plural(len(counts), 'language')} ({', '.join(counts[:8])}{more}); "
            f"{config.caption_language or 'those without a language, as English,'} are used; data.caption_language "
            "takes another"
        )
    extreme = sum(report.sizes.shapes.get(name, 0) for name in (_NARROWER, _WIDER))
    if extreme:
        yield f"{plural(extreme, 'image')} beyond {_EXTREME}:1, most of which is cropped away; cut them up"
    if report.near_duplicates:
        alike = sum(len(names) for names in report.near_duplicates)
        groups = {sample.id: sample.group for sample in inspection.used}
        together = all(len({groups[name] for name in names}) == 1 for names in inspection.near_duplicates)
        yield (
            f"{alike} images are copies of {len(report.near_duplicates)}, re-saved, retouched or mirrored; "
            + (
                "all are used, and copies of one image are held out together or not at all"
                if together
                else "they are used and held out as this data set groups them"
            )
        )
    tops = {sample.id.split("/")[0] for sample in inspection.used if "/" in sample.id}
    training = sorted(top for top in tops if top.rstrip("0123456789") == "train")  # COCO's is train2017
    others = sorted(top for top in tops if top.rstrip("0123456789") in _SPLITS)
    if training and others:
        rest = ", ".join(f"{name}/" for name in others)
        yield (
            f"the images of {training[0]}/ and {rest} are used together; name the folder {training[0]}/ itself, or "
            "with data.caption_source its captions, to leave the rest out"
        )
    if not report.captions.without:
        yield from report.unused_captions(harmless=True)
    if report.composed:
        cutouts = sum(sample.cutout is not None for sample in inspection.used)
        yield f"{cutouts} of {plural(report.used, 'image')} have a transparent background, and can be laid on a color"
    if inspection.cache_error:
        yield f"image info is not cached: {inspection.cache_error}"


def _needs_attention(report: DatasetReport, config: DataConfig, inspection: Inspection) -> Iterable[str]:
    captions, sizes, used = report.captions, report.sizes, inspection.used
    if not report.used:
        yield f"no image can be used; {WAYS_OUT}"
    if report.skipped:
        reasons = Counter(entry.reason for entry in report.skipped_files)
        most = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        more = " and other reasons" if len(reasons) > 3 else ""
        yield f"{report.skipped} of {report.total} are skipped ({most}{more}); fix or remove them"
    if not captions.without:
        yield from report.unused_captions()
    for trait, what in _UNCERTAIN.items():
        # A curated source that was not inspected has no formats.
        names = [one.display_name for one, kind in zip(used, inspection.formats, strict=False) if trait in kind.traits]
        if names:
            yield (
                f"{plural(len(names), 'image has', 'images have')} {what}, so that colors may be wrong: {names[0]}"
                f"{' and others' if len(names) > 1 else ''} taken as sRGB; save them again in sRGB"
            )
    if captions.too_long:
        first = captions.too_long[0]
        lost = f"{first.image} loses {quoted(first.lost)}; shorten them, or raise text.max_length (--max-length)"
        yield f"{plural(len(captions.too_long), 'caption')} longer than the text encoder reads: {lost}"
    if report.contradictory:
        copy = next(copy for copy in report.duplicate_files if copy.captions)
        yield (
            f"{plural(len(report.contradictory), 'exact copy', 'exact copies')} with another caption than the "
            f"original: {copy.path} says {quoted(copy.captions[0])}, and shows what {copy.of} shows; all captions are "
            "used, so remove those that are wrong"
        )
    if config.caption_language is not None and not captions.languages:
        yield f"data.caption_language is {config.caption_language}, but no caption file has lines with a language"
    if captions.many:
        yield (
            f"{plural(captions.many, 'image has', 'images have')} more than {_MANY_CAPTIONS} captions: each line of a "
            "text file is one, and one of them is taken in each epoch; remove what does not describe the image"
        )
    if captions.non_latin > _MAX_NON_LATIN * captions.distinct:
        yield (
            f"{captions.non_latin} of {captions.distinct} captions are not in Latin letters, and the default text "
            "encoder, minilm, was trained on English; translate them, or set text.encoder to one of their language"
        )
    if report.used > 1 and captions.distinct == 1 and not captions.without:
        yield f"all {report.used} images have one caption, {quoted(captions.repeated[0][0])}; describe what each shows"
    if report.used and config.held_out > 0 and not report.held_out:
        yield "nothing can be held out, as all images are of one group; add other images, or set data.held_out to 0"
    if sizes.much_enlarged > _MAX_SMALL * report.used:
        sides = sorted(_side(sample.size, config) for sample in used if sample.size)
        fitting = max(1, int(sides[int(_MAX_SMALL * len(sides))]))
        choice = f"choose a resolution of about {fitting}, or" if fitting >= _MIN_RESOLUTION else "remove them, or take"
        small = plural(sizes.much_enlarged, "image")
        yield f"{small} below half of {report.resolution} pixels would be blurred; {choice} larger images"
