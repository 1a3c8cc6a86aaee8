"""`space: auto`: pixels or latents, by image size, number of images and how well a first stage reconstructs them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from ldm.config import LDMConfig
from ldm.data import CaptionedImages
from ldm.evaluation.autoencoder import (
    MAX_PIXEL_RESOLUTION,
    MAX_SLOW_PIXEL_RESOLUTION,
    Action,
    advise,
    measure_reconstruction,
    no_first_stage_reason,
)
from ldm.models.efficientnet import is_installed, perceptual_distance
from ldm.training.components import load_first_stage

DEFAULT_FIRST_STAGE = "openmoji-first-stage"


@dataclass(frozen=True)
class SpaceChoice:
    """A space, its first stage, and the reason.

    Attributes:
        advice: what `ldm autoencoder evaluate` recommends. "tune" or "train": training the decoder or a first stage on
            these images would give better latents.
    """

    space: Literal["pixel", "latent"]
    first_stage: str | None
    reason: str
    psnr: float | None = None
    advice: Action | None = None

    @property
    def train_first_stage(self) -> bool:
        return self.advice == "train"

    @property
    def tune_decoder(self) -> bool:
        return self.advice == "tune"


def choose_space(config: LDMConfig, images: CaptionedImages, device: torch.device) -> tuple[LDMConfig, str | None]:
    """(the config with `space: auto` resolved, the reason); any other config unchanged, and None."""
    if config.start_from is not None or config.space != "auto":
        return config, None
    choice = decide_space(images, config.first_stage, device)
    resolved = dataclasses.replace(config, space=choice.space, first_stage=choice.first_stage)
    return resolved, f"{choice.space}, because {choice.reason}"


def decide_space(images: CaptionedImages, first_stage: str | None, device: torch.device) -> SpaceChoice:
    """Choose the space for this data.

    Args:
        first_stage: the one to use; None for the built-in one.

    Raises:
        ValueError: if the first stage cannot be opened, or the image size is not a multiple of its downsampling factor
            and too large for pixels.
    """
    resolution = images.config.resolution
    if resolution <= MAX_PIXEL_RESOLUTION:
        return SpaceChoice("pixel", None, no_first_stage_reason(resolution), advice="pixels")
    name = first_stage or DEFAULT_FIRST_STAGE
    codec = load_first_stage(name).to(device)
    if resolution > MAX_SLOW_PIXEL_RESOLUTION:
        images.check_factor(codec.factor)
    # Without its packages PSNR decides alone.
    perceptual = perceptual_distance(device) if is_installed() else None
    found = measure_reconstruction(codec, name, images, device, perceptual)
    advice = advise(found)
    # A first stage that has to be trained does not exist yet; small images are diffused as pixels until then.
    if advice.action == "pixels" or (advice.action != "use" and resolution <= MAX_SLOW_PIXEL_RESOLUTION):
        return SpaceChoice("pixel", None, advice.why, found.psnr, advice.action)
    return SpaceChoice("latent", name, advice.why, found.psnr, advice.action)
