"""Adapters on a UNet alone: what trains, what changes, what comes back; files that are none."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from ldm.adapters import (
    AdapterConfig,
    adapter_names,
    adapter_tensors,
    adapter_weights,
    add_adapter,
    delete_adapter,
    is_merged,
    load_adapter,
    load_adapter_tensors,
    merge_adapters,
    remove_adapters,
    save_adapter,
    set_adapters,
    train_adapter,
    unmerge_adapters,
)
from ldm.models import UNet, UNetConfig, enable_gradient_checkpointing, set_attention_backend

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
    load_adapter_tensors(twin, adapter_tensors(unet, "style"), "style")
    torch.testing.assert_close(output(twin), output(unet))
    merge_adapters(unet)
    other = copy.deepcopy(unet)
    unmerge_adapters(other)  # from its own record, in its own weights
    assert is_merged(unet) and not is_merged(other)
    torch.testing.assert_close(output(other), output(twin))
    averaged = torch.optim.swa_utils.AveragedModel(twin)
    averaged.update_parameters(twin)
    torch.testing.assert_close(output(averaged.module), output(twin))


def test_tensors_come_back_exactly_or_not_at_all(unet):
    add_adapter(unet, SMALL)
    train(unet)
    kept = {key: value.clone() for key, value in adapter_tensors(unet).items()}
    assert min(kept) == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"
    train(unet)
    first = min(kept)
    for wrong in (
        kept | {first: torch.ones(3, 16)},
        {k: v for k, v in kept.items() if k != first},
        kept | {"x": kept[first]},
    ):
        with pytest.raises(ValueError, match=r"1 tensors do not fit the adapter 'default' \(first: (down_blocks|x)"):
            load_adapter_tensors(unet, wrong)
    assert not all(torch.equal(value, kept[key]) for key, value in adapter_tensors(unet).items())
    load_adapter_tensors(unet, kept)
    assert all(torch.equal(value, kept[key]) for key, value in adapter_tensors(unet).items())


def test_weights_add_up_and_adapters_go_one_by_one(unet):
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
    set_adapters(unet, {"style": 1.0, "subject": 0.5})
    delete_adapter(unet, "subject")
    assert adapter_weights(unet) == {"style": 1.0}
    torch.testing.assert_close(output(unet), alone["style"])
    assert isinstance(unet.down_blocks[0].resnets[0].conv1, torch.nn.Conv2d)  # no adapter left there
    delete_adapter(unet, "style")
    assert same_network(unet, original) and adapter_names(unet) == ()


def test_deleting_leaves_off_what_is_off(unet):
    plain = output(unet).detach()
    for name in ("style", "subject"):
        add_adapter(unet, SMALL, name)
        randomise(unet, name)
    set_adapters(unet, {"style": 1.0})
    delete_adapter(unet, "style")
    assert adapter_weights(unet) == {}
    assert torch.equal(output(unet), plain)


def test_merging_without_any_on_gives_the_plain_network(unet):
    original = snapshot(unet)
    add_adapter(unet, SMALL)
    randomise(unet)
    set_adapters(unet, {})
    merge_adapters(unet)
    assert same_network(unet, original)
    for call in (lambda: merge_adapters(unet), lambda: delete_adapter(unet), lambda: train_adapter(unet)):
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
        return folder, "hada_w1_a is no weight of a LoRA; DoRA, LoHa"
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
    settings = {
        "settings that are no JSON": ("{", "settings that are no JSON"),
        "settings that are a list": ("[]", "no JSON object"),
        "alpha that is a word": (json.dumps({"unet.lora_alpha": "x"}), "is no number"),
        "a pattern that is a list": (json.dumps({"unet.alpha_pattern": [1]}), "is no number"),
        "a pattern that is no expression": (json.dumps({"unet.alpha_pattern": {"(": 1}}), "is no pattern"),
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
        "settings that are no JSON",
        "settings that are a list",
        "alpha that is a word",
        "a pattern that is a list",
        "a pattern that is no expression",
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
    with pytest.raises(ValueError, match=r"no file or folder someone/style, and the hub did not give it \(no route\)"):
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
        disk.setattr("ldm.adapters.files.save", full)
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
