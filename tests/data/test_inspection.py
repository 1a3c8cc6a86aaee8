"""Inspection: every entry is counted, image info is cached and verified, the split is stable."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig, Sample, split
from ldm.data import inspection as module
from ldm.data.images import FORMATS, decode
from ldm.data.inspection import Inspection, info_cache, inspect, natural_order
from ldm.data.layouts import open_source
from ldm.data.rng import content_hash
from ldm.data.sources import Decoded, Skipped, Source


def picture(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth colors that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image | int, caption: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture(image) if isinstance(image, int) else image).save(path)
    path.with_suffix(".txt").write_text(caption or f"picture {path.stem}", encoding="utf-8")


def config(folder: Path, **settings: object) -> DataConfig:
    defaults = {"path": str(folder), "resolution": 16, "cache_dir": str(folder.parent / "cache")}
    return DataConfig(**(defaults | settings))  # type: ignore[arg-type]


def folder_source(folder: Path) -> Source:
    """The images of a folder as they would be listed: nothing decoded."""

    def load(data: bytes) -> Decoded:
        return decode(data, (255, 255, 255))

    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".gif", ".tif"))
    samples = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        captions = tuple(path.with_suffix(".txt").read_text(encoding="utf-8").splitlines())
        samples.append(Sample(name, captions, name.rpartition(".")[0], path.read_bytes, load))
    return Source(str(folder), tuple(samples))


def looked(folder: Path, **settings: object) -> Inspection:
    return inspect(folder_source(folder), config(folder), **settings)  # type: ignore[arg-type]


def mixed(folder: Path) -> Path:
    for number in range(30):
        save(folder / f"{number}.png", number)
    save(folder / "10_copy.png", 10, "picture 10")
    save(folder / "b" / "3.png", 3, "another caption")
    save(folder / "7 small.jpg", picture(7).resize((36, 30)))
    (folder / "12.png").write_bytes((folder / "12.png").read_bytes()[:300])
    (folder / "13.png").write_text("not an image")
    (folder / "14.png").write_bytes(b"")
    (folder / "15.txt").write_text("")
    return folder


def test_every_entry_is_counted_once_for_any_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_source(mixed(tmp_path / "data"))
    source = replace(source, skipped=(Skipped("0.gif", "no caption"),))

    def inspected(workers: int) -> Inspection:
        monkeypatch.setattr(module, "WORKERS", workers)
        return inspect(source, config(tmp_path / "data", cache_dir=str(tmp_path / f"cache{workers}")))

    first, *others = map(inspected, (1, 4, 3))
    assert all(other == first for other in others)
    assert first.total == 34 == len(first.used) + len(first.skipped) + len(first.duplicates)
    assert [entry.path for entry in first.skipped] == ["0.gif", "12.png", "13.png", "14.png", "15.png"]
    reasons = [entry.reason for entry in first.skipped]
    assert reasons[2:] == [
        f"not an image in a known format ({', '.join(FORMATS).lower()})",
        "the file is empty",
        "no caption",
    ]
    assert [(copy.path, copy.of, copy.captions) for copy in first.duplicates] == [
        ("10_copy.png", "10.png", ()),
        ("b/3.png", "3.png", ("another caption",)),
    ]
    used = {sample.id: sample for sample in first.used}
    assert [sample.id for sample in first.used] == [one.id for one in source.samples if one.id in used]
    assert used["3.png"].captions == ("picture 3", "another caption")
    assert used["10.png"].captions == ("picture 10",)
    assert used["7 small.jpg"].size == (36, 30)
    assert used["3.png"].digest == content_hash((tmp_path / "data/3.png").read_bytes())
    assert first.near_duplicates == (("7.png", "7 small.jpg"),)
    assert used["7.png"].group == used["7 small.jpg"].group == "7"
    formats = [stored.format for stored in first.formats]
    assert formats == ["JPEG" if one.id.endswith("jpg") else "PNG" for one in first.used]


def test_groups_tied_by_pictures_and_captions_become_one(tmp_path: Path) -> None:
    save(tmp_path / "data/x.png", 1)
    save(tmp_path / "data/y.png", 2)
    save(tmp_path / "data/y.jpg", 3)  # y.txt belongs to both
    save(tmp_path / "data/z.png", picture(3).resize((96, 80)))
    save(tmp_path / "data/z.jpg", 4)
    save(tmp_path / "data/a_copy.png", 4)  # the pixels of z.jpg, nearly
    save(tmp_path / "data/w.png", 1)  # exactly x.png
    save(tmp_path / "data/w.jpg", 5)
    groups = {sample.id: sample.group for sample in looked(tmp_path / "data").used}
    assert {groups[name] for name in ("y.png", "y.jpg", "z.png", "z.jpg", "a_copy.png")} == {"a_copy"}
    # w.png comes before x.png, so x.png is the copy; w.jpg shares its caption file.
    assert groups == groups | {"w.png": "w", "w.jpg": "w"} and "x.png" not in groups


def count_decodes(source: Source) -> tuple[Source, list[str]]:
    decoded: list[str] = []

    def counting(sample: Sample) -> Sample:
        def load(data: bytes) -> Decoded:
            decoded.append(sample.id)
            return sample.decode(data)

        return replace(sample, decode=load)

    return replace(source, samples=tuple(map(counting, source.samples))), decoded


def test_next_start_decodes_changed_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    folder = mixed(tmp_path / "data")
    before = looked(folder)
    source, decoded = count_decodes(folder_source(folder))
    assert inspect(source, config(folder)) == before
    assert sorted(decoded) == ["12.png", "13.png", "14.png"]  # what failed is tried again
    # The same size and time, other bytes.
    path, status = folder / "20.png", (folder / "20.png").stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    source, decoded = count_decodes(folder_source(folder))
    after = inspect(source, config(folder))
    assert sorted(decoded) == ["12.png", "13.png", "14.png", "20.png"]
    assert after != before
    # Another background is another picture.
    source, decoded = count_decodes(folder_source(folder))
    inspect(source, config(folder, background="black"))
    assert len(decoded) == len(source.samples) - 1  # but for the one without a caption


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign", "gone"])
def test_damaged_cache_is_computed_again(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number in range(5):
        save(folder / f"{number}.png", number)
    before = looked(folder)
    [file] = info_cache(config(folder)).folder.iterdir()
    content = file.read_bytes()
    at = len(content) - 400  # in the thumbnail of the last record
    changed = {
        "cut": content[:-1],
        "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
        "emptied": b"",
        "foreign": b"{}" * 5000,
        "gone": b"",
    }
    file.write_bytes(changed[damage])
    if damage == "gone":
        file.unlink()
    source, decoded = count_decodes(folder_source(folder))
    assert inspect(source, config(folder)) == before
    assert len(decoded) == 5
    source, decoded = count_decodes(folder_source(folder))
    assert inspect(source, config(folder)) == before
    assert decoded == []


def test_two_runs_may_look_at_one_data_set_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 2)
    folder = mixed(tmp_path / "data")
    results: list[Inspection] = []
    runs = [threading.Thread(target=lambda: results.append(looked(folder))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    source, decoded = count_decodes(folder_source(folder))
    assert inspect(source, config(folder)) == results[0]
    assert len(decoded) == 3
    assert not [path for path in info_cache(config(folder)).folder.iterdir() if path.suffix != ".safetensors"]


def test_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "data")
    before = looked(folder)
    (tmp_path / "file").write_text("")
    after = inspect(folder_source(folder), config(folder, cache_dir=str(tmp_path / "file")))
    assert before.cache_error == ""
    assert "Not a directory" in after.cache_error
    assert replace(after, cache_error="") == before


def test_pixels_in_another_shape_are_another_picture(tmp_path: Path) -> None:
    save(tmp_path / "data/a.png", Image.new("RGB", (20, 30), "red"))
    save(tmp_path / "data/b.png", Image.new("RGB", (30, 20), "red"))
    save(tmp_path / "data/c.gif", Image.new("RGB", (20, 30), "red"))
    seen = looked(tmp_path / "data")
    assert [(copy.path, copy.of) for copy in seen.duplicates] == [("c.gif", "a.png")]
    assert seen.near_duplicates == ()


def test_an_unreadable_file_is_skipped_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path / "data/a.png", 1)
    save(tmp_path / "data/b.png", 2)
    source = folder_source(tmp_path / "data")
    (tmp_path / "data/b.png").unlink()
    seen = inspect(source, config(tmp_path / "data"))
    assert seen.skipped == (Skipped("b.png", "No such file or directory"),)


def test_a_picture_so_large_that_pillow_warns_is_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("1", (9600, 9600)).save(tmp_path / "data/large.png")
    (tmp_path / "data/large.txt").write_text("darkness")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = looked(tmp_path / "data")
        assert warnings.filters[0][0] == "always"  # the user's settings are back
    assert caught == []
    assert [sample.size for sample in seen.used] == [(9600, 9600)]


def test_curated_source_is_inspected_on_request_only() -> None:
    digits = open_source(DataConfig(path="digits", resolution=8))

    def refuse(data: bytes) -> Decoded:
        raise AssertionError("decoded")

    untouched = replace(digits, samples=tuple(replace(one, decode=refuse) for one in digits.samples))
    seen = inspect(untouched, DataConfig(path="digits", resolution=8))
    assert seen.used is untouched.samples and seen.formats == () and seen.total == 1797
    again = replace(digits.samples[3], id="digits/again", group="digits/again")
    few = replace(digits, samples=(*digits.samples[:40], again))
    everything = inspect(few, DataConfig(path="digits", resolution=8), include_curated=True)
    assert everything.used == few.samples
    assert everything.near_duplicates == (("digits/0003", "digits/again"),)
    assert {kind.mode for kind in everything.formats} == {"L"}


def test_natural_order() -> None:
    names = ["1.png", "2.png", "10.png", "x.png", "X.png", "x (1).png", "x_copy.png", "x-2/a.png", "x-10/a.png"]
    expected = ["1.png", "2.png", "10.png", "X.png", "x.png", "x (1).png", "x-2/a.png", "x-10/a.png", "x_copy.png"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural_order) == expected
    odd = ["", ".", "..", "/", "a/", "a", "a.", ".a", "9" * 5000 + ".png", "٣.png", "\udc80.png", "007.png", "7.png"]
    assert len({natural_order(name) for name in odd}) == len(odd)
    assert natural_order("007.png") < natural_order("10.png")
    mixed = ["٣.png", "a.png", "7.png", "9" * 5000]
    assert sorted(mixed, key=natural_order) == ["7.png", "9" * 5000, "a.png", "٣.png"]
    assert sorted(odd, key=natural_order)[-1] == "\udc80.png"


def sides(folder: Path) -> dict[str, bool]:
    """Id → whether it is held out."""
    training, held_out = split(looked(folder).used, 0.2)
    return {sample.id: sample in held_out for sample in training + held_out}


def test_split_is_stable_when_data_change(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number in range(60):
        save(folder / f"img_{number:03}.png", number)
    before = sides(folder)
    assert 4 < sum(before.values()) < 25
    for number in range(0, 60, 3):  # near-copies that sort behind their originals
        image = picture(number)
        variants: Sequence[tuple[str, Image.Image]] = (
            (" (1).jpg", image),
            ("_copy.png", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
            ("-small.png", image.resize((24, 20))),
        )
        name, copy = variants[number // 3 % 3]
        save(folder / f"img_{number:03}{name}", copy)
    for number in range(60, 100):  # new pictures, before, between and behind the old
        save(folder / f"{('a', 'img_0', 'new')[number % 3]}{number}.png", number)
    after = sides(folder)
    assert len(after) == 120
    assert {name: after[name] for name in before} == before
    for name, held_out in after.items():
        assert held_out == after.get(f"{name[:7]}.png", held_out), name
    for path in sorted(folder.glob("img_0?5*")) + sorted(folder.glob("new*")):
        path.unlink()
    rest = sides(folder)
    assert 80 < len(rest) < 115
    assert {name: before[name] for name in before if name in rest} == {
        name: rest[name] for name in before if name in rest
    }


def test_cache_is_no_pickle_and_small(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "data")
    looked(folder)
    files = list((tmp_path / "cache").rglob("*.*"))
    assert [path.suffix for path in files] == [".safetensors"]
    assert files[0].stat().st_size < 31 * 1000
    shutil.rmtree(tmp_path / "cache")
    assert json.dumps([copy.path for copy in looked(folder).duplicates]) == '["10_copy.png", "b/3.png"]'
