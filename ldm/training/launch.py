"""The command line of the two scripts, and how they end.

Exit code 0: done. 2: one line says what is wrong. 75: told to stop, and saved. 1: a fault of ours, with its traceback.
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

from ldm.config import C, load_config
from ldm.training.interruption import EXIT_CODE, Stopped, interruption
from ldm.training.start_folder import resume_command


def main(train: Callable[..., Path], kind: type[C], default_config: Path, description: str) -> None:
    """Parses the arguments, validates the config and runs `train(config, resume, accept)`."""
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
        help="with --resume, what may differ from the run that is continued, e.g. train.learning_rate data code",
    )
    arguments = parser.parse_args()
    if arguments.accept and not arguments.resume:
        parser.error("--accept says what may differ from a run that is continued; it needs --resume")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any script, terminals are not
    run = Path()
    try:
        with interruption.handled():
            config = load_config(arguments.config, arguments.set, kind)
            run = Path(config.output_dir).expanduser()
            result = train(config, arguments.resume, arguments.accept)
    except (ValueError, OSError) as error:
        # An error of a loader's worker process arrives as its whole traceback; the last line is the message.
        _say(f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}")
        sys.exit(2)
    except RuntimeError as error:
        lost = _lost_process(str(error), run)
        if lost is None:
            raise
        _say(f"error: {lost}")
        sys.exit(2)
    except Stopped as stopped:
        where = (
            str(stopped)
            or "nothing was lost: no step was made since the newest checkpoint, and what is encoded is kept; go on "
            f"with {resume_command(run) if arguments.resume else 'the same command'}"
        )
        _say(f"stopped: {where}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as the first process ends, the launcher ends the others
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(EXIT_CODE)
    print(f"done: {result}", flush=True)


def _lost_process(error: str, run: Path) -> str | None:
    """What to say if torch reports that another process of the run has died, which is no fault of this one; or None."""
    reason = error.strip().partition("\n")[0]
    if reason.startswith("DataLoader worker (pid"):
        return (
            f"a process that loads images has died ({reason}), most often for want of memory, in /dev/shm too; lower "
            f"train.num_workers and go on with {resume_command(run)} --set train.num_workers=0"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "onnection" in reason:
        return f"another process of this run has ended ({reason}); its own message says why"
    return None


def _say(line: str) -> None:
    """Prints the last line, below the progress bars that were left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(line, file=sys.stderr, flush=True)
