"""Captions wherever tools leave them: what is read, what wins, and what is named where nothing reads it."""

from __future__ import annotations

import json
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ldm.data import DataConfig, NoCaptionsError
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from ldm.report.text import report_text
from tests.data.image_files import captions, opened, png, reasons, save
from tests.data.test_tars import write_tar


def write(path: Path, content: object, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(encoding))


def coco(names: Sequence[str], *texts: str) -> dict[str, Any]:
    images = [
        {"id": 7 * number, "file_name": name, "coco_url": f"http://x/{name}"} for number, name in enumerate(names)
    ]
    return {
        "info": {"description": "a set of images"},
        "images": images,
        "annotations": [
            {"id": 100 + 2 * number, "image_id": image["id"], "caption": f"{text} {image['id']}"}
            for number, image in enumerate(images)
            for text in texts or ("a picture",)
        ],
    }


def unused(path: Path, **changes: Any) -> dict[str, int]:
    """Name → number of images of the sources that are not used."""
    return {source.name: source.images for source in opened(path, **changes).caption_sources if source.reason}


# ---- COCO


@pytest.mark.parametrize("root", ["", "coco/2017/"])
def test_annotations_of_coco_beside_their_images(tmp_path: Path, root: str) -> None:
    names = [f"{number:012d}.jpg" for number in (9, 25, 30)]
    for name in names[:2]:
        save(tmp_path / root / "train2017" / name)
    save(tmp_path / root / "val2017" / names[2])
    write(tmp_path / root / "annotations" / "captions_train2017.json", coco(names[:2], "a dog", "a pet"))
    write(tmp_path / root / "annotations" / "captions_val2017.json", coco(names[2:]))
    write(
        tmp_path / root / "annotations" / "instances_train2017.json", coco(names[:2]) | {"annotations": [{"bbox": []}]}
    )
    source = opened(tmp_path)
    assert captions(source) == {
        f"{root}train2017/{names[0]}": ("a dog 0", "a pet 0"),
        f"{root}train2017/{names[1]}": ("a dog 7", "a pet 7"),
        f"{root}val2017/{names[2]}": ("a picture 0",),
    }
    assert source.skipped == ()
    instances = f"{root}annotations/instances_train2017.json"
    assert unused(tmp_path) == {instances: 2}
    only = opened(tmp_path, caption_source=f"{root}annotations/captions_val2017.json")
    assert set(captions(only)) == {f"{root}val2017/{names[2]}"}


def test_coco_without_the_names_of_its_images(tmp_path: Path) -> None:
    save(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg")
    save(tmp_path / "val" / "000000000025.JPG")
    entries = [{"image_id": 9, "caption": "nine"}, {"image_id": 25, "caption": "twenty-five"}]
    expected = {"train2014/COCO_train2014_000000000009.jpg": ("nine",), "val/000000000025.JPG": ("twenty-five",)}
    for content in ({"annotations": entries}, entries):
        write(tmp_path / "annotations" / "captions.json", content)
        assert captions(opened(tmp_path)) == expected


def test_what_is_wrong_with_annotations_is_named(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.jpg")
    save(tmp_path / "images" / "b.jpg")
    content = coco(["a.jpg", "gone.jpg", "b.jpg"])
    content["annotations"] += [
        {"image_id": 999, "caption": "x"},
        {"caption": "x"},
        {"image_id": 0},
        {"image_id": 0, "caption": "  "},
        "text",
    ]
    write(tmp_path / "captions.json", content)
    source = opened(tmp_path)
    assert captions(source) == {"images/a.jpg": ("a picture 0",), "images/b.jpg": ("a picture 14",)}
    assert reasons(source) == {
        "captions.json:2": "there is no file gone.jpg",
        "captions.json:4": "image_id 999 is not among its images",
        "captions.json:5": "no image_id",
        "captions.json:6": "no caption",
        "captions.json:7": "empty caption",
        "captions.json:8": "no image_id",
    }


def test_the_split_of_karpathy(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / ("train2014" if number else "val2014") / f"COCO_{number}.jpg")
    images = [
        {"filename": f"COCO_{number}.jpg", "filepath": "x", "sentences": [{"raw": f"one {number}"}, {"raw": "two"}]}
        for number in range(3)
    ]
    write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": images})
    assert captions(opened(tmp_path))["val2014/COCO_0.jpg"] == ("one 0", "two")
    assert len(captions(opened(tmp_path))) == 3


# ---- Flickr


def listed(first: str, second: str, third: str, head: str = "") -> str:
    """Three captions of two images, behind what each begins with."""
    return f"{head}{first}A child in a dress .\n{second}A girl, going in .\n{third}Two dogs, playing\n"


FLICKR = {
    "captions.txt": 'image,caption\n1.jpg,A child in a dress .\n1.jpg,"A girl, going in ."\n2.jpg,Two dogs, playing\n',
    "list.txt": listed("1.jpg,", "1.jpg,", "2.jpg,"),
    "Flickr8k.token.txt": listed("1.jpg#0\t", "1.jpg#1\t", "2.jpg#0\t"),
    "results.csv": listed("1.jpg| 0| ", "1.jpg| 1| ", "2.jpg| 0| ", "image_name| comment_number| comment\n"),
    "bare.csv": listed("1.jpg| 0| ", "1.jpg| 1| ", "2.jpg| 0| "),
    "results_20130124.token": listed("1.jpg#0\t", "1.jpg#1\t", "2.jpg#0\t"),
    "tabs.txt": listed("1.jpg\t", "1.jpg\t", "2.jpg\t"),
    "pipes.txt": listed("1.jpg|", "1.jpg|", "2.jpg|"),
    "semicolons.txt": listed("1.jpg;", "1.jpg;", "2.jpg;", "image;caption\n"),
}


@pytest.mark.parametrize("name", FLICKR)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lists_of_flickr(tmp_path: Path, name: str, encoding: str, ends: str) -> None:
    for number in (1, 2):
        save(tmp_path / "Images" / f"{number}.jpg")
    write(tmp_path / name, FLICKR[name].replace("\n", ends), encoding)
    source = opened(tmp_path)
    assert captions(source) == {
        "Images/1.jpg": ("A child in a dress .", "A girl, going in ."),
        "Images/2.jpg": ("Two dogs, playing",),
    }
    assert source.skipped == ()
    assert unused(tmp_path) == {}


def test_flickr_captions_with_quotes_or_missing_cells(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path / "flickr30k_images" / f"{number}.jpg")
    lines = ['1.jpg#0\t" Hello " says a man .', "2.jpg#0 no tab", '3.jpg#0\t"never closed', "9.jpg#0\tgone"]
    write(tmp_path / "results.token", "\n".join(lines))
    source = opened(tmp_path)
    assert captions(source) == {
        "flickr30k_images/1.jpg": ('" Hello " says a man .',),
        "flickr30k_images/3.jpg": ('"never closed',),
    }
    found = reasons(source)
    assert found["results.token:4"] == "there is no file 9.jpg#0"
    assert "results.token:2" in found


def test_of_equal_lists_the_shorter_name_counts(tmp_path: Path) -> None:
    save(tmp_path / "Flicker8k_Dataset" / "1.jpg")
    write(tmp_path / "Flickr8k.lemma.token.txt", "1.jpg#0\ta child wear a dress")
    write(tmp_path / "Flickr8k.token.txt", "1.jpg#0\tA child wears a dress")
    write(tmp_path / "Flickr_8k.trainImages.txt", "1.jpg\n")
    assert captions(opened(tmp_path)) == {"Flicker8k_Dataset/1.jpg": ("A child wears a dress",)}
    assert unused(tmp_path) == {"Flickr8k.lemma.token.txt": 1, "Flickr_8k.trainImages.txt": 1}


# ---- JSON


@pytest.mark.parametrize(
    "content",
    [
        [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/b.png", "text": ["two", "three"]}],
        [{"image": "./a.png", "caption": "one"}, {"image": "sub\\b.png", "caption": ["two", "three"]}],
        {"a.png": "one", "sub/b.png": ["two", "three"]},
        {"a.png": {"caption": "one"}, "sub/b.png": {"caption": ["two", "three"]}},
        {"data": [{"file_name": "a", "text": "one"}, {"file_name": "sub/b", "text": ["two", "three"]}]},
        [["a.PNG", "one"], ["sub/b.png", ["two", "three"]]],
        '{"a.png": "one", "sub/b.png": "two", "sub/b.png": "three"}',
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "sub/b.png", "text": ["two", "three"]}\n',
    ],
)
@pytest.mark.parametrize("name", ["metadata.json", "Metadata.JSON", "captions.json"])
def test_json_in_the_ways_it_is_written(tmp_path: Path, content: object, name: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "sub" / "b.png")
    write(tmp_path / name, content)
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one",), "sub/b.png": ("two", "three")}
    assert source.skipped == ()


def test_metadata_in_json_counts_with_metadata_in_other_forms(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png")
    write(tmp_path / "metadata.json", {"a.png": "one", "b.png": "three"})
    write(tmp_path / "metadata.csv", "file_name,text\na.png,two\n")
    assert captions(opened(tmp_path)) == {"a.png": ("two", "one"), "b.png": ("three",)}


def test_unrelated_metadata_json_is_ignored(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="one")
    for content in ({"license": "mine", "version": 3}, [1, 2], "{", "", {"made": {"by": "me"}}):
        write(tmp_path / "metadata.json", content)
        source = opened(tmp_path)
        assert (captions(source), source.skipped, unused(tmp_path)) == ({"a.png": ("one",)}, (), {})


@pytest.mark.parametrize("name", ["meta_cap.json", "meta_clean.json", "anything.json"])
def test_records_of_kohya(tmp_path: Path, name: str) -> None:
    for image in ("a.png", "b.webp", "c.jpg"):
        save(tmp_path / "10_cat" / image)
    content = {
        "a": {"caption": "a cat", "tags": "cat, sitting", "train_resolution": [8, 8]},
        "b.webp": {"tags": "cat, standing"},
        str(tmp_path / "10_cat" / "c.jpg"): {"caption": "a third"},
    }
    write(tmp_path / name, content)
    assert captions(opened(tmp_path)) == {
        "10_cat/a.png": ("a cat",),
        "10_cat/b.webp": ("cat, standing",),
        "10_cat/c.jpg": ("a third",),
    }
    assert captions(opened(tmp_path, caption_column="tags"))["10_cat/a.png"] == ("cat, sitting",)


# ---- names


def test_names_that_lead_to_one_file_or_to_none(tmp_path: Path) -> None:
    for name in ("one.JPG", "two.png", "three.png", "three.webp", "v1.2.png", "Four.png"):
        save(tmp_path / "data" / "images" / name)
    save(tmp_path / "outside.png")
    names = ["one.jpg", "two", "three", "v1.2", "four.png", "../../outside.png", str(tmp_path / "outside.png")]
    names += ["IMAGES/Three.PNG", "images/Two.webp", "other/two.png"]
    write(tmp_path / "data" / "captions.csv", "file_name,text\n" + "".join(f"{name},{name[:3]}\n" for name in names))
    source = opened(tmp_path / "data")
    assert captions(source) == {"images/one.JPG": ("one",), "images/two.png": ("two",), "images/v1.2.png": ("v1.",)}
    found = reasons(source)
    assert found["captions.csv:4"] == "three may be images/three.png or images/three.webp; give the whole name"
    assert found["captions.csv:6"] == "there is no file four.png; did you mean images/Four.png?"
    assert found["captions.csv:7"] == "../../outside.png is outside the folder"
    assert found["captions.csv:8"].endswith("is outside the folder")
    assert found["captions.csv:9"].endswith("; did you mean images/three.png?")
    assert found["captions.csv:10"].endswith("; did you mean images/two.png?")
    assert found["captions.csv:11"] == "there is no file other/two.png"  # another folder's image may be another one


@pytest.mark.parametrize(
    "table", ["labels/captions.csv", "captions.csv", "data/text/en/captions.csv", "data/images/captions.csv"]
)
@pytest.mark.parametrize("prefix", ["", "./", "images/", ".\\images\\"])
def test_a_table_in_any_folder(tmp_path: Path, table: str, prefix: str) -> None:
    save(tmp_path / "data" / "images" / "a.png")
    save(tmp_path / "data" / "images" / "b.png")
    write(tmp_path / table, f"file_name,text\n{prefix}a.png,one\n{prefix}b.png,two\n")
    assert captions(opened(tmp_path)) == {"data/images/a.png": ("one",), "data/images/b.png": ("two",)}


def test_names_of_files_in_many_folders(tmp_path: Path) -> None:
    for name in ("cats/a.png", "dogs/b.png", "dogs/c.png", "cats/c.png"):
        save(tmp_path / name)
    write(tmp_path / "labels.csv", "filename,label\na.png,a tabby\nb.png,a pug\nc.png,which\n")
    source = opened(tmp_path)
    assert captions(source) == {"cats/a.png": ("a tabby",), "dogs/b.png": ("a pug",)}
    assert reasons(source)["labels.csv:4"] == "c.png may be cats/c.png or dogs/c.png; give the whole name"


def test_a_part_of_a_large_set_is_found_by_its_annotations(tmp_path: Path) -> None:
    save(tmp_path / "train2017" / "000000099999.jpg")
    names = [f"{number:012d}.jpg" for number in range(98000, 100001)]
    write(tmp_path / "annotations" / "captions_train2017.json", coco(names))
    assert list(captions(opened(tmp_path))) == ["train2017/000000099999.jpg"]


@pytest.mark.parametrize("kind", ["sidecar", "json", "table", "coco", "token", "tar"])
@pytest.mark.parametrize(("on_disk", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_in_other_code_points(tmp_path: Path, kind: str, on_disk: Any, named: Any) -> None:
    image, name = unicodedata.normalize(on_disk, "grün é.png"), unicodedata.normalize(named, "grün é.png")
    stem = name.removesuffix(".png")
    if kind == "tar":
        write_tar(tmp_path / "a.tar", [(image, png()), (f"{stem}.txt", b"a caption")])
    else:
        save(tmp_path / "images" / image)
    if kind == "sidecar":
        write(tmp_path / "images" / f"{stem}.txt", "a caption")
    elif kind == "json":
        write(tmp_path / "images" / f"{stem}.json", {"caption": "a caption"})
    elif kind == "table":
        write(tmp_path / "captions.csv", f"file_name,text\n{name},a caption\n")
    elif kind == "coco":
        write(
            tmp_path / "captions.json",
            {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a caption"}]},
        )
    elif kind == "token":
        write(tmp_path / "captions.token", f"{name}#0\ta caption\n")
    source = opened(tmp_path)
    assert captions(source) == {f"a.tar/{image}" if kind == "tar" else f"images/{image}": ("a caption",)}
    assert source.skipped == ()


def test_two_spellings_of_one_name_keep_their_own_captions(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save(tmp_path / unicodedata.normalize(form, "é.png"), caption=form)
    assert set(captions(opened(tmp_path)).values()) == {("NFC",), ("NFD",)}


# ---- several sources


def test_a_table_of_two_rows_does_not_hide_39_captions(tmp_path: Path) -> None:
    for number in range(39):
        save(tmp_path / f"{number}.png", caption=f"caption {number}")
    write(tmp_path / "labels.csv", "file,label\n0.png,zero\n1.png,one\n")
    source = opened(tmp_path)
    assert len(source.samples) == 39
    assert unused(tmp_path) == {"labels.csv": 2}
    config = DataConfig(path=str(tmp_path), resolution=8)
    account = dataset_report(inspect(source, config), config)
    assert "labels.csv names 2 images and is not used: 39 have captions from sidecars" in "\n".join(account.notes)
    assert [(one["name"], one["images"]) for one in account.to_dict()["caption_sources"]] == [
        ("sidecars", 39),
        ("labels.csv", 2),
    ]
    assert "labels.csv: 2 images, not used" in report_text(account)
    assert captions(opened(tmp_path, caption_source="labels.csv")) == {"0.png": ("zero",), "1.png": ("one",)}
    with pytest.raises(ValueError, match=r'caption_source is "x".* labels\.csv; sidecars'):
        opened(tmp_path, caption_source="x")
    (tmp_path / "notes.md").write_text("0.png is a picture")
    with pytest.raises(ValueError, match=r"caption_source is .*\(tables end in \.csv"):
        opened(tmp_path, caption_source="notes.md")


@pytest.mark.parametrize("winner", ["metadata", "captions.csv", "captions.json", "sidecars", "shards"])
def test_the_source_that_captions_most_images_wins(tmp_path: Path, winner: str) -> None:
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        save(tmp_path / name)
    counts = dict.fromkeys(("metadata", "captions.csv", "captions.json", "sidecars", "shards"), 3) | {winner: 5}
    for kind in ("metadata", "captions.csv"):
        rows = "".join(f"{name},{kind}\n" for name in names[: counts[kind]])
        write(tmp_path / f"{kind.removesuffix('.csv')}.csv", f"file_name,text\n{rows}")
    write(tmp_path / "captions.json", coco(names[: counts["captions.json"]]))
    for name in names[: counts["sidecars"]]:
        write((tmp_path / name).with_suffix(".txt"), "sidecars")
    write_tar(
        tmp_path / "a.tar",
        [(f"{n}.{end}", data) for n in range(counts["shards"]) for end, data in (("png", png()), ("txt", b"x"))],
    )
    source = opened(tmp_path)
    assert len(source.samples) == 5
    assert [one.name for one in source.caption_sources if not one.reason] == ([winner] if winner != "shards" else [])
    assert unused(tmp_path) == {kind: 3 for kind in counts if kind != winner}


def test_a_shard_of_one_image_does_not_hide_folders_of_many(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "dogs" / f"{number}.png")
    write_tar(tmp_path / "a.tar", [("1.png", png()), ("1.txt", b"x")])
    with pytest.raises(ValueError, match=r"shards .* 1 image, .* 6; set data\.caption_source"):
        opened(tmp_path)
    assert len(opened(tmp_path, caption_source="folders").samples) == 6
    assert unused(tmp_path, caption_source="folders") == {"shards": 1}
    assert list(captions(opened(tmp_path, caption_source="shards"))) == ["a.tar/1.png"]


def test_numbers_are_captions_where_nothing_else_is(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    write(tmp_path / "labels.csv", "file,label\na.png,7\n")
    assert captions(opened(tmp_path)) == {"images/a.png": ("7",)}


def test_unused_unique_captions_need_attention(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"{number}.png", caption="x" if number < 3 else None)
    write(tmp_path / "extra.csv", "file,caption\n3.png,three\n4.png,four\n")
    config = DataConfig(path=str(tmp_path), resolution=8)
    account = dataset_report(inspect(open_source(config), config), config)
    [line] = account.unused_captions()
    assert line.startswith("extra.csv names 2 images (2 of them without a caption) and is not used: 3 have")
    assert line in account.needs_attention


def test_numbers_are_not_preferred_as_captions(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "cats" / f"{number}.png", caption="a cat" if number else None)
    write(tmp_path / "sizes.csv", "file,width\n" + "".join(f"cats/{number}.png,8\n" for number in range(4)))
    assert len(captions(opened(tmp_path))) == 3
    for number in range(4):
        (tmp_path / "cats" / f"{number}.txt").unlink(missing_ok=True)
    assert set(captions(opened(tmp_path)).values()) == {("cats",)}
    assert unused(tmp_path) == {"sizes.csv": 4}
    assert captions(opened(tmp_path, caption_source="sizes.csv"))["cats/0.png"] == ("8",)


# ---- nothing is invented


def sheet(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", f"<sst><si><t>{text}</t></si></sst>")


UNREAD: dict[str, object] = {
    "captions.csv": "key;value\ndogs/1.png;a dog in the snow\n",
    "captions.yaml": "dogs/1.png: a dog in the snow\n",
    "captions.xml": "<image file='1.png'>a dog in the snow</image>",
    "captions.txt": "1.png a dog in the snow\n",
    "llava.json": [{"image": "dogs/1.png", "conversations": [{"from": "gpt", "value": "a dog in the snow"}]}],
    "broken.json": '[{"file_name": "dogs/1.png", "text": "a dog in the snow"',
    "cased.csv": "file_name,text\nDogs/1.PNG,a dog in the snow\n",
    "moved.csv": "file_name,text\nold.png,a dog in the snow\n",
    "columns.csv": "file_name,english,german\ndogs/1.png,a dog in the snow,ein Hund im Schnee\n",
    "wide.txt": "1.png a dog in the snow\n",
    "captions/1.txt": "a dog in the snow",
    "dogs/1.captions": "a dog in the snow",
    "dogs/1.md": "a dog in the snow",
    "list.dat": "1.png\ta dog in the snow\n",
    "dogs/1.yaml": "caption: a dog in the snow",
    "dogs/1.json": {"alt_text": "a dog in the snow"},
}


@pytest.mark.parametrize("name", UNREAD)
def test_no_folder_captions_beside_a_possible_caption_file(tmp_path: Path, name: str) -> None:
    save(tmp_path / "dogs" / "1.png")
    write(tmp_path / name, UNREAD[name], "utf-16" if name == "wide.txt" else "utf-8")
    with pytest.raises(ValueError, match="caption") as caught:
        opened(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert captions(opened(tmp_path, caption_source="folders")) == {"dogs/1.png": ("dogs",)}
    # Beside captions that are read it is only named.
    (tmp_path / "dogs" / "1.txt").write_text("a dog")
    assert captions(opened(tmp_path)) == {"dogs/1.png": ("a dog",)}
    if name != "dogs/1.json":  # JSON beside an image is a source where there is no text
        assert name in unused(tmp_path)


def test_names_of_images_are_found_in_any_text(tmp_path: Path) -> None:
    names = ["IMG (1).png", "my dog.png", "&.png", "a'b.png", "[1].png", "größe.png", "(.png"]
    for name in names:
        save(tmp_path / "dogs" / name)
    write(tmp_path / "captions.yaml", "".join(f"- {name}: a dog in the snow\n" for name in names))
    with pytest.raises(NoCaptionsError) as caught:
        opened(tmp_path)
    assert caught.value.source.caption_sources[0].name == "captions.yaml"
    assert caught.value.source.caption_sources[0].images >= 5


def test_used_sidecar_json_is_not_reported(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    write(tmp_path / "a.json", {"caption": "a cat"})
    save(tmp_path / "b.png", caption="from text")
    write(tmp_path / "b.json", {"caption": "the same from img2dataset"})
    assert captions(opened(tmp_path)) == {"a.png": ("a cat",), "b.png": ("from text",)}
    assert unused(tmp_path) == {}


def test_a_sheet_that_cannot_be_opened_may_have_captions(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "1.png")
    (tmp_path / "captions.xlsx").write_bytes(b"PK encrypted")
    with pytest.raises(NoCaptionsError, match=r"captions\.xlsx .*cannot be opened"):
        opened(tmp_path)


def test_a_sheet_of_excel_is_named(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "1.png")
    sheet(tmp_path / "captions.xlsx", "dogs/1.png</t></si><si><t>a dog")
    with pytest.raises(NoCaptionsError, match=r"captions\.xlsx .*1 image.* CSV"):
        opened(tmp_path)
    source = opened(tmp_path, caption_source="folders")
    assert [(one.name, one.images) for one in source.caption_sources] == [("captions.xlsx", 1), ("folders", 1)]


def test_lists_and_documents_are_no_captions(tmp_path: Path) -> None:
    save(tmp_path / "big dogs" / "1.png")
    save(tmp_path / "big dogs" / "2.png")
    write(tmp_path / "train.txt", "big dogs/1.png\nbig dogs/2.png\n")
    write(tmp_path / "images.txt", "1 big dogs/1.png\n2 big dogs/2.png\n")
    write(tmp_path / "README.md", "![a dog in the snow](big dogs/1.png)")
    write(tmp_path / "classes.txt", "1.png is a dog in the snow")
    write(tmp_path / "notes.txt", "taken in the snow")
    write(tmp_path / "package.json", {"name": "dogs", "description": "all my dogs in the snow"})
    assert set(captions(opened(tmp_path)).values()) == {("big dogs",)}
    assert unused(tmp_path) == {"train.txt": 2, "images.txt": 2}


def test_text_files_in_another_folder_are_reported_together(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "images" / f"{number}.png")
        write(tmp_path / "captions" / f"{number}.txt", "a dog in the snow")
    with pytest.raises(ValueError, match=r"captions/\*\.txt: "):
        opened(tmp_path)


def test_unreadable_sidecars_are_not_replaced_by_folder_names(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "1.png")
    (tmp_path / "dogs" / "1.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.caption_source to sidecars"):
        opened(tmp_path)


def test_endless_text_is_fast(tmp_path: Path) -> None:
    """Each of these once took the square of its length: hours."""
    save(tmp_path / "dogs" / "1.png")
    for name, text in (("a.yaml", "a" * 2**20), ("b.txt", "a." * 2**19), ("c.json", '"' + "a " * 2**19)):
        write(tmp_path / name, f"{text}\n1.png\n")
    assert captions(opened(tmp_path, caption_source="folders")) == {"dogs/1.png": ("dogs",)}


def test_tables_within_a_tar_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", png()), ("1.txt", b"x"), ("metadata.csv", b"file_name,text\n1.png,x")])
    assert reasons(opened(tmp_path))["a.tar/metadata.csv"].startswith("a table within a tar, which is not read")


# ---- rows


def test_the_first_line_that_tells_excel_the_delimiter(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for line, mark in (("sep=;", ";"), ('"sep=;"', ";"), ("SEP=|", "|"), ("sep=,", ","), ("sep=\t", "\t")):
        write(
            tmp_path / "metadata.csv",
            f'{line}\r\nfile_name{mark}text{mark}score\r\na.png{mark}a cat{mark}"0,5"\r\n',
            "utf-8-sig",
        )
        assert captions(opened(tmp_path)) == {"a.png": ("a cat",)}
    write(tmp_path / "metadata.csv", "sep=;\nfile_name;text;score\na.png;a cat, sitting;0,5\ngone.png;x;1,5\n")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("a cat, sitting",)}
    assert reasons(source) == {"metadata.csv:4": "there is no file gone.png"}


def test_a_quote_that_is_never_closed_swallows_no_row(tmp_path: Path) -> None:
    for name in "abcde":
        save(tmp_path / f"{name}.png")
    rows = [
        "file_name,text",
        'a.png,"never closed',
        "b.png,fine",
        'c.png,closes"',
        'd.png,"two\ne.png\nlines, of e.png"',
        "e.png,last",
    ]
    write(tmp_path / "metadata.csv", "\n".join(rows))
    source = opened(tmp_path)
    assert captions(source) == {"b.png": ("fine",), "d.png": ("two\ne.png\nlines, of e.png",), "e.png": ("last",)}
    found = reasons(source)
    assert found["metadata.csv:2"] == "a quote that opens here is not closed before line 3; close it"
    assert found["metadata.csv:4"] == "a quote that nothing opens; line 2 lacks one"
    config = DataConfig(path=str(tmp_path), resolution=8)
    inspection = inspect(source, config)
    assert inspection.total == len(inspection.used) + len(inspection.skipped) + len(inspection.duplicates)


@pytest.mark.parametrize("top", ["/home/somebody/sets/", "D:\\sets\\"])
def test_absolute_paths_of_another_machine_match_by_their_ends(tmp_path: Path, top: str) -> None:
    slash, expected = top[-1], {}
    for folder in ("10_dog", "20_cat"):
        for i in range(3):
            save(tmp_path / folder / f"{i}.png")
            expected[f"{folder}/{i}.png"] = (f"a {folder} of kind {i}",)
    records = {top + name.replace("/", slash): {"caption": texts[0]} for name, texts in expected.items()}
    write(tmp_path / "meta_cap.json", json.dumps(records))
    assert captions(opened(tmp_path)) == expected


def test_annotations_apply_to_the_folder_they_are_named_after(tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "val")):
        for place, name in enumerate(("1.png", "2.png")):
            save(tmp_path / folder / name, (40 * number, 90 * place, 7))
        write(tmp_path / "annotations" / f"captions_{folder}2017.json", coco(["1.png", "2.png"], f"of {folder}"))
    found = captions(opened(tmp_path))
    assert found == {f"{folder}/{i + 1}.png": (f"of {folder} {7 * i}",) for folder in ("train", "val") for i in (0, 1)}


def test_annotations_without_captions_are_said_to_have_none(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png", "red")
    boxes = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "bbox": [0, 0, 4, 4], "category_id": 3}],
    }
    write(tmp_path / "train" / "_annotations.coco.json", boxes)
    with pytest.raises(NoCaptionsError) as caught:
        opened(tmp_path)
    (source, _) = caught.value.source.caption_sources
    assert source.reason == "its annotations have no captions"
    boxes["images"][0]["caption"] = "a red square"
    write(tmp_path / "train" / "_annotations.coco.json", boxes)
    assert captions(opened(tmp_path)) == {"train/1.png": ("a red square",)}


def test_texts_named_after_images_plus_a_word_are_reported(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "cats" / f"{number}.png", (60 * number, 0, 0))
        write(tmp_path / "cats" / f"{number}_caption.txt", "an old cat")
    with pytest.raises(NoCaptionsError, match=r"cats/\*\.txt .*3 images"):
        opened(tmp_path)


def test_tags_are_words(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "1.png", "red")
    write(tmp_path / "cats" / "1.tags", "1girl, solo, smile")
    with pytest.raises(NoCaptionsError, match=r"cats/1\.tags .*1 image"):
        opened(tmp_path)


def test_boxes_beside_images_are_no_captions(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "1.png", "red")
    write(tmp_path / "cats" / "1.txt", "0 0.5 0.5 0.25 0.125\n12 0.3 0.2 0.1 1.0\n")
    assert captions(opened(tmp_path)) == {"cats/1.png": ("cats",)}
    write(tmp_path / "cats" / "1.txt", "0 0.5 0.5 0.25 0.125\na cat")
    assert captions(opened(tmp_path)) == {"cats/1.png": ("0 0.5 0.5 0.25 0.125", "a cat")}
