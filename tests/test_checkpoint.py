"""Folders on disk: atomic, strict, and each fault named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline, checkpoint
from tests import tiny


@pytest.fixture
def saved(tmp_path):
    tiny.pipeline(tmp_path / "parts", "latent").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fault(folder):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the tests look at the message)
        Pipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(saved, part):
    shutil.rmtree(saved / part)
    assert part in fault(saved)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("how", ["gone", "empty", "half"])
def test_a_missing_or_half_written_file_is_named(saved, name, how):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[: 0 if how == "empty" else len(content) // 2])
    assert name.rpartition("/")[2].split(".")[0] in fault(saved)


def test_a_folder_that_is_none_is_named(tmp_path):
    assert "there is no model folder" in fault(tmp_path / "nothing" / "here")
    assert "holds no model_index.json" in fault(tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert "did you mean" in fault(tmp_path)
    assert "the hub did not give a model of that id" in fault("nobody/nothing")


def test_other_kinds_of_pipeline_are_refused_by_name(saved):
    tiny.edit_json(saved / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "StableDiffusionXLPipeline" in fault(saved)
    tiny.edit_json(
        saved / "model_index.json",
        _class_name="StableDiffusionPipeline",
        text_encoder_2=["transformers", "CLIPTextModel"],
    )
    assert "text_encoder_2" in fault(saved)


def test_weights_of_the_wrong_shape_are_named(saved):
    tiny.edit_json(saved / "unet" / "config.json", block_out_channels=[8, 32])
    message = fault(saved)
    assert "shape" in message
    assert "unet" in message


def test_text_encoder_weights_of_the_wrong_shape_are_named(saved):
    tiny.edit_json(saved / "text_encoder" / "config.json", intermediate_size=48)
    message = fault(saved)
    assert "has shape" in message
    assert "mlp.fc1" in message


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"beta_start": 3}, "scheduler_config.json"),
        ("vae/config.json", {"scaling_factor": 0}, "vae/config.json"),
        ("unet/config.json", {"block_out_channels": "wide"}, "unet/config.json"),
    ],
)
def test_wrong_values_are_named_with_their_file(name, changes, part, saved):
    tiny.edit_json(saved / name, **changes)
    assert part in fault(saved)


WEIGHTS_OF = {
    "unet/diffusion_pytorch_model": "mid_block.resnets.0.conv1.weight",
    "vae/diffusion_pytorch_model": "decoder.conv_in.bias",
    "text_encoder/model": "mlp.fc1.weight",
}


def spoil(path, ending, change):
    """Rewrites the one tensor of a file whose name ends so."""
    weights = load_file(path)
    (name,) = (key for key in weights if key.endswith(ending))
    weights[name] = change(weights[name])
    save_file(weights, path, {"format": "pt"})
    return name


def last_is(number):
    def change(tensor):
        tensor.view(-1)[-1] = number
        return tensor

    return change


@pytest.mark.parametrize("part", WEIGHTS_OF)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: torch.full_like(t, torch.nan), "holds numbers that are not finite"),
        (last_is(torch.nan), "holds numbers that are not finite"),
        (last_is(-torch.inf), "holds numbers that are not finite"),
        (lambda t: t.to(torch.int8), "is stored as int8, but weights are float32, float16, bfloat16, float64"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn, but"),
        (lambda t: t.to(torch.complex64), "is stored as complex64, but"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_file_and_name(saved, part, change, said):
    path = saved / f"{part}.safetensors"
    name = spoil(path, WEIGHTS_OF[part], change)
    assert f"{path}: {name} {said}" in fault(saved)


def test_the_shard_with_the_broken_tensor_is_named(tmp_path):
    pipeline = tiny.pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model", shard_bytes=20_000)
    shards = sorted((tmp_path / "model" / "unet").glob("*.safetensors"))
    name = min(load_file(shards[1]))
    spoil(shards[1], name, last_is(torch.inf))
    assert len(shards) > 2
    assert fault(tmp_path / "model").startswith(f"{shards[1]}: {name} holds numbers that are not finite")


def test_weights_that_the_dtype_cannot_hold_are_refused(saved):
    name = spoil(saved / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight", last_is(-70_000.0))
    with pytest.raises(ValueError, match=rf"unet: {name} holds 7e\+04, which is too large for float16; take bfloat16"):
        Pipeline.from_pretrained(saved, dtype=torch.float16)
    assert Pipeline.from_pretrained(saved, dtype=torch.bfloat16).unet.conv_in.weight.dtype == torch.bfloat16


def test_counters_and_other_towers_of_a_text_encoder_are_no_weights(saved):
    path = saved / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    more = {
        "text_model.embeddings.position_ids": torch.arange(12).view(1, -1),
        "vision_model.embeddings.class_embedding": torch.full((3,), torch.nan),
    }
    save_file(weights | more, path, {"format": "pt"})
    tiny.edit_json(saved / "text_encoder" / "config.json", model_type="clip")
    Pipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("vae", {"shift_factor": float("nan")}),
        ("vae", {"scaling_factor": float("inf")}),
        ("vae", {"_class_name": "VQModel", "latents_mean": [0, 0, float("nan"), 0], "latents_std": [1, 1, 1, 1]}),
        ("vae", {"_class_name": "VQModel", "latents_mean": [0, 0, 0, 0], "latents_std": [1, float("inf"), 1, 1]}),
        ("unet", {"norm_eps": float("nan")}),
        ("codec", {"mean": [0, float("nan"), 0]}),
        ("codec", {"std": [1, 1, float("inf")]}),
        ("codec", {"std": [1, 1e-60, 1]}),
        ("codec", {"mean": [0, 10**400, 0]}),
        ("codec", {"mean": ["a", 0, 0]}),
    ],
)
def test_statistics_that_are_not_finite_are_refused_by_file(config, changes, saved, tmp_path):
    if config == "codec":
        tiny.pipeline(tmp_path / "more").save_pretrained(tmp_path / "pixels")
        saved = tmp_path / "pixels"
    tiny.edit_json(saved / config / "config.json", **changes)
    assert fault(saved).startswith(f"{saved / config / 'config.json'}: ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16", None])
def test_a_dtype_that_networks_cannot_have_is_refused(saved, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; it must be one of torch's float32, float16, bfloat16, float64"):
        Pipeline.from_pretrained(saved, dtype=dtype)


def test_an_index_without_its_map_is_named(saved):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("elsewhere"))
    index = weights.with_name(f"{weights.name}.index.json")
    for content in ("{}", '{"weight_map": {"a": "../../secret.safetensors"}}'):
        index.write_text(content)
        assert "has no weight_map of files beside it" in fault(saved)


def test_weights_of_another_network_are_named(saved):
    tiny.edit_json(saved / "unet" / "config.json", layers_per_block=2)
    assert "missing (first:" in fault(saved)


def test_an_unsupported_key_is_refused_with_its_file(saved):
    tiny.edit_json(saved / "unet" / "config.json", class_embed_type="timestep")
    message = fault(saved)
    assert "unet/config.json" in message
    assert "class_embed_type" in message


def test_pickled_weights_are_never_opened(saved):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").rename(saved / "unet" / "diffusion_pytorch_model.bin")
    assert "pickled weights" in fault(saved)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with checkpoint.atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        (folder / "config.json").write_text("{}")
        assert not target.exists()

    def fail_half_way():
        with checkpoint.atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert (target / "a").read_text() == "old"
    with checkpoint.atomic_folder(target) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_weights_are_kept_bit_for_bit(tmp_path):
    unet = tiny.pipeline(tmp_path / "parts").unet
    checkpoint.save_model(tmp_path / "unet", unet)
    again = checkpoint.load_model(tmp_path / "unet", "UNet2DConditionModel")
    for name, value in unet.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.config == unet.config
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_a_first_stage_is_found_wherever_it_stands(saved, tmp_path):
    assert checkpoint.find_autoencoder(str(saved)) == saved / "vae"
    assert checkpoint.find_autoencoder(str(saved / "vae")) == saved / "vae"
    model = checkpoint.load_model(checkpoint.find_autoencoder("openmoji-first-stage"), "AutoencoderKL")
    assert model.factor == 4
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        checkpoint.find_autoencoder(str(tmp_path / "parts"))  # text encoder and tokenizer only
    for name in ("nobody/nothing", "./nowhere", "nowhere"):
        with pytest.raises(ValueError, match="there is no model folder"):
            checkpoint.find_autoencoder(name)


def test_a_pipeline_with_a_codebook_is_kept_byte_for_byte_and_opens_part_by_part_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel, VQModel

    pipeline = tiny.pipeline(tmp_path / "parts", "codebook")
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again.codec.autoencoder.config == pipeline.codec.autoencoder.config
    images = [model("a", seed=3, height=16, width=16).images[0].tobytes() for model in (pipeline, again)]
    assert images[0] == images[1]
    again.save_pretrained(tmp_path / "copy")
    for name in ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert (index["_class_name"], index["vae"]) == ("CodebookDiffusionPipeline", ["diffusers", "VQModel"])

    theirs = VQModel.from_pretrained(tmp_path / "model" / "vae")
    UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    latents = torch.randn(1, 4, 8, 8)
    z = latents * torch.tensor(again.codec.std).view(1, 4, 1, 1) + torch.tensor(again.codec.mean).view(1, 4, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(again.codec.decode(latents), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
        # Stable Diffusion cannot decode with it, and says so instead of drawing something else.
        with pytest.raises((TypeError, ValueError, AttributeError)):
            StableDiffusionPipeline.from_pretrained(tmp_path / "model")("a", num_inference_steps=1, output_type="np")


def test_a_first_stage_of_another_class_is_named(saved):
    tiny.edit_json(saved / "vae" / "config.json", _class_name="AutoencoderTiny")
    assert "describes an AutoencoderTiny; a first stage is an AutoencoderKL or a VQModel" in fault(saved)
    tiny.edit_json(saved / "vae" / "config.json", _class_name="VQModel")
    assert "vae/config.json" in fault(saved)
