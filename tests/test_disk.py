"""What is written is on the disk before it gets its name, and its name is on the disk after that."""

import os

import pytest

from ldm import disk


@pytest.fixture
def events(monkeypatch):
    """(what, inode or name) of every sync and rename, in order."""
    seen, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def synced(descriptor):
        seen.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def named(call):
        def wrapped(source, target):
            seen.append(("name", os.path.basename(target)))
            call(source, target)

        return wrapped

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))
    return seen


def test_a_file_is_synced_named_and_its_folder_synced(events, tmp_path):
    disk.write_text(tmp_path / "a.json", "{}")
    file, folder = (tmp_path / "a.json").stat().st_ino, tmp_path.stat().st_ino
    assert events == [("sync", file), ("name", "a.json"), ("sync", folder)]


def test_all_of_a_folder_is_synced_before_it_is_named(events, tmp_path):
    with disk.new_folder(tmp_path / "new" / "model") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(b"1")
        disk.write_text(folder / "index.json", "{}")
    inside = {path.stat().st_ino for path in (tmp_path / "new" / "model").rglob("*")}
    named = events.index(("name", "model"))
    assert {inode for what, inode in events[:named] if what == "sync"} >= inside
    assert events[0] == ("sync", tmp_path.stat().st_ino)  # that of the folder around it, which is new
    assert events[named + 1 :] == [("sync", (tmp_path / "new").stat().st_ino)]


def write_half(opened, name, error):
    with opened as aside:
        (aside / name if name else aside).write_text("half")
        raise error


def test_what_fails_leaves_what_stood_there(tmp_path):
    disk.write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="no"):
        write_half(disk.new_file(tmp_path / "a"), "", OSError("no"))
    with disk.new_folder(tmp_path / "b") as folder:
        (folder / "c").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(disk.new_folder(tmp_path / "b"), "c", KeyboardInterrupt())
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
