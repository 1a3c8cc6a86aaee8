"""`space: auto`: pixels or latents, decided by image size, data size and what a first stage does to this data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from ldm import checkpoint
from ldm.codecs import LatentCodec
from ldm.config import LDMConfig
from ldm.data import CaptionedImages, to_signed

DEFAULT_FIRST_STAGE = "openmoji-first-stage"
PIXELS_UP_TO = 32  # pixels a side: below, latents save nothing (a factor of 4 would leave 8 x 8)
PIXELS_AT_MOST = 64  # above, a UNet on pixels takes hours where one on latents takes minutes
GOOD_PSNR = 24.0  # dB: reconstructions in which faces and letters are still themselves
ENOUGH_IMAGES = 1000  # from here on a first stage of one's own generalises (docs/openmoji.md: 1,717 gave 29.8 dB)
MEASURED_IMAGES = 64


@dataclass(frozen=True)
class Choice:
    """A space, its first stage, and why.

    `train_first_stage` says that a first stage trained on this data would serve better than what there is.
    """

    space: Literal["pixel", "latent"]
    first_stage: str | None
    reason: str
    psnr: float | None = None
    train_first_stage: bool = False


def choose_space(config: LDMConfig, images: CaptionedImages, device: torch.device) -> tuple[LDMConfig, str | None]:
    """(the config with `space: auto` decided, the reason in one line); any other config as it is, and None."""
    if config.start_from is not None or config.space != "auto":
        return config, None
    choice = choose(images, config.first_stage, device)
    decided = dataclasses.replace(config, space=choice.space, first_stage=choice.first_stage)
    return decided, f"{choice.space}, because {choice.reason}"


def choose(images: CaptionedImages, first_stage: str | None, device: torch.device) -> Choice:
    """Decides for this data; `first_stage` is the one at hand, None the built-in one.

    Raises:
        ValueError: if a first stage that was named cannot be opened, or one is needed and does not divide the images.
    """
    resolution, count = images.config.resolution, len(images)
    if resolution <= PIXELS_UP_TO:
        return Choice("pixel", None, f"{resolution} pixels a side are few enough to diffuse directly")
    name = first_stage or DEFAULT_FIRST_STAGE
    codec = load_first_stage(name).to(device)
    if resolution > PIXELS_AT_MOST:
        images.check_factor(codec.factor)
    psnr = None
    if any(side % codec.factor for size in images.buckets.sizes for side in size):
        finding = f"the factor {codec.factor} of {name} does not divide {resolution}"
    else:
        psnr = reconstruction_psnr(codec, images, device)
        finding = f"{name} reconstructs these images at {psnr:.1f} dB"
        if psnr >= GOOD_PSNR:
            return Choice("latent", name, f"{finding}, {GOOD_PSNR:g} or more keep what matters", psnr)
    better = count >= ENOUGH_IMAGES and psnr is not None
    if better:
        advice = f"; {count} images suffice to train a first stage of one's own: train/train_autoencoder.py"
    else:
        advice = f" and {count} images are few to train a first stage on" if psnr is not None else ""
    if resolution <= PIXELS_AT_MOST:
        reason = f"{finding}, below {GOOD_PSNR:g}" if psnr is not None else finding
        return Choice("pixel", None, reason + advice, psnr, better)
    reason = f"{resolution} pixels a side are too many to diffuse directly, though {finding}, below {GOOD_PSNR:g}"
    return Choice("latent", name, reason + advice, psnr, better)


def load_first_stage(name: str) -> LatentCodec:
    """The autoencoder of a folder or hub id, or of the pipeline folder that holds it as `vae/`."""
    folder = checkpoint.find_autoencoder(name)
    autoencoder = checkpoint.load_autoencoder(folder)
    autoencoder.requires_grad_(False)
    return LatentCodec(autoencoder, source=folder)


@torch.no_grad()
def reconstruction_psnr(codec: LatentCodec, images: CaptionedImages, device: torch.device) -> float:
    """Mean PSNR in dB of reconstructions from the posterior's mean, over up to 64 images evenly from the data."""
    count = min(MEASURED_IMAGES, len(images))
    ratios = []
    for i in range(count):
        pixels = to_signed(images.image_at(i * len(images) // count))[None].to(device)  # [1, 3, H, W]
        decoded = codec.decode(codec.draw(codec.moments(pixels))).clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (pixels - decoded).square().mean().clamp(min=1e-12)))  # the range is 2
    return float(torch.stack(ratios).mean())
