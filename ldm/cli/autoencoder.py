"""`ldm autoencoder`: evaluation of a first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ldm import disk
from ldm.cli.arguments import output_file

app = typer.Typer(help="First stages: autoencoders between images and latents.", no_args_is_help=True)


@app.callback()
def _options() -> None:
    """Makes typer keep the name of a single command."""


@app.command("evaluate")
def evaluate_autoencoder_command(
    model: Annotated[
        str, typer.Argument(help="A folder of an autoencoder or of a pipeline, a built-in name, or a hub id.")
    ],
    path: Annotated[str, typer.Argument(help="Images: a folder, a file, or the id of a data set.")],
    split: Annotated[
        str, typer.Option(help="held-out (not seen in training), or all for one of other data.")
    ] = "held-out",
    held_out: Annotated[float, typer.Option(help="The fraction that training held out: data.held_out.")] = 0.1,
    samples: Annotated[int | None, typer.Option(help="Number of images, sampled by --seed; all by default.")] = None,
    resolution: Annotated[int | None, typer.Option(help="In pixels; that of the autoencoder by default.")] = None,
    buckets: Annotated[
        bool | None, typer.Option("--buckets/--squares", help="Images of several shapes: above 128 pixels by default.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Image features of the Fréchet distance: efficientnet, pixel, inception or clip.")
    ] = "efficientnet",
    weights: Annotated[
        str | None, typer.Option(help="With --features inception or clip: a path, or MODEL:TAG.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of images.")] = 0,
    background: Annotated[str, typer.Option(help="The color behind transparent images.")] = "white",
    image_column: Annotated[str | None, typer.Option(help="The column with images; detected by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; detected by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A PNG with the twelve worst reconstructions.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    tile: Annotated[str, typer.Option(help="As in ldm generate.", metavar="PIXELS")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, …; an accelerator by default if there is one.")
    ] = None,
) -> None:
    """Measure a first stage, and advise to use it, fine-tune its decoder, train one, or do without."""
    if split not in ("held-out", "all"):
        raise ValueError(f"--split is {split}; it is held-out or all")
    if output is not None:
        output = output_file("--output", output, [".png"], "the image is written as PNG")
    if samples is not None and samples < 2:
        raise ValueError(f"--samples is {samples}; it must be at least 2")
    from tqdm import tqdm

    from ldm.codecs import check_tile
    from ldm.data import CaptionedImages, DataConfig, generator
    from ldm.data import split as split_of
    from ldm.data.inspection import inspect
    from ldm.data.layouts import check_path, open_source
    from ldm.evaluation.autoencoder import evaluate_autoencoder, worst_sheet
    from ldm.evaluation.features import feature_space
    from ldm.models.efficientnet import perceptual_distance
    from ldm.models.similarity import MIN_IMAGE_SIZE
    from ldm.pipelines import save_png
    from ldm.pipelines.pipeline import usable_device
    from ldm.training.components import load_first_stage

    torch_device = usable_device(device)
    parts: Any = int(tile) if tile.isdecimal() else tile
    check_tile(parts)  # errors that do not depend on the model come before it is loaded
    DataConfig(path=path, resolution=1 if resolution is None else resolution, held_out=held_out, background=background)
    check_path(path)
    codec = load_first_stage(str(disk.expand_user(model)) if model.startswith("~") else model).to(torch_device)
    codec.tile(parts)
    space = feature_space(features, device=torch_device, weights=weights)
    config = DataConfig(
        path=path,
        resolution=_size_of(codec.autoencoder.config.sample_size) if resolution is None else resolution,
        buckets=buckets,
        held_out=held_out,
        background=background,
        image_column=image_column,
        caption_column=caption_column,
    )
    if config.resolution < MIN_IMAGE_SIZE:
        raise ValueError(
            f"--resolution is {config.resolution}; reconstructions need at least {MIN_IMAGE_SIZE} pixels a side"
        )
    everything = inspect(open_source(config, captioned=False), config, progress=True).used
    learned, used = split_of(everything, held_out)
    if split == "all":
        learned, used = (), everything
    if not used:
        raise ValueError(f"nothing of {path} is held out at a fraction of {held_out}; use --split all")
    if samples is not None and samples > len(used):
        raise ValueError(f"--samples is {samples}; there are {len(used)} images ({split})")
    if samples is not None:
        chosen = generator(seed, "autoencoder", "images").permutation(len(used))[:samples]
        used = tuple(used[index] for index in sorted(chosen.tolist()))
    images = CaptionedImages(used, config, seed)
    with tqdm(total=len(images), unit="image", delay=2, leave=False) as bar:
        report = evaluate_autoencoder(
            codec,
            model,
            images,
            CaptionedImages(learned, config, seed) if learned else None,
            space=space,
            perceptual=perceptual_distance(torch_device),
            device=torch_device,
            training_images=len(everything) if split == "all" else len(learned),
            seed=seed,
            progress=bar.update,
        )
    if output is not None:
        save_png(worst_sheet(codec, images, report, torch_device), output)
    sizes = ", ".join(f"{width}x{height}" for height, width in report.sizes)
    if as_json:
        import json

        settings = {"model": model, "data": path, "split": split, "resolution": config.resolution, "seed": seed}
        print(json.dumps(settings | report.to_dict(), indent=2, allow_nan=False))
        return
    print(f"{model} on {path}, {split}: {report.images} images of {sizes}; means, with 95 % intervals over images")
    for line in report.lines():
        print(line)
    if output is not None:
        print(output)


def _size_of(sample_size: int | tuple[int, int]) -> int:
    """The image size that a first stage was trained on."""
    return sample_size if isinstance(sample_size, int) else min(sample_size)
