import codecs
import errno
import json
import os
import pickle
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from tests.data.image_files import captions, color, opened, reasons, save


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
    assert (source.name, source.skipped) == (str(tmp_path), ())


def test_every_line_of_every_caption_file_is_a_caption(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="one\n\n two \r\nthree\rone\n")
    (tmp_path / "a.caption").write_text("four")
    save(tmp_path / "b.png")
    (tmp_path / "b.png.TXT").write_text("named after the whole file")
    save(tmp_path / "c.png", caption="fine")
    (tmp_path / "c.caption").write_text(" \n")
    source = opened(tmp_path)
    assert captions(source) == {
        "a.png": ("one", "two", "three", "four"),
        "b.png": ("named after the whole file",),
        "c.png": ("fine",),
    }
    assert reasons(source) == {"c.caption": "empty caption; the other captions of c.png count"}


def test_sidecar_json_is_used_without_text_file(tmp_path: Path) -> None:
    for name in ("a", "b", "boxes", "broken", "half", "number"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.json").write_text(json.dumps({"url": "http://x", "Caption": ["one", "two"]}))
    (tmp_path / "b.json").write_text(json.dumps({"caption": "from JSON"}))
    (tmp_path / "b.txt").write_text("from text")
    (tmp_path / "boxes.json").write_text(json.dumps({"boxes": [1, 2]}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "half.json").write_text(json.dumps({"text": ["good", " "]}))
    (tmp_path / "number.json").write_text(json.dumps({"text": 3}))
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one", "two"), "b.png": ("from text",), "half.png": ("good",)}
    found = reasons(source)
    assert found.pop("broken.png").startswith("broken.json is not JSON")
    assert found == {
        "boxes.png": "no caption",
        "half.json": "empty caption (caption 2 of 2); the other captions of half.png count",
        "number.png": "the caption is not a text but a number",
    }
    (tmp_path / "a.json").write_text(json.dumps({"alt": "named", "text": "usual"}))
    assert captions(opened(tmp_path, caption_column="alt"))["a.png"] == ("named",)


def test_images_without_captions_are_reported_undecoded(tmp_path: Path) -> None:
    save(tmp_path / "good.png", caption="good")
    save(tmp_path / "silent.png")
    save(tmp_path / "blank.png", caption=" \n\u200b")
    save(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_bytes("no byte order mark".encode("utf-16-le"))
    save(tmp_path / "big.png", caption="word " * 300_000)
    save(tmp_path / "cased.png")
    (tmp_path / "CASED.txt").write_text("a caption")
    (tmp_path / "text.png").write_text("not an image: the inspection will find it")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "notes.txt").write_text("a caption of nothing")
    (tmp_path / "README.txt").write_text("about these images")
    source = opened(tmp_path)
    assert set(captions(source)) == {"good.png", "text.png"}
    found = reasons(source)
    assert found == {
        "CASED.txt": "a caption without an image",
        "big.png": "big.txt is longer than 1 MiB (1.4 MiB), the most that a caption file may have",
        "blank.png": "empty caption",
        "cased.png": "no caption; CASED.txt differs in upper and lower case",
        "latin.png": "latin.txt is not UTF-8 text",
        "notes.txt": "a caption without an image",
        "silent.png": "no caption",
        "wide.png": "wide.txt is not UTF-8 text",
    }
    assert list(found) == sorted(found)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF8])
def test_byte_order_marks_say_how_a_caption_is_encoded(tmp_path: Path, mark: bytes) -> None:
    names = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF32_LE: "utf-32-le"}
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(mark + "ein grüner Bär".encode(names.get(mark, "utf-8")))
    assert captions(opened(tmp_path)) == {"a.png": ("ein grüner Bär",)}


def test_what_lies_about_in_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save(data / "a.png", caption="a")
    for hidden in (".hidden.png", ".cache/a.png", "__MACOSX/a.png", "._a.png"):
        save(data / hidden, caption="hidden")
    save(tmp_path / "elsewhere.png", "blue")
    (data / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (data / "link.txt").write_text("through a link")
    (data / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (data / "more").symlink_to(tmp_path)
    (data / "round.png").symlink_to("round.png")
    os.mkfifo(data / "pipe.png")
    for name in ("phone.HEIC", "clip.mp4", "all.zip", "all.tar.gz", "page.html"):
        (data / name).touch()
    (data / "phone.txt").write_text("its image is named already")
    save(data / "line\nbreak.jfif".replace("jfif", "jpg"), caption="a strange name")
    (data / "line\nbreak.jpg").rename(data / "line\nbreak.jfif")
    source = opened(data)
    assert set(captions(source)) == {"a.png", "link.png", "line\nbreak.jfif"}
    assert color(source, "link.png") == (0, 0, 255)
    found = reasons(source)
    assert found.pop("all.zip").startswith(".zip is an archive")
    assert found.pop("all.tar.gz").startswith(".tar.gz is an archive")
    assert found == {
        "clip.mp4": ".mp4 is a video; save frames of it as PNG or JPEG",
        "lost.png": "a broken link",
        "more": "a link to a folder, which is not followed; give that folder itself",
        "phone.HEIC": ".heic is not read; convert it to PNG or JPEG",
        "pipe.png": "not a regular file",
        "round.png": f"cannot be read: {os.strerror(errno.ELOOP)}",
    }


def test_misnamed_images_are_reported(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    for kind, name in (("PNG", "b"), ("JPEG", "c.jpg_large"), ("GIF", "d.1"), ("WEBP", "e.x"), ("TIFF", "f.part")):
        Image.new("RGB", (8, 6)).save(tmp_path / "cat" / name, kind)
    for name in ("notes", "b.md", "LICENSE"):
        (tmp_path / "cat" / name).write_text("RIFF and text")
    source = opened(tmp_path)
    assert captions(source) == {"cat/a.png": ("cat",)}
    asked = {"b": ".png", "c.jpg_large": ".jpg", "d.1": ".gif", "e.x": ".webp", "f.part": ".tif"}
    assert reasons(source) == {
        f"cat/{name}": f"an image without its suffix; rename it to end in {kind}" for name, kind in asked.items()
    }


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", caption="a")
    save(tmp_path / "locked" / "b.png", caption="b")
    scandir = os.scandir

    # The tests may run as root, whom no permission stops.
    def refuse(path: str) -> object:
        if str(path).rstrip("/").endswith(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = "locked"
    source = opened(tmp_path)
    assert set(captions(source)) == {"a.png"}
    assert reasons(source) == {"locked/": "the folder cannot be read: Permission denied"}
    refused = tmp_path.name
    with pytest.raises(ValueError, match="Permission denied"):
        opened(tmp_path)


def test_folder_names_are_the_last_resort(tmp_path: Path) -> None:
    save(tmp_path / "train" / "golden_retriever" / "1.png", "yellow")
    save(tmp_path / "10_my-dog" / "1.png")
    save(tmp_path / "10_my-dog" / "1.webp")
    save(tmp_path / "2_" / "1.png")
    save(tmp_path / "images" / "1.png")
    save(tmp_path / "___" / "1.png")
    save(tmp_path / "top.png")
    (tmp_path / "README.md").write_text("two dogs")
    (tmp_path / "10_my-dog" / "boxes.json").write_text("{}")
    source = opened(tmp_path)
    assert captions(source) == {
        "10_my-dog/1.png": ("my dog",),
        "10_my-dog/1.webp": ("my dog",),
        "2_/1.png": ("2",),
        "train/golden_retriever/1.png": ("golden retriever",),
    }
    assert [sample.group for sample in source.samples][:2] == ["10_my-dog/1"] * 2
    found = reasons(source)
    assert "put it into one, or a .txt with its caption beside it" in found.pop("top.png")
    for name in ("___", "images"):
        assert (
            found.pop(f"{name}/1.png") == f'no caption: the name of its folder, "{name}", does not describe the image'
        )
    assert not found
    # Written captions of fewer than half as many images are neither lost nor do they hide the others.
    save(tmp_path / "top.png", caption="now one caption stands beside an image")
    with pytest.raises(ValueError, match=r"1 image, .* 4; set data\.caption_source"):
        opened(tmp_path)
    assert set(captions(opened(tmp_path, caption_source="sidecars"))) == {"top.png"}
    assert len(captions(opened(tmp_path, caption_source="folders"))) == 4
    (tmp_path / "2_" / "1.txt").write_text("and another")
    assert set(captions(opened(tmp_path))) == {"top.png", "2_/1.png"}


def test_error_of_a_folder_without_captions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no files; .*a\.txt") as caught:
        opened(tmp_path)
    assert "metadata.csv" in str(caught.value) and "sub-folders" in str(caught.value)
    for number in range(3):
        save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"3 \.png files, 1 \.txt file \(0\.png: no caption\)"):
        opened(tmp_path)
    save(tmp_path / "0.png", caption=" ")
    with pytest.raises(ValueError, match=r"\(0\.png: empty caption\)") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_after_opening_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="a")
    sample = opened(tmp_path).samples[0]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png .*the file is empty"):
        sample.load()
    os.remove(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png .* No such file"):
        sample.load()


def test_transparent_images_use_the_config_background(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    source = opened(tmp_path, background="#0000ff")
    assert source.samples[0].load().getpixel((1, 1)) == (0, 0, 255)


def test_accents_may_be_written_in_either_form(tmp_path: Path) -> None:
    save(tmp_path / unicodedata.normalize("NFD", "é.png"))
    (tmp_path / "metadata.csv").write_text("file_name,text\né.png,an accent\n", encoding="utf-8")
    assert list(captions(opened(tmp_path)).values()) == [("an accent",)]
