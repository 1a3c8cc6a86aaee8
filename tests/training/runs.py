"""Runs of the training scripts in this process, on tiny networks, and what can be read from their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config
from ldm.config.overrides import load_config
from ldm.training.launch import HOOKS, run_training
from ldm.training.run import Hooks

ROOT = Path(__file__).parents[2]


def fresh_processes() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def autoencoder_settings(folder: Path) -> list[str]:
    return [
        f"output_dir={folder}", "data.resolution=16", "autoencoder.block_out_channels=[8,8,8]", "train.max_steps=2",
        "train.batch_size=8", "train.validation_samples=8", "train.log_every=1", "autoencoder.norm_num_groups=4",
        "train.cpu_threads=1",
    ]  # fmt: skip


def run_autoencoder(
    folder: Path, *overrides: str, resume: bool = False, accept: Sequence[str] = (), hooks: Hooks = HOOKS
) -> Path:
    fresh_processes()
    path = ROOT / "configs" / "digits-first-stage.yaml"
    config = load_config(path, [*autoencoder_settings(folder), *overrides], AutoencoderTrainingConfig)
    return run_training(config, resume=resume, accept=accept, hooks=hooks).export


def settings(folder: Path, encoder_folder: Path, space: str = "pixel", first_stage: Path | None = None) -> list[str]:
    small = [
        f"output_dir={folder}", f"text.encoder={encoder_folder}", "text.max_length=null", "unet.norm_num_groups=4",
        "unet.block_out_channels=[8,8]", "unet.attention_head_dim=2", "train.max_steps=4", "train.batch_size=8",
        "train.checkpoint_every=2", "train.validate_every=2", "train.validation_samples=8", "train.log_every=1",
        "train.sample_every=4", "sample.images_per_prompt=1", "sample.num_inference_steps=2",
        "sample.prompts=[a handwritten three, the digit 4]", "train.cpu_threads=1",
    ]  # fmt: skip
    if space == "latent":
        small += ["space=latent", f"first_stage={first_stage}/autoencoder", "data.resolution=16"]
        small += ["schedule.beta_schedule=scaled_linear", "schedule.prediction_type=epsilon"]
    return small


def run_ldm(
    arguments: list[str], *overrides: str, resume: bool = False, accept: Sequence[str] = (), hooks: Hooks = HOOKS
) -> Path:
    fresh_processes()
    config = load_config(ROOT / "configs" / "digits.yaml", [*arguments, *overrides], LDMConfig)
    return run_training(config, resume=resume, accept=accept, hooks=hooks).export


def run_config(content: dict[str, Any], *, resume: bool = False) -> Path:
    """A run of a config that is given as a mapping."""
    fresh_processes()
    return run_training(parse_config(content, LDMConfig, "the test"), resume=resume).export


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(folder) if "loss" in entry]


def evaluations(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, the figures) of each evaluation of drawn pictures in the log."""
    lines = [line for line in metrics(folder) if any(key.startswith("evaluation_") for key in line)]
    return [(line.pop("step"), line) for line in lines]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "training").glob("*.safetensors")
    }


def captioned_folder(folder: Path, count: int, side: int = 16) -> Path:
    """Pictures of noise, each other than the next, with a caption each."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    return folder
