"""What learns from images alone takes images without a caption, and says how many they are."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ldm.data import CaptionedImages, DataConfig, NoCaptionsError, split
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from tests.data.image_files import captions, opened, png, reasons, save
from tests.data.test_tars import write_tar


def images_of(path: Path, **changes: object) -> dict[str, tuple[str, ...]]:
    config = DataConfig(path=str(path), resolution=8, **changes)  # type: ignore[arg-type]
    return {sample.id: sample.captions for sample in open_source(config, captioned=False).samples}


def test_a_folder_of_images_and_nothing_else(tmp_path: Path) -> None:
    for number, color in enumerate(("red", "blue", "lime", "black")):
        save(tmp_path / "sub" / f"{number}.png", color)
        save(tmp_path / f"{number}.png", color, caption=f"{number}" if number == 0 else None)
    (tmp_path / "1.txt").write_text(" ")
    (tmp_path / "2.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "broken.png").touch()
    config = DataConfig(path=str(tmp_path), resolution=8)
    inspection = inspect(open_source(config, captioned=False), config)
    assert inspection.total == 9
    assert {entry.path: entry.reason for entry in inspection.skipped} == {"broken.png": "the file is empty"}
    assert {sample.id: sample.captions for sample in inspection.used} == {
        "0.png": ("0",),
        "1.png": (),
        "2.png": (),
        "3.png": (),
    }
    account = dataset_report(inspection, config)
    assert account.captions.without == 3
    assert account.summary().endswith("1 skipped, 4 duplicates; 3 without a caption")
    images = CaptionedImages(inspection.used, config, 0)
    assert [images[0, index].caption for index in range(4)] == ["0", "", "", ""]
    with pytest.raises(NoCaptionsError):
        opened(tmp_path / "sub")


def test_groups_are_named_as_those_with_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "b.jpg"):
        save(tmp_path / name)
    config = DataConfig(path=str(tmp_path), resolution=8)
    for file, text, groups in (
        ("a.txt", "a caption", {"a", "b"}),
        ("metadata.csv", "file_name,text\na.png,a caption", {"a.png", "b.png", "b.jpg"}),
    ):
        (tmp_path / file).write_text(text)
        assert {sample.group for sample in open_source(config, captioned=False).samples} == groups


def test_captions_may_come_later_and_move_nothing(tmp_path: Path) -> None:
    for number in range(40):
        save(tmp_path / f"{number}.png", f"#0000{number:02x}")
    config = DataConfig(path=str(tmp_path), resolution=8, held_out=0.3)
    before = [[sample.id for sample in side] for side in split(open_source(config, captioned=False).samples, 0.3)]
    for number in range(0, 40, 3):
        (tmp_path / f"{number}.txt").write_text("a caption")
    after = open_source(config, captioned=False).samples
    assert [[sample.id for sample in side] for side in split(after, 0.3)] == before
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("a caption")
    assert [[sample.id for sample in side] for side in split(open_source(config).samples, 0.3)] == before


@pytest.mark.parametrize("table", ["metadata.csv", "labels.csv"])
def test_images_that_a_table_does_not_name(tmp_path: Path, table: str) -> None:
    for name in "abcd":
        save(tmp_path / "cats" / f"{name}.png")
    (tmp_path / table).write_text("file_name,text\ncats/a.png,a cat\ncats/b.png,\ngone.png,x\n")
    assert images_of(tmp_path, caption_source=None) == {
        "cats/a.png": ("a cat",),
        "cats/b.png": (),
        "cats/c.png": (),
        "cats/d.png": (),
    }
    (tmp_path / table).write_text("file_name,one,two\ncats/a.png,x,y\n")  # which of them is the caption?
    assert images_of(tmp_path)["cats/a.png"] == ()


def test_a_file_of_captions_that_is_not_read_stops_nobody(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "a.png")
    (tmp_path / "captions.yaml").write_text("a.png: a dog in the snow")
    with pytest.raises(NoCaptionsError):
        opened(tmp_path)
    assert images_of(tmp_path) == {"dogs/a.png": ()}


def test_names_of_folders_stay_captions(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "a.png")
    save(tmp_path / "images" / "b.png")
    save(tmp_path / "c.png")
    assert images_of(tmp_path) == {"c.png": (), "dogs/a.png": ("dogs",), "images/b.png": ()}


def test_shards_without_captions_and_images_beside_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", png()), ("2.png", png()), ("2.txt", b"two"), ("3.txt", b"no image")])
    assert images_of(tmp_path) == {"a.tar/1.png": (), "a.tar/2.png": ("two",)}
    assert images_of(tmp_path / "a.tar") == {"a.tar/1.png": (), "a.tar/2.png": ("two",)}
    save(tmp_path / "preview.png")
    assert images_of(tmp_path) == {"a.tar/1.png": (), "a.tar/2.png": ("two",), "preview.png": ()}
    write_tar(tmp_path / "a.tar", [("1.png", png())])
    assert images_of(tmp_path) == {"a.tar/1.png": (), "preview.png": ()}
    with pytest.raises(NoCaptionsError):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_images_without_a_column_of_captions(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"image": [png("red"), png("blue")], "id": ["a", "b"], "url": ["x", "y"], "hash": ["x", "y"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for where in (tmp_path, path):
        assert images_of(where) == {"a": (), "b": ()}
        with pytest.raises(ValueError, match="caption"):
            opened(where)
    parquet.write_table(pa.table({"image": [png("red"), png("blue")], "text": ["one", None]}), tmp_path / "a.parquet")
    if suffix == "parquet":
        assert sorted(images_of(tmp_path).values()) == [(), ("one",)]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(NoCaptionsError, match=r"no image in "):
        images_of(tmp_path)


def test_captions_are_needed_where_they_are(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="a")
    save(tmp_path / "b.png")
    source = opened(tmp_path)
    assert (captions(source), reasons(source)) == ({"a.png": ("a",)}, {"b.png": "no caption"})


def test_tables_that_do_not_agree_stop_nobody(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save(tmp_path / f"{name}.png", "red")
        (tmp_path / f"{name}.csv").write_text(f"file_name,text\n{name}.png,one\n")
    assert set(images_of(tmp_path)) == {"1.png", "2.png"}


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path / "1.png", "red")
    (tmp_path / "data.tar").write_bytes(b"junk")
    source = open_source(DataConfig(path=str(tmp_path), resolution=8), captioned=False)
    assert [sample.id for sample in source.samples] == ["1.png"]
    assert [entry.path for entry in source.skipped] == ["data.tar"]
