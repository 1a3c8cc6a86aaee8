"""Where a run was started, and what its relative paths are read from."""

import shlex
from pathlib import Path

import pytest

from ldm.config import LDMConfig, to_yaml
from ldm.config.overrides import load_config
from ldm.training.checkpoints import resume_command
from ldm.training.run_folder import record_start
from ldm.training.run_info import base_folder, data_config, find_run, with_absolute_paths
from tests.training.runs import ROOT


def content(**paths):
    return {"data": {"path": "pics", "cache_dir": None}, "text": {"encoder": "minilm"}} | paths


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was started in `tmp_path/then` on pictures beside it; the working folder is another."""
    for name in ("then/pics", "then/digits", "now", "run"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "then")
    overrides = [f"output_dir={tmp_path / 'run'}", "data.path=pics"]
    config = load_config(ROOT / "configs" / "digits.yaml", overrides, LDMConfig)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    record_start(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path / "now")
    return tmp_path / "run"


def test_relative_paths_are_read_from_where_the_run_was_started(run, tmp_path, monkeypatch):
    then, now = tmp_path / "then", tmp_path / "now"
    assert base_folder(run, content()) == then
    (now / "pics").mkdir()  # of the same name, but not what the run was started on
    assert base_folder(run, content()) == then
    (then / "pics").rename(then / "elsewhere")
    assert base_folder(run, content()) == now
    (now / "pics").rmdir()
    with pytest.raises(ValueError, match=r"data\.path of .*run is pics, relative to .*then, where the run was started"):
        base_folder(run, content())
    assert base_folder(run, content(), {"data.path"}) == now
    assert base_folder(run, content(data={"path": "/other"})) == now
    monkeypatch.chdir(then)
    assert base_folder(run, content()) == then


def test_names_of_what_is_built_in_and_hub_ids_are_no_paths(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs" / "digits.yaml", [], LDMConfig)
    record_start(tmp_path, config)
    monkeypatch.chdir(tmp_path / "digits")
    assert base_folder(tmp_path, content(data={"path": "digits"})) == tmp_path / "digits"
    (tmp_path / "started.json").unlink()  # of an older version
    assert base_folder(tmp_path, content()) == tmp_path / "digits"


def test_an_evaluation_finds_the_data_of_a_run_from_any_folder(run, tmp_path):
    found = find_run(str(run))
    assert data_config(found).path == str(tmp_path / "then" / "pics")
    assert with_absolute_paths(found.config, run) == found.config
    (tmp_path / "then" / "pics").rmdir()
    found = find_run(str(run))  # other data may be named
    with pytest.raises(ValueError, match=r"data\.path of .* no longer"):
        data_config(found)


def test_the_command_is_quoted_for_the_shell():
    command = resume_command(Path("my runs/it's #1"))
    assert shlex.split(command) == ["ldm", "train", "--resume", "my runs/it's #1"]
