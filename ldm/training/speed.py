"""How fast a network learns on this machine, before there is a run: what `ldm train` chooses sizes and steps by."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

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
    return _typical_seconds(unet_pass(unet, shape, text, batch, device, precision), unet, device)


def unet_pass(
    unet: nn.Module,
    shape: tuple[int, int, int],
    text: tuple[int, int],
    batch: int,
    device: torch.device,
    precision: str,
) -> Callable[[], None]:
    """The passes of `unet_seconds`, which leave gradients behind."""
    latents = torch.randn(batch, *shape, device=device)
    states = torch.randn(batch, *text, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)

    def passes() -> None:
        autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = unet(latents, timesteps, states).float().square().mean()
        loss.backward()

    return passes


def autoencoder_seconds(autoencoder: FirstStage, resolution: int, batch: int, device: torch.device) -> float:
    """Seconds of a forward and a backward pass for `batch` square images."""
    return _typical_seconds(autoencoder_pass(autoencoder, resolution, batch, device), autoencoder, device)


def autoencoder_pass(autoencoder: FirstStage, resolution: int, batch: int, device: torch.device) -> Callable[[], None]:
    """The passes of `autoencoder_seconds`, which leave gradients behind."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    return lambda: autoencoder(images)[0].square().mean().backward()


def _typical_seconds(passes: Callable[[], None], network: nn.Module, device: torch.device) -> float:
    """The median of a few calls, fewer where they are slow; the first, which does more than is asked, does not count
    beside others.
    """
    times: list[float] = []
    while len(times) < 1 + MOST_REPEATS and sum(times) < ENOUGH_SECONDS:
        started = time.perf_counter()
        passes()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        network.zero_grad(set_to_none=True)
    return statistics.median(times[1:] or times)
