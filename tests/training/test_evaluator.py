"""Evaluations while a model trains: what is logged, that it is the same when a run is resumed, and what it costs."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch

from ldm.config import LDMConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, split
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.evaluation.evaluate import evaluate_pipeline
from ldm.evaluation.features import feature_space
from ldm.evaluation.images import Reference
from ldm.pipelines import NotFinite, Pipeline
from ldm.training.evaluator import Evaluator, log_values
from ldm.training.report import EVALUATION_PREFIX, metric_name, metric_title
from ldm.training.run_info import find_run
from tests.test_cli import call
from tests.training.runs import ROOT, captioned_folder, evaluations, metrics, run_ldm, settings

KINDS = ("not yet a model of this data", "learning", "memorizing", "undecided")

N = 60
EVALUATED = [f"train.evaluation_samples={N}", "train.evaluation_features=pixel", "train.evaluate_every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("measured")
    data = captioned_folder(folder / "data", 80, side=8)
    arguments = [*settings(folder / "run", encoder_folder), f"data.path={data}", "data.resolution=8", *EVALUATED]
    arguments += ["train.max_steps=4", "train.sample_every=100", "data.flip=true", "data.held_out=0.3"]
    run_ldm(arguments)
    return folder / "run", arguments


@pytest.fixture(autouse=True)
def few_looks(monkeypatch):
    monkeypatch.setattr("ldm.evaluation.evaluate.GAP_IMAGES", 4)


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
        assert str(int(name.rpartition("_n")[2])) + " images" in metric_title(name)
    assert metric_title("loss") is None and metric_title("evaluation_kid") is None
    with pytest.raises(AssertionError):
        metric_name("kidd", samples=3)
    verdicts = [(line["step"], line["verdict"]) for line in metrics(folder) if "verdict" in line]
    assert [step for step, _ in verdicts] == [2, 4] and {verdict["kind"] for _, verdict in verdicts} <= set(KINDS)
    page = ElementTree.fromstring((folder / "report.html").read_bytes())
    assert f"Evaluation of step 4: {verdicts[-1][1]['sentence']}" in "".join(page.itertext())
    shown = {svg.attrib["aria-label"] for svg in page.iter("{http://www.w3.org/2000/svg}svg")}
    assert {metric_title(name) for name in one} <= shown


def test_the_figures_are_those_of_the_exported_weights(run):
    """Of the moving average, at the settings of the sample grids: what `ldm evaluate` finds in the exported model."""
    folder, _ = run
    config = find_run(str(folder)).config
    training, held_out = split(inspect(open_source(config.data), config.data).used, config.data.held_out)
    sides = CaptionedImages(training, config.data, 0), CaptionedImages(held_out, config.data, 0)
    reference = Reference.from_data(*sides, feature_space("pixel", device=torch.device("cpu")))
    assert reference.mirrored_layouts is not None  # training flips, so that a mirrored copy is one
    found = evaluate_pipeline(Pipeline.from_pretrained(folder / "pipeline", device="cpu"), reference, samples=N)
    (_, last) = evaluations(folder)[-1]
    assert log_values(found, "pixel") == pytest.approx(last)
    assert [line["verdict"] for line in metrics(folder) if "verdict" in line][-1] == vars(found.verdict)


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_measures_what_an_unbroken_one_does(kept, run, tmp_path):
    """It was killed between its checkpoint of step 2 and the evaluation there, or after that."""
    folder, arguments = run
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    lines = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [line for line in lines if json.loads(line)["step"] <= 2 and (kept or EVALUATION_PREFIX not in line)]
    (again / "metrics.jsonl").write_text("".join(lines))
    run_ldm(arguments, f"output_dir={again}", resume=True)
    assert evaluations(again) == evaluations(folder)
    noted = [[line for line in metrics(run_folder) if "verdict" in line] for run_folder in (again, folder)]
    assert noted[0] == noted[1] and len(noted[0]) == 2


def test_the_plan_counts_evaluations(run):
    folder, _ = run
    plan = json.loads((folder / "plan.json").read_text())
    assert 0 < plan["evaluation_seconds"] < plan["expected_seconds"]


def test_a_wrong_number_of_pictures_is_refused(tmp_path, encoder_folder):
    def config(*more):
        return load_config(ROOT / "configs" / "digits.yaml", [*settings(tmp_path, encoder_folder), *more], LDMConfig)

    with pytest.raises(ValueError, match="evaluate_every is 0"):
        config("train.evaluate_every=0")
    with pytest.raises(ValueError, match="evaluation_samples is 0"):
        config("train.evaluation_samples=0")
    few = config("train.evaluation_samples=49", "train.evaluate_every=2")
    with pytest.raises(ValueError, match=r"train\.evaluation_samples is 49; at least 50"):
        Evaluator(SimpleNamespace(config=few))  # refused before it looks at any


def test_a_run_folder_is_evaluated_on_its_own_data(run, tmp_path, monkeypatch, capsys):
    folder, arguments = run
    data = next(text.removeprefix("data.path=") for text in arguments if text.startswith("data.path="))
    quick = ["--samples", 50, "--features", "pixel"]
    assert call(monkeypatch, "evaluate", folder, *quick) == 0
    out = capsys.readouterr().out
    content = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert content["data"] == data and content["held_out"] == 0.3 and content["run"] == str(folder)
    assert "note:" not in out, "its data is what it was trained on"
    state = json.loads((folder / "checkpoints" / "step_00000004" / "training" / "state.json").read_text())
    assert content["data_sha256"] == state["data"]["sha256"]

    # The exported model inside it is known by the run; other data, and data that has changed, are named.
    copied = shutil.copytree(data, tmp_path / "data")
    inside = folder / "pipeline"
    assert call(monkeypatch, "evaluate", inside, copied, *quick, "-o", tmp_path / "a") == 0
    assert f"note: {inside} was trained on {data}, not on {copied}" in capsys.readouterr().out
    run_copy = shutil.copytree(folder, tmp_path / "run")
    (run_copy / "config.yaml").write_text((folder / "config.yaml").read_text().replace(data, str(copied)))
    (copied / "0.txt").write_text("another caption")
    assert call(monkeypatch, "evaluate", run_copy, *quick) == 0
    out = capsys.readouterr().out
    assert "1 changed (0.png) now; " in out
    assert call(monkeypatch, "evaluate", run_copy, *quick, "--held-out", 0.5) == 2
    assert "held_out is 0.5, but" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_a_run_tries_raw_weights_too_and_stores_what_it_decides(run, tmp_path, monkeypatch, capsys):
    copied = shutil.copytree(run[0], tmp_path / "run")
    arguments = ["evaluate", copied, "--samples", 50, "--features", "pixel", "--sweep"]
    assert call(monkeypatch, *arguments, "--sweep-guidance", "1", "--sweep-steps", "1,2", "--sweep-samples", 30) == 0
    out = capsys.readouterr().out
    assert out.count("\n  EMA ") == out.count("\n  raw ") == 2
    sweep = json.loads((copied / "evaluation" / "evaluation.json").read_text())["sweep"]
    _, guidance, steps = sweep["chosen"]["EMA"]["setting"]
    stored = json.loads((copied / "pipeline" / "model_index.json").read_text())["_ldm"]
    before = json.loads((run[0] / "pipeline" / "model_index.json").read_text())["_ldm"]
    chosen = before | {"guidance_scale": guidance, "num_inference_steps": steps}
    assert stored == (chosen if sweep["chosen"]["EMA"]["decided"] else before)


def test_samples_that_are_not_finite_do_not_stop_a_run_nor_keep_it_from_going_on(
    tmp_path, encoder_folder, capsys, monkeypatch
):
    def overflows(*arguments, **settings):
        raise NotFinite("picture 0 left the finite numbers")

    monkeypatch.setattr("ldm.training.setup.sample_grid", overflows)
    monkeypatch.setattr("ldm.training.evaluator.evaluate_pipeline", overflows)
    data = captioned_folder(tmp_path / "data", 80, side=8)
    arguments = [*settings(tmp_path / "run", encoder_folder), f"data.path={data}", "data.resolution=8", *EVALUATED]
    run_ldm(arguments, "train.max_steps=2", "data.held_out=0.3")  # the plan draws too, when it goes on as well
    out = capsys.readouterr().out
    for what in ("has no sample grid", "was not measured"):
        assert f"step 2 {what}: picture 0 left the finite numbers" in out
    assert not list((tmp_path / "run").glob("samples/*.png"))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
