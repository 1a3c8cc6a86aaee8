"""The `ldm` command. Parses its arguments before it imports anything heavy."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import ldm
from ldm.cli.arguments import RepeatedOptionsCommand
from ldm.cli.commands import autoencoder_app, data_app, evaluate_command, generate, nll, train_command

app = typer.Typer(
    help="Turn captioned images into a text-to-image model, and text into images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command("train", cls=RepeatedOptionsCommand)(train_command)
app.command()(nll)
app.command("evaluate")(evaluate_command)
app.add_typer(data_app, name="data")
app.add_typer(autoencoder_app, name="autoencoder")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(ldm.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command; a ValueError is the user's, an OSError the disk's: one line and exit code 2. So is what does
    not fit into memory.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # captions may be in any script, terminals are not
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        from ldm.pipelines.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["MemoryError"])[0]
        print(f"error: memory ran out ({reason}); ask for less at a time, or smaller pictures", file=sys.stderr)
        sys.exit(2)
