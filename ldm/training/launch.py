"""The command line of the two scripts, and how they fail: one line, exit code 2."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.config import C, load_config


def main(train: Callable[[C, bool], Path], kind: type[C], default_config: Path, description: str) -> None:
    """Parses the arguments, validates the config and runs `train(config, resume)`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config", type=Path, default=default_config, help=f"YAML file (default: configs/{default_config.name})"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="e.g. train.max_steps=500"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any script, terminals are not
    try:
        config = load_config(arguments.config, arguments.set, kind)
        result = train(config, arguments.resume)
    except (ValueError, OSError) as error:
        # An error of a loader's worker process arrives as its whole traceback; the last line is the message.
        print(f"error: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}", file=sys.stderr, flush=True)
        sys.exit(2)
    print(f"done: {result}", flush=True)
