"""The command line of the training scripts, and their exit codes.

0: done. 2: one line says what is wrong. 75: stopped by a signal, and saved. 1: an internal error, with its traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ldm.config import ConfigT, load_config
from ldm.training.checkpoints import resume_command
from ldm.training.interruption import EXIT_CODE, Stopped, interruption


def main(train: Callable[..., Path], kind: type[ConfigT], default_config: Path, description: str) -> None:
    """Parse the arguments, validate the config and run `train(config, resume, accept)`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config", type=Path, default=default_config, help=f"YAML file (default: configs/{default_config.name})"
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
    run = Path()
    try:
        with interruption.handle_signals():
            config = load_config(arguments.config, arguments.set, kind)
            run = Path(config.output_dir).expanduser()
            result = train(config, arguments.resume, arguments.accept)
    except (ValueError, OSError) as error:
        # An error of a loader's worker arrives with its whole traceback; the last line is the message.
        _print_last(f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}")
        sys.exit(2)
    except RuntimeError as error:
        message = _lost_process_message(str(error), run)
        if message is None:
            raise
        _print_last(f"error: {message}")
        sys.exit(2)
    except Stopped as stopped:
        message = (
            str(stopped)
            or "nothing was lost: no step was made since the newest checkpoint, and the cache is complete; continue "
            f"with {resume_command(run) if arguments.resume else 'the same command'}"
        )
        _print_last(f"stopped: {message}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the launcher ends the others once the first process ends
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(EXIT_CODE)
    print(f"done: {result}", flush=True)


def _lost_process_message(error: str, run: Path) -> str | None:
    """A message if torch reports that another process of the run has died, or None."""
    reason = error.strip().partition("\n")[0]
    if reason.startswith("DataLoader worker (pid"):
        return (
            f"a process that loads images has died ({reason}), usually for lack of memory, also in /dev/shm; lower "
            f"train.num_workers and resume with {resume_command(run)} --set train.num_workers=0"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "onnection" in reason:
        return f"another process of this run has ended ({reason}); its own message says why"
    return None


def _print_last(line: str) -> None:
    """Print a line below the open progress bars."""
    for progress in list(getattr(tqdm, "_instances", ())):
        progress.close()
    print(line, file=sys.stderr, flush=True)
