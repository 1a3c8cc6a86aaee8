"""Negative log-likelihood of images under a model of pixels: the variational bound of DDPM (arXiv:2006.11239), Eq. 5.

−log₂ p(x_0 | caption) <= L_T + Σ L_t + L_0, in bits per dimension and averaged over images. Noise is a function of
(seed, image, timestep): estimates from some and from all timesteps share it.
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
from ldm.diffusion import NoiseSchedule, add_noise, variational_terms
from ldm.diffusion.losses import prior_term
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
    """The bound over N images, bits per dimension: `total` is L_T, the sum of L_t over t > 0, and L_0.

    `interval` is the half-width of its 95 % interval over images (and sampled timesteps), nan for one image;
    `timesteps_interval` that for the sampling of timesteps alone. `curve` are the terms over t.
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

    @classmethod
    def from_terms(cls, prior: Tensor, terms: Tensor, strata: Sequence[range], ids: tuple[str, ...]) -> Likelihood:
        """From L_T [N], and L_0 and the evaluated L_t [N, 1 + one or two a stratum]."""
        decoded, evaluated = terms[:, 0], terms[:, 1:].unflatten(1, (len(strata), -1))
        count, size = len(ids), torch.tensor([len(stratum) for stratum in strata], dtype=torch.float64)
        # Each stratum contributes its mean times its length: unbiased (Cochran, Sampling Techniques, chapter 5).
        summed = (size * evaluated.mean(dim=2)).sum(dim=1)  # [N]
        per_image = prior + summed + decoded
        added = torch.zeros(count, dtype=torch.float64)
        if evaluated.shape[2] == 2:
            # Its variance without replacement: n² (1 − 2/n) s²/2 with s² = (a − b)²/2.
            added = (size * (size - 2) * (evaluated[:, :, 0] - evaluated[:, :, 1]).square() / 4).sum(dim=1)  # [N]
        spread = float(per_image.std()) if count > 1 else math.nan
        quantile = student_quantile(0.95, count - 1) if count > 1 else math.nan
        curve = [Stratum(0, 0, float(decoded.mean()))]
        bits = evaluated.mean(dim=(0, 2)).tolist()
        curve += [Stratum(stratum[0], stratum[-1], value) for stratum, value in zip(strata, bits, strict=True)]
        return cls(
            prior=float(prior.mean()),
            terms=float(summed.mean()),
            decoder=float(decoded.mean()),
            total=float(per_image.mean()),
            interval=quantile * spread / math.sqrt(count),
            timesteps_interval=NORMAL_95 * math.sqrt(float(added.sum())) / count,
            per_image=per_image,
            ids=ids,
            curve=tuple(curve),
            evaluations=terms.numel(),
        )


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
        images: of the size of training, not augmented; `samples` of them, without replacement, None takes all.
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
    codec, schedule, unet = pipeline.codec, NoiseSchedule.from_config(pipeline.schedule), pipeline.unet
    if not isinstance(codec, PixelCodec):
        raise ValueError("this model diffuses latents, which give no bound in bits of an image; use a model of pixels")
    (height, width), side = pipeline.default_size, images.config.resolution
    if (height, width) != (side, side):
        trained = f"the model was trained on {width}x{height} pixels"
        raise ValueError(f"data.resolution is {side} but {trained}; set it to the size of training")
    if samples is not None and not 1 <= samples <= len(images):
        raise ValueError(f"samples is {samples}; it must be 1 to {len(images)}, the number of images")
    chosen = set(range(len(images)))
    if samples is not None:
        chosen = set(generator(seed, "likelihood", "images").permutation(len(images))[:samples].tolist())
    strata = _strata(schedule.num_train_timesteps, steps_per_image)
    sigmas: Literal["small", "large", "learned"] = "learned" if unet.config.learned_variance else variance
    decoder = decoder_of(codec)
    prior, terms = [], []  # L_T [b] each; L_t at 0 and the evaluated timesteps, [b, K + 1] each, float64 on the CPU
    ids: list[str] = []
    chunks = ([index for index in chunk if index in chosen] for chunk in images.chunks(len(images)))
    for batch in (chunk[at : at + IMAGE_BATCH] for chunk in chunks for at in range(0, len(chunk), IMAGE_BATCH)):
        pixels = torch.stack([images.image_at(i) for i in batch])
        x_0 = codec.sample_latents(to_signed(pixels).to(unet.conv_in.weight.device))  # [b, C, H, W]
        prior.append(prior_term(schedule, x_0).cpu().double())
        names = [images.samples[i].id for i in batch]
        timesteps = torch.tensor([_timesteps(strata, seed, name) for name in names])  # [b, K + 1]
        captions = [images.samples[i].captions[0] for i in batch]
        unique = list(dict.fromkeys(captions))
        states = pipeline.text_encoder(unique)[[unique.index(caption) for caption in captions]]  # [b, L, D]
        found = torch.empty(timesteps.numel(), dtype=torch.float64)
        rows = torch.arange(len(batch)).repeat_interleave(timesteps.shape[1])
        for part in torch.arange(len(found)).split(EVALUATION_BATCH):
            row, at = rows[part], timesteps.flatten()[part]
            noise = []
            for i, t in zip(row.tolist(), at.tolist(), strict=True):
                rng = generator(seed, "likelihood", "noise", names[i], t)
                noise.append(torch.from_numpy(rng.standard_normal(tuple(x_0.shape[1:]), "float32")))
            original = x_0[row]  # [n, C, H, W]
            x_t = add_noise(original, torch.stack(noise).to(x_0), *schedule.coefficients(at, x_0))
            found[part] = variational_terms(
                unet(x_t, at.to(x_t.device), states[row.to(states.device)]),
                x_t,
                original,
                schedule,
                at,
                decoder=decoder,
                prediction_type=pipeline.schedule.prediction_type,
                variance=sigmas,
                clip_x0=codec.clip_x0,
            ).to("cpu", torch.float64)
            progress(len(part))
        terms.append(found.view(timesteps.shape))
        ids += names
    return Likelihood.from_terms(torch.cat(prior), torch.cat(terms), strata, tuple(ids))


def _strata(total: int, steps_per_image: int | None) -> list[range]:
    """1 … T − 1 in strata with two evaluated timesteps each; or each timestep by itself.

    Their lengths grow geometrically: the terms are largest and change fastest for small t (arXiv:2102.09672, Figure 2).
    """
    if steps_per_image is None:
        return [range(t, t + 1) for t in range(1, total)]
    if steps_per_image % 2 or not 2 <= steps_per_image < total:
        wanted = f"an even number from 2 to {total - 1}, or left out for all timesteps"
        raise ValueError(f"steps per image is {steps_per_image}; it must be {wanted}")
    strata, start = [], 1
    for left in reversed(range(1, steps_per_image // 2 + 1)):  # strata, including this one
        ratio = (total / start) ** (1 / left)
        end = min(max(start + 2, round(start * ratio)), total - 2 * (left - 1))
        strata.append(range(start, end))
        start = end
    assert start == total, strata
    return strata


def _timesteps(strata: Sequence[range], seed: int, name: str) -> list[int]:
    """0, and the only timestep or two timesteps of each stratum."""
    rng = generator(seed, "likelihood", "timesteps", name)
    chosen = [0]
    for stratum in strata:
        within = rng.choice(len(stratum), 2, replace=False).tolist() if len(stratum) > 1 else [0]
        chosen += [stratum[i] for i in within]
    return chosen
