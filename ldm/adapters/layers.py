"""Adapters inside a network: added, weighted, merged into its weights and taken out again.

LoRA (Hu et al. 2022), section 4.1: a layer W x becomes W x + w (α / r) B A x, with A [r, in] drawn at random,
B [out, r] zero at first, and w the weight that an adapter is given when it is used. peft puts the layers in; what is
on, what trains and what was merged stands in one value on the network, so that a deep copy of it has that too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.lora import AdapterConfig, Lora, adaptable_layers, lora_shapes, peft_settings, target_layers
from ldm.requirements import pip_install
from ldm.weights import plain_name

_STATE = "_ldm_adapters"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class _State:
    """What a network knows of its adapters.

    `trainable` are the parameters that trained before the first adapter came; `weights` the adapters that are on;
    `trained` the one that trains; `merged` the layers that were taken out by merging, with the weights of before.
    """

    trainable: frozenset[str]
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    trained: str | None = None
    merged: list[tuple[str, Any, Tensor]] | None = None
    peft_config: Any = None


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default", *, seed: int = 0) -> None:
    """Puts a new adapter into a network, which then trains it and nothing else; the output is unchanged.

    A follows from `seed` alone, on any device; its tensors are float32 whatever the dtype of the network. Adapters
    that are there already stay as they are, frozen.

    Raises:
        ValueError: without peft; for a name that is taken or no name; for a target that matches no linear layer
            or convolution; while adapters are merged.
    """
    check_new_name(model, name)
    layers = adaptable_layers(model)
    generator = torch.Generator().manual_seed(seed)
    loras = {}
    for module in target_layers(layers, config.target_modules):
        down, up = lora_shapes(layers[module], config.rank)
        # As LoRA's own code and peft draw it.
        drawn = nn.init.kaiming_uniform_(torch.empty(down), a=math.sqrt(5), generator=generator)
        alpha = float(config.rank if config.alpha is None else config.alpha)
        loras[module] = Lora(drawn, torch.zeros(up), alpha)
    inject_adapter(model, loras, name)
    train_adapter(model, name)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters of a network, in the order in which they came."""
    return tuple(getattr(model, _STATE).names) if hasattr(model, _STATE) else ()


def adapter_weights(model: nn.Module) -> dict[str, float]:
    """The adapters that are on, with their weights."""
    return dict(getattr(model, _STATE).weights) if hasattr(model, _STATE) else {}


def is_merged(model: nn.Module) -> bool:
    """Whether the adapters are folded into the weights of the network."""
    return hasattr(model, _STATE) and getattr(model, _STATE).merged is not None


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter, not copied: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, by name."""
    _unmerged_state(model, name)
    found = {}
    for path, layer in _lora_layers(model).items():
        if name in layer.lora_A:
            found[f"{plain_name(path)}.lora_A.weight"] = layer.lora_A[name].weight.detach()
            found[f"{plain_name(path)}.lora_B.weight"] = layer.lora_B[name].weight.detach()
    return dict(sorted(found.items()))


def layer_alphas(model: nn.Module, name: str) -> dict[str, float]:
    """α of each layer that has the adapter."""
    layers = {plain_name(path): layer for path, layer in _lora_layers(model).items() if name in layer.lora_A}
    return {path: float(layer.lora_alpha[name]) for path, layer in layers.items()}


def set_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Turns on the adapters that are named, each times its weight w, and turns off the others; {} is all off.

    Raises:
        ValueError: for an unknown adapter or a weight that is not finite, and while adapters are merged.
    """
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
        if name in layer.lora_A:  # an optimiser cannot step in half precision
            layer.lora_A[name].float()
            layer.lora_B[name].float()
    state.trained = name
    _freeze(model, state)


def merge_adapters(model: nn.Module) -> None:
    """Folds the adapters that are on into the weights, W + Σ w (α / r) B A: no adapter layer is left.

    The network is then a plain one, as fast and with the parameter names of before. The old weights of the adapted
    layers are kept in the memory of the CPU for `unmerge_adapters`.

    Raises:
        ValueError: if there is no adapter or they are merged already; if a merged weight would not be finite.
    """
    state = _unmerged_state(model)
    if not state.names:
        raise ValueError("there is no adapter to merge; load one first")
    layers = _lora_layers(model)
    # Taking B A away from the merged weights again would leave errors of rounding; the old weights do not.
    merged = [(path, layer, layer.get_base_layer().weight.detach().cpu().clone()) for path, layer in layers.items()]
    for path, layer, _ in merged:
        if not state.weights:
            break
        try:
            layer.merge(safe_merge=True, adapter_names=list(state.weights))
        except ValueError:
            _restore(merged)
            raise ValueError(
                f"merging gives weights in {path} that are not finite; lower the adapters' weights"
            ) from None
    for path, layer, _ in merged:
        _replace(model, path, layer.get_base_layer())
    state.merged = merged
    state.peft_config = model.__dict__.pop("peft_config")
    _thaw(model, state)


def unmerge_adapters(model: nn.Module) -> None:
    """Undoes `merge_adapters`: the weights are, bit for bit, those of before, and the adapters on as they were.

    Whatever was done to the weights of adapted layers since is lost with that.

    Raises:
        ValueError: if nothing is merged.
    """
    if not is_merged(model):
        raise ValueError("no adapter is merged here; there is nothing to undo")
    state: _State = getattr(model, _STATE)
    assert state.merged is not None
    _restore(state.merged)
    for path, layer, _ in state.merged:
        base = layer.get_base_layer()
        layer.to(base.weight.device)  # the network may have moved
        _replace(model, path, layer)
    state.merged, model.peft_config, state.peft_config = None, state.peft_config, None
    _freeze(model, state)


def remove_adapters(model: nn.Module) -> None:
    """Takes all adapters out, merged ones too: weights, names and what trains are those of before the first one."""
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
    """Puts an adapter with these tensors into the layers of these names, on with this weight, frozen.

    The names are those of `adaptable_layers`, the shapes those of `lora_shapes`, the adapter's name is checked.
    Its tensors get device and dtype of the layers.
    """
    peft = _import_peft()
    if not hasattr(model, _STATE):
        trainable = frozenset(n for n, parameter in model.named_parameters() if parameter.requires_grad)
        setattr(model, _STATE, _State(trainable))
    state: _State = getattr(model, _STATE)
    settings = peft_settings({m: lora.rank for m, lora in loras.items()}, {m: lora.alpha for m, lora in loras.items()})
    keys = {f"{module}.lora_A.weight": lora.down for module, lora in loras.items()}  # peft reads the names only
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it draws numbers, which are overwritten here
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # more than one adapter is meant
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, name, state_dict=keys)
    layers = {path: layer for path, layer in _lora_layers(model).items() if name in layer.lora_A}
    assert layers.keys() == loras.keys()
    for path, layer in layers.items():
        like = layer.get_base_layer().weight
        for part, tensor in ((layer.lora_A[name], loras[path].down), (layer.lora_B[name], loras[path].up)):
            part.to(like.device, like.dtype)
            part.weight.detach().copy_(tensor)
    state.names.append(name)
    set_adapters(model, {**state.weights, name: weight})


def _import_peft() -> Any:
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
