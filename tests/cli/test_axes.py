"""`ldm evaluate --axes`: what it prints and writes, and how it fails."""

import json

import pytest
from PIL import Image

from ldm.config import LDMConfig, to_yaml
from ldm.config.overrides import load_config
from ldm.evaluation.composition import AXES
from ldm.evaluation.scene_classifier import FOLDER
from ldm.training.run_info import find_run, scenes_after
from tests import tiny
from tests.test_cli import call
from tests.training.runs import ROOT


def a_run(folder, *changes):
    tiny.pipeline(folder / "parts", num_inference_steps=1, guidance_scale=1.0).save_pretrained(folder / "run/pipeline")
    config = load_config(ROOT / "configs" / "digits.yaml", [f"output_dir={folder / 'run'}", *changes], LDMConfig)
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return folder / "run"


@pytest.fixture
def run(tmp_path):
    settings = ("data.path=scenes", "data.scenes=16", "data.renew_every=2", "data.first_scene=10", "data.flip=false")
    return a_run(tmp_path, *settings, "train.max_steps=10", "train.batch_size=8")


@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason="there is no classifier yet")
def test_the_axes_are_a_table_json_and_a_sheet(run, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", run, "--axes", "--prompts", 2, "--seed", 3) == 0
    out = capsys.readouterr().out
    assert all(f"\n{axis} " in out for axis in AXES) and "of 58 training scenes" in out
    content = json.loads((run / "evaluation" / "axes.json").read_text())
    assert list(content["axes"]) == list(AXES) and content["seed"] == 3
    with Image.open(run / "evaluation" / "axes.png") as sheet:
        assert json.loads(sheet.text["settings"])["judge"] == content["judge"]
    assert call(monkeypatch, "evaluate", run, "--axes", "--prompts", 2, "--seed", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out) == content


def test_the_scenes_that_a_run_saw_are_counted(run):
    # 80 samples are 5 epochs of 16 scenes, which others replace after 2 of them.
    config = find_run(str(run)).config
    assert scenes_after(config, config.train.max_steps) == 10 + 3 * 16


def test_models_of_other_data_are_refused(tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path)
    assert call(monkeypatch, "evaluate", run, "--axes") != 0
    assert "was trained on digits" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert call(monkeypatch, "evaluate", run / "pipeline", "--axes") != 0
    assert "is not in a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--axes", "--sweep"), "leave DATA and --sweep out"),
        (("folder", "--axes"), "leave DATA and --sweep out"),
        (("--prompts", 3), "--prompts is for --axes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, said, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", "model", *arguments) != 0
    assert said in capsys.readouterr().err
