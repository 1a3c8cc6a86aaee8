"""Adapters on a UNet alone: what trains, what changes, what comes back; files that are none."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from ldm.lora import (
    AdapterConfig,
    adaptable_layers,
    adapter_names,
    adapter_weights,
    add_adapter,
    is_merged,
    merge_adapters,
    remove_adapters,
    set_adapters,
    train_adapter,
    unmerge_adapters,
)
from ldm.lora_files import compvis_names, load_adapter, save_adapter
from ldm.models import UNet, UNetConfig, enable_gradient_checkpointing, set_attention_backend
from tests.tiny import adapter_tensors

SHAPE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
FILE = "pytorch_lora_weights.safetensors"
SMALL = AdapterConfig(rank=2, alpha=3.0)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    network = UNet(UNetConfig(**SHAPE))
    for parameter in network.parameters():  # a new network predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def output(unet):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return unet(x, torch.tensor([3, 700]), text)


def randomise(unet, name="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(unet, name).values():
        tensor.normal_(std=0.2, generator=generator)


def snapshot(unet):
    return {name: (value.clone(), value.dtype) for name, value in unet.state_dict().items()}


def same_network(unet, before):
    after = snapshot(unet)
    return after.keys() == before.keys() and all(
        torch.equal(after[name][0], before[name][0]) and after[name][1] == before[name][1] for name in before
    )


def train(unet, steps=3):
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        output(unet).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_new_adapter_changes_nothing_and_follows_from_its_seed(unet):
    other, third = copy.deepcopy(unet), copy.deepcopy(unet)
    before, state = output(unet), torch.get_rng_state()
    add_adapter(unet, SMALL, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(unet), before)
    torch.manual_seed(99)
    add_adapter(other, SMALL, seed=4)
    add_adapter(third, SMALL, seed=5)
    one, two, three = (adapter_tensors(network) for network in (unet, other, third))
    assert all(torch.equal(one[key], two[key]) for key in one)
    down = [key for key in one if ".lora_A." in key]
    assert len(down) == 32 and not any(torch.equal(one[key], three[key]) for key in down)
    # Uniform in ±1/√in, as peft draws it; 32 layers of two rows.
    drawn = torch.cat([(one[key] * one[key].shape[1] ** 0.5).flatten() for key in down])
    assert drawn.abs().max() <= 1 and abs(float(drawn.var()) - 1 / 3) < 0.03


def test_the_formula(unet):
    """W x + w (α / r) B A x, for a linear layer and for a convolution with a stride."""
    targets = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "downsamplers.0.conv")
    add_adapter(unet, AdapterConfig(rank=2, alpha=5.0, target_modules=targets))
    randomise(unet)
    set_adapters(unet, {"default": 0.3})
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    tensors, x = adapter_tensors(unet), torch.randn(3, 16)
    down, up = (tensors[f"{targets[0]}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.3 * 2.5 * x @ down.T @ up.T)
    conv, x = unet.down_blocks[0].downsamplers[0].conv, torch.randn(1, 8, 6, 6)
    down, up = (tensors[f"down_blocks.0.downsamplers.0.conv.lora_{which}.weight"] for which in "AB")
    hidden = torch.nn.functional.conv2d(x, down, stride=2, padding=1)
    expected = conv.base_layer(x) + 0.3 * 2.5 * torch.nn.functional.conv2d(hidden, up)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_changes_the_adapter_and_nothing_else(unet, recompute):
    original = snapshot(unet)
    add_adapter(unet, SMALL, "style")
    add_adapter(unet, SMALL, "subject", seed=1)  # the second trains, the first is on and frozen
    randomise(unet, "style")
    enable_gradient_checkpointing(unet, recompute)
    set_attention_backend(unet, "sdpa")
    unet.train()
    before, start = snapshot(unet), output(unet).detach()
    train(unet)
    changed = {name for name, (value, _) in snapshot(unet).items() if not torch.equal(value, before[name][0])}
    assert changed == {f"{key.removesuffix('.weight')}.subject.weight" for key in adapter_tensors(unet, "subject")}
    assert (output(unet) - start).abs().max() > 1e-3
    remove_adapters(unet)
    assert same_network(unet, original)
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert not hasattr(unet, "peft_config")


def test_recomputing_gives_the_same_gradients(unet):
    add_adapter(unet, SMALL)
    randomise(unet)
    gradients = []
    for recompute in (False, True):
        enable_gradient_checkpointing(unet, recompute)
        unet.zero_grad()
        output(unet).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.requires_grad])
    assert len(gradients[0]) == 64
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_deep_copy_is_another_network_with_the_same_adapters(unet):
    add_adapter(unet, SMALL, "style")
    randomise(unet, "style")
    twin = copy.deepcopy(unet)
    expected = output(twin).detach()
    train(unet)
    torch.testing.assert_close(output(twin), expected)
    assert (output(unet) - expected).abs().max() > 1e-3
    for key, tensor in adapter_tensors(twin, "style").items():
        tensor.copy_(adapter_tensors(unet, "style")[key])
    torch.testing.assert_close(output(twin), output(unet))
    merge_adapters(unet)
    other = copy.deepcopy(unet)
    unmerge_adapters(other)  # from its own record, in its own weights
    assert is_merged(unet) and not is_merged(other)
    torch.testing.assert_close(output(other), output(twin))
    averaged = torch.optim.swa_utils.AveragedModel(twin)
    averaged.update_parameters(twin)
    torch.testing.assert_close(output(averaged.module), output(twin))


def test_adapter_tensors_are_named_by_layer(unet):
    add_adapter(unet, SMALL)
    assert min(adapter_tensors(unet)) == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"


def test_weights_add_up_and_removing_restores_the_network(unet):
    first, original, plain = copy.deepcopy(unet), snapshot(unet), output(unet).detach()
    everywhere = AdapterConfig(rank=1, target_modules=("conv1", "to_q"))
    alone = {}
    for seed, (name, config) in enumerate({"style": SMALL, "subject": everywhere}.items()):
        network = copy.deepcopy(first)
        for target in (network, unet):
            add_adapter(target, config, name)
            randomise(target, name, seed)
        alone[name] = output(network).detach()
    assert adapter_names(unet) == ("style", "subject") and adapter_weights(unet) == {"style": 1.0, "subject": 1.0}
    assert (output(unet) - alone["style"]).abs().max() > 1e-3
    for name in alone:
        set_adapters(unet, {name: 1})
        torch.testing.assert_close(output(unet), alone[name])
    set_adapters(unet, {"subject": 0.0})
    torch.testing.assert_close(output(unet), plain)
    set_adapters(unet, {})
    assert torch.equal(output(unet), plain)
    remove_adapters(unet)
    assert same_network(unet, original) and adapter_names(unet) == ()


def test_merging_without_any_on_gives_the_plain_network(unet):
    original = snapshot(unet)
    add_adapter(unet, SMALL)
    randomise(unet)
    set_adapters(unet, {})
    merge_adapters(unet)
    assert same_network(unet, original)
    for call in (lambda: merge_adapters(unet), lambda: train_adapter(unet)):
        with pytest.raises(ValueError, match="unmerge them first"):
            call()
    with pytest.raises(ValueError, match="unmerge them before"):
        add_adapter(unet, SMALL, "other")


def test_a_merge_that_overflows_is_refused_and_undone(unet):
    add_adapter(unet, SMALL)
    randomise(unet)
    before = snapshot(unet)
    set_adapters(unet, {"default": 1e39})
    with pytest.raises(ValueError, match="not finite; lower"):
        merge_adapters(unet)
    assert same_network(unet, before) and not is_merged(unet)
    set_adapters(unet, {"default": 1.0})
    merge_adapters(unet)


def test_a_half_precision_network_trains_a_float32_adapter(unet):
    unet.to(torch.bfloat16)
    add_adapter(unet, SMALL)
    assert {tensor.dtype for tensor in adapter_tensors(unet).values()} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_what_is_loaded_can_be_trained_further(unet, tmp_path):
    other = copy.deepcopy(unet)
    add_adapter(unet, SMALL)
    randomise(unet)
    save_adapter(tmp_path, unet)
    save_adapter(tmp_path, unet)  # over the old one
    load_adapter(other, tmp_path, weight=0.5)
    assert adapter_weights(other) == {"default": 0.5}
    assert not any(parameter.requires_grad for parameter in other.parameters())
    set_adapters(other, {"default": 1.0})
    torch.testing.assert_close(output(other), output(unet))
    train_adapter(other)
    before = {key: value.clone() for key, value in adapter_tensors(other).items()}
    train(other)
    assert not any(torch.equal(value, before[key]) for key, value in adapter_tensors(other).items())


def test_a_layer_in_the_other_form_of_a_1x1_convolution(unet, tmp_path):
    other = copy.deepcopy(unet)
    add_adapter(unet, AdapterConfig(rank=2, target_modules=("proj_in", "to_q")))
    randomise(unet)
    tensors = {}
    for key, value in adapter_tensors(unet).items():
        tensors[key] = value.flatten(1).contiguous() if "proj_in" in key else value[:, :, None, None].contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path)
    torch.testing.assert_close(output(other), output(unet))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0; it must be a number greater than 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"target_modules": ()}, r"target_modules is \(\)"),
        ({"target_modules": "to_q"}, "target_modules is 'to_q'; it must be a list"),
        ({"target_modules": ("",)}, "target_modules is"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**config)


@pytest.mark.parametrize(("target", "near"), [("to_qq", "to_q"), ("conv_1", "conv1"), ("o_q", "to_q")])
def test_a_target_that_matches_nothing_names_near_ones(unet, target, near):
    before = snapshot(unet)
    with pytest.raises(ValueError, match=rf"has '{target}', which is the end of no linear.* near it are .*\b{near}\b"):
        add_adapter(unet, AdapterConfig(target_modules=("to_v", target)))
    with pytest.raises(ValueError, match=r"has 'norm1', which is .* here; usual are to_q, to_k, to_v, to_out\.0$"):
        add_adapter(unet, AdapterConfig(target_modules=("norm1",)))
    assert same_network(unet, before) and adapter_names(unet) == ()


def broken(folder, how):
    """A file or folder that is no adapter for the UNet here, and what must be said of it."""
    path = folder / FILE
    good = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    if how == "missing":
        return folder / "nowhere" / "a.safetensors", "there is no .*nowhere"
    if how == "empty folder":
        return folder, f"holds no {FILE}"
    if how == "empty file":
        path.write_bytes(b"")
        return path, "is damaged or no safetensors file"
    if how == "no tensors":
        save_file({}, path)
        return path, "holds no weights"
    if how == "cut off":
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:-20])
        return path, "is damaged or no safetensors file"
    if how == "a pickle inside":
        torch.save(good, path)
        return folder, "is damaged or no safetensors file"
    if how == "pickled":
        torch.save(good, folder / "pytorch_lora_weights.bin")
        return folder / "pytorch_lora_weights.bin", "pickled, which is never opened"
    if how == "only pickled":
        torch.save(good, folder / "pytorch_lora_weights.bin")
        return folder, "holds only pytorch_lora_weights.bin, which is pickled"
    if how == "several":
        for name in "abcd":
            save_file(good, folder / f"{name}.safetensors")
        return folder, r"holds 4 .safetensors files \(a.safetensors, b.safetensors, c.safetensors, …\); name one"
    if how == "a whole model":
        save_file({"conv_in.weight": torch.ones(8, 4, 3, 3)}, path)
        return folder, "conv_in.weight is no weight of a LoRA"
    if how == "unrelated beside good":
        save_file(good | {"optimizer.step": torch.ones(1)}, path)
        return folder, "optimizer.step is no weight of a LoRA"
    if how == "LoHa":
        save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, path)
        return folder, r"holds factors of LoHa \(1 of 1 tensors, such as lora_unet_conv_in.hada_w1_a\)"
    if how == "a vector":
        save_file(good | {"unet.conv_in.lora_A.weight": torch.tensor(1.0)}, path)
        return folder, r"conv_in has a weight of shape \[\]"
    if how == "rank 0":
        empty = {
            "unet.conv_in.lora_A.weight": torch.ones(0, 4, 3, 3),
            "unet.conv_in.lora_B.weight": torch.ones(8, 0, 1, 1),
        }
        save_file(empty, path)
        return folder, r"conv_in has a weight of shape \[0, 4, 3, 3\]"
    if how == "ranks that differ":
        save_file(good | {"unet.conv_in.lora_B.weight": torch.ones(8, 3, 1, 1)}, path)
        return folder, r"conv_in has a weight of shape \[8, 3, 1, 1\], but this model needs \[8, 2, 1, 1\]"
    if how == "twice":
        save_file(good | {key.replace("unet.", "lora_unet_"): value.clone() for key, value in good.items()}, path)
        return folder, "holds weights of conv_in under two names"
    if how == "other form twice":
        both = {
            f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.{name}.lora_A.weight"
            for name in ("to_out", "to_out.0")
        }
        save_file(
            {key: torch.ones(1, 16) for key in both} | {key.replace("_A", "_B"): torch.ones(16, 1) for key in both},
            path,
        )
        return folder, "has not exactly one A and one B"
    if how == "alpha that is none":
        save_file(good | {"unet.conv_in.alpha": torch.tensor([1.0, 2.0])}, path)
        return folder, "alpha of conv_in is nan"
    if how == "alpha that is complex":
        save_file(good | {"unet.conv_in.alpha": torch.tensor(2j)}, path)
        return folder, "alpha of conv_in is nan"
    settings = {
        "settings that are no JSON": ("{", "settings that are no JSON"),
        "settings that are a list": ("[]", "no JSON object"),
        "alpha that is a word": (json.dumps({"unet.lora_alpha": "x"}), "is no number"),
        "a pattern that is a list": (json.dumps({"unet.alpha_pattern": [1]}), "is no number"),
        "a pattern that is no expression": (json.dumps({"unet.alpha_pattern": {"(": 1}}), "is no pattern"),
        "a pattern of groups": (json.dumps({"unet.alpha_pattern": {"((.)+)+!": 1}}), "could take hours"),
        "a pattern of many repeats": (json.dumps({"unet.alpha_pattern": {".*.*.*.*!": 1}}), "could take hours"),
        "settings that are too deep": ("[" * 100_000, "settings that are no JSON"),
    }
    save_file(good, path, {"lora_adapter_metadata": settings[how][0]})
    return folder, settings[how][1]


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty folder",
        "empty file",
        "no tensors",
        "cut off",
        "a pickle inside",
        "pickled",
        "only pickled",
        "several",
        "a whole model",
        "unrelated beside good",
        "LoHa",
        "a vector",
        "rank 0",
        "ranks that differ",
        "twice",
        "other form twice",
        "alpha that is none",
        "alpha that is complex",
        "settings that are no JSON",
        "settings that are a list",
        "alpha that is a word",
        "a pattern that is a list",
        "a pattern that is no expression",
        "a pattern of groups",
        "a pattern of many repeats",
        "settings that are too deep",
    ],
)
def test_what_is_no_adapter_is_refused_by_name(unet, tmp_path, how):
    source, message = broken(tmp_path, how)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(unet, source)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert same_network(unet, before) and adapter_names(unet) == ()


def test_a_hub_id_is_downloaded_or_the_reason_told(unet, tmp_path, monkeypatch):
    import huggingface_hub

    add_adapter(unet, SMALL)
    randomise(unet)
    other = copy.deepcopy(unet)
    remove_adapters(other)
    save_adapter(tmp_path, unet)
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    names = ["README.md", FILE, "checkpoint-500/model.safetensors"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_adapter(other, "someone/style")
    assert asked == [("someone/style", FILE)]
    torch.testing.assert_close(output(other), output(unet))
    names.remove(FILE)
    with pytest.raises(ValueError, match=f"someone/style holds no {FILE}"):
        load_adapter(other, "someone/style", "b")
    with pytest.raises(ValueError, match="there is no just_a_name; name a folder"):
        load_adapter(other, "just_a_name", "b")

    def fails(name):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fails)
    with pytest.raises(ValueError, match=r"no file someone/style, and the hub did not give it \(no route\)"):
        load_adapter(other, "someone/style", "b")


def test_saving_is_atomic_and_needs_an_adapter_that_is_not_merged(unet, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no adapter 'default' here; there are: none"):
        save_adapter(tmp_path / "a", unet)
    add_adapter(unet, SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(tmp_path / "file", unet)
    before = save_adapter(tmp_path / "b", unet).read_bytes()
    randomise(unet)

    def full(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr("ldm.lora_files.save", full)
        with pytest.raises(OSError, match="no space"):
            save_adapter(tmp_path / "b", unet)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "b").iterdir()] == [(FILE, before)]
    merge_adapters(unet)
    with pytest.raises(ValueError, match="merged into the weights; unmerge"):
        save_adapter(tmp_path / "b", unet)


def test_without_peft_the_extra_is_named(unet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"pip install 'peft>=0.20'$"):
        add_adapter(unet, SMALL)
    assert adapter_names(unet) == () and not is_merged(unet)
    remove_adapters(unet)
    set_adapters(unet, {})
    assert same_network(unet, before) and unet.conv_in.weight.requires_grad


DOWN, ATTENTION_DOWN, UP, ATTENTION_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
LAYOUTS = {
    "stable diffusion 1.5": {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": (ATTENTION_DOWN,) * 3 + (DOWN,),
        "up_block_types": (UP,) + (ATTENTION_UP,) * 3,
        "layers_per_block": 2,
    },
    "attention at the bottom": {},
    "attention everywhere, two transformer layers": {
        "down_block_types": (ATTENTION_DOWN,) * 2,
        "up_block_types": (ATTENTION_UP,) * 2,
        "transformer_layers_per_block": 2,
        "layers_per_block": 3,
    },
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": (ATTENTION_DOWN,),
        "up_block_types": (ATTENTION_UP,),
    },
}


def network(**layout):
    with torch.device("meta"):
        return UNet(UNetConfig(**(SHAPE | layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_compvis_are_those_that_the_converter_of_diffusers_reads(layout):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = network(**LAYOUTS[layout])
    names = compvis_names(adaptable_layers(unet))
    assert names.keys() == adaptable_layers(unet).keys() and len(set(names.values())) == len(names)
    # A checkpoint of CompVis whose weights say whose they are.
    checkpoint = {
        f"model.diffusion_model.{theirs}.{kind}": f"{name}.{kind}"
        for name, theirs in names.items()
        for kind in ("weight", "bias")
    }
    read = convert_ldm_unet_checkpoint(checkpoint, unet.config.to_dict())
    assert {f"{name}.weight" for name in names} <= read.keys() and all(read[key] == key for key in read)


def test_names_of_stable_diffusion_1_5():
    names = compvis_names(adaptable_layers(network(**LAYOUTS["stable diffusion 1.5"])))
    for ours, theirs in {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_2": "time_embed.2",
        "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.attentions.1.proj_out": "input_blocks.8.1.proj_out",
        "down_blocks.3.resnets.1.time_emb_proj": "input_blocks.11.0.emb_layers.1",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
        "conv_out": "out.2",
    }.items():
        assert names[ours] == theirs


COMPVIS_FORMS = {
    "kohya": lambda name, end: f"lora_unet_{name.replace('.', '_')}.lora_{'down' if end == 'A' else 'up'}.weight",
    "diffusers' prefix": lambda name, end: f"unet.{name}.lora_{end}.weight",
    "its own prefix": lambda name, end: f"diffusion_model.{name}.lora_{end}.weight",
    "that of a whole model": lambda name, end: f"model.diffusion_model.{name}.lora_{end}.weight",
    "peft": lambda name, end: f"base_model.model.{name}.lora_{end}.weight",
    "none": lambda name, end: f"{name}.lora_{end}.weight",
}


@pytest.mark.parametrize("form", COMPVIS_FORMS)
def test_a_file_with_names_of_compvis_is_the_same_adapter(form, tmp_path):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**(SHAPE | {"layers_per_block": (2, 1)})))
    other = copy.deepcopy(unet)
    some = ("conv_in", "conv_out", "linear_1", "time_emb_proj", "conv", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj")
    add_adapter(unet, AdapterConfig(rank=2, alpha=2.0, target_modules=some))
    randomise(unet)
    expected = adapter_tensors(unet)
    names = compvis_names(adaptable_layers(unet))
    renamed = {}
    for key, value in expected.items():
        layer, _, end = key.removesuffix(".weight").rpartition(".lora_")
        renamed[COMPVIS_FORMS[form](names[layer], end)] = value
    save_file(renamed, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path)
    found = adapter_tensors(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# What files hold beside A, B and α, or in their place: key → what must be said of it.
OTHERS = {
    "lora_unet_conv_in.dora_scale": "magnitudes of DoRA",
    "unet.conv_in.lora_magnitude_vector": "magnitudes of DoRA",
    "base_model.model.conv_in.lora_magnitude_vector.default.weight": "magnitudes of DoRA",
    "lora_unet_conv_in.hada_t1": "factors of LoHa",
    "lora_unet_conv_in.lokr_w2_a": "factors of LoKr",
    "lora_unet_conv_in.oft_blocks": "rotations of OFT",
    "unet.conv_in.oft_R.weight": "rotations of OFT",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.on_input": "scales of IA3",
    "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.ia3_l": "scales of IA3",
    "lora_unet_conv_in.a1.weight": "factors of GLoRA",
    "base_model.model.conv_in.vera_lambda_b": "vectors of VeRA",
    "base_model.model.conv_in.lora_E": "singular values of AdaLoRA",
    "lora_unet_conv_in.lora_mid.weight": "cores of a Tucker decomposition",
    "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": "a LoRA of embeddings",
    "unet.conv_in.lora_B.bias": "biases beside A or B",
    "lora_unet_conv_in.lora_up.bias": "biases beside A or B",
    "lora_unet_conv_in.diff": "whole differences of weights",
    "diffusion_model.conv_in.diff_b": "whole differences of weights",
    "lora_unet_conv_in.w_norm": "whole differences of weights",
    "base_model.model.conv_out.modules_to_save.weight": "whole layers saved beside it",
    "bundle_emb.corgi.string_to_param.*": "embeddings of textual inversion",
    "emb_params": "embeddings of textual inversion",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "layers of Stable Diffusion XL",
    "lora_unet_label_emb_0_0.lora_down.weight": "layers of Stable Diffusion XL",
    "unet.add_embedding.linear_1.lora_A.weight": "layers of Stable Diffusion XL",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "layers of a transformer such as Flux",
    "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": "layers of a transformer such as Flux",
    "transformer.transformer_blocks.3.attn.to_q.lora_A.weight": "layers of a transformer such as Flux",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": "layers of a transformer such as Flux",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "layers of a transformer such as Flux",
    "text_encoders.t5xxl.transformer.encoder.block.0.lora_A.weight": "layers of a transformer such as Flux",
    "unet.down_blocks.0.motion_modules.0.proj_in.lora_A.weight": "layers of a motion module",
    "lora_controlnet_input_hint_block_0.lora_down.weight": "layers of a ControlNet",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_kinds_are_named_as_what_they_are(key, unet, tmp_path):
    good = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
    save_file(good | {key: torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no plain LoRA for this model") as caught:
        load_adapter(unet, tmp_path)
    assert f"it holds {OTHERS[key]}" in str(caught.value) and f"(1 of 3 tensors, such as {key}); " in str(caught.value)
    assert "\n" not in str(caught.value) and adapter_names(unet) == ()


def test_all_that_a_file_holds_is_said_at_once_and_the_width_of_its_text_tells_the_model(unet, tmp_path):
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(2, 2048),
        f"{layer}.lora_up.weight": torch.ones(640, 2),
        f"{layer}.dora_scale": torch.ones(640),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no plain") as caught:
        load_adapter(unet, tmp_path)
    assert str(caught.value).endswith(
        f"it holds layers of Stable Diffusion XL (1 of 3 tensors, such as {layer}.lora_down.weight) and magnitudes of "
        f"DoRA (1 of 3 tensors, such as {layer}.dora_scale); choose one for Stable Diffusion 1.x or 2.x"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn, but weights are float32, float16"),
        (lambda t: t.to(torch.float8_e5m2), "is stored as float8_e5m2, but"),
        (lambda t: t.to(torch.int8), "is stored as int8, but"),
        (lambda t: t.to(torch.bool), "is stored as bool, but"),
        (lambda t: t * torch.nan, "holds numbers that are not finite"),
        (lambda t: t.double() * 1e300, "holds 1e\\+300, which is too large for float32; take bfloat16 or float32"),
    ],
)
@pytest.mark.parametrize("end", ["A", "B"])
def test_weights_that_are_no_finite_numbers_are_refused(change, said, end, unet, tmp_path):
    good = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
    key = f"unet.conv_in.lora_{end}.weight"
    save_file(good | {key: change(good[key])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a.safetensors: conv_in {said}"):
        load_adapter(unet, tmp_path)
    assert adapter_names(unet) == ()
    unet.half()
    save_file(good | {key: good[key] * 1e5}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: conv_in holds 1e\+05, which is too large for float16"):
        load_adapter(unet, tmp_path)


def test_without_peft_no_file_is_looked_at(unet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="LoRA needs peft, which cannot be imported"):
        load_adapter(unet, tmp_path)


@pytest.mark.parametrize("prefix", ["unet._orig_mod.", "unet.module._orig_mod.", "_orig_mod."])
def test_adapters_of_compiled_networks_are_read_as_those_of_plain_ones(unet, tmp_path, prefix):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for start, name in (("unet.", "plain"), (prefix, "wrapped")):
        generator = torch.Generator().manual_seed(0)
        ends = {f"{start}{layer}.lora_{part}.weight": size for part, size in (("A", (2, 16)), ("B", (16, 2)))}
        weights = {key: torch.randn(size, generator=generator) for key, size in ends.items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
        load_adapter(unet, tmp_path / f"{name}.safetensors", name)
    tensors = adapter_tensors(unet, "wrapped")
    assert tensors.keys() == adapter_tensors(unet, "plain").keys()
    assert all(torch.equal(value, tensors[key]) for key, value in adapter_tensors(unet, "plain").items())
