"""The sweep: its statistics against brute force and simulation, its choice by hand, and the whole with real models."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import hub
from ldm.data import CaptionedImages, DataConfig, to_signed
from ldm.data.layouts import open_source
from ldm.evaluation.features import feature_space
from ldm.evaluation.fidelity import kid, kid_leave_one_out
from ldm.evaluation.images import generate_images, sample_captions
from ldm.evaluation.prompt_alignment import RetrievalGallery, retrieval
from ldm.evaluation.sweep import (
    Cell,
    Sweep,
    SweepGrid,
    check_storable,
    choose_cell,
    evaluations_per_image,
    mean_leave_one_out,
    paired_difference,
    pareto_front,
    raw_model,
    standard_error,
    store_defaults,
    sweep,
)
from ldm.pipelines import Pipeline
from ldm.report.text import sweep_lines
from tests import tiny

GRID = SweepGrid((1.0, 3.0), (1, 3))
IMAGES = torch.tensor([0, 1, 2, 3, 0, 2, 2])  # seven pictures for four images


def kid_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    among = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    return sum(among) / len(among) + sum(within) / len(within) - 2 * sum(across) / len(across)


def test_kid_without_each_image_is_kid_of_the_others():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=draws).double() + 0.4, torch.randn(4, 5, generator=draws).double()
    whole, without = kid_leave_one_out(x, y, IMAGES)
    assert whole == pytest.approx(kid_by_hand(x, y))
    for image in range(4):
        others = torch.arange(4) != image
        assert float(without[image]) == pytest.approx(kid_by_hand(x[image != IMAGES], y[others]))


def test_both_ways_to_kid_agree():
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 9, generator=draws).double() + 0.2, torch.randn(40, 9, generator=draws).double()
    assert kid_leave_one_out(x, y, torch.arange(40))[0] == pytest.approx(kid(x, y).mean)


def test_means_without_each_image():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
    whole, without = mean_leave_one_out(values, IMAGES, 4)
    assert whole == pytest.approx(float(values.mean()))
    assert without.tolist() == pytest.approx([float(values[image != IMAGES].mean()) for image in range(4)])


def test_the_error_of_a_paired_difference_is_its_deviation():
    """Two models whose pictures share most of their noise, many times: the deviation of what is found."""
    draws = torch.Generator().manual_seed(2)
    differences, errors, unpaired = [], [], []
    for _ in range(40):
        real = torch.randn(50, 8, generator=draws).double()
        shared = torch.randn(50, 8, generator=draws).double()
        one, other = shared + 0.5, shared * 1.05 + 0.3
        a, a_without = kid_leave_one_out(one, real, torch.arange(50))
        b, b_without = kid_leave_one_out(other, real, torch.arange(50))
        differences.append(a - b)
        errors.append(standard_error(a_without - b_without))
        unpaired.append(math.hypot(standard_error(a_without), standard_error(b_without)))
    deviation = float(torch.tensor(differences).std())
    assert 0.75 < sum(errors) / 40 / deviation < 1.4
    assert sum(unpaired) > 1.5 * sum(errors)


def cell(weights: str = "EMA", scale: float = 1.0, steps: int = 10, *, kid: float, rank: float = 3.0) -> Cell:
    """Of 20 images, the values without each drawn at random, so that errors of differences are about 0.006 and 0.06."""
    draws = torch.Generator().manual_seed(round(1000 * scale) + steps)
    shaken = torch.randn(20, generator=draws).double().tolist()
    return Cell(
        weights=weights,
        guidance_scale=scale,
        num_inference_steps=steps,
        evaluations=evaluations_per_image(scale, steps),
        seconds=0.1,
        kid=kid,
        log_rank=rank,
        near=0.2,
        kid_without=tuple(kid + 0.001 * value for value in shaken),
        log_rank_without=tuple(rank + 0.01 * value for value in shaken),
    )


def test_the_cheapest_of_what_cannot_be_told_from_the_best_is_taken():
    best = cell(scale=3, steps=50, kid=0.100)
    as_good = cell(scale=3, steps=20, kid=0.101)
    cheaper_but_worse = cell(scale=3, steps=10, kid=0.150)
    cheap_and_good_but_blind = cell(scale=1, steps=20, kid=0.1005, rank=4.5)
    error = paired_difference(as_good, best, "kid")[1]
    assert 0.002 < error < 0.01
    found = choose_cell([best, cheaper_but_worse, cheap_and_good_but_blind, as_good])
    assert (found.cell, found.best, found.equal, found.decided) == (as_good, best, 2, True)
    # Were it not blind to the text, it would be taken.
    found = choose_cell([best, as_good, cell(scale=1, steps=20, kid=0.1005)])
    assert found.cell.guidance_scale == 1
    assert not found.decided
    # Of two that cost the same, the better one.
    assert choose_cell([cell(scale=2, kid=0.101), cell(scale=3, kid=0.100), cell(kid=0.3)]).cell.guidance_scale == 3


def test_one_standard_error_is_the_bound():
    best = cell(scale=3, steps=50, kid=0.1)
    error = paired_difference(cell(scale=3, steps=20, kid=0.2), best, "kid")[1]
    within, beyond = (cell(scale=3, steps=20, kid=0.1 + times * error) for times in (0.99, 1.01))
    assert choose_cell([best, within]).cell == within
    assert choose_cell([best, beyond]).cell == best


def test_the_front():
    cells = [cell(steps=5, kid=0.4), cell(steps=20, kid=0.2), cell(steps=10, kid=0.5), cell(scale=2, steps=10, kid=0.3)]
    assert [(c.evaluations, c.kid) for c in pareto_front(cells)] == [(5, 0.4), (20, 0.2)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_scales": ()}, "guidance_scales of a sweep are"),
        ({"guidance_scales": (2.0, 2.0)}, "each once"),
        ({"guidance_scales": (math.inf,)}, "hold inf"),
        ({"steps": ()}, "steps of a sweep are"),
        ({"steps": (0, 5)}, "hold 0; each must be at least 1"),
    ],
)
def test_grids_are_checked(changes, said):
    with pytest.raises(ValueError, match=said):
        SweepGrid(**changes)


def test_a_grid_knows_its_price():
    grid = SweepGrid((1.0, 3.0), (4, 10))
    assert grid.pairs() == [(1, 4), (3, 4), (1, 10), (3, 10)]
    assert grid.evaluations(models=2, count=7) == 2 * 7 * (4 + 8 + 10 + 20)


@pytest.fixture(scope="module")
def emoji():
    """Every 30th drawing at 8 pixels: 40 to train on and 24 held out."""
    config = DataConfig(path="openmoji", resolution=8)
    samples = open_source(config).samples[::30]
    return CaptionedImages(samples[:40], config, 0), CaptionedImages(samples[40:], config, 0)


@pytest.fixture(scope="module")
def space():
    return feature_space("pixel", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def gallery(emoji, space):
    return RetrievalGallery.from_images(emoji, space)


@pytest.fixture
def run(tmp_path) -> Path:
    """What a run leaves: an exported pipeline with averaged weights, and both kinds in a checkpoint."""
    pipeline = tiny.pipeline(tmp_path / "text")
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    training = tmp_path / "run" / "training"
    training.mkdir()
    averaged = pipeline.unet.state_dict()
    hub.save_tensors(training / "ema.safetensors", averaged)
    torch.manual_seed(5)
    raw = {name: value + 0.05 * torch.randn_like(value) for name, value in averaged.items()}
    hub.save_tensors(training / "model.safetensors", raw)
    return tmp_path / "run"


def swept(run: Path, emoji: Any, gallery: RetrievalGallery, space: Any, **changes: Any) -> Sweep:
    settings = {"grid": GRID, "count": 30, "seed": 0, "batch_size": 30, "record": run / "sweep.json"}
    models = changes.pop("models", None) or {"EMA": Pipeline.from_pretrained(run / "pipeline", device="cpu")}
    return sweep(models, emoji[1].samples, gallery, space, **(settings | changes))


def test_a_sweep_measures_all_cells_and_stores_the_winner(run, emoji, gallery, space):
    pipeline = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    models = {"EMA": pipeline, "raw": raw_model(pipeline, run / "training")}
    told: list[int] = []
    before = json.loads((run / "pipeline" / "model_index.json").read_text())
    found = swept(run, emoji, gallery, space, models=models, progress=told.append, store_in=run / "pipeline")
    assert sum(told) == GRID.evaluations(2, 30) == 2 * 30 * (1 + 2 + 3 + 6)
    assert {c.setting for c in found.cells} == {(name, *pair) for name in models for pair in GRID.pairs()}
    assert all(c.evaluations == evaluations_per_image(c.guidance_scale, c.num_inference_steps) for c in found.cells)
    assert (found.captions, found.images, found.gallery) == (30, len(emoji[1]), 64)

    # A cell by hand: same captions, noise, features.
    captions, own = sample_captions(emoji[1].samples, 30, seed=0)
    pictures = generate_images(
        models["raw"], captions, seed=0, num_inference_steps=3, guidance_scale=3.0, batch_size=30
    )
    features = space.compute([to_signed(pictures)])
    (measured,) = [c for c in found.cells if c.setting == ("raw", 3.0, 3)]
    reference = gallery.features[40:]
    assert measured.kid == pytest.approx(kid_leave_one_out(features, reference, torch.tensor(own))[0])
    ranks = retrieval(features, gallery.features, gallery.matches(captions)).ranks
    assert measured.typical_rank == pytest.approx(float(ranks.log().mean().exp()))
    assert measured.near == pytest.approx(float((ranks <= 10).double().mean()))

    # The winner among the weights that the folder has; nothing else is changed.
    assert found.chosen.cell.weights == "EMA"
    assert found.chosen.decided
    after = json.loads((run / "pipeline" / "model_index.json").read_text())
    winner = found.chosen.cell
    assert after["_ldm"] == before["_ldm"] | {
        "guidance_scale": winner.guidance_scale,
        "num_inference_steps": winner.num_inference_steps,
    }
    assert after | {"_ldm": 0} == before | {"_ldm": 0}
    opened = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    assert (opened.guidance_scale, opened.num_inference_steps) == winner.setting[1:]
    assert torch.equal(opened.unet.conv_in.weight, pipeline.unet.conv_in.weight)

    said = "\n".join(sweep_lines(found))
    assert f"chosen: guidance {winner.guidance_scale:g}, {winner.num_inference_steps} steps" in said
    assert "with raw weights: " in said
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(content["cells"]) == 8
    assert content["stored"] == str(run / "pipeline")
    curves = found.curves()
    assert [price for price, _ in curves["guidance 3, raw"]] == [2, 6]
    assert curves["front"][0][0] == 1


def test_an_interrupted_sweep_goes_on(run, emoji, gallery, space):
    class StopError(Exception):
        pass

    done = [0]

    def stop(evaluations: int) -> None:
        done[0] += evaluations
        if done[0] > 30 * (1 + 2):  # two cells are measured, the third has begun
            raise StopError

    with pytest.raises(StopError):
        swept(run, emoji, gallery, space, progress=stop)
    assert len(json.loads((run / "sweep.json").read_text())["cells"]) == 2
    pipeline = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    asked: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: asked.append(len(arguments[0])))
    told: list[int] = []
    resumed = swept(run, emoji, gallery, space, models={"EMA": pipeline}, progress=told.append)
    assert sum(asked) == 30 * (3 + 6)
    assert sum(told) == GRID.evaluations(1, 30)
    whole = swept(run, emoji, gallery, space, record=run / "another.json")
    timeless = [[dataclasses.replace(c, seconds=0) for c in found.cells] for found in (resumed, whole)]
    assert timeless[0] == timeless[1]
    # What was measured serves a larger grid too.
    swept(run, emoji, gallery, space, models={"EMA": pipeline}, grid=SweepGrid((1.0,), (1, 2, 3)))
    assert sum(asked) == 30 * (3 + 6 + 2)
    assert resumed.stored is None
    assert tiny_defaults(run) == (2.0, 4)


def tiny_defaults(run: Path) -> tuple[float, int]:
    defaults = json.loads((run / "pipeline" / "model_index.json").read_text())["_ldm"]
    return defaults["guidance_scale"], defaults["num_inference_steps"]


def test_a_record_of_something_else_is_refused(run, emoji, gallery, space):
    small = {"grid": SweepGrid((1.0,), (1,))}
    swept(run, emoji, gallery, space, **small)
    for changes in ({"seed": 1}, {"count": 31}):
        with pytest.raises(ValueError, match="holds a sweep of another model, or of other captions"):
            swept(run, emoji, gallery, space, **small, **changes)
    pipeline = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1e-3
    with pytest.raises(ValueError, match="holds a sweep of another model"):
        swept(run, emoji, gallery, space, models={"EMA": pipeline}, **small)
    content = json.loads((run / "sweep.json").read_text())
    (run / "sweep.json").write_text(json.dumps(content | {"cells": [{"kid": 1}]}))
    with pytest.raises(ValueError, match="is no record of a sweep"):
        swept(run, emoji, gallery, space, **small)


def test_what_cannot_be_told_apart_stores_nothing(run, emoji, gallery, space):
    pipeline = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.zero_()  # predicts no noise at all, whatever the caption: guidance changes nothing
    found = swept(
        run,
        emoji,
        gallery,
        space,
        models={"EMA": pipeline},
        grid=SweepGrid((1.0, 3.0), (1,)),
        store_in=run / "pipeline",
    )
    assert not found.chosen.decided
    assert found.stored is None
    assert "chosen: nothing" in "\n".join(sweep_lines(found))
    assert tiny_defaults(run) == (2.0, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 15}, "15 held-out images; a sweep needs at least 16"),
        ({"grid": SweepGrid((1.0,), (1001,))}, "steps of a sweep hold 1001; the model has 1000"),
        ({"store_in": Path("owner/name")}, "no local pipeline folder"),
    ],
)
def test_a_sweep_checks_before_it_draws(run, emoji, gallery, space, changes, said):
    with pytest.raises(ValueError, match=said):
        swept(run, emoji, gallery, space, progress=lambda _: pytest.fail("it draws"), **changes)


def test_defaults_are_stored_only_where_they_belong(run, tmp_path):
    store_defaults(run / "pipeline", 1.5, 7)
    assert tiny_defaults(run) == (1.5, 7)
    assert [path.name for path in (run / "pipeline").iterdir() if "partial" in path.name] == []
    (run / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="part of the checkpoint"):
        store_defaults(run / "pipeline", 1.0, 3)
    (run / "manifest.json").unlink()
    # Without this key the offset of the scheduler has another meaning.
    tiny.edit_json(run / "pipeline" / "model_index.json", _ldm=None)
    with pytest.raises(ValueError, match="no defaults of ldm"):
        check_storable(run / "pipeline")


def test_raw_weights_are_those_of_the_same_checkpoint(run):
    pipeline = Pipeline.from_pretrained(run / "pipeline", device="cpu")
    before = pipeline.unet.conv_in.weight.clone()
    raw = raw_model(pipeline, run / "training")
    wanted = hub.load_tensors(run / "training" / "model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in raw.unet.state_dict().items())
    assert torch.equal(pipeline.unet.conv_in.weight, before)
    assert raw.text_encoder is pipeline.text_encoder
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    with pytest.raises(
        ValueError, match=r"not the checkpoint that the model was exported with: conv_out\.bias differs"
    ):
        raw_model(pipeline, run / "training")
    some = {"conv_in.lora_A.weight": torch.ones(1)}
    for name in ("ema", "model"):
        hub.save_tensors(run / "training" / f"{name}.safetensors", some)
    with pytest.raises(ValueError, match="not those of a whole UNet"):
        raw_model(pipeline, run / "training")
