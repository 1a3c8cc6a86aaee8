"""The report of `ldm data check` as text."""

from __future__ import annotations

from collections import defaultdict

from ldm.data.report import DatasetReport, quoted
from ldm.progress import plural, printable

_SHOWN = 10  # entries per list
_LABEL_WIDTH = 12


def report_text(report: DatasetReport, *, full: bool = False) -> str:
    """The report as printable text; lists are cut at ten entries unless `full`."""
    shown = None if full else _SHOWN
    paragraphs: dict[str, list[str]] = {}
    sizes = report.sizes
    lines = []
    if sizes.smallest and sizes.median and sizes.largest:
        smallest, median, largest = (f"{w}x{h}" for w, h in (sizes.smallest, sizes.median, sizes.largest))
        lines.append(f"all {smallest}" if smallest == largest else f"{smallest} to {largest}, median {median}")
    if sizes.enlarged:
        lines.append(f"{plural(sizes.enlarged, 'image')} smaller than {report.resolution} pixels: enlarged")
    paragraphs["sizes"] = lines
    for label, counts in (("shapes", sizes.shapes), ("formats", report.formats), ("modes", report.modes)):
        paragraphs[label] = (
            [", ".join(f"{count} {printable(name)}" for name, count in counts.items())] if counts else []
        )
    paragraphs["treated"] = [
        f"{count} {printable(name)}: {report.treatment[name]}" for name, count in report.traits.items()
    ]
    lines = []
    captions = report.captions
    if captions.words:
        fewest, typical, most = captions.words
        lines.append(
            f"{captions.total} on {plural(report.used, 'image')}, {captions.distinct} different, "
            f"{fewest} to {most} words, median {typical:g}"
            + (f"; {captions.templated} of them by data.caption_templates" if captions.templated else "")
        )
    if captions.missing or captions.empty:
        lines.append(f"{captions.missing} missing, {captions.empty} empty")
    if captions.repeated:
        shared = [f"{quoted(text)} on {count}" for text, count in captions.repeated[: None if shown is None else 3]]
        lines.append(f"shared by images: {', '.join(shared)}")
    if captions.too_long:
        lines.append(f"{len(captions.too_long)} too long for the text encoder:")
        lost = [f"  {printable(entry.image)} loses {quoted(entry.lost)}" for entry in captions.too_long]
        lines += _cut(lost, shown, "  ")
    elif captions.too_long is not None:
        lines.append("all fit into the text encoder")
    paragraphs["captions"] = lines
    if any(source.reason for source in report.caption_sources):
        sources = [
            f"{printable(source.name)}: {plural(source.images, 'image')}, {'not used' if source.reason else 'used'}"
            for source in report.caption_sources
        ]
        paragraphs["sources"] = _cut(sources, shown)
    alike = []
    for names in report.near_duplicates:
        more = 0 if shown is None else len(names) - shown
        alike.append(", ".join(map(printable, names[:shown])) + (f", … and {more} more" if more > 0 else ""))
    paragraphs["alike"] = _cut(alike, shown)
    paragraphs["copies"] = _cut(
        [f"{printable(copy.path)} = {printable(copy.of)}" for copy in report.duplicate_files], shown
    )
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in report.skipped_files:
        by_reason[entry.reason].append(f"  {printable(entry.path)}")
    lines = []
    for reason, paths in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines += [f"{len(paths)} × {printable(reason)}", *_cut(paths, shown, "  ")]
    paragraphs["skipped"] = lines
    lines = [report.summary(), ""]
    for label, texts in paragraphs.items():
        lines += [f"{label if not number else '':<{_LABEL_WIDTH}}{text}" for number, text in enumerate(texts)]
    if report.notes:
        lines += ["", "Good to know", *(f"  - {line}" for line in report.notes)]
    if report.needs_attention:
        lines += ["", "Needs attention", *(f"  - {line}" for line in report.needs_attention)]
    else:
        lines += ["", "Nothing needs attention."]
    return "\n".join(lines)


def _cut(lines: list[str], shown: int | None, indent: str = "") -> list[str]:
    if shown is None or len(lines) <= shown:
        return lines
    return [*lines[:shown], f"{indent}… and {len(lines) - shown} more (--all shows them)"]
