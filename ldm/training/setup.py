"""What `train/train_ldm.py` is made of: data, model and cache from a config; held-out loss; sample grids; the plan."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm import adapters, checkpoint
from ldm.codecs import Codec, LatentCodec, PixelCodec
from ldm.config import LDMConfig, SampleConfig, check_objective
from ldm.data import (
    Batch,
    CaptionedImages,
    DataConfig,
    collate,
    dataset_report,
    image_statistics,
    inspect,
    open_source,
    split,
)
from ldm.data.captions import printable
from ldm.diffusion import Denoiser, NoiseSchedule, diffusion_loss, split_variance
from ldm.diffusion.schedule import PredictionType, check_precision
from ldm.models import UNet, UNetConfig, enable_gradient_checkpointing, set_attention_backend
from ldm.pipelines import NotFinite, Pipeline, contact_sheet
from ldm.text import TextEncoder, cut_prompts_said, load_text_encoder
from ldm.training import finetune, timing
from ldm.training.components import FrozenComponents
from ldm.training.evaluator import Evaluator
from ldm.training.files import tensors_hash
from ldm.training.latents import IMAGES_AT_ONCE, CachedEncoders, LatentCache, long_barrier
from ldm.training.noise import step_noise
from ldm.training.nonfinite import StepLosses
from ldm.training.plan import Costs, check_memory, make_plan
from ldm.training.run import Run
from ldm.training.space import choose_space, load_first_stage
from ldm.training.speed import unet_pass
from ldm.training.training_state import TrainingState

BANDS = 4
MAX_REPEATS = 16
SKIPPED_SHOWN = 10


def open_images(
    config: DataConfig, run: Run, *, captioned: bool = True
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """(training, held-out) images; all that is in the data is accounted for. Held out is None for a share of 0.

    Args:
        captioned: leave out images without a caption.

    Raises:
        ValueError: if there are fewer training images than a batch needs, it does not split evenly, or a run is
            resumed on other data.
    """
    inspection = inspect(open_source(config, captioned=captioned), config, progress=run.is_main)
    account = dataset_report(inspection, config)
    run.print(account.summary())
    for line in account.unused_captions() if captioned else ():
        run.print(f"  {line}")
    for skipped in inspection.skipped[:SKIPPED_SHOWN]:
        run.print(printable(f"  skipped {skipped.path}: {skipped.reason}"))
    if len(inspection.skipped) > SKIPPED_SHOWN:
        run.print(f"  … and {len(inspection.skipped) - SKIPPED_SHOWN} more: ldm data check {config.path} --all")
    training, held_out = split(inspection.used, config.held_out)
    images = CaptionedImages(training, config, run.config.seed, batch_size=run.config.train.batch_size, composed=True)
    sizes = images.buckets.sizes
    measured_on = CaptionedImages(held_out, config, run.config.seed, sizes=sizes) if held_out else None
    run.check_data(images, measured_on, account)
    if config.bucketed:
        run.print(images.buckets.summary())
    return images, measured_on


def resolve_config(config: LDMConfig, images: CaptionedImages, run: Run) -> LDMConfig:
    """The config with what was left open decided, which the run takes as its own."""
    config, reason = choose_space(config, images, run.device)
    if reason is not None:
        run.print(f"space: {reason}")
    run.settle(config, reason)
    return config


def make_pipeline(config: LDMConfig, images: CaptionedImages, run: Run) -> Pipeline:
    """The model at step 0, on the run's device: the one that training starts from, or a new UNet between the codec
    and the text encoder of the config.

    Raises:
        ValueError: if a part cannot be opened, or the resolution does not fit the codec.
    """
    if config.start_from is not None:
        pipeline = Pipeline.from_pretrained(config.start_from, device=run.device)
        _check_start_from(pipeline, config)
        pipeline.guidance_scale = config.sample.guidance_scale
        pipeline.num_inference_steps = config.sample.num_inference_steps
        pipeline.sampler = config.sample.sampler
        images.check_factor(pipeline.codec.factor)
        _, size, _ = pipeline.codec.latent_shape(config.data.resolution, config.data.resolution)
        # What is drawn while training, and by default with what is exported, has the size of training.
        pipeline.unet.config = dataclasses.replace(pipeline.unet.config, sample_size=size)
    else:
        text = config.text
        text_encoder = load_text_encoder(text.encoder, text.max_length, layer=text.layer)
        codec = make_codec(config, images, run)
        images.check_factor(codec.factor)
        pipeline = Pipeline(
            unet=make_unet(config, codec, text_encoder),
            codec=codec,
            text_encoder=text_encoder,
            schedule=config.schedule,
            guidance_scale=config.sample.guidance_scale,
            num_inference_steps=config.sample.num_inference_steps,
            sampler=config.sample.sampler,
        ).to(run.device)
    if images.composer is not None:
        images.composer.fits = pipeline.text_encoder.fits()
        run.print(images.composer.summary(images.shape_of))
    cut = pipeline.text_encoder.cut(config.sample.prompts)
    if cut:
        run.print(f"sample.prompts: {cut}")
    set_attention_backend(pipeline.unet, config.train.attention)
    enable_gradient_checkpointing(pipeline.unet, config.train.gradient_checkpointing)
    return pipeline


def _check_start_from(pipeline: Pipeline, config: LDMConfig) -> None:
    """Refuses a loss or sampler that the model in `start_from` cannot be trained or sampled with."""
    loss, learned = config.train.loss, pipeline.unet.config.learned_variance
    if learned != (loss.weighting == "hybrid"):
        raise ValueError(
            f"train.loss.weighting is {loss.weighting}, but {config.start_from} has {'' if learned else 'no '}learned "
            f"variances; choose {'hybrid' if learned else 'simple, vlb or min_snr'}"
        )
    check_precision(pipeline.schedule.prediction_type, config.train.mixed_precision)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    check_objective(loss, schedule, pipeline.schedule.prediction_type, config.sample)


def make_codec(config: LDMConfig, images: CaptionedImages, run: Run) -> Codec:
    """The codec of `config.space`: the one place where a config chooses between pixels and latents."""
    if config.first_stage is None:
        if run.is_resumed:  # its data may have grown meanwhile; what the model stands on stays
            return checkpoint.load_pixel_codec(run.folder / "frozen" / "codec")
        mean, std = image_statistics(images)
        return PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    return load_first_stage(config.first_stage)


def make_unet(config: LDMConfig, codec: Codec, text_encoder: TextEncoder) -> UNet:
    """A new network of `config.unet`, with what follows from codec and text encoder.

    Raises:
        ValueError: if the resolution does not fit the codec.
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


def choose_unet_threads(pipeline: Pipeline, model: nn.Module, networks: TrainingState, run: Run) -> None:
    """Chooses the number of threads, where it is open, by the network that learns; its data is not encoded yet."""
    side = run.config.data.resolution
    shape = pipeline.codec.latent_shape(side, side)
    text = (pipeline.text_encoder.max_length, pipeline.text_encoder.hidden_size)
    # `model` brings its precision itself.
    timing.choose_threads(run, networks, lambda count: unet_pass(model, shape, text, count, run.device, "no"))


def make_cached_encoders(config: LDMConfig, pipeline: Pipeline, run: Run) -> CachedEncoders:
    """What encodes images and captions, a share in each process of the run, into `data.cache_dir`."""
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


def log_cache_summary(encoded: LatentCache, text_encoder: TextEncoder, run: Run) -> None:
    """Says how many captions lose words to the encoder's length, and how far what is diffused is from the zero mean and
    unit variance that the papers assume.
    """
    captions = sorted({caption for sample in encoded.images.samples for caption in sample.captions})
    lost = [tokens for tokens in text_encoder.overflow(captions) if tokens]
    run.print(
        f"{len(captions)} different captions, {len(lost)} longer than {text_encoder.max_length} tokens"
        + (f" ({sum(lost)} tokens are cut; text.max_length allows more)" if lost else "")
    )
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


def save_frozen_components(pipeline: Pipeline, config: LDMConfig, run: Run) -> FrozenComponents:
    """Puts what does not learn on disk: into the run folder, or, where it is not exported, where it is already."""
    if config.export == "lora":
        assert config.start_from is not None
        folder = checkpoint.find_pipeline(config.start_from)
        run.write_once("frozen", lambda names: _name_frozen(pipeline, names))
    else:
        folder = run.write_once("frozen", pipeline.save_frozen)
    return FrozenComponents(folder, pipeline.index(), pipeline.schedule, config.sample)


def _name_frozen(pipeline: Pipeline, folder: Path) -> None:
    """Writes fingerprints of the parts that are not copied, so that a resumed run notices if they change."""
    folder.mkdir()
    codec = pipeline.codec
    assert isinstance(codec, nn.Module)
    settings: dict[str, Any] = codec.autoencoder.config.to_dict() if isinstance(codec, LatentCodec) else {}
    content = {
        "text_encoder": pipeline.text_encoder.fingerprint(),
        "codec": tensors_hash(codec.state_dict()),
        "scaling": [settings.get("scaling_factor"), settings.get("shift_factor")],
        "schedule": dataclasses.asdict(pipeline.schedule),
    }
    # Of a codebook; not so for others, whose runs may be older than these keys.
    content |= {key: settings[key] for key in ("latents_mean", "latents_std") if key in settings}
    checkpoint.write_json(folder / "model.json", content)


def export(folder: Path, unet: nn.Module, frozen: FrozenComponents, config: LDMConfig) -> None:
    """Writes what a run makes: a pipeline folder, or the adapter alone."""
    assert isinstance(unet, UNet)
    if config.export == "lora":
        adapters.save_adapter(folder, unet, finetune.ADAPTER)
    else:
        frozen.save(folder, unet)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, schedule: NoiseSchedule, prediction_type: PredictionType, config: LDMConfig, encoded: LatentCache
) -> dict[str, float]:
    """L_simple on held-out images with noise and timesteps that never change, and its share of each band of noise.

    Of the prediction alone and without weights, whatever the loss of training, so that runs of other losses compare.
    Timesteps are spread evenly over the schedule, one an image; where images are few, each is looked at several times,
    with other timesteps and noise. Posteriors are taken at their mean; captions are the first of each image and never
    dropped.

    Returns:
        `held_out_loss`, and for each of four bands of timesteps that was looked at, such as
        `held_out_loss_t000_249`, the mean over its images.
    """
    held_out, steps = encoded.images, schedule.num_train_timesteps
    count = min(len(held_out), config.train.validation_samples)
    looks = repeats_per_image(count, config.train.validation_samples)
    losses, timesteps = torch.empty(looks, count), torch.empty(looks, count, dtype=torch.int64)
    for look in range(looks):
        for chunk in held_out.chunks(IMAGES_AT_ONCE, count):
            batch = collate([held_out[0, i] for i in chunk])
            latents = encoded.latents(batch, None)
            draws = step_noise(
                config.seed,
                [look] * len(chunk),
                [f"held out: {name}" for name in batch.ids],
                0,
                shape=(latents.shape[1], latents.shape[2], latents.shape[3]),
                num_train_timesteps=steps,
                device=latents.device,
            )
            places = [i * looks + look for i in chunk]
            timesteps[look, chunk] = torch.tensor([(2 * place + 1) * steps // (2 * count * looks) for place in places])
            condition = encoded.text([held_out.samples[i].captions[0] for i in chunk])
            with finetune.precision_of(unet):
                loss = diffusion_loss(
                    _prediction_of(unet),
                    schedule,
                    latents,
                    condition,
                    timesteps=timesteps[look, chunk],
                    noise=draws.noise,
                    prediction_type=prediction_type,
                )
            losses[look, chunk] = loss.float().cpu()
    values = {"held_out_loss": float(losses.mean())}
    for band in range(BANDS):
        first, last = band * steps // BANDS, (band + 1) * steps // BANDS - 1
        inside = losses[(first <= timesteps) & (timesteps <= last)]
        if len(inside):
            values[f"held_out_loss_t{first:03d}_{last:03d}"] = float(inside.mean())
    return values


def _prediction_of(unet: nn.Module) -> Denoiser:
    """The network without the variances that it may have learned."""
    return lambda x_t, timesteps, condition: split_variance(unet(x_t, timesteps, condition), x_t)[0]


def repeats_per_image(count: int, most: int) -> int:
    """How often each of `count` held-out images is looked at: 16 times at most, and `most` times for all together."""
    return max(1, min(MAX_REPEATS, most // count))


def plan_diffusion_run(
    config: LDMConfig,
    images: CaptionedImages,
    held_out: CaptionedImages | None,
    model: nn.Module,
    networks: TrainingState,
    frozen: FrozenComponents,
    run: Run,
    losses_of: Callable[[nn.Module, Batch], StepLosses],
    evaluator: Evaluator | None,
) -> None:
    """Measures what the parts of the run cost, and says what is about to happen."""
    check_memory(networks.model, run.device)
    step = timing.step_seconds(run, model, networks, images, losses_of)
    if run.is_main:
        one = timing.evaluation_seconds(run, networks.ema.module, images, losses_of)
        count = min(len(held_out), config.train.validation_samples) if held_out else 0
        validated = count * repeats_per_image(count, config.train.validation_samples) if count else 0
        costs = _costs(config, networks, frozen, run, step=step, validation=one * validated)
        if evaluator is not None:
            drawn = costs.sheet / (len(config.sample.prompts) * config.sample.images_per_prompt) * evaluator.samples
            size = frozen.pipeline(networks.ema.module).default_size
            costs = dataclasses.replace(costs, evaluation=drawn + evaluator.seconds(size))
        run.announce(
            make_plan(
                config,
                images,
                held_out,
                networks.model,
                step=run.step,
                space=run.reason or _space_of(config),
                costs=costs,
                device=run.device,
                threads=str(run.threads or ""),
            )
        )
    run.accelerator.wait_for_everyone()


def _costs(
    config: LDMConfig, networks: TrainingState, frozen: FrozenComponents, run: Run, *, step: float, validation: float
) -> Costs:
    """`validation` is that of the measurement alone."""
    lora = config.export == "lora"
    trained = networks.trainable_parameters
    export_bytes = 4 * (trained if lora else sum(p.numel() for p in networks.model.parameters()))
    # Of the frozen parts, weights are hard links and small files are copied into each export.
    sizes = {} if lora else {path: path.stat().st_size for path in frozen.folder.rglob("*") if path.is_file()}
    copied = sum(size for path, size in sizes.items() if path.suffix != ".safetensors")
    training_bytes = 4 * 4 * trained  # weights, their average and two moments of AdamW
    sheets: list[int] = []

    def draw(steps: int) -> None:
        sample = dataclasses.replace(config.sample, num_inference_steps=steps)
        file = io.BytesIO()
        with suppress(NotFinite):  # said where a grid is due; it must not keep a run from going on
            sample_grid(frozen.pipeline(networks.ema.module), sample).save(file, format="PNG")
        sheets.append(len(file.getvalue()))

    exports = 2 if validation else 1  # the newest, which shares its weights with a checkpoint, and the best
    return Costs(
        step=step,
        validation=validation + (timing.write_seconds(run.folder, export_bytes, 0) if validation else 0),
        sheet=timing.grid_seconds(draw, config.sample.num_inference_steps),
        checkpoint=timing.checkpoint_seconds(run, training_bytes + export_bytes, sum(sizes.values())),
        memory=timing.peak_memory(run, networks),
        checkpoint_bytes=training_bytes + export_bytes + copied,
        sheet_bytes=sheets[-1],
        once_bytes=sum(sizes.values()) + (exports - 1) * export_bytes + exports * copied,
    )


def _space_of(config: LDMConfig) -> str:
    if config.start_from is not None:
        return f"that of {config.start_from}, {config.finetune.method} fine-tuning"
    return f"{config.space}, as the config says" + (f", of {config.first_stage}" if config.first_stage else "")


def sample_grid(pipeline: Pipeline, config: SampleConfig) -> Image.Image:
    """A row of pictures a prompt; picture j of every row has seed `config.seed` + j."""
    seeds = [config.seed + j for _ in config.prompts for j in range(config.images_per_prompt)]
    with cut_prompts_said():  # by make_pipeline, once a run
        drawn = pipeline(
            config.prompts,
            num_images_per_prompt=config.images_per_prompt,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            sampler=config.sampler,
            seed=seeds,
        ).images
    n = config.images_per_prompt
    return contact_sheet([drawn[i * n : (i + 1) * n] for i in range(len(config.prompts))], config.prompts)
