"""Rows on disk: what comes back, what damage costs, who may write at once, and what is said where none can."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ldm.data.cache import STALE_SECONDS, RowCache

ROOT = Path(__file__).parents[2]


def key(i):
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def keys(*numbers):
    return [key(i) for i in numbers]


def row(i, shape=(2, 3)):
    return torch.full(shape, float(i)) + torch.arange(6.0).view(shape) / 8


def rows(*numbers):
    return torch.stack([row(i) for i in numbers])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "moments" / "abc"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def three_shards(folder):
    store = RowCache(folder)
    for start in (0, 4, 8):
        numbers = range(start, start + 4)
        store.add(keys(*numbers), rows(*numbers))
    return store


def test_rows_come_back_in_any_order_and_from_another_process(folder):
    three_shards(folder)
    store = RowCache(folder)
    assert store.missing(keys(3, 99, 0, 98, 99)) == [1, 3]
    found = store.open(keys(5, 0, 11, 5))
    assert len(found) == 4
    assert torch.equal(found[[2, 0, 1, 3, 2]], rows(11, 5, 0, 5, 11))
    assert torch.equal(found[torch.tensor([1])], rows(0))
    code = (
        "import sys, pathlib; from ldm.data.cache import RowCache; "
        "print(RowCache(pathlib.Path(sys.argv[1])).open([sys.argv[2]])[[0]].flatten().tolist())"
    )
    command = [sys.executable, "-c", code, str(folder), key(7)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert printed.strip() == str(row(7).flatten().tolist())


def test_what_is_read_is_a_copy(folder):
    found = three_shards(folder).open(keys(0, 1))
    found[[0]].zero_()
    assert torch.equal(found[[0]], rows(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_dtypes_come_back_as_they_were(folder, dtype):
    store = RowCache(folder)
    given = (torch.rand(3, 5) * 9).to(dtype)
    store.add(keys(0, 1, 2), given)
    found = RowCache(folder).open(keys(0, 1, 2))[[2, 0]]
    assert found.dtype == dtype
    assert torch.equal(found, given[[2, 0]])


def test_shapes_may_differ_between_shards_only(folder):
    store = RowCache(folder)
    store.add(keys(0), torch.zeros(1, 4, 2))
    store.add(keys(1), torch.ones(1, 2, 4))
    found = store.open(keys(0, 1))
    assert found[[0]].shape == (1, 4, 2)
    assert found[[1]].shape == (1, 2, 4)
    with pytest.raises(AssertionError):
        found[[0, 1]]


def test_keys_with_zero_bytes_are_told_apart(folder):
    store = RowCache(folder)
    awkward = ["00" * 16, "01" + "00" * 15, "00" * 15 + "01", "0100" + "00" * 13 + "01", "01" * 15 + "00"]
    store.add(awkward, torch.arange(5.0).view(5, 1))
    assert RowCache(folder).open(awkward)[range(5)].flatten().tolist() == [0, 1, 2, 3, 4]
    assert RowCache(folder).missing(["01" * 16, *awkward]) == [0]


def test_what_others_have_added_is_found(folder):
    mine, other = RowCache(folder), RowCache(folder)
    assert mine.missing(keys(0, 1)) == [0, 1]
    other.add(keys(1), rows(1))
    assert mine.missing(keys(0, 1)) == [0]
    mine.add(keys(0, 1), rows(0, 1))  # a row may be there twice
    assert torch.equal(RowCache(folder).open(keys(1, 0))[[0, 1]], rows(1, 0))
    mine.add(keys(0, 1), rows(0, 1))  # and a shard that is there already stays one
    assert len(shards(folder)) == 2


def flip_a_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def size_of_header(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


DAMAGE = {
    "one bit of a row": lambda path: flip_a_byte(path, size_of_header(path) + 2),
    "one bit of a key": lambda path: flip_a_byte(path, -1),
    "the length of the header": lambda path: flip_a_byte(path, 7),
    "a byte of the header": lambda path: flip_a_byte(path, 20),
    "a quote of the header": lambda path: flip_a_byte(path, 9),
    "the tail": lambda path: os.truncate(path, path.stat().st_size - 1),
    "all but the header": lambda path: os.truncate(path, size_of_header(path)),
    "everything": lambda path: os.truncate(path, 0),
    "bytes added": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "other content": lambda path: path.write_bytes(b"not a shard, but long enough to be read as one"),
    "deep JSON": lambda path: path.write_bytes((100000).to_bytes(8, "little") + b"[" * 100000),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_costs_its_own_rows_and_is_named(folder, how):
    three_shards(folder)
    victim = shards(folder)[1]
    with safe_open(victim, "pt") as file:
        held = {bytes(k).hex() for k in file.get_tensor("keys").tolist()}
    DAMAGE[how](victim)
    printed = []
    store = RowCache(folder, printed.append)
    every = keys(*range(12))
    lost = store.missing(every)
    assert {every[i] for i in lost} == held
    assert len(printed) == 1
    assert str(victim) in printed[0]
    assert not victim.exists()
    assert victim.with_suffix(".damaged").exists()
    store.add([every[i] for i in lost], rows(*lost))
    again = RowCache(folder, printed.append)
    assert again.missing(every) == []
    assert torch.equal(again.open(every)[range(12)], rows(*range(12)))
    assert len(printed) == 1


def test_a_damaged_copy_does_not_hide_a_sound_one(folder):
    store = RowCache(folder)
    store.add(keys(0, 1), rows(0, 1))
    store.add(keys(1, 0), rows(1, 0))
    for victim in shards(folder):
        content = victim.read_bytes()
        flip_a_byte(victim, size_of_header(victim) + 2)
        assert torch.equal(RowCache(folder, lambda _: None).open(keys(0, 1))[[0, 1]], rows(0, 1))
        victim.write_bytes(content)


def test_a_shard_of_another_store_is_not_taken(folder):
    three_shards(folder)
    other = folder.with_name("other weights")
    shutil.copytree(folder, other)
    printed = []
    assert RowCache(other, printed.append).missing(keys(0, 4, 8)) == [0, 1, 2]
    assert all("moments/abc" in line for line in printed)
    assert len(printed) == 3


def test_a_cache_that_was_moved_is_still_one(folder, tmp_path):
    three_shards(folder)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert RowCache(tmp_path / "elsewhere" / "moments" / "abc").missing(keys(*range(12))) == []


def test_files_of_others_are_left_alone(folder):
    three_shards(folder)
    (folder / "notes.txt").write_text("mine")
    fresh, stale = folder / f".{'a' * 32}.safetensors.1", folder / f".{'b' * 32}.safetensors.2"
    for path in (fresh, stale):  # what a writer has open, and what a killed one left
        path.write_bytes(b"half")
    past = time.time() - STALE_SECONDS - 1
    os.utime(stale, (past, past))
    printed = []
    assert RowCache(folder, printed.append).missing(keys(*range(12))) == []
    assert printed == []
    assert fresh.exists() and (folder / "notes.txt").exists()
    assert not stale.exists()


def test_a_shard_that_is_cut_while_it_is_read_is_named(folder):
    found = three_shards(folder).open(keys(*range(12)))
    assert torch.equal(found[[0]], rows(0))
    for path in shards(folder):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cache file .*\.safetensors"):
        found[range(12)]
    found = three_shards(folder.with_name("b")).open(keys(*range(12)))
    shutil.rmtree(folder.with_name("b"))
    with pytest.raises(ValueError, match=r"\.safetensors .*No such file"):
        found[[0]]


def test_rows_that_are_gone_are_refused(folder):
    store = three_shards(folder)
    assert store.missing(keys(0, 4, 8)) == []
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"3 of 3 rows .*abc"):
        store.open(keys(0, 4, 8))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(folder):
    store = RowCache(folder)
    for i in range(12):
        store.add(keys(i), rows(i))
    before = len(os.listdir("/proc/self/fd"))
    found = store.open(keys(*range(12)))
    assert torch.equal(found[range(12)], rows(*range(12)))
    assert len(os.listdir("/proc/self/fd")) == before


def no_space(monkeypatch, error):
    def full(descriptor):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_write_leaves_nothing(folder, monkeypatch, error):
    store = three_shards(folder)
    before = sorted(folder.iterdir())
    with monkeypatch.context() as broken:
        no_space(broken, error)
        with pytest.raises(ValueError, match=r"data\.cache_dir") as caught:
            store.add(keys(20), torch.zeros(1, 2**18), to_come=99)
    text = str(caught.value)
    assert str(folder) in text and os.strerror(error) in text and "100.0 MiB more are needed" in text
    assert "\n" not in text
    assert sorted(folder.iterdir()) == before
    store.add(keys(20), rows(20))
    assert store.missing(keys(0, 20)) == []


def test_a_disk_too_small_for_what_is_to_come_is_told_at_once(folder):
    store = RowCache(folder)
    free = shutil.disk_usage(folder.parents[2]).free
    with pytest.raises(ValueError, match=r" GiB .*LDM_CACHE"):
        store.add(keys(0), torch.zeros(1, 2**18), to_come=2 * free // 2**20)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = RowCache(tmp_path / "file" / "moments" / "abc")
    assert store.missing(keys(0)) == [0]
    with pytest.raises(ValueError, match=r"file/moments/abc .*Not a directory"):
        store.add(keys(0), rows(0))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_serves_and_says_why_it_cannot_grow(folder):
    three_shards(folder)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        store = RowCache(folder)
        assert torch.equal(store.open(keys(0))[[0]], rows(0))
        with pytest.raises(ValueError, match=r"Permission denied"):
            store.add(keys(99), rows(99))
    finally:
        folder.chmod(stat.S_IRWXU)


WRITER = """
import hashlib, pathlib, sys, torch
from ldm.data.cache import RowCache
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
store = RowCache(folder, lambda line: sys.exit(line))
for start in range(0, 40, 4):
    part = order[start : start + 4]
    store.missing([hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in part])
    rows = torch.stack([torch.full((2, 3), float(i)) + torch.arange(6.0).view(2, 3) / 8 for i in part])
    store.add([hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in part], rows)
"""


def test_processes_may_write_at_once(folder):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seed)], cwd=ROOT, stderr=subprocess.PIPE)
        for seed in (1, 2)
    ]
    for writer in writers:
        _, error = writer.communicate()
        assert writer.returncode == 0, error
    assert len(shards(folder)) == 20
    assert torch.equal(RowCache(folder).open(keys(*range(40)))[range(40)], rows(*range(40)))
