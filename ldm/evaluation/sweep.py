"""Sampling settings of a model: guidance × steps × EMA, measured on captions of held-out images.

All cells use the same captions and noise, so that paired differences compare them: in fidelity (KID to the held-out
images), prompt alignment (rank of the caption's own image) and cost (evaluations of the network per image).
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import disk, hub
from ldm.data import Sample, to_signed
from ldm.evaluation.features import EXTRACT_BATCH, FeatureSpace
from ldm.evaluation.fidelity import kid_leave_one_out
from ldm.evaluation.images import generate_images, sample_captions
from ldm.evaluation.prompt_alignment import RetrievalGallery, retrieval
from ldm.evaluation.stats import jackknife_variance
from ldm.pipelines import Pipeline
from ldm.weights import update_hash

# With fewer, a jackknife error is itself uncertain by a fifth or more: 1/√(2(M − 1)).
MIN_IMAGES_OF_SWEEP = 16
RECALL_K = 10
INDEX = "model_index.json"


@dataclass(frozen=True)
class SweepGrid:
    """Every guidance scale with every number of steps; ValueError for none, repeated ones, and values out of range."""

    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0)
    steps: tuple[int, ...] = (5, 10, 20, 50)

    def __post_init__(self) -> None:
        for name, values in (("guidance_scales", self.guidance_scales), ("steps", self.steps)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} of a sweep are {list(values)}; give at least one, each once")
        for scale in self.guidance_scales:
            if not math.isfinite(scale):
                raise ValueError(f"guidance_scales of a sweep hold {scale}; each must be finite (1 is no guidance)")
        for steps in self.steps:
            if steps < 1:
                raise ValueError(f"steps of a sweep hold {steps}; each must be at least 1")

    def pairs(self) -> list[tuple[float, int]]:
        """(guidance scale, steps), the cheapest first."""
        every = [(float(scale), steps) for scale in self.guidance_scales for steps in self.steps]
        return sorted(every, key=lambda pair: (evaluations_per_image(*pair), pair))

    def evaluations(self, models: int, count: int) -> int:
        """Total evaluations of the network, for `count` images per cell and a sampler with one evaluation per step."""
        return models * count * sum(evaluations_per_image(*pair) for pair in self.pairs())


def evaluations_per_image(guidance_scale: float, steps: int) -> int:
    """Evaluations of the network: guidance needs two per step, with and without the text."""
    return steps * (1 if guidance_scale in (0, 1) else 2)


@dataclass(frozen=True)
class Cell:
    """The results at one setting, with the weights of a model of `sweep`.

    `evaluations` of the network and `seconds` are per image; `kid` is to the held-out images whose captions were used,
    `log_rank` the mean of ln(rank of the caption's own image), which needs fewer captions than a median or recall; both
    also without each image. `near` is recall at 10.
    """

    weights: str
    guidance_scale: float
    num_inference_steps: int
    evaluations: float
    seconds: float
    kid: float
    log_rank: float
    near: float
    kid_without: tuple[float, ...]
    log_rank_without: tuple[float, ...]

    @property
    def typical_rank(self) -> float:
        """The geometric mean of the ranks."""
        return math.exp(self.log_rank)

    @property
    def kid_error(self) -> float:
        """The standard error of `kid`. That of a difference of two cells is smaller: `paired_difference`."""
        return standard_error(torch.tensor(self.kid_without, dtype=torch.float64))

    @property
    def setting(self) -> tuple[str, float, int]:
        """(weights, guidance scale, steps)."""
        return self.weights, self.guidance_scale, self.num_inference_steps

    def to_dict(self) -> dict[str, Any]:
        """For a report, without the leave-one-out values."""
        content = {key: value for key, value in asdict(self).items() if not key.endswith("_without")}
        return content | {"kid_error": self.kid_error, "typical_rank": self.typical_rank}


def standard_error(leave_one_out: Tensor) -> float:
    """Of an estimate, or of a difference of two, by the jackknife: from its values without each image, [M]."""
    return math.sqrt(jackknife_variance(leave_one_out))


def mean_leave_one_out(values: Tensor, images: Tensor, number: int) -> tuple[float, Tensor]:
    """The mean of values [N], and [number] means without the values of each image; `images` as `kid_leave_one_out`."""
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, images, values.double())
    counts = torch.bincount(images, minlength=number)
    return float(values.double().mean()), (values.double().sum() - sums) / (len(values) - counts)


# ---- the choice


@dataclass(frozen=True)
class CellChoice:
    """The result of `choose_cell`, and the cell with the lowest KID.

    `equal` is the number of cells that are not distinguishable from the best; `decided` whether any is.
    """

    cell: Cell
    best: Cell
    equal: int
    decided: bool


def choose_cell(cells: Sequence[Cell]) -> CellChoice:
    """The cheapest cell that is not distinguishable from the best.

    1. Cells whose KID is at most one standard error (of the paired difference) above the lowest.
    2. Of these, cells whose mean log rank is at most one standard error above the lowest among them.
    3. Of these, the one with the fewest evaluations of the network; of equal ones, with the lower KID.

    One standard error is the usual rule for a simpler model (Breiman et al., 1984).
    """

    def equal_to_best(cells: Sequence[Cell], metric: str) -> list[Cell]:
        best = min(cells, key=lambda cell: float(getattr(cell, metric)))
        differences = (paired_difference(cell, best, metric) for cell in cells)
        return [cell for cell, (above, error) in zip(cells, differences, strict=True) if not above > error]

    equal = equal_to_best(equal_to_best(cells, "kid"), "log_rank")
    best = min(cells, key=lambda cell: cell.kid)
    chosen = min(equal, key=lambda cell: (cell.evaluations, cell.kid))
    return CellChoice(chosen, best, len(equal), decided=len(equal) < len(cells) or len(cells) == 1)


def paired_difference(one: Cell, other: Cell, metric: str) -> tuple[float, float]:
    """`metric` ("kid" or "log_rank") of one cell minus that of another, and its standard error."""
    without = [torch.tensor(getattr(cell, f"{metric}_without"), dtype=torch.float64) for cell in (one, other)]
    return getattr(one, metric) - getattr(other, metric), standard_error(without[0] - without[1])


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no other dominates in evaluations and KID; by evaluations, ascending."""
    front: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.evaluations, cell.kid)):
        if not front or cell.kid < front[-1].kid:
            front.append(cell)
    return front


@dataclass(frozen=True)
class Sweep:
    """All cells, and the choice for each model, that of the folder first.

    `captions`, `images` and `gallery` count captions, the held-out images they are of, and all images; `stored` is the
    folder whose defaults were changed.
    """

    cells: tuple[Cell, ...]
    choices: dict[str, CellChoice]
    captions: int
    images: int
    gallery: int
    features: str
    seed: int
    stored: Path | None

    @property
    def chosen(self) -> CellChoice:
        """For the weights that the model has."""
        return next(iter(self.choices.values()))

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """(evaluations, KID), ascending, for each weights and guidance scale; and the Pareto front."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in sorted(self.cells, key=lambda cell: (cell.setting[:2], cell.evaluations)):
            name = f"guidance {cell.guidance_scale:g}" + (f", {cell.weights}" if len(self.choices) > 1 else "")
            lines.setdefault(name, []).append((cell.evaluations, cell.kid))
        return lines | {"front": [(cell.evaluations, cell.kid) for cell in pareto_front(self.cells)]}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "captions": self.captions,
            "held_out_images": self.images,
            "gallery": self.gallery,
            "features": self.features,
            "seed": self.seed,
            "cells": [cell.to_dict() for cell in self.cells],
            "front": [list(cell.setting) for cell in pareto_front(self.cells)],
            "chosen": {
                name: {"setting": list(choice.cell.setting), "decided": choice.decided, "equal": choice.equal}
                for name, choice in self.choices.items()
            },
            "stored": None if self.stored is None else str(self.stored),
        }


# ---- measuring


def sweep(
    models: Mapping[str, Pipeline],
    held_out: Sequence[Sample],
    gallery: RetrievalGallery,
    space: FeatureSpace,
    *,
    grid: SweepGrid,
    count: int,
    seed: int,
    batch_size: int,
    record: Path,
    store_in: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Sweep:
    """Measures every cell of the grid with every model, and chooses.

    The choice uses the captions that it is measured on, so the metrics of the chosen cell are slightly optimistic.

    Args:
        models: by the name of their weights: "EMA", as a run exports the model, is first, then "raw" (`raw_model`).
        held_out: samples that training never saw.
        gallery: all images, training and held-out, in the features of `space`.
        count: captions, at least two, of at least 16 images.
        record: a JSON file of measured cells, from which an interrupted sweep continues.
        store_in: the folder of the first model, whose defaults are set to the choice; None stores nothing.
        progress: called with the number of evaluations of the network done since, of `SweepGrid.evaluations`.

    Raises:
        ValueError: for arguments out of range, `store_in` as in `check_storable`, and a `record` of another sweep.
    """
    captions, sources = sample_captions(held_out, count, seed)
    used = sorted(set(sources))
    if len(used) < MIN_IMAGES_OF_SWEEP:
        few = f"the captions are of {len(used)} held-out images; a sweep needs at least {MIN_IMAGES_OF_SWEEP}"
        raise ValueError(f"{few}: use more captions, or hold out more (data.held_out)")
    for pipeline in models.values():
        timesteps = pipeline.schedule.num_train_timesteps
        if max(grid.steps) > timesteps:
            raise ValueError(f"steps of a sweep hold {max(grid.steps)}; the model has {timesteps} timesteps")
    if store_in is not None:
        check_storable(store_in)
    images = torch.tensor([used.index(index) for index in sources])  # the image of each caption
    reference = gallery.features[gallery.indices([held_out[index] for index in used])]
    # What cells must have in common to be compared.
    identity = {
        "seed": seed,
        "features": space.label(),
        "captions_and_images": _captions_digest(captions, images, gallery),
        "models": {name: model_digest(model) for name, model in models.items()},
    }

    def measure(name: str, pipeline: Pipeline, scale: float, steps: int) -> Cell:
        evaluations = 0  # counted, since samplers differ in their evaluations per step

        def count_inputs(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal evaluations
            evaluations += len(arguments[0])
            progress(len(arguments[0]))

        started = time.perf_counter()
        with pipeline.unet.register_forward_pre_hook(count_inputs):
            generated = generate_images(
                pipeline, captions, seed=seed, num_inference_steps=steps, guidance_scale=scale, batch_size=batch_size
            )
        seconds = time.perf_counter() - started
        features = space.compute(to_signed(chunk) for chunk in generated.split(EXTRACT_BATCH))
        ranks = retrieval(features, gallery.features, gallery.matches(captions)).ranks
        kid, kid_without = kid_leave_one_out(features, reference, images)
        log_rank, log_rank_without = mean_leave_one_out(ranks.log(), images, len(reference))
        return Cell(
            weights=name,
            guidance_scale=scale,
            num_inference_steps=steps,
            evaluations=evaluations / count,
            seconds=seconds / count,
            kid=kid,
            log_rank=log_rank,
            near=float((ranks <= RECALL_K).double().mean()),
            kid_without=tuple(kid_without.tolist()),
            log_rank_without=tuple(log_rank_without.tolist()),
        )

    recorded = _read_record(record, identity) if record.exists() else {}
    cells = []
    for name, pipeline in models.items():
        for scale, steps in grid.pairs():
            if (name, scale, steps) in recorded:
                cell = recorded[name, scale, steps]
                progress(round(cell.evaluations * count))
            else:
                cell = recorded[name, scale, steps] = measure(name, pipeline, scale, steps)
                record.parent.mkdir(parents=True, exist_ok=True)
                hub.write_json(record, {"of": identity, "cells": [asdict(each) for each in recorded.values()]})
            cells.append(cell)
    choices = {name: choose_cell([cell for cell in cells if cell.weights == name]) for name in models}
    chosen = next(iter(choices.values()))
    stored = store_in if chosen.decided else None
    if stored is not None:
        store_defaults(stored, chosen.cell.guidance_scale, chosen.cell.num_inference_steps)
    return Sweep(tuple(cells), choices, count, len(used), len(gallery.samples), space.label(), seed, stored)


def _captions_digest(captions: Sequence[str], images: Tensor, gallery: RetrievalGallery) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in (*captions, "", *(sample.id for sample in gallery.samples), "", *gallery.pixel_hashes):
        digest.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
    digest.update(images.numpy().tobytes())
    return digest.hexdigest()


def _read_record(record: Path, identity: dict[str, Any]) -> dict[tuple[str, float, int], Cell]:
    """The cells of an interrupted sweep, by setting; ValueError if the file is of another one or damaged."""
    content = hub.read_json(record)
    if content.get("of") != identity:
        what = f"{record} holds a sweep of another model, or of other captions, features or seed"
        raise ValueError(f"{what}; remove it, or choose another output folder")
    recorded = {}
    try:
        for fields in content["cells"]:
            lists = {key: tuple(fields[key]) for key in ("kid_without", "log_rank_without")}
            cell = Cell(**(fields | lists))
            recorded[cell.setting] = cell
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is no record of a sweep ({error}); remove it") from None
    return recorded


def raw_model(pipeline: Pipeline, training: Path) -> Pipeline:
    """The pipeline, as a run exported it, with the weights of the last step instead of their EMA.

    `training` is that folder of the checkpoint that it was exported with; ValueError for another, or other weights.
    """
    here = pipeline.unet.state_dict()
    averaged, raw = (hub.load_tensors(training / f"{name}.safetensors") for name in ("ema", "model"))
    if not raw.keys() <= here.keys() or raw.keys() != averaged.keys():
        raise ValueError(f"{training} holds weights that are not those of a whole UNet, such as a LoRA")
    for name, value in averaged.items():
        if not torch.equal(value.to(here[name]), here[name]):
            raise ValueError(f"{training} is not the checkpoint that the model was exported with: {name} differs")
    other = copy.copy(pipeline)
    other.unet = copy.deepcopy(pipeline.unet)
    other.unet.load_state_dict(here | raw)
    return other


def model_digest(pipeline: Pipeline) -> str:
    """32 hexadecimal digits of everything that an image depends on, except its settings."""
    digest = hashlib.blake2b(f"{pipeline.sampler} {pipeline.schedule}".encode(), digest_size=16)
    parts = (pipeline.unet, pipeline.codec, pipeline.text_encoder.model)
    for part in parts:
        assert isinstance(part, nn.Module)
        update_hash(digest, part.state_dict())
    return digest.hexdigest()


# ---- the defaults stored with a model


def check_storable(folder: Path) -> dict[str, Any]:
    """The content of `model_index.json`; ValueError if the folder is no local pipeline of `ldm`, or must not change."""
    folder = disk.expand_user(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no local pipeline folder; save the model with save_pretrained(), and give that")
    index = hub.read_json(folder / INDEX)
    if not isinstance(index.get("_ldm"), dict):
        # The key also determines how the scheduler's offset is read: it cannot just be added.
        how = "open it with Pipeline.from_pretrained, and save_pretrained() it to a new folder"
        raise ValueError(f"{folder / INDEX} has no defaults of ldm, as models of diffusers; {how}")
    if (folder.parent / "manifest.json").exists():
        where = f"the checkpoint {folder.parent}, which must match its manifest"
        raise ValueError(f"{folder} is part of {where}; store the defaults in the exported pipeline of the run")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written; copy the model to a folder of your own")
    return index


def store_defaults(folder: Path, guidance_scale: float, num_inference_steps: int) -> None:
    """Changes the two numbers in `model_index.json`, atomically; ValueError as in `check_storable`."""
    index = check_storable(folder)
    changed = index["_ldm"] | {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    hub.write_json(disk.expand_user(folder) / INDEX, index | {"_ldm": changed})
