"""`ldm generate`: a prompt to PNG files."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import ldm
from ldm import disk
from ldm.cli.arguments import Device, Guidance, Steps, output_file


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A pipeline folder, a hub id, or the built-in scenes-64.")
    ] = "scenes-64",
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
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
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
    device: Device = None,
) -> None:
    """Draw pictures from a text. Each PNG carries its prompt, seed and settings."""
    as_png = "pictures are written as PNG"
    output = output_file("--output", output, [".png"], as_png)
    if progress_strip is not None:
        progress_strip = output_file("--progress-strip", progress_strip, [".png"], as_png)
        if progress_strip == output:
            raise ValueError(f"--progress-strip is {progress_strip}; it must be another file than -o")
    if count < 1:
        raise ValueError(f"-n is {count}; it must be at least 1")
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
    from ldm.pipelines.sampling import SamplingKwargs, SamplingParams, check_size, image_prompts, image_seeds
    from ldm.text import ignore_cut_prompts

    # What is wrong whatever the model is said before it is loaded.
    parts: Any = int(tile) if tile.isdecimal() else tile
    check_tile(parts)
    for source, weight in weighted:
        check_weight(source, weight)
    check_size(height, width)
    image_prompts(prompt, negative_prompt, count)
    if seed is not None:
        image_seeds([seed, seed + count - 1], 2)
    sampling: SamplingKwargs = {
        "sampler": sampler,
        "sampler_options": options or None,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": guidance_interval,
        "dynamic_threshold": dynamic_threshold,
    }
    SamplingParams.resolve(sampling if sampler else {**sampling, "sampler_options": None})
    pipeline = Pipeline.from_pretrained(disk.expand_user(model) if model.startswith("~") else model, device=device)
    pipeline.tile(parts)
    for number, (source, weight) in enumerate(weighted):
        pipeline.load_lora(source, name=f"lora{number}", weight=weight)
    params = pipeline.sampling_params(**sampling)
    strip = None if progress_strip is None else ProgressStrip(pipeline.preview, params.num_inference_steps)
    with ignore_cut_prompts():  # said below, since a wrong argument is one line and no more
        result = pipeline(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_images_per_prompt=count,
            seed=seed,
            on_step=strip,
            **sampling,
        )
    cut = pipeline.text_encoder.truncation_message([prompt, negative_prompt or ""])
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
    text = {"prompt": prompt, "negative_prompt": negative_prompt or "", "settings": settings}
    if progress_strip is not None and strip is not None:
        sheet = strip.sheet([f"seed {its_seed}" for its_seed in result.seeds])
        save_png(sheet, progress_strip, text | {"seed": result.seeds, "timesteps": strip.timesteps})
        print(progress_strip)
    if count == 1:
        save_png(result.images[0], output, text | {"seed": result.seeds[0]})
        print(output)
        return
    for image, its_seed in zip(result.images, result.seeds, strict=True):
        path = output.with_name(f"{output.stem}-{its_seed}{output.suffix}")
        save_png(image, path, text | {"seed": its_seed})
        print(path)
    rows = [result.images[start : start + 8] for start in range(0, count, 8)]
    save_png(contact_sheet(rows, size=max(result.images[0].width, 96)), output, text | {"seed": result.seeds})
    print(output)


def _source_and_weight(entry: str) -> tuple[str, float]:
    """Of a LoRA: "style.safetensors:0.7"; the weight is 1 without a number."""
    source, _, number = entry.rpartition(":")
    try:
        source, weight = (source, float(number)) if source else (entry, 1.0)
    except ValueError:
        source, weight = entry, 1.0
    return str(disk.expand_user(source)) if source.startswith("~") else source, weight
