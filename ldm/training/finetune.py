"""Which weights of a UNet learn when training goes on from a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm import adapters
from ldm.config import LDMConfig
from ldm.models import UNet

ADAPTER = "default"
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def prepare(unet: UNet, config: LDMConfig) -> UNet:
    """Marks the parameters that learn, and adds the adapter where that is what learns.

    Under mixed precision the weights beneath an adapter are kept in half precision, which halves the memory of the
    model; nothing of them is ever saved.
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
    settings = adapters.AdapterConfig(
        rank=config.finetune.rank, alpha=config.finetune.alpha, target_modules=config.finetune.target_modules
    )
    adapters.add_adapter(unet, settings, ADAPTER, seed=config.seed)
    return unet


@contextmanager
def precision_of(network: nn.Module) -> Iterator[None]:
    """Evaluates a network in the precision of its weights: those beneath an adapter may be half, the adapter is not."""
    weight = next(network.parameters())
    half = weight.dtype in HALF.values()
    with torch.autocast(weight.device.type, weight.dtype if half else torch.bfloat16, enabled=half):
        yield


def attention_layers(unet: UNet) -> list[nn.Module]:
    """Self- and cross-attention of all transformer blocks: their projections to queries, keys, values and back."""
    return [layer for name, layer in unet.named_modules() if name.rsplit(".", 1)[-1] in ("attn1", "attn2")]
