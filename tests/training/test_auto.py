"""`ldm train FOLDER` from end to end: what is printed, what is left behind, how it goes on, and how it fails."""

import dataclasses
import inspect
import io
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm import Pipeline, cli
from ldm.cli.commands import NEW_RUN_ONLY, train_command
from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config
from ldm.config.overrides import load_config
from ldm.data import DataConfig
from ldm.data.layouts import open_source
from ldm.evaluation import autoencoder
from ldm.training import auto, auto_config
from ldm.training.checkpoints import resume_command
from ldm.training.launch import run_training
from ldm.training.run_folder import open_folder
from ldm.training.setup import load_first_stage
from tests.training.runs import ROOT, captioned_folder, fresh_processes, losses, run_config

SMALL = [
    "train.max_steps=2", "train.cpu_threads=1", "sample.num_inference_steps=2", "sample.images_per_prompt=1",
    "train.batch_size=4", "train.log_every=1",
]  # fmt: skip
NARROW = ["unet.block_out_channels=[8,8,8]", "unet.norm_num_groups=4", "unet.attention_head_dim=2"]


def call(monkeypatch, *arguments, overrides=(), command="train"):
    settings = [part for override in overrides for part in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["ldm", command, *map(str, arguments), *settings])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, a machine of one speed, and networks that take no time to look at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auto_config, "unet_seconds", lambda *arguments: 0.01)
    monkeypatch.setattr(auto_config, "autoencoder_seconds", lambda *arguments: 0.01)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Scripts without a process of their own, which takes seconds to start."""
    kinds = {
        "train_ldm": LDMConfig,
        "train_autoencoder": AutoencoderTrainingConfig,
    }

    def run(script, arguments, threads=None):
        fresh_processes()
        assert arguments[0] == "--config"
        changes = ["train.cpu_threads=1", *(argument for argument in arguments[2:] if "=" in argument)]
        run_training(load_config(Path(arguments[1]), changes, kinds[script]), resume="--resume" in arguments)
        return 0

    monkeypatch.setattr(auto, "run_script", run)


def printed_configs(out):
    """The YAML that `--plan` prints, by script."""
    _, *parts = out.split("\n# train/")
    return {part.split("\n", 1)[0]: yaml.safe_load(part.split("\n", 1)[1]) for part in parts}


def test_auto_train_runs_a_script_with_a_config(here, encoder_folder, monkeypatch, capfd):
    data = captioned_folder(here / "my pictures", 12)
    arguments = [data, "--encoder", encoder_folder, "--resolution", 16]
    assert call(monkeypatch, *arguments, "--plan", overrides=SMALL + NARROW) == 0
    planned = printed_configs(capfd.readouterr().out)
    assert list(planned) == ["train_ldm.py"] and not (here / "runs").exists()

    assert call(monkeypatch, *arguments, overrides=SMALL + NARROW) == 0
    out = capfd.readouterr().out
    run = here / "runs" / "my pictures"
    assert yaml.safe_load((run / "config.yaml").read_text()) == planned["train_ldm.py"]
    assert {"config.yaml", "report.html", "pipeline", "data.json", "plan.json", "metrics.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    assert "12 images: 12 used" in out and "space: pixel, because 16 pixels a side are few enough" in out
    assert "train/train_ldm.py, its config becomes runs/my pictures/config.yaml" in out
    *_, sheet, report, draw = out.strip().splitlines()
    assert (here / sheet.split(":", 1)[1].strip()).is_file() and (here / report.split(":", 1)[1].strip()).is_file()
    assert draw.startswith("generate: ldm generate 'noise number 0' --model ")
    assert Pipeline.from_pretrained(run / "pipeline")("noise number 3", seed=0).images[0].size == (16, 16)

    # The script with that config does the same.
    again = yaml.safe_load((run / "config.yaml").read_text()) | {"output_dir": str(here / "again")}
    run_config(again)
    assert losses(here / "again") == losses(run)


@pytest.mark.slow
def test_auto_trains_a_first_stage(here, encoder_folder, in_this_process, monkeypatch, capfd):
    # As few images and steps as make a run.
    monkeypatch.setattr(autoencoder, "MIN_TRAINING_IMAGES", 20)
    monkeypatch.setattr(auto_config, "MIN_STEPS", 10)
    data = captioned_folder(here / "data", 28, 36)
    arguments = [data, "--anyway", "--encoder", encoder_folder, "--resolution", 36, "--minutes", 0.0001, "-o", "out"]
    assert call(monkeypatch, *arguments, overrides=[*SMALL, "unet.norm_num_groups=8"]) == 0
    out = capfd.readouterr().out
    assert "first stage: a new one is trained on these images before, 10 steps" in out
    first = yaml.safe_load((here / "out-first-stage" / "config.yaml").read_text())
    config = yaml.safe_load((here / "out" / "config.yaml").read_text())
    assert config["space"] == "latent" and config["first_stage"] == "out-first-stage/autoencoder"
    assert first["data"] == config["data"]
    weights = "diffusion_pytorch_model.safetensors"
    made = (here / "out-first-stage" / "autoencoder" / weights).read_bytes()
    assert (here / "out" / "pipeline" / "vae" / weights).read_bytes() == made
    # Either of the two goes on.
    assert call(monkeypatch, "--resume", "out-first-stage") == 0
    assert call(monkeypatch, "--resume", "out") == 0
    assert "resumed out/checkpoints/step_00000002" in capfd.readouterr().out


@pytest.mark.slow
def test_resuming_continues_first_stage_and_run(here, encoder_folder, in_this_process, monkeypatch, capfd):
    monkeypatch.setattr(autoencoder, "MIN_TRAINING_IMAGES", 20)
    monkeypatch.setattr(auto_config, "MIN_STEPS", 10)
    data = captioned_folder(here / "data", 28, 36)
    arguments = [data, "--anyway", "--encoder", encoder_folder, "--resolution", 36, "--minutes", 0.0001, "-o", "out"]
    whole, called = auto.run_script, []

    def killed(script, arguments, threads=None):
        called.append(script)
        return 137

    with monkeypatch.context() as broken:
        broken.setattr(auto, "run_script", killed)
        assert call(monkeypatch, *arguments, overrides=[*SMALL, "unet.norm_num_groups=8"]) == 137
    assert called == ["train_autoencoder"]
    planned = (here / "out" / "config.yaml").read_text()

    def one_of_them(script, arguments, threads=None):
        called.append(script)
        return whole(script, arguments)

    monkeypatch.setattr(auto, "run_script", one_of_them)
    assert call(monkeypatch, "--resume", "out") == 0
    assert "its first stage comes before, out-first-stage" in capfd.readouterr().out
    assert called[1:] == ["train_autoencoder", "train_ldm"]
    assert (here / "out" / "config.yaml").read_text() == planned
    assert (here / "out" / "pipeline" / "model_index.json").is_file()
    called.clear()
    assert call(monkeypatch, "--resume", "out") == 0
    assert called == ["train_ldm"]


@pytest.mark.slow
def test_auto_tunes_a_decoder(here, encoder_folder, in_this_process, monkeypatch, capfd):
    monkeypatch.setattr(auto_config, "MIN_STEPS", 10)
    (here / "data").mkdir()
    for i, sample in enumerate(open_source(DataConfig(path="digits", resolution=8)).samples[:12]):
        sample.load().resize((64, 64), Image.Resampling.BICUBIC).save(here / "data" / f"{i}.png")
        (here / "data" / f"{i}.txt").write_text(sample.captions[0])
    arguments = [here / "data", "--encoder", encoder_folder, "--resolution", 64, "--minutes", 0.0001, "-o", "out"]
    assert call(monkeypatch, *arguments, overrides=[*SMALL, "unet.norm_num_groups=8"]) == 0
    assert "the decoder of openmoji-first-stage is fine-tuned on these images before, 10" in capfd.readouterr().out
    config = yaml.safe_load((here / "out" / "config.yaml").read_text())
    assert (config["space"], config["first_stage"]) == ("latent", "out-first-stage/autoencoder")
    codec, tuned = load_first_stage("openmoji-first-stage"), load_first_stage("out-first-stage/autoencoder")
    assert tuned.fingerprint() == codec.fingerprint()
    weights = [network.autoencoder.decoder.conv_out.weight for network in (codec, tuned)]
    assert not torch.equal(*weights)
    used = load_first_stage("out/pipeline").autoencoder.decoder.conv_out.weight
    assert torch.equal(used, weights[1])


def test_a_model_learns_a_style_as_a_lora(here, stable_diffusion, in_this_process, monkeypatch, capfd):
    data = captioned_folder(here / "data", 8)
    assert call(monkeypatch, data, "--start-from", stable_diffusion, overrides=SMALL) == 0
    out = capfd.readouterr().out
    assert "method: lora, for 8 images" in out
    assert f"--model {stable_diffusion} --lora runs/data/lora" in out.splitlines()[-1]
    picture = here / "drawn.png"
    arguments = ["noise number 1", "--model", stable_diffusion, "--lora", "runs/data/lora:0.5", "--steps", 2]
    assert call(monkeypatch, *arguments, "--seed", 3, "-o", picture, command="generate") == 0
    pipeline = Pipeline.from_pretrained(stable_diffusion)
    pipeline.load_lora(here / "runs" / "data" / "lora", weight=0.5)
    expected = pipeline("noise number 1", seed=3, num_inference_steps=2).images[0]
    assert (np.asarray(Image.open(picture)) == np.asarray(expected)).all()
    assert json.loads(Image.open(picture).text["settings"])["lora"] == ["runs/data/lora:0.5"]


def test_what_is_set_counts_before_anything_is_chosen(here, encoder_folder, monkeypatch, capfd):
    data = captioned_folder(here / "data", 6, 20)
    (data / "7.png").write_bytes(b"no picture")
    (data / "7.txt").write_text("nothing")
    options = [f"text.encoder={encoder_folder}", "data.resolution=40", "data.held_out=0.5", "space=latent"]
    options += ["output_dir=elsewhere", "train.batch_size=2", "data.background=black"]
    assert call(monkeypatch, data, "--plan", "--anyway", overrides=options) == 0
    out = capfd.readouterr().out
    config = parse_config(printed_configs(out)["train_ldm.py"], LDMConfig, "the plan")
    assert (config.space, config.first_stage) == ("latent", "openmoji-first-stage")
    assert config.data.resolution == 40 and config.data.held_out == 0.5 and config.data.background == "black"
    assert config.output_dir == "elsewhere" and config.train.batch_size == 2
    assert config.text.encoder == str(encoder_folder)
    # Four channels, ten by ten.
    assert "parameters on 10x10" in out and "space: latent, as given" in out
    assert "6 used (" in out and "1 skipped" in out
    assert not (here / "elsewhere").exists()


def test_captions_of_any_script_are_printed_on_any_terminal(here, encoder_folder, monkeypatch):
    data = captioned_folder(here / "data", 3)
    for i in range(3):
        (data / f"{i}.txt").write_text(f"猫 {i} \x1b[31m", encoding="utf-8")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii", write_through=True))
    assert call(monkeypatch, data, "--plan", "--encoder", encoder_folder) == 0
    assert rb"\u732b 0" in terminal.getvalue() and b"\x1b" not in terminal.getvalue()


def wrong(here):
    data = captioned_folder(here / "data", 4)
    captioned_folder(here / "one", 1)
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("years of work")
    (here / "empty").mkdir()
    return data


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "there is nothing to train on; name a folder"),
        (["./nowhere"], "nowhere"),
        (["empty"], "empty"),
        (["one"], "one holds 1 image that can be used; training needs 2"),
        (["data", "--method", "lora"], "--method is lora; it is full, attention or lora, and needs --start-from"),
        (["data", "--method", "some", "--start-from", "data"], "--method is some"),
        (
            ["data", "--anyway", "--start-from", "scenes-64"],
            "--anyway trains a new model, and --start-from names scenes-64",
        ),
        (["data", "--minutes", "0.001", "--resolution", "64"], "give it the time (--minutes"),
        (["data", "--start-from", "./no_model"], "there is no model folder ./no_model"),
        (["data", "--minutes", "0"], "--minutes is 0"),
        (["data", "--minutes", "nan"], "--minutes is nan"),
        (["data", "--resolution", "0"], "resolution is 0"),
        (["data", "--encoder", "./no_encoder"], "no_encoder"),
        (["data", "--set", "train.max_step=5"], "unknown key train.max_step; did you mean train.max_steps?"),
        (["data", "--set", "data.colour=red"], "unknown key data.colour"),
        (["data", "--set", "train.max_steps=0"], "max_steps is 0"),
        (["data", "--set", "finetune.rank=4"], "finetune says how to go on from a model"),
        (["data", "--set", "first_stage=./no_stage", "--resolution", "64"], "there is no model folder ./no_stage"),
        (["data", "-o", "data/run"], "output_dir 'data/run' is inside data.path 'data'"),
        (["data", "-o", "."], "data.path is 'data', inside output_dir '.'"),
        (["data", "-o", "thesis", "--plan"], "output_dir thesis holds files"),
        (["data", "-o", "thesis/chapter.txt"], "output_dir thesis/chapter.txt is a file"),
        (["data", "--resume", "data"], "--resume data continues on the data of that run; leave data out"),
        (["--resume", "data"], "data holds no config.yaml"),
        (["data", "--set", "space=latent", "--resolution", "30"], "30x30 is not divisible by the codec's factor 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options_print_one_line_and_leave_no_trace(arguments, part, here, monkeypatch, capfd):
    wrong(here)
    before = sorted(path for path in here.rglob("*"))
    assert call(monkeypatch, *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert part in error
    assert sorted(path for path in here.rglob("*")) == before


@pytest.fixture
def called(monkeypatch):
    """Which scripts would run: (working folder, name, arguments)."""
    calls = []
    monkeypatch.setattr(auto, "run_script", lambda *call: calls.append((Path.cwd(), *call)) or 75)
    return calls


def begun(folder, *overrides):
    """The folder of a run that was stopped before its first checkpoint."""
    config = load_config(ROOT / "configs" / "digits.yaml", [f"output_dir={folder}", *overrides], LDMConfig)
    open_folder(folder, config, 0, resume=False, damaged=[], log=print)()
    return folder


def test_a_run_goes_on_from_any_folder_with_what_is_set(here, called, monkeypatch):
    captioned_folder(here / "pics", 1)
    begun(Path("out"), "data.path=pics")
    arguments = ["--resume", "out", "--set", "train.max_steps=3", "sample.seed=4", "--accept", "code", "data"]
    assert call(monkeypatch, *arguments) == 75
    settings = ["output_dir=out", "train.max_steps=3", "sample.seed=4"]
    expected = ["--config", "out/config.yaml", "--set", *settings, "--resume", "--accept", "code", "data"]
    assert called.pop() == (here, "train_ldm", expected)
    # Other data of that name is not the run's.
    (here / "elsewhere" / "pics").mkdir(parents=True)
    (here / "elsewhere" / "cache").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert call(monkeypatch, "--resume", "../out", "--set", "data.cache_dir=cache") == 75
    folder = here / "elsewhere" / ".." / "out"
    settings = [f"output_dir={folder}", f"data.cache_dir={here / 'elsewhere' / 'cache'}"]
    expected = ["--config", str(folder / "config.yaml"), "--set", *settings, "--resume"]
    assert called.pop() == (here, "train_ldm", expected)
    assert Path.cwd() == here / "elsewhere"


def test_a_first_stage_that_is_unfinished_is_found_from_any_folder(here, called, monkeypatch):
    captioned_folder(here / "pics", 1)
    stage = load_config(ROOT / "configs" / "digits-first-stage.yaml", [], AutoencoderTrainingConfig)
    stage = dataclasses.replace(stage, output_dir="out-first-stage")
    open_folder(Path("out-first-stage"), stage, 0, resume=False, damaged=[], log=print)()
    latent = ["space=latent", "first_stage=out-first-stage/autoencoder", "schedule.prediction_type=v_prediction"]
    begun(Path("out"), *latent)
    monkeypatch.chdir("/")
    assert call(monkeypatch, "--resume", here / "out", "--set", "train.max_steps=9", "data.held_out=0.2") == 75
    settings = [f"output_dir={here / 'out-first-stage'}", "data.held_out=0.2"]
    where, script, arguments = called.pop()
    assert (where, script, arguments[3:5]) == (here, "train_autoencoder", settings)


def test_data_that_is_nowhere_is_said_to_be_so(here, called, monkeypatch, capfd):
    captioned_folder(here / "pics", 1)
    begun(Path("out"), "data.path=pics")
    (here / "pics").rename(here / "pictures #2")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert call(monkeypatch, "--resume", "../out") == 2
    error = capfd.readouterr().err
    assert f"error: data.path of ../out is pics, relative to {here}, where the run was started" in error
    assert "--set data.path=PATH" in error and error.count("\n") == 1 and not called
    assert call(monkeypatch, "--resume", "../out", "--set", "data.path=../pictures #2") == 75
    assert called.pop()[2][3:5] == ["output_dir=../out", "data.path=../pictures #2"]


@pytest.mark.slow
def test_moved_and_changed_runs_resume_on_the_same_data_only(here, encoder_folder, in_this_process, monkeypatch, capfd):
    captioned_folder(here / "pics", 8)
    arguments = ["pics", "--encoder", encoder_folder, "--resolution", 16, "-o", "out"]
    assert call(monkeypatch, *arguments, overrides=SMALL + NARROW) == 0
    (here / "elsewhere" / "pics").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    capfd.readouterr()
    assert call(monkeypatch, "--resume", "../out", "--set", "train.max_steps=3") == 0
    out = capfd.readouterr().out
    assert f"the run was started in {here}, and its relative paths are read from there" in out
    assert len(losses(here / "out")) == 3
    assert load_config(here / "out" / "config.yaml", [], LDMConfig).data.path == "pics"
    draw = next(line for line in out.splitlines() if line.startswith("generate:"))
    assert (here / draw.split("--model ")[1]).is_dir()
    # The project was moved: relative paths are read from where they are now. What is printed goes on as typed.
    (here / "moved").mkdir()
    (here / "pics").rename(here / "moved" / "pics")
    (here / "out").rename(here / "moved" / "my run's #1")
    monkeypatch.chdir(here / "moved")
    program, subcommand, *typed = shlex.split(resume_command(Path("my run's #1")))
    assert (program, subcommand) == ("ldm", "train")
    assert call(monkeypatch, *typed, "--set", "train.max_steps=4") == 0
    run = here / "moved" / "my run's #1"
    assert len(losses(run)) == 4
    # The data was moved: its path may be said anew, as what is in it is the same. Other data is refused.
    (here / "moved" / "pics").rename(here / "pictures #2")
    assert call(monkeypatch, *typed, "--set", "data.path=../pictures #2", "train.max_steps=5") == 0
    assert len(losses(run)) == 5
    (here / "pictures #2" / "0.txt").write_text("something else")
    assert call(monkeypatch, *typed, "--set", "train.max_steps=6") == 2
    assert "1 changed (0.png)" in capfd.readouterr().err
    (here / "pictures #2" / "0.txt").write_text("noise number 0")
    assert call(monkeypatch, *typed, "--set", "train.learning_rate=0.5", "train.max_steps=6") == 2
    assert "train.learning_rate: " in capfd.readouterr().err
    assert len(losses(run)) == 5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--minutes", "5"], "--set train.max_steps=N"),
        (["--minutes", "30"], "--minutes is for a new run"),
        (["--plan"], "--plan is for a new run"),
        (["-o", "other"], "--output is for a new run"),
        (["--resolution", "16"], "--resolution is for a new run"),
        (["--start-from", "scenes-64"], "--start-from is for a new run"),
        (["--method", "lora"], "--method is for a new run"),
        (["--encoder", "minilm"], "--encoder is for a new run"),
        (["--image-column", "x"], "--image-column is for a new run"),
        (["--caption-column", "x"], "--caption-column is for a new run"),
        (["--caption-source", "x"], "--caption-source is for a new run"),
        (["--set", "output_dir=other"], "--set output_dir names one"),
        (["--set", "train.max_stepps=3"], "did you mean train.max_steps?"),
        (["--set", "train.max_steps=0"], "max_steps is 0"),
        (["--set", "train.max_steps"], "is not of the form key=value"),
        (["folder"], "leave folder out"),
    ],
)
def test_options_of_new_runs_are_rejected_on_resume(arguments, part, here, monkeypatch, capfd):
    monkeypatch.setattr(auto, "run_script", lambda *arguments: pytest.fail("nothing may start"))
    (here / "run").mkdir()
    text = (ROOT / "configs" / "digits.yaml").read_text()
    (here / "run" / "config.yaml").write_text(text)
    assert call(monkeypatch, "--resume", "run", *arguments) == 2
    error = capfd.readouterr().err
    assert part in error and error.count("\n") == 1
    assert (here / "run" / "config.yaml").read_text() == text


def test_no_option_of_a_new_run_is_forgotten_when_one_is_resumed():
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(train_command).parameters}
    assert options - {"--path", "--settings", "--resume", "--accept"} == set(NEW_RUN_ONLY)


def test_several_values_follow_one_option_as_in_the_scripts(here, monkeypatch):
    seen = []
    monkeypatch.setattr(auto, "auto_train", lambda *arguments: seen.append(arguments) or 0)
    assert call(monkeypatch, "pics", "--set", "a.b=1", "c=2 #3", "-o", "x=y", "--set=d=4", "e=f=5") == 0
    ((data, options, settings, plan),) = seen
    assert (data, settings, plan) == ({"path": "pics"}, ["a.b=1", "c=2 #3", "d=4", "e=f=5"], False)
    assert options.output_dir == "x=y" and options.minutes == 30 and options.encoder == "minilm"
    assert call(monkeypatch, "--set", "a=1", "b=2", "pics") == 0
    assert seen[1][0] == {"path": "pics"} and seen[1][2] == ["a=1", "b=2"]
    assert call(monkeypatch, "--set", "a=1", "./b=2") == 0
    assert seen[2][0] == {"path": "./b=2"}
    assert call(monkeypatch, "--set", "a=1", "--", "b=2") == 0
    assert seen[3][0] == {"path": "b=2"}
    monkeypatch.setattr(auto, "resume_run", lambda *arguments: seen.append(arguments) or 0)
    assert call(monkeypatch, "--resume", "~/run", "--accept", "data", "code", "--set", "a=1", "b=2") == 0
    assert seen[4] == (Path("~/run").expanduser(), ["data", "code"], ["a=1", "b=2"])


def test_accept_is_for_runs_that_are_resumed(here, monkeypatch, capfd):
    captioned_folder(here / "data", 4)
    assert call(monkeypatch, "data", "--accept", "code") == 2
    assert "it needs --resume" in capfd.readouterr().err
