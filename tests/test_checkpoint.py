"""Folders on disk: atomic, strict, and each fault named in one line."""

import json
import shutil

import pytest
import torch

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
