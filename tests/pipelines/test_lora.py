"""LoRA between us and stock diffusers, both ways: the same picture for the same latents, weights and names."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import Pipeline
from ldm.lora import (
    AdapterConfig,
    adaptable_layers,
    adapter_names,
    add_adapter,
)
from ldm.lora_files import compvis_names, load_adapter, save_adapter
from tests import tiny
from tests.tiny import adapter_tensors

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERY_KIND = [*ATTENTION, "proj_in", "proj_out", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "conv_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("stable_diffusion")
    tiny.stable_diffusion().save_pretrained(target)
    return target


def stock(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomise(model, seed=0):
    """Non-zero A and B, large enough that the picture changes visibly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def drawn_by(pipeline):
    """Final latents [1, 4, 8, 8] and picture, of either library."""
    torch.manual_seed(5)
    arguments = {"latents": torch.randn(1, 4, 8, 8), "num_inference_steps": 2, "guidance_scale": 3.0}
    arguments |= {"height": 16, "width": 16}
    if isinstance(pipeline, Pipeline):
        seen = []
        image = pipeline("a corgi", seed=1, on_step=seen.append, **arguments).images[0]
        return seen[-1].latents, np.asarray(image) / 255
    latents = pipeline("a corgi", output_type="latent", **arguments).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, pipeline.image_processor.postprocess(decoded, "np")[0]


def same(ours, theirs, *, unlike=None):
    """Both draw the same picture, which is another one than that of `unlike`."""
    (our_latents, our_image), (latents, image) = drawn_by(ours), drawn_by(theirs)
    torch.testing.assert_close(our_latents, latents, rtol=1e-3, atol=1e-4 * max(1.0, float(latents.std())))
    assert np.abs(our_image - image).max() <= 1.01 / 255
    if unlike is not None:
        assert (drawn_by(unlike)[0] - latents).abs().max() > 0.01


def made_here(folder, target, name="default", seed=0, *, rank=3, alpha=5.0, targets=EVERY_KIND, text=True):
    """A folder with an adapter made and saved here."""
    pipeline = Pipeline.from_pretrained(folder)
    add_adapter(pipeline.unet, AdapterConfig(rank=rank, alpha=alpha, target_modules=tuple(targets)), name)
    randomise(pipeline.unet, seed)
    if text:
        config = AdapterConfig(rank=2, alpha=3.0, target_modules=tuple(TEXT))
        add_adapter(pipeline.text_encoder.model, config, name)
        randomise(pipeline.text_encoder.model, seed + 1)
    path = save_adapter(target, pipeline.unet, name, text_encoder=pipeline.text_encoder.model)
    assert path == target / FILE and [child.name for child in target.iterdir()] == [FILE]
    return pipeline


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
def test_made_here_draws_the_same_in_diffusers_and_here_again(linear, tmp_path):
    tiny.stable_diffusion(use_linear_projection=linear).save_pretrained(tmp_path / "model")
    made = made_here(tmp_path / "model", tmp_path / "lora")
    theirs = stock(tmp_path / "model")
    theirs.load_lora_weights(tmp_path / "lora")
    same(made, theirs, unlike=Pipeline.from_pretrained(tmp_path / "model"))
    assert theirs.unet.peft_config["default_0"].lora_alpha == 5
    again = Pipeline.from_pretrained(tmp_path / "model")
    again.load_lora(tmp_path / "lora" / FILE)
    assert again.lora == {"default": 1.0}
    for mine, before in ((again.unet, made.unet), (again.text_encoder.model, made.text_encoder.model)):
        tensors, expected = adapter_tensors(mine), adapter_tensors(before)
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in tensors)
    torch.testing.assert_close(drawn_by(again)[0], drawn_by(made)[0], rtol=1e-4, atol=1e-4)


def theirs_with_lora(folder, unet=None, text=None):
    pipeline = stock(folder)
    pipeline.unet.add_adapter(unet or LoraConfig(r=3, lora_alpha=5, target_modules=ATTENTION))
    randomise(pipeline.unet)
    if text is not None:
        pipeline.text_encoder.add_adapter(text)
        randomise(pipeline.text_encoder, 1)
    return pipeline


MADE_THERE = {
    "attention": (LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION), None),
    "every kind of layer": (LoraConfig(r=3, lora_alpha=5, target_modules=EVERY_KIND), None),
    "patterns of rank and alpha": (
        LoraConfig(r=3, lora_alpha=5, target_modules=EVERY_KIND, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 7}),
        None,
    ),
    "rank-stabilised": (LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION, use_rslora=True), None),
    "with the text encoder": (None, LoraConfig(r=2, lora_alpha=3, target_modules=TEXT)),
}


@pytest.mark.parametrize("how", MADE_THERE)
def test_made_there_draws_the_same_here(how, folder, tmp_path):
    unet, text = MADE_THERE[how]
    theirs = theirs_with_lora(folder, unet, text)
    text_layers = {} if text is None else {
        "text_encoder_lora_layers": get_peft_model_state_dict(theirs.text_encoder, adapter_name="default"),
        "text_encoder_lora_adapter_metadata": theirs.text_encoder.peft_config["default"].to_dict(),
    }  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict(),
        **text_layers,
    )
    ours = Pipeline.from_pretrained(folder)
    ours.load_lora(tmp_path)
    assert adapter_names(ours.text_encoder.model) == (() if text is None else ("default",))
    same(ours, theirs, unlike=Pipeline.from_pretrained(folder))


def in_old_names(tensors):
    """As diffusers 0.17 to 0.20 wrote attention processors."""
    ends = {"A": "down", "B": "up"}
    return {
        re.sub(r"\.(to_\w+?)(\.0)?\.lora_([AB])\.", lambda m: f".processor.{m[1]}_lora.{ends[m[3]]}.", key): value
        for key, value in tensors.items()
    }


OLDER = {
    "as the training scripts save it": lambda t: convert_state_dict_to_diffusers(t),
    "peft's names": lambda t: t,
    "attention processors": in_old_names,
}


@pytest.mark.parametrize("how", OLDER)
def test_files_without_settings_have_the_scale_1(how, folder, tmp_path):
    theirs = theirs_with_lora(folder, LoraConfig(r=3, lora_alpha=3, target_modules=ATTENTION))
    tensors = OLDER[how](get_peft_model_state_dict(theirs.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    ours, reader = Pipeline.from_pretrained(folder), stock(folder)
    ours.load_lora(tmp_path)
    same(ours, theirs)
    reader.load_lora_weights(tmp_path)  # the file is one that diffusers reads
    same(ours, reader)


def test_the_file_of_a_unet_alone_is_read_with_its_settings(folder, tmp_path):
    theirs = theirs_with_lora(folder)
    theirs.unet.save_lora_adapter(tmp_path)
    ours = Pipeline.from_pretrained(folder)
    ours.load_lora(tmp_path)
    same(ours, theirs)


def test_a_folder_of_peft_is_read_with_its_config(folder, tmp_path):
    theirs = theirs_with_lora(folder)
    tensors = get_peft_model_state_dict(theirs.unet)
    save_file(
        {f"base_model.model.{key}": value for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    theirs.unet.peft_config["default"].save_pretrained(tmp_path)
    ours = Pipeline.from_pretrained(folder)
    ours.load_lora(tmp_path)
    same(ours, theirs)


def kohya(pipeline, *, alpha=lambda name: 5.0):
    """Tensors under the names of kohya's sd-scripts, for the adapters of a diffusers pipeline."""
    tensors = {}
    for prefix, model in (("lora_unet_", pipeline.unet), ("lora_te_text_model_", pipeline.text_encoder)):
        for key, value in get_peft_model_state_dict(model, adapter_name="default").items():
            layer, role = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
            name = prefix + layer.replace(".", "_")
            tensors[f"{name}.lora_{'down' if role == 'A' else 'up'}.weight"] = value
            tensors[f"{name}.alpha"] = torch.tensor(alpha(layer))
    return tensors


def test_a_file_of_kohya_draws_the_same_here(folder, tmp_path):
    targets = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    unet = LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    theirs = theirs_with_lora(folder, unet, LoraConfig(r=3, lora_alpha=5, target_modules=TEXT))
    save_file(kohya(theirs), tmp_path / "style.safetensors")
    ours, reader = Pipeline.from_pretrained(folder), stock(folder)
    ours.load_lora(tmp_path / "style.safetensors")
    assert len(adapter_tensors(ours.text_encoder.model)) == 12
    same(ours, theirs, unlike=Pipeline.from_pretrained(folder))
    reader.load_lora_weights(tmp_path / "style.safetensors")
    same(ours, reader)


def test_every_layer_of_a_file_of_kohya_has_its_own_rank_and_alpha(folder, tmp_path):
    """As LoCon writes them: convolutions of another rank and alpha than attention."""
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=[*ATTENTION, "conv1", "conv_in", "time_emb_proj"],
        rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 1, "to_k": 3, "time_emb_proj": 2},
    )  # fmt: skip
    theirs = theirs_with_lora(folder, config, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    alphas = {"conv1": 1.0, "to_k": 3.0, "time_emb_proj": 2.0}
    save_file(kohya(theirs, alpha=lambda layer: alphas.get(layer.split(".")[-1], 4.0)), tmp_path / "a.safetensors")
    ours = Pipeline.from_pretrained(folder)
    ours.load_lora(tmp_path)
    same(ours, theirs)
    # Saved from here, each layer keeps its own, here and in diffusers.
    save_adapter(tmp_path / "again", ours.unet, text_encoder=ours.text_encoder.model)
    reader = stock(folder)
    reader.load_lora_weights(tmp_path / "again")
    same(ours, reader)


def test_a_file_with_names_of_compvis_draws_the_same_here(folder, tmp_path):
    """Those of the blocks, which diffusers knows too; `lora_te1_` is the text encoder under its newer name."""
    targets = [*ATTENTION, "proj_in", "ff.net.2", "conv1", "time_emb_proj", "downsamplers.0.conv"]
    theirs = theirs_with_lora(
        folder, LoraConfig(r=3, lora_alpha=5, target_modules=targets), LoraConfig(r=3, target_modules=TEXT)
    )
    names = compvis_names(adaptable_layers(Pipeline.from_pretrained(folder).unet))
    known = {f"lora_unet_{name.replace('.', '_')}": f"lora_unet_{to.replace('.', '_')}" for name, to in names.items()}
    tensors = {}
    for key, value in kohya(theirs, alpha=lambda layer: 5.0 if "_" in layer and "proj" not in layer else 8.0).items():
        layer, _, rest = key.partition(".")
        tensors[f"{known.get(layer, layer.replace('lora_te_', 'lora_te1_'))}.{rest}"] = value
    assert any("input_blocks_2_0_op" in key for key in tensors) and not any("down_blocks" in key for key in tensors)
    save_file(tensors, tmp_path / "style.safetensors")
    ours, reader = Pipeline.from_pretrained(folder), stock(folder)
    ours.load_lora(tmp_path / "style.safetensors")
    reader.load_lora_weights(tmp_path / "style.safetensors", unet_config=reader.unet.config)
    same(ours, reader, unlike=Pipeline.from_pretrained(folder))


TEXT_FORMS = {
    "alone": "text_model.",
    "peft": "base_model.model.text_model.",
    "diffusers": "text_encoder.text_model.",
    "compvis": "cond_stage_model.transformer.text_model.",
    "several encoders": "text_encoders.clip_l.transformer.text_model.",
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_a_text_encoder_alone_is_known_by_its_layers(form, folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    add_adapter(pipeline.text_encoder.model, AdapterConfig(rank=2, target_modules=tuple(TEXT)))
    randomise(pipeline.text_encoder.model)
    expected = {key.removeprefix("text_model."): v for key, v in adapter_tensors(pipeline.text_encoder.model).items()}
    save_file({f"{TEXT_FORMS[form]}{key}": value for key, value in expected.items()}, tmp_path / "a.safetensors")
    other = Pipeline.from_pretrained(folder)
    other.load_lora(tmp_path)
    found = {key.removeprefix("text_model."): v for key, v in adapter_tensors(other.text_encoder.model).items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert adapter_names(other.unet) == ()


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("two")
    made_here(folder, target / "style", "style", 1)
    made_here(folder, target / "subject", "subject", 7, rank=2, alpha=2.0, targets=ATTENTION, text=False)
    return target


def both(pipeline, two):
    for name in ("style", "subject"):
        if isinstance(pipeline, Pipeline):
            pipeline.load_lora(two / name, name=name)
        else:
            pipeline.load_lora_weights(two / name, adapter_name=name)
    return pipeline


def test_two_with_weights_draw_the_same_in_both_libraries(folder, two):
    ours, theirs, plain = both(Pipeline.from_pretrained(folder), two), both(stock(folder), two), stock(folder)
    assert ours.lora == {"style": 1.0, "subject": 1.0}
    ours.set_lora({"style": 0.7, "subject": -0.4})
    theirs.set_adapters(["style", "subject"], [0.7, -0.4])
    same(ours, theirs, unlike=plain)
    ours.set_lora({"subject": 1.0})
    theirs.set_adapters(["subject"])
    # diffusers leaves a text encoder on whose only adapter is not named.
    theirs.text_encoder.disable_adapters()
    same(ours, theirs, unlike=plain)
    ours.set_lora({})
    same(ours, plain)


def weights_of(pipeline):
    return {
        f"{i}.{k}": v.clone()
        for i, m in enumerate((pipeline.unet, pipeline.text_encoder.model))
        for k, v in m.state_dict().items()
    }


def test_merging_is_fusing_and_is_undone_exactly(folder, two, tmp_path):
    ours, theirs = Pipeline.from_pretrained(folder), both(stock(folder), two)
    before = weights_of(ours)
    both(ours, two).set_lora({"style": 0.7, "subject": 0.4})
    loaded, latents = weights_of(ours), drawn_by(ours)[0]
    with pytest.raises(ValueError, match=r"LoRA 'style' is loaded; merge_lora\(\)"):
        ours.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()

    ours.merge_lora()
    theirs.set_adapters(["style", "subject"], [0.7, 0.4])
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    merged = weights_of(ours)
    assert merged.keys() == before.keys()
    for name, tensor in theirs.unet.state_dict().items():
        torch.testing.assert_close(merged[f"0.{name}"], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn_by(ours)[0], latents, rtol=1e-3, atol=1e-4)
    same(ours, theirs, unlike=Pipeline.from_pretrained(folder))

    # What is saved is a plain pipeline, its text encoder too.
    ours.save_pretrained(tmp_path / "model")
    same(ours, stock(tmp_path / "model"))
    assert torch.equal(drawn_by(Pipeline.from_pretrained(tmp_path / "model"))[0], drawn_by(ours)[0])

    with pytest.raises(ValueError, match="merged"):
        ours.set_lora({"style": 1.0})
    with pytest.raises(ValueError, match="unmerge"):
        ours.load_lora(two / "style", name="third")
    ours.unmerge_lora()
    again = weights_of(ours)
    assert again.keys() == loaded.keys() and all(torch.equal(again[k], loaded[k]) for k in loaded)
    assert torch.equal(drawn_by(ours)[0], latents)
    ours.merge_lora()
    ours.unload_lora()
    after = weights_of(ours)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert ours.lora == {}
    ours.save_pretrained(tmp_path / "plain")
    original = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(tmp_path / "plain" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_a_pipeline_in_bfloat16_takes_a_lora(folder, two):
    ours = Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    plain = drawn_by(ours)[0]
    ours.load_lora(two / "style", weight=0.5)
    assert {p.dtype for m in (ours.unet, ours.text_encoder.model) for p in m.parameters()} == {torch.bfloat16}
    assert (drawn_by(ours)[0] - plain).abs().max() > 0.01
    ours.merge_lora()
    ours.to("cpu", torch.float32)
    ours.unmerge_lora()
    ours.unload_lora()
    ours.to("cpu", torch.bfloat16)
    assert torch.equal(drawn_by(ours)[0], plain)


def test_mistakes_are_named(folder, two):
    ours = Pipeline.from_pretrained(folder)
    for call in (ours.merge_lora, ours.unmerge_lora):
        with pytest.raises(ValueError, match="no LoRA is"):
            call()
    with pytest.raises(ValueError, match=r"no LoRA 'x'; loaded: none"):
        ours.set_lora({"x": 1.0})
    with pytest.raises(ValueError, match=r"weight of adapter 'default' is nan"):
        ours.load_lora(two / "style", weight=float("nan"))
    assert ours.lora == {}
    ours.load_lora(two / "style", name="style")
    with pytest.raises(ValueError, match=r"an adapter 'style' already"):
        ours.load_lora(two / "subject", name="style")
    with pytest.raises(ValueError, match=r"weight of adapter 'style' is inf"):
        ours.set_lora({"style": float("inf")})
    assert ours.lora == {"style": 1.0}
    for name in ("", "a.b", "keys", "forward"):
        with pytest.raises(ValueError, match="cannot be the name"):
            ours.load_lora(two / "style", name=name)
    # Without the text encoder's half the picture would be another one.
    with pytest.raises(ValueError, match=r"also changes the text encoder \(6 layers\); load it into a pipeline"):
        load_adapter(Pipeline.from_pretrained(folder).unet, two / "style")


def test_other_models_are_refused_and_nothing_is_changed(folder, two, tmp_path):
    wide = UNet2DConditionModel(**(tiny.UNET | {"block_out_channels": (16, 32)}))
    wide.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    wide.save_lora_adapter(tmp_path / "wide")
    deep = UNet2DConditionModel(**(tiny.UNET | {"layers_per_block": 2}))
    deep.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    deep.save_lora_adapter(tmp_path / "deep")
    tensors = load_file(two / "style" / FILE)
    (tmp_path / "xl").mkdir()
    save_file({"lora_te2_a.lora_down.weight": torch.ones(1, 1)}, tmp_path / "xl" / "a.safetensors")
    (tmp_path / "dora").mkdir()
    dora = tensors | {"unet.conv_in.lora_magnitude_vector": torch.ones(8)}
    save_file(dora, tmp_path / "dora" / FILE)
    (tmp_path / "half").mkdir()
    first = min(key for key in tensors if "text" in key)
    save_file({key: value for key, value in tensors.items() if key != first}, tmp_path / "half" / FILE)
    (tmp_path / "nan").mkdir()
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, tmp_path / "nan" / FILE)
    ours = Pipeline.from_pretrained(folder)
    before = weights_of(ours)
    for name, message in {
        "wide": r"has a weight of shape \[2, 32\], but this model needs \[2, 16\].*another model",
        "deep": r"changes 16 layers that this unet does not have \(first: ",
        "xl": r"holds layers of Stable Diffusion XL \(1 of 1 tensors, such as lora_te2_a",
        "dora": r"holds magnitudes of DoRA \(1 of \d+ tensors, such as unet.conv_in.lora_magnitude_vector\)",
        "half": r"has not exactly one A and one B",
        "nan": r"numbers that are not finite",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            ours.load_lora(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
        after = weights_of(ours)
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before), name
    assert ours.lora == {} and ours.unet.conv_in.weight.requires_grad


def test_names_and_header_of_a_file(two):
    with safe_open(two / "style" / FILE, framework="pt") as stream:
        header, names = json.loads(stream.metadata()["lora_adapter_metadata"]), list(stream.keys())
    assert (header["unet.r"], header["unet.lora_alpha"]) == (3, 5)
    assert (header["text_encoder.r"], header["text_encoder.lora_alpha"]) == (2, 3)
    # Older versions of transformers, and of diffusers with them, know CLIP's layers by this name alone.
    assert min(names) == "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    assert max(names).startswith("unet.up_blocks.") and max(names).endswith(".lora_B.weight")
