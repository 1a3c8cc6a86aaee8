"""From options to a finished run, in this order: config, data, resolved config, run, loop.

Exit codes of a script: 0 done; 2 one line says what is wrong; 75 stopped by a signal, and saved; 1 an internal error,
with its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.config import AutoencoderTrainingConfig, LDMConfig, read_config
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig, split
from ldm.data.composer import Composer
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from ldm.progress import printable
from ldm.training import train_autoencoder, train_ldm
from ldm.training.auto_config import resolve_config
from ldm.training.checkpoints import resume_command
from ldm.training.distributed import EXIT_CODE, Processes, Stopped, interruption, join_processes
from ldm.training.estimate import estimate_run
from ldm.training.evaluator import Evaluator
from ldm.training.report import read_metrics, write_report
from ldm.training.run import Hooks, Run, TrainingData

HOOKS = Hooks(resolve=resolve_config, estimate=estimate_run, evaluate=Evaluator, on_checkpoint=write_report)
CONFIGS = Path(__file__).parents[2] / "configs"  # of a checkout
MAX_SKIPPED_LINES = 10
Config = LDMConfig | AutoencoderTrainingConfig


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        folder: the run folder.
        export: the trained model: a pipeline folder, a LoRA, or an autoencoder.
        steps: number of steps done.
        metrics: the last value of each metric.
    """

    folder: Path
    export: Path
    steps: int
    metrics: dict[str, float]

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"TrainingResult({self.export}: {self.steps} steps; {values})"

    @classmethod
    def read(cls, folder: Path) -> TrainingResult:
        """The result of a run folder."""
        config = load_any_config(folder / "config.yaml")
        found = read_metrics(folder / "metrics.jsonl")
        export = config.export if isinstance(config, LDMConfig) else "autoencoder"
        latest = {name: points[-1][1] for name, points in found.values.items()}
        return cls(folder, folder / export, config.train.max_steps, latest)


def train(
    source: Config | str | Path,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    overrides: Sequence[str] = (),
    **options: Any,
) -> TrainingResult:
    """Train a model.

    Args:
        source: a config or the path of one (YAML): trained in this process. A folder of captioned images, or other
            data: as `ldm train`, with a config that is chosen automatically, in a process of its own. With `resume`, a
            run folder.
        resume: continue from the newest checkpoint.
        accept: with `resume`, keys that may differ from the stored run.
        overrides: "key=value" for the config, if `source` is no config.
        options: for data, those of `ldm.training.auto_config.TrainOptions`, such as `minutes=30`.

    Raises:
        ValueError: if config, data or options are wrong, or another process failed and printed why.
        Stopped: if a signal stopped the run; it is saved.
    """
    if accept and not resume:
        raise ValueError(f"accept is {list(accept)}, keys that may differ from a resumed run; it needs resume=True")
    path = None if isinstance(source, Config) else Path(source).expanduser()
    if path is None or path.suffix in (".yaml", ".yml"):
        if options:
            raise ValueError(f"{', '.join(options)} choose a config for data; change a given config by its keys")
        if path is None and overrides:
            raise ValueError("overrides are for the path of a config or for data; change the config object")
        config = source if isinstance(source, Config) else load_any_config(Path(source).expanduser(), overrides)
        return run_training(config, resume=resume, accept=accept)
    from ldm.training.auto import auto_train, resume_run
    from ldm.training.auto_config import TrainOptions

    if resume:
        folder, code = path, resume_run(path, accept, overrides)
    else:
        folder = Path(options.pop("output_dir", f"runs/{path.name if path.is_dir() else path.stem}"))
        code = auto_train(
            {"path": str(source)}, TrainOptions(output_dir=str(folder), **options), overrides, plan_only=False
        )
    if code == EXIT_CODE:
        raise Stopped(f"{folder} is saved; continue with {resume_command(folder)}")
    if code:
        raise ValueError(f"training in {folder} ended with exit code {code}; its own message says why")
    return TrainingResult.read(folder)


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, of the kind that its keys say."""
    names = {field.name for field in dataclasses.fields(AutoencoderTrainingConfig)}
    own = names - {field.name for field in dataclasses.fields(LDMConfig)}
    kind: Any = LDMConfig if own.isdisjoint(read_config(path)) else AutoencoderTrainingConfig
    config: Config = load_config(path, overrides, kind)
    return config


def run_training(
    config: Config, *, resume: bool = False, accept: Sequence[str] = (), hooks: Hooks = HOOKS
) -> TrainingResult:
    """Train a model as a config says, in this process and those that were launched with it.

    Raises:
        ValueError, Stopped: as `train`.
    """
    processes = join_processes(config.train, Path(config.output_dir).expanduser())
    torch.manual_seed(config.seed)
    data = load_data(config, processes)
    if isinstance(config, LDMConfig) and hooks.resolve:
        config, reason = hooks.resolve(config, data.train, processes.device)
        if reason is not None:
            processes.print(f"space: {reason}")
        data = dataclasses.replace(data, space_reason=reason)
    run = Run(config, data, processes, resume=resume, accept=accept, on_checkpoint=hooks.on_checkpoint)
    if isinstance(config, LDMConfig):
        train_ldm.train_diffusion(config, run, hooks)
    else:
        train_autoencoder.train_autoencoder(config, run, hooks)
    return TrainingResult.read(run.folder)


def load_data(config: Config, processes: Processes) -> TrainingData:
    """The training and held-out images; logs what is used and skipped.

    Raises:
        ValueError: if there are none. Autoencoders need no captions.
    """
    settings: DataConfig = config.data
    captioned, log = isinstance(config, LDMConfig), processes.print
    is_main = processes.accelerator.is_main_process
    inspection = inspect(open_source(settings, captioned=captioned), settings, progress=is_main)
    report = dataset_report(inspection, settings)
    log(report.summary())
    for line in report.unused_captions() if captioned else ():
        log(f"  {line}")
    for skipped in inspection.skipped[:MAX_SKIPPED_LINES]:
        log(printable(f"  skipped {skipped.path}: {skipped.reason}"))
    if len(inspection.skipped) > MAX_SKIPPED_LINES:
        log(f"  … and {len(inspection.skipped) - MAX_SKIPPED_LINES} more: ldm data check {settings.path} --all")
    training, held_out = split(inspection.used, settings.held_out)
    composer = Composer(training, settings, config.seed) if settings.compose > 0 else None
    images = CaptionedImages(training, settings, config.seed, batch_size=config.train.batch_size, composer=composer)
    sizes = images.buckets.sizes
    validation = CaptionedImages(held_out, settings, config.seed, sizes=sizes) if held_out else None
    if settings.bucketed:
        log(images.buckets.summary())
    return TrainingData(images, validation, report.to_dict())


def main(script: str) -> None:
    """The command line of a training script: "train_ldm" or "train_autoencoder"."""
    description = (train_ldm if script == "train_ldm" else train_autoencoder).__doc__
    default = CONFIGS / ("digits.yaml" if script == "train_ldm" else "digits-first-stage.yaml")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=default if default.is_file() else None,
        required=not default.is_file(),
        help=f"YAML file (default in a checkout: configs/{default.name})",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. train.max_steps=500"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint")
    parser.add_argument(
        "--accept",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="with --resume, keys that may differ from the resumed run, e.g. train.learning_rate data code",
    )
    arguments = parser.parse_args()
    if arguments.accept and not arguments.resume:
        parser.error("--accept lists what may differ from a resumed run; it needs --resume")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may use any script, terminals may not
    run, code, line = Path(), 2, ""
    is_distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        with interruption.handle_signals():
            kind: Any = LDMConfig if script == "train_ldm" else AutoencoderTrainingConfig
            config: Config = load_config(arguments.config, arguments.set, kind)
            run = Path(config.output_dir).expanduser()
            result = run_training(config, resume=arguments.resume, accept=arguments.accept)
    except (ValueError, OSError) as error:
        # An error of a loader's worker arrives with its whole traceback; the last line is the message.
        line = f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}"
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith("DataLoader worker (pid"):
            line = (
                f"error: a process that loads images has died ({reason}), usually for lack of memory, also in /dev/shm;"
                f" lower train.num_workers and resume with {resume_command(run)} --set train.num_workers=0"
            )
        elif is_distributed and "onnection" in reason:  # torch reports that another process has died
            line = f"error: another process of this run has ended ({reason}); its own message says why"
        else:
            raise
    except Stopped as stopped:
        again = resume_command(run) if arguments.resume else "the same command"
        nothing_lost = "nothing was lost: no step was made since the newest checkpoint, and the cache is complete"
        code, line = EXIT_CODE, f"stopped: {str(stopped) or f'{nothing_lost}; continue with {again}'}"
        if is_distributed:  # the launcher ends the others once the first process ends
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if line:
        for progress in list(getattr(tqdm, "_instances", ())):  # below the open progress bars
            progress.close()
        print(line, file=sys.stderr, flush=True)
        sys.exit(code)
    print(f"done: {result.export}", flush=True)
