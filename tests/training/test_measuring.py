"""Evaluations while a model trains: what is logged, that it is the same when a run is resumed, and what it costs."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from ldm.data import CaptionedImages, inspect, open_source, split
from ldm.evaluation.evaluate import evaluate
from ldm.evaluation.features import feature_space
from ldm.evaluation.reference import Reference
from ldm.pipelines import Pipeline
from ldm.training.measuring import figures
from ldm.training.report.names import PREFIX, name_of, title_of
from ldm.training.trained import find_run
from tests.training.runs import captioned_folder, evaluations, run_ldm, settings

N = 60
EVALUATED = [f"train.evaluation_samples={N}", "train.evaluation_features=pixel", "train.evaluate_every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("measured")
    data = captioned_folder(folder / "data", 80, side=8)
    arguments = [*settings(folder / "run", encoder_folder), f"data.path={data}", "data.resolution=8", *EVALUATED]
    arguments += ["train.max_steps=4", "train.sample_every=100", "data.flip=true"]
    run_ldm(arguments)
    return folder / "run", arguments


def test_names_say_what_their_numbers_stand_on(run):
    folder, _ = run
    (first, one), (last, two) = evaluations(folder)
    assert (first, last) == (2, 4) and one.keys() == two.keys()
    held_out = json.loads((folder / "data.json").read_text())["held_out"]
    assert 0 < held_out < N / 2
    assert one.keys() == {
        f"evaluation_kid_pixel_n{N}", f"evaluation_precision_pixel_n{N}", f"evaluation_recall_pixel_n{N}",
        f"evaluation_within_10_training_pixel_n{N - held_out}", f"evaluation_within_10_held_out_pixel_n{held_out}",
        f"evaluation_suspected_copies_n{N - held_out}",
    }  # fmt: skip
    for name in one:
        assert str(int(name.rpartition("_n")[2])) + " pictures" in title_of(name)
    assert title_of("loss") is None and title_of("evaluation_kid") is None
    with pytest.raises(AssertionError):
        name_of("kidd", samples=3)
    page = ElementTree.fromstring((folder / "report.html").read_bytes())
    shown = {svg.attrib["aria-label"] for svg in page.iter("{http://www.w3.org/2000/svg}svg")}
    assert {title_of(name) for name in one} <= shown


def test_the_figures_are_those_of_the_exported_weights(run):
    """Of the moving average, at the settings of the sample grids: what `ldm evaluate` finds in the exported model."""
    folder, _ = run
    config = find_run(str(folder)).config
    training, held_out = split(inspect(open_source(config.data), config.data).used, config.data.held_out)
    sides = CaptionedImages(training, config.data, 0), CaptionedImages(held_out, config.data, 0)
    reference = Reference.of(*sides, feature_space("pixel", device=torch.device("cpu")))
    assert reference.mirrored is not None  # training flips, so that a mirrored copy is one
    found = evaluate(Pipeline.from_pretrained(folder / "pipeline", device="cpu"), reference, samples=N)
    (_, last) = evaluations(folder)[-1]
    assert figures(found, "pixel") == pytest.approx(last)


def test_a_resumed_run_measures_what_an_unbroken_one_does(run, tmp_path):
    """It was killed between its checkpoint of step 2 and the evaluation there, or after that."""
    folder, arguments = run
    expected = evaluations(folder)
    for name, kept in (("before", False), ("after", True)):
        again = tmp_path / name
        shutil.copytree(folder, again)
        shutil.rmtree(again / "checkpoints" / "step_00000004")
        lines = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [line for line in lines if json.loads(line)["step"] <= 2 and (kept or PREFIX not in line)]
        (again / "metrics.jsonl").write_text("".join(lines))
        run_ldm(arguments, f"output_dir={again}", resume=True)
        assert evaluations(again) == expected


def test_the_plan_counts_evaluations(run):
    folder, _ = run
    plan = json.loads((folder / "plan.json").read_text())
    assert 0 < plan["evaluation_seconds"] < plan["expected_seconds"]
