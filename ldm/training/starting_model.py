"""What `ldm train FOLDER` starts from: a new model, the built-in one, or neither, where neither can work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ldm.data import CaptionedImages, generator, to_signed
from ldm.diffusion import NoiseSchedule, diffusion_loss
from ldm.diffusion.losses import without_variance, x0_error_gain
from ldm.models.similarity import psnr
from ldm.pipelines import Pipeline
from ldm.progress import format_duration

BUILT_IN_MODEL, BUILT_IN_SIDE = "scenes-64", 64
# The least that any new model of ours was trained on until its images could be recognized (measured_runs.json).
NEW_SAMPLES = 128_000
# We have trained none on photographs. LDM (arXiv:2112.10752, table 12): 410,000 steps of 48 images on CelebA-HQ.
PHOTOGRAPH_SAMPLES = 20_000_000
FEW_IMAGES = 1000  # fewer teach a new model little more than themselves
# Drawings and objects on plain ground have 31 to 36 dB and ratios of 0.23 to 0.29; photographs that fill their frame
# have 24 dB and 0.35 (docs/train.md).
MIN_PSNR, MAX_ERROR_RATIO = 28.0, 0.5
PROBE_IMAGES, PROBE_BATCH = 32, 16
PROBE_TIMES = (0.3, 0.5)  # of the schedule: where content is decided


@dataclass(frozen=True)
class Fit:
    """How well a model describes images that it was not trained on.

    Attributes:
        psnr: of the reconstructions of its first stage, in dB, a mean over images.
        error_ratio: its squared error of x̂_0 over that of the best Gaussian of each latent, which knows the mean.
    """

    psnr: float
    error_ratio: float

    @property
    def is_good(self) -> bool:
        return self.psnr >= MIN_PSNR and self.error_ratio <= MAX_ERROR_RATIO

    def __str__(self) -> str:
        return (
            f"its first stage reconstructs these images at {self.psnr:.1f} dB ({MIN_PSNR:g} or more are good), and its "
            f"error is {self.error_ratio:.2f} of that of the mean image ({MAX_ERROR_RATIO:g} or less is good)"
        )


@torch.no_grad()
def measure_fit(pipeline: Pipeline, images: CaptionedImages) -> Fit:
    """On up to 32 images, evenly from the data, at two timesteps, with the first caption of each."""
    count = min(PROBE_IMAGES, len(images))
    indices = [i * len(images) // count for i in range(count)]
    like, prediction_type = pipeline.unet.conv_in.weight, pipeline.schedule.prediction_type
    pixels = to_signed(torch.stack([images.image_at(index) for index in indices])).to(like)
    latents = pipeline.codec.sample_latents(pipeline.codec.moments(pixels))  # [N, C, h, w]
    ratios = psnr(pixels, pipeline.codec.decode(latents).clamp(-1, 1))
    states = pipeline.text_encoder([images.samples[index].captions[0] for index in indices]).to(like)
    schedule, denoiser = NoiseSchedule.from_config(pipeline.schedule), without_variance(pipeline.unet)
    variance = latents.double().var(dim=0, correction=0)
    noise = torch.from_numpy(generator(0, "fit").standard_normal(tuple(latents.shape), "float32")).to(latents)
    found = []
    for time in PROBE_TIMES:
        t = int(time * schedule.num_train_timesteps)
        losses = [
            diffusion_loss(
                denoiser,
                schedule,
                latents[batch],
                states[batch],
                timesteps=torch.full((len(latents[batch]),), t),
                noise=noise[batch],
                prediction_type=prediction_type,
            )
            for batch in (slice(start, start + PROBE_BATCH) for start in range(0, count, PROBE_BATCH))
        ]
        error = float(x0_error_gain(schedule, prediction_type)[t]) ** 2 * float(torch.cat(losses).mean())
        alpha, sigma = schedule.alpha_sigma(t)
        # The posterior variance of x_0 given x_t, where x_0 has this variance.
        gaussian = float((variance * sigma**2 / (alpha**2 * variance + sigma**2)).mean())
        found.append(error / gaussian if gaussian else math.inf)
    return Fit(float(ratios.mean()), sum(found) / len(found))


def choose_start(
    images: CaptionedImages,
    *,
    minutes: float,
    samples_per_second: float,
    device: torch.device,
    may_fine_tune: bool,
) -> tuple[str | None, str]:
    """(the built-in model to fine-tune, or None for a new model; the reason).

    Args:
        images: at the size of a new model; the built-in one is no choice for images of less than half its own.
        samples_per_second: of the smallest new model, while it trains.
        may_fine_tune: whether the options leave that open.

    Raises:
        ValueError: if neither is expected to draw these images in the given time; it says what would.
    """
    possible = int(minutes * 60 * samples_per_second)
    fit = None
    if 2 * images.config.resolution >= BUILT_IN_SIDE:
        config = replace(images.config, resolution=BUILT_IN_SIDE)
        fit = measure_fit(
            Pipeline.from_pretrained(BUILT_IN_MODEL, device=device), CaptionedImages(images.samples, config, 0)
        )
    needed = PHOTOGRAPH_SAMPLES if fit and not fit.is_good else NEW_SAMPLES
    needs = f"a new model needs about {needed:,} samples, and {possible:,} fit into --minutes {minutes:g}"
    enough = math.ceil(needed / samples_per_second / 60)
    few = f"{len(images)} images teach a new model little more than themselves"
    if fit and fit.is_good and may_fine_tune and (possible < needed or len(images) < FEW_IMAGES):
        return BUILT_IN_MODEL, (
            f"the built-in model {BUILT_IN_MODEL} is fine-tuned: {needs if possible < needed else few}; {fit}. "
            f"For a new model: --anyway --minutes {max(enough, math.ceil(minutes))}"
        )
    if possible >= needed / 4:
        reasons = [f"a new UNet: {needs}"]
        if possible < needed:
            reasons.append("expect less than it could be")
        if len(images) < FEW_IMAGES:
            reasons.append(f"{few}, so expect it to repeat them; fine-tuning a model (--start-from) needs far fewer")
        return None, "; ".join(reasons)
    why = ""
    if fit:
        why = f", and the built-in model {BUILT_IN_MODEL} does not fit: {fit}"
        if fit.is_good:
            why = f". The built-in model {BUILT_IN_MODEL} fits them: leave out --resolution and keys of a new model"
    raise ValueError(
        f"a model of {images.config.path} would draw noise or averages of color: {needs}{why}. Start from a model that "
        "knows such images (--start-from with a Stable Diffusion 1.x/2.x folder or hub id, or configs/sd15-lora.yaml), "
        f"give it the time (--minutes {enough}, {format_duration(60 * enough)}), or train --anyway"
    )
