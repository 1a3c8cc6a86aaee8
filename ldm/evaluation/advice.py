"""What to do about a first stage and some images: use it, fine-tune its decoder, train one, or stay with pixels.

One rule for `ldm autoencoder evaluate` and `space: auto`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.codecs import LatentCodec
from ldm.data import CaptionedImages, to_signed
from ldm.evaluation.readout import readout_psnr
from ldm.evaluation.similarity import psnr
from ldm.models import PerceptualDistance

PIXELS_UP_TO = 32  # pixels a side: below, latents save nothing (a factor of 4 would leave 8 x 8)
PIXELS_AT_MOST = 64  # above, a UNet on pixels takes hours where one on latents takes minutes
GOOD_PSNR = 24.0  # dB: reconstructions in which faces and letters are still themselves
# PSNR alone is blind on smooth images: photographs in 8 of their 64 pixels a side still have 34 dB. Reduced to 24 of
# 64 and enlarged again, where eyes and letters go, OpenMoji have a perceptual distance of 0.18 to what they were, and
# photographs 0.21 and 0.26, at 18, 39 and 26 dB.
GOOD_PERCEPTUAL = 0.2
# dB of a linear readout of the latents from which on the decoder, tuned, will be good: see `evaluation.readout`.
GOOD_READOUT = 23.0
ENOUGH_IMAGES = 1000  # from here on a first stage of one's own generalises (docs/openmoji.md: 1,717 gave 29.8 dB)
MEASURED_IMAGES = 64

Action = Literal["use", "tune", "train", "pixels"]
WORDS: dict[Action, str] = {
    "use": "use it",
    "tune": "fine-tune its decoder",
    "train": "train one",
    "pixels": "go to pixels",
}


@dataclass(frozen=True)
class Findings:
    """What the advice follows from.

    Attributes:
        name: of the first stage.
        resolution: of the images, pixels a side.
        images: how many there are to train on.
        psnr: of reconstructions, dB, a mean over images; None where the factor does not divide the images.
        perceptual: distance of reconstructions to the images, a mean; None where it cannot be measured.
        readout: dB that a linear readout of the latents reaches; None where it was not, or cannot be, measured.
        factor: pixels a latent in height and width.
    """

    name: str
    resolution: int
    images: int
    psnr: float | None
    perceptual: float | None
    readout: float | None
    factor: int

    @property
    def good(self) -> bool:
        """Whether reconstructions keep what matters."""
        return self.psnr is not None and self.psnr >= GOOD_PSNR and (self.perceptual or 0.0) <= GOOD_PERCEPTUAL

    @property
    def held(self) -> bool:
        """Whether the latents hold what the decoder does not show."""
        if self.psnr is None or self.readout is None:
            return False
        return self.readout >= GOOD_READOUT

    def sentence(self) -> str:
        """What was found, and what it is measured against."""
        if self.psnr is None:
            return f"the factor {self.factor} of {self.name} does not divide {self.resolution}"
        text = f"{self.name} reconstructs these images at {self.psnr:.1f} dB"
        if self.perceptual is not None:
            text += f" and a perceptual distance of {self.perceptual:.2f}"
        if self.good:
            limits = f"{GOOD_PSNR:g} or more" if self.perceptual is None else f"{GOOD_PSNR:g} and {GOOD_PERCEPTUAL:g}"
            return f"{text}, {limits} keep what matters"
        if self.psnr < GOOD_PSNR:
            return f"{text}, below {GOOD_PSNR:g}"
        return f"{text}, above {GOOD_PERCEPTUAL:g}"


@dataclass(frozen=True)
class Advice:
    """What to do, and why, each in words."""

    action: Action
    why: str

    def line(self) -> str:
        return f"advice: {WORDS[self.action]}, because {self.why}"


def advise(found: Findings) -> Advice:
    """The rule. From cheap to expensive, the first that will do."""
    if found.resolution <= PIXELS_UP_TO:
        return Advice("pixels", small_enough(found.resolution))
    why = found.sentence()
    if found.good:
        return Advice("use", why)
    if found.held:
        assert found.readout is not None
        return Advice(
            "tune",
            f"{why}, but its latents hold more, for a linear readout of them has {found.readout:.1f} dB: "
            "train/train_autoencoder.py with start_from and trained: decoder",
        )
    small = found.resolution <= PIXELS_AT_MOST
    if found.psnr is not None:
        if found.images >= ENOUGH_IMAGES:
            return Advice(
                "train",
                f"{why}, and {found.images} images suffice to train a first stage of one's own (or that one longer, if "
                "it is one): train/train_autoencoder.py",
            )
        why += f" and {found.images} images are few to train a first stage on"
    if small:
        return Advice("pixels", why)
    return Advice("use", f"{found.resolution} pixels a side are too many to diffuse directly, though {why}")


def small_enough(resolution: int) -> str:
    """The reason that needs no first stage."""
    return f"{resolution} pixels a side are few enough to diffuse directly"


@torch.no_grad()
def look(
    codec: LatentCodec, name: str, images: CaptionedImages, device: torch.device, perceptual: PerceptualDistance | None
) -> Findings:
    """What is found on up to 64 images, evenly from the data; reconstructions are those of the posterior's mean.

    The readout is only measured where reconstructions are not good, for it decides nothing else.
    """
    count, resolution = len(images), images.config.resolution
    found = Findings(name, resolution, count, psnr=None, perceptual=None, readout=None, factor=codec.factor)
    if any(side % codec.factor for size in images.buckets.sizes for side in size):
        return found
    measured = min(MEASURED_IMAGES, count)
    pictures, ratios, distances = [], [], []
    for i in range(measured):
        picture = to_signed(images.image_at(i * count // measured))[None].to(device)  # [1, 3, H, W]
        decoded = codec.decode(codec.sample_latents(codec.moments(picture))).clamp(-1, 1)
        ratios.append(psnr(picture, decoded))
        if perceptual is not None:
            distances.append(perceptual(picture, decoded))
        pictures.append(picture)
    found = dataclasses.replace(
        found,
        psnr=float(torch.cat(ratios).mean()),
        perceptual=float(torch.cat(distances).mean()) if distances else None,
    )
    return found if found.good else dataclasses.replace(found, readout=readout_of(codec, pictures))


def readout_of(codec: LatentCodec, images: Sequence[Tensor], helping: Sequence[Tensor] = ()) -> float | None:
    """The mean of `readout_psnr` over `images`, None where there are too few; it is fitted to `helping` images too."""
    read = readout_psnr(codec, [*images, *helping])
    return None if read is None else float(read[: len(images)].mean())
