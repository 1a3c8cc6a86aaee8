"""How a model should draw: guidance × steps × EMA, measured on captions of held-out images.

Every cell draws the same captions from the same noise, so that cells are compared by paired differences. What is
measured is a cell's quality (KID to the held-out images whose captions they are), its faithfulness (the rank of the
caption's own image) and its price (evaluations of the network a picture). Cells are kept in a file as they are
measured: an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import checkpoint
from ldm.data import Sample, to_signed
from ldm.evaluation.cells import Cell, Choice, Grid, choose, difference, front
from ldm.evaluation.defaults import check_storable, store_defaults
from ldm.evaluation.drawn import captions_of, draw
from ldm.evaluation.faithfulness import Gallery, retrieval
from ldm.evaluation.features import IMAGES_AT_ONCE, FeatureSpace
from ldm.evaluation.paired import kid_without_each, mean_without_each
from ldm.pipelines import Pipeline
from ldm.weights import update_hash

# Below, an error that is estimated by leaving out one at a time is itself off by a fifth or more: 1/√(2(M − 1)).
FEWEST_IMAGES = 16
NEAR = 10


@dataclass(frozen=True)
class Sweep:
    """All cells, and what to take of them.

    Attributes:
        choices: for each of the models the choice among its cells; the first model is the one that the folder holds.
        captions, images, gallery: how many were asked for, of how many held-out images, among how many all in all.
        features: the label of the features.
        stored: the folder whose defaults were changed, or None.
    """

    cells: tuple[Cell, ...]
    choices: dict[str, Choice]
    captions: int
    images: int
    gallery: int
    features: str
    seed: int
    stored: Path | None

    @property
    def chosen(self) -> Choice:
        """For the weights that the model has."""
        return next(iter(self.choices.values()))

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Quality against price: for each weights and guidance scale (evaluations, KID), ascending; and their front."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for cell in sorted(self.cells, key=lambda cell: (cell.setting[:2], cell.evaluations)):
            name = f"guidance {cell.guidance_scale:g}" + (f", {cell.weights}" if len(self.choices) > 1 else "")
            lines.setdefault(name, []).append((cell.evaluations, cell.kid))
        return lines | {"front": [(cell.evaluations, cell.kid) for cell in front(self.cells)]}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "captions": self.captions,
            "held_out_images": self.images,
            "gallery": self.gallery,
            "features": self.features,
            "seed": self.seed,
            "cells": [cell.to_dict() for cell in self.cells],
            "front": [list(cell.setting) for cell in front(self.cells)],
            "chosen": {
                name: {"setting": list(choice.cell.setting), "decided": choice.decided, "equal": choice.equal}
                for name, choice in self.choices.items()
            },
            "stored": None if self.stored is None else str(self.stored),
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        best = {cell.setting for cell in front(self.cells)}
        said = [
            f"sweep: {self.captions} captions of {self.images} held-out images, the same noise in all cells (seed "
            f"{self.seed}); KID to these images and the caption's own image among all {self.gallery}, {self.features}",
            f"  weights  guidance  steps  evaluations  KID ± standard error  own image among {NEAR}  typical rank",
        ]
        for cell in sorted(self.cells, key=lambda cell: (cell.evaluations, cell.kid)):
            weights, scale, steps = cell.setting
            row = f"  {weights:7s}  {scale:8g}  {steps:5d}  {cell.evaluations:11g}  "
            row += f"{cell.kid:9.5f} ± {cell.kid_error:.5f}  {100 * cell.near:18.1f} %  {cell.typical_rank:12.1f}"
            said.append(row + ("  *" if cell.setting in best else ""))
        return [*said, "  * nothing that is as cheap is better", *self._said_of_choice()]

    def _said_of_choice(self) -> list[str]:
        mine = self.chosen
        if not mine.decided:
            said = [
                "chosen: nothing. These captions do not tell the cells apart, so that the cheapest would win for want "
                "of evidence; take more"
            ]
        else:
            why = "no other is within one standard error of it, in KID and then in rank"
            if mine.equal > 1:
                why = f"the cheapest of {mine.equal} within one standard error of the best, in KID and then in rank"
            stored = "" if self.stored is None else f"; stored as the defaults of {self.stored}"
            said = [f"chosen: {mine.cell.named()} ({mine.cell.evaluations:g} evaluations a picture): {why}{stored}"]
        for name, other in list(self.choices.items())[1:]:
            kid, error = difference(other.cell, mine.cell, "kid")
            said.append(
                f"with {name} weights: {other.cell.named()}, KID {kid:+.5f} ± {error:.5f} against that. A sweep "
                "exchanges no weights: these defaults are for those that the model has"
            )
        return said


def sweep(
    models: Mapping[str, Pipeline],
    held_out: Sequence[Sample],
    gallery: Gallery,
    space: FeatureSpace,
    *,
    grid: Grid,
    count: int,
    seed: int,
    at_once: int,
    record: Path,
    store_in: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Sweep:
    """Measures every cell of the grid with every model, and chooses.

    The choice is made on the very captions that it is measured on, so that the figures of the winner flatter it a
    little: they choose a setting, and are no result to be quoted.

    Args:
        models: by the name of their weights; the first is the one that the folder holds ("EMA": the moving average
            that a run exports), others are what could be there instead ("raw": `raw_model`).
        held_out: images that training never saw; their captions are asked for.
        gallery: all images, training and held out: `Gallery.of`, in the features of `space`.
        count: captions, at least two, of at least 16 images.
        seed: of the captions and the noise.
        at_once: pictures that go through the network together.
        record: a JSON file that keeps each cell as it is measured, and gives it back to a sweep of the same models,
            captions, seed and features.
        store_in: the pipeline folder of the first model, whose defaults become the winner, if there is one; None
            stores nothing.
        progress: is told how many evaluations of the network were done since; `Grid.evaluations` says of how many.

    Raises:
        ValueError: for arguments out of range, a folder that cannot take defaults, and a `record` of something else.
    """
    captions, own = captions_of(held_out, count, seed)
    asked = sorted(set(own))
    _check(models, grid, asked)
    if store_in is not None:
        check_storable(store_in)
    question = _Question(captions, torch.tensor([asked.index(index) for index in own]), seed, at_once, gallery, space)
    places = gallery.places([held_out[index] for index in asked])
    kept = _Record(
        record, question.identity() | {"models": {name: model_digest(model) for name, model in models.items()}}
    )
    cells = []
    for name, pipeline in models.items():
        for scale, steps in grid.pairs():
            cell = kept.get((name, scale, steps))
            if cell is None:
                cell = question.ask(name, pipeline, scale, steps, gallery.features[places], progress)
                kept.add(cell)
            elif progress is not None:
                progress(round(cell.evaluations * count))
            cells.append(cell)
    choices = {name: choose([cell for cell in cells if cell.weights == name]) for name in models}
    chosen = next(iter(choices.values()))
    stored = store_in if chosen.decided else None
    if stored is not None:
        store_defaults(stored, chosen.cell.guidance_scale, chosen.cell.num_inference_steps)
    return Sweep(tuple(cells), choices, count, len(asked), len(gallery.samples), space.label(), seed, stored)


def raw_model(pipeline: Pipeline, training: Path) -> Pipeline:
    """The pipeline with the weights of the last step in the place of their moving average.

    Args:
        pipeline: as a run exported it.
        training: the folder `training` of the checkpoint that it was exported with.

    Raises:
        ValueError: if the checkpoint is of another step, or holds other weights (those of a LoRA).
    """
    here = pipeline.unet.state_dict()
    averaged, raw = (checkpoint.load_tensors(training / f"{name}.safetensors") for name in ("ema", "model"))
    if not raw.keys() <= here.keys() or raw.keys() != averaged.keys():
        raise ValueError(f"{training} holds weights that are not those of a whole UNet, as a LoRA's are not")
    for name, value in averaged.items():
        if not torch.equal(value.to(here[name]), here[name]):
            raise ValueError(f"{training} is not the checkpoint that the model was exported with: {name} differs")
    other = copy.copy(pipeline)
    other.unet = copy.deepcopy(pipeline.unet)
    other.unet.load_state_dict(here | raw)
    return other


def _check(models: Mapping[str, Pipeline], grid: Grid, asked: Sequence[int]) -> None:
    if len(asked) < FEWEST_IMAGES:
        raise ValueError(
            f"the captions are of {len(asked)} held-out images; a sweep needs at least {FEWEST_IMAGES} to tell its "
            "cells apart: ask for more captions, or hold out more (data.held_out)"
        )
    for pipeline in models.values():
        most = pipeline.schedule.num_train_timesteps
        if max(grid.steps) > most:
            raise ValueError(f"steps of a sweep hold {max(grid.steps)}; the model has {most} timesteps")


@dataclass(frozen=True)
class _Question:
    """What each cell is asked: captions, and for each the number of its image among those asked for."""

    captions: list[str]
    images: Tensor
    seed: int
    at_once: int
    gallery: Gallery
    space: FeatureSpace

    def identity(self) -> dict[str, Any]:
        """What figures must have in common to be compared."""
        digest = hashlib.blake2b(digest_size=16)
        ids = [sample.id for sample in self.gallery.samples]
        for text in (*self.captions, "", *ids, "", *self.gallery.looks):
            digest.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        digest.update(self.images.numpy().tobytes())
        return {"seed": self.seed, "features": self.space.label(), "captions_and_images": digest.hexdigest()}

    def ask(
        self,
        name: str,
        pipeline: Pipeline,
        scale: float,
        steps: int,
        reference: Tensor,
        progress: Callable[[int], object] | None,
    ) -> Cell:
        started = time.perf_counter()
        with _counting(pipeline.unet, progress) as counted:
            pictures = draw(
                pipeline,
                self.captions,
                seed=self.seed,
                num_inference_steps=steps,
                guidance_scale=scale,
                at_once=self.at_once,
            )
        seconds = time.perf_counter() - started
        features = self.space.of(to_signed(chunk) for chunk in pictures.split(IMAGES_AT_ONCE))
        ranks = retrieval(features, self.gallery.features, self.gallery.own(self.captions)).ranks
        kid, kid_without = kid_without_each(features, reference, self.images)
        log_rank, log_rank_without = mean_without_each(ranks.log(), self.images, len(reference))
        return Cell(
            weights=name,
            guidance_scale=scale,
            num_inference_steps=steps,
            evaluations=counted[0] / len(self.captions),
            seconds=seconds / len(self.captions),
            kid=kid,
            log_rank=log_rank,
            near=float((ranks <= NEAR).double().mean()),
            kid_without=tuple(kid_without.tolist()),
            log_rank_without=tuple(log_rank_without.tolist()),
        )


@contextmanager
def _counting(network: nn.Module, progress: Callable[[int], object] | None) -> Iterator[list[int]]:
    """Counts how many inputs a network is given: samplers differ in how often they ask."""
    counted = [0]

    def count(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        counted[0] += len(arguments[0])
        if progress is not None:
            progress(len(arguments[0]))

    hook = network.register_forward_pre_hook(count)
    try:
        yield counted
    finally:
        hook.remove()


class _Record:
    """Cells in a JSON file, which is written anew, whole or not at all, with each of them."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.cells: dict[tuple[str, float, int], Cell] = {}
        if not path.exists():
            return
        content = checkpoint.read_json(path)
        if content.get("of") != identity:
            raise ValueError(
                f"{path} holds a sweep of another model, or of other captions, features or seed; remove it, or choose "
                "another place"
            )
        try:
            for fields in content["cells"]:
                lists = {key: tuple(value) for key, value in fields.items() if key.endswith("_without")}
                cell = Cell(**(fields | lists))
                self.cells[cell.setting] = cell
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of a sweep ({error}); remove it") from None

    def get(self, setting: tuple[str, float, int]) -> Cell | None:
        return self.cells.get(setting)

    def add(self, cell: Cell) -> None:
        self.cells[cell.setting] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.path, {"of": self.identity, "cells": [asdict(c) for c in self.cells.values()]})


def model_digest(pipeline: Pipeline) -> str:
    """32 hexadecimal digits that name all that a picture depends on, apart from its settings."""
    digest = hashlib.blake2b(f"{pipeline.sampler} {pipeline.schedule}".encode(), digest_size=16)
    parts = (pipeline.unet, pipeline.codec, pipeline.text_encoder.model)
    for part in parts:
        assert isinstance(part, nn.Module)
        update_hash(digest, part.state_dict())
    return digest.hexdigest()
