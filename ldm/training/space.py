"""`space: auto`: pixels or latents, decided by image size, data size and what a first stage does to this data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from ldm import checkpoint
from ldm.codecs import LatentCodec
from ldm.config import LDMConfig
from ldm.data import CaptionedImages
from ldm.evaluation.advice import PIXELS_AT_MOST, PIXELS_UP_TO, Action, advise, look, small_enough
from ldm.evaluation.efficientnet import is_installed
from ldm.evaluation.perceptual import perceptual_distance

DEFAULT_FIRST_STAGE = "openmoji-first-stage"


@dataclass(frozen=True)
class SpaceChoice:
    """A space, its first stage, and why.

    `advice` is what `ldm autoencoder evaluate` would say. Where it is "tune" or "train", latents of a first stage that
    has learned from these images, or whose decoder has, would serve better than what there is.
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
    """(the config with `space: auto` decided, the reason in one line); any other config as it is, and None."""
    if config.start_from is not None or config.space != "auto":
        return config, None
    choice = decide_space(images, config.first_stage, device)
    decided = dataclasses.replace(config, space=choice.space, first_stage=choice.first_stage)
    return decided, f"{choice.space}, because {choice.reason}"


def decide_space(images: CaptionedImages, first_stage: str | None, device: torch.device) -> SpaceChoice:
    """Decides for this data; `first_stage` is the one at hand, None the built-in one.

    Raises:
        ValueError: if a first stage that was named cannot be opened, or one is needed and does not divide the images.
    """
    resolution = images.config.resolution
    if resolution <= PIXELS_UP_TO:  # no first stage need be opened
        return SpaceChoice("pixel", None, small_enough(resolution), advice="pixels")
    name = first_stage or DEFAULT_FIRST_STAGE
    codec = load_first_stage(name).to(device)
    if resolution > PIXELS_AT_MOST:
        images.check_factor(codec.factor)
    # Without its packages PSNR decides alone, and the reason names no perceptual distance.
    perceptual = perceptual_distance(device) if is_installed() else None
    found = look(codec, name, images, device, perceptual)
    advice = advise(found)
    # What is to be trained first is not there yet; small images are diffused as they are until it is.
    if advice.action == "pixels" or (advice.action != "use" and resolution <= PIXELS_AT_MOST):
        return SpaceChoice("pixel", None, advice.why, found.psnr, advice.action)
    return SpaceChoice("latent", name, advice.why, found.psnr, advice.action)


def load_first_stage(name: str) -> LatentCodec:
    """The autoencoder of a folder or hub id, or of the pipeline folder that holds it as `vae/`."""
    folder = checkpoint.find_autoencoder(name)
    autoencoder = checkpoint.load_autoencoder(folder)
    autoencoder.requires_grad_(False)
    return LatentCodec(autoencoder, source=folder)
