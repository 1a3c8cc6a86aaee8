"""`ldm evaluate`: what it prints and writes, and how it fails."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from ldm.config import LDMConfig, to_yaml
from ldm.config.overrides import load_config
from tests import tiny
from tests.test_cli import call
from tests.training.runs import ROOT, captioned_folder

XHTML = "{http://www.w3.org/1999/xhtml}"
QUICK = ["--samples", 50, "--features", "pixel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline(folder / "parts", num_inference_steps=1, guidance_scale=1.0).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with captions that would break a page, if they were not escaped."""
    folder = captioned_folder(tmp_path_factory.mktemp("data") / "noise", 90, side=8)
    for path in folder.glob("*.txt"):
        path.write_text(f"<b>{path.stem}</b> & ünï 猫 \x1b[31m")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ldm.evaluation.evaluate.GAP_IMAGES", 4)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_an_evaluation_is_said_and_written_as_a_page_json_and_sheets(model, data, here, monkeypatch, capsys):
    arguments = ["evaluate", model, data, *QUICK, "--held-out", 0.2, "--seed", 3, "--guidance", 2]
    assert call(monkeypatch, *arguments) == 0
    out, err = capsys.readouterr()
    folder = here / "evaluation"
    content = json.loads((folder / "evaluation.json").read_text())
    assert f"{data}: {content['images']['training']} training images, {content['images']['held-out']} held out" in out
    assert err.count("warning: captions are cut: the text encoder reads 12 tokens of a text; lost: ") == 1
    assert out.count("note: the training data of") == 1 and "images at" in out
    assert content["verdict"]["sentence"] in out and "guidance 2, seed 3" in out
    for figure in (content["quality"]["generated"]["kid"], content["quality"]["generated"]["precision"]):
        assert f"{figure['name']:<17} {figure['value']:9.4g}" in out
    assert (content["held_out"], content["data"], content["guidance_scale"]) == (0.2, str(data), 2.0)
    assert len(content["pictures"]) == 50 and content["pictures"][0]["nearest"].endswith(".png")
    assert sum("nearest" in picture for picture in content["pictures"]) == content["samples"]["training"]
    for name in ("samples.png", "nearest.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.width > 4 * 96 and json.loads(sheet.text["settings"])["seed"] == 3
    assert out.rstrip().endswith("page: evaluation/evaluation.html")

    tree = ElementTree.fromstring((folder / "evaluation.html").read_bytes())
    text = "".join(tree.find(f"{XHTML}body").itertext())
    assert content["verdict"]["sentence"] in text and "<b>" in text and "\\x1b[31m" in text and "猫" in text
    assert "Generated for held-out captions" in text and "note: the training data of" in text.replace("Note", "note")
    sources = [image.attrib["src"] for image in tree.iter(f"{XHTML}img")]
    assert len(sources) > 30 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in "".join(sources)
    labels = [svg.attrib["aria-label"] for svg in tree.iter("{http://www.w3.org/2000/svg}svg")]
    assert [label.split(",")[0] for label in labels] == ["Loss by band of noise"]

    # Again, of the same pictures: nothing is drawn anew, and all of it is the same, as JSON too.
    before = sorted(path.name for path in (folder / "pictures").rglob("*.safetensors"))
    assert call(monkeypatch, *arguments, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((folder / "evaluation.json").read_text()) == content
    assert "note: the training data of" in captured.err
    assert sorted(path.name for path in (folder / "pictures").rglob("*.safetensors")) == before


def test_a_sweep_chooses_stores_and_is_drawn(model, data, here, monkeypatch, capsys):
    shutil.copytree(model, here / "model")
    arguments = ["evaluate", "model", data, *QUICK, "--held-out", 0.3, "-o", "out", "--sweep", "--sweep-samples", 20]
    arguments += ["--sweep-guidance", "1,3", "--sweep-steps", "1,2"]
    assert call(monkeypatch, *arguments, "--no-store") == 0
    out = capsys.readouterr().out
    assert "sweep: 20 captions of" in out and out.count("\n  own ") == 4
    assert json.loads((here / "model" / "model_index.json").read_text())["_ldm"]["num_inference_steps"] == 1
    content = json.loads((here / "out" / "evaluation.json").read_text())
    assert len(content["sweep"]["cells"]) == 4 and content["sweep"]["stored"] is None
    page = ElementTree.fromstring((here / "out" / "evaluation.html").read_bytes())
    labels = [svg.attrib["aria-label"] for svg in page.iter("{http://www.w3.org/2000/svg}svg")]
    assert any(label.startswith("KID to held-out images") for label in labels)
    chosen = content["sweep"]["chosen"]["own"]
    if chosen["decided"]:
        assert [content["guidance_scale"], content["num_inference_steps"]] == chosen["setting"][1:]


def test_a_run_whose_checkpoints_were_removed_is_swept_without_its_raw_weights(model, data, here, monkeypatch, capsys):
    shutil.copytree(model, here / "run" / "pipeline")
    overrides = [f"data.path={data}", "data.held_out=0.3", f"output_dir={here / 'run'}"]
    config = load_config(ROOT / "configs" / "digits.yaml", overrides, LDMConfig)
    (here / "run" / "config.yaml").write_text(to_yaml(config))
    arguments = ["--sweep", "--sweep-samples", 20, "--sweep-guidance", "1", "--sweep-steps", "1,2"]
    assert call(monkeypatch, "evaluate", "run", *QUICK, *arguments) == 0
    out = capsys.readouterr().out
    assert "has no checkpoint" in out
    assert out.count("\n  EMA ") == 2 and "\n  raw " not in out


def test_an_interrupt_says_that_the_same_command_goes_on(model, data, here, monkeypatch, capsys):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.evaluation.evaluate.loss_gap", stop)
    assert call(monkeypatch, "evaluate", model, data, *QUICK) == 130
    assert "in evaluation, and the same command continues" in capsys.readouterr().err
    assert list((here / "evaluation" / "pictures").rglob("*.safetensors"))
    assert not (here / "evaluation" / "evaluation.html").exists()


def test_without_held_out_images_it_says_what_cannot_be_known(model, data, here, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", model, data, *QUICK, "--held-out", 0) == 0
    out = capsys.readouterr().out
    assert "note: nothing is held out" in out and "held-out captions" not in out
    assert "Left out: the Fréchet ratio and all metrics of held-out images" in out
    assert "Learning:" not in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--samples", "0"], "samples is 0; at least 50"),
        (["--samples", "49"], "samples is 49; at least 50"),
        (["--features", "fid"], 'there are no features "fid"'),
        (["--features", "inception"], "Inception features need their weights"),
        (["--features", "pixel", "--weights", "a"], 'features "pixel" take no weights'),
        (["--clip", "ViT-B-32:none"], "pip install 'open-clip-torch>=3.3'"),
        (["--held-out", "1"], "data.held_out is 1"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--reference", "0"], "reference is 0"),
        (["--sweep", "--steps", "4"], "a sweep chooses num_inference_steps"),
        (["--sweep", "--sweep-steps", "4;5"], "--sweep-steps is '4;5'"),
        (["--sweep", "--sweep-guidance", "1,1"], "guidance_scales of a sweep are [1.0, 1.0]"),
        (["--sweep", "--held-out", "0", "--features", "pixel"], "a sweep measures on held-out images"),
        (["-o", "file"], "--output is file, a file"),
        (["-o", "file/inside"], "file/inside"),
        (["--device", "abacus"], "abacus"),
        (["--image-column", "x", "--caption-column", "y"], "x"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(arguments, part, model, data, here, monkeypatch, capsys):
    (here / "file").touch()
    if "--features" not in arguments:
        arguments = [*arguments, "--features", "pixel"]
    assert call(monkeypatch, "evaluate", model, data, *arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and error.count("error: ") == 1
    assert part in error
    assert [path for path in here.rglob("*") if path.suffix in (".html", ".json")] == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["./nothing", "digits"], "there is no model folder ./nothing"),
        (["MODEL", "./nowhere"], "nowhere"),
        (["./nothing", "./nowhere"], "data.path ./nowhere does not exist"),  # before any model is opened
        (["MODEL"], "name it: ldm evaluate MODEL DATA"),
        (["FIRST_STAGE", "digits"], "is the run of a first stage"),
        (["UNFINISHED"], "has no pipeline/ yet"),
    ],
)
def test_wrong_models_and_data(arguments, part, model, here, monkeypatch, capsys):
    folders = {"MODEL": model, "FIRST_STAGE": here / "first", "UNFINISHED": here / "unfinished"}
    for name, content in (("first", "autoencoder: {}\ndata: {}"), ("unfinished", UNFINISHED)):
        (here / name).mkdir()
        (here / name / "config.yaml").write_text(content)
    assert call(monkeypatch, "evaluate", *(folders.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error


UNFINISHED = """
output_dir: runs/a
data: {path: digits, resolution: 8}
train: {max_steps: 1}
sample: {prompts: [a]}
unet: {}
"""


def test_an_interrupt_before_anything_was_drawn_promises_nothing(model, data, here, monkeypatch, capsys):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.api.estimate_duration", stop)
    assert call(monkeypatch, "evaluate", model, data, *QUICK) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"


def test_features_are_refused_before_a_model_is_looked_for(data, here, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", "no/model", data, "--features", "foo") == 2
    assert "foo" in capsys.readouterr().err
