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
from ldm.config import (
    AutoencoderTrainingConfig,
    LDMConfig,
    load_config,
    parse_config,
    read_config,
    to_yaml,
    with_overrides,
)
from ldm.data import dataset_report, inspect, open_source
from ldm.data.captions import printable
from ldm.pipelines.pipeline import default_device
from ldm.text.open_clip import PREFIX as OPEN_CLIP
from ldm.training.auto_config import FIRST_STAGE, TrainOptions, choose_config
from ldm.training.checkpoints import list_checkpoints
from ldm.training.run_folder import check_new, lock_folder, open_folder
from ldm.training.space import DEFAULT_FIRST_STAGE
from ldm.training.start_folder import PATHS, base_folder, is_relative_path, resume_command, working_directory
from ldm.training.start_folder import START_FILE as STARTED
from ldm.training.threads import THREAD_VARIABLES

REFUSED = 2  # the exit code of a script whose config or data is wrong
SCRIPTS = Path(__file__).parents[2] / "train"


def auto_train(data: dict[str, Any], options: TrainOptions, overrides: Sequence[str], plan_only: bool) -> int:
    """Inspects, chooses, says why, and trains; returns the exit code of the script that failed, or 0.

    Args:
        data: keys of `data`, at least `path`.
        overrides: `key=value` for the config, which beat what is chosen.
        plan_only: stop before training, and print the config.

    Raises:
        ValueError: if there is nothing to train on, or a wish cannot be fulfilled.
    """
    _find("train_ldm.py")
    draft = _draft(data, options, overrides)
    options = _apply_overrides(draft, options, overrides)
    if options.start_from is not None:
        find_pipeline(options.start_from)
    check_new(Path(options.output_dir).expanduser())
    inspection = inspect(open_source(draft.data), draft.data, progress=True)
    account = dataset_report(inspection, draft.data)
    print(account.summary())
    for line in account.needs_attention:
        print(printable(f"  {line}"))
    device = default_device()
    given = with_overrides({"data": data}, [override for override in overrides if override.startswith("data.")])["data"]
    given.pop("resolution", None)
    chosen = choose_config(inspection.used, given, options, device)
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
            _remove_empty_run(Path(config.output_dir).expanduser())
    elif code and first is not None:  # each script speaks of its own run
        print(f"go on with both: {resume_command(Path(final.output_dir).expanduser())}", file=sys.stderr)
    if code == 0:
        _print_next_steps(Path(options.output_dir).expanduser())
    return code


def _remove_empty_run(folder: Path) -> None:
    """Removes a run folder that holds its config and nothing else: what was refused leaves no trace."""
    if not folder.is_dir():
        return
    try:
        unlock = lock_folder(folder)
    except ValueError:  # another process has begun a run there
        return
    if {path.name for path in folder.iterdir()} <= {"config.yaml", STARTED, ".lock"}:
        shutil.rmtree(folder)
    unlock()


def _draft(data: dict[str, Any], options: TrainOptions, overrides: Sequence[str]) -> LDMConfig:
    """A config of what is known before anything is looked at, so that a wrong key or value costs no time."""
    content: dict[str, Any] = {
        "output_dir": options.output_dir,
        "data": {"resolution": 64 if options.resolution is None else options.resolution} | data,
        "train": {"max_steps": 10**9},  # whatever is said of steps fits: they are counted later
        "sample": {"prompts": ["a"]},
    }
    if options.start_from is not None:
        content["start_from"] = options.start_from
    # Keys of the network stand beside those that are chosen for it.
    content = with_overrides(content, [override for override in overrides if not override.startswith("unet.")])
    if content.get("start_from") is None:
        content = {"space": "auto", "unet": {}, "text": {"encoder": options.encoder}} | content
        if content["space"] == "latent" and content.get("first_stage") is None:
            content["first_stage"] = DEFAULT_FIRST_STAGE
    elif options.method is not None:
        content["finetune"] = {"method": options.method} | (content.get("finetune") or {})
    return parse_config(content, LDMConfig, "ldm train")


def _apply_overrides(draft: LDMConfig, options: TrainOptions, overrides: Sequence[str]) -> TrainOptions:
    """TrainOptions that are said with --set count as those with options of their own."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    return dataclasses.replace(
        options,
        output_dir=draft.output_dir,
        resolution=draft.data.resolution if "data.resolution" in keys else options.resolution,
        start_from=draft.start_from,
        method=draft.finetune.method if "finetune.method" in keys else options.method,
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


def resume_run(folder: Path, accept: Sequence[str], overrides: Sequence[str] = ()) -> int:
    """Goes on with a run that was interrupted, from wherever; returns the script's exit code.

    Args:
        overrides: `key=value` for the config. Those of `data.` hold for its first stage too, if that is unfinished.

    Raises:
        ValueError: if it is no run, or the overrides do not fit it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.yaml, so it is no run to resume; name the folder of a run")
    content = read_config(path)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "output_dir" in keys:
        raise ValueError(
            f"--resume {folder} goes on in that folder, and --set output_dir names one; leave it out (a run folder may "
            "be moved while nothing runs in it)"
        )
    here, base = Path.cwd(), base_folder(folder, content, keys)
    if base == here:
        return _resume(folder, content, accept, overrides)
    print(f"the run was started in {base}, and its relative paths are read from there", flush=True)
    settings = [_from_here(override) for override in overrides]
    folder = folder.absolute()
    with working_directory(base):
        return _resume(folder, content, accept, settings)


def _from_here(override: str) -> str:
    """An override whose value is a file or folder of the working folder, with that in front of it."""
    key, _, value = override.partition("=")
    is_path = key.strip() in PATHS and not value.startswith(OPEN_CLIP) and is_relative_path(value, Path.cwd())
    return f"{key}={Path(value).absolute()}" if is_path else override


def _resume(folder: Path, content: dict[str, Any], accept: Sequence[str], overrides: Sequence[str]) -> int:
    is_first_stage = not {"autoencoder", "vq"}.isdisjoint(content)
    kind: Any = AutoencoderTrainingConfig if is_first_stage else LDMConfig
    settings = [f"output_dir={folder}", *overrides]
    load_config(folder / "config.yaml", settings, kind)  # what is wrong with them is said before anything starts
    unfinished = _own_first_stage(folder, content)
    if unfinished is not None:
        print(f"its first stage comes before, {unfinished}", flush=True)
        code = resume_run(
            unfinished, accept, [override for override in overrides if override.lstrip().startswith("data.")]
        )
        if code:
            return code
    script = "train_autoencoder.py" if is_first_stage else "train_ldm.py"
    arguments = ["--config", str(folder / "config.yaml"), "--set", *settings, "--resume"]
    code = run_script(script, [*arguments, *(["--accept", *accept] if accept else [])])
    if code == 0 and script == "train_ldm.py":
        _print_next_steps(folder)
    return code


def _own_first_stage(folder: Path, content: dict[str, Any]) -> Path | None:
    """The run of the first stage that `auto_train` began with a run, while that has no checkpoint.

    One that is finished goes on too: where it was killed at its very end, its export is made again. One whose
    checkpoints someone has removed is taken as it is.
    """
    run = folder.with_name(f"{folder.name}{FIRST_STAGE}")
    stage = content.get("first_stage")
    if (
        list_checkpoints(folder)
        or stage is None
        or Path(stage).expanduser().resolve() != (run / "autoencoder").resolve()
    ):
        return None
    thrown_away = (run / "autoencoder").is_dir() and not list_checkpoints(run)
    return run if (run / "config.yaml").is_file() and not thrown_away else None


def run_script(script: str, arguments: list[str], threads: int | None = None) -> int:
    """Runs a script of train/ in a process of its own; under `accelerate launch` where there are several GPUs.

    `threads` are those of a script that computes on the CPU; None leaves them to it.

    SIGTERM and SIGINT are passed on: the script saves where it is, and ends with a code that says so.
    """
    command = [sys.executable]
    if torch.cuda.device_count() > 1:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    names = [THREAD_VARIABLES[0], *(name for name in THREAD_VARIABLES[1:] if name in os.environ)]
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


def _print_next_steps(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    prompt = shlex.quote(printable(config["sample"]["prompts"][0]))
    sheets = sorted((folder / "samples").glob("step_*.png"))
    print(f"pictures: {sheets[-1]}" if sheets else "no sample grid was drawn")
    print(f"report:   {folder / 'report.html'}")
    if (folder / "pipeline").is_dir():
        print(f"draw:     ldm generate {prompt} --model {shlex.quote(str(folder / 'pipeline'))}")
    else:
        model, lora = config["start_from"], shlex.quote(str(folder / "lora"))
        if folder.is_absolute() and is_relative_path(model, Path.cwd()):  # it may be read in another folder
            model = str(Path(model).absolute())
        print(f"draw:     ldm generate {prompt} --model {shlex.quote(model)} --lora {lora}")
