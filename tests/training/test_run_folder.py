"""Who may write a run folder: one at a time, whatever is moved aside meanwhile."""

import fcntl
import os
import time

import pytest
import yaml

from ldm.config import AutoencoderTrainingConfig, parse_config
from ldm.training import run_folder as folders
from ldm.training.auto import remove_empty_run
from ldm.training.run_folder import lock_folder, open_folder


def config_of(folder, seed=0):
    content = {"output_dir": str(folder), "seed": seed, "data": {"path": "pictures", "resolution": 16}}
    content |= {"autoencoder": {"block_out_channels": [8], "norm_num_groups": 4}, "train": {"max_steps": 2}}
    return parse_config(content, AutoencoderTrainingConfig, "the test")


def opened(folder, seed=0, resume=False):
    return open_folder(folder, config_of(folder, seed), 0, resume=resume, damaged=[], log=lambda _: None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that race are forked")
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_of_processes_that_start_at_once_one_gets_the_folder(rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(folders, "RETRY_SECONDS", 0.0005)
    monkeypatch.setattr(folders, "_lock_files", {})
    run, racers = tmp_path / "run", 4
    opened(run)()
    for number in range(rounds):
        (run / "result").write_text(str(number))
        start, results, end = os.pipe(), os.pipe(), os.pipe()
        children = []
        for racer in range(racers):
            if child := os.fork():
                children.append(child)
                continue
            for file in (start[1], results[0], end[1]):
                os.close(file)
            os.read(start[0], 1)
            try:
                opened(run, seed=racer)
            except ValueError as error:
                os.write(results[1], b"0" if "is being written by another run" in str(error) else b"?")
                os._exit(0)
            except BaseException:
                os.write(results[1], b"!")
                os._exit(1)
            os.write(results[1], str(racer + 1).encode())
            os.read(end[0], 1)
            os._exit(0)
        for file in (start[0], results[1], end[0], start[1]):
            os.close(file)
        said = b"".join(os.read(results[0], 1) for _ in range(racers))
        config = yaml.safe_load((run / "config.yaml").read_text())
        for file in (results[0], end[1]):
            os.close(file)
        for child in children:
            os.waitpid(child, 0)
        winners = said.replace(b"0", b"")
        assert len(winners) == 1, said
        assert config["seed"] == int(winners) - 1
        assert (tmp_path / f"run.{number + 1}" / "result").read_text() == str(number)
    assert len(os.listdir(tmp_path)) == rounds + 1


def test_the_lock_is_held_while_a_folder_is_moved_aside(tmp_path, monkeypatch):
    opened(tmp_path / "run")()
    seen = []
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.0)
    rename = os.rename

    def watched(source, target):
        rename(source, target)
        if os.path.basename(target) == "run.1":
            seen.append(folders.try_lock(os.open(tmp_path / "run.1" / ".lock", os.O_RDWR)))

    monkeypatch.setattr(os, "rename", watched)
    unlock = opened(tmp_path / "run", seed=1)
    assert seen == [False]
    file = os.open(tmp_path / "run.1" / ".lock", os.O_RDWR)
    assert folders.try_lock(file)  # that of the old one is free now
    os.close(file)
    unlock()


def test_the_lock_of_a_moved_folder_is_not_that_of_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    assert folders.try_lock(held)

    def moved(_):  # while another process waits
        os.rename(tmp_path / "run", tmp_path / "run.1")
        (tmp_path / "run").mkdir()
        os.close(held)
        monkeypatch.setattr(time, "sleep", lambda _: None)

    monkeypatch.setattr(time, "sleep", moved)
    unlock = lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text().startswith("process ")
    assert (tmp_path / "run.1" / ".lock").read_text() == ""
    unlock()


def test_a_folder_may_be_moved_between_opening_its_lock_and_holding_it(tmp_path, monkeypatch):
    flock = fcntl.flock

    def moved(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        os.rename(tmp_path / "run", tmp_path / "run.1")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", moved)
    unlock = lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text().startswith("process ")
    assert (tmp_path / "run.1" / ".lock").read_text() == ""
    unlock()


def test_what_a_link_leads_to_is_moved_aside_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk/run")
    with pytest.raises(ValueError, match=r"output_dir .* is a link to disk/run"):
        opened(tmp_path / "run")
    (tmp_path / "disk" / "run").mkdir()
    opened(tmp_path / "run")()
    opened(tmp_path / "run", seed=1)()
    assert os.readlink(tmp_path / "run") == "disk/run"
    seeds = [
        yaml.safe_load((tmp_path / "disk" / name / "config.yaml").read_text())["seed"] for name in ("run", "run.1")
    ]
    assert seeds == [1, 0]


def test_a_locked_folder_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.0)
    opened(tmp_path / "run")()
    held = os.open(tmp_path / "run" / ".lock", os.O_RDWR)
    assert folders.try_lock(held)
    remove_empty_run(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file()
    os.close(held)
    remove_empty_run(tmp_path / "run")
    assert os.listdir(tmp_path) == []
    remove_empty_run(tmp_path / "run")
    assert os.listdir(tmp_path) == []
