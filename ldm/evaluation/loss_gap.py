"""How much better a model knows its training images than others: the gap of the loss, by band of noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import NoiseSchedule, diffusion_loss, split_variance
from ldm.evaluation.frechet import student_quantile
from ldm.pipelines import Pipeline

BANDS = 4
IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class BandGap:
    """Mean L_simple over timesteps `first` to `last`, both included.

    Attributes:
        training, held_out: the two means.
        gap: held_out − training.
        interval: half of the 95 % interval of `gap`, over images; nan where one side has a single image.
    """

    first: int
    last: int
    training: float
    held_out: float
    gap: float
    interval: float


@dataclass(frozen=True)
class LossGap:
    """The bands from little noise to much, and how many images each side had."""

    bands: tuple[BandGap, ...]
    training_images: int
    held_out_images: int
    draws: int

    def widest(self) -> BandGap:
        """The band whose loss grows most from training to held-out images, by the lower end of the interval."""
        return max(self.bands, key=lambda band: least_growth(band))

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types of JSON; an interval that is not known is None."""
        plain: dict[str, Any] = asdict(self)
        for band in plain["bands"]:
            band["interval"] = None if math.isnan(band["interval"]) else band["interval"]
        plain["bands"] = list(plain["bands"])
        return plain


def least_growth(band: BandGap) -> float:
    """Lower end of the 95 % interval of the gap, as a share of the loss on training images; −∞ if it has no end."""
    if math.isnan(band.interval):
        return -math.inf
    return (band.gap - band.interval) / max(band.training, 1e-12)


@torch.inference_mode()
def loss_gap(
    pipeline: Pipeline,
    training: CaptionedImages,
    held_out: CaptionedImages,
    *,
    images: int = 128,
    draws: int,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> LossGap:
    """L_simple (DDPM, Eq. 14) of `images` training and as many held-out images, or of all where there are fewer.

    Image i of either side is seen with the same timesteps and the same noise. Images are neither flipped nor cropped
    at random, posteriors taken at their mean, captions the first of each image and never dropped.

    Args:
        images: how many of each side, drawn without repetition.
        draws: how often each is looked at in each of the four bands, at timesteps spread over the band.
        seed: of the images drawn, the timesteps and the noise.
        progress: is told how many evaluations were done since.

    Raises:
        ValueError: for numbers below 1.
    """
    for name, value in (("images", images), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    look = _Look(pipeline, draws, seed, progress)
    ours, theirs = look(training, images), look(held_out, images)  # [N, bands], [M, bands]
    steps = look.schedule.num_train_timesteps
    bands = []
    for band in range(BANDS):
        a, b = ours[:, band], theirs[:, band]
        means = float(a.mean()), float(b.mean())
        first, last = band * steps // BANDS, (band + 1) * steps // BANDS - 1
        bands.append(BandGap(first, last, *means, means[1] - means[0], _interval(a, b)))
    return LossGap(tuple(bands), len(ours), len(theirs), draws)


class _Look:
    """The loss of images, by band."""

    def __init__(self, pipeline: Pipeline, draws: int, seed: int, progress: Callable[[int], object] | None) -> None:
        self.pipeline, self.draws, self.seed, self.progress = pipeline, draws, seed, progress
        self.schedule = NoiseSchedule.from_config(pipeline.schedule)
        self.like = pipeline.unet.conv_in.weight

    def __call__(self, data: CaptionedImages, most: int) -> Tensor:
        """[N, bands] float64: of each image the mean over its draws."""
        order = generator(self.seed, "loss gap", "images").permutation(len(data))[:most].tolist()
        places = {index: place for place, index in enumerate(order)}
        losses = torch.empty(len(order), BANDS, dtype=torch.float64)
        for chunk in data.chunks(len(data)):
            wanted = [index for index in chunk if index in places]
            for start in range(0, len(wanted), IMAGES_AT_ONCE):
                some = wanted[start : start + IMAGES_AT_ONCE]
                losses[[places[index] for index in some]] = self._losses(data, some, [places[index] for index in some])
        return losses

    def _losses(self, data: CaptionedImages, indices: list[int], places: list[int]) -> Tensor:
        codec = self.pipeline.codec
        pixels = to_signed(torch.stack([data.image_at(index) for index in indices])).to(self.like)
        latents = codec.sample_latents(codec.moments(pixels))  # [b, C, h, w]
        states = self.pipeline.text_encoder([data.samples[index].captions[0] for index in indices]).to(self.like)
        losses = torch.zeros(len(indices), BANDS, dtype=torch.float64)
        for band in range(BANDS):
            for draw in range(self.draws):
                timesteps, noise = self._drawn(places, band, draw, latents)
                losses[:, band] += (
                    diffusion_loss(
                        self._predict,
                        self.schedule,
                        latents,
                        states,
                        timesteps=timesteps,
                        noise=noise,
                        prediction_type=self.pipeline.schedule.prediction_type,
                    )
                    .cpu()
                    .double()
                )
                if self.progress is not None:
                    self.progress(len(indices))
        return losses / self.draws

    def _predict(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network without the variances that it may have learned."""
        return split_variance(self.pipeline.unet(x_t, timesteps, condition), x_t)[0]

    def _drawn(self, places: list[int], band: int, draw: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [b] of the `draw`-th part of the band, and noise [b, C, h, w]: functions of seed and place."""
        steps = self.schedule.num_train_timesteps
        first, end = band * steps / BANDS, (band + 1) * steps / BANDS
        timesteps, noise = [], []
        for place in places:
            random = generator(self.seed, "loss gap", place, band, draw)
            timesteps.append(min(int(first + (end - first) * (draw + random.random()) / self.draws), steps - 1))
            noise.append(torch.from_numpy(random.standard_normal(tuple(like.shape[1:]), "float32")))
        return torch.tensor(timesteps), torch.stack(noise).to(like)


def _interval(ours: Tensor, theirs: Tensor) -> float:
    """Half of the 95 % interval of the difference of two means; degrees of freedom of the smaller side."""
    least = min(len(ours), len(theirs))
    if least < 2:
        return math.nan
    error = math.sqrt(float(ours.var() / len(ours) + theirs.var() / len(theirs)))
    return student_quantile(0.95, least - 1) * error
