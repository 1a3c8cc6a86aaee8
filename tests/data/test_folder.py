import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import DataConfig, Source, open_source


def save(path: Path, colour: str = "red", caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def opened(folder: Path) -> Source:
    return open_source(DataConfig(path=str(folder), resolution=8))


def reasons(source: Source) -> dict[str, str]:
    return {entry.path: entry.reason for entry in source.skipped}


def write_metadata(folder: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_captions_beside_images_in_all_folders_below(tmp_path: Path) -> None:
    save(tmp_path / "b.png", "blue", " a blue field\n")
    save(tmp_path / "a" / "deep" / "c.JPG", "lime", "\ufeffein grüner Platz")
    save(tmp_path / "a.jpeg", "red", "a red field")
    save(tmp_path / "a.webp", "red")  # the same caption file
    source = opened(tmp_path)
    assert [(sample.id, sample.captions) for sample in source.samples] == [
        ("a.jpeg", ("a red field",)),
        ("a.webp", ("a red field",)),
        ("a/deep/c.JPG", ("ein grüner Platz",)),
        ("b.png", ("a blue field",)),
    ]
    assert [sample.group for sample in source.samples] == ["a", "a", "a/deep/c", "b"]
    image = source.samples[3].load()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), (0, 0, 255))
    assert pickle.loads(pickle.dumps(source)) == source  # spawned workers get the samples this way
    assert source.skipped == ()


def test_what_cannot_be_trained_on_is_named_and_the_rest_remains(tmp_path: Path) -> None:
    save(tmp_path / "good.png", caption="good")
    save(tmp_path / "silent.png")
    save(tmp_path / "blank.png", caption=" \n")
    save(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-500])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for stem in ("cut", "text", "empty"):
        (tmp_path / f"{stem}.txt").write_text(stem)
    (tmp_path / "notes.txt").write_text("a caption of nothing")
    save(tmp_path / ".hidden.png", caption="hidden")
    save(tmp_path / ".cache" / "a.png", caption="hidden")
    source = opened(tmp_path)
    assert [sample.id for sample in source.samples] == ["good.png"]
    found = reasons(source)
    assert list(found) == ["blank.png", "cut.jpg", "empty.png", "latin.png", "silent.png", "text.png"]
    assert found["blank.png"] == "empty caption"
    assert "truncated" in found["cut.jpg"]
    assert found["empty.png"] == "the file is empty"
    assert found["latin.png"] == "latin.txt is not UTF-8 text"
    assert found["silent.png"] == "no caption"
    assert found["text.png"].startswith("not an image in a known format")


def test_metadata_with_several_captions_an_image_counts_alone(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="from the text file")
    save(tmp_path / "sub" / "b.png")
    save(tmp_path / "other.png", caption="from the text file")
    write_metadata(
        tmp_path,
        "\ufeff" + json.dumps({"file_name": "sub/b.png", "text": " ein Bär ", "license": "mine"}),
        "",
        {"file_name": "./a.png", "text": "one"},
        {"file_name": "a.png", "text": "two"},
        {"file_name": "a.png", "text": "one"},
    )
    source = opened(tmp_path)
    assert [(sample.id, sample.captions) for sample in source.samples] == [
        ("a.png", ("one", "two")),
        ("sub/b.png", ("ein Bär",)),
    ]
    assert reasons(source) == {"other.png": "no caption"}


def test_each_bad_line_of_metadata_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save(folder / "a.png")
    save(tmp_path / "outside.png")
    write_metadata(
        folder,
        {"file_name": "a.png", "text": "good"},
        '{"file_name": "a.png", "text": ',
        '["a.png", "text"]',
        {"text": "no name"},
        {"file_name": "a.png", "text": 3},
        {"file_name": "a.png", "text": " "},
        {"file_name": "../outside.png", "text": "outside"},
        {"file_name": str(tmp_path / "outside.png"), "text": "outside"},
        {"file_name": "sub/../../outside.png", "text": "outside"},
        {"file_name": "gone.png", "text": "gone"},
        '{"file_name": "a.png", "text": "half a pair: \\ud83d"}',
    )
    source = opened(folder)
    assert [(sample.id, sample.captions) for sample in source.samples] == [("a.png", ("good",))]
    found = reasons(source)
    expected = {
        2: "not JSON",
        3: "not a JSON object",
        4: "file_name is missing",
        5: "text is not a text",
        6: "empty caption",
        7: "outside the folder",
        8: "outside the folder",
        9: "outside the folder",
        10: "there is no file gone.png",
        11: "lone surrogate",
    }
    assert set(found) == {f"metadata.jsonl:{number}" for number in expected}
    for number, reason in expected.items():
        assert reason in found[f"metadata.jsonl:{number}"]


def test_a_folder_that_gives_nothing_says_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no captioned image in .*; put a\.txt beside each a\.png, or one metadata\.jsonl"
    ):
        opened(tmp_path)
    save(tmp_path / "a.png", caption=" ")
    with pytest.raises(ValueError, match=r"\(a\.png: empty caption\)"):
        opened(tmp_path)
    (tmp_path / "a.png").write_text("broken")
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"none of the 1 captioned images .* a\.png: not an image") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    write_metadata(tmp_path, {"file_name": "gone.png", "text": "gone"})
    with pytest.raises(
        ValueError, match=r"\(metadata\.jsonl:1: there is no file gone\.png\); give metadata\.jsonl a line"
    ):
        opened(tmp_path)


def test_a_file_that_breaks_after_opening_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="a")
    sample = opened(tmp_path).samples[0]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png could be read before, and now cannot: the file is empty"):
        sample.load()
    os.remove(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png .* No such file"):
        sample.load()


def test_transparent_images_stand_on_the_background_of_the_config(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    source = open_source(DataConfig(path=str(tmp_path), resolution=8, background="#0000ff"))
    assert source.samples[0].load().getpixel((1, 1)) == (0, 0, 255)
