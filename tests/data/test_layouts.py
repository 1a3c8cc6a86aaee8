import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.image_files import captions, opened, png, reasons, save
from tests.data.test_tars import write_tar


def put_parquet(folder: Path) -> None:
    table = {"image": [{"bytes": png(), "path": "row.png"}], "text": ["from parquet"]}
    parquet.write_table(pa.table(table), folder / "a.parquet")


def test_each_layout_stands_behind_those_before_it(tmp_path: Path) -> None:
    """Layouts are put into one folder from the last to the first: each new one takes over, and says what it drops."""
    save(tmp_path / "dogs" / "1.png")
    assert captions(opened(tmp_path)) == {"dogs/1.png": ("dogs",)}
    put_parquet(tmp_path)
    source = opened(tmp_path)
    assert captions(source) == {"row.png": ("from parquet",)}
    assert reasons(source) == {"dogs/1.png": "no caption: the shards beside it count alone"}
    write_tar(tmp_path / "b.tar", [("0.png", png()), ("0.txt", b"from a tar")])
    source = opened(tmp_path)
    assert captions(source) == {"b.tar/0.png": ("from a tar",)}
    assert reasons(source) == {
        "a.parquet": "ignored: the folder is read by shards",
        "dogs/1.png": "no caption: the shards beside it count alone",
    }
    # Who names a column of images means the table.
    assert captions(opened(tmp_path, image_column="image")) == {"row.png": ("from parquet",)}
    save(tmp_path / "cats" / "2.png", caption="from a text file")
    source = opened(tmp_path)
    assert captions(source) == {"cats/2.png": ("from a text file",)}
    assert reasons(source) == {
        "a.parquet": "ignored: the folder is read by captions beside images",
        "b.tar": "ignored: the folder is read by captions beside images",
        "dogs/1.png": "no caption",
    }
    (tmp_path / "names.jsonl").write_text(json.dumps({"file": "dogs/1.png", "caption": "from a table"}))
    source = opened(tmp_path)
    assert captions(source) == {"dogs/1.png": ("from a table",)}
    assert reasons(source)["cats/2.png"] == "no caption: names.jsonl does not name it"
    (tmp_path / "metadata.csv").write_text("file_name,text\ncats/2.png,from metadata\n")
    source = opened(tmp_path)
    assert captions(source) == {"cats/2.png": ("from metadata",)}
    assert reasons(source) == {
        "a.parquet": "ignored: the folder is read by metadata",
        "b.tar": "ignored: the folder is read by metadata",
        "dogs/1.png": "no caption: no metadata file names it",
    }


def test_a_broken_shard_does_not_decide_what_a_folder_is(tmp_path: Path) -> None:
    save(tmp_path / "dogs" / "1.png")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = opened(tmp_path)
    assert captions(source) == {"dogs/1.png": ("dogs",)}
    assert reasons(source)["a.parquet"].startswith("not a .parquet file that can be read: ")


def test_keys_that_a_layout_does_not_have_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", caption="a")
    with pytest.raises(ValueError, match=r'data\.image_column is "img"'):
        opened(tmp_path, image_column="img")
    with pytest.raises(ValueError, match=r'data\.subset is "fr"'):
        opened(tmp_path, subset="fr")
    with pytest.raises(ValueError, match=r'data\.split is "test"'):
        opened(tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.zip", r"a\.zip is a file; \.zip is an archive"),
        ("a.png", r"a\.png is a file; give the folder"),
        ("a.mov", r"a\.mov is a file; \.mov is a video"),
        ("a.csv", r"a\.csv"),
        ("a.tar", r"a\.tar \(a\.tar: .*\)"),
        ("a.arrow", r"a\.arrow: "),
    ],
)
def test_error_of_a_file_that_is_no_data_set(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_relative_path_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine" / "a.png", caption="a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine", "~/mine"):
        source = opened(Path(path))
        monkeypatch.chdir("/")
        assert source.samples[0].load().size == (8, 6)  # wherever the process has gone since
        monkeypatch.chdir(tmp_path)
