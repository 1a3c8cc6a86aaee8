"""Going on from a model: what learns, what stays, what is written, and how it goes on after an interruption."""

import gc
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.codecs import LatentCodec
from ldm.config import LDMConfig, parse_config
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, split, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.diffusion import NoiseSchedule
from ldm.models import AutoencoderKL, UNet
from ldm.text import TextEncoder
from ldm.training import setup, trainable
from ldm.training.checkpoints import file_hashes, find_damage
from ldm.training.noise import step_noise
from ldm.training.run import Run
from ldm.training.trainable import make_ema
from tests import tiny
from tests.training.runs import digests, losses, metrics, run_config

UNET = "unet/diffusion_pytorch_model.safetensors"
METHODS = ("full", "attention", "lora")


@pytest.fixture(scope="module")
def pixel_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixel")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return folder / "model"


def content(folder, model, pictures, method="full", **changes):
    """A config of four steps; `changes` are dotted, with two underscores for the dot."""
    config = {
        "output_dir": str(folder),
        "start_from": str(model),
        "finetune": {"method": method},
        "data": {"path": str(pictures), "resolution": 16, "held_out": 0.2},
        "train": {
            "max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0, "ema_decay": 0.5,
            "validate_every": 2, "sample_every": 4, "checkpoint_every": 2, "log_every": 1, "cpu_threads": 1,
        },
        "sample": {
            "prompts": ["noise number 1"], "images_per_prompt": 1, "num_inference_steps": 2, "guidance_scale": 3.0
        },
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def drawn_by(pipeline, side):
    """The picture of either library from the same latents, as an array in 0..1."""
    torch.manual_seed(5)
    arguments = {"latents": torch.randn(1, *side), "num_inference_steps": 2, "guidance_scale": 3.0}
    if isinstance(pipeline, Pipeline):
        return np.asarray(pipeline("noise number 1", seed=0, **arguments).images[0]) / 255
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("noise number 1", output_type="np", **arguments).images[0]


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@dataclass(frozen=True)
class Made:
    """A model, a run of four steps from it, and one that was stopped after two; what the model was before."""

    model: Path
    whole: Path
    stopped: Path
    before: dict

    def config(self, method, folder, pictures, **changes):
        config = content(folder, self.model, pictures, method, **changes)
        if method == "lora":
            config["finetune"] |= {"rank": 3, "alpha": 6.0, "target_modules": ["to_q", "to_v", "proj_in"]}
        return config


@pytest.fixture(scope="module")
def made(tmp_path_factory, pictures):
    """`Made` by a method, at most once each."""
    kept = {}

    def by(method):
        if method not in kept:
            folder = tmp_path_factory.mktemp(method)
            tiny.stable_diffusion().save_pretrained(folder / "model")
            kept[method] = Made(folder / "model", folder / "whole", folder / "stopped", file_hashes(folder / "model"))
            run_config(kept[method].config(method, folder / "whole", pictures))
            run_config(kept[method].config(method, folder / "stopped", pictures, train__max_steps=2))
        return kept[method]

    return by


def stopped_copy(one, tmp_path):
    shutil.copytree(one.stopped, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.mark.parametrize("method", ["full", "attention"])
def test_only_what_was_chosen_moves_and_diffusers_draws_the_same(method, made):
    one = made(method)
    stable_diffusion, made_here, before = one.model, one.whole / "pipeline", one.before
    old, new = load_file(stable_diffusion / UNET), load_file(made_here / UNET)
    attention = {name for name in old if ".attn1." in name or ".attn2." in name}
    assert moved(old, new) == (set(old) if method == "full" else attention)
    assert len(attention) > 10

    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (made_here / part).read_bytes() == (stable_diffusion / part).read_bytes()
    assert file_hashes(stable_diffusion) == before
    ours, theirs, base = (
        drawn_by(pipeline, (4, 8, 8))
        for pipeline in (
            Pipeline.from_pretrained(made_here),
            StableDiffusionPipeline.from_pretrained(made_here),
            Pipeline.from_pretrained(stable_diffusion),
        )
    )
    assert np.abs(ours - theirs).max() <= 1.01 / 255
    assert np.abs(ours - base).max() > 0.05


def test_a_pixel_model_goes_on_at_another_size(tmp_path, pixel_model, pictures):
    changed = content(tmp_path / "run", pixel_model, pictures, "attention", data__resolution=12)
    made = run_config(changed)
    old, new = load_file(pixel_model / UNET), load_file(made / UNET)
    assert moved(old, new) == {name for name in old if ".attn1." in name or ".attn2." in name}
    assert json.loads((made / "codec" / "config.json").read_text()) == json.loads(
        (pixel_model / "codec" / "config.json").read_text()
    )
    # The size of training is that of what it draws.
    assert Pipeline.from_pretrained(made)("a", seed=0).images[0].size == (12, 12)
    assert Pipeline.from_pretrained(pixel_model)("a", seed=0).images[0].size == (8, 8)


def test_a_lora_is_small_and_diffusers_draws_the_same_with_it(made):
    one = made("lora")
    stable_diffusion, adapter = one.model, one.whole / "lora"
    assert file_hashes(stable_diffusion) == one.before

    # Nothing but the adapter is written, anywhere in the run.
    weights = {path: load_file(path) for path in one.whole.rglob("*.safetensors")}
    names = {path.name for path in weights}
    assert names == {
        *("pytorch_lora_weights.safetensors", "model.safetensors", "ema.safetensors", "optimizer.safetensors")
    }
    assert all("lora_" in name for tensors in weights.values() for name in tensors)
    adapted = {name.split(".lora_")[0] for name in weights[adapter / "pytorch_lora_weights.safetensors"]}
    assert {name.split(".")[-1] for name in adapted} == {"to_q", "to_v", "proj_in"}

    ours, base = Pipeline.from_pretrained(stable_diffusion), Pipeline.from_pretrained(stable_diffusion)
    ours.load_lora(adapter)
    theirs = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    theirs.load_lora_weights(adapter)
    (layer,) = {layer.lora_alpha["default_0"] for layer in theirs.unet.modules() if hasattr(layer, "lora_alpha")}
    assert layer == 6
    latents = (4, 8, 8)
    assert np.abs(drawn_by(ours, latents) - drawn_by(theirs, latents)).max() <= 1.01 / 255
    assert np.abs(drawn_by(ours, latents) - drawn_by(base, latents)).max() > 2 / 255


def test_a_lora_on_half_precision_weights_stays_in_full_precision(tmp_path, stable_diffusion, pictures):
    config = content(tmp_path / "run", stable_diffusion, pictures, "lora", train__mixed_precision="bf16")
    config["train"] |= {"sample_every": 1, "max_steps": 3, "gradient_checkpointing": True}
    made = run_config(config)
    ema = load_file(tmp_path / "run" / "checkpoints" / "step_00000003" / "training" / "ema.safetensors")
    assert all(value.dtype == torch.float32 for value in ema.values())
    # In bfloat16, which the grids are drawn in, the lower 16 bits would be zero.
    assert any(bool((value.view(torch.int32) & 0xFFFF).any()) for value in ema.values())
    assert any(float(value.abs().max()) > 0 for name, value in ema.items() if "lora_B" in name)
    pipeline = Pipeline.from_pretrained(stable_diffusion)
    pipeline.load_lora(made)
    assert np.isfinite(drawn_by(pipeline, (4, 8, 8))).all()


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_resumes_bit_for_bit(method, tmp_path, made, pictures):
    one, two = made(method).whole, stopped_copy(made(method), tmp_path)
    run_config(made(method).config(method, two, pictures), resume=True)
    last = "checkpoints/step_00000004"
    assert digests(one / last) == digests(two / last)
    assert len(set(digests(one / last).values())) == 3, "the average is not the weights"
    assert losses(one) == losses(two)
    held_out = [[entry for entry in metrics(run) if "held_out_loss" in entry] for run in (one, two)]
    assert held_out[0] == held_out[1]
    assert [entry["step"] for entry in held_out[0]] == [0, 2, 4]
    assert (one / "best" / "best.json").read_text() == (two / "best" / "best.json").read_text()
    # The step of 0 is measured and drawn: what the model could do before.
    sheets = sorted(path.name for path in (one / "samples").iterdir())
    assert sheets == ["step_00000000.png", "step_00000004.png"]
    for name in sheets:
        first, second = (np.asarray(Image.open(run / "samples" / name)) for run in (one, two))
        assert (first == second).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_average_shares_what_does_not_learn(method, stable_diffusion, pictures, tmp_path):
    config = load_config_of(content(tmp_path / "run", stable_diffusion, pictures, method))
    unet = trainable.select_trainable(Pipeline.from_pretrained(stable_diffusion).unet, config)
    ema = make_ema(unet, 0.5)
    learning = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 1
    ema.update_parameters(unet)  # the first is a copy
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 1
    ema.update_parameters(unet)
    averaged = dict(ema.module.named_parameters())
    shared = {name for name, parameter in unet.named_parameters() if parameter.data_ptr() == averaged[name].data_ptr()}
    assert shared == set(averaged) - learning
    assert bool(shared) == (method != "full")
    decay = min(0.5, 2 / 11)
    for name, parameter in unet.named_parameters():
        expected = parameter - decay if name in learning else parameter
        torch.testing.assert_close(averaged[name], expected, rtol=0, atol=1e-6)


def load_config_of(mapping):
    return parse_config(mapping, LDMConfig, "the test")


@pytest.mark.parametrize(
    ("method", "file", "part"),
    [
        ("attention", UNET, "other weights than those of the model in start_from"),
        ("lora", UNET, "other weights than those of the model in start_from"),
        ("lora", "vae/diffusion_pytorch_model.safetensors", "differs from what the config names"),
        ("lora", "text_encoder/model.safetensors", "differs from what the config names"),
        ("full", "text_encoder/model.safetensors", "differs from what the config names"),
    ],
)
def test_resuming_on_a_changed_model_is_refused(method, file, part, tmp_path, made, pictures):
    run, model = stopped_copy(made(method), tmp_path), made(method).model
    stored = (model / file).read_bytes()
    weights = load_file(model / file)
    # The cache of latents does not depend on the decoder, yet pictures do.
    name = next(name for name in sorted(weights) if name.startswith(("conv_in", "decoder")) or "token_emb" in name)
    weights[name] = weights[name] + 1e-3
    before, log = digests(run / "checkpoints" / "step_00000002"), (run / "metrics.jsonl").read_text()
    try:
        save_file(weights, model / file, {"format": "pt"})
        with pytest.raises(ValueError, match=part):
            run_config(made(method).config(method, run, pictures), resume=True)
    finally:
        (model / file).write_bytes(stored)
    assert digests(run / "checkpoints" / "step_00000002") == before
    assert (run / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"space": "latent"}, "space follows from start_from"),
        ({"first_stage": "x"}, "first_stage follows from start_from"),
        ({"unet": {"block_out_channels": [8, 8]}}, "unet follows from start_from"),
        ({"text": {"encoder": "minilm"}}, "text follows from start_from"),
        ({"schedule": {"prediction_type": "epsilon"}}, "schedule follows from start_from"),
        ({"start_from": None, "unet": {}}, "finetune says how to go on from a model"),
        ({"start_from": "./nothing_here"}, "there is no model folder ./nothing_here"),
        ({"start_from": "RUN/pipeline"}, "start_from is 'RUN/pipeline', inside output_dir 'RUN'"),
        ({"finetune": {"method": "lora", "target_modules": ["to_z"]}}, "target_modules has 'to_z'"),
        ({"finetune": {"method": "lora", "target_modules": []}}, "target_modules is empty"),
        ({"finetune": {"method": "lora", "rank": 0}}, "rank is 0"),
        ({"finetune": {"method": "full", "rank": 4}}, "rank is for method lora, and method is full"),
        ({"finetune": {"method": "some"}}, "finetune.method is 'some'"),
        (
            {"data": {"resolution": 15}},
            "15x15 is not divisible by the codec's factor 2; set data.resolution to a multiple of 2, such as 16",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_and_leaves_no_trace(
    changes, part, tmp_path, stable_diffusion, pictures, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = content("RUN", stable_diffusion, pictures)
    for key, value in changes.items():
        config[key] = config[key] | value if key == "data" else value
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        run_config(config)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_without_attention_has_none_to_train(tmp_path, pictures):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    model = tiny.stable_diffusion(**blocks)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"finetune\.method is attention, but the UNet of .* has none"):
        run_config(content(tmp_path / "run", tmp_path / "model", pictures, "attention"))


def test_both_frozen_networks_leave_memory_while_training(tmp_path, stable_diffusion, pictures, monkeypatch):
    alive, sheets = [], []
    batches, save_samples = Run.batches, Run.save_samples

    def kinds():
        gc.collect()
        return {type(thing) for thing in gc.get_objects()} & {AutoencoderKL, TextEncoder, UNet}

    def watched(self):
        for batch in batches(self):
            if self.step in (0, 3):
                alive.append(kinds())
            yield batch

    def drawn(self, draw):
        def watched_draw():
            pipeline_kinds = []
            monkeypatch.setattr(LatentCodec, "decode", seen(LatentCodec.decode, pipeline_kinds))
            picture = draw()
            sheets.append(pipeline_kinds)
            return picture

        save_samples(self, watched_draw)

    def seen(decode, found):
        def decoding(self, latents):
            found.append(kinds())
            return decode(self, latents)

        return decoding

    monkeypatch.setattr(Run, "batches", watched)
    monkeypatch.setattr(Run, "save_samples", drawn)
    outside = kinds()  # of other tests
    run_config(content(tmp_path / "run", stable_diffusion, pictures, "lora", train__sample_every=2))
    assert outside <= {UNet}
    assert alive == [{UNet}] * 2
    assert len(sheets) == 3 and all(found[-1] == {AutoencoderKL, TextEncoder, UNet} for found in sheets)


def test_the_held_out_loss_is_what_a_direct_computation_gives(tmp_path, stable_diffusion, pictures):
    config = content(tmp_path / "run", stable_diffusion, pictures, data__held_out=0.5, train__max_steps=1)
    exported = run_config(config)
    logged = [entry for entry in metrics(tmp_path / "run") if "held_out_loss" in entry][-1]
    config = load_config(tmp_path / "run" / "config.yaml", [], LDMConfig)
    _, held_out = split(inspect(open_source(config.data), config.data).used, 0.5)
    images = CaptionedImages(held_out, config.data, 0)
    pipeline = Pipeline.from_pretrained(exported)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    expected = {}
    looks = setup.repeats_per_image(len(held_out), config.train.validation_samples)
    assert looks > 1  # few images are looked at several times
    # One by one, where training takes them in batches.
    for (i, sample), look in itertools.product(enumerate(held_out), range(looks)):
        t = torch.tensor([(2 * (i * looks + look) + 1) * 1000 // (2 * len(held_out) * looks)])
        draws = step_noise(0, [look], [f"held out: {sample.id}"], 0, shape=(4, 8, 8), num_train_timesteps=1000)
        with torch.no_grad():
            pixels = to_signed(images.image_at(i))[None]
            latents = pipeline.codec.sample_latents(pipeline.codec.moments(pixels))
            signal = schedule.alphas_cumprod[t].sqrt().float().view(1, 1, 1, 1)
            noised = signal * latents + (1 - signal**2).sqrt() * draws.noise
            predicted = pipeline.unet(noised, t, pipeline.text_encoder([sample.captions[0]]))
        expected.setdefault(int(t) // 250, []).append(float((predicted - draws.noise).square().mean()))
    assert len(held_out) >= 4 and len(expected) == 4
    everything = [value for values in expected.values() for value in values]
    assert logged["held_out_loss"] == pytest.approx(np.mean(everything), rel=1e-4)
    for band, values in expected.items():
        name = f"held_out_loss_t{250 * band:03d}_{250 * band + 249:03d}"
        assert logged[name] == pytest.approx(np.mean(values), rel=1e-4)
    assert {name for name in logged if name.startswith("held_out_loss_t")} == {
        "held_out_loss_t000_249", "held_out_loss_t250_499", "held_out_loss_t500_749", "held_out_loss_t750_999"
    }  # fmt: skip


def best_of(run):
    """What is kept as the best, whose files must be those that were written."""
    assert find_damage(run / "best", "best.json") is None
    return {key: value for key, value in json.loads((run / "best/best.json").read_text()).items() if key != "files"}


def test_best_holds_the_export_of_the_lowest_held_out_loss(tmp_path, stable_diffusion, pictures, monkeypatch):
    wanted = iter([3.0, 2.0, 2.5, 2.5, 2.0])  # step 2 is looked at once more by the run that goes on from it
    measured = setup.held_out_loss

    def falling_then_rising(*arguments):
        return measured(*arguments) | {"held_out_loss": next(wanted)}

    monkeypatch.setattr(setup, "held_out_loss", falling_then_rising)
    config = content(tmp_path / "run", stable_diffusion, pictures, train__validate_every=1, train__checkpoint_every=1)
    config["train"] |= {"max_steps": 2, "keep_checkpoints": 9}
    run_config(config)
    assert best_of(tmp_path / "run") == {"step": 1, "held_out_loss": 2.0}
    config["train"]["max_steps"] = 3
    run_config(config, resume=True)  # an equal loss is no lower one, and what was logged before counts
    assert best_of(tmp_path / "run") == {"step": 1, "held_out_loss": 2.0}
    best = (tmp_path / "run/best/pipeline" / UNET).read_bytes()
    assert best == (tmp_path / "run/checkpoints/step_00000001/pipeline" / UNET).read_bytes()
    assert best != (tmp_path / "run/pipeline" / UNET).read_bytes()
    assert drawn_by(Pipeline.from_pretrained(tmp_path / "run/best/pipeline"), (4, 8, 8)).shape == (16, 16, 3)
    assert next(wanted, None) is None


def test_the_weights_of_the_lowest_held_out_loss_are_the_result(made, pictures, tmp_path, capfd):
    one = made("full")
    settings = {"train__final_weights": "best", "train__learning_rate": 10.0}
    run_config(one.config("full", tmp_path / "worse", pictures, **settings))
    before = load_file(one.model / UNET)
    assert not moved(before, load_file(tmp_path / "worse" / "pipeline" / UNET))
    assert moved(before, load_file(tmp_path / "worse" / "checkpoints" / "step_00000004" / "pipeline" / UNET))
    assert "pipeline/ holds step 0, whose held-out loss is lowest" in capfd.readouterr().out
    run_config(
        one.config("full", tmp_path / "better", pictures, train__final_weights="best", train__learning_rate=1e-4)
    )
    logged = [entry["held_out_loss"] for entry in metrics(tmp_path / "better") if "held_out_loss" in entry]
    best = (0, 2, 4)[logged.index(min(logged))]
    expected = tmp_path / "better" / ("best" if best < 4 else "checkpoints/step_00000004") / "pipeline" / UNET
    assert (tmp_path / "better" / "pipeline" / UNET).read_bytes() == expected.read_bytes()
    # Without held-out images there is no best.
    run_config(one.config("full", tmp_path / "none", pictures, train__final_weights="best", data__held_out=0.0))
    assert (tmp_path / "none" / "pipeline" / UNET).is_file()
