"""The `ldm` command: what it writes and how it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm import Pipeline, cli
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ldm", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_picture_carries_what_made_it(model, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "corgi.png"
    code = call(
        monkeypatch, "generate", "a corgi wearing a hät", "--model", model, "--seed", 7, "-o", path,
        "--steps", 3, "--guidance", 1.5, "--negative-prompt", "blue",
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.split() == [str(path)]
    image = Image.open(path)
    assert image.text["prompt"] == "a corgi wearing a hät"
    assert image.text["negative_prompt"] == "blue"
    assert image.text["seed"] == "7"
    settings = json.loads(image.text["settings"])
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["eta"]) == (3, 1.5, 0.0)
    again = Pipeline.from_pretrained(model)(
        "a corgi wearing a hät", seed=7, num_inference_steps=3, guidance_scale=1.5, negative_prompt="blue"
    )
    assert (np.asarray(image) == np.asarray(again.images[0])).all()


def test_several_pictures_make_a_sheet_beside_them(model, tmp_path, monkeypatch):
    assert call(monkeypatch, "generate", "a", "-m", model, "--seed", 7, "-n", 4, "-o", tmp_path / "c.png") == 0
    names = ["c-10.png", "c-7.png", "c-8.png", "c-9.png", "c.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "c-9.png").text["seed"] == "9"
    assert json.loads(Image.open(tmp_path / "c.png").text["seed"]) == [7, 8, 9, 10]
    assert Image.open(tmp_path / "c.png").width > 4 * 90


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "./nothing"], "there is no model folder ./nothing"),
        (["--steps", "-3"], "num_inference_steps is -3"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--eta", "2"], "eta is 2"),
        (["-n", "0"], "-n is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["-o", "picture.jpg"], "picture.jpg"),
        (["--height", "-8"], "-8"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, part, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "generate", "a", "--model", model, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert not list(tmp_path.iterdir())


def test_the_command_is_installed_and_knows_its_version():
    done = subprocess.run([sys.executable, "-m", "ldm.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip().count(".") == 2
    wrong = subprocess.run([sys.executable, "-m", "ldm.cli", "generate"], capture_output=True, text=True)
    assert wrong.returncode == 2
