"""`ldm nll`: negative log-likelihood of images under a model of pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm import disk
from ldm.cli.arguments import output_file

if TYPE_CHECKING:
    from ldm.evaluation.likelihood import Likelihood


def nll(
    model: Annotated[str, typer.Argument(help="A pipeline folder of a model of pixels, or a hub id.")],
    path: Annotated[str, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set.")],
    split: Annotated[str, typer.Option(help="held-out (not seen in training) or all.")] = "held-out",
    held_out: Annotated[float, typer.Option(help="The fraction that training held out: data.held_out.")] = 0.1,
    samples: Annotated[int | None, typer.Option(help="Number of images, sampled by --seed; all by default.")] = None,
    steps_per_image: Annotated[
        int | None, typer.Option(help="Number of timesteps per image to estimate from, even; all by default.")
    ] = None,
    variance: Annotated[
        str | None, typer.Option(help="small (the default) or large; not for a model with learned variances.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for noise, images and timesteps.")] = 0,
    image_column: Annotated[str | None, typer.Option(help="The column with images; detected by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; detected by default.")] = None,
    caption_source: Annotated[
        str | None, typer.Option(help="Which source of captions to use, if there are several: see docs/data.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A plot of the terms over t: a .svg or .png file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, …; an accelerator by default if there is one.")
    ] = None,
) -> None:
    """Measure the variational bound of images under a model of pixels, in bits per dimension."""
    if split not in ("held-out", "all"):
        raise ValueError(f"--split is {split}; it is held-out or all")
    if variance not in (None, "small", "large"):
        raise ValueError(f"--variance is {variance}; it is small or large")
    if output is not None:
        output = output_file("--output", output, [".svg", ".png"], "the plot is written as SVG or PNG")
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if steps_per_image is not None and (steps_per_image < 2 or steps_per_image % 2):
        raise ValueError(f"steps per image is {steps_per_image}; it must be an even number, at least 2")
    from tqdm import tqdm

    from ldm.data import CaptionedImages, DataConfig
    from ldm.data import split as split_of
    from ldm.data.inspection import inspect
    from ldm.data.layouts import check_path, open_source
    from ldm.evaluation.likelihood import likelihood
    from ldm.pipelines import Pipeline

    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be an integer from 0")
    columns = {"held_out": held_out, "image_column": image_column, "caption_column": caption_column}
    columns |= {"caption_source": caption_source}
    DataConfig(path=path, resolution=1, **columns)  # type: ignore[arg-type] # checked before a model is loaded
    check_path(path)
    pipeline = Pipeline.from_pretrained(disk.expand_user(model) if model.startswith("~") else model, device=device)
    learned = pipeline.unet.config.learned_variance
    if learned and variance is not None:
        raise ValueError(f"--variance is {variance}, but {model} has learned its variances; leave it out")
    config = DataConfig(path=path, resolution=pipeline.default_size[0], **columns)  # type: ignore[arg-type]
    used = inspect(open_source(config), config, progress=True).used
    if split == "held-out":
        _, used = split_of(used, held_out)
    if not used:
        raise ValueError(f"nothing of {path} is held out at a fraction of {held_out}; use --split all")
    images = CaptionedImages(used, config, seed)
    count = len(images) if samples is None else samples
    steps = pipeline.schedule.num_train_timesteps if steps_per_image is None else steps_per_image + 1
    with tqdm(total=count * steps, unit="evaluation", delay=2, leave=False) as bar:
        found = likelihood(
            pipeline,
            images,
            samples=samples,
            steps_per_image=steps_per_image,
            variance="large" if variance == "large" else "small",
            seed=seed,
            progress=bar.update,
        )
    measured = set(found.ids)
    cut = pipeline.text_encoder.truncation_message(
        sample.captions[0] for sample in images.samples if sample.id in measured
    )
    if cut:
        print(f"warning: captions are cut: {cut}", file=sys.stderr)
    if output is not None:
        from ldm.report.charts import Line, save_chart

        points = [((stratum.first + stratum.last) // 2, stratum.bits) for stratum in found.curve]
        save_chart(output, Line("L_t, bits per dimension", points), axis="timestep t (0 is L_0)")
    shape = pipeline.codec.latent_shape(*pipeline.default_size)
    settings = {"model": model, "data": path, "split": split, "seed": seed, "shape": list(shape)}
    settings |= {"timesteps_per_image": steps, "variance": "learned" if learned else variance or "small"}
    _print_likelihood(found, settings, as_json=as_json)
    if output is not None and not as_json:
        print(output)


def _print_likelihood(found: Likelihood, settings: dict[str, Any], *, as_json: bool) -> None:
    """The bound and its terms, as text or JSON."""
    values = {
        "L_T": found.prior,
        "sum_of_L_t": found.terms,
        "L_0": found.decoder,
        "bits_per_dimension": found.total,
        "interval_95": found.interval,
        "timesteps_interval_95": found.timesteps_interval,
    }
    if as_json:
        import json
        import math

        content: dict[str, Any] = settings | {"images": len(found.ids), "evaluations": found.evaluations}
        content |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        content["curve"] = [[stratum.first, stratum.last, stratum.bits] for stratum in found.curve]
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    channels, height, width = settings["shape"]
    print(
        f"{settings['data']}, {settings['split']}: {len(found.ids)} images of {channels}x{height}x{width} values, "
        f"{settings['timesteps_per_image']} timesteps each, {found.evaluations} evaluations of the network, "
        f"{settings['variance']} variance; bits per dimension:"
    )
    print(f"  L_T          {found.prior:8.4f}   the prior at t = T")
    print(f"  sum of L_t   {found.terms:8.4f}   t > 0")
    print(f"  L_0          {found.decoder:8.4f}   the decoder")
    interval = f" ± {found.interval:.4f}, 95 % over images" if len(found.ids) > 1 else ""
    drawn = f" (± {found.timesteps_interval:.4f} of it from sampled timesteps)" if found.timesteps_interval else ""
    print(f"  total        {found.total:8.4f}{interval}{drawn}")
