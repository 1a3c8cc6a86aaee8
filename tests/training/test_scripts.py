"""Both scripts from end to end on tiny networks and real digits: what they write, how they go on, how they fail."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline
from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig, split, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.hub import load_tensors
from ldm.training.launch import main, run_training
from ldm.training.setup import load_first_stage
from tests import tiny
from tests.training.runs import (
    ROOT,
    captioned_folder,
    digests,
    fresh_processes,
    losses,
    metrics,
    run_autoencoder,
    run_ldm,
    settings,
)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_run_writes_what_a_user_needs_and_resumes_bit_for_bit(space, tmp_path, encoder_folder, first_stage, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    result = run_ldm(settings(one, encoder_folder, space, first_stage))
    assert result == one / "pipeline"
    printed = capsys.readouterr().out
    assert "1797 images: 1797 used (1621 to train on, 176 held out), 0 skipped, 0 duplicates" in printed
    assert "100 different captions" in printed
    lost = "'handwritten three' of 'a handwritten three'"
    assert f"sample.prompts: the text encoder reads 12 tokens of a text; lost: {lost}" in printed

    # A complete pipeline, in the run folder and in each checkpoint.
    for folder in (result, one / "checkpoints" / "step_00000002" / "pipeline"):
        pipeline = Pipeline.from_pretrained(folder)
        assert (pipeline.num_inference_steps, pipeline.guidance_scale) == (2, 2.0)
        side = 8 if space == "pixel" else 16
        assert pipeline("a handwritten three", seed=0).images[0].size == (side, side)
    frozen = [one / "frozen", result, one / "checkpoints" / "step_00000004" / "pipeline"]
    part = "text_encoder/model.safetensors"
    assert len({(folder / part).stat().st_ino for folder in frozen}) == 1
    assert (result / part).read_bytes() == (encoder_folder / "model.safetensors").read_bytes()
    if space == "latent":
        weights = "diffusion_pytorch_model.safetensors"
        assert (result / "vae" / weights).read_bytes() == (first_stage / "autoencoder" / weights).read_bytes()

    # The pictures, the log, the config.
    assert Image.open(one / "samples" / "step_00000004.png").height > 100
    assert list((one / "tensorboard").rglob("events*"))
    assert [entry["step"] for entry in metrics(one) if "loss" in entry] == [1, 2, 3, 4]
    held_out = [entry["held_out_loss"] for entry in metrics(one) if "held_out_loss" in entry]
    assert len(held_out) == 2
    assert held_out[0] == pytest.approx(1, abs=0.2)  # a network that still predicts about zero
    assert load_config(one / "config.yaml", [], LDMConfig).output_dir == str(one)

    # Two steps, then two more: the same weights, averages and moments as four at once.
    run_ldm(settings(two, encoder_folder, space, first_stage), "train.max_steps=2")
    run_ldm(settings(two, encoder_folder, space, first_stage), resume=True)
    assert digests(one / "checkpoints" / "step_00000004") == digests(two / "checkpoints" / "step_00000004")
    assert losses(one) == losses(two)
    sheets = [np.asarray(Image.open(run / "samples" / "step_00000004.png")) for run in (one, two)]
    assert (sheets[0] == sheets[1]).all()


def test_the_weights_move_and_the_average_follows(tmp_path, encoder_folder):
    run_ldm(settings(tmp_path / "run", encoder_folder))
    training = tmp_path / "run" / "checkpoints" / "step_00000004" / "training"
    model, ema = load_tensors(training / "model.safetensors"), load_tensors(training / "ema.safetensors")
    assert float(model["conv_out.weight"].abs().max()) > 0
    assert not torch.equal(model["conv_out.weight"], ema["conv_out.weight"])
    shipped = load_tensors(tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in ema.items():
        assert torch.equal(shipped[name], value)


@pytest.mark.parametrize(
    "change",
    ["train.gradient_accumulation_steps=4", "train.num_workers=2", "train.gradient_checkpointing=true"],
)
def test_how_a_batch_is_computed_does_not_change_it(change, tmp_path, encoder_folder):
    run_ldm(settings(tmp_path / "one", encoder_folder), "train.max_steps=3")
    run_ldm(settings(tmp_path / "two", encoder_folder), "train.max_steps=3", change)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def test_random_crops_are_encoded_batch_by_batch(tmp_path, encoder_folder, first_stage):
    arguments = settings(tmp_path / "run", encoder_folder, "latent", first_stage)
    run_ldm(arguments, "data.crop=random", "data.flip=true", "train.max_steps=2")
    run_ldm(settings(tmp_path / "two", encoder_folder, "latent", first_stage), "data.flip=true", "train.max_steps=2")
    # Square images have one crop, so that both runs see the same pictures.
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "two"), rtol=1e-4)


def test_an_earlier_run_is_moved_aside(tmp_path, encoder_folder, capsys):
    for _ in range(3):
        run_ldm(settings(tmp_path / "run", encoder_folder), "train.max_steps=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert "held an earlier run, which is now" in capsys.readouterr().out


def test_old_checkpoints_are_dropped_and_damaged_ones_passed_over(tmp_path, encoder_folder, capsys):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.checkpoint_every=1"]
    run_ldm(arguments)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000003", "step_00000004"]
    with (folders[1] / "training" / "model.safetensors").open("r+b") as file:
        file.seek(500)
        file.write(b"x")
    run_ldm(arguments, resume=True)
    assert "step_00000004 is damaged (training/model.safetensors has changed)" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["damaged.step_00000004", "step_00000003", "step_00000004"]
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_without_an_intact_checkpoint_is_not_started_again(tmp_path, encoder_folder):
    arguments = settings(tmp_path / "run", encoder_folder)
    run_ldm(arguments, "train.max_steps=1")
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        run_ldm(arguments, resume=True)
    assert not (tmp_path / "run.1").exists()


def test_what_a_user_edits_does_not_reach_the_checkpoints(tmp_path, encoder_folder, capsys):
    arguments = settings(tmp_path / "run", encoder_folder)
    run_ldm(arguments, "train.max_steps=2")
    with (tmp_path / "run" / "pipeline" / "tokenizer" / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    run_ldm(arguments, resume=True)
    assert "damaged" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "pipeline")
    run_ldm(arguments, resume=True)
    assert Pipeline.from_pretrained(tmp_path / "run" / "pipeline")("a", seed=0).images


@pytest.mark.parametrize("edit", ["picture", "caption", "name"])
def test_resuming_on_other_data_is_refused(edit, tmp_path, encoder_folder):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red number {i}")
    arguments = [*settings(tmp_path / "run", encoder_folder), f"data.path={folder}", "data.held_out=0"]
    run_ldm(arguments, "train.max_steps=2")
    if edit == "picture":
        Image.new("RGB", (8, 8), "blue").save(folder / "3.png")
    elif edit == "caption":
        (folder / "3.txt").write_text("blue")
    else:
        (folder / "3.png").rename(folder / "three.png")
        (folder / "3.txt").rename(folder / "three.txt")
    said = r"1 new \(three.png\), 1 gone \(3.png\)" if edit == "name" else r"1 changed \(3.png\)"
    with pytest.raises(
        ValueError, match=rf"\(data: 9 images → 9 images, {said}\); restore them, accept .* --accept data"
    ):
        run_ldm(arguments, resume=True)
    run_ldm(arguments, resume=True, accept=["data"])
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]


def test_what_is_held_out_is_data_too(tmp_path, encoder_folder):
    folder = captioned_folder(tmp_path / "mine", 40)
    arguments = [*settings(tmp_path / "run", encoder_folder), f"data.path={folder}", "data.held_out=0.2"]
    arguments += ["data.resolution=16"]
    run_ldm(arguments, "train.max_steps=2")
    training, held_out = split(
        inspect(open_source(config := DataConfig(path=str(folder), resolution=16)), config).used, 0.2
    )
    edited = held_out[0].id
    assert edited not in {sample.id for sample in training}
    Image.new("RGB", (16, 16), "blue").save(folder / edited)
    with pytest.raises(ValueError, match=rf"\(data: {len(training)} images → .*, 1 changed \({edited}\)\)"):
        run_ldm(arguments, resume=True)
    run_ldm(arguments, resume=True, accept=["data"])


@pytest.mark.parametrize("name", ["thesis.txt", "thesis.partial"])
def test_a_folder_that_is_no_run_is_left_alone(name, tmp_path, encoder_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    with pytest.raises(ValueError, match="holds files"):
        run_ldm(settings(tmp_path / "run", encoder_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / name).read_text() == "years of work"


def test_a_run_folder_has_one_writer(tmp_path, encoder_folder):
    run_ldm(settings(tmp_path / "run", encoder_folder), "train.max_steps=1")
    fresh_processes()
    program = "import sys; from pathlib import Path; from ldm.training.run_folder import lock_folder"
    program += "; lock_folder(Path(sys.argv[1]))"
    program += "; print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"is being written by another run \(process {other.pid} on .*\); wait"):
            run_ldm(settings(tmp_path / "run", encoder_folder), resume=resume)
    other.communicate()
    added = [tmp_path / "run" / name for name in ("pipeline/README.md", "pipeline/unet/notes", "best/pipeline/a.png")]
    for path in added:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run_ldm(settings(tmp_path / "run", encoder_folder), "train.max_steps=2", resume=True)
    assert [path.read_text() for path in added] == ["mine"] * 3
    index = (tmp_path / "run" / "checkpoints" / "step_00000002" / "pipeline" / "model_index.json").read_bytes()
    assert (tmp_path / "run" / "pipeline" / "model_index.json").read_bytes() == index


def test_resuming_with_another_meaning_is_refused(tmp_path, encoder_folder):
    arguments = settings(tmp_path / "run", encoder_folder)
    run_ldm(arguments, "train.max_steps=2")
    before = digests(tmp_path / "run" / "checkpoints" / "step_00000002")
    refused = r"train\.learning_rate: 0\.001 → 0\.5\); restore them, accept them with --accept train\.learning_rate,"
    with pytest.raises(ValueError, match=refused):
        run_ldm(arguments, "train.learning_rate=0.5", resume=True)
    assert digests(tmp_path / "run" / "checkpoints" / "step_00000002") == before


def test_a_first_stage_ends_with_latents_of_zero_mean_and_unit_variance(first_stage):
    codec = load_first_stage(str(first_stage / "autoencoder"))
    assert codec.autoencoder.config.scaling_factor == 1
    config = DataConfig(path="digits", resolution=16)
    training, _ = split(open_source(config).samples, 0.1)
    data = CaptionedImages(training, config, 0)
    with torch.no_grad():
        moments = codec.moments(to_signed(torch.stack([data.image_at(i) for i in range(len(data))])))
    latents = codec.sample_latents(moments, torch.randn(len(data), *codec.latent_shape(16, 16)))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)
    # Folding changed the latents, not the pictures that come back.
    averaged = load_tensors(first_stage / "checkpoints" / "step_00000002" / "training" / "ema.safetensors")
    folded = {name: value.clone() for name, value in codec.autoencoder.state_dict().items()}
    images = to_signed(torch.stack([data.image_at(i) for i in range(4)]))
    with torch.no_grad():
        expected = codec.decode(codec.sample_latents(codec.moments(images)))
        codec.autoencoder.load_state_dict(averaged)
        torch.testing.assert_close(codec.autoencoder(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(folded["quant_conv.weight"], averaged["quant_conv.weight"])


def test_a_first_stage_needs_no_captions(tmp_path, capsys):
    data = captioned_folder(tmp_path / "data", 24)
    for i in range(0, 24, 2):
        (data / f"{i}.txt").unlink()
    run_autoencoder(tmp_path / "run", f"data.path={data}", "train.validation_samples=4", "train.max_steps=1")
    printed = capsys.readouterr().out
    assert "24 images: 24 used (" in printed and "0 skipped, 0 duplicates; 12 without a caption" in printed


def fails(capsys, monkeypatch, script, *arguments):
    """Runs a script's command line in this process and returns its one line."""
    fresh_processes()
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as caught:
        main(script)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    line = error.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_bad_input_is_one_line_and_leaves_no_trace(tmp_path, encoder_folder, first_stage, capsys, monkeypatch):
    def ldm(*overrides, space="pixel"):
        arguments = settings(tmp_path / "run", encoder_folder, space, first_stage)
        return fails(capsys, monkeypatch, "train_ldm", "--set", *arguments, *overrides)

    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a.png")
    assert "did you mean train.max_steps" in ldm("train.max_stepps=1")
    assert str(tmp_path / "empty") in ldm(f"data.path={tmp_path / 'empty'}")
    assert "nowhere" in ldm(f"data.path={tmp_path / 'nowhere'}")
    assert "15x15 is not divisible" in ldm("data.resolution=15", space="latent")
    assert "fewer images than a batch needs: 1621 training images, train.batch_size 5000" in ldm(
        "train.batch_size=5000"
    )
    assert "no model folder" in ldm(f"first_stage={tmp_path / 'nothing'}", space="latent")
    assert "does not split evenly" in ldm("train.gradient_accumulation_steps=3")
    assert "xformers" in ldm("train.attention=xformers")
    assert "nonsense" in ldm("text.encoder=./nonsense")
    assert "absent.yaml" in fails(capsys, monkeypatch, "train_ldm", "--config", str(tmp_path / "absent.yaml"))
    assert "did you mean" in fails(capsys, monkeypatch, "train_autoencoder", "--set", "loss.kl_wait=1")
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_named_skipped_and_counted(tmp_path, encoder_folder, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (20, 10 + i), (20 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red number {i}")
    (folder / "8.png").write_bytes((folder / "8.png").read_bytes()[:60])
    run_ldm(settings(tmp_path / "run", encoder_folder), f"data.path={folder}", "data.held_out=0")
    printed = capsys.readouterr().out
    assert "9 entries: 8 used (8 to train on, 0 held out), 1 skipped, 0 duplicates" in printed
    assert "skipped 8.png" in printed
    assert Pipeline.from_pretrained(tmp_path / "run" / "pipeline")("red number 3", seed=0).images


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_trains_a_step(path, tmp_path, encoder_folder, first_stage):
    """As it stands, but for the size of batch and pictures, and the parts that another run would have to make."""
    fresh_processes()
    small = [
        "train.cpu_threads=1",
        f"output_dir={tmp_path / 'run'}",
        "train.max_steps=1",
        "train.cooldown_steps=0",
        "train.batch_size=2",
        "train.validation_samples=2",
    ]
    small += ["data.scenes=20"] if path.name.startswith("scenes") else []
    if "first-stage" in path.name:
        small += ["start_from=openmoji-first-stage"] if "start_from" in path.read_text() else []
        run_training(load_config(path, [*small, "data.held_out=0.9"], AutoencoderTrainingConfig))
        assert load_first_stage(str(tmp_path / "run" / "autoencoder")).factor == 4
        return
    # Evaluations read all of the data (tests/training/test_measuring.py).
    small += ["sample.num_inference_steps=2", "sample.images_per_prompt=1", "train.evaluate_every=null"]
    if "start_from" in path.read_text():
        tiny.stable_diffusion().save_pretrained(tmp_path / "model")
        captioned_folder(tmp_path / "mine", 4)
        small += [f"start_from={tmp_path / 'model'}", f"data.path={tmp_path / 'mine'}", "data.resolution=16"]
        small += ["train.gradient_accumulation_steps=1"]
    else:
        small += [f"text.encoder={encoder_folder}", "text.max_length=null", "data.held_out=0.9"]
    if path.name in ("digits-latent.yaml", "scenes-64.yaml"):
        small += [f"first_stage={first_stage}/autoencoder"]
    made = run_training(load_config(path, small, LDMConfig)).export
    if made.name == "lora":
        pipeline = Pipeline.from_pretrained(tmp_path / "model")
        pipeline.load_lora(made)
    else:
        pipeline = Pipeline.from_pretrained(made)
    assert pipeline("a", seed=0, num_inference_steps=2).images
