"""`ldm train`: a folder of captioned images to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ldm import disk
from ldm.cli.arguments import CaptionColumn, CaptionSource, ImageColumn

MINUTES, ENCODER = 30.0, "minilm"
# Options of new runs, and what to do instead with --resume.
FIXED = "a run cannot change it; leave it out, or start a new run"
NEW_RUN_ONLY = {
    "--output": "leave it out; a run folder may be moved while nothing runs in it",
    "--minutes": "its length is set in steps, --set train.max_steps=N",
    "--resolution": FIXED,
    "--start-from": FIXED,
    "--method": FIXED,
    "--encoder": FIXED,
    "--image-column": FIXED,
    "--caption-column": FIXED,
    "--caption-source": FIXED,
    "--plan": "its plan is plan.json in the run folder, and its config config.yaml; leave it out",
}


def train_command(
    path: Annotated[
        str | None, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set on the hub.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The run folder; runs/NAME by default.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"About how long training may take; {MINUTES} by default.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; chosen by default.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="A model to fine-tune: a pipeline folder or hub id; a new one by default.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="With --start-from: full, attention or lora.")] = None,
    encoder: Annotated[str | None, typer.Option(help=f"The text encoder of a new model; {ENCODER} by default.")] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_source: CaptionSource = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE for the config, instead of what is chosen; repeatable."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Choose a config, print it with the reasons, and stop.")] = False,
    resume: Annotated[str | None, typer.Option(help="The folder of a run to resume, instead of a new run.")] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="With --resume, keys that may differ from the stored run; repeatable."),
    ] = None,
) -> None:
    """Train a model on captioned images: inspect them, choose a config, give the reasons, and start."""
    from ldm.training.auto import auto_train, resume_run

    if resume is not None:
        if path is not None:
            raise ValueError(f"--resume {resume} continues on the data of that run; leave {path} out")
        given = {**locals(), "plan": plan or None}
        for option in NEW_RUN_ONLY:
            if given[option.removeprefix("--").replace("-", "_")] is not None:
                raise ValueError(
                    f"--resume {resume} continues that run, and {option} is for a new one; {NEW_RUN_ONLY[option]}"
                )
        raise typer.Exit(resume_run(disk.expand_user(resume), accept or [], settings or []))
    if accept:
        raise ValueError("--accept lists what may differ from a resumed run; it needs --resume")
    if path is None:
        raise ValueError("there is nothing to train on; name a folder of captioned images")
    minutes = MINUTES if minutes is None else minutes
    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes is {minutes}; it must be more than 0")
    if method is not None and (start_from is None or method not in ("full", "attention", "lora")):
        raise ValueError(f"--method is {method}; it is full, attention or lora, and needs --start-from")
    from ldm.training.auto_config import TrainOptions

    where = disk.expand_user(path).resolve()
    name = where.name if where.is_dir() else where.stem if where.exists() else path.replace("/", "-")
    options = TrainOptions(
        output_dir=output or f"runs/{name}",
        minutes=minutes,
        resolution=resolution,
        start_from=start_from,
        method=method,
        encoder=ENCODER if encoder is None else encoder,
    )
    columns = {"image_column": image_column, "caption_column": caption_column, "caption_source": caption_source}
    data = {"path": path} | {key: value for key, value in columns.items() if value is not None}
    raise typer.Exit(auto_train(data, options, settings or [], plan))
