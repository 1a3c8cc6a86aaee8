"""Model folders: files and config keys that are refused, and the files, names, dtypes and hashes of weights.

Libraries act on what a folder holds: they apply adapters, import modules, fetch code from a hub, or build another
network. Only names, JSON and tensors are read here, and the tensors must be finite.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import disk

# transformers applies these to the weights beside them wherever peft is installed.
_ADAPTER = re.compile(r"adapter_(config|model)\b.*", re.IGNORECASE)
# Why a key is refused at any depth of a config, and which keys.
_REASONS = {
    "it asks for code that comes with a model, which is never run here": (
        *("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code"),
        *("use_kernels", "kernel_config"),
    ),
    "it describes quantized weights, which are not read here; take the model in full or half precision": (
        *("quantization_config", "compression_config"),
    ),
    "it names other files than those that are read here": (
        *("transformers_weights", "configuration_files", "fast_tokenizer_files", "gguf_file", "adapter_kwargs"),
    ),
    "it changes what is built while that is built, which is not done here": (
        *("fusion_config", "per_layer_config", "init_inputs", "tokenizer_object"),
    ),
}
_KEYS = {key: reason for reason, keys in _REASONS.items() for key in keys}

# How transformers itself computes attention and experts. Anything else, such as "owner/name", is fetched and run. These
# are accepted and not passed on: they compute the same, and even flash attention may come from a hub.
_IMPLEMENTATION = re.compile(r"_*(attn|attention|experts?)_implementation(_internal)?")
_OWN_IMPLEMENTATIONS = {
    *("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    *("grouped_mm", "batched_mm"),
}


def refuse_untrusted(folder: Path) -> None:
    """ValueError if a model folder holds an adapter, or a config in it has a key that asks for more than tensors."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _ADAPTER.fullmatch(path.name):
            raise ValueError(f"{path} is an adapter, which libraries silently apply: move it away (load_lora takes it)")
        is_config = path.name.endswith("config.json") or path.name == "model_index.json"
        if not is_config or not path.is_file():  # a pipe would be waited for
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # refused where it is used
        for place, key, value in _entries(content):
            # Libraries act on an empty quantization_config too; an empty value of another key is as good as none.
            is_set = value is not None if key == "quantization_config" else bool(value)
            if key in _KEYS and is_set:
                raise ValueError(f"{path} has the key {place}: {_KEYS[key]}")
            if _IMPLEMENTATION.fullmatch(key) and not _is_own(value):
                raise ValueError(
                    f"{path} has {place} = {json.dumps(value)[:200]}, which is none of transformers' own and would be "
                    f"fetched and run: remove the key, or choose one of {', '.join(sorted(_OWN_IMPLEMENTATIONS))}"
                )


def _entries(content: Any) -> Iterator[tuple[str, str, Any]]:
    """(path of keys, key, value) of every entry of every object, at any depth."""
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{place}{key}", key, inner
                stack.append((f"{place}{key}.", inner))
        elif isinstance(value, list):
            stack += [(place, inner) for inner in value]


def _is_own(value: Any) -> bool:
    if isinstance(value, dict):  # one for each part of a model
        return all(map(_is_own, value.values()))
    return value is None or (isinstance(value, str) and value.removeprefix("paged|") in _OWN_IMPLEMENTATIONS)


def refuse_link_out(path: Path) -> None:
    """ValueError if a file is a link to somewhere outside its folder, other than those of the hub's cache."""
    target, folder = path.resolve(), path.parent.resolve()
    cached = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
    if not target.is_relative_to(folder) and not cached:
        raise ValueError(f"{path} is a link that leads out of its folder, to {target}: put a copy in its place")


Value = TypeVar("Value")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
# Wrappers of torch: compile, data parallelism, FSDP, checkpointing. They can be nested, and wrap any layer.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
STEM = "model"  # of the files of transformers
WEIGHTS_NAME = f"{STEM}.safetensors"
_COUNTERS = ("position_ids", "token_type_ids")  # that old files of transformers hold beside the weights
_PREFERRED = ("", "fp32", "fp16", "bf16")  # variants (`NAME.VARIANT.safetensors`), best first; "" has no name


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one model: `shards` by name, and their `index`, None for a single file."""

    shards: tuple[Path, ...]
    index: Path | None


def find_weights(folder: Path, stem: str) -> WeightFiles:
    """Finds `STEM.safetensors`, or an index and its shards; full precision before half, then any other variant.

    Raises:
        ValueError: if there are none, or several variants of which none is preferred; if a shard is missing, or the
            index names files outside of the folder.
    """
    found: dict[str, Path] = {}
    name = re.escape(stem)
    for pattern in (rf"{name}\.safetensors\.index(?:\.([^.]+))?\.json", rf"{name}(?:\.([^.]+?))?\.safetensors"):
        for path in sorted(folder.glob(f"{stem}*")):  # a single file counts before shards
            match = re.fullmatch(pattern, path.name)
            if match is not None and path.is_file() and not re.search(r"-\d{5}-of-\d{5}", path.name):
                found[match[1] or ""] = path
    variant = next((name for name in (*_PREFERRED, *sorted(found)) if name in found), None)
    if variant is None:
        target = folder / f"{stem}.safetensors"
        pickles = sorted(path.name for end in (".bin", ".ckpt") for path in folder.glob(f"*{end}*"))
        if pickles:
            raise ValueError(f"{folder} holds pickled weights ({pickles[0]}), never read; convert to {target.name}")
        raise ValueError(f"{target} is missing; the model folder is incomplete, copy or train it again")
    if len(found) > 1 and variant not in _PREFERRED:
        variants = " and ".join(sorted(found))
        raise ValueError(f"{folder} holds the variants {variants} of its weights; rename one to {stem}.safetensors")
    path = found[variant]
    if path.suffix == ".safetensors":
        return WeightFiles((path,), None)
    weight_map = disk.read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; copy or download the model again")
    names = sorted({str(name) for name in weight_map.values()})
    for shard in names:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path} has {shard!r} in its weight_map, which is not a safetensors file beside it")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder / shard} is missing; copy or download the model again")
    return WeightFiles(tuple(folder / shard for shard in names), path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file atomically; `OSError` if the disk fails."""
    with disk.new_file(path) as aside:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(plain, aside, {"format": "pt"})
        except SafetensorError as error:  # the tensors are fine: the disk fails
            raise OSError(f"{path} cannot be written: {error}") from None
        aside.chmod(0o644)  # safetensors makes it private


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError with its name if it is missing or damaged."""
    try:
        disk.check_regular(path)
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the folder is incomplete, copy or train it again") from None
    except (SafetensorError, OSError) as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is damaged or incomplete ({error}); copy or train it again") from None


def check_dtype(dtype: object) -> None:
    """ValueError unless networks can have this dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of torch's {_NAMES}")


def check_weights(weights: Mapping[str, Tensor], where: str | Path) -> None:
    """`ValueError`, naming `where`, for the first tensor that is no float or quantized, or holds nan or inf. (0.1 s for
    the UNet of Stable Diffusion 1.5.)
    """
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            stored = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{where}: {name} is stored as {stored}, but weights are {_NAMES}; take another file")
        if not _all_finite(tensor):
            raise ValueError(f"{where}: {name} holds numbers that are not finite; train, save or download it again")


def converted(weights: Mapping[str, Tensor], dtype: torch.dtype, where: str | Path) -> dict[str, Tensor]:
    """Finite weights in another dtype; ValueError for the first tensor with a number too large for it."""
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not _all_finite(found[name]):
            largest, kind = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{where}: {name} holds {largest:.3g}, which is too large for {kind}; take bfloat16 or float32"
            )
    return found


def _all_finite(tensor: Tensor) -> bool:
    # nan propagates to the extremes; a sum could overflow, and isfinite takes twenty times as long.
    return tensor.numel() == 0 or all(extreme.isfinite() for extreme in torch.aminmax(tensor))


def plain_name(name: str) -> str:
    """The name of a weight or layer without wrappers: `module._orig_mod.conv_in.weight` → `conv_in.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(weights: Mapping[str, Value], where: str | os.PathLike[str] = "the network") -> dict[str, Value]:
    """Weights under their plain names; ValueError, naming `where`, if two of them have the same."""
    plain: dict[str, Value] = {}
    for name, value in weights.items():
        if plain_name(name) in plain:
            raise ValueError(f"{where} has {plain_name(name)} twice, with and without the prefix of a wrapper")
        plain[plain_name(name)] = value
    return plain


def update_hash(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Adds names, dtypes, shapes and bytes of tensors, sorted by name, to a hash of `hashlib`."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, on any device."""
    digest = hashlib.sha256()
    update_hash(digest, tensors)
    return digest.hexdigest()


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; ValueError if it is cut off or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return list(stream.keys())
    except SafetensorError as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is damaged or cut off ({error}): save or download it again") from None


def read_tensors(files: WeightFiles, other_towers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a model under plain names, without those whose names start with one of `other_towers`.

    Raises ValueError, naming the file and the first tensor that is quantized or not finite.
    """
    names = {name: shard for shard in files.shards for name in tensor_names(shard)}
    plain_names(names, files.shards[0].parent)
    found = {}
    for shard in files.shards:
        with safe_open(shard, framework="pt") as stream:
            for name in (name for name, home in names.items() if home == shard):
                plain = plain_name(name)
                if not plain.startswith(other_towers):
                    found[plain] = stream.get_tensor(name)
                    if not plain.endswith(_COUNTERS):
                        check_weights({plain: found[plain]}, shard)
    return found


def copy_weights(files: WeightFiles, folder: Path, stem: str, other_towers: tuple[str, ...] = ()) -> None:
    """Copies weights into `folder` byte for byte, under names without a variant.

    A new file is written only if the source also holds other towers (the image half of a CLIP, the decoder of a T5), or
    the names of a wrapped network.
    """
    names = [name for shard in files.shards for name in tensor_names(shard)]
    if any(plain_name(name) != name or name.startswith(other_towers) for name in names):
        save_tensors(folder / f"{stem}.safetensors", read_tensors(files, other_towers))
    elif files.index is None:
        shutil.copyfile(files.shards[0], folder / f"{stem}.safetensors")  # follows links, as in the hub's cache
    else:
        renamed = dict(zip((shard.name for shard in files.shards), shard_names(stem, len(files.shards)), strict=True))
        for shard in files.shards:
            shutil.copyfile(shard, folder / renamed[shard.name])
        content = disk.read_json(files.index)
        content["weight_map"] = {name: renamed[file] for name, file in content["weight_map"].items()}
        disk.write_json(folder / f"{stem}.safetensors.index.json", content)


def shard_names(stem: str, count: int) -> list[str]:
    """The files of weights that are split into `count` parts."""
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
