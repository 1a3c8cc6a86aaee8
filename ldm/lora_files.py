"""Adapters on disk: `pytorch_lora_weights.safetensors` as diffusers writes and reads it, and the formats before it.

diffusers converts names of kohya (`lora_unet_…to_q.lora_down.weight`) and its own old ones; layers may also be named as
in the code of CompVis (`input_blocks.1.1.…`). diffusers skips what it does not know: here each tensor and each alpha
finds a layer of the network, or the file is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm import disk, lora
from ldm.progress import error_reason
from ldm.weights import check_weights, converted, plain_names

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The end of a name says which tensor of a layer it is.
_ROLES = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
_ROLES |= {".lora_down.weight": "down", ".lora_up.weight": "up"}
# The beginning says which network; what has none of these is of a UNet alone.
_PREFIXES = dict.fromkeys(("unet.", "unet.base_model.model.", "diffusion_model.", "model.diffusion_model."), "unet")
_PREFIXES |= dict.fromkeys(("lora_unet_", "base_model.model."), "unet")
_PREFIXES |= dict.fromkeys(("text_encoder.", "text_encoder.base_model.model.", "lora_te_", "lora_te1_"), "text_encoder")
_PREFIXES |= dict.fromkeys(("text_encoders.clip_l.transformer.", "cond_stage_model.transformer."), "text_encoder")
# Layers of CLIP, which a UNet does not have: files of a text encoder alone have no other prefix either.
_OF_TEXT_ENCODER = re.compile(r"text_model[._]|encoder[._]layers[._]")

# Expressions of strangers are searched in the names of layers; with few repeats, none of a group, that ends.
_REPEATS, _REPEATED_GROUP, _MAX_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{?]"), 2

# Names may have dots, or underscores as kohya writes them.
_NETWORK = r"(?:unet\.|lora_unet_|(?:model\.)?diffusion_model\.|base_model\.model\.)?"
_ARCHITECTURES = {
    "layers of Stable Diffusion XL": (
        r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|conditioner\.embedders\."
        rf"|{_NETWORK}(?:label_emb|add_embedding)[._]"
    ),
    "layers of a transformer such as Flux or Stable Diffusion 3": (
        r"transformer\.|lora_transformer_|lora_te3_|text_encoder_3\.|text_encoders\.(?!clip_l\.)"
        rf"|{_NETWORK}(?:transformer\.)?(?:(?:double|single|joint|single_transformer|transformer)_)?"
        r"(?:blocks|layers)[._]\d"
    ),
    "layers of a motion module": r".*motion_modules?[._]",
    "layers of a ControlNet": r"(?:lora_)?control(?:net)?[._]|control_model\.|.*(?:input_hint_block|zero_convs)[._]",
}
_KINDS = {
    "magnitudes of DoRA": r".*(?:\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*)",
    "factors of LoHa": r".*\.hada_[wt]\d.*",
    "factors of LoKr": r".*\.lokr_[wt]\d.*",
    "rotations of OFT": r".*(?:[._]b?oft_\w+)(?:\.\w+)*",
    "scales of IA3": r".*(?:\.on_input|[._]ia3_l(?:\.\w+)*)",
    "factors of GLoRA": r".*\.(?:a|b)[12]\.weight|.*\.[abc]m\.weight",
    "vectors of VeRA": r".*vera_lambda.*",
    "singular values of AdaLoRA": r".*\.(?:lora_E|ranknum)(?:\.\w+)*",
    "cores of a Tucker decomposition (LoCon)": r".*\.lora_mid\.weight",
    "a LoRA of embeddings": r".*\.lora_embedding_[AB](?:\.\w+)*",
    "biases beside A or B": r".*[._]lora(?:_(?:A|B|up|down)|\.(?:up|down)|_linear_layer\.(?:up|down))\.bias",
    "whole differences of weights": r".*\.(?:diff(?:_b)?|[wb]_norm|set_weight|set_bias|reshape_weight)",
    "whole layers saved beside it": r".*\.modules_to_save\..*",
    "embeddings of textual inversion": (
        r"bundle_emb\..*|.*string_to_(?:param|token).*|emb_params|clip_[lg]|learned_embeds.*|<.*>"
    ),
}
# Of the text states of Stable Diffusion XL.
_XL_WIDTH = 2048
_TO_TEXT = re.compile(r".*attn2[._](?:processor[._])?to_[kv][._]lora(?:_A|[._]down|_linear_layer\.down)\..*")

# In a residual block and outside of all blocks: the name in diffusers, the name in the code of CompVis.
_IN_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3"}
_IN_RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_OUTSIDE |= {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}


def save_adapter(
    folder: str | os.PathLike[str], unet: nn.Module, name: str = "default", *, text_encoder: nn.Module | None = None
) -> Path:
    """Writes an adapter, atomically, as `folder/pytorch_lora_weights.safetensors`; returns that path.

    diffusers reads it with `load_lora_weights(folder)`. Rank and alpha of each layer are in the header of the file, all
    tensors are float32. The part of a `text_encoder` (its model) is written too, if it has one. ValueError if there is
    no such adapter or it is merged, and for a folder or file that cannot be replaced.
    """
    parts: dict[str, nn.Module] = {"unet": unet}
    if text_encoder is not None:
        parts["text_encoder"] = text_encoder
    adapted = {part: model for part, model in parts.items() if name in lora.adapter_names(model)}
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, model in (adapted or {"unet": unet}).items():
        # Versions of transformers differ in this prefix of CLIP's layers; files have it.
        clip = part == "text_encoder" and str(getattr(model.config, "model_type", "")).startswith("clip")
        inner = "text_model." if clip else ""
        loras = {path.removeprefix(inner): one for path, one in sorted(lora.adapter_loras(model, name).items())}
        for path, one in loras.items():
            for end, tensor in (("A", one.down), ("B", one.up)):
                tensors[f"{part}.{inner}{path}.lora_{end}.weight"] = tensor.float().cpu().contiguous()
        settings |= {f"{part}.{key}": value for key, value in lora.peft_settings(loras).items()}
    target = disk.writable_folder(folder) / WEIGHTS
    if target.is_symlink():
        raise ValueError(f"{target} is a link; remove it, or name another folder for the adapter")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name another folder for the adapter")
    target.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors, {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)})
    # The library writes its metadata in any order; here sorted by key. Tensors begin at a multiple of eight bytes.
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with disk.new_file(target) as aside:
        aside.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return target


def load_adapter(
    unet: nn.Module,
    source: str | os.PathLike[str],
    name: str = "default",
    *,
    weight: float = 1.0,
    text_encoder: nn.Module | None = None,
) -> None:
    """Adds an adapter from disk to a UNet (and the model of a text encoder), on and frozen; others stay as they are.

    Args:
        source: a `.safetensors` file, a folder with one, or a hub id `owner/name`.
        weight: how much of it is added, 1 as it was trained; `set_adapters` changes it.

    Raises:
        ValueError: naming the file, if it is missing, damaged, pickled, of another kind or model; nothing is changed
            then.
    """
    lora.check_weight(name, weight)
    lora.import_peft()
    path, tensors, settings = _read(source)
    networks = {"unet": unet} if text_encoder is None else {"unet": unet, "text_encoder": text_encoder}
    check_plain_lora(path, tensors, getattr(getattr(unet, "config", None), "cross_attention_dim", None))
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}  # network → name of the layer as in the file → role → tensor
    for key, tensor in tensors.items():
        prefix = max((prefix for prefix in _PREFIXES if key.startswith(prefix)), key=len, default="")
        name_of_tensor = key.removeprefix(prefix)
        part = "text_encoder" if _OF_TEXT_ENCODER.match(name_of_tensor) else _PREFIXES.get(prefix, "unet")
        if not name_of_tensor.endswith(tuple(_ROLES)) or ".processor." in name_of_tensor:
            name_of_tensor = _peft_name(name_of_tensor, part)
        end = next((end for end in _ROLES if name_of_tensor.endswith(end)), None)
        if end is None:
            raise ValueError(f"{path}: {key} is no weight of a LoRA; only plain LoRAs are read, choose one")
        layer = name_of_tensor.removesuffix(end)
        roles = parts.setdefault(part, {}).setdefault(layer, {})
        if _ROLES[end] in roles:
            raise ValueError(f"{path} holds weights of {layer} under two names; save or download it again")
        roles[_ROLES[end]] = tensor
    if absent := parts.keys() - networks.keys():
        layers = len(parts[min(absent)])
        raise ValueError(f"{path} also changes the text encoder ({layers} layers); load it into a pipeline (load_lora)")
    loras = {part: _loras(path, found, networks[part], part, settings) for part, found in parts.items()}
    for part in loras:
        lora.check_new_name(networks[part], name)
    for part, found in loras.items():
        lora.inject_adapter(networks[part], found, name, weight)


def _peft_name(name: str, part: str) -> str:
    """A name of older diffusers as peft has it: `processor.to_q_lora.down.weight` → `to_q.lora_A.weight`."""
    from diffusers.utils import state_dict_utils

    convert: Any = state_dict_utils
    old = convert.StateDictType.DIFFUSERS_OLD if part == "text_encoder" else convert.StateDictType.DIFFUSERS
    (new,) = convert.convert_unet_state_dict_to_peft(convert.convert_state_dict_to_peft({name: None}, old))
    return str(new)


def _loras(
    path: Path, found: Mapping[str, Mapping[str, Tensor]], network: nn.Module, part: str, settings: dict[str, Any]
) -> dict[str, lora.Lora]:
    """Layer → its adapter, for one network; every layer of the file is there and every tensor fits."""
    from peft.utils.other import get_pattern_key

    layers = lora.adaptable_layers(network)
    known = {name.removeprefix("text_model."): name for name in layers}
    for name, other in compvis_names(layers).items():
        known |= {alias: name for alias in (other, other.replace(".", "_")) if alias not in known}
    names = {}  # of layers in the file → in the network
    for name in found:
        plain = re.sub(r"\.to_out$", ".to_out.0", name.removeprefix("text_model."))
        if plain not in known and "." not in name:  # kohya's `down_blocks_0_…` → `down_blocks.0.…`
            from diffusers.loaders import lora_conversion_utils

            convert: Any = lora_conversion_utils
            start = "lora_unet_" if part == "unet" else "lora_te_"
            both = {f"{start}{name}.lora_{end}.weight": None for end in ("down", "up")}
            new_names, _ = convert._convert_non_diffusers_lora_to_diffusers(both)
            plain = _peft_name(min(new_names).removeprefix(f"{part}."), part)
            plain = plain.removesuffix(".lora_A.weight").removeprefix("text_model.")
        if plain in known:
            names[name] = known[plain]
    if unknown := sorted(found.keys() - names.keys()):
        what = f"{len(unknown)} layers that this {part} does not have (first: {unknown[0]})"
        raise ValueError(f"{path} changes {what}; it was made for another model")
    # The settings for one network; in the file of a UNet alone they have no prefix.
    prefix = f"{part}." if any(key.startswith(("unet.", "text_encoder.")) for key in settings) else ""
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    pattern: Any = own.get("alpha_pattern") or {}
    numbers = [own.get("lora_alpha", 1), *pattern.values()] if isinstance(pattern, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"{path}: lora_alpha or alpha_pattern in its settings is no number; save it again")
    for expression in pattern:
        try:
            re.compile(expression)
        except (re.error, TypeError):
            raise ValueError(f"{path}: {expression!r} in alpha_pattern is no pattern; save it again") from None
        if len(_REPEATS.findall(expression)) > _MAX_REPEATS or _REPEATED_GROUP.search(expression):
            raise ValueError(f"{path}: {expression[:100]!r} in alpha_pattern could take hours; write names of layers")
    loras: dict[str, lora.Lora] = {}
    for written, tensors in found.items():
        if not {"down", "up"} <= tensors.keys() or names[written] in loras:
            raise ValueError(f"{path}: {written} has not exactly one A and one B; save or download it again")
        layer, down, up = layers[names[written]], tensors["down"], tensors["up"]
        rank = down.shape[0] if down.ndim else 0
        shapes = lora.lora_shapes(layer, rank)
        for tensor, wanted in zip((down, up), shapes, strict=True):
            # A 1x1 convolution and a linear layer are one function; files have either shape for either.
            flat = wanted[:2] if math.prod(wanted[2:]) == 1 else wanted
            given = tuple(tensor.shape[:2]) if math.prod(tensor.shape[2:]) == 1 else tuple(tensor.shape)
            if rank == 0 or given != flat:
                what = f"a weight of shape {list(tensor.shape)}, but this model needs {list(wanted)}"
                raise ValueError(f"{path}: {written} has {what}; it was made for another model")
            check_weights({written: tensor}, path)
            converted({written: tensor}, layer.weight.dtype, path)
        if "alpha" in tensors:
            given_alpha = tensors["alpha"]
            alpha = float(given_alpha) if given_alpha.numel() == 1 and not given_alpha.is_complex() else math.nan
        else:  # as peft's settings say; without any the scale is 1
            alpha = float(pattern.get(get_pattern_key(list(pattern), written), own.get("lora_alpha", rank)))
            if own.get("use_rslora"):  # rank-stabilized LoRA (Kalajdzievski 2023), Eq. 3: scaled by α / √r
                alpha *= math.sqrt(rank)
        if not math.isfinite(alpha):
            raise ValueError(f"{path}: alpha of {written} is {alpha}; train or download it again")
        loras[names[written]] = lora.Lora(down.reshape(shapes[0]), up.reshape(shapes[1]), alpha)
    return loras


def _read(source: str | os.PathLike[str]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Tensors of an adapter file, and the settings of peft that came with it (α and its like), if any."""
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
    settings: Any = {}
    beside = path.parent / PEFT_CONFIG
    if METADATA in header:
        try:
            settings = json.loads(header[METADATA])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} has settings that are no JSON ({error}); save or download it again") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{path} has settings that are no JSON object; save or download it again")
    elif path.name == PEFT_WEIGHTS and beside.is_file():
        settings = disk.read_json(beside)
    return path, plain_names(found, path), settings


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
        raise ValueError(f"there is no file {text}, and the hub did not give it ({error_reason(error)})") from None


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


def check_plain_lora(path: Path, tensors: Mapping[str, Tensor], text_width: int | None) -> None:
    """Raises ValueError where a file holds other things than A, B and α of layers, or those of another architecture."""
    found: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind, pattern in _ARCHITECTURES.items() if re.match(pattern, key)), None)
        kind = kind or next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, key)), None)
        wide = tensor.ndim > 1 and tensor.shape[1] == _XL_WIDTH != text_width
        if kind is None and wide and _TO_TEXT.match(key):
            kind = "layers of Stable Diffusion XL"
        if kind is not None:
            found.setdefault(kind, []).append(key)
    if not found:
        return
    order = [kind for kind in (*_ARCHITECTURES, *_KINDS) if kind in found]
    named = [f"{kind} ({len(found[kind])} of {len(tensors)} tensors, such as {min(found[kind])})" for kind in order]
    remedy = "choose one for Stable Diffusion 1.x or 2.x"
    if order[0] not in _ARCHITECTURES:
        remedy = "choose a plain LoRA, or save it as one with the tool that made it"
    raise ValueError(f"{path} is no plain LoRA for this model: it holds {' and '.join(named)}; {remedy}")


def compvis_names(layers: Iterable[str]) -> dict[str, str]:
    """Layers of a UNet → their names in the code of CompVis, from which Stable Diffusion came; of any layout.

    There all blocks of a way are counted. A residual block with its attention is one; so is a change of resolution on
    the way down, while on the way up it is the last part of the block before it.
    """
    layers = list(layers)
    paths = {name[: dot.start()] for name in layers for dot in re.finditer(r"\.|$", name)}
    found = {ours: theirs for ours, theirs in _OUTSIDE.items() if ours in paths}

    def resnets(block: str, theirs: str, part: int = 0) -> int:
        """Names a residual block and its attention from `part` on; returns the part after them."""
        found.update({f"{block}.{ours}": f"{theirs}.{part}.{name}" for ours, name in _IN_RESNET.items()})
        attention = block.replace(".resnets.", ".attentions.")
        if attention not in paths:
            return part + 1
        start = f"{attention}."
        found.update({name: f"{theirs}.{part + 1}.{name[len(start) :]}" for name in layers if name.startswith(start)})
        return part + 2

    count = 1
    for block in _listed(paths, "down_blocks"):
        for resnet in _listed(paths, f"{block}.resnets"):
            resnets(resnet, f"input_blocks.{count}")
            count += 1
        if f"{block}.downsamplers.0" in paths:
            found[f"{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    part = 0
    for resnet in _listed(paths, "mid_block.resnets"):
        part = resnets(resnet, "middle_block", part)
    count = 0
    for block in _listed(paths, "up_blocks"):
        for resnet in _listed(paths, f"{block}.resnets"):
            part = resnets(resnet, f"output_blocks.{count}")
            count += 1
        if f"{block}.upsamplers.0" in paths:
            found[f"{block}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{part}.conv"
    return {name: found[name] for name in layers if name in found}


def _listed(paths: set[str], module: str) -> Iterator[str]:
    """The entries of a list of modules, in their order."""
    index = 0
    while f"{module}.{index}" in paths:
        yield f"{module}.{index}"
        index += 1
