"""How many threads compute: who decides, what is measured, what a resumed run takes, what a script is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm import hub
from ldm.data import DataConfig
from ldm.data.layouts import open_source
from ldm.training import auto, auto_config, checkpoints, threads
from ldm.training.auto_config import TrainOptions, choose_config
from ldm.training.threads import (
    Threads,
    agree_on_threads,
    available_threads,
    measure_threads,
    median_seconds,
    resolve_threads,
)
from tests.training.runs import digests, run_autoencoder, run_ldm, settings

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A call that sets cores, the threads of torch and the environment; all is as before afterwards."""
    before = torch.get_num_threads()

    def with_(cores=8, torch_threads=8, **environment):
        for name in (*threads.THREAD_VARIABLES, "LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(threads, "usable_cores", lambda: cores)
        torch.set_num_threads(torch_threads)

    yield with_
    torch.set_num_threads(before)


@pytest.fixture
def speeds(monkeypatch):
    """Threads → seconds of whatever is timed with them; with more than one nothing is called, for they take long
    where the machine is busy.
    """
    found = {1: 0.1, 2: 0.05}

    def seconds(action, accelerator=None):
        if torch.get_num_threads() == 1:
            action()
        return found[torch.get_num_threads()]

    monkeypatch.setattr(threads, "timed_call", seconds)
    monkeypatch.setattr("ldm.training.run.timed_call", seconds)
    return found


# ---- who decides


@pytest.mark.parametrize(
    ("environment", "cores", "torch_threads", "expected"),
    [
        ({}, 8, 8, Threads(None, 8)),
        ({}, 4, 8, Threads(None, 4)),  # bound to four, or granted four by a container
        ({}, 8, 4, Threads(None, 4)),  # torch.set_num_threads, or cores that are two for the system
        ({"OMP_NUM_THREADS": "1"}, 8, 1, Threads(1, 8, "as OMP_NUM_THREADS says")),
        ({"OMP_NUM_THREADS": " 3,2 "}, 8, 3, Threads(3, 8, "as OMP_NUM_THREADS says")),
        ({"MKL_NUM_THREADS": "2"}, 8, 2, Threads(2, 8, "as MKL_NUM_THREADS says")),
        ({"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "2"}, 8, 2, Threads(2, 8, "as MKL_NUM_THREADS says")),
        ({"OMP_NUM_THREADS": "16"}, 8, 16, Threads(16, 8, "as OMP_NUM_THREADS says")),
        ({"OMP_NUM_THREADS": "4"}, 8, 1, Threads(1, 8, "as OMP_NUM_THREADS says")),  # then torch was told another
        ({"OMP_NUM_THREADS": ""}, 8, 8, Threads(None, 8)),  # which libgomp does not take either
        ({"OMP_NUM_THREADS": "0"}, 8, 8, Threads(None, 8)),
        ({"OMP_NUM_THREADS": "many"}, 8, 8, Threads(None, 8)),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, 8, 8, Threads(None, 4)),
        ({"WORLD_SIZE": "4"}, 8, 8, Threads(None, 2)),
        ({"LOCAL_WORLD_SIZE": "16"}, 8, 8, Threads(None, 1)),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 8, 3, Threads(3, 4, "as OMP_NUM_THREADS says")),
    ],
)
def test_what_the_environment_allows(machine, environment, cores, torch_threads, expected):
    machine(cores, torch_threads, **environment)
    assert available_threads() == expected


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the environment of a launcher is read from /proc")
@pytest.mark.parametrize(
    ("launcher", "argument", "number", "expected"),
    [
        ({}, "", "1", Threads(None, 4)),  # the launcher has set it
        ({"OMP_NUM_THREADS": "1"}, "", "1", Threads(1, 4, "as OMP_NUM_THREADS says")),  # its user has
        ({}, "--num_cpu_threads_per_process=1", "1", Threads(1, 4, "as OMP_NUM_THREADS says")),
        ({}, "", "3", Threads(3, 4, "as OMP_NUM_THREADS says")),  # launchers set 1
    ],
)
def test_one_thread_that_a_launcher_sets_is_not_what_its_user_says(
    machine, monkeypatch, launcher, argument, number, expected
):
    command = [sys.executable, "-c", "print(flush=True); input()", *([argument] if argument else [])]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=launcher, **streams) as process:
        process.stdout.readline()
        monkeypatch.setattr(threads.os, "getppid", lambda: process.pid)
        machine(8, int(number), OMP_NUM_THREADS=number, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID="none")
        assert available_threads() == expected
        machine(8, int(number), OMP_NUM_THREADS=number, LOCAL_WORLD_SIZE=2)  # nobody has launched it
        assert available_threads() == Threads(int(number), 4, "as OMP_NUM_THREADS says")
        process.stdin.close()


@pytest.mark.parametrize(
    ("found", "configured", "begun_with", "expected"),
    [
        (Threads(None, 8), None, None, (None, 8)),
        (Threads(None, 1), None, None, (1, 1)),
        (Threads(None, 8), None, 3, (3, 8)),
        (Threads(None, 2), None, 3, (2, 2)),  # what is not there cannot be taken: another number, to be accepted
        (Threads(1, 8, "as OMP_NUM_THREADS says"), None, 3, (1, 8)),
        (Threads(1, 8, "as OMP_NUM_THREADS says"), 4, 3, (4, 8)),
        (Threads(None, 2), 4, None, (4, 2)),
    ],
)
def test_what_comes_first(found, configured, begun_with, expected):
    decided = resolve_threads(found, configured, begun_with)
    assert (decided.number, decided.max_number) == expected
    assert bool(decided.reason) == (decided.number is not None)


def test_a_config_that_outranks_the_environment_says_so():
    told = resolve_threads(Threads(1, 8, "as OMP_NUM_THREADS says"), 4, None)
    assert str(told) == "4, as train.cpu_threads says (OMP_NUM_THREADS says 1)"
    assert str(resolve_threads(Threads(4, 8, "as OMP_NUM_THREADS says"), 4, None)) == "4, as train.cpu_threads says"


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (Threads(None, 4), [[0, 3]], Threads(None, 3)),
        (Threads(2, 4, "a"), [[2, 2]], Threads(2, 4, "a")),
        (Threads(2, 4, "a"), [[1, 1]], Threads(1, 4, "a")),
        (Threads(None, 4), [[2, 2]], Threads(2, 4)),
        (Threads(3, 4, "a"), [[0, 2]], Threads(2, 4, "a")),
    ],
)
def test_processes_agree_on_the_smallest_number(own, others, expected):
    class Accelerator:
        num_processes, device = 2, CPU

        @staticmethod
        def gather(row):
            return torch.cat([row, torch.tensor(others)])

    assert agree_on_threads(own, Accelerator) == expected


# ---- what is measured


def test_all_numbers_are_called_in_turn_and_spikes_do_not_count():
    called = []
    times = {1: iter([9.0, 0.1, 0.1, 0.1, 0.1, 0.1]), 2: iter([9.0, 0.08, 3.0, 0.08, 0.09, 0.08])}

    def seconds(count):
        called.append(count)
        return next(times[count])

    assert median_seconds([1, 2], seconds) == {1: pytest.approx(0.1), 2: pytest.approx(0.08)}
    assert called == 4 * [1, 2]  # 3 s are enough
    times = {1: iter([9.0] + 5 * [0.1]), 2: iter([9.0] + 5 * [0.2])}
    called.clear()
    assert median_seconds([1, 2], seconds) == {1: pytest.approx(0.1), 2: pytest.approx(0.2)}
    assert called == 6 * [1, 2]


def test_a_number_that_is_many_times_as_slow_is_called_once():
    called = []

    def seconds(count):
        called.append(count)
        return {1: 0.1, 2: 5.0}[count]

    assert median_seconds([1, 2], seconds) == {1: 0.1, 2: 5.0}
    assert called == [1, 2, 1]


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ({1: 1.0, 2: 0.5}, 2),
        ({1: 1.0, 2: 0.95}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.3, 8: 0.29}, 4),
        ({1: 0.3, 2: 1.3}, 1),
        ({1: 1.0, 2: 0.4, 4: 0.9}, 2),
    ],
)
def test_the_fewest_that_are_about_as_fast_as_any(machine, medians, expected):
    found = measure_threads(Threads(None, max(medians)), lambda: medians[torch.get_num_threads()], "a step")
    assert found.number == expected


def test_what_is_tried(machine):
    def tried(count):
        seen = []
        measure_threads(Threads(None, count), lambda: seen.append(torch.get_num_threads()) or 1.0, "a step")
        return sorted(set(seen))

    assert [tried(count) for count in (1, 2, 3, 4, 8, 64)] == [
        [1], [1, 2], [1, 3], [1, 2, 4], [1, 2, 4, 8], [1, 16, 32, 64],
    ]  # fmt: skip


def test_what_was_measured_is_told(machine, speeds):
    machine(2, 2)
    found = threads.measure_threads(Threads(None, 2), lambda: threads.timed_call(lambda: None), "a step")
    assert found.number == 2
    assert str(found) == "2, measured: 0.1 s with 1, 0.05 s with 2 (a step)"
    speeds[2] = 0.3
    assert threads.measure_threads(Threads(None, 2), lambda: threads.timed_call(lambda: None), "a step").number == 1


# ---- a run, and the one that goes on with it


def environment_of(run, step):
    return hub.read_json(checkpoints.checkpoint_folder(run, step) / "training" / "state.json")["environment"]


def test_a_run_takes_what_is_fastest_and_goes_on_with_it(tmp_path, encoder_folder, machine, speeds, capsys):
    run = tmp_path / "run"
    open_ = [*settings(run, encoder_folder), "train.cpu_threads=null"]
    speeds.update({2: 0.2, 4: 0.3})
    machine(4, 4)
    run_ldm(open_, "train.max_steps=2")
    assert (torch.get_num_threads(), environment_of(run, 2)["threads"]) == (1, 1)
    measured = "1, measured: 0.1 s with 1, 0.2 s with 2, 0.3 s with 4 (1 image forward and back)"
    assert json.loads((run / "plan.json").read_text())["threads"] == measured
    assert f"threads  {measured}" in capsys.readouterr().out

    speeds[4] = 0.01  # more are faster now, but the bits depend on the number
    machine(4, 4)
    run_ldm(open_, "train.max_steps=3", resume=True)
    assert (torch.get_num_threads(), environment_of(run, 3)["threads"]) == (1, 1)
    assert "threads  1, as the run started" in capsys.readouterr().out

    machine(4, 2, OMP_NUM_THREADS=2)
    with pytest.raises(ValueError, match=r"\(threads: 1 → 2\); restore them, accept them with --accept threads,"):
        run_ldm(open_, resume=True)


def test_measuring_changes_nothing_of_either_run(tmp_path, encoder_folder, machine, speeds):
    speeds[2] = 0.2
    for name, cores in (("measured", 2), ("decided", 1)):
        machine(cores, cores)
        overrides = ["train.cpu_threads=null", "unet.dropout=0.2", "train.max_steps=1"]
        run_ldm([*settings(tmp_path / name, encoder_folder), *overrides])
        machine(cores, cores)
        run_autoencoder(tmp_path / f"{name}-stage", "train.cpu_threads=null", "train.max_steps=1")
        assert environment_of(tmp_path / f"{name}-stage", 1)["threads"] == torch.get_num_threads() == 1
    for kind in ("", "-stage"):
        folders = [checkpoints.checkpoint_folder(tmp_path / f"{name}{kind}", 1) for name in ("measured", "decided")]
        measured, decided = map(digests, folders)
        assert measured == decided and len(measured) == 3


# ---- `ldm train`


def test_what_is_chosen_by_is_what_trains(machine, speeds, monkeypatch):
    used = []

    def seconds(*arguments):
        used.append(torch.get_num_threads())
        return 0.01

    monkeypatch.setattr(auto_config, "unet_seconds", seconds)
    samples = open_source(DataConfig(path="digits", resolution=8)).samples
    for fast, slow in ((1, 2), (2, 1)):
        speeds[fast], speeds[slow] = 0.1, 0.3
        machine(2, 2)
        chosen = choose_config(samples, {"path": "digits"}, TrainOptions("runs/test", anyway=True), CPU)
        assert chosen.threads == fast and set(used) == {fast}
        assert any(reason.startswith(f"threads: {fast}, measured: ") for reason in chosen.reasons)
        used.clear()
    machine(2, 2)
    assert (
        choose_config(samples, {"path": "digits"}, TrainOptions("runs/test", cpu_threads=1, anyway=True), CPU).threads
        == 1
    )
    machine(2, 2, OMP_NUM_THREADS=2)
    speeds[1] = 0.01
    assert choose_config(samples, {"path": "digits"}, TrainOptions("runs/test", anyway=True), CPU).threads == 2


def test_a_script_is_told_the_number(tmp_path, monkeypatch, machine):
    written = "import os, sys; print([os.environ.get(name) for name in sys.argv[2:]], file=open(sys.argv[1], 'w'))"
    (tmp_path / "ldm" / "training").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("training/__init__.py", ""), ("training/script.py", written)):
        (tmp_path / "ldm" / name).write_text(text)
    monkeypatch.setattr(auto, "PACKAGE_ROOT", tmp_path)
    machine(2, 2, MKL_NUM_THREADS=7)
    out = tmp_path / "out"
    for number, expected in ((3, ["3", "3"]), (None, [None, "7"])):
        assert auto.run_script("script", [str(out), *threads.THREAD_VARIABLES], number) == 0
        assert out.read_text().strip() == str(expected)
    machine(2, 2)
    assert auto.run_script("script", [str(out), *threads.THREAD_VARIABLES], 3) == 0
    assert out.read_text().strip() == str(["3", None]) and "OMP_NUM_THREADS" not in os.environ
