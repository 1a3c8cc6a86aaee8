"""The calls of `ldm`: what they return, show and refuse."""

import io
import json

import pytest
from PIL import Image

import ldm
from tests import tiny
from tests.training.runs import captioned_folder


@pytest.fixture
def model(tmp_path):
    tiny.pipeline(tmp_path / "parts", num_inference_steps=1, guidance_scale=1.0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ldm.evaluation.evaluate.GAP_IMAGES", 4)
    return str(captioned_folder(tmp_path / "noise", 80, side=8))


def test_an_evaluation_is_a_record_with_its_page(model, data, tmp_path):
    lines = []
    options = ldm.EvaluationOptions(samples=50, features="pixel", held_out=0.2)
    found = ldm.evaluate(model, data, output=tmp_path / "out", options=options, log=lines.append)
    assert json.loads(json.dumps(found.to_dict())) == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found.to_dict()["verdict"]["kind"] == found.evaluation.verdict.kind
    assert found.page.is_file() and str(found.page) in repr(found) and "\n" not in repr(found)
    assert found._repr_html_().startswith("<iframe srcdoc=") and "&lt;h1" in found._repr_html_()
    assert any(line.startswith("note: the training data") for line in lines)


def test_a_likelihood_is_a_record(model, data, tmp_path):
    found = ldm.likelihood(model, data, options=ldm.LikelihoodOptions(samples=2, steps_per_image=2, split="all"))
    content = found.to_dict()
    assert content["bits_per_dimension"] == found.likelihood.total and content["images"] == 2
    assert f"{found.likelihood.total:.4f}" in repr(found)
    assert found._repr_html_().startswith("<svg ")
    found.save_chart(tmp_path / "terms.png")
    assert (tmp_path / "terms.png").is_file()


def test_a_first_stage_is_measured(data):
    options = ldm.AutoencoderOptions(samples=4, resolution=32, features="pixel")
    found = ldm.evaluate_autoencoder("openmoji-first-stage", data, options=options)
    assert found.to_dict()["images"] == 4 and found.report.advice.action in repr(found)
    assert found._repr_png_().startswith(b"\x89PNG")


def test_generated_images_show_in_a_notebook(model):
    found = ldm.Pipeline.from_pretrained(model)("a", seed=0, num_images_per_prompt=9)
    with Image.open(io.BytesIO(found._repr_png_())) as sheet:
        assert sheet.format == "PNG" and sheet.width > 8 * 96 and sheet.height > 2 * 96


def test_data_is_checked(data):
    report = ldm.check_data(data)
    assert (report.total, report.resolution) == (80, 64)
    assert ldm.check_data(ldm.DataConfig(path=data, resolution=8)).resolution == 8
    assert f"{report.used} used" in repr(report) and len(repr(report)) < 300


@pytest.mark.parametrize(
    ("options", "changes", "part"),
    [
        (ldm.EvaluationOptions, {"samples": 3}, "samples is 3"),
        (ldm.EvaluationOptions, {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (ldm.EvaluationOptions, {"max_reference": 0}, "max_reference is 0"),
        (ldm.EvaluationOptions, {"sweep": ldm.SweepOptions(), "guidance_scale": 2.0}, "a sweep chooses"),
        (ldm.SweepOptions, {"samples": 0}, "samples of a sweep are 0"),
        (ldm.AutoencoderOptions, {"split": "train"}, "split is train"),
        (ldm.AutoencoderOptions, {"samples": 1}, "samples is 1"),
        (ldm.LikelihoodOptions, {"steps_per_image": 3}, "steps per image is 3"),
        (ldm.LikelihoodOptions, {"held_out": 1.0}, "data.held_out is 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, changes, part):
    with pytest.raises(ValueError, match=part):
        options(**changes)
