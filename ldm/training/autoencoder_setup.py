"""What `train_autoencoder` uses: networks, export, validation, reconstruction grids."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import hub
from ldm.config import AutoencoderTrainingConfig, check_autoencoder, section_name
from ldm.data import Batch, CaptionedImages, to_signed
from ldm.models import (
    AutoencoderKL,
    FirstStage,
    PerceptualDistance,
    VQConfig,
    VQModel,
    enable_gradient_checkpointing,
)
from ldm.models.similarity import psnr
from ldm.pipelines import contact_sheet, to_pil
from ldm.training.autoencoder_losses import Codebook
from ldm.training.setup import load_first_stage

BATCH_SIZE = 32
GRID_IMAGES = 12
# Config keys that depend on data and training, and may differ in `start_from`.
_NOT_OF_SHAPE = {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}


def make_autoencoder(config: AutoencoderTrainingConfig) -> FirstStage:
    """The autoencoder of the config, with trainable parameters marked. Raises ValueError if `start_from` cannot be
    opened or does not fit the config.

    With `trained: all`, latents get new statistics (see `export_autoencoder`). With `trained: decoder`, encoder,
    `quant_conv`, codebook and config are unchanged, so models on these latents keep working.
    """
    autoencoder: FirstStage
    if config.start_from is None:
        network = config.network
        assert network is not None
        autoencoder = VQModel(network) if isinstance(network, VQConfig) else AutoencoderKL(network)
    else:
        autoencoder = load_first_stage(config.start_from).autoencoder
        found = autoencoder.config
        described = config.network or found
        section, where = section_name(described), f"{config.start_from} (start_from)"
        out = f"leave {section} out, or set it to null"
        if type(described) is not type(found):
            raise ValueError(
                f"{section} describes {described.diffusers_class}, but {where} is {found.diffusers_class}; {out}"
            )
        for key, value in described.to_dict().items():
            if key not in _NOT_OF_SHAPE and value != found.to_dict()[key]:
                raise ValueError(f"{section}.{key} is {value}, but {where} has {found.to_dict()[key]}; {out}")
        try:
            check_autoencoder(found, config.trained)
            config.check_regularizer(found)
        except ValueError as error:
            raise ValueError(f"{where} cannot be trained: {error}") from None
    if config.trained == "decoder":
        autoencoder.requires_grad_(False)
        autoencoder.decoder.requires_grad_(True)
        if autoencoder.post_quant_conv is not None:
            autoencoder.post_quant_conv.requires_grad_(True)
    else:
        autoencoder.requires_grad_(True)
        without_statistics = autoencoder.config.without_statistics()
        autoencoder.config = dataclasses.replace(without_statistics, sample_size=config.data.resolution)
    enable_gradient_checkpointing(autoencoder, config.train.gradient_checkpointing)
    return autoencoder


def make_codebook(
    config: AutoencoderTrainingConfig, autoencoder: FirstStage, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> Codebook | None:
    """The codebook usage tracker; None for KL autoencoders and frozen codes."""
    if not isinstance(autoencoder, VQModel) or not autoencoder.quantize.embedding.weight.requires_grad:
        return None
    assert isinstance(averaged, VQModel)
    return Codebook(
        autoencoder.quantize, averaged.quantize, optimizer, seed=config.seed, revive_after=config.revive_codes_after
    )


def export_autoencoder(
    folder: Path,
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    device: torch.device,
) -> None:
    """Write the autoencoder, with the statistics of its latents folded in: see `fold_statistics`.

    Mean and std per channel are taken over all training images and their posteriors, in float64. A trained decoder
    leaves the latents unchanged, so nothing is folded.
    """
    assert isinstance(averaged, FirstStage)
    if config.trained == "decoder":
        hub.save_model(folder, averaged)
        return
    autoencoder = copy.deepcopy(averaged)
    channels = autoencoder.channels
    first, second, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for batch in _batches(images, device, len(images)):
        with torch.no_grad():
            mean, square = autoencoder.expectations(autoencoder.encode(batch).double().cpu())  # [B, C, h, w]
        first += mean.sum(dim=(0, 2, 3))
        second += square.sum(dim=(0, 2, 3))
        count += mean[:, 0].numel()
    channel_mean = first / count
    std = (second / count - channel_mean.square()).clamp(min=1e-12).sqrt()  # Var[z] = E[z²] − E[z]²
    autoencoder.fold_statistics(channel_mean, std)
    hub.save_model(folder, autoencoder)


@torch.no_grad()
def held_out_metrics(
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    perceptual: PerceptualDistance | None,
    device: torch.device,
) -> dict[str, float]:
    """Means over held-out images: `held_out_psnr` in dB, and `held_out_perceptual` if trained with that distance."""
    batches = _batches(images, device, config.train.validation_samples)
    measured = [reconstruction_metrics(averaged, batch, perceptual) for batch in batches]
    return {f"held_out_{name}": float(torch.cat([m[name] for m in measured]).mean()) for name in measured[0]}


@torch.no_grad()
def reconstruction_metrics(
    averaged: nn.Module, images: Tensor, perceptual: PerceptualDistance | None
) -> dict[str, Tensor]:
    """Of reconstructions (by the posterior mean) of images [B, 3, H, W]: `psnr` in dB and `perceptual`, [B] each."""
    assert isinstance(averaged, FirstStage)
    reconstruction = averaged(images)[0].clamp(-1, 1)
    figures = {"psnr": psnr(images, reconstruction)}
    return figures if perceptual is None else figures | {"perceptual": perceptual(images, reconstruction)}


@torch.no_grad()
def reconstruction_grid(averaged: nn.Module, images: CaptionedImages, device: torch.device) -> Image.Image:
    """Up to twelve images, spread evenly over the data set, above their reconstructions."""
    assert isinstance(averaged, FirstStage)
    count = min(GRID_IMAGES, len(images))
    originals, reconstructions = [], []
    for i in range(count):  # one by one, since their sizes differ
        image = _stack(images, [i * len(images) // count], device)
        originals += to_pil(image)
        reconstructions += to_pil(averaged(image)[0])
    return contact_sheet([originals, reconstructions], ["images", "reconstructions"])


def pixels(batch: Batch, device: torch.device) -> Tensor:
    assert batch.images is not None
    return to_signed(batch.images).to(device)  # [B, 3, h, w]


def _batches(images: CaptionedImages, device: torch.device, limit: int) -> Iterator[Tensor]:
    for chunk in images.chunks(BATCH_SIZE, limit):
        yield _stack(images, chunk, device)


def _stack(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]
