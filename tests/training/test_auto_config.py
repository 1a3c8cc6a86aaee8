"""What `ldm train FOLDER` decides: complete, sane, said in words, and the same whoever runs it.

How fast a network learns is a fact of the machine: here it is a number, but for one test that measures.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config
from ldm.data import DataConfig
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.models import UNet, UNetConfig
from ldm.training import auto_config as module
from ldm.training import estimate as speed_module
from ldm.training.auto_config import TrainOptions, choose_config, sample_prompts, unet_keys, unet_seconds
from tests import tiny

CPU = torch.device("cpu")


def folder_of(folder, count, side, noise=False):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side if noise else 6,) * 2 + (3,), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side + side // 4), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


@pytest.fixture
def speed(monkeypatch):
    """A machine on which a network of 10 M parameters on 16 by 16 takes 20 ms a picture; others in proportion."""
    settings = {"factor": 1.0, "bf16": 1.0}

    def seconds(unet, shape, text, batch, device, precision):
        work = sum(p.numel() for p in unet.parameters()) / 1e7 * shape[1] * shape[2] / 256
        return 0.02 * batch * work * settings["factor"] * (settings["bf16"] if precision == "bf16" else 1)

    monkeypatch.setattr(module, "unet_seconds", seconds)
    monkeypatch.setattr(module, "autoencoder_seconds", lambda network, side, batch, device: batch * side**2 / 3e5)
    return settings


def used(path, **data):
    config = DataConfig(**({"path": str(path), "resolution": 64} | data))
    return inspect(open_source(config), config).used


def chosen(path, samples=None, **options):
    options = {"output_dir": "runs/test", "anyway": "start_from" not in options} | options
    choice = choose_config(samples or used(path), {"path": str(path)}, TrainOptions(**options), CPU)
    config = parse_config(choice.config, LDMConfig, "the test")
    sane(config)
    if choice.first_stage is not None:
        first = parse_config(choice.first_stage, AutoencoderTrainingConfig, "the test")
        assert first.train.checkpoint_every > 0 and 100 <= first.train.max_steps <= 10_000
    assert all("\n" not in reason for reason in choice.reasons)
    return choice, config, "\n".join(choice.reasons)


def sane(config):
    train = config.train
    assert train.max_steps >= 100 and train.max_steps % 10 == 0
    assert train.batch_size in (2**i for i in range(7))
    assert train.warmup_steps <= train.max_steps / 10
    assert 0.9 <= train.ema_decay <= 0.9999
    # An average over at most a fifth of the run, in steps.
    assert 1 / (1 - train.ema_decay) <= max(10, train.max_steps / 5)
    for every in (train.validate_every, train.sample_every, train.checkpoint_every, train.log_every):
        assert 1 <= every <= train.max_steps
    assert math.ceil(train.max_steps / train.sample_every) <= 4
    assert 1e-5 <= train.learning_rate <= 1e-3
    assert 1 <= len(config.sample.prompts) <= 6


def test_a_few_photos(tmp_path, speed):
    choice, config, reasons = chosen(folder_of(tmp_path / "photos", 40, 300))
    assert config.data.resolution == 64 and config.space == "pixel" and choice.first_stage is None
    assert "image size: 64, " in reasons and " 300 or more; without a GPU" in reasons
    assert "start: a new UNet, since --anyway asks for it" in reasons
    assert config.schedule.prediction_type == "v_prediction"
    assert config.text.max_length == 16 and "captions: 16 tokens; none is longer" in reasons
    # Thirty minutes, of which grids take up to a fifth.
    seconds = 0.02 * config.train.batch_size * parameters(config) / 1e7 * 16
    assert 0.75 * 1800 < config.train.max_steps * seconds <= 1800
    assert config.unet.block_out_channels == (32, 64, 96, 128)


def parameters(config):
    sizes = {"in_channels": 3, "out_channels": 3, "cross_attention_dim": 384}
    return sum(p.numel() for p in UNet(dataclasses.replace(config.unet, **sizes)).parameters())


@pytest.mark.slow
def test_slow_machines_get_smaller_images(tmp_path, speed):
    photos = folder_of(tmp_path / "photos", 40, 80)
    speed["factor"] = 2.0
    _, config, reasons = chosen(photos)
    assert config.data.resolution == 32
    assert "image size: 32 after all; at 64 fewer than 8000 samples" in reasons
    _, asked, reasons = chosen(photos, resolution=64)
    assert asked.data.resolution == 64
    assert "too slow for the 8000 samples needed: raise --minutes" in reasons
    _, short, reasons = chosen(photos, minutes=0.1)
    assert short.train.max_steps == 100
    assert "the fewest that make sense; --minutes 0.1 is not enough" in reasons
    assert (short.sample.images_per_prompt, len(short.sample.prompts)) == (1, 2)


def test_enough_images_are_evaluated_at_the_end(tmp_path, speed):
    pictures = folder_of(tmp_path / "pictures", 80, 16)
    _, config, reasons = chosen(pictures)
    assert (config.train.evaluate_every, config.train.evaluation_samples) == (config.train.max_steps, 64)
    assert "and an evaluation" in reasons
    assert chosen(pictures, used(pictures)[:50])[1].train.evaluate_every is None
    speed["factor"] = 1000.0  # it would take too much of the time
    assert chosen(pictures)[1].train.evaluate_every is None


def test_icons(tmp_path, speed):
    icons = folder_of(tmp_path / "icons", 40, 24)
    _, config, reasons = chosen(icons)
    assert config.data.resolution == 16 and config.space == "pixel"
    assert config.unet.block_out_channels == (64, 128, 192)
    # Not more than a thousand times through the data.
    assert config.train.max_steps * config.train.batch_size <= 1000 * 40
    assert "1000 times through the data" in reasons
    _, config, reasons = chosen(icons, resolution=24)
    assert config.data.resolution == 24 and "image size" not in reasons


def test_two_thousand_pictures(tmp_path, speed):
    some = used(folder_of(tmp_path / "some", 20, 64, noise=True))
    many = [dataclasses.replace(s, id=f"{i} {s.id}", group=f"{i} {s.id}") for i in range(100) for s in some]
    choice, config, reasons = chosen(tmp_path / "some", many)
    assert (config.space, config.first_stage) == ("latent", "runs/test-first-stage/autoencoder")
    assert choice.first_stage["output_dir"] == "runs/test-first-stage"
    assert choice.first_stage["data"] == choice.config["data"]
    assert "first stage: a new one is trained" in reasons
    # Both together take the minutes.
    first = choice.first_stage["train"]["max_steps"] * choice.first_stage["train"]["batch_size"] * 64**2 / 3e5
    assert first == pytest.approx(0.4 * 1800, rel=0.15)
    assert "--minutes 18" in reasons and config.train.batch_size == 64
    assert config.schedule.prediction_type == "epsilon" and config.schedule.beta_schedule == "scaled_linear"
    # What is known is used.
    _, config, reasons = chosen(tmp_path / "some", many, space="pixel")
    assert config.space == "pixel" and "space: pixel, as given" in reasons
    _, config, _ = chosen(tmp_path / "some", many, space="latent", first_stage="openmoji-first-stage")
    assert (config.space, config.first_stage) == ("latent", "openmoji-first-stage")


def test_latents_that_hold_more_than_their_decoder_shows(tmp_path, speed):
    samples = used("digits")[:40]
    choice, config, reasons = chosen("digits", samples, resolution=64)
    assert (config.space, config.first_stage) == ("latent", "runs/test-first-stage/autoencoder")
    first = parse_config(choice.first_stage, AutoencoderTrainingConfig, "the test")
    assert (first.start_from, first.trained) == ("openmoji-first-stage", "decoder")
    assert first.data == config.data and first.train.max_steps == 2000 and first.train.batch_size == 16
    assert "first stage: the decoder of openmoji-first-stage is fine-tuned" in reasons
    assert "space: latent, because" in reasons and "space: pixel" not in reasons
    assert "parameters on 16x16" in reasons


def test_a_model_to_go_on_from(tmp_path, speed, stable_diffusion):
    pictures = folder_of(tmp_path / "pictures", 24, 24)
    _, config, reasons = chosen(pictures, start_from=str(stable_diffusion))
    assert config.finetune.method == "lora" and config.export == "lora"
    assert config.train.final_weights == "best" and config.sample.prompts[-2:] == module.OTHER_PROMPTS
    assert config.data.resolution == 16 and f"image size: 16, that of {stable_diffusion}" in reasons
    assert "method: lora, for 24 images" in reasons
    assert config.sample.guidance_scale == 7.5 and config.train.learning_rate == 1e-3
    _, config, reasons = chosen(pictures, start_from=str(stable_diffusion), method="full", resolution=24)
    assert config.finetune.method == "full" and config.data.resolution == 24
    assert "method: full, as given" in reasons and "image size: 24, as given" in reasons
    with pytest.raises(ValueError, match="15x15 is not divisible"):
        chosen(pictures, start_from=str(stable_diffusion), resolution=15)
    ours = tiny.pipeline(tmp_path / "parts", num_inference_steps=7, sampler="ddpm")
    ours.save_pretrained(tmp_path / "model")
    _, config, _ = chosen(pictures, start_from=str(tmp_path / "model"))
    assert config.sample.num_inference_steps == 7 and config.data.resolution == 8
    assert config.sample.sampler == "ddpm"


def test_what_the_built_in_model_knew_is_held(tmp_path, speed):
    pictures = folder_of(tmp_path / "pictures", 24, 64)
    _, config, reasons = chosen(pictures, start_from="scenes-64")
    assert config.finetune.prior_weight == 1.0 and "prior preservation: weight 1, on prompts of scenes-64" in reasons
    assert config.data.resolution == 64 and config.sample.num_inference_steps == 25


def test_what_is_measured_for_a_method_is_what_it_trains(tmp_path, stable_diffusion, monkeypatch):
    learning = {}

    def seconds(unet, shape, text, batch, device, precision):
        learning.setdefault(text, set()).add(sum(p.numel() for p in unet.parameters() if p.requires_grad))
        assert shape == (4, 8, 8)
        return 0.01

    monkeypatch.setattr(module, "unet_seconds", seconds)
    pictures = folder_of(tmp_path / "pictures", 6, 16)
    sizes = []
    for method in ("full", "attention", "lora"):
        learning.clear()
        chosen(pictures, start_from=str(stable_diffusion), method=method)
        ((text, numbers),) = learning.items()
        assert text == (tiny.LENGTH, tiny.WIDTH)
        sizes.append(max(numbers))
    assert sizes[0] > 3 * sizes[1] and sizes[1] == sizes[2] > 0


def test_a_curated_set_is_not_looked_at_but_has_a_size(speed):
    _, config, reasons = chosen("digits")
    assert config.data.resolution == 8
    assert "half of the images have a shorter side of 8 or more" in reasons


def test_half_precision_is_taken_where_it_is_faster(tmp_path, speed):
    pictures = folder_of(tmp_path / "pictures", 6, 16)
    assert chosen(pictures)[1].train.mixed_precision == "no"
    speed["bf16"] = 0.5
    _, config, reasons = chosen(pictures)
    assert config.train.mixed_precision == "bf16" and "(bf16, measured)" in reasons


def test_text_length_fits_nearly_all_captions(tmp_path, speed):
    pictures = folder_of(tmp_path / "pictures", 6, 16)
    (pictures / "0.txt").write_text("one two three four five six seven eight nine ten " * 2)
    _, config, reasons = chosen(pictures)
    assert config.text.max_length == 32 and "captions: 32 tokens; none is longer" in reasons
    (pictures / "0.txt").write_text("one two three four five six seven eight nine ten " * 20)
    _, config, reasons = chosen(pictures)
    assert config.text.max_length == 77
    assert "captions: 77 tokens; 1 of 6 are longer and lose their end" in reasons
    # A text as long is no prompt for a grid.
    assert len(sample_prompts(used(pictures))) == 5


def test_one_picture_is_refused(tmp_path, speed):
    with pytest.raises(ValueError, match="holds 1 image that can be used; training needs 2"):
        chosen(folder_of(tmp_path / "one", 1, 16))
    chosen(folder_of(tmp_path / "two", 2, 16))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 10, 16, 17, 30, 32, 64, 128])
def test_every_size_has_a_network(size):
    keys = unet_keys(size, 32) | {"cross_attention_dim": 8, "in_channels": 3, "out_channels": 3}
    keys |= {"block_out_channels": [8 * (i + 1) for i in range(len(keys["block_out_channels"]))], "norm_num_groups": 4}
    config = UNetConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()})
    smallest = size / 2 ** (len(config.block_out_channels) - 1)
    assert smallest >= 4 or len(config.block_out_channels) == 2
    with torch.no_grad():
        out = UNet(config)(torch.zeros(1, 3, size, size), torch.zeros(1), torch.zeros(1, 2, 8))
    assert out.shape == (1, 3, size, size)
    # Attention among at most 256 positions, and in the last level always.
    attends = ["CrossAttn" in block for block in config.down_block_types]
    assert attends[-1] and not any(a and size >> i > 16 for i, a in enumerate(attends[:-1]))


def test_measuring_takes_seconds_and_leaves_nothing_behind():
    config = UNetConfig(**tiny.UNET, in_channels=3, out_channels=3)
    unet = UNet(config)
    few, many = (unet_seconds(unet, (3, 16, 16), (5, tiny.WIDTH), batch, CPU, "no") for batch in (1, 64))
    assert 0 < few < many < 5
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert unet_seconds(unet, (3, 8, 8), (5, tiny.WIDTH), 1, CPU, "bf16") > 0


@pytest.mark.parametrize(("calls", "expected"), [([9, 0.1, 0.4, 0.2], 9), ([0.9, 0.1, 0.4, 0.2], 0.2), ([1, 1.5], 1.5)])
def test_a_step_takes_what_it_typically_takes(monkeypatch, calls, expected):
    """Not the least that it took once: a run beside other programs is a sum of fast and slow steps."""
    now, to_come = [0.0], iter(calls)
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])

    def passes():
        now[0] += next(to_come)

    assert speed_module.seconds_per_call(passes, UNet(UNetConfig(**tiny.UNET)), CPU) == pytest.approx(expected)
