"""How many cores may be used, on machines that are folders with the files of `/proc` and `/sys`."""

import os

import pytest

from ldm import environment
from ldm.environment import usable_cores


def machine(root, group, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),  # half a core would be waited for
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # the group above
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "200000 100000\n"}, 1),
        # In a container the group may have the name that it has outside; its files are at the root.
        ("0::/docker/abc\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "4:memory:/\n3:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("1:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, 8),
    ],
)
def test_a_control_group_grants_fewer_cores(tmp_path, monkeypatch, group, files, expected):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_cores(machine(tmp_path, group, files)) == expected


def test_a_process_uses_the_cores_that_it_is_bound_to(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert usable_cores(tmp_path) == 2
    monkeypatch.delattr(environment.os, "sched_getaffinity")
    assert usable_cores(tmp_path) == os.cpu_count()
