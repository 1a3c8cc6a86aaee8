"""The commands: each checks its options, calls the Python API (`ldm.api`) or a training, and prints."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import ldm
from ldm import disk
from ldm.cli import arguments

data_app = typer.Typer(help="Check data before training.", no_args_is_help=True)
autoencoder_app = typer.Typer(help="First stages: autoencoders between images and latents.", no_args_is_help=True)

MINUTES, ENCODER = 30.0, "minilm"
MAX_PER_PROMPT = 10_000
# Options of new runs, and what to do instead with --resume.
FIXED = "a run cannot change it; leave it out, or start a new run"
NEW_RUN_ONLY = {
    "--output": "leave it out; a run folder may be moved while nothing runs in it",
    "--minutes": "its length is set in steps, --set train.max_steps=N",
    **dict.fromkeys(("--resolution", "--start-from", "--anyway", "--method", "--encoder"), FIXED),
    **dict.fromkeys(("--image-column", "--caption-column", "--caption-source"), FIXED),
    "--plan": "its plan is plan.json in the run folder, and its config config.yaml; leave it out",
}


# ---- data and training


@data_app.command("check")
def check_data_command(
    path: Annotated[str, typer.Argument(help="A folder, a file, or the id of a data set on the hub.")],
    resolution: Annotated[int, typer.Option(help="Resolution of the training, in pixels.")] = 64,
    encoder: Annotated[
        str | None, typer.Option(help="Text encoder that reads the captions; minilm by default.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens of a caption; 32, or 48 for scenes.")] = None,
    background: arguments.Background = "white",
    image_column: arguments.ImageColumn = None,
    caption_column: arguments.CaptionColumn = None,
    caption_source: arguments.CaptionSource = None,
    split: Annotated[str, typer.Option(help="Split of a data set that has several.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of the images that is not trained on.")] = 0.1,
    compose: Annotated[float, typer.Option(help="Fraction of samples composed of several images.")] = 0.0,
    as_json: arguments.AsJson = False,
    full: Annotated[bool, typer.Option("--all", help="Do not shorten lists.")] = False,
) -> None:
    """Print the contents and problems of a data set. Exit code 1 if something needs attention."""
    from ldm.api import check_data
    from ldm.data import DataConfig

    report = check_data(arguments.options_of(DataConfig, locals()), encoder=encoder, max_length=max_length)
    if as_json:
        arguments.print_json(report.to_dict())
    else:
        from ldm.report.text import report_text

        print(report_text(report, full=full))
    if report.needs_attention:
        raise typer.Exit(1)


def train_command(
    path: Annotated[
        str | None, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set on the hub.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The run folder; runs/NAME by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help=f"About how long to train; {MINUTES} by default.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; chosen by default.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="A model to fine-tune: a pipeline folder or hub id; chosen by default.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Train a new model, even where it is not expected to work.")
    ] = False,
    method: Annotated[str | None, typer.Option(help="With --start-from: full, attention or lora.")] = None,
    encoder: Annotated[str | None, typer.Option(help=f"The text encoder of a new model; {ENCODER} by default.")] = None,
    image_column: arguments.ImageColumn = None,
    caption_column: arguments.CaptionColumn = None,
    caption_source: arguments.CaptionSource = None,
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
        given = {**locals(), "plan": plan or None, "anyway": anyway or None}
        for option in NEW_RUN_ONLY:
            if given[option.removeprefix("--").replace("-", "_")] is not None:
                raise ValueError(f"{option} is for a new run, but --resume continues {resume}; {NEW_RUN_ONLY[option]}")
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
    if anyway and start_from is not None:
        raise ValueError(f"--anyway trains a new model, and --start-from names {start_from}; leave one of them out")
    from ldm.training.auto_config import TrainOptions

    where = disk.expand_user(path).resolve()
    name = where.name if where.is_dir() else where.stem if where.exists() else path.replace("/", "-")
    defaults = {"output_dir": output or f"runs/{name}", "encoder": ENCODER if encoder is None else encoder}
    options = arguments.options_of(TrainOptions, locals() | defaults)
    columns = {"image_column": image_column, "caption_column": caption_column, "caption_source": caption_source}
    data = {"path": path} | {key: value for key, value in columns.items() if value is not None}
    raise typer.Exit(auto_train(data, options, settings or [], plan))


# ---- images


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to draw; several texts give several pictures.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A pipeline folder, a hub id, or the built-in scenes-64.")
    ] = "scenes-64",
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA file, folder or hub id on top, NAME or NAME:WEIGHT; repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one more prompt per line.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The PNG file to write; image.png by default, or the next free name."),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            "-n",
            help="Pictures per prompt: of several pictures -o becomes a sheet, beside one file each, named by prompt "
            "number and seed.",
        ),
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Picture i of each prompt has seed + i; a fresh one by default.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
    num_inference_steps: arguments.Steps = None,
    guidance_scale: arguments.Guidance = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, ddpm, dpm++2m, …; a wrong name lists them all. The model's default otherwise."),
    ] = None,
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=NUMBER, such as num_langevin_steps=10; a wrong key lists them. Repeatable."),
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
    enlarge: Annotated[int, typer.Option(help="Write each pixel as a square of so many, 1 to 16.")] = 1,
    height: Annotated[int | None, typer.Option(help="In pixels; that of training by default.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; that of training by default.")] = None,
    tile: Annotated[
        str,
        typer.Option(
            help="Decode about a square of so many pixels a side at a time, in less memory: the same picture. "
            "off never does, auto where a picture would need more than 3 GiB.",
            metavar="PIXELS",
        ),
    ] = "auto",
    device: arguments.Device = None,
) -> None:
    """Draw pictures from a text. Each PNG carries its prompt, seed and settings."""
    as_png = "pictures are written as PNG"
    texts = [*(prompt or []), *([] if prompts is None else disk.read_lines("--prompts", prompts))]
    if not texts:
        raise ValueError("there is nothing to draw; give a text, or --prompts FILE with one per line")
    named = output is not None
    output = arguments.output_file("--output", output or free_name(Path("image.png")), [".png"], as_png)
    if progress_strip is not None:
        progress_strip = arguments.output_file("--progress-strip", progress_strip, [".png"], as_png)
        if progress_strip == output:
            raise ValueError(f"--progress-strip is {progress_strip}; it must be another file than -o")
    if count < 1:
        raise ValueError(f"-n is {count}; it must be at least 1")
    if len(texts) > 1 and count > MAX_PER_PROMPT:
        raise ValueError(f"-n is {count}; for several prompts it must be at most {MAX_PER_PROMPT}")
    if not 1 <= enlarge <= 16:
        raise ValueError(f"--enlarge is {enlarge}; it must be 1 to 16")
    options: dict[str, float] = {}
    for entry in sampler_option or []:
        key, _, value = entry.partition("=")
        try:
            options[key] = int(float(value)) if float(value).is_integer() else float(value)
        except ValueError:
            raise ValueError(f"--sampler-option is {entry!r}; write KEY=NUMBER, such as snr=0.1") from None
    weighted = [_source_and_weight(entry) for entry in lora or []]
    from ldm.codecs import check_tile
    from ldm.lora import check_weight
    from ldm.pipelines import Pipeline, ProgressStrip, contact_sheet, save_png
    from ldm.pipelines.sampling import SamplingParams, check_size, image_prompts, image_seeds
    from ldm.text import ignore_cut_prompts

    # What is wrong whatever the model is said before it is loaded.
    parts: Any = int(tile) if tile.isdecimal() else tile
    check_tile(parts)
    for source, weight in weighted:
        check_weight(source, weight)
    check_size(height, width)
    image_prompts(texts, negative_prompt, count)
    if seed is not None:
        image_seeds([seed, seed + count - 1], 2)
    seed = image_seeds(None, 1)[0] if seed is None else seed
    its = locals() | {"sampler_options": options or None}
    names = ("sampler", "sampler_options", "num_inference_steps", "guidance_scale", "eta", "guidance_rescale")
    sampling: Any = {name: its[name] for name in (*names, "guidance_interval", "dynamic_threshold")}
    SamplingParams.resolve(sampling if sampler else sampling | {"sampler_options": None})
    pipeline = Pipeline.from_pretrained(disk.expand_user(model) if model.startswith("~") else model, device=device)
    pipeline.tile(parts)
    for number, (source, weight) in enumerate(weighted):
        pipeline.load_lora(source, name=f"lora{number}", weight=weight)
    params = pipeline.sampling_params(**sampling)
    strip = None if progress_strip is None else ProgressStrip(pipeline.preview, params.num_inference_steps)
    with ignore_cut_prompts():  # said below, since a wrong argument is one line and no more
        given = {key: its[key] for key in ("negative_prompt", "height", "width")}
        # One number for one prompt: the pipeline refuses too many images before it counts them.
        seeds = seed if len(texts) == 1 else [seed + i for _ in texts for i in range(count)]
        result = pipeline(texts, num_images_per_prompt=count, seed=seeds, on_step=strip, **given, **sampling)
    cut = pipeline.text_encoder.truncation_message([*texts, negative_prompt or ""])
    if cut:
        print(f"warning: {cut}", file=sys.stderr)
    settings = {key: getattr(params, key) for key in sampling} | {
        "model": model,
        "lora": lora or [],
        "height": result.images[0].height,
        "width": result.images[0].width,
        "ldm": ldm.__version__,
    }
    if guidance_interval is not None:  # JSON has no infinity
        settings["guidance_interval"] = [end if math.isfinite(end) else str(end) for end in guidance_interval]
    text = {"negative_prompt": negative_prompt or "", "settings": settings}
    about = {"prompt": texts[0] if len(texts) == 1 else texts} | text
    if progress_strip is not None and strip is not None:
        sheet = strip.sheet([f"seed {its_seed}" for its_seed in result.seeds])
        save_png(sheet, progress_strip, about | {"seed": result.seeds, "timesteps": strip.timesteps})
        print(progress_strip)
    images = [image.resize((image.width * enlarge, image.height * enlarge), 0) for image in result.images]  # 0: nearest
    if len(images) == 1:
        save_png(images[0], output, about | {"seed": seed})
        print(output)
        return
    for number, (image, its_seed) in enumerate(zip(images, result.seeds, strict=True)):
        parts = [str(number // count + 1)] * (len(texts) > 1) + [str(its_seed)] * (count > 1)
        path = output.with_name(f"{'-'.join([output.stem, *parts])}{output.suffix}")
        path = path if named else free_name(path)
        save_png(image, path, {"prompt": texts[number // count]} | text | {"seed": its_seed})
        print(path)
    width = count if len(texts) > 1 else 8
    rows = [images[start : start + width] for start in range(0, len(images), width)]
    size = max(images[0].width, 96)
    save_png(contact_sheet(rows, texts if len(texts) > 1 else None, size=size), output, about | {"seed": result.seeds})
    print(output)


def free_name(path: Path) -> Path:
    """The path, or with "-2", "-3" … the first that does not exist."""
    names = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _source_and_weight(entry: str) -> tuple[str, float]:
    """Of a LoRA: "style.safetensors:0.7"; the weight is 1 without a number."""
    source, _, number = entry.rpartition(":")
    try:
        source, weight = (source, float(number)) if source else (entry, 1.0)
    except ValueError:
        source, weight = entry, 1.0
    return str(disk.expand_user(source)) if source.startswith("~") else source, weight


# ---- evaluation


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
    weights: arguments.Weights = None,
    clip: Annotated[
        str | None, typer.Option(help="Also the CLIP score, by MODEL:TAG or MODEL:FILE.safetensors of open_clip.")
    ] = None,
    max_reference: Annotated[
        int, typer.Option("--reference", help="Maximum number of images of either side, chosen by --seed.")
    ] = 20000,
    held_out: Annotated[float | None, typer.Option(help="Fraction that training held out; of a run, else 0.1.")] = None,
    num_inference_steps: arguments.Steps = None,
    guidance_scale: arguments.Guidance = None,
    seed: Annotated[int, typer.Option(help="Random seed for captions, noise and intervals.")] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try guidance scales and steps first, and use the best as defaults.")
    ] = False,
    sweep_guidance: Annotated[str, typer.Option(help="Guidance scales of --sweep.")] = "1,2,3,5,8",
    sweep_steps: Annotated[str, typer.Option(help="Numbers of steps of --sweep.")] = "5,10,20,50",
    sweep_samples: Annotated[int, typer.Option(help="Images for each of these.")] = 64,
    store: Annotated[bool, typer.Option(help="With --sweep: store the best as the defaults of the model.")] = True,
    axes: Annotated[bool, typer.Option("--axes", help="Instead: how a model of scenes composes, by axis.")] = False,
    prompts: Annotated[
        int | None, typer.Option(help="With --axes: maximum prompts per axis; 100 by default, and all single things.")
    ] = None,
    image_column: arguments.ImageColumn = None,
    caption_column: arguments.CaptionColumn = None,
    caption_source: arguments.CaptionSource = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the page, JSON and sheets; evaluation by default.")
    ] = None,
    as_json: arguments.AsJson = False,
    device: arguments.Device = None,
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
    options = arguments.options_of(api.EvaluationOptions, {**locals(), "sweep": swept})
    folder = arguments.output_folder("--output", api.evaluation_folder(model, output))

    def log(line: str) -> None:  # warnings, and all beside JSON, to stderr
        print(line, file=sys.stderr if as_json or line.startswith("warning: ") else sys.stdout, flush=True)

    try:
        if axes:
            shared = {key: getattr(options, key) for key in ("num_inference_steps", "guidance_scale", "seed", "device")}
            composed = api.evaluate_axes(model, output=folder, max_prompts=prompts, **shared)
        else:
            found = api.evaluate(model, path, output=folder, options=options, log=log)
    except KeyboardInterrupt:
        cached = any(path.is_file() for path in (folder / "pictures").rglob("*"))
        resume = f"; generated images are in {folder}, and the same command continues from there" if cached else ""
        print(f"stopped{resume}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        arguments.print_json((composed if axes else found).to_dict())
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
    model: Annotated[str, typer.Argument(help="An autoencoder or pipeline folder, a built-in name, or a hub id.")],
    path: Annotated[str, typer.Argument(help="Images: a folder, a file, or the id of a data set.")],
    split: Annotated[str, typer.Option(help="held-out (not seen in training), or all of other data.")] = "held-out",
    held_out: arguments.HeldOut = 0.1,
    samples: arguments.Samples = None,
    resolution: Annotated[int | None, typer.Option(help="In pixels; that of the autoencoder by default.")] = None,
    buckets: Annotated[
        bool | None, typer.Option("--buckets/--squares", help="Images of several shapes: above 128 pixels by default.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Image features of the Fréchet distance: efficientnet, pixel, inception or clip.")
    ] = "efficientnet",
    weights: arguments.Weights = None,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of images.")] = 0,
    background: arguments.Background = "white",
    image_column: arguments.ImageColumn = None,
    caption_column: arguments.CaptionColumn = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG of the 12 worst reconstructions.")] = None,
    as_json: arguments.AsJson = False,
    tile: Annotated[str, typer.Option(help="As in ldm generate.", metavar="PIXELS")] = "auto",
    device: arguments.Device = None,
) -> None:
    """Measure a first stage, and advise to use it, fine-tune its decoder, train one, or do without."""
    if output is not None:
        output = arguments.output_file("--output", output, [".png"], "the image is written as PNG")
    from ldm import api

    parts: Any = int(tile) if tile.isdecimal() else tile
    options = arguments.options_of(api.AutoencoderOptions, {**locals(), "tile": parts})
    found = api.evaluate_autoencoder(model, path, options=options)
    if output is not None:
        from ldm.pipelines import save_png

        save_png(found.worst, output)
    if as_json:
        arguments.print_json(found.to_dict())
        return
    from ldm.report.text import autoencoder_lines

    sizes = ", ".join(f"{width}x{height}" for height, width in found.report.sizes)
    images = f"{found.report.images} images of {sizes}"
    print(f"{model} on {path}, {split}: {images}; means, with 95 % intervals over images")
    print("\n".join(autoencoder_lines(found.report)))
    if output is not None:
        print(output)


def nll(
    model: Annotated[str, typer.Argument(help="A pipeline folder of a model of pixels, or a hub id.")],
    path: Annotated[str, typer.Argument(help="Captioned images: a folder, a file, or the id of a data set.")],
    split: Annotated[str, typer.Option(help="held-out (not seen in training) or all.")] = "held-out",
    held_out: arguments.HeldOut = 0.1,
    samples: arguments.Samples = None,
    steps_per_image: Annotated[
        int | None, typer.Option(help="Number of timesteps per image to estimate from, even; all by default.")
    ] = None,
    variance: Annotated[
        str | None, typer.Option(help="small (the default) or large; not for a model with learned variances.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for noise, images and timesteps.")] = 0,
    image_column: arguments.ImageColumn = None,
    caption_column: arguments.CaptionColumn = None,
    caption_source: arguments.CaptionSource = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plot of terms over t: .svg or .png.")] = None,
    as_json: arguments.AsJson = False,
    device: arguments.Device = None,
) -> None:
    """Measure the variational bound of images under a model of pixels, in bits per dimension."""
    if output is not None:
        output = arguments.output_file("--output", output, [".svg", ".png"], "the plot is written as SVG or PNG")
    from ldm import api

    options = arguments.options_of(api.LikelihoodOptions, locals())
    found = api.likelihood(model, path, options=options)
    if found.truncated is not None:
        print(f"warning: {found.truncated}", file=sys.stderr)
    if output is not None:
        found.save_chart(output)
    if as_json:
        arguments.print_json(found.to_dict())
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
