"""`ldm data`: checking data before training."""

from __future__ import annotations

from typing import Annotated

import typer

from ldm.cli.arguments import (
    AsJson,
    Background,
    CaptionColumn,
    CaptionSource,
    ImageColumn,
    options_of,
    print_json,
)

app = typer.Typer(help="Check data before training.", no_args_is_help=True)


@app.command("check")
def check_data_command(
    path: Annotated[str, typer.Argument(help="A folder, a file, or the id of a data set on the hub.")],
    resolution: Annotated[int, typer.Option(help="Resolution of the training, in pixels.")] = 64,
    encoder: Annotated[
        str | None, typer.Option(help="Text encoder that has to read the captions; minilm by default.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Maximum tokens of a caption; 32 by default, 48 for scenes.")
    ] = None,
    background: Background = "white",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_source: CaptionSource = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of the images that is not trained on.")] = 0.1,
    compose: Annotated[float, typer.Option(help="Fraction of samples composed of several images.")] = 0.0,
    as_json: AsJson = False,
    full: Annotated[bool, typer.Option("--all", help="Do not shorten lists.")] = False,
) -> None:
    """Print the contents and problems of a data set. Exit code 1 if something needs attention."""
    from ldm.api import check_data
    from ldm.data import DataConfig

    report = check_data(options_of(DataConfig, locals()), encoder=encoder, max_length=max_length)
    if as_json:
        print_json(report.to_dict())
    else:
        from ldm.report.data_text import report_text

        print(report_text(report, full=full))
    if report.needs_attention:
        raise typer.Exit(1)
