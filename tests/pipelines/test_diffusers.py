"""Folders between us and diffusers, both ways: the same picture for the same latents."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.text import load_text_encoder, loading
from tests import tiny

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def same_picture(folder, *, steps=5, scale=7.5, size=16, eta=0.0):
    """A folder opened here and in stock diffusers, which runs DDIM with its schedule: from one x_T, one picture."""
    ours, theirs = Pipeline.from_pretrained(folder), StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    factor = theirs.vae_scale_factor
    latents = torch.randn(2, 4, size // factor, size // factor)
    if not isinstance(theirs.scheduler, DDIMScheduler):
        # Made from another class's config, DDIM would fall back on clamping latents, which nothing in it asks for.
        theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    arguments = {"num_inference_steps": steps, "guidance_scale": scale, "negative_prompt": ["", "zzz"]}
    arguments |= {"height": size, "width": size, "eta": eta}
    prompts = ["a corgi wearing a hat", "bb"]
    expected = theirs(
        prompts, latents=latents, output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in (4, 5)], **arguments,
    ).images  # fmt: skip
    their_latents = theirs(
        prompts, latents=latents, output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in (4, 5)], **arguments,
    ).images  # fmt: skip
    seen = []
    images = ours(prompts, latents=latents, seed=[4, 5], on_step=seen.append, **arguments).images
    spread = float(their_latents.std())
    torch.testing.assert_close(seen[-1].latents, their_latents, rtol=1e-3, atol=1e-4 * max(1.0, spread))
    difference = np.abs(np.stack([np.asarray(image) for image in images]) / 255 - expected)
    assert difference.max() <= 1.01 / 255
    assert expected.std() > 0.01


SCHEDULERS = {
    "pndm as in 1.5": PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False),
    "ddim as in 2.1": DDIMScheduler(**SD, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False),
    "ddim with its defaults": DDIMScheduler(),
    "euler": EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "dpm++": DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", prediction_type="v_prediction"
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_of_diffusers_draws_the_same_here(name, tmp_path):
    tiny.stable_diffusion(SCHEDULERS[name]).save_pretrained(tmp_path)
    ours = Pipeline.from_pretrained(tmp_path)
    assert (ours.guidance_scale, ours.num_inference_steps) == (7.5, 50)
    same_picture(tmp_path)


def test_a_folder_of_euler_draws_what_its_own_scheduler_draws(tmp_path):
    # On whole timesteps DDIM is Euler's method in σ/α: DDIM, Eq. 13.
    tiny.stable_diffusion(EulerDiscreteScheduler(**SD, timestep_spacing="leading")).save_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    latents, seen = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    arguments = {"latents": latents, "num_inference_steps": 7, "guidance_scale": 3.0, "height": 16, "width": 16}
    expected = theirs("a corgi", output_type="latent", **arguments).images
    Pipeline.from_pretrained(tmp_path)("a corgi", on_step=seen.append, **arguments)
    torch.testing.assert_close(seen[-1].latents, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("scheduler", "key", "neutral", "message"),
    [
        (EulerDiscreteScheduler(**SD, use_karras_sigmas=True), "use_karras_sigmas", False, "set it to false in the fi"),
        (
            DPMSolverMultistepScheduler(**SD, lambda_min_clipped=-2.0),
            "lambda_min_clipped", -float("inf"), "set it to -Infinity in the file",
        ),
        (LCMScheduler(steps_offset=1), "_class_name", "DDIMScheduler", "distilled for it.*to DDIMS"),
    ],
)  # fmt: skip
def test_a_folder_that_samples_another_way_is_refused_and_the_way_out_leads_there(
    scheduler, key, neutral, message, tmp_path
):
    tiny.stable_diffusion(scheduler).save_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    with pytest.raises(ValueError, match=f"{file}: scheduler {type(scheduler).__name__} .*{message}"):
        Pipeline.from_pretrained(tmp_path)
    content = json.loads(file.read_text())
    value, content[key] = content[key], neutral
    file.write_text(json.dumps(content))
    if key == "_class_name":
        tiny.edit_json(tmp_path / "model_index.json", scheduler=["diffusers", neutral])
    ours = Pipeline.from_pretrained(tmp_path)
    changed = {} if key == "_class_name" else {key: value}
    sampler = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler", **changed)
    latents, seen = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    arguments = {"latents": latents, "num_inference_steps": 6, "guidance_scale": 3.0, "height": 16, "width": 16}
    expected = theirs("a corgi", output_type="latent", generator=torch.Generator().manual_seed(4), **arguments).images
    ours("a corgi", sampler=sampler, seed=4, on_step=seen.append, **arguments)
    torch.testing.assert_close(seen[-1].latents, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_the_class_of_the_index_is_the_one_that_counts(tmp_path):
    tiny.stable_diffusion(EulerDiscreteScheduler(**SD)).save_pretrained(tmp_path)
    tiny.edit_json(tmp_path / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(ValueError, match="scheduler FlowMatchEulerDiscreteScheduler does not sample a DDPM schedule"):
        Pipeline.from_pretrained(tmp_path)
    tiny.edit_json(tmp_path / "model_index.json", scheduler=["diffusers"])
    with pytest.raises(ValueError, match="scheduler diffusers does not sample"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(("scale", "eta"), [(3.0, 0.0), (7.5, 1.0), (2.5, 0.5)])
def test_guidance_and_eta_draw_the_same_here(scale, eta, tmp_path):
    tiny.stable_diffusion(PNDMScheduler(**SD)).save_pretrained(tmp_path)
    same_picture(tmp_path, scale=scale, eta=eta)


def shape_of_the_real_1_5(folder):
    """What the published folder has beyond a fresh save: old configs, a safety checker, old names, variants."""
    tiny.edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        _diffusers_version="0.6.0",
        requires_safety_checker=True,
    )
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"never opened")
    unet = json.loads((folder / "unet" / "config.json").read_text())
    # The config of 2022 has these keys and no others.
    kept = [
        "_class_name",
        "act_fn",
        "attention_head_dim",
        "block_out_channels",
        "center_input_sample",
        "cross_attention_dim",
        "down_block_types",
        "downsample_padding",
        "flip_sin_to_cos",
        "freq_shift",
        "in_channels",
        "layers_per_block",
        "mid_block_scale_factor",
        "norm_eps",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
    ]
    (folder / "unet" / "config.json").write_text(json.dumps({key: unet[key] for key in kept}))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    kept = [
        "_class_name",
        "act_fn",
        "block_out_channels",
        "down_block_types",
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
    ]
    (folder / "vae" / "config.json").write_text(json.dumps({key: vae[key] for key in kept}))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kept = ["_class_name", "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "set_alpha_to_one"]
    kept += ["skip_prk_steps", "steps_offset", "trained_betas"]
    content = {key: scheduler[key] for key in kept} | {"clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(weights).items():
        for new, old in new_to_old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, weights)


def test_a_folder_in_the_shape_of_the_real_1_5(tmp_path):
    theirs = tiny.stable_diffusion(PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False))
    theirs.save_pretrained(tmp_path / "new")
    theirs.save_pretrained(tmp_path / "old")
    shape_of_the_real_1_5(tmp_path / "old")
    ours = [
        Pipeline.from_pretrained(tmp_path / name)("a corgi", seed=1, num_inference_steps=5) for name in ("new", "old")
    ]
    assert (np.asarray(ours[0].images[0]) == np.asarray(ours[1].images[0])).all()
    same_picture(tmp_path / "new")


@pytest.mark.parametrize(
    ("how", "files"),
    [
        ({}, 1),
        ({"variant": "fp16"}, 1),
        ({"max_shard_size": "20KB"}, 2),
        ({"variant": "fp16", "max_shard_size": "20KB"}, 2),
    ],
)
def test_shards_and_variants_are_read(how, files, tmp_path):
    theirs = tiny.stable_diffusion(DDIMScheduler(**SD, clip_sample=False))
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "other", **how)
    assert len(list((tmp_path / "other" / "unet").glob("*.safetensors"))) >= files
    one, other = (
        Pipeline.from_pretrained(tmp_path / name)("a", seed=1, num_inference_steps=3) for name in ("plain", "other")
    )
    assert (np.asarray(one.images[0]) == np.asarray(other.images[0])).all()


def test_shards_that_we_write_open_in_diffusers(tmp_path):
    ours = tiny.pipeline(tmp_path / "parts", "latent")
    ours.save_pretrained(tmp_path / "one")
    ours.save_pretrained(tmp_path / "several", shard_bytes=40_000)
    files = sorted((tmp_path / "several" / "unet").glob("*.safetensors"))
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) < 40_000 + 8_000  # and a header each
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "several").unet.state_dict()
    for name, value in ours.unet.state_dict().items():
        assert torch.equal(theirs[name], value)
    same_picture(tmp_path / "several")
    with pytest.raises(ValueError, match=r"alone takes .* bytes, more than the 100 of a file"):
        ours.save_pretrained(tmp_path / "several", shard_bytes=100)
    same_picture(tmp_path / "several")  # as it was

    ours.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = Pipeline.from_pretrained(tmp_path / "half").unet.state_dict()
    assert all(torch.equal(half[name], value.half().float()) for name, value in ours.unet.state_dict().items())


def test_a_packaged_text_encoder_is_saved_by_its_name_and_with_its_files(tmp_path, monkeypatch):
    package = tiny.text_folder(tmp_path / "package")
    for path in (package / "tokenizer").iterdir():  # of a package, all files lie in one folder
        path.rename(package / "text_encoder" / path.name)
    monkeypatch.setitem(loading._PACKAGED, "minilm", lambda: package / "text_encoder")
    ours = tiny.pipeline(tmp_path / "parts", "latent")
    with pytest.raises(ValueError, match="text_encoder is 'name'; it is 'files' or 'reference'"):
        ours.save_pretrained(tmp_path / "small", text_encoder="name")
    length = ours.text_encoder.max_length
    ours.text_encoder = load_text_encoder("minilm", length)
    ours.save_pretrained(tmp_path / "small", text_encoder="reference")
    assert [path.name for path in (tmp_path / "small" / "text_encoder").iterdir()] == ["reference.json"]
    assert not (tmp_path / "small" / "tokenizer").exists()
    small = Pipeline.from_pretrained(tmp_path / "small")
    small.save_pretrained(tmp_path / "whole")
    drawn = [
        np.asarray(pipeline("a cat", seed=1).images[0])
        for pipeline in (ours, small, Pipeline.from_pretrained(tmp_path / "whole"))
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()
    same_picture(tmp_path / "whole")

    for parameter in ours.text_encoder.model.parameters():
        parameter.data.add_(0.1)
    with pytest.raises(ValueError, match="none that a package holds"):
        ours.save_pretrained(tmp_path / "small", text_encoder="reference")
    Pipeline.from_pretrained(tmp_path / "small")  # as it was


@pytest.mark.parametrize("steps", [4, 50])
def test_our_latent_folder_draws_the_same_in_stock_diffusers(steps, tmp_path):
    ours = tiny.pipeline(tmp_path / "parts", "latent")
    ours.save_pretrained(tmp_path / "saved")
    same_picture(tmp_path / "saved", steps=steps, scale=3.0)
    scheduler = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["timestep_spacing"], scheduler["set_alpha_to_one"], scheduler["clip_sample"]) == (
        "trailing", True, False,
    )  # fmt: skip
    # Its own defaults work as well.
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert theirs("a", num_inference_steps=2).images[0].size == (16, 16)
