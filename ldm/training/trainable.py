"""Which weights are trained, the learning rate, the optimizer and the EMA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm import lora
from ldm.config import LDMConfig, TrainConfig
from ldm.models import UNet
from ldm.weights import plain_name, plain_names

ADAPTER = "default"
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
Tensors = tuple[Tensor, ...] | list[Tensor]


def select_trainable(unet: UNet, config: LDMConfig) -> UNet:
    """Mark the parameters that are trained; adds the adapter for LoRA.

    Under mixed precision the frozen weights beneath an adapter are stored in half precision, which halves the memory
    of the model. They are never saved.
    """
    if config.start_from is None or config.finetune.method == "full":
        return unet.requires_grad_(True)
    unet.requires_grad_(False)
    if config.finetune.method == "attention":
        layers = attention_layers(unet)
        if not layers:
            raise ValueError(
                f"finetune.method is attention, but the UNet of {config.start_from} has none; choose full or lora"
            )
        for layer in layers:
            layer.requires_grad_(True)
        return unet
    if config.train.mixed_precision in HALF:
        unet.to(HALF[config.train.mixed_precision])
    settings = lora.AdapterConfig(
        rank=config.finetune.rank, alpha=config.finetune.alpha, target_modules=config.finetune.target_modules
    )
    lora.add_adapter(unet, settings, ADAPTER, seed=config.seed)
    return unet


def attention_layers(unet: UNet) -> list[nn.Module]:
    """Self- and cross-attention of all transformer blocks, with their query, key, value and output projections."""
    return [layer for name, layer in unet.named_modules() if name.rsplit(".", 1)[-1] in ("attn1", "attn2")]


@contextmanager
def weight_precision(network: nn.Module) -> Iterator[None]:
    """Autocast to the dtype of the network's weights: those beneath an adapter may be half, the adapter is not."""
    weight = next(network.parameters())
    half = weight.dtype in HALF.values()
    with torch.autocast(weight.device.type, weight.dtype if half else torch.bfloat16, enabled=half):
        yield


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based), a function of the step alone."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_schedule == "constant":
        left = (config.max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
        return config.learning_rate * warmup * min(1.0, max(0.0, left))
    # SGDR (arXiv:1608.03983), Eq. 5, one period that ends at 0.
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def make_optimizer(model: nn.Module, config: TrainConfig, discriminator: nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over all trainable parameters, one group per network."""
    networks = [model] if discriminator is None else [model, discriminator]
    return adamw(
        [{"params": [p for p in network.parameters() if p.requires_grad]} for network in networks],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def adamw(groups: list[dict[str, list[nn.Parameter]]], **settings: Any) -> torch.optim.AdamW:
    """AdamW: fused on a CPU (one pass over the memory), torch's default elsewhere."""
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, **settings, fused=True if on_cpu else None)


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """EMA of the weights with decay min(d, (1 + n) / (10 + n)) at update n; the first update copies.

    Frozen weights are shared with the model instead of averaged.
    """

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        own = [(a, c) for a, c in zip(averaged, current, strict=True) if a.data_ptr() != c.data_ptr()]
        if own:  # torch calls this once per dtype; the weights beneath an adapter may have their own
            torch._foreach_lerp_([a for a, _ in own], [c for _, c in own], 1 - min(decay, (1 + n) / (10 + n)))

    ema = AveragedModel(model, multi_avg_fn=average)
    for averaged, current in zip(ema.module.parameters(), model.parameters(), strict=True):
        if not current.requires_grad:
            averaged.data = current.data
    return ema.requires_grad_(False).eval()


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the trainable parameters, without the prefixes of wrappers."""
    return [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and counters as named tensors: `exp_avg.conv_in.weight` and so on."""
    return {
        f"{key}.{plain_name(name)}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned."""
    parameters = plain_names(dict(model.named_parameters()))
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU; the moments are on the device of their parameter.
        device = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(device, copy=True)
