"""`space: auto`: what is decided, why, and that a run goes on with what was decided."""

import dataclasses
import json

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from ldm.config import LDMConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig, to_signed
from ldm.data.layouts import open_source
from ldm.evaluation.autoencoder import GOOD_PSNR, advise, measure_reconstruction
from ldm.models.efficientnet import perceptual_distance
from ldm.training import auto_config as space
from ldm.training.auto_config import decide_space, resolve_config
from ldm.training.setup import load_first_stage
from tests.training.runs import ROOT, captioned_folder, digests, losses, run_ldm, settings

CPU = torch.device("cpu")
BUILT_IN = "openmoji-first-stage"


def plain_folder(folder, count=6):
    """Pictures like those that the built-in first stage has learned from: a yellow face with a black outline."""
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse([8 + 3 * i, 12, 40 + 3 * i, 20 + 6 * i], fill=(252, 234, 43), outline="black", width=2)
        draw.line([24, 36 + i, 40, 36 + 3 * i], fill="black", width=2)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"face number {i}")
    return folder


def images(folder, resolution, times=1):
    config = DataConfig(path=str(folder), resolution=resolution)
    samples = open_source(config).samples
    many = [dataclasses.replace(sample, id=f"{sample.id} {i}") for i in range(times) for sample in samples]
    return CaptionedImages(many, config, 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("plain") / "data")


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return captioned_folder(tmp_path_factory.mktemp("noise") / "data", 10, 40)


def test_small_images_are_diffused_as_they_are(plain):
    choice = decide_space(images(plain, 32), "./no first stage is opened", CPU)
    assert (choice.space, choice.first_stage, choice.advice == "train") == ("pixel", None, False)
    assert "32 pixels a side are few enough" in choice.reason


def test_latents_are_taken_where_they_keep_the_picture(plain):
    data = images(plain, 40)
    choice = decide_space(data, None, CPU)
    assert (choice.space, choice.first_stage) == ("latent", BUILT_IN)
    assert choice.psnr > GOOD_PSNR
    assert f"{BUILT_IN} reconstructs these images at {choice.psnr:.1f} dB" in choice.reason
    # The mean over images of 10 log10 of 255² over the squared error in grey levels.
    codec, ratios = load_first_stage(BUILT_IN), []
    for i in range(len(data)):
        pixels = data.image_at(i).double()
        with torch.no_grad():
            again = codec.decode(codec.sample_latents(codec.moments(to_signed(data.image_at(i))[None])))[0]
        levels = ((again.double() + 1) * 127.5).clamp(0, 255)
        ratios.append(10 * torch.log10(255**2 / (levels - pixels).square().mean()))
    assert choice.psnr == pytest.approx(float(torch.stack(ratios).mean()), abs=1e-3)
    # The command gives the same advice for the same reason.
    found = measure_reconstruction(codec, BUILT_IN, data, CPU, perceptual_distance())
    assert (found.psnr, advise(found).why, choice.advice) == (choice.psnr, choice.reason, "use")


def test_without_the_packages_of_the_perceptual_distance_psnr_decides(plain, monkeypatch):
    with_it = decide_space(images(plain, 40), None, CPU)
    assert " dB and a perceptual distance of 0.0" in with_it.reason
    monkeypatch.setattr(space, "is_installed", lambda: False)
    without = decide_space(images(plain, 40), None, CPU)
    assert without.reason.startswith(f"{BUILT_IN} reconstructs these images at {without.psnr:.1f} dB, ")
    assert "24" in without.reason and "perceptual" not in without.reason
    assert without.psnr == with_it.psnr


def test_latents_that_lose_the_picture_are_taken_only_where_pixels_are_too_many(noise):
    small, large = decide_space(images(noise, 64), None, CPU), decide_space(images(noise, 68), None, CPU)
    assert small.space == "pixel" and small.first_stage is None
    assert f"at {small.psnr:.1f} dB and a perceptual distance of " in small.reason
    assert "below 24" in small.reason and "10 images" in small.reason
    assert large.space == "latent" and large.first_stage == BUILT_IN
    assert "68 pixels a side are too many to diffuse directly" in large.reason
    assert "train" not in (small.advice, large.advice)


@pytest.mark.slow
def test_many_images_deserve_a_first_stage_of_their_own(noise):
    choice = decide_space(images(noise, 36, times=100), None, CPU)
    assert choice.advice == "train"
    assert "1000 images suffice to train a first stage" in choice.reason
    assert decide_space(images(noise, 36, times=99), None, CPU).advice != "train"
    # One that cannot divide the images would be of no use.
    odd = decide_space(images(noise, 38, times=100), None, CPU)
    assert (odd.space, odd.advice == "train") == ("pixel", False)


def test_latents_that_hold_more_than_their_decoder_shows_deserve_a_better_one(tmp_path):
    """Scans of digits: nothing like emoji, and the built-in decoder makes coloured patches of them."""
    config = DataConfig(path="digits", resolution=64)
    few = CaptionedImages(open_source(config).samples[:40], config, 0)
    choice = decide_space(few, None, CPU)
    assert (choice.space, choice.first_stage, choice.advice) == ("pixel", None, "tune")
    assert "but its latents hold more" in choice.reason and "trained: decoder" in choice.reason
    # Too large for pixels, its latents are used, and the decoder can be exchanged later: they stay as they are.
    config = dataclasses.replace(config, resolution=80, buckets=False)
    large = decide_space(CaptionedImages(few.samples[:12], config, 0), None, CPU)
    assert (large.space, large.first_stage, large.advice) == ("latent", BUILT_IN, "tune")


def test_a_first_stage_that_does_not_divide_the_images(plain):
    choice = decide_space(images(plain, 50), None, CPU)
    assert choice.space == "pixel"
    assert choice.reason == f"the factor 4 of {BUILT_IN} does not divide 50"
    with pytest.raises(
        ValueError, match=r"image size 70x70 is not divisible by the codec's factor 4; set data\.resolution"
    ):
        decide_space(images(plain, 70), None, CPU)


def test_a_space_that_is_said_is_not_asked(plain):
    config = load_config(ROOT / "configs" / "digits.yaml", [], LDMConfig)
    assert resolve_config(config, images(plain, 40), CPU) == (config, None)


def auto(folder, encoder_folder, *overrides):
    return [*settings(folder, encoder_folder), "space=auto", *overrides]


def test_a_run_keeps_what_was_decided_and_resumes_with_it(tmp_path, encoder_folder, plain, capsys):
    one, two, said = (tmp_path / name for name in ("one", "two", "said"))
    data = [f"data.path={plain}", "data.resolution=40", "data.held_out=0.2", "train.batch_size=2"]
    data += ["schedule.beta_schedule=scaled_linear", "schedule.prediction_type=epsilon"]
    run_ldm(auto(one, encoder_folder, *data))
    printed = capsys.readouterr().out
    assert f"space: latent, because {BUILT_IN} reconstructs these images at" in printed
    plan = json.loads((one / "plan.json").read_text())
    assert plan["space"].startswith("latent, because ")
    decided = yaml.safe_load((one / "config.yaml").read_text())
    assert (decided["space"], decided["first_stage"]) == ("latent", BUILT_IN)
    assert (one / "pipeline" / "vae").is_dir()

    # The same as if it had been said, and as in two parts, whether or not that which goes on says it.
    run_ldm(auto(said, encoder_folder, *data), "space=latent", f"first_stage={BUILT_IN}")
    run_ldm(auto(two, encoder_folder, *data), "train.max_steps=2")
    run_ldm(auto(two, encoder_folder, *data), resume=True)
    last = "checkpoints/step_00000004"
    assert digests(one / last) == digests(two / last) == digests(said / last)
    assert losses(one) == losses(two) == losses(said)
    assert yaml.safe_load((two / "config.yaml").read_text())["space"] == "latent"
    run_ldm(auto(two, encoder_folder, *data), "space=latent", f"first_stage={BUILT_IN}", resume=True)
    with pytest.raises(ValueError, match=f"first_stage: {BUILT_IN} → null; space: latent → pixel"):
        run_ldm(auto(two, encoder_folder, *data), "space=pixel", resume=True)


def test_pixels_are_decided_in_a_run_too(tmp_path, encoder_folder):
    run_ldm(auto(tmp_path / "auto", encoder_folder), "train.max_steps=1")
    run_ldm(settings(tmp_path / "said", encoder_folder), "train.max_steps=1")
    assert losses(tmp_path / "auto") == losses(tmp_path / "said")
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["space"] == "pixel"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["first_stage=./nothing", "data.resolution=40"], "there is no model folder ./nothing"),
        (["schedule.timestep_spacing=leading", "schedule.steps_offset=0"], "steps_offset is 0 with leading"),
        # Pixels would bound this start, latents do not, and what it will be is not known yet.
        (["schedule.beta_schedule=cosine", "schedule.prediction_type=epsilon"], "nothing bounds"),
    ],
)
def test_what_one_of_the_spaces_could_not_do_is_refused_at_once(overrides, part, tmp_path, encoder_folder):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        run_ldm(auto(tmp_path / "run", encoder_folder, *overrides))
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
