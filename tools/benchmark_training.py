"""Time a training step of a small UNet on a CPU, with torch's attention and optimizer and with ours.

    python tools/benchmark_training.py [--config configs/openmoji-64.yaml] [--threads 1] [--rounds 5]

All variants take turns in one process; only the ratios matter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from ldm.config import LDMConfig
from ldm.config.overrides import load_config
from ldm.models import UNet, blocks

ROOT = Path(__file__).parents[1]
VARIANTS = {
    "torch's attention, AdamW tensor by tensor": (True, False),
    "torch's attention, AdamW fused": (True, True),
    "ours": (False, True),
}


def stepper(config: LDMConfig, torch_attention: bool, fused: bool) -> Callable[[], None]:
    """One optimizer step of a new network on random latents and captions; the shapes are those of the config."""
    assert config.unet is not None
    torch.manual_seed(0)
    side, channels, width = config.data.resolution // 4, 4, 384  # the built-in first stage and MiniLM
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
    unet = UNet(dataclasses.replace(config.unet, **sizes))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=fused)
    batch, tokens = config.train.batch_size, config.text.max_length or 77
    latents, states = torch.randn(batch, channels, side, side), torch.randn(batch, tokens, width)
    timesteps = torch.randint(1000, (batch,))
    half = config.train.mixed_precision == "bf16"

    def step() -> None:
        with (
            mock.patch.object(blocks, "SHORT", 0 if torch_attention else blocks.SHORT),
            torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext(),
        ):
            loss = unet(latents, timesteps, states).float().square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_rounds(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each step function, round by round; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for series, step in zip(seconds, steps, strict=True):
            started = time.perf_counter()
            step()
            series.append(time.perf_counter() - started)
    return [series[1:] for series in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "openmoji-64.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, [], LDMConfig)
    found = time_rounds([stepper(config, *variant) for variant in VARIANTS.values()], arguments.rounds)
    for name, taken in zip(VARIANTS, found, strict=True):
        ratios = sorted(base / own for base, own in zip(found[0], taken, strict=True))
        print(
            f"{name:<42} {min(taken):.3f} s a step at best; {ratios[len(ratios) // 2]:.2f} times as fast as the first "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )


if __name__ == "__main__":
    main()
