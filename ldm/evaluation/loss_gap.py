"""The gap between the loss on training and on held-out images, by band of noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import NOISE_BANDS, NoiseSchedule, diffusion_loss, noise_bands, without_variance
from ldm.evaluation.stats import student_quantile
from ldm.pipelines import Pipeline

BATCH_SIZE = 32


@dataclass(frozen=True)
class BandGap:
    """Mean L_simple over timesteps `first` to `last`, both included.

    Attributes:
        training, held_out: the two means.
        gap: held_out − training.
        interval: half-width of the 95 % interval of `gap` over images; nan where a side has a single image.
    """

    first: int
    last: int
    training: float
    held_out: float
    gap: float
    interval: float

    @property
    def min_relative_gap(self) -> float:
        """Lower end of the 95 % interval of the gap over the loss on training images; −∞ without an interval."""
        return -math.inf if math.isnan(self.interval) else (self.gap - self.interval) / max(self.training, 1e-12)


@dataclass(frozen=True)
class LossGap:
    """The bands, from little noise to much, the number of images on each side, and the noise draws per band."""

    bands: tuple[BandGap, ...]
    training_images: int
    held_out_images: int
    draws: int

    def widest(self) -> BandGap:
        """The band with the largest `min_relative_gap`."""
        return max(self.bands, key=lambda band: band.min_relative_gap)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an unknown interval is None."""
        plain: dict[str, Any] = asdict(self)
        for band in plain["bands"]:
            band["interval"] = None if math.isnan(band["interval"]) else band["interval"]
        plain["bands"] = list(plain["bands"])
        return plain


@torch.inference_mode()
def loss_gap(
    pipeline: Pipeline,
    training: CaptionedImages,
    held_out: CaptionedImages,
    *,
    images: int = 128,
    draws: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> LossGap:
    """L_simple (DDPM, Eq. 14) of `images` training and as many held-out images, or all where there are fewer.

    Image i of either side gets the same timesteps and noise. Images are not augmented, latents are posterior means,
    captions are the first of each image and never dropped.

    Args:
        images: per side, sampled without replacement.
        draws: evaluations of each image per band, at timesteps stratified over the band.
        seed: for images, timesteps and noise.
        progress: called with the number of evaluations done since.

    Raises:
        ValueError: for numbers below 1.
    """
    for name, value in (("images", images), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    losses = _BandLosses(pipeline, draws, seed, progress)
    ours, theirs = losses(training, images), losses(held_out, images)  # [N, bands], [M, bands]
    bands = []
    for number, band in enumerate(noise_bands(losses.schedule.num_train_timesteps)):
        a, b = ours[:, number], theirs[:, number]
        means = float(a.mean()), float(b.mean())
        bands.append(BandGap(band[0], band[-1], *means, means[1] - means[0], _half_width(a, b)))
    return LossGap(tuple(bands), len(ours), len(theirs), draws)


class _BandLosses:
    """The loss of images, by band."""

    def __init__(self, pipeline: Pipeline, draws: int, seed: int, progress: Callable[[int], object]) -> None:
        self.pipeline, self.draws, self.seed, self.progress = pipeline, draws, seed, progress
        self.schedule = NoiseSchedule.from_config(pipeline.schedule)
        self.like = pipeline.unet.conv_in.weight

    def __call__(self, data: CaptionedImages, max_images: int) -> Tensor:
        """[N, bands] float64: the mean of each image over its draws."""
        order = generator(self.seed, "loss gap", "images").permutation(len(data))[:max_images].tolist()
        positions = {index: position for position, index in enumerate(order)}
        losses = torch.empty(len(order), NOISE_BANDS, dtype=torch.float64)
        for chunk in data.chunks(len(data)):
            selected = [index for index in chunk if index in positions]
            for start in range(0, len(selected), BATCH_SIZE):
                batch = selected[start : start + BATCH_SIZE]
                rows = [positions[index] for index in batch]
                losses[rows] = self._losses(data, batch, rows)
        return losses

    def _losses(self, data: CaptionedImages, indices: list[int], positions: list[int]) -> Tensor:
        codec = self.pipeline.codec
        pixels = to_signed(torch.stack([data.image_at(index) for index in indices])).to(self.like)
        latents = codec.sample_latents(codec.moments(pixels))  # [b, C, h, w]
        states = self.pipeline.text_encoder([data.samples[index].captions[0] for index in indices]).to(self.like)
        losses = torch.zeros(len(indices), NOISE_BANDS, dtype=torch.float64)
        for band in range(NOISE_BANDS):
            for draw in range(self.draws):
                timesteps, noise = self._noise(positions, band, draw, latents)
                loss = diffusion_loss(
                    without_variance(self.pipeline.unet),
                    self.schedule,
                    latents,
                    states,
                    timesteps=timesteps,
                    noise=noise,
                    prediction_type=self.pipeline.schedule.prediction_type,
                )
                losses[:, band] += loss.cpu().double()
                self.progress(len(indices))
        return losses / self.draws

    def _noise(self, positions: list[int], band: int, draw: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [b] in the `draw`-th part of the band, and noise [b, C, h, w]: functions of seed and position."""
        steps = self.schedule.num_train_timesteps
        first, end = band * steps / NOISE_BANDS, (band + 1) * steps / NOISE_BANDS
        timesteps, noise = [], []
        for position in positions:
            rng = generator(self.seed, "loss gap", position, band, draw)
            timesteps.append(min(int(first + (end - first) * (draw + rng.random()) / self.draws), steps - 1))
            noise.append(torch.from_numpy(rng.standard_normal(tuple(like.shape[1:]), "float32")))
        return torch.tensor(timesteps), torch.stack(noise).to(like)


def _half_width(ours: Tensor, theirs: Tensor) -> float:
    """Of the 95 % interval of the difference of two means; degrees of freedom of the smaller side."""
    smaller = min(len(ours), len(theirs))
    if smaller < 2:
        return math.nan
    error = math.sqrt(float(ours.var() / len(ours) + theirs.var() / len(theirs)))
    return student_quantile(0.95, smaller - 1) * error
