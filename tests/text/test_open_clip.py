"""Towers of open_clip against open_clip itself; those marked `clip` skip without the extra `clip`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.disk import read_json
from ldm.text import load_text_encoder, load_text_encoder_folders
from ldm.text.loading import convert_open_clip

CAPTIONS = [
    "A corgi wearing a hat",
    "",
    "wow! cool !! really?! ! (yes), it's 42% done...",
    "naïve café: 日本 🙂",
    "one two three " * 40,
]


@pytest.fixture(scope="module")
def open_clip() -> Any:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A torchvision built for another torch than this has no compiled operators; it imports once
        # they are declared, and the text tower uses none of them.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("open_clip")


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}


def tiny_model(open_clip: Any, folder: Path, **changes: Any) -> tuple[Any, str]:
    """A tiny model known to open_clip, and the name of its text tower with weights on disk."""
    name = f"tiny-{len(list(folder.iterdir()))}"
    (folder / f"{name}.json").write_text(json.dumps(TINY | changes))
    open_clip.add_model_config(folder / f"{name}.json")
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are no longer 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, weights)
    return model, f"open_clip:{name}:{weights}"


@torch.no_grad()
def open_clip_states(open_clip: Any, model: Any, captions: list[str], layer: str) -> Tensor:
    """States of all positions as open_clip computes them, by looking into its text tower."""
    tower = getattr(model, "text", model)
    seen: dict[str, Tensor] = {}
    blocks = tower.transformer.resblocks
    hooks = [
        blocks[-2].register_forward_hook(lambda _, __, states: seen.update(penultimate=states)),
        tower.ln_final.register_forward_hook(lambda _, __, states: seen.update(last=states)),
    ]
    model.encode_text(open_clip.tokenizer.tokenize(captions, context_length=20))
    for hook in hooks:
        hook.remove()
    return seen["last"] if layer == "last" else tower.ln_final(seen["penultimate"])


@pytest.mark.clip
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize(
    "changes", [{}, {"quick_gelu": True}, {"custom_text": True}], ids=["gelu", "quick_gelu", "custom_text"]
)
def test_states_are_those_of_open_clip(layer: str, changes: dict[str, Any], open_clip: Any, tmp_path: Path) -> None:
    model, name = tiny_model(open_clip, tmp_path, **changes)
    encoder = load_text_encoder(name, layer=layer)
    expected = open_clip_states(open_clip, model, CAPTIONS, layer)
    assert (encoder.max_length, encoder.hidden_size, encoder.uses_attention_mask) == (20, 32, False)
    torch.testing.assert_close(encoder(CAPTIONS), expected, rtol=1e-5, atol=1e-5)
    tokens = encoder.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, open_clip.tokenizer.tokenize(CAPTIONS, context_length=20))
    assert encoder.tokenizer.pad_token_id == 0


@pytest.mark.clip
def test_saved_folders_need_open_clip_no_longer(open_clip: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import transformers

    _, name = tiny_model(open_clip, tmp_path)
    encoder = load_text_encoder(name, layer="penultimate")
    states = encoder(CAPTIONS)
    encoder.save(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    folders = tmp_path / "saved/text_encoder", tmp_path / "saved/tokenizer"
    torch.testing.assert_close(load_text_encoder_folders(*folders)(CAPTIONS), states, rtol=0, atol=0)
    assert encoder.library_classes["text_encoder"] == ("transformers", "CLIPTextModel")
    # As diffusers loads them, by the class that model_index.json names.
    tokenizer = getattr(transformers, encoder.library_classes["tokenizer"][1]).from_pretrained(folders[1])
    tokens = tokenizer(
        CAPTIONS,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    assert torch.equal(tokens.input_ids, open_clip.tokenizer.tokenize(CAPTIONS, context_length=20))
    model = transformers.CLIPTextModel.from_pretrained(folders[0])
    torch.testing.assert_close(model(tokens.input_ids)[0], states, rtol=0, atol=0)
    assert read_json(folders[0] / "config.json")["num_hidden_layers"] == 2


@pytest.mark.clip
def test_half_precision_is_kept_on_disk(open_clip: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, name = tiny_model(open_clip, tmp_path)
    save_file({key: tensor.half().contiguous() for key, tensor in model.state_dict().items()}, name.split(":", 2)[2])
    encoder = load_text_encoder(name)
    encoder.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/text_encoder/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert encoder(["a cat"]).dtype == torch.float32


@pytest.mark.clip
@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("coca_ViT-B-32", "multimodal_cfg"),
        ("ViT-B-16-SigLIP", "hf_tokenizer_name"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("ViT-H-14-worldwide", "vocab_size"),
    ],
)
def test_other_towers_are_refused_by_name(model: str, why: str, open_clip: Any) -> None:
    with pytest.raises(ValueError, match=f"{model} is not the plain text transformer of CLIP.*{why}"):
        load_text_encoder(f"open_clip:{model}:anything")


@pytest.mark.clip
def test_weights_that_cannot_be_had_are_one_clear_line(open_clip: Any, tmp_path: Path) -> None:
    for name, why in {
        "open_clip:ViT-B-33": "knows no model 'ViT-B-33'",
        "open_clip:ViT-B-32": "neither a file nor a pretrained tag.*laion2b_s34b_b79k",
        "open_clip:ViT-B-32:nowhere.safetensors": "'nowhere.safetensors' is neither a file",
        "open_clip:ViT-B-32:openai": "name it open_clip:ViT-B-32-quickgelu:openai",
    }.items():
        with pytest.raises(ValueError, match=why):
            load_text_encoder(name)
    with pytest.raises(ValueError, match="layer='first' is not known: choose last or penultimate"):
        load_text_encoder("open_clip:ViT-B-32:openai", layer="first")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="would have to be unpickled: convert it to safetensors"):
        load_text_encoder(f"open_clip:ViT-B-32:{tmp_path / 'weights.pt'}")
    _, name = tiny_model(open_clip, tmp_path)
    with pytest.raises(ValueError, match="width 32 with 3 layers, not 512 with 12: it is not ViT-B-32"):
        load_text_encoder(f"open_clip:ViT-B-32:{name.split(':', 2)[2]}")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no token_embedding\.weight: it is no model of open_clip"):
        load_text_encoder(f"open_clip:ViT-B-32:{tmp_path / 'other.safetensors'}")


def test_without_open_clip_the_way_out_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"ViT-B-32:openai needs open_clip.*pip install 'open-clip-torch>=3.3'$"):
        load_text_encoder("open_clip:ViT-B-32:openai")


def test_a_tower_is_refused_before_its_weights_are_downloaded(monkeypatch: Any, tmp_path: Path) -> None:
    def download(*_: Any) -> None:
        raise AssertionError("downloads")

    known = SimpleNamespace(
        get_model_config=lambda model: TINY | {"multimodal_cfg": {}},
        list_pretrained_tags_by_model=lambda model: ["tag"],
        get_pretrained_cfg=lambda model, tag: {},
        pretrained=SimpleNamespace(download_pretrained=download),
    )
    monkeypatch.setitem(sys.modules, "open_clip", known)
    with pytest.raises(ValueError, match="multimodal_cfg"):
        convert_open_clip("open_clip:coca:tag", "last", tmp_path)
