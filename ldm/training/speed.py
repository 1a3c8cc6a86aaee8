"""How fast a network learns on this machine, before there is a run: what `ldm train` chooses sizes and steps by."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models import FirstStage, UNet

ENOUGH_SECONDS = 2.0
MOST_REPEATS = 3


def unet_seconds(
    unet: UNet, shape: tuple[int, int, int], text: tuple[int, int], batch: int, device: torch.device, precision: str
) -> float:
    """Seconds of a forward and a backward pass for `batch` latents of a shape (C, h, w).

    Args:
        text: tokens of a caption, and the width of their states.
        precision: "no" or "bf16", as `train.mixed_precision` says it.
    """
    latents = torch.randn(batch, *shape, device=device)
    states = torch.randn(batch, *text, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)

    def loss() -> Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            return unet(latents, timesteps, states).float().square().mean()

    return _least_seconds(loss, unet, device)


def autoencoder_seconds(autoencoder: FirstStage, resolution: int, batch: int, device: torch.device) -> float:
    """Seconds of a forward and a backward pass for `batch` square images."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    return _least_seconds(lambda: autoencoder(images)[0].square().mean(), autoencoder, device)


def _least_seconds(loss: Callable[[], Tensor], network: torch.nn.Module, device: torch.device) -> float:
    """Of a few calls, fewer where they are slow; the first does more than is asked."""
    times: list[float] = []
    while not times or (len(times) < MOST_REPEATS and sum(times) < ENOUGH_SECONDS):
        started = time.perf_counter()
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        network.zero_grad(set_to_none=True)
    return min(times)
