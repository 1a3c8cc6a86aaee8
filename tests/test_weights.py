"""Networks that were compiled or wrapped: what is saved has plain names, and files with other names are read."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm import Pipeline, hub, lora, lora_files
from ldm.training.checkpoints import TrainingState
from ldm.training.trainable import make_ema
from ldm.weights import find_weights, plain_name, plain_names, save_tensors
from tests import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


def compiled(module):
    return torch.compile(module, backend="eager")


def test_names_of_wrappers_are_left_out_wherever_they_stand():
    for name in (
        "_orig_mod.conv.weight",
        "module.conv.weight",
        "module._orig_mod.conv.weight",
        "_orig_mod.module.conv.weight",
        "conv._orig_mod.weight",
        "_fsdp_wrapped_module.conv._checkpoint_wrapped_module.weight",
        "conv.weight",
    ):
        assert plain_name(name) == "conv.weight"
    assert plain_name("submodule.my_module.weight") == "submodule.my_module.weight"
    with pytest.raises(ValueError, match=r"^here has a twice"):
        plain_names({"a": 1, "_orig_mod.a": 2}, "here")


def test_saved_tensors_are_readable_like_other_files(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def saved(tmp_path):
    tiny.pipeline(tmp_path / "parts", "latent").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pictures(folder):
    return Pipeline.from_pretrained(folder, device="cpu")("a", seed=1, height=16, width=16).images[0].tobytes()


@pytest.mark.parametrize("how", ["whole", "parts"])
def test_a_pipeline_of_compiled_networks_is_saved_as_one_that_was_not(how, saved, tmp_path):
    pipeline = Pipeline.from_pretrained(saved, device="cpu")
    pipeline.codec.source = None
    if how == "whole":
        pipeline.unet = compiled(pipeline.unet)
        pipeline.codec.autoencoder = compiled(pipeline.codec.autoencoder)
        pipeline.text_encoder.model = compiled(pipeline.text_encoder.model)
    else:
        pipeline.unet.mid_block = compiled(pipeline.unet.mid_block)
        pipeline.codec.autoencoder.decoder = compiled(pipeline.codec.autoencoder.decoder)
        for name, module in list(pipeline.text_encoder.model.named_modules()):
            if name.endswith("mlp"):
                parent = pipeline.text_encoder.model.get_submodule(name.rpartition(".")[0])
                parent.mlp = compiled(module)
    pipeline.save_pretrained(tmp_path / "again")
    for name in ("model_index.json", f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name
    pipeline.text_encoder.save(tmp_path / "text", changed=True)
    ours = load_file(tmp_path / "text" / "text_encoder" / "model.safetensors")
    assert ours.keys() == load_file(saved / "text_encoder" / "model.safetensors").keys()
    assert pipeline.text_encoder.fingerprint() == Pipeline.from_pretrained(saved).text_encoder.fingerprint()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_files_of_wrapped_networks_are_read_and_saved_with_plain_names(prefix, saved, tmp_path):
    before = pictures(saved)
    files = [saved / "unet" / WEIGHTS, saved / "vae" / WEIGHTS, saved / "text_encoder" / "model.safetensors"]
    plain = {path: set(load_file(path)) for path in files}
    for path in files:
        save_file({prefix + name: value for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert pictures(saved) == before
    Pipeline.from_pretrained(saved, device="cpu").save_pretrained(tmp_path / "again")
    for path in files:
        assert set(load_file(tmp_path / "again" / path.relative_to(saved))) == plain[path]
    assert pictures(tmp_path / "again") == before


def test_weights_with_and_without_a_prefix_in_one_file_are_refused(saved):
    for path in (saved / "unet" / WEIGHTS, saved / "text_encoder" / "model.safetensors"):
        tensors = load_file(path)
        key = min(tensors)
        save_file(tensors | {f"_orig_mod.{key}": tensors[key].clone()}, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{path.parent.name} has {key} twice"):
            Pipeline.from_pretrained(saved)
        save_file(tensors, path, {"format": "pt"})


def test_an_adapter_of_a_compiled_network_has_plain_names(saved, tmp_path):
    unet = Pipeline.from_pretrained(saved, device="cpu").unet
    lora.add_adapter(unet, lora.AdapterConfig(rank=2))
    other = copy.deepcopy(unet)
    other.mid_block = compiled(other.mid_block)
    for name, network in (("plain", unet), ("parts", other), ("whole", compiled(unet))):
        lora_files.save_adapter(tmp_path / name, network)
    files = [(tmp_path / name / lora_files.WEIGHTS).read_bytes() for name in ("plain", "parts", "whole")]
    assert files[0] == files[1] == files[2]


def test_training_goes_on_from_a_checkpoint_of_a_compiled_network_without_compiling(tmp_path):
    def networks(wrapped):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        model[2].requires_grad_(False)
        if wrapped:
            model[0] = compiled(model[0])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return TrainingState(model=model, optimizer=optimizer, ema=make_ema(model, 0.9))

    for first, second in ((True, False), (False, True)):
        made = networks(first)
        made.model(torch.ones(1, 2)).sum().backward()
        made.optimizer.step()
        made.ema.update_parameters(made.model)
        folder = tmp_path / str(first)
        folder.mkdir()
        made.save(folder)
        assert not [name for path in folder.iterdir() for name in load_file(path) if "_orig_mod" in name]
        gone_on = networks(second)
        assert gone_on.frozen_hash == made.frozen_hash
        gone_on.restore(folder, 1, None)
        for one, other in zip(made.model.parameters(), gone_on.model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert made.optimizer.state[one].keys() == gone_on.optimizer.state[other].keys()
        for one, other in zip(made.ema.parameters(), gone_on.ema.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("variant", "sharded"), [("fp16", True), ("bf16", False), ("mine", True)])
def test_any_variant_of_diffusers_opens_and_so_does_the_model_that_is_saved_from_it(variant, sharded, tmp_path):
    theirs = tiny.stable_diffusion()
    size = "20KB" if sharded else "10GB"
    theirs.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)
    assert len(list((tmp_path / "theirs" / "vae").glob(f"*{variant}*.safetensors"))) > 1 or not sharded
    pipeline = Pipeline.from_pretrained(tmp_path / "theirs", device="cpu")
    pipeline.save_pretrained(tmp_path / "again")
    pipeline.save_pretrained(tmp_path / "theirs")  # over what it was read from, and once more
    pipeline.save_pretrained(tmp_path / "theirs")
    type(theirs).from_pretrained(tmp_path / "again", safety_checker=None)
    wanted = pipeline("a", seed=1, num_inference_steps=2, height=16, width=16).images[0].tobytes()
    for name in ("again", "theirs"):
        again = Pipeline.from_pretrained(tmp_path / name, device="cpu")
        assert again("a", seed=1, num_inference_steps=2, height=16, width=16).images[0].tobytes() == wanted
    if sharded:
        index = json.loads((tmp_path / "again" / "vae" / f"{WEIGHTS}.index.json").read_text())
        assert all((tmp_path / "again" / "vae" / name).is_file() for name in index["weight_map"].values())
    assert not list((tmp_path / "again").rglob(f"{WEIGHTS.partition('.')[0]}*{variant}*"))


def test_of_several_variants_the_preferred_one_is_read_and_else_none(saved):
    weights = saved / "unet" / WEIGHTS
    zeros = {name: torch.zeros_like(value) for name, value in load_file(weights).items()}
    for variant in ("non_ema", "bf16"):
        save_file(zeros, weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"), {"format": "pt"})
    assert find_weights(saved / "unet", hub.WEIGHTS).shards == (weights,)
    weights.unlink()
    (half,) = find_weights(saved / "unet", hub.WEIGHTS).shards
    assert half.name == "diffusion_pytorch_model.bf16.safetensors"
    half.rename(half.with_name("diffusion_pytorch_model.a.safetensors"))
    with pytest.raises(ValueError, match="holds the variants a and non_ema of its weights"):
        find_weights(saved / "unet", hub.WEIGHTS)
