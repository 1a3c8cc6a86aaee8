"""`ldm train FOLDER`: from a folder to a model, by the scripts in train/ and configs that anyone could write."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.checkpoint import find_pipeline
from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, to_yaml, with_overrides
from ldm.data import account_of, inspect, open_source
from ldm.data.captions import printable
from ldm.training.choose import FIRST_STAGE, Wishes, choose_config
from ldm.training.folder import check_new, open_folder
from ldm.training.saving import checkpoints
from ldm.training.space import DEFAULT_FIRST_STAGE
from ldm.training.threads import VARIABLES

REFUSED = 2  # the exit code of a script whose config or data is wrong
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
    draft = _draft(data, wishes, overrides)
    wishes = _heard(draft, wishes, overrides)
    if wishes.start_from is not None:
        find_pipeline(wishes.start_from)
    check_new(Path(wishes.output_dir).expanduser())
    inspection = inspect(open_source(draft.data), draft.data, progress=True)
    account = account_of(inspection, draft.data)
    print(account.line())
    for line in account.needs_attention:
        print(printable(f"  {line}"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = with_overrides({"data": data}, [override for override in overrides if override.startswith("data.")])["data"]
    given.pop("resolution", None)
    chosen = choose_config(inspection.used, given, wishes, device)
    for reason in chosen.reasons:
        print(reason)
    final = parse_config(with_overrides(chosen.config, overrides), LDMConfig, "the chosen config")
    stages, first = [("train_ldm.py", to_yaml(final))], None
    if chosen.first_stage is not None:
        first = parse_config(chosen.first_stage, AutoencoderTrainingConfig, "the chosen config")
        stages.insert(0, ("train_autoencoder.py", to_yaml(first)))
    if plan_only:
        for script, text in stages:
            print(f"\n# train/{script}\n{text}", end="")
        return 0
    if first is not None:  # from here on either folder knows its config, so that --resume finds what is left to do
        for config in (first, final):
            open_folder(Path(config.output_dir).expanduser(), config, 0, resume=False, damaged=[], say=print)()
    code = _run_stages(stages, begun=first is not None, threads=chosen.threads)
    if code == REFUSED and first is not None:
        for config in (first, final):
            _forget_unbegun(Path(config.output_dir).expanduser())
    if code == 0:
        _say_what_now(Path(wishes.output_dir).expanduser())
    return code


def _forget_unbegun(folder: Path) -> None:
    """Removes a run folder that holds its config and nothing else: what was refused leaves no trace."""
    if {path.name for path in folder.iterdir()} <= {"config.yaml", ".lock"}:
        shutil.rmtree(folder)


def _draft(data: dict[str, Any], wishes: Wishes, overrides: Sequence[str]) -> LDMConfig:
    """A config of what is known before anything is looked at, so that a wrong key or value costs no time."""
    content: dict[str, Any] = {
        "output_dir": wishes.output_dir,
        "data": {"resolution": 64 if wishes.resolution is None else wishes.resolution} | data,
        "train": {"max_steps": 10**9},  # whatever is said of steps fits: they are counted later
        "sample": {"prompts": ["a"]},
    }
    if wishes.start_from is not None:
        content["start_from"] = wishes.start_from
    # Keys of the network stand beside those that are chosen for it.
    content = with_overrides(content, [override for override in overrides if not override.startswith("unet.")])
    if content.get("start_from") is None:
        content = {"space": "auto", "unet": {}, "text": {"encoder": wishes.encoder}} | content
        if content["space"] == "latent" and content.get("first_stage") is None:
            content["first_stage"] = DEFAULT_FIRST_STAGE
    elif wishes.method is not None:
        content["finetune"] = {"method": wishes.method} | (content.get("finetune") or {})
    return parse_config(content, LDMConfig, "ldm train")


def _heard(draft: LDMConfig, wishes: Wishes, overrides: Sequence[str]) -> Wishes:
    """Wishes that are said with --set count as those with options of their own."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    return dataclasses.replace(
        wishes,
        output_dir=draft.output_dir,
        resolution=draft.data.resolution if "data.resolution" in keys else wishes.resolution,
        start_from=draft.start_from,
        method=draft.finetune.method if "finetune.method" in keys else wishes.method,
        encoder=draft.text.encoder,
        space=draft.space,
        first_stage=draft.first_stage,
        cpu_threads=draft.train.cpu_threads,
    )


def _run_stages(stages: Sequence[tuple[str, str]], *, begun: bool, threads: int | None) -> int:
    """Runs scripts with their configs one after the other; the exit code of the first that fails, or 0.

    Args:
        begun: the run folders are there already, with these configs.
        threads: see `run_script`.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as scratch:
        for script, text in stages:
            path = Path(scratch) / f"{script}.yaml"
            path.write_text(text, encoding="utf-8")
            folder = yaml.safe_load(text)["output_dir"]
            print(f"\ntrain/{script}, its config becomes {folder}/config.yaml", flush=True)
            code = run_script(script, ["--config", str(path), *(["--resume"] if begun else [])], threads)
            if code:
                return code
    return 0


def resume_run(folder: Path, accept: Sequence[str]) -> int:
    """Goes on with a run that was interrupted; returns the script's exit code."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no config.yaml, so it is no run to resume; name the folder of a run")
    content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    script = "train_autoencoder.py" if "autoencoder" in content else "train_ldm.py"
    unfinished = _own_first_stage(folder, content)
    if unfinished is not None:
        print(f"its first stage comes before, {unfinished}", flush=True)
        code = resume_run(unfinished, accept)
        if code:
            return code
    arguments = ["--config", str(folder / "config.yaml"), "--set", f"output_dir={folder}", "--resume"]
    code = run_script(script, [*arguments, *(["--accept", *accept] if accept else [])])
    if code == 0 and script == "train_ldm.py":
        _say_what_now(folder)
    return code


def _own_first_stage(folder: Path, content: dict[str, Any]) -> Path | None:
    """The run of the first stage that `train_folder` began with a run, while that has no checkpoint.

    One that is finished goes on too: where it was killed at its very end, its export is made again. One whose
    checkpoints someone has removed is taken as it is.
    """
    run = folder.with_name(f"{folder.name}{FIRST_STAGE}")
    stage = content.get("first_stage")
    if checkpoints(folder) or stage is None or Path(stage).expanduser().resolve() != (run / "autoencoder").resolve():
        return None
    thrown_away = (run / "autoencoder").is_dir() and not checkpoints(run)
    return run if (run / "config.yaml").is_file() and not thrown_away else None


def run_script(script: str, arguments: list[str], threads: int | None = None) -> int:
    """Runs a script of train/ in a process of its own; under `accelerate launch` where there are several GPUs.

    `threads` are those of a script that computes on the CPU; None leaves them to it.

    SIGTERM and SIGINT are passed on: the script saves where it is, and ends with a code that says so.
    """
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    names = [VARIABLES[0], *(name for name in VARIABLES[1:] if name in os.environ)]
    told = {} if threads is None else dict.fromkeys(names, str(threads))
    process = subprocess.Popen([*command, str(_find(script)), *arguments], env=os.environ | told)
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in signals}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # as a shell says that a signal has ended it


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
    prompt = shlex.quote(printable(config["sample"]["prompts"][0]))
    sheets = sorted((folder / "samples").glob("step_*.png"))
    print(f"pictures: {sheets[-1]}" if sheets else "no sample grid was drawn")
    print(f"report:   {folder / 'report.html'}")
    if (folder / "pipeline").is_dir():
        print(f"draw:     ldm generate {prompt} --model {folder / 'pipeline'}")
    else:
        print(f"draw:     ldm generate {prompt} --model {config['start_from']} --lora {folder / 'lora'}")
