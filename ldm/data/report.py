"""Dataset report: every entry is used, skipped with a reason, or an exact duplicate."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm.data import color
from ldm.data.captions import plural, printable
from ldm.data.dataset import split
from ldm.data.inspection import Duplicate, Inspection
from ldm.data.sources import WAYS_OUT, CaptionSource, DataConfig, Sample, Skipped

_TOP = 10  # of the captions that most images share
# Widths to heights; an image counts for the nearest, by ratio.
_SHAPES = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))
# More than this share of images below half of the resolution needs attention.
_MUCH_SMALLER = 0.1
_FEW = 100
_LEAST_RESOLUTION = 8  # below that nobody trains
# Beyond this ratio of the sides cropping leaves less than half of an image, even with buckets.
_EXTREME = 4
_NARROWER, _WIDER = f"narrower than 1:{_EXTREME}", f"wider than {_EXTREME}:1"

Size = tuple[int, int]


@dataclass(frozen=True)
class TooLong:
    """A caption of which the text encoder reads a part: an image that has it, and the words that are lost."""

    image: str
    caption: str
    lost: str


@dataclass(frozen=True)
class Captions:
    """The captions of the used images, and those that are lacking.

    Args:
        total, distinct: how many captions the used images have, and how many different texts.
        templated: how many of them `data.caption_templates` has made of others.
        without: used images that have none, in an account for someone who needs none.
        missing, empty: entries that are skipped for that.
        words: least, median and most words of a text; None without captions.
        repeated: (text, number of images) of the texts that most images share, at most ten.
        too_long: None where nobody counted, and
        uncounted: says why.
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


@dataclass(frozen=True)
class Sizes:
    """Upright sizes of the used images, in pixels; sizes of samples that nobody looked at may be unknown.

    Args:
        smallest, median, largest: (width, height), by number of pixels; None without images.
        enlarged, much_enlarged: images below the resolution, and below half of it.
        shapes: number of images by aspect ratio, width to height, narrow to wide.
    """

    smallest: Size | None
    median: Size | None
    largest: Size | None
    enlarged: int
    much_enlarged: int
    shapes: dict[str, int]


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds and what is wrong with it; total == used + skipped + duplicate.

    Args:
        training, held_out: the two parts of `used`.
        skipped_files, duplicate_files: those entries, with reasons and originals.
        contradictory: the duplicates whose original did not have their captions.
        near_duplicates: used images that show one picture; one tuple a picture.
        formats, modes, traits: number of used images for each; see `Decoded`.
        treatment: what is done with each trait that occurs.
        caption_sources: where the folder has captions, the one that is used, others, and files that are not read.
        composed: share of the samples of an epoch that are composed of training images.
        notes: what is worth knowing; `needs_attention`: what should be mended, and how. One line each.
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

    def summary(self) -> str:
        """One line, for the start of a training."""
        # What is skipped may also be a row of a table, or one of the captions of an image.
        what = plural(self.total, "entry", "entries") if self.skipped else plural(self.total, "image")
        return printable(
            f"{self.name}: {what}: {self.used} used ({self.training} to train on, {self.held_out} held "
            f"out), {self.skipped} skipped, {plural(self.duplicate, 'duplicate')}"
            + (f"; {self.captions.without} without a caption" if self.captions.without else "")
            + (f"; {100 * self.composed:g} % of the samples of an epoch are composed" if self.composed else "")
        )

    def unused_captions(self, *, harmless: bool = False) -> tuple[str, ...]:
        """One line for each file or other source of captions that may be missed; with `harmless`, for the others."""
        return tuple(
            printable(
                f"{_about(source)} and is not used: {source.reason}"
                + ("; data.caption_source chooses what is" if self.used else "")
            )
            for source in self.caption_sources
            if source.reason and source.is_missed != harmless
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types of JSON: the keys are the names of the fields. No number is NaN or infinite."""
        plain: dict[str, Any] = asdict(self)
        return plain

    def to_text(self, *, everything: bool = False) -> str:
        """The account for a person, safe for a terminal; lists are cut at ten unless `everything` is asked for."""
        from ldm.data.report import account_text

        return account_text(self, everything)


def dataset_report(
    inspection: Inspection,
    config: DataConfig,
    *,
    truncated_words: Callable[[Sequence[str]], list[str]] | None = None,
    uncounted: str = "",
) -> DatasetReport:
    """Counts what an inspection found.

    Args:
        truncated_words: for captions, the words of each that do not fit into the text encoder: `TextEncoder.lost`.
        uncounted: why there is no `truncated_words`.
    """
    used = inspection.used
    shown = {sample.id: sample.display_name for sample in used}
    training, held_out = split(used, config.held_out) if used else ((), ())
    traits = _counted(trait for kind in inspection.formats for trait in kind.traits)
    treatment = _treatment(config.background)
    account = DatasetReport(
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
        near_duplicates=tuple(tuple(shown[name] for name in names) for names in inspection.near_duplicates),
        captions=_captions(inspection, truncated_words, uncounted),
        sizes=_sizes(used, config),
        formats=_counted(kind.format or "made here" for kind in inspection.formats),
        modes=_counted(kind.mode for kind in inspection.formats),
        traits=traits,
        treatment={trait: treatment.get(trait, "converted to RGB") for trait in traits},
        notes=(),
        needs_attention=(),
        caption_sources=inspection.caption_sources,
        composed=config.compose,
    )
    return replace(
        account,
        notes=tuple(printable(line) for line in _notes(account, inspection)),
        needs_attention=tuple(printable(line) for line in _needs_attention(account, config, inspection)),
    )


def quoted(caption: str, longest: int = 60) -> str:
    """A caption, or its beginning, in quotation marks."""
    return f'"{printable(caption)}"' if len(caption) <= longest else f'"{printable(caption[:longest].rstrip())}…"'


def _about(source: CaptionSource) -> str:
    what = {"sidecars": "text beside images (sidecars)", "folders": "the name of its sub-folder (folders)"}
    name = what.get(source.name, source.name)
    if not source.images:
        return f"{name} names no image that is there"
    rest = f" ({source.more} of them without a caption)" if source.more else ""
    return f"{name} {'captions' if source.name in what else 'names'} {plural(source.images, 'image')}{rest}"


def _captions(
    inspection: Inspection, truncated_words: Callable[[Sequence[str]], list[str]] | None, uncounted: str
) -> Captions:
    bearers: dict[str, str] = {}
    images: Counter[str] = Counter()
    for sample in inspection.used:
        for text in sample.captions:
            bearers.setdefault(text, sample.display_name)
        images.update(set(sample.captions))
    words = [len(text.split()) for text in bearers]
    too_long = None
    if truncated_words is not None:
        texts = list(bearers)
        too_long = tuple(
            TooLong(bearers[text], text, gone)
            for text, gone in zip(texts, truncated_words(texts) if texts else [], strict=True)
            if gone
        )
    # The most frequent first; Counter keeps the order of the data among equals.
    repeated = tuple((text, count) for text, count in images.most_common(_TOP) if count > 1)
    return Captions(
        total=sum(len(sample.captions) for sample in inspection.used),
        distinct=len(bearers),
        missing=sum(entry.reason.startswith("no caption") for entry in inspection.skipped),
        empty=sum(entry.reason.startswith("empty caption") for entry in inspection.skipped),
        words=(min(words), statistics.median(words), max(words)) if words else None,
        repeated=repeated,
        too_long=too_long,
        uncounted="" if truncated_words is not None else uncounted,
        templated=sum(sample.templated for sample in inspection.used),
        without=sum(not sample.captions for sample in inspection.used),
    )


def _sizes(used: Sequence[Sample], config: DataConfig) -> Sizes:
    sizes = sorted((sample.size for sample in used if sample.size), key=lambda size: (size[0] * size[1], size))
    shapes = Counter(map(_shape, sizes))
    sides = [_side(size, config) for size in sizes]
    return Sizes(
        smallest=sizes[0] if sizes else None,
        median=sizes[len(sizes) // 2] if sizes else None,
        largest=sizes[-1] if sizes else None,
        enlarged=sum(side < config.resolution for side in sides),
        much_enlarged=sum(side < config.resolution / 2 for side in sides),
        shapes={name: shapes[name] for name in (_NARROWER, *map(_ratio, _SHAPES), _WIDER) if shapes[name]},
    )


def _shape(size: Size) -> str:
    width, height = size
    if max(width, height) > _EXTREME * min(width, height):
        return _WIDER if width > height else _NARROWER
    return _ratio(min(_SHAPES, key=lambda shape: _octaves(size, shape)))


def _ratio(shape: Size) -> str:
    return f"{shape[0]}:{shape[1]}"


def _octaves(size: Size, shape: Size) -> float:
    return abs(math.log2(size[0] * shape[1] / (size[1] * shape[0])))


def _side(size: Size, config: DataConfig) -> float:
    """What is compared with the resolution: with buckets the area counts, of squares the shorter side."""
    return math.sqrt(size[0] * size[1]) if config.bucketed else min(size)


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _treatment(background: str) -> dict[str, str]:
    return {
        "rotated": "turned upright, as EXIF says",
        color.CONVERTED: "converted from their color profiles to sRGB",
        **{trait: f"{what}; taken as sRGB" for trait, what in _UNCERTAIN.items()},
        "cmyk": "converted to RGB without a color profile, so colors may shift",
        "16-bit": "scaled to 8 bits",
        "palette": "converted to RGB",
        "transparent": f"laid on {background}; data.background chooses another colour",
        "animated": "the first frame is used",
    }


_SPLITS = {"test", "testing", "val", "valid", "validation", "dev", "eval"}


# Colors that are not converted, though the image says that they are not sRGB.
_UNCERTAIN = {
    color.UNUSABLE: "a color profile that is damaged or of another kind of image",
    color.GAMMA: "gAMA or cHRM of another space than sRGB, and no color profile",
    color.ADOBE: "Adobe RGB in EXIF, and no color profile",
}


def _notes(account: DatasetReport, inspection: Inspection) -> Iterable[str]:
    if account.captions.uncounted:
        yield f"the lengths of captions were not checked: {account.captions.uncounted}"
    if 0 < account.used < _FEW:
        yield f"{plural(account.used, 'image')}: few for a model from scratch, enough to fine-tune one"
    extreme = sum(account.sizes.shapes.get(name, 0) for name in (_NARROWER, _WIDER))
    if extreme:
        yield f"{plural(extreme, 'image')} beyond {_EXTREME}:1, most of which is cropped away; cut them up"
    if account.near_duplicates:
        alike = sum(len(names) for names in account.near_duplicates)
        groups = {sample.id: sample.group for sample in inspection.used}
        together = all(len({groups[name] for name in names}) == 1 for names in inspection.near_duplicates)
        yield (
            f"{alike} images show {plural(len(account.near_duplicates), 'picture')}, re-saved, retouched or mirrored; "
            + (
                "all are used, and those of one picture are held out together or not at all"
                if together
                else "they are used and held out as this data set groups them"
            )
        )
    tops = {sample.id.split("/")[0] for sample in inspection.used if "/" in sample.id}
    training = sorted(top for top in tops if top.rstrip("0123456789") == "train")  # COCO's is train2017
    others = sorted(top for top in tops if top.rstrip("0123456789") in _SPLITS)
    if training and others:
        yield (
            f"what lies in {training[0]}/ and {', '.join(f'{name}/' for name in others)} is taken together; name the "
            f"folder {training[0]}/ itself, or with data.caption_source its captions, to leave the rest out"
        )
    if not account.captions.without:
        yield from account.unused_captions(harmless=True)
    if account.composed:
        cutouts = sum(sample.cutout is not None for sample in inspection.used)
        yield (
            f"{cutouts} of {plural(account.used, 'image')} are transparent around what they show, and can be composed "
            "on a colored ground"
        )
    if inspection.cache_error:
        yield f"image info cannot be cached: {inspection.cache_error}; set data.cache_dir or $LDM_CACHE"


def _needs_attention(account: DatasetReport, config: DataConfig, inspection: Inspection) -> Iterable[str]:
    captions, sizes, used = account.captions, account.sizes, inspection.used
    if not account.used:
        yield f"no image can be used; {WAYS_OUT}"
    if account.skipped:
        reasons = Counter(entry.reason for entry in account.skipped_files).most_common(3)
        told = ", ".join(f"{count} × {reason}" for reason, count in reasons)
        more = " and other reasons" if len({entry.reason for entry in account.skipped_files}) > 3 else ""
        yield f"{account.skipped} of {account.total} are skipped ({told}{more}); mend or remove them"
    if not captions.without:
        yield from account.unused_captions()
    for trait, what in _UNCERTAIN.items():
        # A curated source that nobody looked at has no kinds.
        bearers = [
            sample.display_name for sample, kind in zip(used, inspection.formats, strict=False) if trait in kind.traits
        ]
        if bearers:
            yield (
                f"{plural(len(bearers), 'image has', 'images have')} {what}, so that colors may be wrong: {bearers[0]}"
                f"{' and others' if len(bearers) > 1 else ''} taken as sRGB; save them again in sRGB"
            )
    if captions.too_long:
        first = captions.too_long[0]
        yield (
            f"{plural(len(captions.too_long), 'caption')} longer than the text encoder reads: {first.image} loses "
            f"{quoted(first.lost)}; shorten them, or raise text.max_length (--max-length)"
        )
    if account.contradictory:
        copy = next(copy for copy in account.duplicate_files if copy.captions)
        yield (
            f"{plural(len(account.contradictory), 'exact copy', 'exact copies')} with another caption than the "
            f"original: {copy.path} says {quoted(copy.captions[0])}, and shows what {copy.of} shows; all captions are "
            "drawn, so remove those that are wrong"
        )
    if account.used > 1 and captions.distinct == 1 and not captions.without:
        yield (
            f"all {account.used} images have one caption, {quoted(captions.repeated[0][0])}: the text cannot tell them "
            "apart; describe what each shows"
        )
    if account.used and config.held_out > 0 and not account.held_out:
        yield "nothing can be held out, as all images are of one group; add other images, or set data.held_out to 0"
    if sizes.much_enlarged > _MUCH_SMALLER * account.used:
        sides = sorted(_side(sample.size, config) for sample in used if sample.size)
        fitting = max(1, int(sides[int(_MUCH_SMALLER * len(sides))]))
        choice = (
            f"choose a resolution of about {fitting}, or" if fitting >= _LEAST_RESOLUTION else "remove them, or take"
        )
        yield (
            f"{plural(sizes.much_enlarged, 'image')} below half of {account.resolution} pixels would be blurred; "
            f"{choice} larger images"
        )


_SHOWN = 10  # of each list
_LABEL = 12  # columns


def account_text(account: DatasetReport, everything: bool) -> str:
    """What `DatasetReport.to_text` returns."""
    shown = None if everything else _SHOWN
    lines = [account.summary(), ""]
    for label, texts in _paragraphs(account, shown):
        lines += [f"{label if not number else '':<{_LABEL}}{text}" for number, text in enumerate(texts)]
    if account.notes:
        lines += ["", "Good to know", *(f"  - {line}" for line in account.notes)]
    if account.needs_attention:
        lines += ["", "Needs attention", *(f"  - {line}" for line in account.needs_attention)]
    else:
        lines += ["", "Nothing needs attention."]
    return "\n".join(lines)


def _paragraphs(account: DatasetReport, shown: int | None) -> Iterator[tuple[str, list[str]]]:
    yield "sizes", list(_size_lines(account))
    yield "shapes", [_counts(account.sizes.shapes)] if account.sizes.shapes else []
    yield "formats", [_counts(account.formats)] if account.formats else []
    yield "modes", [_counts(account.modes)] if account.modes else []
    yield (
        "treated",
        [f"{count} {printable(trait)}: {account.treatment[trait]}" for trait, count in account.traits.items()],
    )
    yield "captions", list(_caption_lines(account, shown))
    if any(source.reason for source in account.caption_sources):
        yield "sources", _cut(list(_source_lines(account)), shown)
    yield "alike", _cut([_names(names, shown) for names in account.near_duplicates], shown)
    yield "copies", _cut([f"{printable(copy.path)} = {printable(copy.of)}" for copy in account.duplicate_files], shown)
    yield "skipped", list(_skipped_lines(account, shown))


def _size_lines(account: DatasetReport) -> Iterator[str]:
    sizes = account.sizes
    if sizes.smallest and sizes.median and sizes.largest:
        if sizes.smallest == sizes.largest:
            yield f"all {_by(sizes.smallest)}"
        else:
            yield f"{_by(sizes.smallest)} to {_by(sizes.largest)}, median {_by(sizes.median)}"
    if sizes.enlarged:
        yield f"{plural(sizes.enlarged, 'image')} smaller than {account.resolution} pixels: enlarged"


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _caption_lines(account: DatasetReport, shown: int | None) -> Iterator[str]:
    captions = account.captions
    if captions.words:
        least, median, most = captions.words
        yield (
            f"{captions.total} on {plural(account.used, 'image')}, {captions.distinct} different, "
            f"{least} to {most} words, median {median:g}"
            + (f"; {captions.templated} of them by data.caption_templates" if captions.templated else "")
        )
    if captions.missing or captions.empty:
        yield f"{captions.missing} missing, {captions.empty} empty"
    if captions.repeated:
        shared = [f"{quoted(text)} on {count}" for text, count in captions.repeated[: None if shown is None else 3]]
        yield f"shared by images: {', '.join(shared)}"
    if captions.too_long:
        yield f"{len(captions.too_long)} too long for the text encoder:"
        yield from _cut(
            [f"  {printable(entry.image)} loses {quoted(entry.lost)}" for entry in captions.too_long], shown, "  "
        )
    elif captions.too_long is not None:
        yield "all fit into the text encoder"


def _skipped_lines(account: DatasetReport, shown: int | None) -> Iterator[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in account.skipped_files:
        by_reason[entry.reason].append(entry.path)
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"{len(paths)} × {printable(reason)}"
        yield from _cut([f"  {printable(path)}" for path in paths], shown, "  ")


def _source_lines(account: DatasetReport) -> Iterator[str]:
    for source in account.caption_sources:
        yield f"{printable(source.name)}: {plural(source.images, 'image')}, {'not used' if source.reason else 'used'}"


def _names(names: Sequence[str], shown: int | None) -> str:
    told = ", ".join(printable(name) for name in names[:shown])
    return told if shown is None or len(names) <= shown else f"{told}, … and {len(names) - shown} more"


def _cut(lines: list[str], shown: int | None, indent: str = "") -> list[str]:
    if shown is None or len(lines) <= shown:
        return lines
    return [*lines[:shown], f"{indent}… and {len(lines) - shown} more (--all shows them)"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {printable(name)}" for name, count in counts.items())
