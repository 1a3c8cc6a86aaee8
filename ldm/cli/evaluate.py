"""`ldm evaluate`, `ldm autoencoder evaluate` and `ldm nll`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.arguments import (
    AsJson,
    Background,
    CaptionColumn,
    CaptionSource,
    Device,
    Guidance,
    HeldOut,
    ImageColumn,
    Samples,
    Steps,
    Weights,
    options_of,
    output_file,
    output_folder,
    print_json,
)

autoencoder_app = typer.Typer(help="First stages: autoencoders between images and latents.", no_args_is_help=True)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A run folder, a pipeline folder, or a hub id.")],
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="Captioned images: a folder, a file, or the id of a data set; not needed for a run.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Images to generate: half for captions of held-out images.")] = 256,
    features: Annotated[
        str, typer.Option(help="Image features: efficientnet, pixel, inception (FID) or clip.")
    ] = "efficientnet",
    weights: Weights = None,
    clip: Annotated[
        str | None, typer.Option(help="Also the CLIP score, by MODEL:TAG or MODEL:FILE.safetensors of open_clip.")
    ] = None,
    max_reference: Annotated[
        int, typer.Option("--reference", help="Maximum number of images of either side, chosen by --seed.")
    ] = 20000,
    held_out: Annotated[
        float | None, typer.Option(help="The fraction that training held out; read from a run, else 0.1.")
    ] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Annotated[int, typer.Option(help="Random seed for captions, noise and intervals.")] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try guidance scales and steps first, and use the best as defaults.")
    ] = False,
    sweep_guidance: Annotated[str, typer.Option(help="Guidance scales of --sweep.")] = "1,2,3,5,8",
    sweep_steps: Annotated[str, typer.Option(help="Numbers of steps of --sweep.")] = "5,10,20,50",
    sweep_samples: Annotated[int, typer.Option(help="Images for each of these.")] = 64,
    store: Annotated[bool, typer.Option(help="With --sweep: store the best as the defaults of the model.")] = True,
    axes: Annotated[
        bool, typer.Option("--axes", help="Instead, for a model of scenes: how it composes, by axis.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(help="With --axes: maximum prompts per axis; 100 by default, and all single things.")
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_source: CaptionSource = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the page, JSON and sheets; evaluation by default.")
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Generate images for captions of the data, and measure them against its images. Writes a page with the results.

    With --axes, for a model of scenes: how often single things, colors, relations, counts and combinations that were
    not in the training data are right, as axes.json and axes.png.
    """
    if axes and (sweep or path is not None):
        raise ValueError("--axes generates its own scenes with the stored defaults; leave DATA and --sweep out")
    if prompts is not None and not axes:
        raise ValueError("--prompts is for --axes; use --samples for captions of the data")
    from ldm import api
    from ldm.evaluation.sweep import SweepGrid

    swept = None
    if sweep:
        scales = _numbers("--sweep-guidance", sweep_guidance, float)
        grid = SweepGrid(tuple(scales), tuple(_numbers("--sweep-steps", sweep_steps, int)))
        swept = api.SweepOptions(grid=grid, samples=sweep_samples, store=store)
    options = options_of(api.EvaluationOptions, {**locals(), "sweep": swept})
    folder = output_folder("--output", api.evaluation_folder(model, output))

    def log(line: str) -> None:  # warnings, and all beside JSON, to stderr
        print(line, file=sys.stderr if as_json or line.startswith("warning: ") else sys.stdout, flush=True)

    try:
        if axes:
            composed = api.evaluate_axes(
                model,
                output=folder,
                max_prompts=prompts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seed=seed,
                device=device,
            )
        else:
            found = api.evaluate(model, path, output=folder, options=options, log=log)
    except KeyboardInterrupt:
        cached = any(path.is_file() for path in (folder / "pictures").rglob("*"))
        resume = f"; generated images are in {folder}, and the same command continues from there" if cached else ""
        print(f"stopped{resume}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json((composed if axes else found).to_dict())
        return
    from ldm.report import text

    if axes:
        print("\n".join(text.axes_lines(composed.report)))
        print(f"\nnumbers: {folder / 'axes.json'}\nimages: {folder / 'axes.png'}")
        return
    if found.sweep is not None:
        print("\n".join(text.sweep_lines(found.sweep)), end="\n\n")
    print("\n".join(text.evaluation_lines(found.evaluation)))
    print(f"\npage: {found.page}")


@autoencoder_app.callback()
def _autoencoder() -> None:
    """Makes typer keep the name of a single command."""


@autoencoder_app.command("evaluate")
def evaluate_autoencoder_command(
    model: Annotated[
        str, typer.Argument(help="A folder of an autoencoder or of a pipeline, a built-in name, or a hub id.")
    ],
    path: Annotated[str, typer.Argument(help="Images: a folder, a file, or the id of a data set.")],
    split: Annotated[
        str, typer.Option(help="held-out (not seen in training), or all for one of other data.")
    ] = "held-out",
    held_out: HeldOut = 0.1,
    samples: Samples = None,
    resolution: Annotated[int | None, typer.Option(help="In pixels; that of the autoencoder by default.")] = None,
    buckets: Annotated[
        bool | None, typer.Option("--buckets/--squares", help="Images of several shapes: above 128 pixels by default.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Image features of the Fréchet distance: efficientnet, pixel, inception or clip.")
    ] = "efficientnet",
    weights: Weights = None,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of images.")] = 0,
    background: Background = "white",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A PNG with the twelve worst reconstructions.")
    ] = None,
    as_json: AsJson = False,
    tile: Annotated[str, typer.Option(help="As in ldm generate.", metavar="PIXELS")] = "auto",
    device: Device = None,
) -> None:
    """Measure a first stage, and advise to use it, fine-tune its decoder, train one, or do without."""
    if output is not None:
        output = output_file("--output", output, [".png"], "the image is written as PNG")
    from ldm import api

    parts: Any = int(tile) if tile.isdecimal() else tile
    options = options_of(api.AutoencoderOptions, {**locals(), "tile": parts})
    found = api.evaluate_autoencoder(model, path, options=options)
    if output is not None:
        from ldm.pipelines import save_png

        save_png(found.worst, output)
    if as_json:
        print_json(found.to_dict())
        return
    from ldm.report.text import autoencoder_lines

    sizes = ", ".join(f"{width}x{height}" for height, width in found.report.sizes)
    print(
        f"{model} on {path}, {split}: {found.report.images} images of {sizes}; means, with 95 % intervals over images"
    )
    print("\n".join(autoencoder_lines(found.report)))
    if output is not None:
        print(output)


def nll(
    model: Annotated[str, typer.Argument(help="A pipeline folder of a model of pixels, or a hub id.")],
    path: Annotated[str, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set.")],
    split: Annotated[str, typer.Option(help="held-out (not seen in training) or all.")] = "held-out",
    held_out: HeldOut = 0.1,
    samples: Samples = None,
    steps_per_image: Annotated[
        int | None, typer.Option(help="Number of timesteps per image to estimate from, even; all by default.")
    ] = None,
    variance: Annotated[
        str | None, typer.Option(help="small (the default) or large; not for a model with learned variances.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for noise, images and timesteps.")] = 0,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    caption_source: CaptionSource = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A plot of the terms over t: a .svg or .png file.")
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
) -> None:
    """Measure the variational bound of images under a model of pixels, in bits per dimension."""
    if output is not None:
        output = output_file("--output", output, [".svg", ".png"], "the plot is written as SVG or PNG")
    from ldm import api

    options = options_of(api.LikelihoodOptions, locals())
    found = api.likelihood(model, path, options=options)
    if found.truncated is not None:
        print(f"warning: {found.truncated}", file=sys.stderr)
    if output is not None:
        found.save_chart(output)
    if as_json:
        print_json(found.to_dict())
        return
    from ldm.report.text import likelihood_lines

    print("\n".join(likelihood_lines(found.to_dict())))
    if output is not None:
        print(output)


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas, such as 1,2,5") from None
