"""Adapters on disk: `pytorch_lora_weights.safetensors` as diffusers writes and reads it, and the formats before it.

Read are the names of diffusers (`unet.….to_q.lora_A.weight`, and three older ways), of peft and of kohya
(`lora_unet_…to_q.lora_down.weight`), with the layers called as in diffusers or as in the code of CompVis
(`input_blocks.1.1.…`). A name is looked up among the layers that the network has, so that each tensor and each alpha
finds its layer or the file is refused; nothing is guessed and nothing left out.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm import disk
from ldm.adapters.kinds import check_plain_lora
from ldm.adapters.layers import (
    _import_peft,
    adapter_names,
    adapter_tensors,
    check_new_name,
    check_weight,
    inject_adapter,
    layer_alphas,
)
from ldm.adapters.lora import Adaptable, Lora, adaptable_layers, lora_shapes, peft_settings
from ldm.adapters.names import file_names
from ldm.weights import check_weights, converted, plain_names

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The end of a name says which tensor of a layer it is.
_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
# The beginning says which network; what has none of these is of a UNet alone.
_PREFIXES = {
    "unet.": "unet",
    "unet.base_model.model.": "unet",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "lora_unet_": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder.base_model.model.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "base_model.model.": "unet",
}
# Layers of CLIP, which a UNet has not: files of a text encoder alone have no other prefix either.
_OF_TEXT_ENCODER = re.compile(r"text_model[._]|encoder[._]layers[._]")

# Expressions of strangers are searched in the names of layers; with few repeats, none of a group, that ends.
_REPEATS, _REPEATED_GROUP, _MAX_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{?]"), 2


@dataclass(frozen=True)
class _File:
    """Tensors of an adapter file, and the settings of peft that came with it (α and its like), if any."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def save_adapter(
    folder: str | os.PathLike[str], unet: nn.Module, name: str = "default", *, text_encoder: nn.Module | None = None
) -> Path:
    """Writes an adapter, atomically, as `folder/pytorch_lora_weights.safetensors`; returns that path.

    diffusers reads it with `load_lora_weights(folder)`. Rank and alpha of each layer are in the header of the file.
    Tensors are written in float32.

    Args:
        text_encoder: the model of the text encoder, whose part of the adapter is written too, if it has one.

    Raises:
        ValueError: if there is no such adapter, or it is merged; for a `folder` that is a file or a link to nothing,
            and a link in the place of the file.
    """
    parts: dict[str, nn.Module] = {"unet": unet}
    if text_encoder is not None:
        parts["text_encoder"] = text_encoder
    having = {part: model for part, model in parts.items() if name in adapter_names(model)}
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, model in (having or {"unet": unet}).items():
        # Versions of transformers differ in this prefix of CLIP's layers; files have it.
        clip = part == "text_encoder" and str(getattr(model.config, "model_type", "")).startswith("clip")
        inner = "text_model." if clip else ""
        own = {key.removeprefix(inner): value for key, value in adapter_tensors(model, name).items()}
        ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in own.items() if ".lora_A." in key}
        alphas = {module.removeprefix(inner): alpha for module, alpha in layer_alphas(model, name).items()}
        tensors |= {f"{part}.{inner}{key}": value.float().cpu().contiguous() for key, value in own.items()}
        settings |= {f"{part}.{key}": value for key, value in peft_settings(ranks, alphas).items()}
    target = disk.writable_folder(folder) / WEIGHTS
    if target.is_symlink():
        raise ValueError(f"{target} is a link; remove it, or name another folder for the adapter")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name another folder for the adapter")
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, tensors, {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)})
    return target


def load_adapter(
    unet: nn.Module,
    source: str | os.PathLike[str],
    name: str = "default",
    *,
    weight: float = 1.0,
    text_encoder: nn.Module | None = None,
) -> None:
    """Puts an adapter from disk into a UNet (and a text encoder), on and frozen; others stay as they are.

    Args:
        source: a `.safetensors` file, a folder with one, or a hub id `owner/name`.
        weight: how much of it is added, 1 as it was trained; `set_adapters` changes it.
        text_encoder: the model of the text encoder, for the part of the file that is meant for it.

    Raises:
        ValueError: naming the file and what is wrong with it: missing, damaged, pickled, of another kind, made for
            another model. The networks are unchanged then.
    """
    check_weight(name, weight)
    _import_peft()
    file = _read(source)
    networks = {"unet": unet} if text_encoder is None else {"unet": unet, "text_encoder": text_encoder}
    check_plain_lora(file.path, file.tensors, getattr(getattr(unet, "config", None), "cross_attention_dim", None))
    loras = {part: _fitting(file, part, found, networks) for part, found in _sorted_out(file).items()}
    for part in loras:
        check_new_name(networks[part], name)
    for part, found in loras.items():
        inject_adapter(networks[part], found, name, weight)


def _sorted_out(file: _File) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Network → name of the layer as in the file → role → tensor."""
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in file.tensors.items():
        end = max((end for end in _ROLES if key.endswith(end)), key=len, default=None)
        if end is None:
            raise ValueError(
                f"{file.path}: {key} is no weight of a LoRA; whole models and other adapters are not read here, "
                "choose a plain LoRA"
            )
        prefix = max((prefix for prefix in _PREFIXES if key.startswith(prefix)), key=len, default="")
        layer = key.removeprefix(prefix).removesuffix(end).replace(".processor.", ".")
        part = "text_encoder" if _OF_TEXT_ENCODER.match(layer) else _PREFIXES.get(prefix, "unet")
        roles = parts.setdefault(part, {}).setdefault(layer, {})
        if _ROLES[end] in roles:
            raise ValueError(f"{file.path} holds weights of {layer} under two names; save or download it again")
        roles[_ROLES[end]] = tensor
    return parts


def _fitting(
    file: _File, part: str, found: Mapping[str, Mapping[str, Tensor]], networks: Mapping[str, nn.Module]
) -> dict[str, Lora]:
    """Layer → its adapter, for one network; every layer of the file is there and every tensor fits."""
    if part not in networks:
        raise ValueError(
            f"{file.path} also changes the text encoder ({len(found)} layers); load it into a pipeline (load_lora)"
        )
    layers = adaptable_layers(networks[part])
    names = file_names(layers)
    unknown = sorted(name for name in found if name not in names)
    if unknown:
        raise ValueError(
            f"{file.path} changes {len(unknown)} layers that this {part} does not have (first: {unknown[0]}); "
            "it was made for another model"
        )
    settings = _settings_of(file, part)
    loras: dict[str, Lora] = {}
    for written, tensors in found.items():
        if not {"down", "up"} <= tensors.keys() or names[written] in loras:
            raise ValueError(f"{file.path}: {written} has not exactly one A and one B; save or download it again")
        loras[names[written]] = _lora(file, written, tensors, layers[names[written]], settings)
    return loras


def _lora(
    file: _File, written: str, tensors: Mapping[str, Tensor], layer: Adaptable, settings: Mapping[str, Any]
) -> Lora:
    """The adapter of one layer, checked and in the shapes of the layer."""
    down, up = tensors["down"], tensors["up"]
    rank = down.shape[0] if down.ndim else 0
    for tensor, wanted in zip((down, up), lora_shapes(layer, rank), strict=True):
        # A 1x1 convolution and a linear layer are one function; files have either shape for either.
        flat = wanted[:2] if math.prod(wanted[2:]) == 1 else wanted
        given = tuple(tensor.shape[:2]) if math.prod(tensor.shape[2:]) == 1 else tuple(tensor.shape)
        if rank == 0 or given != flat:
            raise ValueError(
                f"{file.path}: {written} has a weight of shape {list(tensor.shape)}, but this model needs "
                f"{list(wanted)}; it was made for another model"
            )
        check_weights({written: tensor}, file.path)
        converted({written: tensor}, layer.weight.dtype, file.path)
    if "alpha" in tensors:
        given_alpha = tensors["alpha"]
        alpha = float(given_alpha) if given_alpha.numel() == 1 and not given_alpha.is_complex() else math.nan
    else:
        alpha = _alpha(written, rank, settings)
    if not math.isfinite(alpha):
        raise ValueError(f"{file.path}: alpha of {written} is {alpha}; train or download it again")
    shape_down, shape_up = lora_shapes(layer, rank)
    return Lora(down.reshape(shape_down), up.reshape(shape_up), alpha)


def _alpha(written: str, rank: int, settings: Mapping[str, Any]) -> float:
    """α as peft's settings say it; without any the scale is 1."""
    from peft.utils.other import get_pattern_key

    pattern = settings.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), written), settings.get("lora_alpha", rank)))
    # Rank-stabilised LoRA (Kalajdzievski 2023), Eq. 3: scaled by α / √r.
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _settings_of(file: _File, part: str) -> dict[str, Any]:
    """The settings for one network; in the file of a UNet alone they have no prefix."""
    prefixed = any(key.startswith(("unet.", "text_encoder.")) for key in file.settings)
    prefix = f"{part}." if prefixed else ""
    found = {k.removeprefix(prefix): v for k, v in file.settings.items() if k.startswith(prefix)}
    alpha, pattern = found.get("lora_alpha", 1), found.get("alpha_pattern") or {}
    numbers = [alpha, *pattern.values()] if isinstance(pattern, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"{file.path}: lora_alpha or alpha_pattern in its settings is no number; save it again")
    for expression in pattern:
        try:
            re.compile(expression)
        except (re.error, TypeError):
            raise ValueError(f"{file.path}: {expression!r} in alpha_pattern is no pattern; save it again") from None
        if len(_REPEATS.findall(expression)) > _MAX_REPEATS or _REPEATED_GROUP.search(expression):
            raise ValueError(
                f"{file.path}: {expression[:100]!r} in alpha_pattern could be searched for hours; write names of layers"
            )
    return found


def _read(source: str | os.PathLike[str]) -> _File:
    path = _find(source)
    try:
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            found = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); save or download it again") from None
    if not found:
        raise ValueError(f"{path} holds no weights; save or download it again")
    tensors = plain_names(found, path)
    if METADATA in header:
        return _File(path, tensors, _settings(path, header[METADATA]))
    beside = path.parent / PEFT_CONFIG
    if path.name == PEFT_WEIGHTS and beside.is_file():
        return _File(path, tensors, _settings(beside, beside.read_text(encoding="utf-8", errors="replace")))
    return _File(path, tensors, {})


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} has settings that are no JSON ({error}); save or download it again") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has settings that are no JSON object; save or download it again")
    return settings


def _find(source: str | os.PathLike[str]) -> Path:
    """The safetensors file that `source` means."""
    path, text = disk.expand_user(source), os.fspath(source)
    if path.is_dir():
        return path / _choice([child.name for child in path.iterdir() if child.is_file()], text)
    if path.suffix in PICKLES:
        raise ValueError(f"{text} is pickled, which is never opened here; convert it to .safetensors first")
    if path.is_file():
        return path
    if path.is_absolute() or text.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError(f"there is no {text}; name a folder, a .safetensors file or a hub id owner/name")
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        chosen = _choice([name for name in list_repo_files(text) if "/" not in name], text)
        if chosen == PEFT_WEIGHTS:
            hf_hub_download(text, PEFT_CONFIG)
        return Path(hf_hub_download(text, chosen))
    except ValueError as error:
        raise ValueError(f"hub model {text}: {error}") from None
    except Exception as error:  # the hub client raises many kinds; each means "not to be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"there is no file or folder {text}, and the hub did not give it ({reason})") from None


def _choice(names: list[str], where: str) -> str:
    """The file of a folder that holds the adapter."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    for usual in (WEIGHTS, PEFT_WEIGHTS):
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{where} holds {len(found)} .safetensors files ({', '.join(found[:3])}, …); name one of them")
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled:
        raise ValueError(f"{where} holds only {pickled[0]}, which is pickled and never opened here; convert it first")
    raise ValueError(f"{where} holds no {WEIGHTS}; it is no adapter, or only half of one")


def _write(target: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """A file of this name that is complete, or the one of before."""
    with disk.new_file(target) as aside:
        aside.write_bytes(_in_order(save(dict(tensors), header)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of the keys: the library writes them in any, so that two equal
    adapters had different bytes.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
