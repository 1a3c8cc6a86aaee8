"""What is written is on the disk before it gets its name, and its name is on the disk after that."""

import ctypes
import errno
import os
import stat
from pathlib import Path

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
        if error is not None:
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


def counted_to(calls, kill):
    """Ends this process at the `kill`-th of these calls of the system, before it is made."""
    made = [0]

    def wrapped(call):
        def counting(*arguments, **settings):
            made[0] += 1
            if made[0] > kill:
                os._exit(9)
            return call(*arguments, **settings)

        return counting

    for name in calls:
        setattr(os, name, wrapped(getattr(os, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")
@pytest.mark.parametrize("swaps", [True, False])
def test_a_process_that_is_killed_at_any_call_leaves_the_old_folder_or_the_new_one_and_what_stays(
    swaps, tmp_path, monkeypatch
):
    if not swaps:  # as on systems that cannot
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    calls = ("mkdir", "link", "symlink", "rename", "replace", "unlink", "rmdir", "chmod")
    old, kept = {"model": "old", "unet/weights": "old"}, {"README": "mine", "unet/notes/a": "mine"}

    def write(folder, files):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def read(folder):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}

    seen = set()
    for kill in range(200):
        run = tmp_path / str(kill)
        write(run / "f", old | kept)
        child = os.fork()
        if child == 0:
            counted_to(calls, kill)
            with disk.new_folder(run / "f", lambda name: name in old) as aside:
                write(aside, {"model": "new", "unet/weights": "new"})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if swaps:
            assert (run / "f").is_dir()
        disk.remove_partial(run)
        found = read(run / "f")
        assert {name: found[name] for name in kept} == kept, kill
        assert found["model"] == found["unet/weights"]
        assert len(found) == 4
        assert os.listdir(run) == ["f"]
        seen.add(found["model"])
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert seen == {"old", "new"}
    assert kill > 10


def test_what_comes_while_a_folder_is_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    library = ctypes.CDLL

    def late(*arguments, **settings):  # is opened to swap the folders
        (tmp_path / "f" / "late").write_text("mine")
        return library(*arguments, **settings)

    monkeypatch.setattr(ctypes, "CDLL", late)
    with disk.new_folder(tmp_path / "f", lambda name: False) as aside:
        (aside / "new").write_text("1")
    assert sorted(os.listdir(tmp_path / "f")) == ["late", "new"]


def test_what_stays_is_synced_before_the_new_folder_is_named(events, tmp_path):
    (tmp_path / "f" / "notes").mkdir(parents=True)
    (tmp_path / "f" / "notes" / "a").write_text("mine")
    (tmp_path / "f" / "link").symlink_to("notes")
    events.clear()
    with disk.new_folder(tmp_path / "f", lambda name: False) as aside:
        (aside / "new").write_text("1")
    named = next(i for i, (what, _) in enumerate(events) if what == "name")
    assert ("sync", (tmp_path / "f" / "notes").stat().st_ino) in events[:named]
    assert os.readlink(tmp_path / "f" / "link") == "notes"


def test_where_there_are_no_hard_links_what_stays_is_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("x")
    with disk.new_folder(tmp_path / "f", lambda name: False) as aside:
        (aside / "new").write_text("1")
    assert (tmp_path / "f" / "mine").read_text() == "x"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_of_another_file_system_is_named_and_nothing_changes(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "a mount point")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("x")
    with pytest.raises(ValueError, match=r"f/mine is on a file system of its own"):
        write_half(disk.new_folder(tmp_path / "f", lambda name: False), "new", None)
    assert os.listdir(tmp_path / "f") == ["mine"]
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "f")  # root may write anywhere
    with pytest.raises(ValueError, match="f is read-only"):
        disk.writable_folder(tmp_path / "f")
    with pytest.raises(ValueError, match="is a mount point"):
        disk.writable_folder("/")


def test_a_folder_that_is_private_or_shared_with_a_group_stays_so(tmp_path):
    (tmp_path / "f" / "unet").mkdir(parents=True)
    (tmp_path / "f").chmod(0o2770)
    (tmp_path / "f" / "unet").chmod(0o700)
    with disk.new_folder(tmp_path / "f") as aside:
        (aside / "unet").mkdir()
        (aside / "vae").mkdir()
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o2770
    assert stat.S_IMODE((tmp_path / "f" / "unet").stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_no_files_to_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            disk.check_regular(path)
        disk.check_not_pointer(path)  # does not wait
    with pytest.raises(FileNotFoundError):
        disk.check_regular(tmp_path / "none")
