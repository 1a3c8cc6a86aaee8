"""How many bits a model of pixels needs for an image: the variational bound of DDPM (arXiv:2006.11239), Eq. 5, on data.

−log₂ p(x_0 | caption) <= L_T + Σ L_t + L_0, each in bits per dimension and averaged over images. Noise is a function
of (seed, image, timestep), so that the estimate from some timesteps and the sum over all are about the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.codecs import Codec, PixelCodec
from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import (
    Decoder,
    NoiseSchedule,
    add_noise,
    discretized_decoder,
    gaussian_decoder,
    variational_terms,
)
from ldm.diffusion.likelihood import prior_term
from ldm.evaluation.frechet import NORMAL_95, student_quantile
from ldm.pipelines import Pipeline

IMAGES_AT_ONCE = 32
EVALUATIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Stratum:
    """Mean of L_t over timesteps `first` to `last`, both included: of those looked at, in all images."""

    first: int
    last: int
    bits: float


@dataclass(frozen=True)
class Likelihood:
    """The bound over N images, bits per dimension.

    Attributes:
        prior, terms, decoder: L_T, the sum of L_t over t > 0, and L_0; they add up to `total`.
        interval: half of the 95 % interval of `total` over images (and timesteps, where they are drawn); nan for one.
        timesteps_interval: half of the 95 % interval of what drawing timesteps adds to these images; 0 where all are
            looked at.
        per_image: [N] totals, in the order of `ids`.
        curve: the terms over t.
        evaluations: how often the network was asked about an image.
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


def decoder_of(codec: Codec) -> Decoder:
    """log p(x_0 | x_1) of the variational bound: pixels are one of 256 values, latents have a density."""
    if isinstance(codec, PixelCodec):
        return discretized_decoder(codec.mean.flatten().tolist(), codec.std.flatten().tolist())
    return gaussian_decoder


@torch.inference_mode()
def likelihood(
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
        images: as the model was trained on them; neither flipped nor cropped at random.
        samples: how many of them, drawn without repetition; None takes all.
        steps_per_image: K: t = 0 and K more timesteps an image, two from each of K/2 strata of 1 … T − 1, short
            where t is small; None takes all T.
        variance: σ² of p(x_{t−1} | x_t), β̃ or β; a network that has learned it brings its own.
        seed: of the noise, of the images drawn and of the timesteps.
        progress: is told how many evaluations were done since.

    Raises:
        ValueError: for a model of latents, images of another size, and numbers out of range.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 on")
    codec, schedule = pipeline.codec, NoiseSchedule.from_config(pipeline.schedule)
    if not isinstance(codec, PixelCodec):
        raise ValueError(
            "this model diffuses latents: the bound would be one on the density of its latents, and says nothing about "
            "bits of an image, for the autoencoder gives no likelihood of pixels; take a model of pixels"
        )
    _check_size(pipeline, images)
    strata = _strata(schedule.num_train_timesteps, steps_per_image)
    look = _Look(pipeline, codec, schedule, strata, variance, seed, progress)
    prior, decoded, seen, ids = [], [], [], []
    for chunk in _chosen(images, samples, seed):
        x_0 = codec.sample_latents(
            to_signed(torch.stack([images.image_at(i) for i in chunk])).to(look.device)
        )  # [b, C, H, W]
        prior.append(prior_term(schedule, x_0).cpu().double())
        first, others = look(x_0, [images.samples[i].id for i in chunk], [images.samples[i].captions[0] for i in chunk])
        decoded.append(first)
        seen.append(others)
        ids += [images.samples[i].id for i in chunk]
    return _summary(torch.cat(prior), torch.cat(decoded), torch.cat(seen), strata, tuple(ids))


def _check_size(pipeline: Pipeline, images: CaptionedImages) -> None:
    height, width = pipeline.default_size
    side = images.config.resolution
    if (height, width) != (side, side):
        raise ValueError(
            f"data.resolution is {side} but the model was trained on {width}x{height} pixels, and bits per dimension "
            "of another size are about other images; set it to the size of training"
        )


def _chosen(images: CaptionedImages, samples: int | None, seed: int) -> list[list[int]]:
    """Indices of the images, those of one shape together."""
    if samples is not None and not 1 <= samples <= len(images):
        raise ValueError(f"samples is {samples}; it must be 1 to {len(images)}, the number of images")
    wanted = set(range(len(images)))
    if samples is not None:
        wanted = set(generator(seed, "likelihood", "images").permutation(len(images))[:samples].tolist())
    chunks = [[index for index in chunk if index in wanted] for chunk in images.chunks(len(images))]
    return [chunk[start : start + IMAGES_AT_ONCE] for chunk in chunks for start in range(0, len(chunk), IMAGES_AT_ONCE)]


def _strata(total: int, steps_per_image: int | None) -> list[range]:
    """1 … T − 1, cut into parts of which two timesteps each are looked at; or each timestep by itself.

    The parts grow by a ratio, since the terms are largest, and change fastest, where t is small (Improved DDPM,
    arXiv:2102.09672, Figure 2).
    """
    if steps_per_image is None:
        return [range(t, t + 1) for t in range(1, total)]
    if steps_per_image % 2 or not 2 <= steps_per_image < total:
        raise ValueError(
            f"steps per image is {steps_per_image}; it must be an even number from 2 to {total - 1}, two timesteps of "
            "each of its half as many strata; leave it out to look at all"
        )
    strata: list[range] = []
    start = 1
    for left in reversed(range(1, steps_per_image // 2 + 1)):  # parts, with this one
        ratio = (total / start) ** (1 / left)
        end = min(max(start + 2, round(start * ratio)), total - 2 * (left - 1))
        strata.append(range(start, end))
        start = end
    assert start == total, strata
    return strata


class _Look:
    """L_0 and the other terms that are wanted of a few images."""

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
        places = torch.arange(len(terms)).split(EVALUATIONS_AT_ONCE)
        for place in places:
            row, at = rows[place], timesteps.flatten()[place]
            drawn = [self._noise(ids[i], t, original) for i, t in zip(row.tolist(), at.tolist(), strict=True)]
            x_0 = original[row]  # [n, C, H, W]
            x_t = add_noise(x_0, torch.stack(drawn).to(x_0), *self.schedule.coefficients(at, x_0))
            terms[place] = variational_terms(
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
            self.progress(len(place))
        terms = terms.view(timesteps.shape)
        return terms[:, 0], terms[:, 1:].unflatten(1, (len(self.strata), -1))

    def _timesteps(self, name: str) -> Tensor:
        """0, and the timesteps of each stratum: its only one, or two different ones of it. [K + 1]."""
        draw = generator(self.seed, "likelihood", "timesteps", name)
        chosen = [0]
        for stratum in self.strata:
            within = draw.choice(len(stratum), 2, replace=False).tolist() if len(stratum) > 1 else [0]
            chosen += [stratum[i] for i in within]
        return torch.tensor(chosen)

    def _noise(self, name: str, t: int, like: Tensor) -> Tensor:
        drawn = generator(self.seed, "likelihood", "noise", name, t).standard_normal(tuple(like.shape[1:]), "float32")
        return torch.from_numpy(drawn)


def _summary(
    prior: Tensor,
    decoded: Tensor,
    seen: Tensor,
    strata: Sequence[range],
    ids: tuple[str, ...],
) -> Likelihood:
    """Adds up L_T [N], L_0 [N] and the L_t that were looked at [N, strata, 1 or 2]."""
    count, size = len(ids), torch.tensor([len(stratum) for stratum in strata], dtype=torch.float64)
    # Each stratum stands for its mean times its length: unbiased (Cochran, Sampling Techniques, chapter 5).
    terms = (size * seen.mean(dim=2)).sum(dim=1)  # [N]
    per_image = prior + terms + decoded
    added = torch.zeros(count, dtype=torch.float64)
    if seen.shape[2] == 2:
        # Its variance without repetition: n² (1 − 2/n) s²/2 with s² = (a − b)²/2.
        added = (size * (size - 2) * (seen[:, :, 0] - seen[:, :, 1]).square() / 4).sum(dim=1)  # [N]
    spread = float(per_image.std()) if count > 1 else math.nan
    reach = student_quantile(0.95, count - 1) if count > 1 else math.nan  # standard deviations on both sides
    curve = [Stratum(0, 0, float(decoded.mean()))]
    curve += [
        Stratum(stratum[0], stratum[-1], float(bits))
        for stratum, bits in zip(strata, seen.mean(dim=(0, 2)), strict=True)
    ]
    return Likelihood(
        prior=float(prior.mean()),
        terms=float(terms.mean()),
        decoder=float(decoded.mean()),
        total=float(per_image.mean()),
        interval=reach * spread / math.sqrt(count),
        timesteps_interval=NORMAL_95 * math.sqrt(float(added.sum())) / count,
        per_image=per_image,
        ids=ids,
        curve=tuple(curve),
        evaluations=decoded.numel() + seen.numel(),
    )
