"""Names of weights in networks that were wrapped: by torch.compile, by data parallelism, by FSDP, by checkpointing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# What the wrappers of torch call the network inside; one may stand in another, and around any layer.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """The name that a weight or layer has without wrappers: `module._orig_mod.conv_in.weight` → `conv_in.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(weights: Mapping[str, Value], where: str | os.PathLike[str] = "the network") -> dict[str, Value]:
    """Weights under their plain names.

    Args:
        where: what an error names.

    Raises:
        ValueError: if two of them have the same.
    """
    plain: dict[str, Value] = {}
    for name, value in weights.items():
        if plain_name(name) in plain:
            raise ValueError(
                f"{where} has {plain_name(name)} twice, with and without the prefix of a wrapper; save it again"
            )
        plain[plain_name(name)] = value
    return plain
