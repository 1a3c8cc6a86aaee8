"""What an adapter is, before it is in a network: its config, its tensors and the layers that it fits."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Adaptable = nn.Linear | nn.Conv2d


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shape of a new adapter.

    Args:
        rank: r, at least 1: the size of an adapter grows with it.
        alpha: α > 0; the adapter is scaled by α / r. None is α = r, the scale 1.
        target_modules: ends of the names of the layers that are adapted, linear ones and convolutions; by default
            the four projections of all attention, as in the training scripts of diffusers.
    """

    __pydantic_config__ = {"extra": "forbid"}

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be a whole number of at least 1 (4 to 64 are usual)")
        if self.alpha is not None and (
            isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf
        ):
            raise ValueError(f"alpha is {self.alpha!r}; it must be a number greater than 0 (the rank is usual)")
        if isinstance(self.target_modules, str) or not self.target_modules or not all(self.target_modules):
            raise ValueError(f"target_modules is {self.target_modules!r}; it must be a list of names such as to_q")


@dataclass(frozen=True)
class Lora:
    """The adapter of one layer: A ([r, in] or [r, in, kh, kw]), B ([out, r] or [out, r, 1, 1]) and α."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def adaptable_layers(model: nn.Module) -> dict[str, Adaptable]:
    """The linear layers and convolutions of a network by the names that they have without adapters."""
    found = {}
    for path, module in model.named_modules():
        inside_adapter = {"lora_A", "lora_B"} & set(path.split("."))
        if isinstance(module, nn.Linear | nn.Conv2d) and not inside_adapter:
            found[path.removesuffix(".base_layer")] = module
    return found


def lora_shapes(layer: Adaptable, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a layer: a convolution gets A of its own kernel and a B of 1x1."""
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    assert layer.groups == 1
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)


def target_layers(layers: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The layers whose name is, or ends with, one of the wanted names."""
    chosen = set()
    for target in wanted:
        matches = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matches:
            ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2, 3)}
            near = difflib.get_close_matches(target, sorted(ends), n=3)
            usual = ", ".join(AdapterConfig.target_modules)
            advice = f"near it are {', '.join(near)}" if near else f"usual are {usual}"
            raise ValueError(
                f"target_modules has {target!r}, which is the end of no linear layer's or convolution's name here; "
                f"{advice}"
            )
        chosen |= matches
    return sorted(chosen)


def peft_settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Keyword arguments of peft's `LoraConfig` for layers with these ranks and alphas."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    alphas = {module: int(a) if float(a).is_integer() else a for module, a in alphas.items()}
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(module): r for module, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {re.escape(module): a for module, a in sorted(alphas.items()) if a != alpha},
    }
