"""What the command line does, from Python: one call each, with typed options and a typed result.

    from ldm import EvaluationOptions, check_data, evaluate, evaluate_autoencoder, likelihood

    evaluate("runs/openmoji", options=EvaluationOptions(samples=64))

Results print as one line, have all numbers as `to_dict()` and show their page or images in a notebook. Arguments are
checked before a model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from PIL import Image

from ldm import __version__, disk, hub
from ldm.codecs import check_tile
from ldm.data import CaptionedImages, DataConfig, NoCaptionsError, Sample, generator
from ldm.data import split as split_images
from ldm.data.inspection import inspect
from ldm.data.layouts import check_path, open_source
from ldm.data.report import DatasetReport, dataset_report
from ldm.evaluation.evaluate import (
    check_samples,
    estimate_duration,
    evaluate_pipeline,
    select_captions,
)
from ldm.evaluation.features import FeatureSpace, feature_space, load_clip
from ldm.evaluation.images import Reference, SampleCache, default_batch_size, subset
from ldm.evaluation.sweep import Sweep, SweepGrid, model_digest, raw_model, sweep
from ldm.pipelines import Pipeline, SamplingParams, save_png
from ldm.pipelines.images import png_bytes
from ldm.pipelines.pipeline import usable_device
from ldm.pipelines.sampling import image_seeds
from ldm.progress import progress_bar
from ldm.report.charts import Line, line_chart, save_chart
from ldm.report.evaluation_report import EvaluationResult
from ldm.training.resume import data_fingerprint
from ldm.training.run_info import RunInfo, data_config, find_run, open_model, scenes_after, uses_same_data

TERMS_AXIS = "timestep t (0 is L_0)"
Split = Literal["held-out", "all"]


# ---- data


def check_data(
    data: DataConfig | str,
    *,
    encoder: str | None = None,
    max_length: int | None = None,
) -> DatasetReport:
    """Reads a data set as a training would, and reports its contents and problems.

    Args:
        data: a path or hub id, for 64 pixels a side; or all data settings.
        encoder: the text encoder that has to read the captions; None takes minilm and does without if it is missing.
        max_length: maximum tokens of a caption; 32 by default, 48 for scenes.

    Raises:
        ValueError: if the data, or an encoder that is given, cannot be opened.
    """
    from ldm.text import load_text_encoder

    config = DataConfig(path=data, resolution=64) if isinstance(data, str) else data
    truncated_words, uncounted = None, ""
    length = (48 if config.path == "scenes" else 32) if max_length is None else max_length
    try:
        truncated_words = load_text_encoder(encoder or "minilm", length).truncated_words
    except ValueError as error:
        if encoder is not None or max_length is not None:
            raise
        uncounted = str(error)  # images can be checked without the default encoder
    try:
        source = open_source(config)
    except NoCaptionsError as error:  # the report lists the skipped entries
        source = error.source
    inspection = inspect(source, config, progress=True, include_curated=True)
    return dataset_report(inspection, config, truncated_words=truncated_words, uncounted=uncounted)


# ---- models


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data is read, and on which device to compute.

    Args:
        image_column, caption_column, caption_source: as in `DataConfig`; None detects them.
        device: None takes an accelerator if there is one.
    """

    seed: int = 0
    image_column: str | None = None
    caption_column: str | None = None
    caption_source: str | None = None
    device: str | None = None

    @property
    def columns(self) -> dict[str, str | None]:
        return {key: getattr(self, key) for key in ("image_column", "caption_column", "caption_source")}

    def data_config(self, path: str, resolution: int) -> DataConfig:
        """The config of data, `resolution` unless the options name one."""
        keys = ("held_out", "buckets", "background", "resolution")
        given = {key: value for key in keys if (value := getattr(self, key, None)) is not None}
        return DataConfig(**{"path": path, "resolution": resolution} | self.columns | given)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Args:
    grid: guidance scales and numbers of steps to try, with `samples` images each.
    store: whether the best becomes the default of the model, if it is a folder of `ldm` that may change.
    """

    grid: SweepGrid = field(default_factory=SweepGrid)
    samples: int = 64
    store: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples of a sweep are {self.samples}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(DataOptions):
    """How `evaluate` generates and measures images.

    Args:
        samples: images to generate, half of them for captions of held-out images.
        features, weights, clip: as `ldm.evaluation.features.feature_space` and `load_clip`; `clip` adds the CLIP score.
        max_reference: maximum number of images to compare with, training and held-out, chosen by `seed`.
        held_out: the fraction that training held out; None reads it from the run, and is 0.1 without one.
        num_inference_steps, guidance_scale: None takes the model's defaults.
        seed: for captions, noise and intervals.
        sweep: settings to try first; the best are used.

    Raises:
        ValueError: for values out of range.
    """

    samples: int = 256
    features: str = "efficientnet"
    weights: str | None = None
    clip: str | None = None
    max_reference: int = 20_000
    held_out: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sweep: SweepOptions | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)
        SamplingParams.resolve({"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale})
        image_seeds(self.seed, self.samples)
        self.data_config("any", 1)
        if self.max_reference < 1:
            raise ValueError(f"max_reference is {self.max_reference}; it must be at least 1 image")
        if self.sweep is not None and (self.num_inference_steps, self.guidance_scale) != (None, None):
            raise ValueError("a sweep chooses num_inference_steps and guidance_scale; leave them out")


def evaluation_folder(model: str | Path, output: str | Path | None = None) -> Path:
    """Where `evaluate` writes: `output`; else `evaluation` in a run folder, or in the working directory."""
    if output is not None:
        return disk.expand_user(output)
    run = find_run(str(model))
    base = Path() if run is None or Path(model).expanduser().resolve() != run.folder else run.folder
    return base / "evaluation"


def evaluate(
    model: str | Path,
    data: str | None = None,
    *,
    output: str | Path | None = None,
    options: EvaluationOptions | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> EvaluationResult:
    """Generates images for captions of the data, measures them against its images, and writes a page.

    Generated images are cached in the output folder: an interrupted evaluation continues.

    Args:
        model: a run folder, a pipeline folder, or a hub id.
        data: a path or the id of a data set; None takes that of the run.
        output: the folder of the page, JSON and sheets: `evaluation_folder`.
        log: is told how long it will take, and of notes and warnings, as they arise.

    Raises:
        ValueError: for a model or data that cannot be opened, or do not go together.
    """
    options = options or EvaluationOptions()
    model, folder = _expanded(model), evaluation_folder(model, output)
    if data is not None:
        check_path(options.data_config(data, 1).path)
    run = find_run(model)
    device = usable_device(options.device)
    space = feature_space(options.features, device=device, weights=options.weights)
    clip = None if options.clip is None else load_clip(options.clip, device)
    pipeline, opened = open_model(model, run, options.device)
    training, held_out, notes = _data_of(model, run, data, pipeline, options)
    if options.sweep is not None and held_out is None:
        raise ValueError("a sweep measures on held-out images, and there are none; leave it out")
    steps, guidance = options.num_inference_steps, options.guidance_scale
    log(estimate_duration(pipeline, options.samples, num_inference_steps=steps, guidance_scale=guidance))
    counts = f"{len(training):,} training images, {len(held_out) if held_out else 0:,} held out"
    log(f"{training.config.path}: {counts}; {space.label()}")
    for note in notes:
        log(f"note: {note}")
    about: dict[str, Any] = {
        "model": opened,
        "run": None if run is None else str(run.folder),
        "data": training.config.path,
        "data_sha256": data_fingerprint(training, held_out),
        "held_out": training.config.held_out,
        "ldm": __version__,
        "model_digest": model_digest(pipeline),
    }
    limit = options.max_reference
    if max(len(training), len(held_out or ())) > limit:
        log(f"note: at most {limit:,} images of either side are compared with")
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference.from_data(
        subset(training, limit, options.seed),
        held_out and subset(held_out, limit, options.seed),
        space,
        progress=progress_bar,
        log=log,
    )
    selected = select_captions(reference, options.samples, options.seed).values()
    truncated = _truncation(pipeline, (caption for captions, _ in selected for caption in captions))
    if truncated is not None:
        notes.append(truncated)
        log(f"warning: {truncated}")
    swept = None
    if options.sweep is not None:
        swept = _sweep(model, run, pipeline, reference, space, options, folder, log)
        if swept.chosen.decided:
            steps, guidance = swept.chosen.cell.num_inference_steps, swept.chosen.cell.guidance_scale
    found = evaluate_pipeline(
        pipeline,
        reference,
        samples=options.samples,
        seed=options.seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        clip=clip,
        cache=SampleCache(folder / "pictures", about["model_digest"]),
        progress=progress_bar,
    )
    result = EvaluationResult(f"{model} on {training.config.path}", about, notes, found, reference, swept, folder)
    result.write()
    return result


def _data_of(
    model: str, run: RunInfo | None, path: str | None, pipeline: Pipeline, options: EvaluationOptions
) -> tuple[CaptionedImages, CaptionedImages | None, list[str]]:
    """Both sides of the split, and notes for the reader."""
    is_known = run is not None and (path is None or uses_same_data(run, path))
    if run is not None and is_known:
        config = data_config(run, held_out=options.held_out, **options.columns)
    elif path is None:
        raise ValueError(f"{model} is no run folder, so its data is unknown; name it: ldm evaluate MODEL DATA")
    else:
        height, width = pipeline.default_size
        if height != width:
            raise ValueError(f"{model} generates {width}x{height} pixels; only models of squares can be evaluated")
        config = options.data_config(path, height)
    used = inspect(open_source(config), config, progress=True).used
    ours, theirs = split_images(used, config.held_out)
    batch_size = run.config.train.batch_size if run is not None and is_known else 1
    training = CaptionedImages(ours, config, options.seed, batch_size=batch_size)
    held_out = CaptionedImages(theirs, config, options.seed, sizes=training.buckets.sizes) if theirs else None
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
    elif (change := run.data_mismatch(training, held_out)) is not None:
        notes.append(f"{change}; training images may be among the held-out ones")
    if held_out is None:
        notes.append(
            "nothing is held out (data.held_out), so there are no real images to compare metrics with, no unseen "
            "captions, and little evidence for learning or memorizing"
        )
    return training, held_out, notes


def _sweep(
    model: str,
    run: RunInfo | None,
    pipeline: Pipeline,
    reference: Reference,
    space: FeatureSpace,
    options: EvaluationOptions,
    folder: Path,
    log: Callable[[str], None],
) -> Sweep:
    """Tries settings, with and without EMA if the run has both; stores the best if the model's folder may change."""
    from ldm.training.checkpoints import list_checkpoints

    assert reference.held_out is not None and options.sweep is not None
    path, name = Path(model).expanduser(), "own" if run is None or model in hub.BUILT_IN_PIPELINES else "EMA"
    models, store_in = {name: pipeline}, path if path.is_dir() else None
    if model in hub.BUILT_IN_PIPELINES:
        log("note: the defaults of a built-in model cannot be changed; none are stored")
        store_in = None
    elif run is not None and path.resolve() == run.folder and run.config.export != "pipeline":
        log("note: a LoRA has the defaults of the model it is loaded on; none are stored")
        store_in = None
    elif run is not None and path.resolve() == run.folder:
        store_in = run.folder / "pipeline"
        if saved := list_checkpoints(run.folder):
            models["raw"] = raw_model(pipeline, saved[-1] / "training")
        else:
            log(f"note: {run.folder} has no checkpoint, so the weights without EMA are not tried")
    grid, samples = options.sweep.grid, options.sweep.samples
    with progress_bar(
        f"sweep of {len(models) * len(grid.pairs())} settings", grid.evaluations(len(models), samples)
    ) as update:
        return sweep(
            models,
            reference.held_out.samples,
            reference.gallery,
            space,
            grid=grid,
            count=samples,
            seed=options.seed,
            batch_size=default_batch_size(*pipeline.default_size),
            record=folder / "sweep.json",
            store_in=store_in if options.sweep.store else None,
            progress=update,
        )


# ---- models of scenes


@dataclass(frozen=True, repr=False)
class AxesResult:
    """How a model of scenes composes.

    Attributes:
        about: the model, and a hash of it.
        report: `ldm.evaluation.composition.AxesReport`.
        folder: of `axes.json` and `axes.png`.
    """

    about: dict[str, Any]
    report: Any
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """The content of `axes.json`."""
        return {**self.about, **self.report.to_dict()}

    def __repr__(self) -> str:
        figures = ", ".join(f"{part.axis} {part.accuracies[-1].generated.mean:.0%}" for part in self.report.parts)
        return f"AxesResult({self.about['model']}: {figures})"

    def _repr_png_(self) -> bytes:
        return (self.folder / "axes.png").read_bytes()


def evaluate_axes(
    model: str | Path,
    *,
    output: str | Path | None = None,
    max_prompts: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | None = None,
) -> AxesResult:
    """How often a model of scenes gets things, colors, relations and counts right; writes axes.json and axes.png.

    Args:
        model: a run folder, or a pipeline in one.
        output: `evaluation_folder`.
        max_prompts: per axis; None takes 100, and all single things.
        num_inference_steps, guidance_scale: None takes the model's defaults.

    Raises:
        ValueError: for a model whose data is unknown or is not scenes.
    """
    from ldm.data.builtin import TIERS
    from ldm.evaluation.composition import evaluate_composition
    from ldm.evaluation.scene_classifier import load_scene_classifier
    from ldm.report.text import axes_sheet

    SamplingParams.resolve({"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale})
    model, folder = _expanded(model), evaluation_folder(model, output)
    run = find_run(model)
    if run is None or run.config.data.path != "scenes":
        why = "is not in a run folder" if run is None else f"was trained on {run.config.data.path}"
        raise ValueError(f"{model} {why}, and the axes are for models of scenes (data.path: scenes)")
    classifier = load_scene_classifier()
    pipeline, opened = open_model(model, run, device)
    about = {"model": opened, "model_digest": model_digest(pipeline)}
    folder.mkdir(parents=True, exist_ok=True)
    found = evaluate_composition(
        pipeline,
        classifier,
        tier=TIERS[run.config.data.things],
        scenes_seen=run.scenes or scenes_after(run.config, run.config.train.max_steps) or 0,
        max_prompts=max_prompts,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        cache=SampleCache(folder / "pictures", about["model_digest"]),
        progress=progress_bar,
    )
    result = AxesResult(about, found, folder)
    content = result.to_dict()
    disk.write_text(folder / "axes.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    settings = {key: value for key, value in content.items() if key not in ("axes", "nearest")}
    save_png(axes_sheet(found), folder / "axes.png", {"settings": settings})
    return result


# ---- first stages


@dataclass(frozen=True, kw_only=True)
class ImageOptions(DataOptions):
    """Which images `evaluate_autoencoder` and `likelihood` measure.

    Args:
        split: "held-out" (not seen in training) or "all", for a model of other data.
        held_out: the fraction that training held out.
        samples: number of images, chosen by `seed`; None takes all.
    """

    split: Split = "held-out"
    held_out: float = 0.1
    samples: int | None = None
    min_samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split is {self.split}; it is held-out or all")
        for key, lowest in (("samples", self.min_samples), ("seed", 0)):
            if (value := getattr(self, key)) is not None and value < lowest:
                raise ValueError(f"{key} is {value}; it must be at least {lowest}")
        self.data_config("any", 1)

    def read(self, config: DataConfig, *, captioned: bool = True) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """(other samples, which may be of the training; those to measure)."""
        everything = inspect(open_source(config, captioned=captioned), config, progress=True).used
        others, used = split_images(everything, self.held_out)
        if self.split == "all":
            others, used = (), everything
        if not used:
            raise ValueError(
                f"nothing of {config.path} is held out at a fraction of {self.held_out}; measure all images (split all)"
            )
        return others, used


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(ImageOptions):
    """How `evaluate_autoencoder` measures.

    Args:
        resolution: in pixels; None takes that of the autoencoder.
        buckets: images of several shapes; None: above 128 pixels.
        features, weights: of the Fréchet distance, as `ldm.evaluation.features.feature_space`.
        background: the color behind transparent images.
        tile: "auto", "off" or pixels a side that are decoded at a time.

    Raises:
        ValueError: for values out of range.
    """

    resolution: int | None = None
    buckets: bool | None = None
    features: str = "efficientnet"
    weights: str | None = None
    background: str = "white"
    tile: Any = "auto"
    min_samples: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.tile)


@dataclass(frozen=True, repr=False)
class AutoencoderResult:
    """Attributes:
    settings: model, data, split, resolution, seed.
    report: `ldm.evaluation.autoencoder.AutoencoderReport`.
    worst: the twelve worst images above their reconstructions.
    """

    settings: dict[str, Any]
    report: Any
    worst: Image.Image

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return self.settings | self.report.to_dict()

    def __repr__(self) -> str:
        found = self.report
        numbers = f"PSNR {found.psnr.mean:.1f} dB, perceptual distance {found.perceptual.mean:.2f}"
        return f"AutoencoderResult({self.settings['model']}: {numbers}, {found.images} images, {found.advice.action})"

    def _repr_png_(self) -> bytes:
        return png_bytes(self.worst)


def evaluate_autoencoder(
    model: str | Path, data: str, *, options: AutoencoderOptions | None = None
) -> AutoencoderResult:
    """Measures how well a first stage reconstructs images, and advises to use, tune, train or do without one.

    Args:
        model: a folder of an autoencoder or of a pipeline, a built-in name, or a hub id.
        data: images: a folder, a file, or the id of a data set.

    Raises:
        ValueError: for a model or data that cannot be opened, or do not go together.
    """
    from ldm.evaluation.autoencoder import measure_autoencoder, worst_sheet
    from ldm.models.efficientnet import perceptual_distance
    from ldm.models.similarity import MIN_IMAGE_SIZE
    from ldm.training.setup import load_first_stage

    options, name = options or AutoencoderOptions(), str(model)
    device = usable_device(options.device)
    check_path(options.data_config(data, 1).path)
    codec = load_first_stage(_expanded(model)).to(device)
    codec.tile(options.tile)
    space = feature_space(options.features, device=device, weights=options.weights)
    size = codec.autoencoder.config.sample_size
    config = options.data_config(data, size if isinstance(size, int) else min(size))
    if config.resolution < MIN_IMAGE_SIZE:
        raise ValueError(
            f"resolution is {config.resolution}; reconstructions need at least {MIN_IMAGE_SIZE} pixels a side"
        )
    learned, used = options.read(config, captioned=False)
    if options.samples is not None and options.samples > len(used):
        raise ValueError(f"samples is {options.samples}; there are {len(used)} images ({options.split})")
    count = len(learned or used)
    if options.samples is not None:
        chosen = generator(options.seed, "autoencoder", "images").permutation(len(used))[: options.samples]
        used = tuple(used[index] for index in sorted(chosen.tolist()))
    images = CaptionedImages(used, config, options.seed)
    with progress_bar("reconstructions", len(images)) as update:
        report = measure_autoencoder(
            codec,
            name,
            images,
            CaptionedImages(learned, config, options.seed) if learned else None,
            space=space,
            perceptual=perceptual_distance(device),
            device=device,
            training_images=count if options.split == "all" else len(learned),
            seed=options.seed,
            progress=update,
        )
    settings = {"model": name, "data": data, "split": options.split, "resolution": config.resolution}
    return AutoencoderResult(settings | {"seed": options.seed}, report, worst_sheet(codec, images, report, device))


# ---- likelihood


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(ImageOptions):
    """How `likelihood` measures.

    Args:
        steps_per_image: number of timesteps per image to estimate from, even; None takes all.
        variance: "small" or "large"; None for a model with learned variances, and else "small".

    Raises:
        ValueError: for values out of range.
    """

    steps_per_image: int | None = None
    variance: Literal["small", "large"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in (None, "small", "large"):
            raise ValueError(f"variance is {self.variance}; it is small or large")
        if self.steps_per_image is not None and (self.steps_per_image < 2 or self.steps_per_image % 2):
            raise ValueError(f"steps per image is {self.steps_per_image}; it must be an even number, at least 2")


@dataclass(frozen=True, repr=False)
class LikelihoodResult:
    """Attributes:
    settings: model, data, split, seed, shape of what is diffused, timesteps per image, variance.
    likelihood: `ldm.evaluation.likelihood.Likelihood`, in bits per dimension.
    truncated: a message if captions are longer than the text encoder reads, or None.
    """

    settings: dict[str, Any]
    likelihood: Any
    truncated: str | None

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON; an unknown interval is None."""
        found = self.likelihood
        values = {
            "L_T": found.prior,
            "sum_of_L_t": found.terms,
            "L_0": found.decoder,
            "bits_per_dimension": found.total,
            "interval_95": found.interval,
            "timesteps_interval_95": found.timesteps_interval,
        }
        return {
            **self.settings,
            "images": len(found.ids),
            "evaluations": found.evaluations,
            **{key: value if math.isfinite(value) else None for key, value in values.items()},
            "curve": [[stratum.first, stratum.last, stratum.bits] for stratum in found.curve],
        }

    def __repr__(self) -> str:
        found = self.likelihood
        bits = f"{found.total:.4f} ± {found.interval:.4f} bits per dimension"
        return f"LikelihoodResult({self.settings['model']} on {self.settings['data']}: {bits}, {len(found.ids)} images)"

    @property
    def terms(self) -> Line:
        """L_t over t, in bits per dimension."""
        points = [((stratum.first + stratum.last) // 2, stratum.bits) for stratum in self.likelihood.curve]
        return Line("L_t, bits per dimension", points)

    def _repr_html_(self) -> str:
        return line_chart([self.terms], title=self.terms.name, logarithmic=True, axis=TERMS_AXIS, standalone=True)

    def save_chart(self, path: str | Path) -> None:
        """The terms over t, as .svg or .png."""
        save_chart(Path(path), self.terms, axis=TERMS_AXIS)


def likelihood(model: str | Path, data: str, *, options: LikelihoodOptions | None = None) -> LikelihoodResult:
    """The variational bound of captioned images under a model of pixels, in bits per dimension.

    Args:
        model: a pipeline folder or hub id.
        data: captioned images: a folder, a file, or the id of a data set.

    Raises:
        ValueError: for a model of latents, and a model or data that cannot be opened or do not go together.
    """
    from ldm.evaluation.likelihood import measure_likelihood

    options = options or LikelihoodOptions()
    check_path(options.data_config(data, 1).path)
    pipeline = Pipeline.from_pretrained(_expanded(model), device=options.device)
    learned = pipeline.unet.config.learned_variance
    if learned and options.variance is not None:
        raise ValueError(f"variance is {options.variance}, but {model} has learned its variances; leave it out")
    config = options.data_config(data, pipeline.default_size[0])
    images = CaptionedImages(options.read(config)[1], config, options.seed)
    count = len(images) if options.samples is None else options.samples
    total = pipeline.schedule.num_train_timesteps
    steps = total if options.steps_per_image is None else options.steps_per_image + 1
    with progress_bar("evaluations of the network", count * steps) as update:
        found = measure_likelihood(
            pipeline,
            images,
            samples=options.samples,
            steps_per_image=options.steps_per_image,
            variance=options.variance or "small",
            seed=options.seed,
            progress=update,
        )
    measured = set(found.ids)
    captions = (sample.captions[0] for sample in images.samples if sample.id in measured)
    settings = {
        "model": str(model),
        "data": data,
        "split": options.split,
        "seed": options.seed,
        "shape": list(pipeline.codec.latent_shape(*pipeline.default_size)),
        "timesteps_per_image": steps,
        "variance": "learned" if learned else options.variance or "small",
    }
    return LikelihoodResult(settings, found, _truncation(pipeline, captions))


# ---- what they share


def _expanded(model: str | Path) -> str:
    """The user's home for `~`; a hub id stays as it is."""
    return str(disk.expand_user(model)) if str(model).startswith("~") else str(model)


def _truncation(pipeline: Pipeline, captions: Iterable[str]) -> str | None:
    cut = pipeline.text_encoder.truncation_message(captions)
    return f"captions are cut: {cut}" if cut else None
