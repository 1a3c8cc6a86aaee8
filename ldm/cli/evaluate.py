"""`ldm evaluate`: how good a model is, whether it draws what it is asked for, and whether it copies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm import disk
from ldm.cli.arguments import output_folder

if TYPE_CHECKING:
    from ldm.data import CaptionedImages, DataConfig
    from ldm.evaluation.cells import Grid
    from ldm.evaluation.features import FeatureSpace
    from ldm.evaluation.reference import Reference
    from ldm.evaluation.sweep import Sweep
    from ldm.pipelines import Pipeline
    from ldm.training.run_info import RunInfo


def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a pipeline folder, or a hub id.")],
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="Captioned images: a folder, a file, or the id of a data set. A run knows its own.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures to draw: half for captions of held-out images.")] = 256,
    features: Annotated[
        str, typer.Option(help="What pictures are compared by: efficientnet, pixel, inception (FID) or clip.")
    ] = "efficientnet",
    weights: Annotated[
        str | None, typer.Option(help="With --features inception or clip: the file, or MODEL:TAG of open_clip.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Also the CLIP score, by MODEL:TAG or MODEL:FILE.safetensors of open_clip.")
    ] = None,
    reference: Annotated[
        int, typer.Option(help="Compare with so many images of either side at most, drawn by --seed.")
    ] = 20000,
    held_out: Annotated[
        float | None, typer.Option(help="The share that training held out; a run knows its own, else 0.1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the model's default otherwise.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's default otherwise.")] = None,
    seed: Annotated[int, typer.Option(help="Of captions, noise and intervals.")] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try guidance scales and steps first, and make the best the defaults.")
    ] = False,
    sweep_guidance: Annotated[str, typer.Option(help="The guidance scales of --sweep.")] = "1,2,3,5,8",
    sweep_steps: Annotated[str, typer.Option(help="The numbers of steps of --sweep.")] = "5,10,20,50",
    sweep_samples: Annotated[int, typer.Option(help="Pictures for each of these.")] = 64,
    store: Annotated[bool, typer.Option(help="With --sweep: store the best as the defaults of the model.")] = True,
    axes: Annotated[
        bool, typer.Option("--axes", help="Instead, of a model of scenes: how it composes, axis by axis.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(help="With --axes: prompts of each at most; 100 by default, and all single things.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="The column with images; guessed by default.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The column with captions; guessed by default.")] = None,
    caption_source: Annotated[
        str | None, typer.Option(help="Of several sources of captions, the one to use: see docs/data.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of page, JSON and sheets; evaluation by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, …; the accelerator by default where there is one.")
    ] = None,
) -> None:
    """Draw pictures for captions of the data, and measure them against its images. Writes a page with all of it.

    With --axes, of a model whose data is scenes: how often single things, colors, relations, counts and combinations
    that training never shows come out right, as axes.json and axes.png.
    """
    from ldm.data import DataConfig
    from ldm.evaluation.evaluate import check_samples
    from ldm.pipelines.arguments import check_steps, image_seeds
    from ldm.pipelines.sampling import SamplingParams
    from ldm.training.run_info import find_run

    # What is wrong whatever the model is said before it is loaded.
    check_samples(samples)
    check_steps(steps)
    SamplingParams(num_inference_steps=1, guidance_scale=1.0 if guidance is None else guidance)
    image_seeds(seed, samples)
    DataConfig(path=path or "any", resolution=1, held_out=0.1 if held_out is None else held_out)
    if sweep_samples < 1:
        raise ValueError(f"--sweep-samples is {sweep_samples}; it must be at least 1")
    if reference < 1:
        raise ValueError(f"--reference is {reference}; it is a number of images, at least 1")
    if sweep and (steps is not None or guidance is not None):
        raise ValueError("--sweep chooses steps and guidance; say with --sweep-steps and --sweep-guidance what to try")
    if axes and (sweep or path is not None):
        raise ValueError(
            "--axes asks for scenes of its own, with the defaults that are stored; leave DATA and --sweep out"
        )
    if prompts is not None and not axes:
        raise ValueError("--prompts is for --axes; pictures for captions of the data are counted by --samples")
    grid = _grid(sweep_guidance, sweep_steps) if sweep else None
    model = str(disk.expand_user(model)) if model.startswith("~") else model
    run = find_run(model)
    folder = output_folder("--output", output or _own_folder(model, run))
    asked = Asked(model, path, run, folder, samples, seed, steps, guidance, as_json)
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
                bars=_bars,
            )
            return
        _evaluate(
            asked,
            columns={
                "image_column": image_column,
                "caption_column": caption_column,
                "caption_source": caption_source,
            },
            held_out=held_out,
            most=reference,
            features=(features, weights),
            clip_name=clip,
            sweep=None if grid is None else (grid, sweep_samples, store),
            device=device,
        )
    except KeyboardInterrupt:
        kept = any(path.is_file() for path in (folder / "pictures").rglob("*"))
        goes_on = f"; what was drawn is kept in {folder}, and the same command goes on from there" if kept else ""
        print(f"stopped{goes_on}", file=sys.stderr)
        raise typer.Exit(130) from None


class Asked:
    """The arguments that most parts need."""

    def __init__(
        self,
        model: str,
        path: str | None,
        run: RunInfo | None,
        folder: Path,
        samples: int,
        seed: int,
        steps: int | None,
        guidance: float | None,
        as_json: bool,
    ) -> None:
        self.model, self.path, self.run, self.folder = model, path, run, folder
        self.samples, self.seed, self.steps, self.guidance, self.as_json = samples, seed, steps, guidance, as_json

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def _evaluate(
    asked: Asked,
    *,
    columns: dict[str, str | None],
    held_out: float | None,
    most: int,
    features: tuple[str, str | None],
    clip_name: str | None,
    sweep: tuple[Grid, int, bool] | None,
    device: str | None,
) -> None:
    from ldm.data.layouts import check_path
    from ldm.evaluation.clip import load_clip
    from ldm.evaluation.evaluate import captions_wanted, evaluate, expected
    from ldm.evaluation.features import feature_space
    from ldm.evaluation.kept import KeptPictures
    from ldm.evaluation.page import Account
    from ldm.evaluation.reference import Reference, some_of
    from ldm.evaluation.said import said
    from ldm.evaluation.sweep import model_digest
    from ldm.pipelines.pipeline import usable_device
    from ldm.training.run_info import open_model

    if asked.path is not None:
        check_path(asked.path)
    place = usable_device(device)
    space = feature_space(features[0], device=place, weights=features[1])  # refused before a model is loaded
    clip = None if clip_name is None else load_clip(clip_name, place)
    pipeline, opened = open_model(asked.model, asked.run, device)
    training, unseen, notes = _data(asked, pipeline, columns, held_out)
    asked.say(expected(pipeline, asked.samples, num_inference_steps=asked.steps, guidance_scale=asked.guidance))
    if sweep is not None and unseen is None:
        raise ValueError("--sweep measures on held-out images, and nothing is held out; leave it out")
    asked.say(
        f"{training.config.path}: {len(training):,} training images, {len(unseen) if unseen else 0:,} held out; "
        f"{space.label()}"
    )
    for note in notes:
        asked.say(f"note: {note}")
    about = _about(asked, opened, training, unseen)
    if max(len(training), len(unseen or ())) > most:
        asked.say(f"note: pictures are compared with {most:,} images of either side at most (--reference)")
    compared = some_of(training, most, asked.seed), unseen and some_of(unseen, most, asked.seed)
    asked.folder.mkdir(parents=True, exist_ok=True)
    reference = Reference.of(*compared, space, bars=_bars, print=asked.say)
    wanted = captions_wanted(reference, asked.samples, asked.seed)
    cut = pipeline.text_encoder.truncation_message(caption for captions, _ in wanted.values() for caption in captions)
    if cut:
        notes.append(f"captions are cut: {cut}")
        print(f"warning: {notes[-1]}", file=sys.stderr, flush=True)
    swept = None if sweep is None else _sweep(asked, pipeline, reference, space, *sweep)
    if swept is not None and swept.chosen.decided:
        asked.steps, asked.guidance = swept.chosen.cell.num_inference_steps, swept.chosen.cell.guidance_scale
    digest = model_digest(pipeline)
    found = evaluate(
        pipeline,
        reference,
        samples=asked.samples,
        seed=asked.seed,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        clip=clip,
        keep=KeptPictures(asked.folder / "pictures", digest),
        bars=_bars,
    )
    account = Account(
        f"{asked.model} on {training.config.path}", about | {"model_digest": digest}, notes, found, reference, swept
    )
    page = account.write(asked.folder)
    if asked.as_json:
        import json

        print(json.dumps(account.to_dict(), indent=2, allow_nan=False))
        return
    print("\n".join(said(found)))
    print(f"\npage: {page}")


def _grid(guidance: str, steps: str) -> Grid:
    from ldm.evaluation.cells import Grid

    return Grid(tuple(_numbers("--sweep-guidance", guidance, float)), tuple(_numbers("--sweep-steps", steps, int)))


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers with commas between them, such as 1,2,5") from None


def _own_folder(model: str, run: RunInfo | None) -> Path:
    """RUN/evaluation for a run folder, else `evaluation` here."""
    is_run = run is not None and Path(model).expanduser().resolve() == run.folder
    return run.folder / "evaluation" if run is not None and is_run else Path("evaluation")


# ---- the data


def _data(
    asked: Asked, pipeline: Pipeline, columns: dict[str, str | None], held_out: float | None
) -> tuple[CaptionedImages, CaptionedImages | None, list[str]]:
    """Both sides of the split, and what a reader has to know of it."""
    from ldm.data import CaptionedImages, inspect, open_source
    from ldm.data import split as split_of

    config, known = _data_config(asked, pipeline, columns, held_out)
    used = inspect(open_source(config), config, progress=True).used
    ours, theirs = split_of(used, config.held_out)
    batch_size = asked.run.config.train.batch_size if asked.run is not None and known else 1
    training = CaptionedImages(ours, config, asked.seed, batch_size=batch_size)
    unseen = CaptionedImages(theirs, config, asked.seed, sizes=training.buckets.sizes) if theirs else None
    notes = []
    if asked.run is None:
        notes.append(
            f"no run folder says what {asked.model} was trained on: its training images may be among those that count "
            "as held out, which would flatter it and hide copies"
        )
    elif not known:
        notes.append(
            f"{asked.model} was trained on {asked.run.config.data.path}, not on {config.path}: none of these images is "
            "known to be trained on"
        )
    elif (change := asked.run.data_mismatch(training, unseen)) is not None:
        notes.append(f"{change}; images that it was trained on may be among the held-out ones")
    if unseen is None:
        notes.append(
            "nothing is held out, so that there is no yardstick for quality, no text that the model has not seen, and "
            "little to tell learning from memorizing by (data.held_out)"
        )
    return training, unseen, notes


def _data_config(
    asked: Asked, pipeline: Pipeline, columns: dict[str, str | None], held_out: float | None
) -> tuple[DataConfig, bool]:
    """The data to take, and whether it is what the model is known to have been trained on."""
    from ldm.data import DataConfig
    from ldm.training.run_info import data_config, uses_same_data

    if asked.run is not None and (asked.path is None or uses_same_data(asked.run, asked.path)):
        return data_config(asked.run, held_out=held_out, **columns), True
    if asked.path is None:
        raise ValueError(
            f"{asked.model} is no run folder, so that its data is not known; name it: ldm evaluate MODEL DATA"
        )
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(f"{asked.model} draws {width}x{height} pixels; only models of squares can be evaluated")
    share = 0.1 if held_out is None else held_out
    return DataConfig(path=asked.path, resolution=height, held_out=share, **columns), False  # type: ignore[arg-type]


# ---- the rest


def _sweep(
    asked: Asked,
    pipeline: Pipeline,
    reference: Reference,
    space: FeatureSpace,
    grid: Grid,
    count: int,
    store: bool,
) -> Sweep:
    from ldm.evaluation.reference import pictures_at_once
    from ldm.evaluation.sweep import sweep

    assert reference.held_out is not None
    models, folder = _models(asked, pipeline)
    total = grid.evaluations(len(models), count)
    with _bars(f"sweep of {len(models) * len(grid.pairs())} settings", total) as done:
        found = sweep(
            models,
            reference.held_out.samples,
            reference.gallery,
            space,
            grid=grid,
            count=count,
            seed=asked.seed,
            at_once=pictures_at_once(*pipeline.default_size),
            record=asked.folder / "sweep.json",
            store_in=folder if store else None,
            progress=done,
        )
    if not asked.as_json:
        print("\n".join(found.lines()), end="\n\n")
    return found


def _models(asked: Asked, pipeline: Pipeline) -> tuple[dict[str, Pipeline], Path | None]:
    """The weights that a sweep tries, and the folder whose defaults it may change."""
    from ldm.checkpoint import BUILT_IN_PIPELINES
    from ldm.evaluation.sweep import raw_model
    from ldm.training.checkpoints import list_checkpoints

    run, where = asked.run, Path(asked.model).expanduser()
    if asked.model in BUILT_IN_PIPELINES:
        asked.say("note: the defaults of a built-in model stay as they are; none are stored")
        return {"own": pipeline}, None
    if run is None:
        return {"own": pipeline}, where if where.is_dir() else None
    if where.resolve() != run.folder:
        return {"EMA": pipeline}, where
    if run.config.export != "pipeline":
        asked.say("note: the defaults of a LoRA stand with the model that it is loaded on; none are stored")
        return {"EMA": pipeline}, None
    saved = list_checkpoints(run.folder)
    if not saved:
        asked.say(f"note: {run.folder} has no checkpoint, so that the weights without averaging are not tried")
        return {"EMA": pipeline}, run.folder / "pipeline"
    return {"EMA": pipeline, "raw": raw_model(pipeline, saved[-1] / "training")}, run.folder / "pipeline"


def _about(asked: Asked, opened: str, training: CaptionedImages, unseen: CaptionedImages | None) -> dict[str, Any]:
    import ldm
    from ldm.training.resume import data_fingerprint

    return {
        "model": opened,
        "run": None if asked.run is None else str(asked.run.folder),
        "data": training.config.path,
        "data_sha256": data_fingerprint(training, unseen),
        "held_out": training.config.held_out,
        "ldm": ldm.__version__,
    }


@contextmanager
def _bars(what: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, delay=2, leave=False, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        yield bar.update
