"""Adapters inside a network: added, weighted, merged into its weights and removed again.

LoRA (Hu et al. 2022), section 4.1: a layer W x becomes W x + w (α / r) B A x, with A [r, in] random and B [out, r] zero
at first, and w the weight that an adapter is used with. peft puts the layers in; the rest is one value on the network,
so that a deep copy of the network has it too.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.environment import pip_install
from ldm.weights import plain_name

Adaptable = nn.Linear | nn.Conv2d
_STATE = "_ldm_adapters"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shape of a new adapter.

    Args:
        rank: r, at least 1: the size of an adapter grows with it.
        alpha: α > 0; the adapter is scaled by α / r. None is α = r, the scale 1.
        target_modules: ends of the names of linear layers and convolutions; by default the four projections of all
            attention, as in the training scripts of diffusers.
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


@dataclass
class _State:
    """What a network knows of its adapters.

    `trainable` are the parameters that trained before the first one, `weights` of those that are on, `trained` the one
    that trains, `merged` the layers that merging took out, each with its weights of before.
    """

    trainable: frozenset[str]
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    trained: str | None = None
    merged: list[tuple[str, Any, Tensor]] | None = None
    peft_config: Any = None


def adaptable_layers(model: nn.Module) -> dict[str, Adaptable]:
    """The linear layers and convolutions of a network by the names that they have without adapters."""
    return {
        path.removesuffix(".base_layer"): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not {"lora_A", "lora_B"} & set(path.split("."))
    }


def lora_shapes(layer: Adaptable, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a layer: a convolution gets A of its own kernel and a B of 1x1."""
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    assert layer.groups == 1
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default", *, seed: int = 0) -> None:
    """Adds a new adapter, float32, which then trains alone; the output of the network is unchanged.

    A depends on `seed` alone. Older adapters stay as they are, frozen. ValueError without peft; for a name that is
    taken or no name; for a target that matches no linear layer or convolution; while adapters are merged.
    """
    check_new_name(model, name)
    layers = adaptable_layers(model)
    generator = torch.Generator().manual_seed(seed)
    chosen = set()  # layers whose name is, or ends with, one of the targets
    for target in config.target_modules:
        matches = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matches:
            ends = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2, 3)}
            near = difflib.get_close_matches(target, sorted(ends), n=3)
            usual = ", ".join(AdapterConfig.target_modules)
            advice = f"near it are {', '.join(near)}" if near else f"usual are {usual}"
            what = f"target_modules has {target!r}, which is the end of no linear layer's or convolution's name"
            raise ValueError(f"{what} here; {advice}")
        chosen |= matches
    loras = {}
    for module in sorted(chosen):
        down, up = lora_shapes(layers[module], config.rank)
        # As in LoRA's own code and peft.
        initial = nn.init.kaiming_uniform_(torch.empty(down), a=math.sqrt(5), generator=generator)
        alpha = float(config.rank if config.alpha is None else config.alpha)
        loras[module] = Lora(initial, torch.zeros(up), alpha)
    inject_adapter(model, loras, name)
    train_adapter(model, name)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters of a network, in the order in which they were added."""
    return tuple(getattr(model, _STATE).names) if hasattr(model, _STATE) else ()


def adapter_weights(model: nn.Module) -> dict[str, float]:
    """The adapters that are on, with their weights."""
    return dict(getattr(model, _STATE).weights) if hasattr(model, _STATE) else {}


def is_merged(model: nn.Module) -> bool:
    """Whether the adapters are folded into the weights of the network."""
    return hasattr(model, _STATE) and getattr(model, _STATE).merged is not None


def adapter_loras(model: nn.Module, name: str) -> dict[str, Lora]:
    """An adapter by layer; its tensors are those of the network, not copies."""
    _unmerged_state(model, name)
    return {
        plain_name(path): Lora(
            layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.lora_alpha[name])
        )
        for path, layer in _lora_layers(model).items()
        if name in layer.lora_A
    }


def set_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Turns on the named adapters, each times its finite weight w, and turns off the others; {} is all off."""
    for name, weight in weights.items():
        _unmerged_state(model, name)
        check_weight(name, weight)
    if not hasattr(model, _STATE):
        return
    state = _unmerged_state(model)
    for layer in _lora_layers(model).values():
        layer.enable_adapters(bool(weights))
        if weights:
            layer.set_adapter(list(weights))
        for name, weight in weights.items():
            layer.set_scale(name, weight)
    state.weights = dict(weights)
    _freeze(model, state)


def train_adapter(model: nn.Module, name: str = "default") -> None:
    """Lets this adapter train and freezes everything else in the network."""
    state = _unmerged_state(model, name)
    for layer in _lora_layers(model).values():
        if name in layer.lora_A:  # an optimizer cannot step in half precision
            layer.lora_A[name].float()
            layer.lora_B[name].float()
    state.trained = name
    _freeze(model, state)


def merge_adapters(model: nn.Module) -> None:
    """Folds the adapters that are on into the weights, W + Σ w (α / r) B A, and takes the adapter layers out.

    The old weights stay in the memory of the CPU. ValueError if there are no adapters, or a merged weight is not
    finite.
    """
    state = _unmerged_state(model)
    if not state.names:
        raise ValueError("there is no adapter to merge; load one first")
    layers = _lora_layers(model)
    # Subtracting B A from the merged weights would leave rounding errors; the old weights do not.
    merged = [(path, layer, layer.get_base_layer().weight.detach().cpu().clone()) for path, layer in layers.items()]
    for path, layer in layers.items() if state.weights else ():
        try:
            layer.merge(safe_merge=True, adapter_names=list(state.weights))
        except ValueError:
            _restore(merged)
            raise ValueError(f"merging gives weights in {path} that are not finite; lower those of adapters") from None
    for path, layer in layers.items():
        _replace(model, path, layer.get_base_layer())
    state.merged = merged
    state.peft_config = model.__dict__.pop("peft_config")
    _thaw(model, state)


def unmerge_adapters(model: nn.Module) -> None:
    """Undoes `merge_adapters`, bit for bit; what was done to the weights of adapted layers since is lost."""
    if not is_merged(model):
        raise ValueError("no adapter is merged here; there is nothing to undo")
    state: _State = getattr(model, _STATE)
    assert state.merged is not None
    _restore(state.merged)
    for path, layer, _ in state.merged:
        layer.to(layer.get_base_layer().weight.device)  # the network may have moved
        _replace(model, path, layer)
    state.merged, model.peft_config, state.peft_config = None, state.peft_config, None
    _freeze(model, state)


def remove_adapters(model: nn.Module) -> None:
    """Removes all adapters, merged ones too: weights, names and what trains are those of before the first one."""
    if not hasattr(model, _STATE):
        return
    if is_merged(model):
        unmerge_adapters(model)
    for path, layer in _lora_layers(model).items():
        _replace(model, path, layer.get_base_layer())
    model.__dict__.pop("peft_config")
    _thaw(model, getattr(model, _STATE))
    delattr(model, _STATE)


def check_new_name(model: nn.Module, name: str) -> None:
    """`ValueError` unless an adapter may be added under this name now."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot be the name of an adapter; use letters, digits, - and _, such as 'style'")
    if name in adapter_names(model):
        raise ValueError(f"there is an adapter {name!r} already; choose another name, or delete that one first")
    if is_merged(model):
        raise ValueError("adapters are merged here; unmerge them before adding another one")


def check_weight(name: str, weight: float) -> None:
    """`ValueError` unless an adapter can have this weight; negative ones lead away from what it learned."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"the weight of adapter {name!r} is {weight!r}; it must be a finite number, 1 as trained")


def inject_adapter(model: nn.Module, loras: Mapping[str, Lora], name: str, weight: float = 1.0) -> None:
    """Adds an adapter under a checked name, on with this weight, frozen, in dtype and on device of its layers."""
    peft = import_peft()
    if not hasattr(model, _STATE):
        trainable = frozenset(n for n, parameter in model.named_parameters() if parameter.requires_grad)
        setattr(model, _STATE, _State(trainable))
    state: _State = getattr(model, _STATE)
    keys = {f"{module}.lora_A.weight": lora.down for module, lora in loras.items()}  # peft reads the names only
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it samples numbers, which are overwritten
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # more than one adapter is meant
        peft.inject_adapter_in_model(peft.LoraConfig(**peft_settings(loras)), model, name, state_dict=keys)
    layers = {path: layer for path, layer in _lora_layers(model).items() if name in layer.lora_A}
    assert layers.keys() == loras.keys()
    for path, layer in layers.items():
        like = layer.get_base_layer().weight
        for part, tensor in ((layer.lora_A[name], loras[path].down), (layer.lora_B[name], loras[path].up)):
            part.to(like.device, like.dtype)
            part.weight.detach().copy_(tensor)
    state.names.append(name)
    set_adapters(model, {**state.weights, name: weight})


def peft_settings(loras: Mapping[str, Lora]) -> dict[str, Any]:
    """Keyword arguments of peft's `LoraConfig` for an adapter."""
    ranks = {module: len(lora.down) for module, lora in loras.items()}
    alphas = {module: int(a) if (a := lora.alpha).is_integer() else a for module, lora in loras.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(module): r for module, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {re.escape(module): a for module, a in sorted(alphas.items()) if a != alpha},
    }


def import_peft() -> Any:
    """peft; ValueError that says how to install it where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"LoRA needs peft, which cannot be imported ({error}); {pip_install('peft')}") from None
    return peft


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _unmerged_state(model: nn.Module, name: str | None = None) -> _State:
    """The state of the network, which has the adapter `name`, none of them merged."""
    names = adapter_names(model)
    if name is not None and name not in names:
        raise ValueError(f"there is no adapter {name!r} here; there are: {', '.join(names) or 'none'}")
    if is_merged(model):
        raise ValueError("the adapters are merged into the weights; unmerge them first")
    return getattr(model, _STATE) if hasattr(model, _STATE) else _State(frozenset())


def _freeze(model: nn.Module, state: _State) -> None:
    """All parameters but those of the adapter that trains."""
    ends = (f".lora_A.{state.trained}.weight", f".lora_B.{state.trained}.weight")
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path.endswith(ends))
        if not parameter.requires_grad:
            parameter.grad = None


def _thaw(model: nn.Module, state: _State) -> None:
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in state.trainable)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _restore(merged: Iterable[tuple[str, Any, Tensor]]) -> None:
    for _, layer, weight in merged:
        layer.get_base_layer().weight.detach().copy_(weight)
        layer.merged_adapters.clear()
