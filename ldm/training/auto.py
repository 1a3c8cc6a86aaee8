"""`ldm train FOLDER`: choose a config, then run the training scripts."""

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
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, read_config, to_yaml
from ldm.config.overrides import load_config, with_overrides
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from ldm.hub import find_pipeline
from ldm.pipelines.pipeline import default_device
from ldm.progress import printable
from ldm.text.loading import OPEN_CLIP
from ldm.training.auto_config import DEFAULT_FIRST_STAGE, FIRST_STAGE_SUFFIX, TrainOptions, choose_config
from ldm.training.checkpoints import list_checkpoints, resume_command
from ldm.training.report import read_metrics
from ldm.training.run_folder import PATH_KEYS, START_FILE, check_new, is_relative_path, lock_folder, open_folder
from ldm.training.run_info import base_folder
from ldm.training.threads import THREAD_VARIABLES

PACKAGE_ROOT = Path(__file__).parents[2]
EXIT_INVALID = 2  # of a script whose config or data is wrong


def auto_train(data: dict[str, Any], options: TrainOptions, overrides: Sequence[str], plan_only: bool) -> int:
    """Inspect the data, choose a config, print the reasons, and train; returns the failed script's exit code, or 0.
    Raises ValueError if there is nothing to train on, or an option cannot be met.

    Args:
        data: keys of `data`, at least `path`.
        overrides: `key=value` for the config, which take precedence over what is chosen.
        plan_only: print the config instead of training.
    """
    # A config of what is known before the data is read, so that wrong keys and values are found at once.
    content: dict[str, Any] = {
        "output_dir": options.output_dir,
        "data": {"resolution": 64 if options.resolution is None else options.resolution} | data,
        "train": {"max_steps": 10**9},  # every other number of steps fits
        "sample": {"prompts": ["a"]},
    }
    if options.start_from is not None:
        content["start_from"] = options.start_from
    # Keys of the network go with those that will be chosen.
    content = with_overrides(content, [override for override in overrides if not override.startswith("unet.")])
    if content.get("start_from") is None:
        content = {"space": "auto", "unet": {}, "text": {"encoder": options.encoder}} | content
        if content["space"] == "latent" and content.get("first_stage") is None:
            content["first_stage"] = DEFAULT_FIRST_STAGE
    elif options.method is not None:
        content["finetune"] = {"method": options.method} | (content.get("finetune") or {})
    draft = parse_config(content, LDMConfig, "ldm train")
    keys = {override.partition("=")[0].strip() for override in overrides}
    options = dataclasses.replace(
        options,
        output_dir=draft.output_dir,
        resolution=draft.data.resolution if "data.resolution" in keys else options.resolution,
        start_from=draft.start_from,
        method=draft.finetune.method if "finetune.method" in keys else options.method,
        encoder=draft.text.encoder,
        space=draft.space,
        first_stage=draft.first_stage,
        cpu_threads=draft.train.cpu_threads,
        new_model=any(key.split(".")[0] in ("unet", "text", "schedule") for key in keys),
    )
    if options.start_from is not None:
        find_pipeline(options.start_from)
    check_new(Path(options.output_dir).expanduser())
    inspection = inspect(open_source(draft.data), draft.data, progress=True)
    report = dataset_report(inspection, draft.data)
    print(report.summary())
    for line in report.needs_attention:
        print(printable(f"  {line}"))
    device = default_device()
    data_overrides = [override for override in overrides if override.startswith("data.")]
    given = with_overrides({"data": data}, data_overrides)["data"]
    given.pop("resolution", None)
    chosen = choose_config(inspection.used, given, options, device, log=lambda reason: print(reason, flush=True))
    final = parse_config(with_overrides(chosen.config, overrides), LDMConfig, "the chosen config")
    stages, first = [("train_ldm", to_yaml(final))], None
    if chosen.first_stage is not None:
        first = parse_config(chosen.first_stage, AutoencoderTrainingConfig, "the chosen config")
        stages.insert(0, ("train_autoencoder", to_yaml(first)))
    if plan_only:
        for script, text in stages:
            print(f"\n# train/{script}.py\n{text}", end="")
        return 0
    if first is not None:  # both folders store their config now, so that --resume finds what is left to do
        for config in (first, final):
            open_folder(Path(config.output_dir).expanduser(), config, 0, resume=False, damaged=[], log=print)()
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as scratch:
        for script, text in stages:
            path, folder = Path(scratch) / f"{script}.yaml", yaml.safe_load(text)["output_dir"]
            path.write_text(text, encoding="utf-8")
            print(f"\ntrain/{script}.py, its config becomes {folder}/config.yaml", flush=True)
            arguments = ["--config", str(path), *(["--resume"] if first is not None else [])]
            code = run_script(script, arguments, chosen.threads)
            if code:
                break
    if code == EXIT_INVALID and first is not None:
        for config in (first, final):
            remove_empty_run(Path(config.output_dir).expanduser())
    elif code and first is not None:  # each script mentions only its own run
        print(f"continue both with {resume_command(Path(final.output_dir).expanduser())}", file=sys.stderr)
    if code == 0:
        _print_next_steps(Path(options.output_dir).expanduser())
    return code


def remove_empty_run(folder: Path) -> None:
    """Remove a run folder that holds only its config, unless another process has locked it."""
    if not folder.is_dir():
        return
    try:
        unlock = lock_folder(folder)
    except ValueError:
        return
    if {path.name for path in folder.iterdir()} <= {"config.yaml", START_FILE, ".lock"}:
        shutil.rmtree(folder)
    unlock()


def resume_run(folder: Path, accept: Sequence[str], overrides: Sequence[str] = ()) -> int:
    """Resume a run from any working directory; returns the script's exit code. Raises ValueError if it is no run, or
    the overrides (`key=value`) do not fit it. Those of `data.` apply to its unfinished first stage too.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.yaml, so it is no run to resume; name the folder of a run")
    content = read_config(path)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "output_dir" in keys:
        raise ValueError(
            f"--resume {folder} continues in that folder, and --set output_dir names one; leave it out (a run folder "
            "may be moved while nothing runs in it)"
        )
    here, base = Path.cwd(), base_folder(folder, content, keys)
    if base == here:
        return _resume(folder, content, accept, overrides)
    print(f"the run was started in {base}, and its relative paths are read from there", flush=True)
    settings = []
    for override in overrides:  # what is a file or folder in the working directory gets an absolute path
        key, _, value = override.partition("=")
        is_path = key.strip() in PATH_KEYS and not value.startswith(OPEN_CLIP) and is_relative_path(value, here)
        settings.append(f"{key}={Path(value).absolute()}" if is_path else override)
    folder = folder.absolute()
    with chdir(base):
        return _resume(folder, content, accept, settings)


def _resume(folder: Path, content: dict[str, Any], accept: Sequence[str], overrides: Sequence[str]) -> int:
    is_first_stage = not {"autoencoder", "vq"}.isdisjoint(content)
    kind: Any = AutoencoderTrainingConfig if is_first_stage else LDMConfig
    settings = [f"output_dir={folder}", *overrides]
    load_config(folder / "config.yaml", settings, kind)  # validates the overrides before anything starts
    # The first-stage run that `auto_train` began with this run, if this run has no checkpoint yet. A finished one is
    # resumed too: if it was killed at its very end, its export is written again. One without checkpoints, which
    # someone removed, is left alone.
    run = folder.with_name(f"{folder.name}{FIRST_STAGE_SUFFIX}")
    own, stage = run / "autoencoder", content.get("first_stage")
    is_own = stage is not None and Path(stage).expanduser().resolve() == own.resolve()
    is_left = (run / "config.yaml").is_file() and (list_checkpoints(run) or not own.is_dir())
    if is_own and is_left and not list_checkpoints(folder):
        print(f"its first stage comes before, {run}", flush=True)
        code = resume_run(run, accept, [entry for entry in overrides if entry.lstrip().startswith("data.")])
        if code:
            return code
    script = "train_autoencoder" if is_first_stage else "train_ldm"
    arguments = ["--config", str(folder / "config.yaml"), "--set", *settings, "--resume"]
    code = run_script(script, [*arguments, *(["--accept", *accept] if accept else [])])
    if code == 0 and script == "train_ldm":
        _print_next_steps(folder)
    return code


def run_script(script: str, arguments: list[str], threads: int | None = None) -> int:
    """Run a training module in a process of its own, by `accelerate launch` if there are several GPUs. `threads` is for
    the CPU; None lets it decide.

    SIGTERM and SIGINT are passed on: the script saves its state and exits with a code of its own.
    """
    command = [sys.executable, "-m"]
    if torch.cuda.device_count() > 1:
        command += ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "-m"]
    names = [THREAD_VARIABLES[0], *(name for name in THREAD_VARIABLES[1:] if name in os.environ)]
    variables: dict[str, str] = {} if threads is None else dict.fromkeys(names, str(threads))
    # The same package as here, and no file of the working folder that is named like one of a library.
    variables["PYTHONSAFEPATH"] = "1"
    if PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen([*command, f"ldm.training.{script}", *arguments], env=os.environ | variables)
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in signals}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # the convention of shells for signals


def _print_next_steps(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    prompt = shlex.quote(printable(config["sample"]["prompts"][0]))
    grids = sorted((folder / "samples").glob("step_*.png"))
    verdict = read_metrics(folder / "metrics.jsonl").verdict
    if verdict is not None and verdict[1].kind == "not yet a model of this data":
        print(
            "result:   this is no model of these images yet: what it generates is as close to them as noise or mean "
            "colors are. Train longer, use more images, or fine-tune a model that knows such images (--start-from)"
        )
    print(f"samples:  {grids[-1]}" if grids else "no sample grid was written")
    print(f"report:   {folder / 'report.html'}")
    if (folder / "pipeline").is_dir():
        print(f"generate: ldm generate {prompt} --model {shlex.quote(str(folder / 'pipeline'))}")
    else:
        model, lora = config["start_from"], shlex.quote(str(folder / "lora"))
        if folder.is_absolute() and is_relative_path(model, Path.cwd()):  # the command may be run in another folder
            model = str(Path(model).absolute())
        print(f"generate: ldm generate {prompt} --model {shlex.quote(model)} --lora {lora}")
