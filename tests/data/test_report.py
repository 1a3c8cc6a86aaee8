"""The report: counts that add up, what is treated how, what needs attention, and text that a terminal survives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from ldm.data import DataConfig, Sample
from ldm.data.inspection import Duplicate, ImageFormat, Inspection
from ldm.data.report import DatasetReport, dataset_report, quoted
from ldm.data.sources import CaptionSource, Decoded, Skipped
from ldm.progress import plural
from ldm.report.text import report_text


def refuse(_: bytes) -> Decoded:
    raise AssertionError("an report decodes nothing")


def sample(number: int, *captions: str, size: tuple[int, int] = (100, 80), group: str = "") -> Sample:
    name = f"{number:02}.png"
    return Sample(name, captions or (f"caption number {number}",), group or name, bytes, refuse, "0" * 32, size)


CONFIG = DataConfig(path="things", resolution=64, background="#ff0000")
RGB = ImageFormat("PNG", "RGB", ())


def inspection(samples: Sequence[Sample], **more: object) -> Inspection:
    settings = {"skipped": (), "formats": (RGB,) * len(samples)} | more
    return Inspection("things", tuple(samples), **settings)  # type: ignore[arg-type]


def clean(count: int = 120) -> Inspection:
    return inspection([sample(number) for number in range(count)])


def whole() -> Inspection:
    samples = [sample(number) for number in range(40)]
    samples[0] = sample(0, "a cat", "a cat", "a small cat", size=(300, 100))
    samples[1] = sample(1, "a cat", size=(20, 30))
    samples[2] = sample(2, "a very long caption that does not fit", size=(60, 400))
    samples[3] = replace(samples[3], group="02.png")
    kinds = [RGB] * 40
    kinds[:3] = [
        ImageFormat("JPEG", "CMYK", ("rotated", "cmyk")),
        ImageFormat("GIF", "P", ("palette", "transparent", "animated")),
        ImageFormat("", "I;16", ("16-bit", "striped")),
    ]
    return inspection(
        samples,
        formats=tuple(kinds),
        skipped=(
            Skipped("a.png", "no caption: no metadata file names it"),
            Skipped("b.png", "empty caption"),
            Skipped("c.png", "the file is empty"),
            Skipped("d.png", "no caption"),
            Skipped("e.png", "the file is empty"),
        ),
        duplicates=(Duplicate("00b.png", "00.png"), Duplicate("00c.png", "00.png", ("a small cat",))),
        near_duplicates=(("02.png", "03.png"),),
        cache_error="/nowhere: Permission denied",
    )


def cut(captions: Sequence[str]) -> list[str]:
    return [" ".join(caption.split()[6:]) for caption in captions]


def test_report_counts() -> None:
    report = dataset_report(whole(), CONFIG, truncated_words=cut)
    assert (report.total, report.used, report.skipped, report.duplicate) == (47, 40, 5, 2)
    assert report.training + report.held_out == 40
    assert report.held_out > 0
    captions = report.captions
    assert (captions.total, captions.distinct, captions.missing, captions.empty) == (42, 40, 2, 1)
    assert captions.words == (2, 3, 8)
    assert captions.repeated == (("a cat", 2),)  # on two images, one of which has it twice
    assert captions.too_long is not None
    [too_long] = captions.too_long
    assert (too_long.image, too_long.lost) == ("02.png", "not fit")
    sizes = report.sizes
    assert (sizes.smallest, sizes.median, sizes.largest) == ((20, 30), (100, 80), (300, 100))
    assert (sizes.enlarged, sizes.much_enlarged) == (2, 1)
    assert sizes.shapes == {"narrower than 1:4": 1, "2:3": 1, "4:3": 37, "3:1": 1}
    assert report.formats == {"PNG": 37, "GIF": 1, "JPEG": 1, "made here": 1}
    assert report.modes == {"RGB": 37, "CMYK": 1, "I;16": 1, "P": 1}
    assert report.traits == dict.fromkeys(
        ("16-bit", "animated", "cmyk", "palette", "rotated", "striped", "transparent"), 1
    )
    assert report.treatment["rotated"].startswith("turned upright")
    assert "#ff0000" in report.treatment["transparent"]
    assert report.treatment["striped"] == "converted to RGB"  # a trait that this file has not heard of
    assert report.contradictory == ("00c.png",)
    held_out = report.held_out
    assert report.summary() == (
        f"things: 47 entries: 40 used ({40 - held_out} to train on, {held_out} held out), 5 skipped, 2 duplicates"
    )


def test_what_needs_attention_says_what_to_do() -> None:
    report = dataset_report(whole(), CONFIG, truncated_words=cut)
    skipped, too_long, contradictory = report.needs_attention
    assert skipped.startswith("5 of 47 are skipped (2 × the file is empty, ")
    assert skipped.endswith("and other reasons); fix or remove them")
    assert '1 caption longer than the text encoder reads: 02.png loses "not fit"; shorten' in too_long
    assert '00c.png says "a small cat", and shows what 00.png shows' in contradictory
    assert any("2 images are copies of 1" in note and "together" in note for note in report.notes)
    apart = dataset_report(replace(whole(), near_duplicates=(("04.png", "05.png"),)), CONFIG)
    assert any("2 images are copies of 1" in note and "as this data set groups them" in note for note in apart.notes)
    assert any("/nowhere: Permission denied" in note for note in report.notes)
    assert any(note.startswith("40 images: few") for note in report.notes)


def test_clean_data_needs_no_attention() -> None:
    report = dataset_report(clean(), CONFIG, truncated_words=cut)
    assert report.needs_attention == () == report.notes
    assert report_text(report).endswith("Nothing needs attention.")
    assert report.captions.too_long == ()
    assert "all fit into the text encoder" in report_text(report)


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (inspection([], skipped=(Skipped("a", "broken"),)), "no image can be used"),
        (inspection([sample(n, "a dog") for n in range(9)]), 'all 9 images have one caption, "a dog"'),
        (inspection([sample(1)]), "nothing can be held out"),
        (inspection([sample(n, group="one") for n in range(9)]), "nothing can be held out"),
        (
            inspection([sample(n, size=(20 + n, 90)) for n in range(20)]),
            "12 images below half of 64 pixels would be blurred; choose a resolution of about 22, or larger images",
        ),
        (
            inspection([sample(n, size=(1, 1) if n < 5 else (90, 90)) for n in range(20)]),
            "5 images below half of 64 pixels would be blurred; remove them, or take larger images",
        ),
    ],
)
def test_each_trouble_is_named(found: Inspection, part: str) -> None:
    assert [line for line in dataset_report(found, CONFIG).needs_attention if part in line]


def test_panoramas_are_not_counted_as_ordinary_shapes() -> None:
    sizes = [(5000, 1), (1, 5000), (400, 100), (401, 100), (100, 300)]
    report = dataset_report(inspection([sample(n, size=size) for n, size in enumerate(sizes)]), CONFIG)
    assert report.sizes.shapes == {"narrower than 1:4": 1, "1:3": 1, "3:1": 1, "wider than 4:1": 2}
    assert next(iter(report.sizes.shapes)) == "narrower than 1:4"
    assert any(note.startswith("3 images beyond 4:1, most of which is cropped away") for note in report.notes)


def test_summary_counts_images_or_entries() -> None:
    assert (
        dataset_report(inspection([sample(1)]), CONFIG).summary().startswith("things: 1 image: 1 used (1 to train on, ")
    )
    assert dataset_report(clean(), CONFIG).summary().startswith("things: 120 images: 120 used (")
    one = dataset_report(inspection([], skipped=(Skipped("metadata.csv:2", "no caption"),)), CONFIG)
    assert one.summary().startswith("things: 1 entry: 0 used (")


def test_with_buckets_the_area_counts() -> None:
    found = inspection([sample(n, size=(32, 128 + n)) for n in range(20)])
    assert dataset_report(found, CONFIG).sizes.enlarged == 20
    assert dataset_report(found, replace(CONFIG, buckets=True)).sizes.enlarged == 0


def test_uncounted_captions_are_said_to_be() -> None:
    report = dataset_report(clean(), CONFIG, uncounted="the encoder is not installed")
    assert report.captions.too_long is None
    assert report.notes == ("the lengths of captions were not checked: the encoder is not installed",)
    assert "fit into" not in report_text(report)


@pytest.mark.parametrize("found", [whole(), clean(), inspection([]), Inspection("passed through", (sample(1),), ())])
def test_json_is_complete_and_its_keys_stay(found: Inspection) -> None:
    report = dataset_report(found, CONFIG, truncated_words=cut)
    text = json.dumps(report.to_dict(), allow_nan=False)
    plain = json.loads(text)
    assert set(plain) == set(DatasetReport.__dataclass_fields__)
    assert plain["used"] + plain["skipped"] + plain["duplicate"] == plain["total"] == found.total
    assert plain["skipped_files"] == [{"path": entry.path, "reason": entry.reason} for entry in found.skipped]
    assert plain["duplicate_files"] == [
        {"path": copy.path, "of": copy.of, "captions": list(copy.captions)} for copy in found.duplicates
    ]
    assert set(plain["captions"]) == {
        "total", "distinct", "missing", "empty", "words", "repeated", "too_long", "uncounted", "templated",
        "many", "non_latin", "languages", "without",
    }  # fmt: skip
    assert set(plain["sizes"]) == {"smallest", "median", "largest", "enlarged", "much_enlarged", "shapes"}


def test_long_lists_are_cut_unless_full() -> None:
    skipped = tuple(Skipped(f"s{number:03}.png", "broken" if number % 2 else "empty") for number in range(100))
    near = tuple((f"{number}a", f"{number}b") for number in range(30))
    found = replace(clean(), skipped=skipped)
    short, long = report_text(dataset_report(found, CONFIG)), report_text(dataset_report(found, CONFIG), full=True)
    assert short.count(".png") == 20
    assert short.count("… and 40 more (--all shows them)") == 2
    assert "50 × broken" in short
    assert long.count(".png") == 100
    assert "more" not in long
    assert plural(1, "copy", "copies") == "1 copy"
    samples = {name: replace(sample(1), id=name) for names in near for name in names}
    alike = report_text(dataset_report(inspection(list(samples.values()), near_duplicates=near), CONFIG))
    assert alike.count("a, ") == 10


ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.txt\udc80\x00"


def test_report_is_printable() -> None:
    found = inspection(
        [replace(sample(1, ESCAPES, ESCAPES + "x"), id=ESCAPES), sample(2, ESCAPES)],
        skipped=(Skipped(ESCAPES, ESCAPES),),
        duplicates=(Duplicate(ESCAPES + "2", ESCAPES, (ESCAPES,)),),
        near_duplicates=((ESCAPES, "02.png"),),
        formats=(ImageFormat(ESCAPES, ESCAPES, (ESCAPES,)),) * 2,
        cache_error=ESCAPES,
    )
    report = dataset_report(replace(found, name=ESCAPES), CONFIG, truncated_words=lambda texts: list(texts))
    for text in (*report.needs_attention, *report.notes, report.summary(), quoted(ESCAPES * 9)):
        assert text.isprintable(), ascii(text)
    for everything in (True, False):
        lines = report_text(report, full=everything).split("\n")
        assert all(line.isprintable() for line in lines), [ascii(line) for line in lines if not line.isprintable()]
    json.dumps(report.to_dict(), allow_nan=False).encode("ascii")


def test_unused_captions_may_be_missed_if_no_other_source_has_them_or_their_images_are_unknown() -> None:
    sources = (
        CaptionSource("used", 4, 0),
        CaptionSource("more.csv", 4, 2, "because", doubtful=True),
        CaptionSource("renamed.csv", 0, 0, "because", doubtful=True),
        CaptionSource("same.csv", 4, 0, "because", doubtful=True),
        CaptionSource("numbers.csv", 4, 2, "because"),
    )
    report = dataset_report(replace(whole(), caption_sources=sources), CONFIG)
    assert [line.split()[0] for line in report.unused_captions()] == ["more.csv", "renamed.csv"]
    assert [line.split()[0] for line in report.unused_captions(harmless=True)] == ["same.csv", "numbers.csv"]


def test_merged_split_folders_are_noted() -> None:
    def below(*tops: str) -> tuple[str, ...]:
        samples = [replace(sample(i), id=f"{top}/{i}.png") for i, top in enumerate(tops)]
        return dataset_report(inspection(samples), DataConfig(path="here", resolution=64)).notes

    said = "train/ and test/, val/ are used together; name the folder train/ itself"
    assert any(said in note for note in below("train", "test", "val", "train"))
    assert any("train2017/ and val2017/ are used together" in note for note in below("train2017", "val2017"))
    assert not any("used together" in note for note in below("cats", "test") + below("train", "cats"))
