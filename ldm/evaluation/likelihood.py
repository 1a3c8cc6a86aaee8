"""Negative log-likelihood of images under a model of pixels: the variational bound of DDPM (arXiv:2006.11239), Eq. 5.

−log₂ p(x_0 | caption) <= L_T + Σ L_t + L_0, in bits per dimension and averaged over images. Noise is a function of
(seed, image, timestep), so that estimates from some and from all timesteps share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.codecs import PixelCodec, decoder_of
from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import (
    NoiseSchedule,
    add_noise,
    variational_terms,
)
from ldm.diffusion.likelihood import prior_term
from ldm.evaluation.stats import NORMAL_95, student_quantile
from ldm.pipelines import Pipeline

IMAGE_BATCH = 32
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Stratum:
    """Mean of L_t over the evaluated timesteps from `first` to `last`, both included, and all images."""

    first: int
    last: int
    bits: float


@dataclass(frozen=True)
class Likelihood:
    """The bound over N images, bits per dimension.

    Attributes:
        prior, terms, decoder: L_T, the sum of L_t over t > 0, and L_0; they add up to `total`.
        interval: half-width of the 95 % interval of `total` over images (and sampled timesteps); nan for one image.
        timesteps_interval: half-width for the sampling of timesteps alone; 0 if all are evaluated.
        per_image: [N] totals, in the order of `ids`.
        curve: the terms over t.
        evaluations: of the network, over all images.
    """

    prior: float
    terms: float
    decoder: float
    total: float
    interval: float
    timesteps_interval: float
    per_image: Tensor
    ids: tuple[str, ...]
    curve: tuple[Stratum, ...]
    evaluations: int


@torch.inference_mode()
def measure_likelihood(
    pipeline: Pipeline,
    images: CaptionedImages,
    *,
    samples: int | None = None,
    steps_per_image: int | None = None,
    variance: Literal["small", "large"] = "small",
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Likelihood:
    """The bound of captioned images under a model of pixels; the first caption of each is the condition (guidance 1).

    Args:
        images: of the size of training, not augmented.
        samples: number of images, sampled without replacement; None takes all.
        steps_per_image: K: t = 0 and K more timesteps per image, two from each of K/2 strata of 1 … T − 1, which are
            shorter for small t; None takes all T.
        variance: σ² of p(x_{t−1} | x_t), β̃ or β; not for a network with learned variances.
        seed: for noise, images and timesteps.
        progress: called with the number of evaluations done since.

    Raises:
        ValueError: for a model of latents, images of another size, and numbers out of range.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be an integer from 0")
    codec, schedule = pipeline.codec, NoiseSchedule.from_config(pipeline.schedule)
    if not isinstance(codec, PixelCodec):
        raise ValueError(
            "this model diffuses latents, and an autoencoder has no likelihood of pixels, so there is no bound in "
            "bits of an image; use a model of pixels"
        )
    _check_size(pipeline, images)
    strata = _strata(schedule.num_train_timesteps, steps_per_image)
    terms = _Terms(pipeline, codec, schedule, strata, variance, seed, progress)
    prior, decoded, evaluated, ids = [], [], [], []
    for chunk in _chosen(images, samples, seed):
        pixels = torch.stack([images.image_at(i) for i in chunk])
        x_0 = codec.sample_latents(to_signed(pixels).to(terms.device))  # [b, C, H, W]
        prior.append(prior_term(schedule, x_0).cpu().double())
        samples_of = [images.samples[i] for i in chunk]
        first, others = terms(x_0, [one.id for one in samples_of], [one.captions[0] for one in samples_of])
        decoded.append(first)
        evaluated.append(others)
        ids += [one.id for one in samples_of]
    return _summary(torch.cat(prior), torch.cat(decoded), torch.cat(evaluated), strata, tuple(ids))


def _check_size(pipeline: Pipeline, images: CaptionedImages) -> None:
    height, width = pipeline.default_size
    side = images.config.resolution
    if (height, width) != (side, side):
        raise ValueError(
            f"data.resolution is {side} but the model was trained on {width}x{height} pixels; set it to the size of "
            "training"
        )


def _chosen(images: CaptionedImages, samples: int | None, seed: int) -> list[list[int]]:
    """Batches of indices of images of one shape."""
    if samples is not None and not 1 <= samples <= len(images):
        raise ValueError(f"samples is {samples}; it must be 1 to {len(images)}, the number of images")
    wanted = set(range(len(images)))
    if samples is not None:
        wanted = set(generator(seed, "likelihood", "images").permutation(len(images))[:samples].tolist())
    chunks = [[index for index in chunk if index in wanted] for chunk in images.chunks(len(images))]
    return [chunk[start : start + IMAGE_BATCH] for chunk in chunks for start in range(0, len(chunk), IMAGE_BATCH)]


def _strata(total: int, steps_per_image: int | None) -> list[range]:
    """1 … T − 1 in strata with two evaluated timesteps each; or each timestep by itself.

    Their lengths grow geometrically, since the terms are largest, and change fastest, for small t (Improved DDPM,
    arXiv:2102.09672, Figure 2).
    """
    if steps_per_image is None:
        return [range(t, t + 1) for t in range(1, total)]
    if steps_per_image % 2 or not 2 <= steps_per_image < total:
        raise ValueError(
            f"steps per image is {steps_per_image}; it must be an even number from 2 to {total - 1}; leave it out "
            "to evaluate all timesteps"
        )
    strata: list[range] = []
    start = 1
    for left in reversed(range(1, steps_per_image // 2 + 1)):  # strata, including this one
        ratio = (total / start) ** (1 / left)
        end = min(max(start + 2, round(start * ratio)), total - 2 * (left - 1))
        strata.append(range(start, end))
        start = end
    assert start == total, strata
    return strata


class _Terms:
    """L_0 and the other terms of a batch of images."""

    def __init__(
        self,
        pipeline: Pipeline,
        codec: PixelCodec,
        schedule: NoiseSchedule,
        strata: Sequence[range],
        variance: Literal["small", "large"],
        seed: int,
        progress: Callable[[int], object],
    ) -> None:
        self.network, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.device = pipeline.unet.conv_in.weight.device
        self.schedule, self.prediction_type = schedule, pipeline.schedule.prediction_type
        self.decoder, self.clip_x0 = decoder_of(codec), codec.clip_x0
        self.variance: Literal["small", "large", "learned"] = (
            "learned" if pipeline.unet.config.learned_variance else variance
        )
        self.strata, self.seed, self.progress = strata, seed, progress

    def __call__(self, original: Tensor, ids: Sequence[str], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] → L_0 [b] and L_t [b, strata, 1 or 2], float64 on the CPU."""
        timesteps = torch.stack([self._timesteps(name) for name in ids])  # [b, K + 1]
        unique = list(dict.fromkeys(captions))
        states = self.text_encoder(unique)[[unique.index(caption) for caption in captions]]  # [b, L, D]
        terms = torch.empty(timesteps.numel(), dtype=torch.float64)
        rows = torch.arange(len(ids)).repeat_interleave(timesteps.shape[1])
        for batch in torch.arange(len(terms)).split(EVALUATION_BATCH):
            row, at = rows[batch], timesteps.flatten()[batch]
            noise = [self._noise(ids[i], t, original) for i, t in zip(row.tolist(), at.tolist(), strict=True)]
            x_0 = original[row]  # [n, C, H, W]
            x_t = add_noise(x_0, torch.stack(noise).to(x_0), *self.schedule.coefficients(at, x_0))
            terms[batch] = variational_terms(
                self.network(x_t, at.to(x_t.device), states[row.to(states.device)]),
                x_t,
                x_0,
                self.schedule,
                at,
                decoder=self.decoder,
                prediction_type=self.prediction_type,
                variance=self.variance,
                clip_x0=self.clip_x0,
            ).to("cpu", torch.float64)
            self.progress(len(batch))
        terms = terms.view(timesteps.shape)
        return terms[:, 0], terms[:, 1:].unflatten(1, (len(self.strata), -1))

    def _timesteps(self, name: str) -> Tensor:
        """0, and the only timestep or two timesteps of each stratum, [K + 1]."""
        rng = generator(self.seed, "likelihood", "timesteps", name)
        chosen = [0]
        for stratum in self.strata:
            within = rng.choice(len(stratum), 2, replace=False).tolist() if len(stratum) > 1 else [0]
            chosen += [stratum[i] for i in within]
        return torch.tensor(chosen)

    def _noise(self, name: str, t: int, like: Tensor) -> Tensor:
        rng = generator(self.seed, "likelihood", "noise", name, t)
        return torch.from_numpy(rng.standard_normal(tuple(like.shape[1:]), "float32"))


def _summary(
    prior: Tensor,
    decoded: Tensor,
    evaluated: Tensor,
    strata: Sequence[range],
    ids: tuple[str, ...],
) -> Likelihood:
    """From L_T [N], L_0 [N] and the evaluated L_t [N, strata, 1 or 2]."""
    count, size = len(ids), torch.tensor([len(stratum) for stratum in strata], dtype=torch.float64)
    # Each stratum contributes its mean times its length: unbiased (Cochran, Sampling Techniques, chapter 5).
    terms = (size * evaluated.mean(dim=2)).sum(dim=1)  # [N]
    per_image = prior + terms + decoded
    added = torch.zeros(count, dtype=torch.float64)
    if evaluated.shape[2] == 2:
        # Its variance without replacement: n² (1 − 2/n) s²/2 with s² = (a − b)²/2.
        added = (size * (size - 2) * (evaluated[:, :, 0] - evaluated[:, :, 1]).square() / 4).sum(dim=1)  # [N]
    spread = float(per_image.std()) if count > 1 else math.nan
    quantile = student_quantile(0.95, count - 1) if count > 1 else math.nan
    curve = [Stratum(0, 0, float(decoded.mean()))]
    curve += [
        Stratum(stratum[0], stratum[-1], float(bits))
        for stratum, bits in zip(strata, evaluated.mean(dim=(0, 2)), strict=True)
    ]
    return Likelihood(
        prior=float(prior.mean()),
        terms=float(terms.mean()),
        decoder=float(decoded.mean()),
        total=float(per_image.mean()),
        interval=quantile * spread / math.sqrt(count),
        timesteps_interval=NORMAL_95 * math.sqrt(float(added.sum())) / count,
        per_image=per_image,
        ids=ids,
        curve=tuple(curve),
        evaluations=decoded.numel() + evaluated.numel(),
    )
