import io
import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from pyarrow import parquet

from ldm.data import DataConfig, NoCaptionsError
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from tests.data.image_files import captions, color, opened, png, reasons, save

datasets.disable_progress_bars()

COLORS = ("red", "lime", "blue")


def rows(colors: Sequence[str], paths: Sequence[str | None] | None = None) -> dict[str, Any]:
    images = [
        {"bytes": png(name), "path": path}
        for name, path in zip(colors, paths or [f"{name}.png" for name in colors], strict=True)
    ]
    return {"image": images, "caption": [f"a {name} field" for name in colors]}


def write(path: Path, table: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(table), path, **options)
    return path


def test_a_file_or_a_folder_of_parquet(tmp_path: Path) -> None:
    for number, name in enumerate(COLORS):
        write(tmp_path / "set" / "data" / f"train-0000{number}-of-00003.parquet", rows([name]))
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", rows(["black"]))
    save(tmp_path / "set" / "preview.png")
    source = opened(tmp_path / "set")
    assert source.name == f"{tmp_path / 'set'} (split train)"
    assert captions(source) == {f"{name}.png": (f"a {name} field",) for name in COLORS}
    assert [sample.group for sample in source.samples] == [f"{name}.png" for name in COLORS]
    assert [color(source, f"{name}.png") for name in COLORS] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert source.samples[1].read() == png("lime")
    assert reasons(source) == {"preview.png": "no caption: the shards beside it count alone"}
    assert set(captions(opened(tmp_path / "set", split="test"))) == {"black.png"}
    # A file that is given is read whatever its name says.
    alone = opened(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    assert captions(alone) == {"black.png": ("a black field",)}
    with pytest.raises(ValueError, match=r'subset "fr".* data; .*data\.subset'):
        opened(tmp_path / "set", subset="fr")
    write(tmp_path / "set" / "fr" / "train.parquet", rows(["white"]))
    assert set(captions(opened(tmp_path / "set", subset="fr"))) == {"white.png"}


def test_samples_pickle_without_images(tmp_path: Path) -> None:
    table = rows(COLORS)
    table["image"][0]["bytes"] += bytes(100_000)
    write(tmp_path / "a.parquet", table, row_group_size=2)
    source = opened(tmp_path)
    sent = pickle.dumps(source)
    assert len(sent) < 10_000
    again = pickle.loads(sent)
    assert again == source
    assert [color(again, f"{name}.png") for name in COLORS] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_of_plain_bytes_with_a_key(tmp_path: Path, kind: Any) -> None:
    images = pa.array([png("red"), png("lime"), None, b""], kind)
    texts = pa.array([["one", "two"], ["three", None], ["x"], ["y"]])
    write(tmp_path / "a.parquet", {"jpg": images, "captions": texts, "key": ["a", "b", "c", "d"], "url": list("uuuu")})
    source = opened(tmp_path)
    assert captions(source) == {"a": ("one", "two"), "b": ("three",), "d": ("y",)}
    assert color(source, "b") == (0, 255, 0)
    assert reasons(source) == {"a.parquet:2": "no caption (caption 2 of 2)", "a.parquet:3": "no image"}


def test_ids_stay_when_rows_come_and_go(tmp_path: Path) -> None:
    names = [None, None, "same.png", "same.png", "alone.png"]
    colors = ["red", "lime", "blue", "black", "white"]
    write(tmp_path / "a.parquet", rows(colors, names))
    before = {caption[0]: name for name, caption in captions(opened(tmp_path)).items()}
    assert len(set(before.values())) == 5
    assert before["a white field"] == "alone.png"
    assert before["a blue field"].startswith("same.png@")
    # Another order, other files, one row less, one more, and a copy of the first.
    write(tmp_path / "a.parquet", rows(["white", "black", "gray"], ["alone.png", "same.png", None]))
    write(tmp_path / "b.parquet", rows(["blue", "red", "red"], ["same.png", None, None]))
    source = opened(tmp_path)
    after = {caption[0]: name for name, caption in reversed(captions(source).items())}
    assert {text: after[text] for text in before if text in after} == {
        text: name for text, name in before.items() if text != "a lime field"
    }
    assert not any("#" in name for name in after.values())
    copies = [sample for sample in source.samples if sample.captions == ("a red field",)]
    assert [sample.id for sample in copies] == [before["a red field"], before["a red field"] + "#2"]
    assert len({sample.group for sample in copies}) == 1


def test_images_that_end_alike_have_ids_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"png": [png("red") + bytes(2000), png("red") + bytes(2001)], "text": ["a", "b"]})
    source = opened(tmp_path)
    assert len({sample.group for sample in source.samples}) == 2


def test_an_edited_file_is_read_anew_even_with_its_old_date(tmp_path: Path) -> None:
    red, tan = (io.BytesIO(), io.BytesIO())
    for file, name in ((red, "red"), (tan, "tan")):
        Image.new("RGB", (8, 6), name).save(file, "BMP")
    path = write(tmp_path / "a.parquet", {"image": [red.getvalue()], "text": ["a field"]}, compression="none")
    before = path.stat()
    assert opened(tmp_path).samples[0].load().getpixel((0, 0)) == (255, 0, 0)
    write(path, {"image": [tan.getvalue()], "text": ["a field"]}, compression="none")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert opened(tmp_path).samples[0].load().getpixel((0, 0)) == (210, 180, 140)


def test_what_is_broken_in_parquet_costs_its_own_rows(tmp_path: Path) -> None:
    noisy = [{"bytes": png(name) + os.urandom(1000), "path": f"{name}.png"} for name in COLORS]
    table = {"image": [*noisy, {"bytes": png(), "path": "mute.png"}], "caption": ["one", "two", "three", None]}
    path = write(tmp_path / "a.parquet", table, row_group_size=1, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    data[middle : middle + 40] = bytes([255]) * 40
    path.write_bytes(data)
    (tmp_path / "cut.parquet").write_bytes(bytes(data[:-20]))
    for _ in range(2):  # the second time from the copy in the cache
        source = opened(tmp_path)
        assert captions(source) == {"red.png": ("one",), "blue.png": ("three",)}
        assert color(source, "blue.png") == (0, 0, 255)
        found = reasons(source)
        assert set(found) == {"a.parquet:2-2", "a.parquet:4", "cut.parquet"}
        assert found["a.parquet:2-2"].startswith("these rows cannot be read: ")
        assert found["cut.parquet"].startswith("not a .parquet file that can be read: ")
    with pytest.raises(ValueError, match=r"cut\.parquet: "):
        opened(tmp_path / "cut.parquet")


def test_the_rest_of_a_broken_row_group_is_one_entry(tmp_path: Path) -> None:
    images = [png(name) + os.urandom(1000) for name in (*COLORS, "tan")]
    path = write(tmp_path / "a.parquet", {"png": images, "text": list("abcd")}, row_group_size=3, compression="gzip")
    data = bytearray(path.read_bytes())
    start = parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    data[start : start + 40] = bytes([255]) * 40
    path.write_bytes(data)
    source = opened(tmp_path)
    assert list(captions(source).values()) == [("d",)]
    assert list(reasons(source)) == ["a.parquet:1-3"]


def test_a_broken_arrow_file_may_have_captions_that_would_be_lost(tmp_path: Path) -> None:
    labelled().save_to_disk(tmp_path / "saved")
    whole = next((tmp_path / "saved").glob("*.arrow")).read_bytes()
    table = pa.table({"image": [png()], "text": ["a"]}).replace_schema_metadata({b"huggingface": b'{"info": 3}'})
    with pa.OSFile(str(tmp_path / "odd"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    save(tmp_path / "data" / "cats" / "a.png")
    for content in (whole[:-300], (tmp_path / "odd").read_bytes()):
        (tmp_path / "data" / "cut.arrow").write_bytes(content)
        with pytest.raises(NoCaptionsError, match=r"would be lost: shards captions 0 images"):
            opened(tmp_path / "data")
        with pytest.raises(NoCaptionsError, match=r"cut\.arrow: not an Arrow stream that can be read: "):
            opened(tmp_path / "data" / "cut.arrow")


def test_an_arrow_file_without_images_may_be_anything(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]}).replace_schema_metadata({b"huggingface": b'{"info": 3}'})
    save(tmp_path / "cats" / "a.png")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    source = opened(tmp_path)
    assert captions(source) == {"cats/a.png": ("cats",)}
    assert reasons(source) == {}


def test_rows_without_a_name_are_reported_by_their_place(tmp_path: Path) -> None:
    mirrored = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    data = io.BytesIO()
    mirrored.resize((80, 60)).save(data, "PNG")
    near = io.BytesIO()
    mirrored.save(near, "PNG")
    images = [data.getvalue(), b"broken", data.getvalue(), near.getvalue()]
    write(tmp_path / "a.parquet", {"png": images, "text": ["a b c", "d", "e", "f"]})
    config = DataConfig(path=str(tmp_path), resolution=8)
    account = dataset_report(
        inspect(open_source(config), config), config, truncated_words=lambda texts: [text[2:] for text in texts]
    )
    assert [entry.path for entry in account.skipped_files] == ["a.parquet:2"]
    (copy,) = account.duplicate_files
    assert {copy.path, copy.of} == {"a.parquet:1", "a.parquet:3"}
    assert len(account.near_duplicates) == 1 and "a.parquet:4" in account.near_duplicates[0]
    assert all(entry.image.startswith("a.parquet:") for entry in account.captions.too_long or ())


def test_text_that_is_not_utf8_costs_its_own_rows(tmp_path: Path) -> None:
    broken = pa.array(["grün".encode("latin-1"), b"fine"]).view(pa.string())
    lists = pa.ListArray.from_arrays([0, 1, 2], broken)
    for name, texts in (("text", broken), ("list", lists)):
        write(tmp_path / name / "a.parquet", {"png": [png("red"), png("blue")], "text": texts})
        source = opened(tmp_path / name)
        assert list(captions(source).values()) == [("fine",)]
        assert reasons(source) == {"a.parquet:1": "the caption is not UTF-8 text; save the file as UTF-8"}
    save(tmp_path / "files" / "a.png")
    write(tmp_path / "files" / "metadata.parquet", {"file_name": ["a.png", "a.png"], "text": broken})
    source = opened(tmp_path / "files")
    assert captions(source) == {"a.png": ("fine",)}
    assert reasons(source) == {"metadata.parquet:1": "the caption is not UTF-8 text; save the file as UTF-8"}


def test_a_row_may_name_a_file_instead_of_holding_it(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "a.png", "blue")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": None, "path": "pictures/a.png"}, {"bytes": None, "path": "http://x/b.png"}]
    write(tmp_path / "a.parquet", {"image": pa.array(images, kind), "text": ["a", "b"]})
    source = opened(tmp_path)
    assert captions(source) == {"pictures/a.png": ("a",)}
    assert color(source, "pictures/a.png") == (0, 0, 255)
    assert "no file" in reasons(source)["a.parquet:2"]


def labelled() -> Dataset:
    features = Features(
        {"look": datasets.Image(), "label": ClassLabel(names=["big_cat", "dog"]), "bytes": datasets.Value("binary")}
    )
    images = [Image.new("RGB", (8, 6), name) for name in COLORS]
    return Dataset.from_dict({"look": images, "label": [0, 1, -1], "bytes": [b"x"] * 3}, features=features)


def test_what_datasets_wrote(tmp_path: Path) -> None:
    labelled().save_to_disk(tmp_path / "saved")
    labelled().to_parquet(tmp_path / "parquet" / "a.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    found = [opened(tmp_path / "saved"), opened(tmp_path / "parquet"), opened(arrow)]
    for source in found:
        assert [sample.captions for sample in source.samples] == [("big cat",), ("dog",)]
        assert source.samples[1].load().getpixel((0, 0)) == (0, 255, 0)
        assert [entry.reason for entry in source.skipped] == ["no caption"]
        assert [sample.id for sample in source.samples] == [sample.id for sample in found[0].samples]
    DatasetDict(train=labelled(), test=labelled().select([1])).save_to_disk(tmp_path / "splits")
    assert len(opened(tmp_path / "splits").samples) == 2
    assert [sample.captions for sample in opened(tmp_path / "splits", split="test").samples] == [("dog",)]
    with pytest.raises(ValueError, match=r'split "val".*data\.split .*train, test'):
        opened(tmp_path / "splits", split="val")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"saved cannot be read") as caught:
        opened(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "given", "message"),
    [
        (
            {"a": "bytes", "b": "bytes", "text": "text"},
            {},
            r"which column holds the images .* a, b, text; set data\.image",
        ),
        ({"image": "bytes", "x": "text", "y": "text"}, {}, r"the captions cannot be told from the columns image, x, y"),
        ({"image": "bytes", "text": "text"}, {"image_column": "img"}, r'image_column is "img", .* it has image, text'),
        ({"image": "bytes", "text": "text"}, {"image_column": "text"}, r'"text" holds string, not images; .* of image'),
        ({"image": "bytes", "n": "number"}, {}, r"image, n; set data\.caption_column"),
        ({"image": "bytes", "text": "text", "n": "number"}, {"caption_column": "n"}, r'"n" holds int64, not texts'),
    ],
)
def test_columns_that_cannot_be_told(
    tmp_path: Path, table: dict[str, str], given: dict[str, Any], message: str
) -> None:
    values = {"bytes": png(), "text": "a text", "number": 3}
    write(tmp_path / "a.parquet", {name: [values[kind]] for name, kind in table.items()})
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **given)


def test_columns_that_the_config_names(tmp_path: Path) -> None:
    table = {"a": [png("red")], "b": [png("blue")], "text": ["no"], "other": ["yes"], "id": [7]}
    write(tmp_path / "a.parquet", table)
    source = opened(tmp_path, image_column="b", caption_column="other")
    assert captions(source) == {"7": ("yes",)}
    assert color(source, "7") == (0, 0, 255)


def test_a_cache_within_the_data_is_not_taken_for_data(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(COLORS))
    for _ in range(2):
        source = opened(tmp_path, cache_dir=str(tmp_path / "cache"))
        assert (len(source.samples), source.skipped) == (3, ())
    assert sorted(path.suffix for path in (tmp_path / "cache" / "tables").iterdir()) == [".rows"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir"):
        opened(tmp_path, cache_dir=str(tmp_path / "file"))


def test_unreachable_hub_is_one_line() -> None:
    for name in ("someone/no-such-set", "no-such-set"):
        with pytest.raises(ValueError, match=rf"data\.path {name}") as caught:
            open_source(DataConfig(path=name, resolution=8))
        assert "\n" not in str(caught.value) and "check the spelling, the network" in str(caught.value)


def test_retries_of_the_hub_are_not_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("huggingface_hub.utils")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    level = logging.getLogger("huggingface_hub").level

    def unreachable(*_: object, **__: object) -> None:
        logger.warning("thrown while requesting HEAD; retrying in 1s")
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    try:
        with pytest.raises(ValueError, match="no network"):
            open_source(DataConfig(path="someone/no-such-set", resolution=8))
    finally:
        logger.removeHandler(handler)
    assert "retrying" not in capfd.readouterr().err
    assert logging.getLogger("huggingface_hub").level == level
