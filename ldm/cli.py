"""The `ldm` command. Parses its arguments before it imports anything heavy."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ldm

if TYPE_CHECKING:
    from ldm.evaluation.likelihood import Likelihood
    from ldm.pipelines import PipelineOutput

app = typer.Typer(
    help="Turn captioned images into a text-to-image model, and text into images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A pipeline folder, or a hub id.")],
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA file, folder or hub id on top, NAME or NAME:WEIGHT; repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path("image.png"),
    count: Annotated[
        int,
        typer.Option(
            "-n", help="How many pictures: -o becomes a sheet of them, beside one file a picture named by its seed."
        ),
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="Picture i has seed + i; a fresh one by default.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the model's default otherwise.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's default otherwise.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, ddpm, dpm++2m, …; a wrong name lists them all. The model's default otherwise."),
    ] = None,
    eta: Annotated[float, typer.Option(help="0 is deterministic DDIM, 1 has the variance of DDPM.")] = 0.0,
    guidance_rescale: Annotated[float, typer.Option(help="0 to 1, against the glare of large guidance scales.")] = 0.0,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Guide only between two noise levels sigma/alpha, the lower first.", metavar="LOW HIGH"),
    ] = None,
    dynamic_threshold: Annotated[
        float | None, typer.Option(help="Models of pixels: the share of pixels that sets their range; 0.995 is usual.")
    ] = None,
    progress_strip: Annotated[
        Path | None, typer.Option(help="Also write a PNG with what the model saw in the noise at eight of the steps.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels; that of training by default.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; that of training by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA by default where there is one.")] = None,
) -> None:
    """Draw pictures from a text. Each PNG carries its prompt, seed and settings."""
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output is {output}; pictures are written as PNG, so let it end in .png")
    if progress_strip is not None and (progress_strip.suffix.lower() != ".png" or progress_strip == output):
        raise ValueError(f"--progress-strip is {progress_strip}; it must end in .png, and be another file than -o")
    if count < 1:
        raise ValueError(f"-n is {count}; it must be at least 1")
    from ldm.pipelines import Pipeline, ProgressStrip, save_png

    pipeline = Pipeline.from_pretrained(model, device=device)
    for number, entry in enumerate(lora or []):
        source, weight = _weighted(entry)
        pipeline.load_lora(source, name=f"lora{number}", weight=weight)
    drawn: dict[str, Any] = {
        "sampler": pipeline.sampler if sampler is None else sampler,
        "eta": eta,
        "num_inference_steps": pipeline.num_inference_steps if steps is None else steps,
        "guidance_scale": pipeline.guidance_scale if guidance is None else guidance,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": guidance_interval,
        "dynamic_threshold": dynamic_threshold,
    }
    strip = None if progress_strip is None else ProgressStrip(pipeline.preview, drawn["num_inference_steps"])
    result = pipeline(
        prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_images_per_prompt=count,
        seed=seed,
        on_step=strip,
        **drawn,
    )
    settings = drawn | {
        "model": model,
        "lora": lora or [],
        "height": result.images[0].height,
        "width": result.images[0].width,
        "ldm": ldm.__version__,
    }
    text = {"prompt": prompt, "negative_prompt": negative_prompt or "", "settings": settings}
    if progress_strip is not None and strip is not None:
        sheet = strip.sheet([f"seed {its_seed}" for its_seed in result.seeds])
        save_png(sheet, progress_strip, text | {"seed": result.seeds, "timesteps": strip.timesteps})
        print(progress_strip)
    _save_pictures(result, output, text)


def _save_pictures(result: PipelineOutput, output: Path, text: dict[str, Any]) -> None:
    """One picture is `output`; several are files named by their seeds, and `output` a sheet of them."""
    from ldm.pipelines import contact_sheet, save_png

    if len(result.images) == 1:
        save_png(result.images[0], output, text | {"seed": result.seeds[0]})
        print(output)
        return
    for image, its_seed in zip(result.images, result.seeds, strict=True):
        path = output.with_name(f"{output.stem}-{its_seed}{output.suffix}")
        save_png(image, path, text | {"seed": its_seed})
        print(path)
    rows = [result.images[start : start + 8] for start in range(0, len(result.images), 8)]
    sheet = contact_sheet(rows, size=max(result.images[0].width, 96))
    save_png(sheet, output, text | {"seed": result.seeds})
    print(output)


@data_app.command()
def check(
    path: Annotated[str, typer.Argument(help="A folder, a file, or the id of a data set on the hub.")],
    resolution: Annotated[int, typer.Option(help="That you want to train at, in pixels.")] = 64,
    encoder: Annotated[
        str | None, typer.Option(help="The text encoder that captions have to fit into; minilm by default.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a caption that it reads; 32 by default.")] = None,
    background: Annotated[str, typer.Option(help="The colour behind transparent images.")] = "white",
    image_column: Annotated[str | None, typer.Option(help="The column with images; guessed by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; guessed by default.")] = None,
    split: Annotated[str, typer.Option(help="The split of a data set that has several.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Its configuration, where it has several.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the images that training will never see.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Write the whole account as JSON.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Do not shorten lists.")] = False,
) -> None:
    """Say what is in a data set, and what is wrong with it. Exit code 1 when something needs attention."""
    from ldm.data import DataConfig, NothingCaptionedError, account_of, inspect, open_source
    from ldm.text import load_text_encoder

    config = DataConfig(
        path=path,
        resolution=resolution,
        background=background,
        image_column=image_column,
        caption_column=caption_column,
        split=split,
        subset=subset,
        held_out=held_out,
    )
    lost, uncounted = None, ""
    try:
        lost = load_text_encoder(encoder or "minilm", 32 if max_length is None else max_length).lost
    except ValueError as error:
        if encoder is not None or max_length is not None:
            raise
        # Nobody asked for this one, and the images can be looked at where it is not installed.
        uncounted = str(error)
    try:
        source = open_source(config)
    except NothingCaptionedError as error:  # what was skipped, and why, is what the account is for
        source = error.source
    inspection = inspect(source, config, progress=True, everything=True)
    account = account_of(inspection, config, lost=lost, uncounted=uncounted)
    if as_json:
        import json

        print(json.dumps(account.to_dict(), indent=2, allow_nan=False))
    else:
        print(account.to_text(everything=everything))
    if account.needs_attention:
        raise typer.Exit(1)


def _weighted(entry: str) -> tuple[str, float]:
    """ "style.safetensors:0.7" → the name and the weight, 1 where there is none."""
    name, colon, weight = entry.rpartition(":")
    try:
        return (name, float(weight)) if colon and name else (entry, 1.0)
    except ValueError:
        return entry, 1.0


@app.command()
def train(
    path: Annotated[
        str | None, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set on the hub.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The run folder; runs/NAME by default.")] = None,
    minutes: Annotated[float, typer.Option(help="About how long training may take.")] = 30,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; chosen by default.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="A model to go on from: a pipeline folder or hub id; else a new one.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="With --start-from: full, attention or lora.")] = None,
    encoder: Annotated[str, typer.Option(help="The text encoder of a new model.")] = "minilm",
    image_column: Annotated[str | None, typer.Option(help="The column with images; guessed by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; guessed by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for the config, over what is chosen; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Choose, say why, print the config, and stop.")] = False,
    resume: Annotated[str | None, typer.Option(help="A run folder to go on with, instead of a new run.")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="With --resume, a key that may differ from what it was; repeatable.")
    ] = None,
) -> None:
    """Train a model on captioned images: look at them, choose everything, say why, and start."""
    from ldm.training.newcomer import resume_run, train_folder

    if resume is not None:
        if path is not None:
            raise ValueError(f"--resume {resume} goes on with the data of that run; leave {path} out")
        raise typer.Exit(resume_run(Path(resume), accept or []))
    if path is None:
        raise ValueError("there is nothing to train on; name a folder of captioned images")
    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes is {minutes}; it must be more than 0")
    if method is not None and (start_from is None or method not in ("full", "attention", "lora")):
        raise ValueError(f"--method is {method}; it is full, attention or lora, and needs --start-from")
    from ldm.training.choose import Wishes

    where = Path(path).expanduser().resolve()
    name = where.name if where.is_dir() else where.stem if where.exists() else path.replace("/", "-")
    wishes = Wishes(
        output_dir=output or f"runs/{name}",
        minutes=minutes,
        resolution=resolution,
        start_from=start_from,
        method=method,
        encoder=encoder,
    )
    columns = {"image_column": image_column, "caption_column": caption_column}
    data = {"path": path} | {key: value for key, value in columns.items() if value is not None}
    raise typer.Exit(train_folder(data, wishes, settings or [], plan))


@app.command()
def nll(
    model: Annotated[str, typer.Argument(help="A pipeline folder of a model of pixels, or a hub id.")],
    path: Annotated[str, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set.")],
    split: Annotated[str, typer.Option(help="held-out (what training never saw) or all.")] = "held-out",
    held_out: Annotated[float, typer.Option(help="The share that training held out: data.held_out.")] = 0.1,
    samples: Annotated[int | None, typer.Option(help="So many of the images, drawn by --seed; all by default.")] = None,
    steps_per_image: Annotated[
        int | None, typer.Option(help="Estimate from so many timesteps an image, an even number; all by default.")
    ] = None,
    variance: Annotated[
        str, typer.Option(help="small or large; a model with learned variances has its own.")
    ] = "small",
    seed: Annotated[int, typer.Option(help="Of the noise, and of images and timesteps that are drawn.")] = 0,
    image_column: Annotated[str | None, typer.Option(help="The column with images; guessed by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; guessed by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A plot of the terms over t: a .svg or .png file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write all figures as JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA by default where there is one.")] = None,
) -> None:
    """Say how well a model of pixels knows images: the variational bound, in bits per dimension."""
    if split not in ("held-out", "all"):
        raise ValueError(f"--split is {split}; it is held-out or all")
    if variance not in ("small", "large"):
        raise ValueError(f"--variance is {variance}; it is small or large")
    if output is not None and output.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"--output is {output}; the plot is written as SVG or PNG, so let it end in .svg or .png")
    from tqdm import tqdm

    from ldm.data import CaptionedImages, DataConfig, inspect, open_source
    from ldm.data import split as split_of
    from ldm.evaluation.likelihood import likelihood
    from ldm.pipelines import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
    config = DataConfig(
        path=path,
        resolution=pipeline.default_size[0],
        held_out=held_out,
        image_column=image_column,
        caption_column=caption_column,
    )
    used = inspect(open_source(config), config, progress=True).used
    if split == "held-out":
        _, used = split_of(used, held_out)
    if not used:
        raise ValueError(f"nothing of {path} is held out at a share of {held_out}; take --split all")
    images = CaptionedImages(used, config, seed)
    count = len(images) if samples is None else samples
    steps = pipeline.schedule.num_train_timesteps if steps_per_image is None else steps_per_image + 1
    with tqdm(total=count * steps, unit="evaluation", delay=2, leave=False) as bar:
        found = likelihood(
            pipeline,
            images,
            samples=samples,
            steps_per_image=steps_per_image,
            variance="small" if variance == "small" else "large",
            seed=seed,
            progress=bar.update,
        )
    if output is not None:
        from ldm.training.report.curves import Line
        from ldm.training.report.plots import save_plot

        points = [((stratum.first + stratum.last) // 2, stratum.bits) for stratum in found.curve]
        save_plot(output, Line("L_t, bits per dimension", points), axis="timestep t (0 is L_0)")
    learned = pipeline.unet.config.learned_variance
    shape = pipeline.codec.latent_shape(*pipeline.default_size)
    asked = {"model": model, "data": path, "split": split, "seed": seed, "shape": list(shape)}
    asked |= {"timesteps_per_image": steps, "variance": "learned" if learned else variance}
    _say_likelihood(found, asked, as_json=as_json)
    if output is not None and not as_json:
        print(output)


def _say_likelihood(found: Likelihood, asked: dict[str, Any], *, as_json: bool) -> None:
    """The bound and its parts, as text or JSON."""
    figures = {
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

        content: dict[str, Any] = asked | {"images": len(found.ids), "evaluations": found.evaluations}
        content |= {key: value if math.isfinite(value) else None for key, value in figures.items()}
        content["curve"] = [[stratum.first, stratum.last, stratum.bits] for stratum in found.curve]
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    channels, height, width = asked["shape"]
    print(
        f"{asked['data']}, {asked['split']}: {len(found.ids)} images of {channels}x{height}x{width} values, "
        f"{asked['timesteps_per_image']} timesteps each, {found.evaluations} evaluations of the network, "
        f"{asked['variance']} variance; bits per dimension:"
    )
    print(f"  L_T          {found.prior:8.4f}   what the last state still tells of an image")
    print(f"  sum of L_t   {found.terms:8.4f}   t > 0")
    print(f"  L_0          {found.decoder:8.4f}   the decoder")
    interval = f" ± {found.interval:.4f}, 95 % over images" if len(found.ids) > 1 else ""
    drawn = f" (± {found.timesteps_interval:.4f} of it by drawing timesteps)" if found.timesteps_interval else ""
    print(f"  total        {found.total:8.4f}{interval}{drawn}")


def main() -> None:
    """Runs the command; a ValueError is the user's, an OSError the disk's: one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # captions may be in any script, terminals are not
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
