"""Learning rate, optimizer, and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm.config import TrainConfig
from ldm.wrapped import plain_name, plain_names

Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0-based): a function of the step, without a state."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        left = (config.max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
        return config.learning_rate * warmup * min(1.0, max(0.0, left))
    # SGDR (arXiv:1608.03983), Eq. 5, one period that ends at 0.
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def make_optimizer(model: nn.Module, config: TrainConfig, discriminator: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over all parameters that are trained, those of each network as a group."""
    networks = [model] if discriminator is None else [model, discriminator]
    return adamw(
        [{"params": [p for p in network.parameters() if p.requires_grad]} for network in networks],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def adamw(groups: list[dict[str, list[nn.Parameter]]], **settings: Any) -> torch.optim.AdamW:
    """AdamW in the way that is fastest: on a CPU fused, one pass over the memory; elsewhere what torch chooses."""
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, **settings, fused=True if on_cpu else None)


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the weights with decay min(d, (1 + n) / (10 + n)) at update n; the first is a copy.

    Weights that do not learn are not averaged but shared: the average of a small adapter is small.
    """

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        own = [(a, c) for a, c in zip(averaged, current, strict=True) if a.data_ptr() != c.data_ptr()]
        if own:  # torch calls this for each dtype, and those beneath an adapter may have one of their own
            torch._foreach_lerp_([a for a, _ in own], [c for _, c in own], 1 - min(decay, (1 + n) / (10 + n)))

    ema = AveragedModel(model, multi_avg_fn=average)
    for averaged, current in zip(ema.module.parameters(), model.parameters(), strict=True):
        if not current.requires_grad:
            averaged.data = current.data
    return ema.requires_grad_(False).eval()


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that learn, without those of wrappers."""
    return [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and counters as named tensors: `exp_avg.conv_in.weight` and so on."""
    return {
        f"{key}.{plain_name(name)}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    parameters = plain_names(dict(model.named_parameters()))
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU; the moments live beside their parameter.
        device = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(device, copy=True)
