import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from tests.data.image_files import captions, color, opened, png, reasons, save


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_of_images_with_their_captions(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "00000.tar",
        [
            ("000.jpg", png("blue")),
            ("000.txt", b"one\ntwo"),
            ("000.json", b'{"caption": "not this"}'),
            ("./sub/photo.v2.PNG", png("lime")),
            ("001.webp", png("red")),
            ("sub/photo.v2.caption", "ein Bär".encode()),
            ("001.json", json.dumps({"url": "x", "caption": ["three", "four"]}).encode()),
            ("001.cls", b"3"),
        ],
    )
    write_tar(tmp_path / "more" / "00001.tar", [("000.png", png("red")), ("000.txt", b"five")])
    source = opened(tmp_path)
    assert captions(source) == {
        "00000.tar/000.jpg": ("one", "two"),
        "00000.tar/001.webp": ("three", "four"),
        "00000.tar/sub/photo.v2.png": ("ein Bär",),
        "more/00001.tar/000.png": ("five",),
    }
    assert source.skipped == ()
    assert source.samples[0].group == "00000.tar/000"
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert (color(again, "00000.tar/000.jpg"), color(again, "00000.tar/sub/photo.v2.png")) == (
        (0, 0, 255),
        (0, 255, 0),
    )
    assert source.samples[0].read() == png("blue")
    alone = opened(tmp_path / "more" / "00001.tar")
    assert captions(alone) == {"00001.tar/000.png": ("five",)}


def test_members_that_make_no_sample_are_named(tmp_path: Path) -> None:
    members = [
        ("good.png", png()),
        ("good.txt", b"good"),
        ("good.caption", b" "),
        ("mute.png", png()),
        ("blank.png", png()),
        ("blank.txt", b" "),
        ("latin.png", png()),
        ("latin.txt", "grün".encode("latin-1")),
        ("alone.txt", b"no image"),
        ("phone.heic", b"heic"),
        ("phone.txt", b"its image is named already"),
        ("twice.png", png("red")),
        ("twice.txt", b"twice"),
        ("twice.png", png("blue")),
        (".hidden.png", png()),
        ("big.png", png()),
        ("big.txt", b"a" * (2**20 + 5)),
        ("boxes.png", png()),
        ("boxes.json", b'{"boxes": []}'),
    ]
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = opened(tmp_path)
    assert captions(source) == {"a.tar/good.png": ("good",), "a.tar/twice.png": ("twice",)}
    assert color(source, "a.tar/twice.png") == (0, 0, 255)
    found = reasons(source)
    assert found == {
        "a.tar/alone": "a caption without an image",
        "a.tar/big.png": ".txt is longer than 1 MiB (1.0 MiB), the most that a caption file may have",
        "a.tar/blank.png": "empty caption",
        "a.tar/boxes.png": "no caption",
        "a.tar/good": "empty caption; its other captions count",
        "a.tar/latin.png": ".txt is not UTF-8 text",
        "a.tar/link.png": "a link or a sparse file within the tar; pack it as a plain file",
        "a.tar/mute.png": "no caption",
        "a.tar/phone.heic": ".heic is not read; convert it to PNG or JPEG",
        "a.tar/twice.png": "twice in the tar; the last one is used",
    }


def test_what_can_be_read_of_a_truncated_shard_is_used(tmp_path: Path) -> None:
    noise = bytes(range(256)) * 16
    write_tar(tmp_path / "a.tar", [("0.txt", b"zero"), ("0.png", png()), ("1.txt", b"one"), ("1.png", noise)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(noise) + 100])
    for name, content in (("empty", b""), ("words", b"not a tar" * 100), ("packed", gzip.compress(whole))):
        (tmp_path / f"{name}.tar").write_bytes(content)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole))
    source = opened(tmp_path)
    assert captions(source) == {"a.tar/0.png": ("zero",)}
    found = reasons(source)
    assert found.pop("a.tar/1.png") == "cut off at the end of the tar"
    assert found.pop("a.tar").startswith("cut off or broken after 4 members: ")
    assert found.pop("b.tar.gz") == (".tar.gz is an archive without random access; unpack it (only .tar is read)")
    for name in ("empty", "words", "packed"):
        assert found.pop(f"{name}.tar").startswith("not an uncompressed tar file: ")
    assert not found
    (tmp_path / "a.tar").write_bytes(whole[:1550])
    with pytest.raises(OSError, match="byte"):
        source.samples[0].read()
    with pytest.raises(ValueError, match=r"b\.tar\.gz .*unpack it"):
        opened(tmp_path / "b.tar.gz")


def test_the_split_chooses_among_shards(tmp_path: Path) -> None:
    for split in ("train-00", "val-00", "test_00"):
        write_tar(tmp_path / f"{split}.tar", [("0.png", png()), ("0.txt", split.encode())])
    save(tmp_path / "preview.png")
    source = opened(tmp_path)
    assert source.name == f"{tmp_path} (split train)"
    assert captions(source) == {"train-00.tar/0.png": ("train-00",)}
    assert reasons(source) == {"preview.png": "no caption: the shards beside it count alone"}
    assert captions(opened(tmp_path, split="validation")) == {"val-00.tar/0.png": ("val-00",)}
    with pytest.raises(ValueError, match=r'split "all".*test, train, validation.*data\.split'):
        opened(tmp_path, split="all")
