"""`ldm evaluate`: image quality, prompt alignment and memorization of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm import disk
from ldm.cli.arguments import output_folder

if TYPE_CHECKING:
    from ldm.data import CaptionedImages, DataConfig
    from ldm.evaluation.features import FeatureSpace
    from ldm.evaluation.images import Reference
    from ldm.evaluation.sweep import Sweep, SweepGrid
    from ldm.pipelines import Pipeline
    from ldm.training.run_info import RunInfo


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
    weights: Annotated[
        str | None, typer.Option(help="With --features inception or clip: the file, or MODEL:TAG of open_clip.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Also the CLIP score, by MODEL:TAG or MODEL:FILE.safetensors of open_clip.")
    ] = None,
    reference: Annotated[
        int, typer.Option(help="Maximum number of images to compare with, training and held-out, chosen by --seed.")
    ] = 20000,
    held_out: Annotated[
        float | None, typer.Option(help="The fraction that training held out; read from a run, else 0.1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the model's default otherwise.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's default otherwise.")] = None,
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
    image_column: Annotated[str | None, typer.Option(help="The column with images; detected by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; detected by default.")] = None,
    caption_source: Annotated[
        str | None, typer.Option(help="Which source of captions to use, if there are several: see docs/data.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the page, JSON and sheets; evaluation by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, …; an accelerator by default if there is one.")
    ] = None,
) -> None:
    """Generate images for captions of the data, and measure them against its images. Writes a page with the results.

    With --axes, for a model of scenes: how often single things, colors, relations, counts and combinations that were
    not in the training data are right, as axes.json and axes.png.
    """
    from ldm.data import DataConfig
    from ldm.evaluation.evaluate import check_samples
    from ldm.evaluation.sweep import SweepGrid
    from ldm.pipelines.sampling import SamplingParams, image_seeds
    from ldm.training.run_info import find_run

    # Errors that do not depend on the model come before it is loaded.
    check_samples(samples)
    SamplingParams.resolve({"num_inference_steps": steps, "guidance_scale": guidance})
    image_seeds(seed, samples)
    DataConfig(path=path or "any", resolution=1, held_out=0.1 if held_out is None else held_out)
    if sweep_samples < 1:
        raise ValueError(f"--sweep-samples is {sweep_samples}; it must be at least 1")
    if reference < 1:
        raise ValueError(f"--reference is {reference}; it must be at least 1 image")
    if sweep and (steps is not None or guidance is not None):
        raise ValueError("--sweep chooses steps and guidance; give --sweep-steps and --sweep-guidance instead")
    if axes and (sweep or path is not None):
        raise ValueError("--axes generates its own scenes with the stored defaults; leave DATA and --sweep out")
    if prompts is not None and not axes:
        raise ValueError("--prompts is for --axes; use --samples for captions of the data")
    grid = None
    if sweep:
        scales = _numbers("--sweep-guidance", sweep_guidance, float)
        grid = SweepGrid(tuple(scales), tuple(_numbers("--sweep-steps", sweep_steps, int)))
    model = str(disk.expand_user(model)) if model.startswith("~") else model
    run = find_run(model)
    is_run = run is not None and Path(model).expanduser().resolve() == run.folder
    default = run.folder / "evaluation" if run is not None and is_run else Path("evaluation")
    folder = output_folder("--output", output or default)
    options = _Options(model, path, run, folder, samples, seed, steps, guidance, as_json)
    try:
        if axes:
            from ldm.cli.axes import evaluate_axes

            evaluate_axes(
                model,
                run,
                folder,
                prompts=prompts,
                seed=seed,
                steps=steps,
                guidance=guidance,
                device=device,
                as_json=as_json,
                progress=_progress,
            )
            return
        _evaluate(
            options,
            columns={
                "image_column": image_column,
                "caption_column": caption_column,
                "caption_source": caption_source,
            },
            held_out=held_out,
            max_reference=reference,
            features=(features, weights),
            clip_name=clip,
            sweep=None if grid is None else (grid, sweep_samples, store),
            device=device,
        )
    except KeyboardInterrupt:
        cached = any(path.is_file() for path in (folder / "pictures").rglob("*"))
        resume = f"; generated images are in {folder}, and the same command continues from there" if cached else ""
        print(f"stopped{resume}", file=sys.stderr)
        raise typer.Exit(130) from None


@dataclass(frozen=True)
class _Options:
    """The options that most parts need."""

    model: str
    path: str | None
    run: RunInfo | None
    folder: Path
    samples: int
    seed: int
    steps: int | None
    guidance: float | None
    as_json: bool

    def log(self, text: str) -> None:
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def _evaluate(
    options: _Options,
    *,
    columns: dict[str, str | None],
    held_out: float | None,
    max_reference: int,
    features: tuple[str, str | None],
    clip_name: str | None,
    sweep: tuple[SweepGrid, int, bool] | None,
    device: str | None,
) -> None:
    import ldm
    from ldm.data.layouts import check_path
    from ldm.evaluation.evaluate import estimate_duration, evaluate, select_captions
    from ldm.evaluation.features import feature_space, load_clip
    from ldm.evaluation.images import Reference, SampleCache, subset
    from ldm.evaluation.sweep import model_digest
    from ldm.pipelines.pipeline import usable_device
    from ldm.report.evaluation_report import EvaluationReport, evaluation_lines
    from ldm.training.resume import data_fingerprint
    from ldm.training.run_info import open_model

    if options.path is not None:
        check_path(options.path)
    torch_device = usable_device(device)
    space = feature_space(features[0], device=torch_device, weights=features[1])  # checked before a model is loaded
    clip = None if clip_name is None else load_clip(clip_name, torch_device)
    pipeline, opened = open_model(options.model, options.run, device)
    training, unseen, notes = _data(options, pipeline, columns, held_out)
    steps, guidance = options.steps, options.guidance
    options.log(estimate_duration(pipeline, options.samples, num_inference_steps=steps, guidance_scale=guidance))
    if sweep is not None and unseen is None:
        raise ValueError("--sweep measures on held-out images, and there are none; leave it out")
    options.log(
        f"{training.config.path}: {len(training):,} training images, {len(unseen) if unseen else 0:,} held out; "
        f"{space.label()}"
    )
    for note in notes:
        options.log(f"note: {note}")
    about = {
        "model": opened,
        "run": None if options.run is None else str(options.run.folder),
        "data": training.config.path,
        "data_sha256": data_fingerprint(training, unseen),
        "held_out": training.config.held_out,
        "ldm": ldm.__version__,
    }
    if max(len(training), len(unseen or ())) > max_reference:
        options.log(f"note: at most {max_reference:,} images of either side are compared with (--reference)")
    sides = [images and subset(images, max_reference, options.seed) for images in (training, unseen)]
    assert sides[0] is not None
    options.folder.mkdir(parents=True, exist_ok=True)
    reference = Reference.from_data(sides[0], sides[1], space, progress=_progress, log=options.log)
    selected = select_captions(reference, options.samples, options.seed)
    cut = pipeline.text_encoder.truncation_message(caption for captions, _ in selected.values() for caption in captions)
    if cut:
        notes.append(f"captions are cut: {cut}")
        print(f"warning: {notes[-1]}", file=sys.stderr, flush=True)
    swept = None if sweep is None else _sweep(options, pipeline, reference, space, *sweep)
    if swept is not None and swept.chosen.decided:
        steps, guidance = swept.chosen.cell.num_inference_steps, swept.chosen.cell.guidance_scale
    digest = model_digest(pipeline)
    found = evaluate(
        pipeline,
        reference,
        samples=options.samples,
        seed=options.seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        clip=clip,
        cache=SampleCache(options.folder / "pictures", digest),
        progress=_progress,
    )
    title = f"{options.model} on {training.config.path}"
    report = EvaluationReport(title, about | {"model_digest": digest}, notes, found, reference, swept)
    page = report.write(options.folder)
    if options.as_json:
        import json

        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return
    print("\n".join(evaluation_lines(found)))
    print(f"\npage: {page}")


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas, such as 1,2,5") from None


def _data(
    options: _Options, pipeline: Pipeline, columns: dict[str, str | None], held_out: float | None
) -> tuple[CaptionedImages, CaptionedImages | None, list[str]]:
    """Both sides of the split, and notes for the reader."""
    from ldm.data import CaptionedImages
    from ldm.data import split as split_of
    from ldm.data.inspection import inspect
    from ldm.data.layouts import open_source

    config, is_known = _data_config(options, pipeline, columns, held_out)
    used = inspect(open_source(config), config, progress=True).used
    ours, theirs = split_of(used, config.held_out)
    run, model = options.run, options.model
    batch_size = run.config.train.batch_size if run is not None and is_known else 1
    training = CaptionedImages(ours, config, options.seed, batch_size=batch_size)
    unseen = CaptionedImages(theirs, config, options.seed, sizes=training.buckets.sizes) if theirs else None
    notes = []
    if run is None:
        notes.append(
            f"the training data of {model} is unknown, as it is not in a run folder: training images may count as held "
            "out, which would improve its metrics and hide copies"
        )
    elif not is_known:
        notes.append(
            f"{model} was trained on {run.config.data.path}, not on {config.path}: it may not have seen any of these "
            "images"
        )
    elif (change := run.data_mismatch(training, unseen)) is not None:
        notes.append(f"{change}; training images may be among the held-out ones")
    if unseen is None:
        notes.append(
            "nothing is held out (data.held_out), so there are no real images to compare metrics with, no unseen "
            "captions, and little evidence for learning or memorizing"
        )
    return training, unseen, notes


def _data_config(
    options: _Options, pipeline: Pipeline, columns: dict[str, str | None], held_out: float | None
) -> tuple[DataConfig, bool]:
    """The data, and whether the model is known to have been trained on it."""
    from ldm.data import DataConfig
    from ldm.training.run_info import data_config, uses_same_data

    if options.run is not None and (options.path is None or uses_same_data(options.run, options.path)):
        return data_config(options.run, held_out=held_out, **columns), True
    if options.path is None:
        raise ValueError(f"{options.model} is no run folder, so its data is unknown; name it: ldm evaluate MODEL DATA")
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(f"{options.model} generates {width}x{height} pixels; only models of squares can be evaluated")
    fraction = 0.1 if held_out is None else held_out
    return DataConfig(path=options.path, resolution=height, held_out=fraction, **columns), False  # type: ignore[arg-type]


def _sweep(
    options: _Options,
    pipeline: Pipeline,
    reference: Reference,
    space: FeatureSpace,
    grid: SweepGrid,
    count: int,
    store: bool,
) -> Sweep:
    from ldm.evaluation.images import default_batch_size
    from ldm.evaluation.sweep import sweep

    assert reference.held_out is not None
    models, folder = _models(options, pipeline)
    total = grid.evaluations(len(models), count)
    with _progress(f"sweep of {len(models) * len(grid.pairs())} settings", total) as update:
        found = sweep(
            models,
            reference.held_out.samples,
            reference.gallery,
            space,
            grid=grid,
            count=count,
            seed=options.seed,
            batch_size=default_batch_size(*pipeline.default_size),
            record=options.folder / "sweep.json",
            store_in=folder if store else None,
            progress=update,
        )
    if not options.as_json:
        print("\n".join(found.lines()), end="\n\n")
    return found


def _models(options: _Options, pipeline: Pipeline) -> tuple[dict[str, Pipeline], Path | None]:
    """The weights to sweep, and the folder whose defaults may change."""
    from ldm.evaluation.sweep import raw_model
    from ldm.hub import BUILT_IN_PIPELINES
    from ldm.training.checkpoints import list_checkpoints

    run, path = options.run, Path(options.model).expanduser()
    if options.model in BUILT_IN_PIPELINES:
        options.log("note: the defaults of a built-in model cannot be changed; none are stored")
        return {"own": pipeline}, None
    if run is None:
        return {"own": pipeline}, path if path.is_dir() else None
    if path.resolve() != run.folder:
        return {"EMA": pipeline}, path
    if run.config.export != "pipeline":
        options.log("note: a LoRA has the defaults of the model it is loaded on; none are stored")
        return {"EMA": pipeline}, None
    saved = list_checkpoints(run.folder)
    if not saved:
        options.log(f"note: {run.folder} has no checkpoint, so the weights without EMA are not tried")
        return {"EMA": pipeline}, run.folder / "pipeline"
    return {"EMA": pipeline, "raw": raw_model(pipeline, saved[-1] / "training")}, run.folder / "pipeline"


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=title, delay=2, leave=False, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        yield bar.update
