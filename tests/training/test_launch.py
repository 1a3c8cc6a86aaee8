"""`ldm.train`: from a config, a YAML file, a run folder or images to a typed result."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ldm
from ldm.config import LDMConfig, to_yaml
from ldm.config.overrides import load_config
from ldm.training import auto, launch
from ldm.training.distributed import EXIT_CODE, Stopped
from tests.training.runs import ROOT, autoencoder_settings, captioned_folder, fresh_processes, metrics, settings


def small(folder: Path, encoder_folder: Path, *more: str) -> LDMConfig:
    overrides = [*settings(folder, encoder_folder), "train.max_steps=2", *more]
    return load_config(ROOT / "configs" / "digits.yaml", overrides, LDMConfig)


def test_a_config_trains_in_this_process(tmp_path, encoder_folder):
    fresh_processes()
    config = small(tmp_path / "run", encoder_folder)
    result = ldm.train(config)
    assert isinstance(result, ldm.TrainingResult)
    assert (result.folder, result.export, result.steps) == (tmp_path / "run", tmp_path / "run" / "pipeline", 2)
    logged = [line["held_out_loss"] for line in metrics(result.folder) if "held_out_loss" in line]
    assert result.metrics["held_out_loss"] == logged[-1]
    assert str(result.export) in repr(result) and "2 steps" in repr(result)
    fresh_processes()
    path = tmp_path / "longer.yaml"
    path.write_text(to_yaml(config))
    assert ldm.train(path, resume=True, overrides=["train.max_steps=3"]).steps == 3
    assert [line["step"] for line in metrics(result.folder) if "loss" in line] == [1, 2, 3]


def test_the_kind_of_a_config_follows_from_its_keys(tmp_path):
    fresh_processes()
    path = ROOT / "configs" / "digits-first-stage.yaml"
    result = ldm.train(path, overrides=[*autoencoder_settings(tmp_path / "run"), "train.max_steps=1"])
    assert result.export == tmp_path / "run" / "autoencoder" and result.export.is_dir()
    for config in (ROOT / "configs").glob("*.yaml"):
        kind = "AutoencoderTrainingConfig" if "first-stage" in config.name else "LDMConfig"
        assert type(launch.load_any_config(config)).__name__ == kind


def test_images_and_run_folders_train_as_the_command_does(tmp_path, monkeypatch):
    """The exit code of the process that trains becomes an error that names the run folder."""
    calls = []
    monkeypatch.setattr(auto, "auto_train", lambda *call, **more: calls.append((*call, more)) or 2)
    monkeypatch.setattr(auto, "resume_run", lambda *call: calls.append(call) or EXIT_CODE)
    images = captioned_folder(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="exit code 2"):
        ldm.train(images, minutes=3, output_dir=tmp_path / "run", overrides=["seed=1"])
    data, options, overrides, _ = calls.pop()
    assert data == {"path": str(images)} and overrides == ["seed=1"]
    assert (options.minutes, options.output_dir) == (3, str(tmp_path / "run"))
    with pytest.raises(Stopped, match="ldm train --resume"):
        ldm.train(tmp_path / "run", resume=True, accept=["code"])
    assert calls == [(tmp_path / "run", ["code"], ())]


def test_type_checkers_see_the_lazy_names():
    stub = ast.parse((ROOT / "ldm" / "__init__.pyi").read_text())
    names = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names | {"__version__"} == set(ldm.__all__)


@pytest.mark.parametrize(
    ("source", "arguments", "named"),
    [
        ("nosuch.yaml", {}, "nosuch.yaml"),
        (ROOT / "configs" / "digits.yaml", {"minutes": 3}, "minutes"),
        ("folder", {"accept": ["code"]}, "resume=True"),
        (load_config(ROOT / "configs" / "digits.yaml", [], LDMConfig), {"overrides": ["seed=1"]}, "overrides"),
    ],
)
def test_arguments_that_do_not_apply_are_refused(source, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        ldm.train(source, **arguments)
    assert list(tmp_path.iterdir()) == []
