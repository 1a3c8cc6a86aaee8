"""`ldm data`: looking at data before training on it."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="A folder, a file, or the id of a data set on the hub.")],
    resolution: Annotated[int, typer.Option(help="That you want to train at, in pixels.")] = 64,
    encoder: Annotated[
        str | None, typer.Option(help="The text encoder that captions have to fit into; minilm by default.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a caption that it reads; 32 by default, of scenes 48.")
    ] = None,
    background: Annotated[str, typer.Option(help="The colour behind transparent images.")] = "white",
    image_column: Annotated[str | None, typer.Option(help="The column with images; guessed by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; guessed by default.")] = None,
    caption_source: Annotated[
        str | None, typer.Option(help="Of several sources of captions, the one to use: see docs/data.md.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set that has several.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Its configuration, where it has several.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the images that training will never see.")] = 0.1,
    compose: Annotated[
        float, typer.Option(help="Share of the samples that training composes of several images.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Write the whole account as JSON.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Do not shorten lists.")] = False,
) -> None:
    """Say what is in a data set, and what is wrong with it. Exit code 1 when something needs attention."""
    from ldm.data import DataConfig, NoCaptionsError, dataset_report, inspect, open_source
    from ldm.text import load_text_encoder

    config = DataConfig(
        path=path,
        resolution=resolution,
        background=background,
        image_column=image_column,
        caption_column=caption_column,
        caption_source=caption_source,
        split=split,
        subset=subset,
        held_out=held_out,
        compose=compose,
    )
    truncated_words, uncounted = None, ""
    try:
        length = 48 if path == "scenes" else 32
        truncated_words = load_text_encoder(encoder or "minilm", length if max_length is None else max_length).lost
    except ValueError as error:
        if encoder is not None or max_length is not None:
            raise
        # Nobody asked for this one, and the images can be looked at where it is not installed.
        uncounted = str(error)
    try:
        source = open_source(config)
    except NoCaptionsError as error:  # what was skipped, and why, is what the account is for
        source = error.source
    inspection = inspect(source, config, progress=True, include_curated=True)
    account = dataset_report(inspection, config, truncated_words=truncated_words, uncounted=uncounted)
    if as_json:
        import json

        print(json.dumps(account.to_dict(), indent=2, allow_nan=False))
    else:
        print(account.to_text(full=everything))
    if account.needs_attention:
        raise typer.Exit(1)
