"""The `ldm` command: what it writes and how it fails."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import Pipeline, cli
from ldm.text import loading
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ldm", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_picture_carries_what_made_it(model, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "corgi.png"
    code = call(
        monkeypatch, "generate", "a corgi wearing a hät", "--model", model, "--seed", 7, "-o", path,
        "--steps", 3, "--guidance", 1.5, "--negative-prompt", "blue",
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.split() == [str(path)]
    image = Image.open(path)
    assert image.text["prompt"] == "a corgi wearing a hät"
    assert image.text["negative_prompt"] == "blue"
    assert image.text["seed"] == "7"
    settings = json.loads(image.text["settings"])
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["eta"]) == (3, 1.5, 0.0)
    again = Pipeline.from_pretrained(model)(
        "a corgi wearing a hät", seed=7, num_inference_steps=3, guidance_scale=1.5, negative_prompt="blue"
    )
    assert (np.asarray(image) == np.asarray(again.images[0])).all()


def test_several_pictures_make_a_sheet_beside_them(model, tmp_path, monkeypatch):
    assert call(monkeypatch, "generate", "a", "-m", model, "--seed", 7, "-n", 4, "-o", tmp_path / "c.png") == 0
    names = ["c-10.png", "c-7.png", "c-8.png", "c-9.png", "c.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Image.open(tmp_path / "c-9.png").text["seed"] == "9"
    assert json.loads(Image.open(tmp_path / "c.png").text["seed"]) == [7, 8, 9, 10]
    assert Image.open(tmp_path / "c.png").width > 4 * 90


def test_several_prompts_make_a_row_each_with_the_same_seeds(model, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("b\n\n  c \n", encoding="utf-8-sig")
    (tmp_path / "out").mkdir()
    arguments = ["generate", "a", "-m", model, "--seed", 7, "--steps", 1, "-o", tmp_path / "out" / "i.png"]
    assert call(monkeypatch, *arguments, "--prompts", tmp_path / "p.txt", "--enlarge", 3) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["i-1.png", "i-2.png", "i-3.png", "i.png"]
    texts = [Image.open(tmp_path / "out" / f"i-{i}.png").text for i in (1, 2, 3)]
    assert [(text["prompt"], text["seed"]) for text in texts] == [("a", "7"), ("b", "7"), ("c", "7")]
    assert json.loads(Image.open(tmp_path / "out" / "i.png").text["prompt"]) == ["a", "b", "c"]
    large = np.asarray(Image.open(tmp_path / "out" / "i-2.png"))
    alone = Pipeline.from_pretrained(model)("b", seed=7, num_inference_steps=1).images[0]
    assert (large == np.asarray(alone).repeat(3, axis=0).repeat(3, axis=1)).all()
    assert call(monkeypatch, *arguments, "b", "-n", 2) == 0
    assert {"i-1-7.png", "i-1-8.png", "i-2-7.png", "i-2-8.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_without_a_name_nothing_is_overwritten(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2, 3):
        assert call(monkeypatch, "generate", "a", "-m", model, "--steps", 1, "--seed", seed) == 0
    names = ("image.png", "image-2.png", "image-3.png")
    assert [Image.open(tmp_path / name).text["seed"] for name in names] == ["1", "2", "3"]
    (tmp_path / "image-4-1.png").write_text("mine")  # of several prompts each file gets a free name
    assert call(monkeypatch, "generate", "a", "b", "-m", model, "--steps", 1) == 0
    assert (tmp_path / "image-4-1.png").read_text() == "mine"
    assert {"image-4.png", "image-4-1-2.png", "image-4-2.png"} <= {path.name for path in tmp_path.iterdir()}


def test_sampler_and_guidance_are_written_down_and_drawn_with(model, tmp_path, monkeypatch):
    path, strip = tmp_path / "a.png", tmp_path / "strips" / "a.png"
    code = call(
        monkeypatch, "generate", "a", "-m", model, "--seed", 7, "-n", 2, "-o", path, "--steps", 12, "--sampler", "ddpm",
        "--guidance-rescale", 0.5, "--guidance-interval", 0.2, 5, "--dynamic-threshold", 0.9, "--progress-strip", strip,
    )  # fmt: skip
    assert code == 0
    settings = json.loads(Image.open(tmp_path / "a-8.png").text["settings"])
    expected = {
        "sampler": "ddpm", "num_inference_steps": 12, "guidance_rescale": 0.5, "guidance_interval": [0.2, 5.0],
        "dynamic_threshold": 0.9, "guidance_scale": 2.0, "eta": 0.0,
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    again = Pipeline.from_pretrained(model)("a", seed=8, **expected)
    assert (np.asarray(Image.open(tmp_path / "a-8.png")) == np.asarray(again.images[0])).all()
    sheet = Image.open(strip)
    assert (sheet.text["prompt"], json.loads(sheet.text["seed"])) == ("a", [7, 8])
    timesteps = json.loads(sheet.text["timesteps"])
    assert len(timesteps) == 8 and timesteps == sorted(timesteps, reverse=True)
    assert sheet.width > 8 * 96 and sheet.height > 2 * 96
    # The last column is the picture: x̂_0 of the last step of DDPM.
    tile = np.asarray(sheet)[4 + 18 : 4 + 18 + 96, 4 + 7 * 100 : 4 + 7 * 100 + 96]
    assert (tile[::12, ::12] == np.asarray(Image.open(tmp_path / "a-7.png"))).mean() > 0.95


def test_options_of_a_sampler_and_an_endless_interval_are_written_down(model, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    code = call(
        monkeypatch, "generate", "a", "-m", model, "--seed", 7, "-o", path, "--steps", 2, "--sampler", "langevin",
        "--sampler-option", "num_langevin_steps=2", "--sampler-option", "step_size=5e-2",
        "--guidance-interval", 0, "inf",
    )  # fmt: skip
    assert code == 0
    settings = json.loads(Image.open(path).text["settings"], parse_constant=pytest.fail)
    kept = {"sampler", "sampler_options", "num_inference_steps", "guidance_interval"}
    kept = {key: settings[key] for key in kept}
    assert kept["sampler_options"] == {"num_langevin_steps": 2, "step_size": 0.05}
    assert kept["guidance_interval"] == [0.0, "inf"]  # JSON has no infinity
    again = Pipeline.from_pretrained(model)("a", seed=7, **kept)
    assert (np.asarray(Image.open(path)) == np.asarray(again.images[0])).all()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--sampler-option", "snr"], "--sampler-option is 'snr'; write KEY=NUMBER"),
        (["--sampler-option", "snr=x"], "--sampler-option is 'snr=x'; write KEY=NUMBER"),
        (["--sampler-option", "snr=1"], "sampler_options has 'snr'; sampler 'ddim' has none"),
        (["--sampler", "dimm"], "did you mean 'ddim'"),
        (["--guidance-interval", "5", "1"], "guidance_interval is (5, 1), turned round"),
        (["--guidance-rescale", "2"], "guidance_rescale is 2"),
        (["--dynamic-threshold", "0"], "dynamic_threshold is 0"),
        (["--progress-strip", "strip.jpg"], "--progress-strip is strip.jpg"),
        (["--progress-strip", "same.png", "-o", "same.png"], "--progress-strip is same.png"),
        (["--progress-strip", "strip.png", "--steps", "0"], "num_inference_steps is 0"),
        (["--model", "./nothing"], "there is no model folder ./nothing"),
        (["--steps", "-3"], "num_inference_steps is -3"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--eta", "2"], "eta is 2"),
        (["-n", "0"], "-n is 0"),
        (["--enlarge", "17"], "--enlarge is 17"),
        (["--prompts", "./none.txt"], "none.txt cannot be read"),
        (["--seed", "-1"], "seed is -1"),
        (["-o", "picture.jpg"], "picture.jpg"),
        (["--height", "-8"], "-8"),
        (["--device", "abacus"], "abacus"),
        (["--tile", "small"], "tile is 'small'"),
        (["--tile", "8"], "tile is 8"),
        (["--height", "1000000", "--width", "1000000"], "height and width are 1000000 and 1000000: an image of this"),
        (["--width", str(10**30)], f"height and width are 8 and {10**30}"),
        (["-n", str(10**14)], "100,000,000,000,000 images of 8x8"),
        (["--device", "meta"], "device is 'meta', which cannot be used"),
        (["--device", "cuda:99"], "device is 'cuda:99', which cannot be used"),
        (
            ["--negative-prompt", "a \udcff b"],
            r"a negative prompt has half of a surrogate pair at place 2 ('a \udcff b')",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, part, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "generate", "a", "--model", model, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_no_text_is_refused_before_the_model_is_opened(tmp_path, monkeypatch, capsys):
    arguments = ["--model", tmp_path / "nothing", "-o", tmp_path / "a.png"]
    assert call(monkeypatch, "generate", "a cat \ud83d", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a prompt has half of a surrogate pair at place 6 ('a cat \\ud83d')")
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_lora_without_peft_is_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.utils.other", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    arguments = ["-m", model, "-o", tmp_path / "a.png", "--lora", tmp_path / "a.safetensors"]
    assert call(monkeypatch, "generate", "a", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: LoRA needs peft, which cannot be imported") and error.count("\n") == 1


def test_weights_that_are_not_finite_end_in_one_line_and_no_picture(model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "broken")
    path = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for number, said in (
        (float("nan"), f"error: {path}: conv_out.weight holds numbers that are not finite"),
        (3e38, "error: image 0 left the finite numbers (nan or inf) at step 1, timestep 999; "),
    ):
        save_file(weights | {"conv_out.weight": torch.full_like(weights["conv_out.weight"], number)}, path)
        assert call(monkeypatch, "generate", "a", "-m", tmp_path / "broken", "-o", tmp_path / "a.png") == 2
        error = capsys.readouterr().err
        assert error.startswith(said) and error.count("\n") == 1
        assert not (tmp_path / "a.png").exists()


def test_memory_that_runs_out_anywhere_is_one_line(monkeypatch, capsys):
    def full(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore")

    monkeypatch.setattr("ldm.cli.app", full)
    assert call(monkeypatch, "nll") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: memory ran out ([enforce fail] DefaultCPUAllocator") and error.count("\n") == 1


def test_the_command_is_installed_and_knows_its_version():
    done = subprocess.run([sys.executable, "-m", "ldm.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip().count(".") == 2
    wrong = subprocess.run([sys.executable, "-m", "ldm.cli", "generate"], capture_output=True, text=True)
    assert wrong.returncode == 2


def dataset(folder, count=30):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def test_a_check_of_clean_data_is_readable_and_ends_well(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "data", "check", dataset(tmp_path / "clean"), "--resolution", 32) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'clean'}: 30 images: 30 used (" in out
    assert out.rstrip().endswith("Nothing needs attention.")
    assert "all fit into the text encoder" in out


def test_a_check_says_what_is_wrong_in_text_and_json(tmp_path, monkeypatch, capsys):
    folder = dataset(tmp_path / "data")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "4.txt").unlink()
    (folder / "5.txt").write_text("one two three four five six seven eight nine ten")
    (folder / "6 copy.png").write_bytes((folder / "6.png").read_bytes())
    (folder / "6 copy.txt").write_text("\x1b[31mred")
    arguments = ["data", "check", folder, "--resolution", 32, "--max-length", 8]
    assert call(monkeypatch, *arguments) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert "3.png" in out and "4.png" in out
    assert '5.png loses "seven eight nine ten"' in out
    assert r'6 copy.png says "\x1b[31mred"' in out
    assert "Needs attention" in out
    assert err == ""
    assert call(monkeypatch, *arguments, "--json") == 1
    account = json.loads(capsys.readouterr().out)
    assert (account["used"], account["skipped"], account["duplicate"], account["total"]) == (28, 2, 1, 31)
    assert {entry["path"] for entry in account["skipped_files"]} == {"3.png", "4.png"}
    assert account["captions"]["missing"] == 1
    assert [entry["lost"] for entry in account["captions"]["too_long"]] == ["seven eight nine ten"]
    assert account["training"] + account["held_out"] == 28
    assert call(monkeypatch, *arguments, "--json", "--held-out", 0.5) == 1
    assert json.loads(capsys.readouterr().out)["held_out"] > account["held_out"]


def test_a_folder_without_one_usable_caption_gets_its_account_too(tmp_path, monkeypatch, capsys):
    folder = dataset(tmp_path / "data", 3)
    for path in folder.glob("*.txt"):
        path.write_text("")
    assert call(monkeypatch, "data", "check", folder, "--json") == 1
    account = json.loads(capsys.readouterr().out)
    assert (account["total"], account["used"], account["skipped"], account["captions"]["empty"]) == (3, 0, 3, 3)
    (tmp_path / "bare").mkdir()
    assert call(monkeypatch, "data", "check", tmp_path / "bare") == 1
    assert "no image can be used; put an a.txt with its caption beside each a.png" in capsys.readouterr().out


def test_a_built_in_set_is_looked_at_too(monkeypatch, capsys):
    assert call(monkeypatch, "data", "check", "digits", "--resolution", 8, "--json") == 0
    account = json.loads(capsys.readouterr().out)
    assert (account["total"], account["used"], account["modes"]) == (1797, 1797, {"L": 1797})


def test_a_check_does_without_the_default_encoder_but_not_without_the_one_asked_for(tmp_path, monkeypatch, capsys):
    def missing():
        raise ValueError("minilm is not installed")

    monkeypatch.setitem(loading._PACKAGED, "minilm", missing)
    folder = dataset(tmp_path / "clean")
    assert call(monkeypatch, "data", "check", folder, "--resolution", 32) == 0
    assert "the lengths of captions were not checked: minilm is not installed" in capsys.readouterr().out
    assert call(monkeypatch, "data", "check", folder, "--encoder", "minilm") == 2
    assert capsys.readouterr().err == "error: minilm is not installed\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "nowhere"),
        (["digits", "--resolution", "0"], "data.resolution is 0"),
        (["digits", "--held-out", "1"], "data.held_out is 1"),
        (["digits", "--background", "clear"], 'data.background is "clear"'),
        (["digits", "--encoder", "./none"], "none"),
        (["digits", "--max-length", "1"], "1"),
    ],
)
def test_a_wrong_check_is_one_line_and_exit_code_2(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "data", "check", *arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert part in error


@pytest.mark.slow
def test_captions_survive_a_terminal_of_another_alphabet(tmp_path):
    folder = dataset(tmp_path / "data", 2)
    for number in range(2):
        (folder / f"{number}.txt").write_text("grün 猫", encoding="utf-8")
    command = [sys.executable, "-m", "ldm.cli", "data", "check", str(folder)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1, done.stderr
    assert rb'"gr\xfcn \u732b"' in done.stdout


# ---- nll


def test_the_bound_is_said_plotted_and_written_as_json(model, tmp_path, monkeypatch, capsys):
    arguments = ["nll", model, "digits", "--samples", 5, "--steps-per-image", 6, "--seed", 3]
    assert call(monkeypatch, *arguments, "-o", tmp_path / "plots" / "terms.svg") == 0
    out = capsys.readouterr().out
    assert "digits, held-out: 5 images of 3x8x8 values, 7 timesteps each, 35 evaluations" in out
    assert call(monkeypatch, *arguments, "--json", "--output", tmp_path / "plots" / "terms.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["evaluations"], found["split"], found["variance"]) == (5, 35, "held-out", "small")
    total = found["L_T"] + found["sum_of_L_t"] + found["L_0"]
    assert found["bits_per_dimension"] == pytest.approx(total)
    for name, key in (("total", "bits_per_dimension"), ("L_0", "L_0"), ("sum of L_t", "sum_of_L_t"), ("L_T", "L_T")):
        assert f"{name:<12} {found[key]:8.4f}" in out
    assert f"± {found['interval_95']:.4f}, 95 % over images" in out
    assert f"(± {found['timesteps_interval_95']:.4f} of it" in out
    assert [stratum[0] for stratum in found["curve"]][:2] == [0, 1]
    assert (tmp_path / "plots" / "terms.svg").read_text().count("<circle") == len(found["curve"]) == 4
    assert Image.open(tmp_path / "plots" / "terms.png").size == (1280, 640)


def test_the_held_out_side_is_that_of_training(model, monkeypatch, capsys):
    def figures(*arguments):
        assert call(monkeypatch, "nll", model, "digits", "--steps-per-image", 2, "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    assert figures()["images"] == 176
    half = figures("--held-out", 0.5, "--variance", "large")
    assert 800 < half["images"] < 1000 and half["variance"] == "large"
    assert figures("--split", "all", "--samples", 1)["interval_95"] is None
    with pytest.raises(AssertionError):
        figures("--samples", 177)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["digits", "--split", "training"], "split is training"),
        (["digits", "--seed", "-1"], "seed is -1"),
        (["digits", "--variance", "learned"], "variance is learned"),
        (["digits", "-o", "terms.pdf"], "--output is terms.pdf"),
        (["digits", "--samples", "0"], "samples is 0"),
        (["digits", "--steps-per-image", "7"], "steps per image is 7"),
        (["digits", "--held-out", "0"], "nothing of digits is held out"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(arguments, part, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "nll", model, *arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert part in error
    assert not list(tmp_path.iterdir())


def test_models_without_a_bound_are_refused_with_the_reason(model, tmp_path, monkeypatch, capsys):
    tiny.pipeline(tmp_path / "parts", "latent").save_pretrained(tmp_path / "latent")
    assert call(monkeypatch, "nll", tmp_path / "latent", "digits") == 2
    assert "this model diffuses latents" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "blind")
    tiny.edit_json(tmp_path / "blind" / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert call(monkeypatch, "nll", tmp_path / "blind", "digits") == 2
    assert "prediction_type is epsilon, but at timestep 999 alpha is 0" in capsys.readouterr().err
    wide = tiny.pipeline(tmp_path / "parts of wide")
    tiny.widened(wide)
    wide.save_pretrained(tmp_path / "learned")
    assert call(monkeypatch, "nll", tmp_path / "learned", "digits", "--variance", "large") == 2
    assert "has learned its variances; leave it out" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "wide")
    tiny.edit_json(tmp_path / "wide" / "unet" / "config.json", sample_size=[8, 16])
    assert call(monkeypatch, "nll", tmp_path / "wide", "digits") == 2
    assert "the model was trained on 16x8 pixels" in capsys.readouterr().err


def test_a_model_draws_with_its_own_sampler_unless_told_otherwise(tmp_path, monkeypatch):
    tiny.pipeline(tmp_path / "parts", sampler="ddpm").save_pretrained(tmp_path / "model")
    for name, more in (("own", []), ("named", ["--sampler", "ddpm"]), ("ddim", ["--sampler", "ddim"])):
        arguments = ["-m", tmp_path / "model", "--seed", 1, "-o", tmp_path / f"{name}.png", *more]
        assert call(monkeypatch, "generate", "a", *arguments) == 0
    own, named, ddim = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("own", "named", "ddim"))
    assert (own == named).all() and not (own == ddim).all()
    assert json.loads(Image.open(tmp_path / "own.png").text["settings"])["sampler"] == "ddpm"


def test_words_that_are_cut_are_said_on_one_line(model, tmp_path, monkeypatch, capsys):
    arguments = ["generate", "--model", model, "-o", tmp_path / "a.png", "--steps", 1]
    assert call(monkeypatch, *arguments, "a very long prompt", "--negative-prompt", "an ugly monster") == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "warning: the text encoder reads 12 tokens of a text; lost: 'prompt' of 'a very long prompt'; "
        "'monster' of 'an ugly monster'"
    ]
    assert said.out.splitlines() == [str(tmp_path / "a.png")]
    assert call(monkeypatch, *arguments, "a cat") == 0
    assert capsys.readouterr().err == ""
    assert call(monkeypatch, *arguments, "a very long prompt", "--eta", 2) == 2  # one error is one line
    assert capsys.readouterr().err.count("\n") == 1
    assert call(monkeypatch, "nll", model, "digits", "--samples", 2, "--steps-per-image", 2) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: captions are cut: the text encoder reads 12 tokens") and err.count("\n") == 1


BEFORE_LOADING = {
    "generate": [
        (["--steps", "-5"], "num_inference_steps is -5"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--guidance", "inf"], "guidance_scale is inf"),
        (["-n", "0"], "-n is 0"),
        (["--sampler", "dimm"], "did you mean 'ddim'"),
        (["--sampler", "ddim", "--sampler-option", "snr=1"], "sampler_options has 'snr'"),
        (["--sampler", "ddpm", "--eta", "1"], "eta is 1.0, which sampler 'ddpm' does not have"),
        (["--eta", "-1"], "eta is -1"),
        (["--guidance-rescale", "nan"], "guidance_rescale is nan"),
        (["--guidance-interval", "5", "1"], "turned round"),
        (["--dynamic-threshold", "2"], "dynamic_threshold is 2"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**63 - 1), "-n", "2"], f"seed is {2**63}"),
        (["--height", "0"], "height is 0"),
        (["--width", "-8"], "width is -8"),
        (["--tile", "3"], "tile is 3"),
        (["--device", "abacus"], "abacus"),
        (["--lora", "style.safetensors:nan"], "the weight of adapter 'style.safetensors' is nan"),
        (["--lora=~no-such-user/x:1"], "home folder of a user that does not exist"),
        (["--output=~no-such-user/x.png"], "home folder of a user that does not exist"),
        (["-o", "folder.png"], "--output is folder.png, a folder"),
        (["-o", "file/inside.png"], "--output is file/inside.png, and nothing can be written in"),
        (["-o", "/proc/none/x.png"], "--output is /proc/none/x.png, and nothing can be written in /proc"),
        (["--progress-strip", "/proc/x.png"], "--progress-strip is /proc/x.png"),
        (["--progress-strip", "./image.png"], "it must be another file than -o"),
        (["-o", "x" * 300 + ".png"], "File name too long"),
    ],
    "nll": [
        (["digits", "--seed", "-1"], "seed is -1"),
        (["digits", "--samples", "0"], "samples is 0"),
        (["digits", "--steps-per-image", "3"], "steps per image is 3"),
        (["digits", "--held-out", "nan"], "data.held_out is nan"),
        (["digits", "-o", "/proc/x.svg"], "--output is /proc/x.svg"),
        (["./nowhere"], "nowhere"),
        (["~no-such-user/x"], "data.path is '~no-such-user/x'"),
    ],
    "evaluate": [
        (["digits", "--steps", "-5"], "num_inference_steps is -5"),
        (["digits", "--guidance", "nan"], "guidance_scale is nan"),
        (["digits", "--seed", "-1"], "seed is -1"),
        (["digits", "--held-out", "1.5"], "data.held_out is 1.5"),
        (["digits", "--samples", "3"], "samples is 3"),
        (["~no-such-user/x"], "data.path is '~no-such-user/x'"),
        (["digits", "--reference", "-1"], "reference is -1"),
        (["digits", "--sweep", "--sweep-samples", "0"], "samples of a sweep are 0"),
        (["digits", "--sweep", "--sweep-steps", "0"], "steps of a sweep hold 0"),
        (["digits", "-o", "file"], "--output is file, a file"),
        (["digits", "-o", "/proc/none"], "nothing can be written in /proc"),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "part"),
    [(command, *case) for command, cases in BEFORE_LOADING.items() for case in cases],
)
def test_what_is_wrong_whatever_the_model_is_said_before_it_is_looked_for(
    command, arguments, part, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    model = ["a", "--model", "./nothing"] if command == "generate" else ["./nothing"]
    assert call(monkeypatch, command, *model, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_home_folder_is_found_in_every_path(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(model, tmp_path / "home" / "model")
    arguments = ["a", "--model=~/model", "--steps", 1, "--output=~/new/a.png", "--progress-strip=~/strip.png"]
    assert call(monkeypatch, "generate", *arguments, "-n", 2, "--seed", 1) == 0
    made = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*.png")}
    assert made == {"new/a.png", "new/a-1.png", "new/a-2.png", "strip.png"}
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "home" / "new" / "a.png")
    assert (
        call(monkeypatch, "nll", "~/model", "digits", "--samples", 1, "--steps-per-image", 2, "--output=~/t.svg") == 0
    )
    assert (tmp_path / "home" / "t.svg").is_file()
    (tmp_path / "home" / "encoder").mkdir()
    tiny.clip_text_model().save_pretrained(tmp_path / "home" / "encoder")
    tiny.clip_tokenizer().save_pretrained(tmp_path / "home" / "encoder")
    assert loading.load_text_encoder("~/encoder").hidden_size > 0
    assert call(monkeypatch, "generate", "a", "--model=~/model", "--lora=~/none.safetensors:0.8") == 2
    assert f"there is no {tmp_path / 'home' / 'none.safetensors'}" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
