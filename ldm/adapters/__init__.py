"""Low-rank adapters (LoRA) on a frozen network, exchanged with diffusers; needs the extra `lora` (peft)."""

from ldm.adapters.files import load_adapter, save_adapter
from ldm.adapters.layers import (
    adapter_names,
    adapter_tensors,
    adapter_weights,
    add_adapter,
    check_weight,
    is_merged,
    merge_adapters,
    remove_adapters,
    set_adapters,
    train_adapter,
    unmerge_adapters,
)
from ldm.adapters.lora import AdapterConfig

__all__ = [
    "AdapterConfig",
    "adapter_names",
    "adapter_tensors",
    "adapter_weights",
    "add_adapter",
    "check_weight",
    "is_merged",
    "load_adapter",
    "merge_adapters",
    "remove_adapters",
    "save_adapter",
    "set_adapters",
    "train_adapter",
    "unmerge_adapters",
]
