"""An account as lines for a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from ldm.data.captions import plural, printable
from ldm.data.report import DatasetReport, Size, quoted

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
    yield "sizes", list(_sizes(account))
    yield "shapes", [_counts(account.sizes.shapes)] if account.sizes.shapes else []
    yield "formats", [_counts(account.formats)] if account.formats else []
    yield "modes", [_counts(account.modes)] if account.modes else []
    yield (
        "treated",
        [f"{count} {printable(trait)}: {account.treatment[trait]}" for trait, count in account.traits.items()],
    )
    yield "captions", list(_captions(account, shown))
    if any(source.reason for source in account.caption_sources):
        yield "sources", _cut(list(_sources(account)), shown)
    yield "alike", _cut([_names(names, shown) for names in account.near_duplicates], shown)
    yield "copies", _cut([f"{printable(copy.path)} = {printable(copy.of)}" for copy in account.duplicate_files], shown)
    yield "skipped", list(_skipped(account, shown))


def _sizes(account: DatasetReport) -> Iterator[str]:
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


def _captions(account: DatasetReport, shown: int | None) -> Iterator[str]:
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


def _skipped(account: DatasetReport, shown: int | None) -> Iterator[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in account.skipped_files:
        by_reason[entry.reason].append(entry.path)
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"{len(paths)} × {printable(reason)}"
        yield from _cut([f"  {printable(path)}" for path in paths], shown, "  ")


def _sources(account: DatasetReport) -> Iterator[str]:
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
