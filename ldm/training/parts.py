"""What `train/train_ldm.py` is made of: data, codec and network from a config; held-out loss; sample grids."""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import checkpoint
from ldm.codecs import Codec, LatentCodec, PixelCodec
from ldm.config import LDMConfig, SampleConfig
from ldm.data import CaptionedImages, DataConfig, collate, image_statistics, open_source, split
from ldm.diffusion import NoiseSchedule, diffusion_loss
from ldm.models import AutoencoderKL, UNet, UNetConfig, enable_gradient_checkpointing, set_attention_backend
from ldm.pipelines import Pipeline, contact_sheet
from ldm.text import TextEncoder
from ldm.training.draws import keyed_draws
from ldm.training.encoded import IMAGES_AT_ONCE, EncodedImages, Encoders, patient_barrier
from ldm.training.run import Run

SKIPPED_SHOWN = 10


def open_images(config: DataConfig, run: Run) -> tuple[CaptionedImages, CaptionedImages | None]:
    """(training, held-out) images; what was skipped is named and counted. Held out is None for a share of 0.

    Raises:
        ValueError: if there are fewer training images than a batch needs, it does not split evenly, or a run is
            resumed on other data.
    """
    source = open_source(config)
    training, held_out = split(source.samples, config.held_out)
    run.print(
        f"{config.path}: {len(source.samples)} captioned images ({len(training)} to train on, {len(held_out)} held "
        f"out), {len(source.skipped)} skipped"
    )
    for skipped in source.skipped[:SKIPPED_SHOWN]:
        run.print(f"  skipped {skipped.path}: {skipped.reason}")
    if len(source.skipped) > SKIPPED_SHOWN:
        run.print(f"  … and {len(source.skipped) - SKIPPED_SHOWN} more")
    run.check_data(training)
    images = CaptionedImages(training, config, run.config.seed)
    return images, CaptionedImages(held_out, config, run.config.seed) if held_out else None


def report_captions(text_encoder: TextEncoder, images: CaptionedImages, run: Run) -> None:
    """Says how many captions there are and how many lose words to the encoder's length."""
    captions = sorted({caption for sample in images.samples for caption in sample.captions})
    lost = [tokens for tokens in text_encoder.overflow(captions) if tokens]
    run.print(
        f"{len(captions)} different captions, {len(lost)} longer than {text_encoder.max_length} tokens"
        + (f" ({sum(lost)} tokens are cut; text.max_length allows more)" if lost else "")
    )


def make_codec(config: LDMConfig, images: CaptionedImages) -> Codec:
    """The codec of `config.space`: the one place where a config chooses between pixels and latents."""
    if config.first_stage is None:
        mean, std = image_statistics(images)
        return PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    return load_first_stage(config.first_stage)


def load_first_stage(name: str) -> LatentCodec:
    """The autoencoder of a folder or hub id, or of the pipeline folder that holds it as `vae/`."""
    folder = checkpoint.find_autoencoder(name)
    autoencoder = checkpoint.load_model(folder, "AutoencoderKL")
    assert isinstance(autoencoder, AutoencoderKL)
    autoencoder.requires_grad_(False)
    return LatentCodec(autoencoder, source=folder)


def make_unet(config: LDMConfig, codec: Codec, text_encoder: TextEncoder, run: Run) -> UNet:
    """The network of `config.unet` on the run's device, with what follows from codec and text encoder.

    Raises:
        ValueError: if the resolution does not fit the codec.
    """
    resolution = config.data.resolution
    _, size, _ = codec.latent_shape(resolution, resolution)
    complete: UNetConfig = dataclasses.replace(
        config.unet,
        in_channels=codec.channels,
        out_channels=codec.channels,
        sample_size=size,
        cross_attention_dim=text_encoder.hidden_size,
    )
    unet = UNet(complete).to(run.device)
    set_attention_backend(unet, config.train.attention)
    enable_gradient_checkpointing(unet, config.train.gradient_checkpointing)
    return unet


def make_encoders(config: LDMConfig, codec: Codec, text_encoder: TextEncoder, run: Run) -> Encoders:
    """What encodes images and captions, a share in each process of the run, into `data.cache_dir`."""
    return Encoders(
        codec,
        text_encoder,
        config.data.cache_folder,
        device=run.device,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        wait=patient_barrier(run.accelerator.num_processes),
        num_workers=config.train.num_workers,
        print=run.print,
        show_progress=run.is_main,
    )


def report_latents(encoded: EncodedImages, run: Run) -> None:
    """Says how far what is diffused is from the zero mean and unit variance that the papers assume."""
    statistics = encoded.statistics()
    if statistics is None:
        return
    mean, std = statistics
    low, high = (float(x) for x in std.aminmax())
    off = bool((mean.abs() > 0.5).any() or low < 0.5 or high > 2)
    run.print(
        f"latents of the data: mean {float(mean.min()):.2f} to {float(mean.max()):.2f}, deviation {low:.2f} to "
        f"{high:.2f} over {len(mean)} channels"
        + ("; far from 0 and 1: a first stage trained on this data would fit better" if off else "")
    )


def make_pipeline(config: LDMConfig, unet: nn.Module, codec: Codec, text_encoder: TextEncoder) -> Pipeline:
    """The pipeline that a run makes, around the averaged weights."""
    assert isinstance(unet, UNet)
    return Pipeline(
        unet=unet,
        codec=codec,
        text_encoder=text_encoder,
        schedule=config.schedule,
        guidance_scale=config.sample.guidance_scale,
        num_inference_steps=config.sample.num_inference_steps,
    )


@torch.no_grad()
def held_out_loss(unet: nn.Module, schedule: NoiseSchedule, config: LDMConfig, encoded: EncodedImages) -> float:
    """L_simple on held-out images with noise and timesteps that never change.

    Timesteps are spread evenly over the schedule, one an image; posteriors are taken at their mean; captions are the
    first of each image and never dropped.
    """
    held_out = encoded.images
    count = min(len(held_out), config.train.validation_samples)
    losses: list[Tensor] = []
    for start in range(0, count, IMAGES_AT_ONCE):
        positions = range(start, min(start + IMAGES_AT_ONCE, count))
        batch = collate([held_out[0, i] for i in positions])
        latents = encoded.latents(batch, None)
        draws = keyed_draws(
            config.seed,
            batch.epochs,
            [f"held out: {name}" for name in batch.ids],
            0,
            shape=(latents.shape[1], latents.shape[2], latents.shape[3]),
            num_train_timesteps=schedule.num_train_timesteps,
            device=latents.device,
        )
        timesteps = torch.tensor([(2 * i + 1) * schedule.num_train_timesteps // (2 * count) for i in positions])
        condition = encoded.text([held_out.samples[i].captions[0] for i in positions])
        losses.append(
            diffusion_loss(
                unet,
                schedule,
                latents,
                condition,
                timesteps=timesteps,
                noise=draws.noise,
                prediction_type=config.schedule.prediction_type,
            )
        )
    return float(torch.cat(losses).mean())


def sample_sheet(pipeline: Pipeline, config: SampleConfig) -> Image.Image:
    """A row of pictures a prompt; picture j of every row has seed `config.seed` + j."""
    seeds = [config.seed + j for _ in config.prompts for j in range(config.images_per_prompt)]
    drawn = pipeline(config.prompts, num_images_per_prompt=config.images_per_prompt, seed=seeds).images
    n = config.images_per_prompt
    return contact_sheet([drawn[i * n : (i + 1) * n] for i in range(len(config.prompts))], config.prompts)
