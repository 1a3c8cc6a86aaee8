"""Files and config keys of untrusted model folders that are refused.

Libraries act on them: they apply adapters, import modules, fetch code from a hub, or build another network. Only names
and JSON are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
            raise ValueError(
                f"{path} is an adapter, which libraries silently apply to the weights beside it: move it out of "
                "this folder (a LoRA is loaded with load_lora or --lora)"
            )
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
