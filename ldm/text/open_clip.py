"""Text towers of open_clip, rewritten as the CLIP text model of transformers that computes the same.

Both are the text transformer of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4).
"""

import gzip
import importlib
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ldm import disk
from ldm.progress import error_reason
from ldm.requirements import pip_install
from ldm.weights import WEIGHTS_NAME, check_weights, plain_name, save_tensors, tensor_names

PREFIX = "open_clip:"

_LAYERS_LEFT_OUT = {"last": 0, "penultimate": 1}

# Entries of a tower's config that are read, or that change only what comes after the hidden states.
_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_AFTER_STATES = {"pool_type", "eos_id", "proj_bias", "proj_type"}

# The plain vocabulary of CLIP: 256 bytes, the same at the end of a word, merges, start and end of text.
_VOCABULARY = 49408
_MERGES = 48894
_START, _END = "<|startoftext|>", "<|endoftext|>"

# In one layer: the name in open_clip, the name in transformers.
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_open_clip(name: str, layer: str, folder: Path) -> None:
    """Writes `folder/text_encoder` and `folder/tokenizer` for an open_clip text tower; tensors keep their dtype.

    Args:
        name: "open_clip:MODEL:WEIGHTS"; weights are a pretrained tag of that model, downloaded by open_clip, or the
            path of a safetensors file.
        layer: "last" or "penultimate": the states after which layer; the final layer norm follows either.

    ValueError without open_clip, for a model or tag that it does not know, weights that are not safetensors, and a
    tower that is not CLIP's (other libraries, CoCa, SigLIP), before its weights are downloaded.
    """
    if layer not in _LAYERS_LEFT_OUT:
        raise ValueError(f"layer={layer!r} is not known: choose {' or '.join(_LAYERS_LEFT_OUT)}")
    open_clip, model, config, source = find_open_clip(name)
    text = {"context_length": 77, "vocab_size": _VOCABULARY, "mlp_ratio": 4.0} | config["text_cfg"]
    unlike = [key for key, value in text.items() if key not in _READ | _AFTER_STATES and value]
    unlike += ["multimodal_cfg"] if "multimodal_cfg" in config else []
    unlike += [f"vocab_size={text['vocab_size']}"] if text["vocab_size"] != _VOCABULARY else []
    if unlike:
        raise ValueError(
            f"the text tower of open_clip's {model} is not the plain text transformer of CLIP "
            f"({', '.join(unlike)}): choose another, such as ViT-B-32 or ViT-L-14"
        )
    path = weights_path(open_clip, model, config, source)  # may download them
    layers = text["layers"] - _LAYERS_LEFT_OUT[layer]

    (folder / "text_encoder").mkdir()
    tensors = _converted(_read_tower(path, model, text), layers)
    save_tensors(folder / "text_encoder" / WEIGHTS_NAME, tensors)
    clip_config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "num_hidden_layers": layers,
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config["embed_dim"],
        "bos_token_id": _VOCABULARY - 2,
        "eos_token_id": _VOCABULARY - 1,
        "pad_token_id": 0,
    }
    disk.write_json(folder / "text_encoder" / "config.json", clip_config)
    _write_tokenizer(open_clip, text["context_length"], folder / "tokenizer")


def find_open_clip(name: str) -> tuple[Any, str, dict[str, Any], str]:
    """open_clip, and model, config and weights of "MODEL:WEIGHTS"; ValueError without open_clip or that model."""
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise ValueError(f"{name} needs open_clip ({error}): {pip_install('open_clip')}") from None
    model, _, source = name.removeprefix(PREFIX).partition(":")
    config = open_clip.get_model_config(model) if model else None
    if config is None:
        raise ValueError(
            f"open_clip knows no model {model!r}: give MODEL:TAG or MODEL:PATH.safetensors, such as "
            "ViT-B-32:laion2b_s34b_b79k; open_clip.list_models() lists all"
        )
    return open_clip, model, config, source


def weights_path(open_clip: Any, model: str, config: dict[str, Any], source: str) -> Path:
    """The safetensors file of `source`: a path, or a tag whose weights open_clip downloads; ValueError for others."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if source in tags:
        tag = open_clip.get_pretrained_cfg(model, source)
        if tag.get("quick_gelu") and not config.get("quick_gelu"):
            raise ValueError(f"{source} was trained with QuickGELU: name it {PREFIX}{model}-quickgelu:{source}")
        try:
            path = Path(open_clip.pretrained.download_pretrained(tag))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"weights {source} of {model} cannot be downloaded: {error_reason(error)}") from None
    elif source and disk.expand_user(source).is_file():
        path = disk.expand_user(source)
    else:
        raise ValueError(
            f"{source!r} is neither a file nor a pretrained tag of open_clip's {model}: "
            f"write {PREFIX}{model}:PATH.safetensors or, as the last part, one of {', '.join(tags) or 'none'}"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} would have to be unpickled: convert it to safetensors or choose other weights")
    return path


def _read_tower(path: Path, model: str, text: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the text tower under open_clip's names, once sure that they are the model's."""
    names = {plain_name(name): name for name in tensor_names(path)}
    # Models with a text tower of their own class keep it under "text.", beside "visual.".
    prefix = "text." if "text.token_embedding.weight" in names else ""
    parts = ("token_embedding.", "positional_embedding", "ln_final.", "transformer.resblocks.")
    with safe_open(path, framework="pt") as source:
        tower = {
            name.removeprefix(prefix): source.get_tensor(stored)
            for name, stored in names.items()
            if name.startswith(tuple(prefix + part for part in parts))
        }
    check_weights(tower, path)
    embeddings = tower.get("token_embedding.weight")
    if embeddings is None:
        raise ValueError(f"{path} holds no token_embedding.weight: it is no model of open_clip")
    layers = len({name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")})
    found, expected = (embeddings.shape[1], layers), (text["width"], text["layers"])
    if found != expected:
        raise ValueError(
            f"{path} has a text tower of width {found[0]} with {found[1]} layers, "
            f"not {expected[0]} with {expected[1]}: it is not {model}"
        )
    return tower


def _converted(tower: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The first `layers` layers of a tower under the names of transformers."""
    tensors = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],  # [V, D]
        "embeddings.position_embedding.weight": tower["positional_embedding"],  # [L, D]
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    for i in range(layers):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for there, here in _LAYER_NAMES.items():
                tensors[f"{ours}.{here}.{kind}"] = tower[f"{theirs}.{there}.{kind}"]
            joined = tower[f"{theirs}.attn.in_proj_{kind}"]  # [3D, D] or [3D]
            for part, tensor in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
                tensors[f"{ours}.self_attn.{part}.{kind}"] = tensor  # [D, D] or [D]
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}


def _write_tokenizer(open_clip: Any, context_length: int, folder: Path) -> None:
    """A CLIP tokenizer with the vocabulary of open_clip, which pads with id 0."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]  # the first line is a header
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate([*words, _START, _END])},
        merges=merges,
        pad_token=words[0],
        model_max_length=context_length,
        # Id 0 is the exclamation mark: where a caption holds one it is text, not padding.
        split_special_tokens=True,
    )
    tokenizer.save_pretrained(folder)
