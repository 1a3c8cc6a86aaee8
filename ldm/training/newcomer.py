"""`ldm train FOLDER`: from a folder to a model, by the scripts in train/ and configs that anyone could write."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.config import AutoencoderTrainingConfig, LDMConfig, load_config, parse_config, to_yaml
from ldm.data import DataConfig, inspect, open_source
from ldm.data.account import account_of
from ldm.training.choose import Wishes, choose_config

SCRIPTS = Path(__file__).parents[2] / "train"


def train_folder(data: dict[str, Any], wishes: Wishes, overrides: Sequence[str], plan_only: bool) -> int:
    """Inspects, chooses, says why, and trains; returns the exit code of the script that failed, or 0.

    Args:
        data: keys of `data`, at least `path`.
        overrides: `key=value` for the config, which beat what is chosen.
        plan_only: stop before training, and print the config.

    Raises:
        ValueError: if there is nothing to train on, or a wish cannot be fulfilled.
    """
    _find("train_ldm.py")
    config = DataConfig(**{"resolution": wishes.resolution or 64} | data)
    inspection = inspect(open_source(config), config, progress=True)
    account = account_of(inspection, config)
    print(account.line())
    for line in account.needs_attention:
        print(f"  {line}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_config(inspection.used, data, wishes, device)
    for reason in chosen.reasons:
        print(reason)
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as scratch:
        stages = [("train_ldm.py", to_yaml(_overridden(chosen.config, overrides, Path(scratch))))]
        if chosen.first_stage is not None:
            first = parse_config(chosen.first_stage, AutoencoderTrainingConfig, "the chosen config")
            stages.insert(0, ("train_autoencoder.py", to_yaml(first)))
        if plan_only:
            for script, text in stages:
                print(f"\n# train/{script}\n{text}", end="")
            return 0
        for script, text in stages:
            path = Path(scratch) / f"{script}.yaml"
            path.write_text(text, encoding="utf-8")
            print(f"\ntrain/{script}, its config becomes {wishes.output_dir}/config.yaml", flush=True)
            code = run_script(script, ["--config", str(path)])
            if code:
                return code
    _say_what_now(Path(wishes.output_dir))
    return 0


def _overridden(content: dict[str, Any], overrides: Sequence[str], scratch: Path) -> LDMConfig:
    path = scratch / "chosen.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return load_config(path, overrides, LDMConfig)


def resume_run(folder: Path) -> int:
    """Goes on with a run that was interrupted; returns the script's exit code."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no config.yaml, so it is no run to resume; name the folder of a run")
    code = run_script("train_ldm.py", ["--config", str(folder / "config.yaml"), "--resume"])
    if code == 0:
        _say_what_now(folder)
    return code


def run_script(script: str, arguments: list[str]) -> int:
    """Runs a script of train/ in a process of its own; under `accelerate launch` where there are several GPUs."""
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    return subprocess.run([*command, str(_find(script)), *arguments]).returncode


def _find(script: str) -> Path:
    path = SCRIPTS / script
    if not path.is_file():
        raise ValueError(
            f"the training scripts are not installed beside the package ({path} is missing); clone the repository and "
            'install it with pip install -e "."'
        )
    return path


def _say_what_now(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    prompt = config["sample"]["prompts"][0]
    sheets = sorted((folder / "samples").glob("step_*.png"))
    print(f"pictures: {sheets[-1]}" if sheets else "no sample grid was drawn")
    print(f"report:   {folder / 'report.html'}")
    if (folder / "pipeline").is_dir():
        print(f'draw:     ldm generate "{prompt}" --model {folder / "pipeline"}')
    else:
        print(f'draw:     ldm generate "{prompt}" --model {config["start_from"]} --lora {folder / "lora"}')
