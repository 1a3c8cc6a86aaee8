import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.image_files import captions, opened, png, reasons, save


def write_lines(path: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")


def test_several_captions_an_image_and_folders_below(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="from the text file")
    save(tmp_path / "sub" / "b.png")
    save(tmp_path / "sub" / "c.png")
    save(tmp_path / "other.png", caption="from the text file")
    write_lines(
        tmp_path / "metadata.jsonl",
        "\ufeff" + json.dumps({"file_name": "sub/b.png", "text": " ein Bär ", "license": "mine"}),
        "",
        {"file_name": "./a.png", "text": "one"},
        {"file_name": "a.png", "text": ["two", "three"]},
        {"file_name": "a.png", "text": "one"},
    )
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,four\n")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,second\nc.png,third\n../a.png,five\n")
    source = opened(tmp_path)
    assert captions(source) == {
        "a.png": ("four", "one", "two", "three", "five"),
        "sub/b.png": ("ein Bär", "second"),
        "sub/c.png": ("third",),
    }
    assert reasons(source) == {"other.png": "no caption: no metadata file names it"}
    assert [sample.group for sample in source.samples] == ["a.png", "sub/b.png", "sub/c.png"]


def test_each_bad_line_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save(folder / "a.png")
    save(folder / "Cased.PNG")
    save(folder / "mute.png")
    (folder / "b.heic").touch()
    save(tmp_path / "outside.png")
    lines: dict[int, tuple[object, str]] = {
        2: ('{"file_name": "a.png", "text": ', "not JSON"),
        3: ('["a.png", "text"]', "not a JSON object"),
        4: ({"text": "no name"}, "file_name is missing"),
        5: ({"file_name": "a.png", "text": 3}, "the caption is not a text but a number"),
        6: ({"file_name": "mute.png", "text": " "}, "empty caption"),
        7: ({"file_name": "../outside.png", "text": "x"}, "../outside.png is outside the folder"),
        8: ({"file_name": str(tmp_path / "outside.png"), "text": "x"}, "outside the folder"),
        9: ({"file_name": "sub/../../outside.png", "text": "x"}, "outside the folder"),
        10: ({"file_name": "gone.png", "text": "x"}, "there is no file gone.png"),
        11: ('{"file_name": "a.png", "text": "half a pair: \\ud83d"}', "lone surrogate"),
        12: ('{"file_name": "a.png", "text": NaN}', "no caption"),
        13: ({"file_name": "a.png", "text": None}, "no caption"),
        14: ({"file_name": "a.png"}, "no caption"),
        15: ({"file_name": "cased.png", "text": "x"}, "there is no file cased.png; did you mean Cased.PNG?"),
        16: ({"file_name": "a.jpg", "text": "x"}, "there is no file a.jpg; did you mean a.png?"),
        17: ({"file_name": "https://example.org/a.png", "text": "x"}, "URLs are not downloaded"),
        18: ({"file_name": "b.heic", "text": "x"}, ".heic is not read; convert it to PNG or JPEG"),
        19: ({"file_name": "C:\\z.png", "text": "x"}, "outside the folder"),
        20: ({"file_name": "..\\outside.png", "text": "x"}, "outside the folder"),
        21: ({"file_name": "a\0.png", "text": "x"}, "there is no file a\\x00.png"),
        22: ({"file_name": 7, "text": "x"}, "file_name is not a text"),
        23: ({"file_name": "a.png", "text": ["good too", ""]}, "empty caption (caption 2 of 2)"),
        24: ({"file_name": "a.png", "text": []}, "no caption"),
    }
    write_lines(
        folder / "metadata.jsonl", {"file_name": "a.png", "text": "good"}, *(line for line, _ in lines.values())
    )
    source = opened(folder)
    assert captions(source) == {"a.png": ("good", "good too")}
    found = reasons(source)
    # The image of line 6 and the file of line 18 are accounted for by their rows.
    assert found.pop("Cased.PNG") == "no caption: no metadata file names it"
    assert set(found) == {f"metadata.jsonl:{number}" for number in lines}
    for number, (_, reason) in lines.items():
        assert reason in found[f"metadata.jsonl:{number}"], number


def test_names_in_full_may_go_around_a_link_to_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "real" / "a.png")
    save(tmp_path / "real" / "b.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    names = [str(tmp_path / "real" / "a.png"), str(tmp_path / "link" / "b.png")]
    write_lines(tmp_path / "real" / "metadata.jsonl", *({"file_name": name, "text": "x"} for name in names))
    assert set(captions(opened(tmp_path / "link"))) == {"a.png", "b.png"}


def test_names_as_other_systems_write_them(tmp_path: Path) -> None:
    save(tmp_path / "sub" / "a.png")
    save(tmp_path / "b\\c.png")
    save(tmp_path / "d.png")
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "sub\\a.png", "text": "from Windows"},
        {"file_name": "b\\c.png", "text": "a backslash in the name"},
        {"file_name": str(tmp_path / "d.png"), "text": "in full"},
    )
    assert captions(opened(tmp_path)) == {
        "sub/a.png": ("from Windows",),
        "b\\c.png": ("a backslash in the name",),
        "d.png": ("in full",),
    }


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_in_the_ways_it_is_written(tmp_path: Path, delimiter: str, encoding: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    rows = [
        ["", "File Name", "Caption", "n"],
        ["0", "a.png", '"ein, ""großer""; \n Bär"', "1"],
        ["1", "b.png", "7", "2"],
    ]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    assert captions(opened(tmp_path)) == {"a.png": ('ein, "großer"; \n Bär',), "b.png": ("7",)}


def test_each_bad_row_of_csv_is_named_and_costs_no_other(tmp_path: Path) -> None:
    for name in "abcde":
        save(tmp_path / f"{name}.png")
    rows = [
        "file_name,text",
        'a.png,"never closed',
        "b.png,fine",
        "",
        "c.png,a cat, sitting",
        "d.png",
        "d.png,NaN",
        'e.png,"two\nlines"',
        "gone.png,x",
        "e.png,gr\udcfcn",
        'd.png," \n "',
    ]
    (tmp_path / "metadata.csv").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    source = opened(tmp_path)
    assert captions(source) == {"b.png": ("fine",), "e.png": ("two\nlines",)}
    found = reasons(source)
    assert found.pop("metadata.csv:2").startswith("not CSV: ")
    assert found == {
        "a.png": "no caption: no metadata file names it",
        "c.png": "no caption: no metadata file names it",
        "metadata.csv:5": "3 cells for 2 columns; put quotes around a text with delimiters",
        "metadata.csv:6": "no caption",
        "metadata.csv:7": "no caption",
        "metadata.csv:10": "there is no file gone.png",
        "metadata.csv:11": "the caption is not UTF-8 text; save the file as UTF-8",
        "metadata.csv:12": "empty caption",
    }


def test_a_list_spelled_in_a_cell_is_a_list_of_captions(tmp_path: Path) -> None:
    cells = ['["a cat", "a pet"]', """["it's", 'a dog']""", "[v], a tag [x]", "['open", '["a", 3]', "[sic]"]
    for number in range(len(cells)):
        save(tmp_path / f"{number}.png")
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "text"], *([f"{n}.png", cell] for n, cell in enumerate(cells))])
    found = captions(opened(tmp_path))
    assert found["0.png"] == ("a cat", "a pet")
    assert found["1.png"] == ("it's", "a dog")
    assert [found[f"{number}.png"] for number in range(2, 6)] == [(cell,) for cell in cells[2:]]


def test_two_columns_of_captions_with_one_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na.png,one,two\n")
    with pytest.raises(ValueError, match=r'metadata\.csv .*2 columns "text"'):
        opened(tmp_path)


def test_metadata_in_parquet(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png")
    table = {"file_name": ["a.png", "b.png", None], "text": [["one", "two"], None, ["x"]], "width": [1, 2, 3]}
    parquet.write_table(pa.table(table), tmp_path / "metadata.parquet")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one", "two")}
    assert reasons(source) == {"metadata.parquet:2": "no caption", "metadata.parquet:3": "file_name is missing"}


def test_metadata_parquet_may_contain_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    table = pa.table({"image": [png("blue")], "text": ["inside"]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert list(captions(opened(tmp_path)).values()) == [("inside",)]
    parquet.write_table(pa.table({"nothing": ["a"], "text": ["b"]}), tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"metadata\.parquet .*nothing, text"):
        opened(tmp_path)


def columns_table(folder: Path, head: str, row: str) -> Path:
    save(folder / "a.png")
    (folder / "metadata.csv").write_text(f"{head}\n{row}\n")
    return folder


@pytest.mark.parametrize(
    ("head", "row", "given"),
    [
        ("text,file_name", "yes,a.png", {}),
        ("IMAGE,Prompt", "a.png,yes", {}),
        ("image_path,title,caption", "a.png,no,yes", {}),
        ("filename,label", "a.png,yes", {}),
        (",filename,label", "0,a.png,yes", {}),
        ("file_name,text,alt", "a.png,no,yes", {"caption_column": "alt"}),
        ("file_name,photo,text", "no.png,a.png,yes", {"image_column": "photo"}),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, head: str, row: str, given: dict[str, Any]) -> None:
    assert captions(opened(columns_table(tmp_path, head, row), **given)) == {"a.png": ("yes",)}


@pytest.mark.parametrize(
    ("head", "given", "message"),
    [
        (
            "file_name,x,y",
            {},
            r"metadata\.csv: .* file_name, x, y; set data\.caption_column",
        ),
        ("a.png,b,c", {}, r"a\.png, b, c.*data\.image_column"),
        ("file_name,text,z", {"caption_column": "alt"}, r'caption_column is "alt", but .* it has file_name, text, z'),
        ("file_name,text,z", {"image_column": "img"}, r'image_column is "img", but .* it has file_name, text, z'),
    ],
)
def test_columns_that_cannot_be_told_are_listed(tmp_path: Path, head: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(columns_table(tmp_path, head, "a.png,x,y"), **given)


def test_a_broken_metadata_file_does_not_spoil_the_others(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    for name in ("empty.csv", "words.jsonl", "cut.parquet"):
        kind = name.split(".")[1]
        (tmp_path / name.split(".")[0]).mkdir()
        (tmp_path / name.split(".")[0] / f"metadata.{kind}").write_text("" if kind == "csv" else "no table")
    source = opened(tmp_path)
    assert captions(source) == {"a/1.png": ("one",)}
    found = reasons(source)
    assert found["empty/metadata.csv"] == "the file is empty"
    assert found["words/metadata.jsonl"] == "no line is a JSON object"
    assert found["cut/metadata.parquet"].startswith("not parquet: ")


def test_a_table_of_another_name_whose_rows_name_images(tmp_path: Path) -> None:
    save(tmp_path / "Images" / "a.png", caption="passed over")
    save(tmp_path / "Images" / "b.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,one\na.png,two\ngone.png,x\n")
    (tmp_path / "sizes.csv").write_text("image,width\nA,3\n")
    (tmp_path / "prices.tsv").write_text("name\tprice\nx\t3\n")
    source = opened(tmp_path)
    assert captions(source) == {"Images/a.png": ("one", "two")}
    assert reasons(source) == {
        "Images/b.png": "no caption: captions.csv does not name it",
        "captions.csv:4": "there is no file gone.png",
    }
    # A table that is given as the path: only its rows count.
    source = opened(tmp_path / "captions.csv")
    assert captions(source) == {"Images/a.png": ("one", "two")}
    assert list(reasons(source)) == ["captions.csv:4"]
    with pytest.raises(ValueError, match=r"prices\.tsv"):
        opened(tmp_path / "prices.tsv")
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "Images/b.png", "text": "three"}))
    with pytest.raises(ValueError, match=r"train\.jsonl; captions\.csv; .*data\.caption_source"):
        opened(tmp_path)
    assert captions(opened(tmp_path, caption_source="captions.csv")) == {"Images/a.png": ("one", "two")}
    (tmp_path / "captions.csv").unlink()
    assert captions(opened(tmp_path)) == {"Images/b.png": ("three",)}


def test_img2dataset_files_are_not_metadata(tmp_path: Path) -> None:
    save(tmp_path / "00000" / "000000001.png", caption="a caption")
    table = {"key": ["000000001"], "url": ["http://x/1.png"], "caption": ["a caption"], "sha256": ["ab"]}
    parquet.write_table(pa.table(table), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 1}')
    source = opened(tmp_path)
    assert (captions(source), source.skipped) == ({"00000/000000001.png": ("a caption",)}, ())
