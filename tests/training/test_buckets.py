"""Both scripts on images of several shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from ldm.config import AutoencoderTrainingConfig, LDMConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig, to_signed
from ldm.data.layouts import open_source
from ldm.hub import load_model
from ldm.training.autoencoder_setup import held_out_metrics
from ldm.training.launch import run_training
from ldm.training.setup import load_first_stage

ROOT = Path(__file__).parents[2]
SHAPES = ((60, 30), (30, 60), (40, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures of each of three shapes, and one wide one that has to join another size."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number, shape in enumerate([*SHAPES * 4, (60, 36)]):
        coarse = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, folder):
    run = tmp_path_factory.mktemp("first") / "run"
    run_autoencoder(run, folder)
    return run


def common(output, folder):
    return [
        f"output_dir={output}", f"data.path={folder}", "data.resolution=32", "data.buckets=true", "data.held_out=0",
        "train.max_steps=4", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2",
        "train.cpu_threads=1",
    ]  # fmt: skip


def run(config, kind, arguments, resume=False):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return run_training(load_config(ROOT / "configs" / config, arguments, kind), resume=resume).export


def run_autoencoder(output, folder, *overrides, resume=False):
    arguments = [*common(output, folder), "autoencoder.block_out_channels=[8,8,8]", "autoencoder.norm_num_groups=4"]
    arguments += ["train.validation_samples=8", *overrides]
    return run("digits-first-stage.yaml", AutoencoderTrainingConfig, arguments, resume)


def run_ldm(output, folder, encoder_folder, *overrides, resume=False):
    arguments = common(output, folder)
    arguments += [f"text.encoder={encoder_folder}", "text.max_length=null", "unet.block_out_channels=[8,8]"]
    arguments += ["unet.norm_num_groups=4", "unet.attention_head_dim=2", "sample.num_inference_steps=2"]
    arguments += ["sample.prompts=[picture 3]", "sample.images_per_prompt=1", *overrides]
    return run("digits.yaml", LDMConfig, arguments, resume)


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def opened(folder, **options):
    config = DataConfig(path=str(folder), resolution=32, buckets=True, held_out=0)
    return CaptionedImages(open_source(config).samples, config, 0, **options)


def test_a_bucketed_first_stage_resumes_bit_for_bit(tmp_path, folder, first_run, capsys):
    run_autoencoder(tmp_path / "two", folder, "train.max_steps=2")
    printed = capsys.readouterr().out
    assert "sizes, height x width (and how many images): 48x24 (4), 32x32 (4), 24x48 (5); " in printed
    assert "too few at their own make a batch: 1\n" in printed
    run_autoencoder(tmp_path / "two", folder, resume=True)
    assert losses(tmp_path / "two") == losses(first_run)
    run_autoencoder(tmp_path / "slices", folder, "train.gradient_accumulation_steps=4", "train.num_workers=2")
    np.testing.assert_allclose(losses(tmp_path / "slices"), losses(first_run), rtol=1e-5)
    sheet = Image.open(first_run / "samples" / "step_00000004.png")
    assert sheet.size == (12 * 100 + 4, 2 * (100 + 18) + 4)


def test_the_statistics_of_latents_are_those_of_all_shapes(folder, first_run):
    codec = load_first_stage(str(first_run / "autoencoder"))
    images = opened(folder, batch_size=4)
    draw = torch.Generator().manual_seed(0)
    values = []
    for index in range(len(images)):
        moments = codec.moments(to_signed(images.image_at(index))[None])
        for _ in range(20):
            noise = torch.randn(1, *codec.latent_shape(*images.shape_of(index)), generator=draw)
            values.append(codec.sample_latents(moments, noise).detach().flatten(2)[0])
    latents = torch.cat(values, dim=1)  # [C, positions of all images]
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=0.03, rtol=0)


def test_held_out_psnr_is_a_mean_over_images_of_all_shapes(folder, first_run):
    autoencoder = load_model(first_run / "autoencoder", "AutoencoderKL")
    images = opened(folder)
    config = load_config(first_run / "config.yaml", ["train.validation_samples=5"], AutoencoderTrainingConfig)
    ratios = []
    for index in range(5):
        image = to_signed(images.image_at(index))
        with torch.no_grad():
            error = (image - autoencoder(image[None])[0][0].clamp(-1, 1)).square().mean()
        ratios.append(float(10 * torch.log10(4 / error)))
    found = held_out_metrics(autoencoder, images, config, None, torch.device("cpu"))
    assert found == {"held_out_psnr": pytest.approx(np.mean(ratios), abs=1e-4)}


# Random crops are not encoded beforehand; the other way is the business of the cache.
@pytest.mark.parametrize("space", [pytest.param("pixel", marks=pytest.mark.slow), "latent"])
def test_a_denoiser_learns_from_all_shapes_and_resumes_bit_for_bit(space, tmp_path, folder, encoder_folder, first_run):
    more = ["data.crop=random", "data.flip=true"]
    if space == "latent":
        more += ["space=latent", f"first_stage={first_run}/autoencoder", "schedule.beta_schedule=scaled_linear"]
        more += ["schedule.prediction_type=epsilon"]
    run_ldm(tmp_path / "one", folder, encoder_folder, *more)
    assert len(losses(tmp_path / "one")) == 4
    run_ldm(tmp_path / "two", folder, encoder_folder, *more, "train.max_steps=2")
    run_ldm(tmp_path / "two", folder, encoder_folder, *more, resume=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    slices = ["train.gradient_accumulation_steps=2", "train.num_workers=2"]
    run_ldm(tmp_path / "slices", folder, encoder_folder, *more, *slices)
    np.testing.assert_allclose(losses(tmp_path / "slices"), losses(tmp_path / "one"), rtol=1e-5)


def test_a_size_that_the_first_stage_does_not_divide_is_refused_and_leaves_no_trace(
    tmp_path, folder, encoder_folder, first_run
):
    latent = ["space=latent", f"first_stage={first_run}/autoencoder", "data.resolution=18"]
    latent += ["schedule.beta_schedule=scaled_linear", "schedule.prediction_type=epsilon"]
    with pytest.raises(ValueError, match=r"26x12 is not divisible by the codec's factor 4; set data\.resolution to"):
        run_ldm(tmp_path / "run", folder, encoder_folder, *latent)
    with pytest.raises(ValueError, match=r"factor 4; set data\.resolution to a multiple of 32, such as 32"):
        run_autoencoder(tmp_path / "run", folder, "data.resolution=18")
    assert not (tmp_path / "run").exists()


def test_resuming_on_images_of_other_shapes_is_refused(tmp_path, folder):
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in folder.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    run_autoencoder(tmp_path / "run", mine, "train.max_steps=2")
    with Image.open(mine / "02.png") as image:
        turned = image.resize((30, 60))
    turned.save(mine / "02.png")
    with pytest.raises(ValueError, match=r"data: 13 images → 13 images, 1 changed \(02\.png\)"):
        run_autoencoder(tmp_path / "run", mine, resume=True)
