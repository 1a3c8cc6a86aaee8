"""What `train_ldm` uses: model, frozen components, cache, validation, sample grids, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm import hub, lora_files
from ldm.codecs import Codec, LatentCodec, PixelCodec
from ldm.config import LDMConfig, SampleConfig, check_objective
from ldm.data import CaptionedImages, collate, image_statistics
from ldm.diffusion import NoiseSchedule, ScheduleConfig, diffusion_loss, noise_bands, without_variance
from ldm.diffusion.schedule import PredictionType, check_precision
from ldm.models import UNet, UNetConfig, enable_gradient_checkpointing, set_attention_backend
from ldm.pipelines import Pipeline, contact_sheet
from ldm.text import TextEncoder, ignore_cut_prompts, load_text_encoder, load_text_encoder_folders
from ldm.training.checkpoints import TrainingState
from ldm.training.latents import IMAGE_BATCH_SIZE, CachedEncoders, LatentCache, long_barrier
from ldm.training.noise import step_noise
from ldm.training.run import Run
from ldm.training.run_folder import write_once
from ldm.training.threads import unet_pass
from ldm.training.trainable import ADAPTER, weight_precision
from ldm.weights import tensors_hash


def load_first_stage(name: str) -> LatentCodec:
    """The autoencoder of a folder or hub id, or the `vae/` of a pipeline folder, frozen."""
    folder = hub.find_autoencoder(name)
    autoencoder = hub.load_autoencoder(folder)
    autoencoder.requires_grad_(False)
    return LatentCodec(autoencoder, source=folder)


@dataclass(frozen=True)
class FrozenComponents:
    """All parts of a pipeline but its UNet."""

    folder: Path  # written by `Pipeline.save_frozen`: text encoder, tokenizer, codec
    index: dict[str, Any]  # content of `model_index.json`
    schedule: ScheduleConfig
    sample: SampleConfig

    def pipeline(self, unet: nn.Module) -> Pipeline:
        """Load the components and build a pipeline around `unet`, on its device and in its dtype.

        The network is not converted: an adapter may have another dtype than the weights beneath it.
        """
        assert isinstance(unet, UNet)
        device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        codec: Codec
        if (self.folder / "codec" / "config.json").is_file():
            codec = hub.load_pixel_codec(self.folder / "codec")
        else:
            codec = LatentCodec(hub.load_autoencoder(self.folder / "vae"), source=self.folder / "vae")
        text_encoder = load_text_encoder_folders(self.folder / "text_encoder", self.folder / "tokenizer")
        codec.to(device=device, dtype=dtype)
        text_encoder.to(device, dtype)
        pipeline = Pipeline(unet=unet, codec=codec, text_encoder=text_encoder, schedule=self.schedule)
        return _with_sampling(pipeline, self.sample)

    def save(self, folder: Path, unet: nn.Module) -> None:
        """Write a pipeline folder around `unet`; the components are hard links to `self.folder`."""
        assert isinstance(unet, UNet)
        with hub.atomic_folder(folder) as target:
            hub.write_json(target / "model_index.json", self.index)
            hub.save_model(target / "unet", unet)
            hub.save_schedule(target / "scheduler", self.schedule, unet.config.learned_variance)
            for part in sorted(self.folder.iterdir()):
                hub.link_tree(part, target / part.name)


MAX_REPEATS = 16


def _with_sampling(pipeline: Pipeline, sample: SampleConfig) -> Pipeline:
    for key in ("guidance_scale", "num_inference_steps", "sampler"):
        setattr(pipeline, key, getattr(sample, key))
    return pipeline


def make_pipeline(config: LDMConfig, run: Run) -> Pipeline:
    """The model at step 0 on the run's device: that of `start_from`, or a new UNet with the config's codec and text
    encoder. Raises ValueError if a component cannot be opened, or the resolution does not fit the codec.
    """
    images = run.data.train
    if config.start_from is not None:
        pipeline = Pipeline.from_pretrained(config.start_from, device=run.device)
        loss, learned = config.train.loss, pipeline.unet.config.learned_variance
        if learned != (loss.weighting == "hybrid"):
            raise ValueError(
                f"train.loss.weighting is {loss.weighting}, but {config.start_from} has {'' if learned else 'no '}"
                f"learned variances; choose {'hybrid' if learned else 'simple, vlb or min_snr'}"
            )
        prediction_type = pipeline.schedule.prediction_type
        check_precision(prediction_type, config.train.mixed_precision)
        check_objective(loss, NoiseSchedule.from_config(pipeline.schedule), prediction_type, config.sample)
        images.check_factor(pipeline.codec.factor)
        _, size, _ = pipeline.codec.latent_shape(config.data.resolution, config.data.resolution)
        # Sample grids, and by default samples of the export, have the size of training.
        pipeline.unet.config = dataclasses.replace(pipeline.unet.config, sample_size=size)
    else:
        text = config.text
        text_encoder = load_text_encoder(text.encoder, text.max_length, layer=text.layer)
        codec = make_codec(config, images, run)
        images.check_factor(codec.factor)
        unet = make_unet(config, codec, text_encoder)
        pipeline = Pipeline(unet=unet, codec=codec, text_encoder=text_encoder, schedule=config.schedule).to(run.device)
    _with_sampling(pipeline, config.sample)
    if images.composer is not None:
        images.composer.fits = pipeline.text_encoder.fits()
        run.print(images.composer.summary(images.shape_of))
    cut = pipeline.text_encoder.truncation_message(config.sample.prompts)
    if cut:
        run.print(f"sample.prompts: {cut}")
    set_attention_backend(pipeline.unet, config.train.attention)
    enable_gradient_checkpointing(pipeline.unet, config.train.gradient_checkpointing)
    return pipeline


def make_codec(config: LDMConfig, images: CaptionedImages, run: Run) -> Codec:
    """The codec of `config.space`: the only place where a config chooses between pixels and latents."""
    if config.first_stage is None:
        if run.is_resumed:  # its data may have grown; the codec stays
            return hub.load_pixel_codec(run.folder / "frozen" / "codec")
        mean, std = image_statistics(images)
        return PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    return load_first_stage(config.first_stage)


def make_unet(config: LDMConfig, codec: Codec, text_encoder: TextEncoder) -> UNet:
    """A new UNet of `config.unet`, with the channels of codec and text encoder. Raises ValueError if the resolution
    does not fit the codec.
    """
    assert config.unet is not None
    _, size, _ = codec.latent_shape(config.data.resolution, config.data.resolution)
    complete: UNetConfig = dataclasses.replace(
        config.unet,
        in_channels=codec.channels,
        # Improved DDPM, section 3.1: the prediction, and ν beside it.
        out_channels=2 * codec.channels if config.train.loss.weighting == "hybrid" else codec.channels,
        sample_size=size,
        cross_attention_dim=text_encoder.hidden_size,
    )
    return UNet(complete)


def choose_unet_threads(pipeline: Pipeline, state: TrainingState, run: Run) -> None:
    """Choose the number of CPU threads by timing the UNet, unless it is set. Nothing is encoded yet."""
    side = run.config.data.resolution
    shape = pipeline.codec.latent_shape(side, side)
    text = (pipeline.text_encoder.max_length, pipeline.text_encoder.hidden_size)
    # The network applies mixed precision itself.
    run.choose_threads(state, lambda count: unet_pass(state.model, shape, text, count, run.device, "no"))


def make_cached_encoders(config: LDMConfig, pipeline: Pipeline, run: Run) -> CachedEncoders:
    """Encoders of images and captions with caches in `data.cache_dir`; each process encodes a part."""
    return CachedEncoders(
        pipeline.codec,
        pipeline.text_encoder,
        config.data.cache_folder,
        device=run.device,
        rank=run.accelerator.process_index,
        world=run.accelerator.num_processes,
        wait=long_barrier(run.accelerator.num_processes),
        num_workers=config.train.num_workers,
        print=run.print,
        show_progress=run.is_main,
    )


def log_cache_summary(cache: LatentCache, text_encoder: TextEncoder, run: Run) -> None:
    """Log how many captions are truncated, and how far the latents are from mean 0 and std 1."""
    captions = sorted({caption for sample in cache.images.samples for caption in sample.captions})
    lost = [tokens for tokens in text_encoder.truncated_tokens(captions) if tokens]
    run.print(
        f"{len(captions)} different captions, {len(lost)} longer than {text_encoder.max_length} tokens"
        + (f" ({sum(lost)} tokens are cut; text.max_length allows more)" if lost else "")
    )
    statistics = cache.statistics()
    if statistics is None:
        return
    mean, std = statistics
    low, high = (float(x) for x in std.aminmax())
    off = bool((mean.abs() > 0.5).any() or low < 0.5 or high > 2)
    run.print(
        f"latents of the data: mean {float(mean.min()):.2f} to {float(mean.max()):.2f}, std {low:.2f} to "
        f"{high:.2f} over {len(mean)} channels"
        + ("; far from 0 and 1: a first stage trained on this data would fit better" if off else "")
    )


def save_frozen_components(pipeline: Pipeline, config: LDMConfig, run: Run) -> FrozenComponents:
    """Write the frozen components into the run folder; for a LoRA only their hashes, to notice changes on resume."""
    folder = run.folder / "frozen"
    write: Callable[[Path], None] = pipeline.save_frozen
    if config.export == "lora":
        assert config.start_from is not None
        folder, codec = hub.find_pipeline(config.start_from), pipeline.codec
        assert isinstance(codec, nn.Module)
        settings: dict[str, Any] = codec.autoencoder.config.to_dict() if isinstance(codec, LatentCodec) else {}

        def write_hashes(path: Path) -> None:
            hashes = {
                "text_encoder": pipeline.text_encoder.fingerprint(),
                "codec": tensors_hash(codec.state_dict()),
                "scaling": [settings.get("scaling_factor"), settings.get("shift_factor")],
                "schedule": dataclasses.asdict(pipeline.schedule),
            }
            # Only for VQ models: runs of others may be older than these keys.
            hashes |= {key: settings[key] for key in ("latents_mean", "latents_std") if key in settings}
            path.mkdir()
            hub.write_json(path / "model.json", hashes)

        write = write_hashes
    if run.is_main:
        write_once(run.folder / "frozen", write)
    run.accelerator.wait_for_everyone()
    return FrozenComponents(folder, pipeline.index(), pipeline.schedule, config.sample)


def export(folder: Path, unet: nn.Module, frozen: FrozenComponents, config: LDMConfig) -> None:
    """Write the result of a run: a pipeline folder, or the adapter alone."""
    assert isinstance(unet, UNet)
    if config.export == "lora":
        lora_files.save_adapter(folder, unet, ADAPTER)
    else:
        frozen.save(folder, unet)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, schedule: NoiseSchedule, prediction_type: PredictionType, config: LDMConfig, cache: LatentCache
) -> dict[str, float]:
    """L_simple on held-out images, with fixed noise and timesteps, in total and by band of timesteps.

    It is unweighted and of the prediction alone, so that runs with different losses compare. Timesteps are spread
    evenly over the schedule, one per image; few images are repeated. Posteriors are taken at their mean; the first
    caption of each image is used and never dropped. Returns `held_out_loss`, and means over up to four bands of
    timesteps, such as `held_out_loss_t000_249`.
    """
    held_out, steps = cache.images, schedule.num_train_timesteps
    count = min(len(held_out), config.train.validation_samples)
    repeats = repeats_per_image(count, config.train.validation_samples)
    losses, timesteps = torch.empty(repeats, count), torch.empty(repeats, count, dtype=torch.int64)

    denoiser = without_variance(unet)
    for repeat in range(repeats):
        for chunk in held_out.chunks(IMAGE_BATCH_SIZE, count):
            batch = collate([held_out[0, i] for i in chunk])
            latents = cache.latents(batch, None)
            noise = step_noise(
                config.seed,
                [repeat] * len(chunk),
                [f"held out: {name}" for name in batch.ids],
                0,
                shape=(latents.shape[1], latents.shape[2], latents.shape[3]),
                num_train_timesteps=steps,
                device=latents.device,
            )
            ranks = [i * repeats + repeat for i in chunk]
            timesteps[repeat, chunk] = torch.tensor([(2 * rank + 1) * steps // (2 * count * repeats) for rank in ranks])
            condition = cache.text([held_out.samples[i].captions[0] for i in chunk])
            with weight_precision(unet):
                loss = diffusion_loss(
                    denoiser,
                    schedule,
                    latents,
                    condition,
                    timesteps=timesteps[repeat, chunk],
                    noise=noise.noise,
                    prediction_type=prediction_type,
                )
            losses[repeat, chunk] = loss.float().cpu()
    values = {"held_out_loss": float(losses.mean())}
    for band in noise_bands(steps):
        inside = losses[(band.start <= timesteps) & (timesteps < band.stop)]
        if len(inside):
            values[f"held_out_loss_t{band.start:03d}_{band.stop - 1:03d}"] = float(inside.mean())
    return values


def repeats_per_image(count: int, max_samples: int) -> int:
    """How often each held-out image is evaluated: up to 16 times, and `max_samples` times in total."""
    return max(1, min(MAX_REPEATS, max_samples // count))


def sample_grid(pipeline: Pipeline, config: SampleConfig) -> Image.Image:
    """A row of samples per prompt; sample j of every row has seed `config.seed` + j."""
    seeds = [config.seed + j for _ in config.prompts for j in range(config.images_per_prompt)]
    with ignore_cut_prompts():  # make_pipeline logs it once per run
        samples = pipeline(
            config.prompts,
            num_images_per_prompt=config.images_per_prompt,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            sampler=config.sampler,
            seed=seeds,
        ).images
    n = config.images_per_prompt
    return contact_sheet([samples[i * n : (i + 1) * n] for i in range(len(config.prompts))], config.prompts)
