"""What `train/train_autoencoder.py` is made of: loss, statistics of the latents, held-out reconstructions."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import checkpoint
from ldm.codecs import LatentCodec
from ldm.config import AutoencoderTrainingConfig
from ldm.data import Batch, CaptionedImages, to_signed
from ldm.models import AutoencoderKL, enable_gradient_checkpointing, kl_divergence
from ldm.pipelines import contact_sheet, to_pil
from ldm.training import probe
from ldm.training.guard import Losses
from ldm.training.networks import Networks
from ldm.training.plan import Costs, make_plan
from ldm.training.run import Run

IMAGES_AT_ONCE = 32


def make_autoencoder(config: AutoencoderTrainingConfig) -> AutoencoderKL:
    """The network of `config.autoencoder`; its latents will need no scaling factor (see `export_autoencoder`)."""
    autoencoder = AutoencoderKL(
        dataclasses.replace(config.autoencoder, scaling_factor=1.0, sample_size=config.data.resolution)
    )
    enable_gradient_checkpointing(autoencoder, config.train.gradient_checkpointing)
    return autoencoder


def latent_shape(autoencoder: AutoencoderKL, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of what an autoencoder makes of images of `size` (height, width), which its factor divides."""
    return LatentCodec(autoencoder).latent_shape(*size)


def autoencoder_loss(images: Tensor, reconstruction: Tensor, moments: Tensor, kl_weight: float) -> Tensor:
    """‖x − x̂‖₁ + λ KL(q(z|x) ‖ N(0, I)), each summed over an image and divided by its number of pixel values.

    LDM (arXiv:2112.10752), Eq. 25 without its perceptual and adversarial terms.

    Args:
        images, reconstruction: [B, 3, H, W] in [−1, 1].
        moments: [B, 2C, h, w].

    Returns:
        [B], one a sample.
    """
    values = images[0].numel()
    distance = (images - reconstruction).abs().flatten(1).mean(dim=1)  # [B]
    return distance + kl_weight * kl_divergence(moments) / values


def export_autoencoder(folder: Path, averaged: nn.Module, images: CaptionedImages, device: torch.device) -> None:
    """Writes the autoencoder with the statistics of its latents folded in: it needs no scaling factor.

    Mean and deviation a channel, over the posterior of every training image, in float64:
    E[z] = E[μ], Var[z] = E[σ² + μ²] − E[μ]².
    """
    assert isinstance(averaged, AutoencoderKL)
    autoencoder = copy.deepcopy(averaged)
    channels = autoencoder.config.latent_channels
    first, second, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for batch in _in_batches(images, device, len(images)):
        with torch.no_grad():
            mean, log_variance = autoencoder.encode(batch).double().cpu().chunk(2, dim=1)  # [B, C, h, w]
        first += mean.sum(dim=(0, 2, 3))
        second += (mean.square() + log_variance.clamp(-30, 20).exp()).sum(dim=(0, 2, 3))
        count += mean[:, 0].numel()
    mean_of_channels = first / count
    deviation = (second / count - mean_of_channels.square()).clamp(min=1e-12).sqrt()
    autoencoder.fold_statistics(mean_of_channels, deviation)
    checkpoint.save_model(folder, autoencoder)


@torch.no_grad()
def held_out_psnr(
    averaged: nn.Module, images: CaptionedImages, config: AutoencoderTrainingConfig, device: torch.device
) -> float:
    """Peak signal-to-noise ratio of reconstructions from the posterior's mean, in dB, a mean over images."""
    assert isinstance(averaged, AutoencoderKL)
    ratios = []
    for batch in _in_batches(images, device, config.train.validation_samples):
        error = (batch - averaged(batch)[0].clamp(-1, 1)).square().flatten(1).mean(dim=1)  # [B]
        ratios.append(10 * torch.log10(4 / error.clamp(min=1e-12)))  # the range of images is 2
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def reconstruction_sheet(averaged: nn.Module, images: CaptionedImages, device: torch.device) -> Image.Image:
    """Up to twelve images, evenly from the whole data set, above their reconstructions."""
    assert isinstance(averaged, AutoencoderKL)
    count = min(12, len(images))
    originals, reconstructions = [], []
    for i in range(count):  # one by one, since their sizes differ
        image = _stack(images, [i * len(images) // count], device)
        originals += to_pil(image)
        reconstructions += to_pil(averaged(image)[0])
    return contact_sheet([originals, reconstructions], ["images", "reconstructions"])


def plan_run(
    config: AutoencoderTrainingConfig,
    images: CaptionedImages,
    held_out: CaptionedImages | None,
    model: nn.Module,
    networks: Networks,
    run: Run,
    losses_of: Callable[[nn.Module, Batch], Losses],
) -> None:
    """Measures what the parts of the run cost, and says what is about to happen."""
    step = probe.step_seconds(run, model, networks, images, losses_of)
    if run.is_main:
        one = probe.evaluation_seconds(run, networks.ema.module, images, losses_of)
        weights = 4 * sum(p.numel() for p in model.parameters())
        sheet = io.BytesIO()

        def draw() -> None:
            reconstruction_sheet(networks.ema.module, held_out or images, run.device).save(sheet, format="PNG")

        costs = Costs(
            step=step,
            validation=one * min(len(held_out), config.train.validation_samples) if held_out else 0.0,
            sheet=probe.seconds_of(draw),
            # The statistics of the latents are those of all images; encoding is less than half of the work.
            checkpoint=probe.checkpoint_seconds(run, 5 * weights) + one / 2 * len(images),
            memory=probe.peak_memory(run, networks),
            checkpoint_bytes=5 * weights,  # weights, their average, two moments of AdamW, and what is exported
            sheet_bytes=len(sheet.getvalue()),
            once_bytes=0,
        )
        run.announce(
            make_plan(
                config,
                images,
                held_out,
                model,
                step=run.step,
                space="a first stage: images to latents and back",
                costs=costs,
                device=run.device,
            )
        )
    run.accelerator.wait_for_everyone()


def _in_batches(images: CaptionedImages, device: torch.device, limit: int) -> Iterator[Tensor]:
    for chunk in images.chunks(IMAGES_AT_ONCE, limit):
        yield _stack(images, chunk, device)


def _stack(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]
