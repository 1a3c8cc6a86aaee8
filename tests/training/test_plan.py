"""The plan of a run: what it foresees is what happens."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, split
from ldm.data.layouts import open_source
from ldm.progress import format_duration
from ldm.training import estimate as timing
from ldm.training.checkpoints import TrainingState
from ldm.training.estimate import MEASURED_RUNS, Costs, count_due, expected_result, format_bytes, make_plan
from ldm.training.run import Hooks, TrainingData
from ldm.training.trainable import make_optimizer
from tests.training.runs import ROOT, captioned_folder, run_autoencoder, run_config, settings

DIGITS = ROOT / "configs" / "digits.yaml"


@pytest.mark.parametrize(("first", "last", "every"), [(0, 10, 5), (0, 10, 3), (4, 10, 3), (6, 10, 3), (10, 10, 3)])
def test_what_is_due_is_counted_as_the_run_counts(first, last, every):
    happens = [step for step in range(first + 1, last + 1) if step % every == 0 or step == last]
    assert count_due(first, last, every) == len(happens)


def test_words_for_numbers():
    seconds = (1, 89, 90, 3600, 3600 * 3 + 305)
    assert [format_duration(s) for s in seconds] == ["1 s", "89 s", "2 min", "60 min", "3 h 05 min"]
    assert [format_bytes(b) for b in (10, 12.4e6, 3.44e9)] == ["1 MB", "12 MB", "3.4 GB"]


def digits(*overrides):
    config = load_config(DIGITS, list(overrides), LDMConfig)
    training, held_out = split(open_source(config.data).samples, 0.1)
    return config, CaptionedImages(training, config.data, 0), CaptionedImages(held_out, config.data, 0)


def test_a_plan_adds_up():
    every = [
        "train.max_steps=1000",
        "train.batch_size=64",
        "train.validate_every=100",
        "train.sample_every=250",
        "train.checkpoint_every=300",
    ]
    config, images, held_out = digits(*every, "train.keep_checkpoints=3")
    model = nn.Linear(9, 10)
    model.bias.requires_grad_(False)
    costs = Costs(
        step=0.1, validation=1.0, grid=10.0, checkpoint=100.0,
        memory=7, checkpoint_bytes=10**6, grid_bytes=10**4, once_bytes=50,
    )  # fmt: skip
    run = SimpleNamespace(
        config=config, data=TrainingData(images, held_out, {}), step=200, device=torch.device("cpu"), threads=None
    )
    plan = make_plan(run, SimpleNamespace(model=model, adversary=None), "here", costs)
    assert plan.expected_seconds == pytest.approx(800 * 0.1 + 8 * 1 + 4 * 10 + 4 * 100)
    assert plan.disk_bytes == 3 * 10**6 + 50 + 4 * (2 * 10**4) + 4 * 10**4 * 4 // 3
    assert (plan.parameters, plan.trained_parameters, plan.memory_bytes) == (100, 90, 7)
    assert plan.epochs == pytest.approx(1000 * 64 / 1621)
    text = plan.text()
    assert "1621 images to train on, 176 held out, 8x8 pixels" in text
    assert "0.0001 M parameters, 9e-05 M of them trainable" in text
    assert "25.3 steps per epoch; 1000 steps are 39.5 epochs or 64000 samples" in text
    assert "about 9 min; 0.1 s a step" in text
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["space"] == "here"


def test_what_to_expect_is_the_nearest_run_that_was_measured():
    runs = {run["name"]: run for run in json.loads(MEASURED_RUNS.read_text())}
    config, images, _ = digits("train.max_steps=1000")
    assert runs["configs/digits.yaml"]["result"] in expected_result(config, images)
    assert "expect less" not in expected_result(config, images)
    config, images, _ = digits("train.max_steps=100")
    assert "this run sees 10 times fewer samples: expect less" in expected_result(config, images)
    config, images, _ = digits("data.resolution=32")
    assert "no run of this kind (new, pixel) on 32 pixels" in expected_result(config, images)
    latent = dataclasses.replace(config, space="latent", first_stage="openmoji-first-stage")
    assert runs["configs/digits-latent.yaml"]["result"] in expected_result(latent, images)
    stage = load_config(ROOT / "configs" / "openmoji-first-stage.yaml", [], AutoencoderTrainingConfig)
    assert runs["configs/openmoji-first-stage.yaml"]["result"] in expected_result(stage, images)
    tuned = dataclasses.replace(stage, autoencoder=None, start_from="openmoji-first-stage", trained="decoder")
    assert "no run of this kind (first stage from another)" in expected_result(tuned, images)
    coded = load_config(ROOT / "configs" / "openmoji-first-stage-vq.yaml", [], AutoencoderTrainingConfig)
    assert "no run of this kind (first stage with a codebook)" in expected_result(coded, images)
    for run in runs.values():
        assert run["kind"] in ("new", "fine-tuning", "first stage") and run["result"]
        assert all(math.isfinite(math.log(run[key])) for key in ("images", "resolution", "samples"))


def test_a_sample_grid_is_foreseen_from_short_ones(monkeypatch):
    clock, drawn = [0.0], []

    def draw(steps):
        drawn.append(steps)
        clock[0] += 0.3 + 0.05 * steps + (0.2 if len(drawn) == 1 else 0)  # the first does more

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.grid_seconds(draw, 50) == pytest.approx(0.3 + 0.05 * 50)
    assert drawn == [1, 1, 3]
    assert timing.grid_seconds(draw, 1) == pytest.approx(0.35)


def test_a_disk_that_takes_a_part_alone_is_an_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write 17 MB: File too large") as caught:
            timing.write_seconds(tmp_path, 1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path)


def test_moments_are_foreseen_until_they_are_there():
    config, _, _ = digits()
    model = nn.Linear(10**4, 3000)  # 30 M parameters, 120 MB
    networks = TrainingState(model=model, optimizer=make_optimizer(model, config.train), ema=None)
    run = type("OnTheCPU", (), {"device": torch.device("cpu")})()
    model(torch.ones(1, 10**4)).sum().backward()
    so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert timing.peak_memory(run, networks) - so_far == pytest.approx(8 * networks.trainable_parameters, abs=2**20)
    networks.optimizer.step()
    so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert timing.peak_memory(run, networks) - so_far == pytest.approx(0, abs=2**20)


# A run in a process of its own, whose peak of memory is that of the run. Seconds are those of the processor: other
# programs on the machine do not count, and with one thread nothing else differs.
MEASURED = """
import json, resource, sys, time
time.perf_counter = time.process_time
from pathlib import Path
import torch
from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.config.overrides import load_config
from ldm.training.launch import run_training
torch.set_num_threads(1)
config = load_config(Path(sys.argv[1]), sys.argv[2:], LDMConfig)
run_training(config)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}))
"""


def arguments_of(kind, folder, stable_diffusion):
    often = ["train.cpu_threads=1", f"output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"]
    if kind == "lora":
        data = captioned_folder(folder / "data", 40)
        often += [f"start_from={stable_diffusion}", f"data.path={data}", "data.resolution=16", "train.max_steps=150"]
        return [str(ROOT / "configs" / "lora.yaml"), *often, "train.checkpoint_every=50", "train.sample_every=75"]
    often += ["train.max_steps=60", "train.checkpoint_every=20", "train.validate_every=20", "train.sample_every=30"]
    often += ["unet.block_out_channels=[16,32]", "unet.norm_num_groups=8"]
    often += [
        "text.max_length=null",
        "sample.num_inference_steps=20",
        "train.batch_size=32",
        "sample.images_per_prompt=1",
    ]
    if kind == "latent":
        run_autoencoder(folder / "first")
        often += [f"first_stage={folder / 'first' / 'autoencoder'}", "data.resolution=16"]
    return [str(ROOT / "configs" / ("digits-latent.yaml" if kind == "latent" else "digits.yaml")), *often]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixel", "lora", "latent"])
def test_time_disk_and_memory_are_what_was_foreseen(kind, tmp_path, stable_diffusion):
    # Even seconds of the processor vary when other programs share its caches, so a run may be tried again.
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        plan, peak, printed = measured_run(kind, folder, stable_diffusion)
        files = {path.stat().st_ino: path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()}
        assert plan["disk_bytes"] == pytest.approx(sum(files.values()), rel=0.3)
        assert plan["memory_bytes"] == pytest.approx(peak, rel=0.3)
        assert f"planned were {format_duration(plan['expected_seconds'])}" in printed
        assert plan["took_seconds"] > 1
        ratio = plan["expected_seconds"] / plan["took_seconds"]
        if abs(ratio - 1) <= 0.3:
            return
    raise AssertionError(f"planned {plan['expected_seconds']} s, took {plan['took_seconds']} s, the third time too")


def measured_run(kind, folder, stable_diffusion):
    """(plan.json, peak of memory in bytes, what was printed) of a run in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), *arguments_of(kind, folder, stable_diffusion)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads((folder / "run" / "plan.json").read_text())
    return plan, json.loads(done.stdout.splitlines()[-1])["peak"], done.stdout


def test_a_plan_changes_nothing_of_the_run(tmp_path, encoder_folder):
    """Weights after two steps are those of a run that measures nothing beforehand."""
    from tests.training.runs import digests, run_ldm

    run_ldm(settings(tmp_path / "with", encoder_folder), "unet.dropout=0.2", "train.max_steps=2")
    run_ldm(settings(tmp_path / "without", encoder_folder), "unet.dropout=0.2", "train.max_steps=2", hooks=Hooks())
    last = "checkpoints/step_00000002"
    assert digests(tmp_path / "with" / last) == digests(tmp_path / "without" / last)


def test_the_plan_stands_in_the_run_folder_and_names_what_learns(tmp_path, stable_diffusion, capsys):
    data = captioned_folder(tmp_path / "data", 9)
    run_config(
        {
            "output_dir": str(tmp_path / "run"),
            "start_from": str(stable_diffusion),
            "finetune": {"method": "attention"},
            "data": {"path": str(data), "resolution": 16},
            "train": {"max_steps": 2, "batch_size": 2, "cpu_threads": 1},
            "sample": {"prompts": ["a"], "images_per_prompt": 1, "num_inference_steps": 2},
        }
    )
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert 0 < plan["trained_parameters"] < plan["parameters"]
    printed = capsys.readouterr().out
    assert f"that of {stable_diffusion}, attention fine-tuning" in printed
    assert "took " in printed and ", planned were " in printed
