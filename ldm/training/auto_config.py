"""The automatic configuration of `ldm train FOLDER` and of `space: auto`: each choice, with its reason."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config
from ldm.data import CaptionedImages, DataConfig, Sample, split
from ldm.evaluation.autoencoder import (
    MAX_PIXEL_RESOLUTION,
    MAX_SLOW_PIXEL_RESOLUTION,
    Action,
    advise,
    measure_reconstruction,
    no_first_stage_reason,
)
from ldm.hub import find_pipeline
from ldm.models import AutoencoderKL, FirstStage, UNet, UNetConfig
from ldm.models.efficientnet import is_installed, perceptual_distance
from ldm.pipelines import Pipeline
from ldm.progress import format_duration, plural
from ldm.text import load_text_encoder
from ldm.training import prior, threads
from ldm.training.estimate import format_millions, seconds_per_call
from ldm.training.setup import load_first_stage
from ldm.training.starting_model import choose_start
from ldm.training.trainable import attention_layers

DEFAULT_FIRST_STAGE = "openmoji-first-stage"


@dataclass(frozen=True)
class SpaceChoice:
    """A space, its first stage, and the reason."""

    space: Literal["pixel", "latent"]
    first_stage: str | None
    reason: str
    psnr: float | None = None
    # What `ldm autoencoder evaluate` recommends; "tune" or "train": a decoder or a first stage on these images.
    advice: Action | None = None


def resolve_config(config: LDMConfig, images: CaptionedImages, device: torch.device) -> tuple[LDMConfig, str | None]:
    """(the config with `space: auto` and `sample.captions` resolved, the reason of the space); or unchanged, and None.

    Raises ValueError as `decide_space`.
    """
    if config.sample.captions:
        captions = sample_prompts(images.samples, config.sample.captions)
        sample = dataclasses.replace(config.sample, prompts=(*captions, *config.sample.prompts), captions=0)
        config = dataclasses.replace(config, sample=sample)
    if config.start_from is not None or config.space != "auto":
        return config, None
    choice = decide_space(images, config.first_stage, device)
    resolved = dataclasses.replace(config, space=choice.space, first_stage=choice.first_stage)
    return resolved, f"{choice.space}, because {choice.reason}"


def decide_space(images: CaptionedImages, first_stage: str | None, device: torch.device) -> SpaceChoice:
    """Choose the space for this data and a first stage (None: the built-in one). Raises ValueError if that cannot be
    opened, or the image size is not a multiple of its downsampling factor and too large for pixels.
    """
    resolution = images.config.resolution
    if resolution <= MAX_PIXEL_RESOLUTION:
        return SpaceChoice("pixel", None, no_first_stage_reason(resolution), advice="pixels")
    name = first_stage or DEFAULT_FIRST_STAGE
    codec = load_first_stage(name).to(device)
    if resolution > MAX_SLOW_PIXEL_RESOLUTION:
        images.check_factor(codec.factor)
    # Without its packages PSNR decides alone.
    perceptual = perceptual_distance(device) if is_installed() else None
    found = measure_reconstruction(codec, name, images, device, perceptual)
    advice = advise(found)
    # A first stage that has to be trained does not exist yet; small images are diffused as pixels until then.
    if advice.action == "pixels" or (advice.action != "use" and resolution <= MAX_SLOW_PIXEL_RESOLUTION):
        return SpaceChoice("pixel", None, advice.why, found.psnr, advice.action)
    return SpaceChoice("latent", name, advice.why, found.psnr, advice.action)


RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)
CPU_RESOLUTION, GPU_RESOLUTION = 64, 256  # what a new UNet learns in hours, by our measurements
TEXT_LENGTHS = (16, 32, 77)
MAX_EPOCHS = 1000
MIN_STEPS = 100
# A network and image size are affordable if the time allows this many samples: 75 per training image made plain emoji
# recognizable (docs/openmoji.md), and few images are repeated more often.
EPOCHS_NEEDED, MIN_SAMPLES_NEEDED, MAX_SAMPLES_NEEDED = 75, 8_000, 200_000
TIMED_IMAGES = 4
TIMED_RESOLUTION, TIMED_TEXT = 32, (16, 384)  # before network and text are chosen
MIN_IMAGES = 2
FIRST_STAGE_SUFFIX = "-first-stage"  # of the run folder of a first stage
FIRST_STAGE_FRACTION = 0.4
# A decoder that starts from another first stage has most of its gain after 120 steps: docs/evaluation.md.
MAX_FIRST_STAGE_STEPS, MAX_DECODER_STEPS = 10_000, 2_000
GRID_FRACTION = 0.2  # of the time, at most, and as much for evaluations
MAX_GRIDS = 4
EVALUATED_IMAGES = 64
PROMPTS, LONG_PROMPT = 6, 80
OTHER_PROMPTS = ("a dog", "a red car")
LARGE = 200_000_000  # parameters: Stable Diffusion has 860 million, ours have 10
CHECKPOINT_SECONDS = 600


@dataclass
class ChosenConfig:
    """Configs as nested mappings, and the reasons for them."""

    config: dict[str, Any]
    first_stage: dict[str, Any] | None = None  # is trained before
    reasons: list[str] = field(default_factory=list)
    threads: int | None = None  # CPU threads that were measured and have to be used; None on a GPU
    log: Callable[[str], None] = lambda line: None

    def explain(self, reason: str) -> None:
        """Add a reason, and show it at once: the next choice may take seconds to measure."""
        self.reasons.append(reason)
        self.log(reason)


@dataclass(frozen=True)
class TrainOptions:
    """What the user may choose; None is chosen automatically.

    Attributes:
        output_dir: the run folder; that of a first stage ends in `-first-stage`.
        minutes: about how long training may take.
        start_from: a pipeline to fine-tune; `method` is "full", "attention" or "lora".
        space, first_stage: of a new model, as in `LDMConfig`; "auto" is chosen automatically.
        cpu_threads: as in `TrainConfig`.
        anyway: train a new model even where that is not expected to work.
        new_model: the config is given keys that only a new model takes.
    """

    output_dir: str
    minutes: float = 30
    resolution: int | None = None
    start_from: str | None = None
    method: str | None = None
    encoder: str = "minilm"
    space: str = "auto"
    first_stage: str | None = None
    cpu_threads: int | None = None
    anyway: bool = False
    new_model: bool = False


def choose_config(
    samples: Sequence[Sample],
    data: dict[str, Any],
    options: TrainOptions,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
) -> ChosenConfig:
    """Choose what the options and the given keys of `data` (at least `path`) leave open, by all usable samples,
    inspected, and short timings on this machine. Raises ValueError for too few images or an option that cannot be met.
    """
    if len(samples) < MIN_IMAGES:
        raise ValueError(f"{data['path']} holds {len(samples)} image that can be used; training needs {MIN_IMAGES}")
    chosen = ChosenConfig({"output_dir": options.output_dir, "seed": 0, "data": dict(data)}, log=log)
    config, explain, data = chosen.config, chosen.explain, chosen.config["data"]
    if options.start_from is None:
        data["resolution"], size_reason = options.resolution, None
        if options.resolution is None:
            data["resolution"], size_reason = _choose_resolution(samples, device)
        images = _training_images(samples, data)
        start, reason = _choose_start(chosen, images, options, device)
        explain(f"start: {reason}")
        options = dataclasses.replace(options, start_from=start)
    else:
        explain(f"start: {options.start_from}, as --start-from says")
    if options.start_from is not None:
        _choose_finetuning(chosen, samples, options, device)
        parse_config(config, LDMConfig, "the chosen config")
        return chosen
    if size_reason is not None:
        explain(size_reason)

    name, minutes, space = options.first_stage, options.minutes, options.space
    if options.space == "auto":
        choice = decide_space(images, name, device)
        trains = choice.advice in ("tune", "train")
        space, name = ("latent" if trains else choice.space), choice.first_stage
        explain(f"space: {space}, because {choice.reason}")
        if trains:
            name = (options.first_stage or DEFAULT_FIRST_STAGE) if choice.advice == "tune" else None
            chosen.first_stage = _first_stage_config(data, options, len(images), device, name)
            minutes *= 1 - FIRST_STAGE_FRACTION
            what = "a new one is trained" if name is None else f"the decoder of {name} is fine-tuned"
            explain(
                f"first stage: {what} on these images before, {chosen.first_stage['train']['max_steps']} steps in "
                f"up to {FIRST_STAGE_FRACTION:.0%} of the time"
            )
    else:
        name = (name or DEFAULT_FIRST_STAGE) if space == "latent" else None
        explain(f"space: {space}, as given")
    config["space"] = space
    if chosen.first_stage is not None:
        config["first_stage"] = f"{chosen.first_stage['output_dir']}/autoencoder"
    elif name is not None:
        config["first_stage"] = name

    # For MiniLM the fewest tokens that 99 % of the captions fit into; other encoders have their own length.
    is_minilm = options.encoder == "minilm"
    encoder = load_text_encoder(options.encoder, TEXT_LENGTHS[0]) if is_minilm else load_text_encoder(options.encoder)
    length = encoder.max_length
    if is_minilm:
        captions = sorted({caption for sample in samples for caption in sample.captions})
        overflow = encoder.truncated_tokens(captions)
        for length in TEXT_LENGTHS:
            longer = sum(lost > length - TEXT_LENGTHS[0] for lost in overflow)
            if longer <= len(captions) / 100:
                break
        lose = "; none is longer" if not longer else f"; {longer} of {len(captions)} are longer and lose their end"
        explain(f"captions: {length} tokens{lose}")
    config["text"] = {"encoder": options.encoder, "max_length": length if is_minilm else None}
    text = (length, encoder.hidden_size)
    # In pixel space x_0 is clipped to known bounds, so a schedule may end in pure noise, and v leaves no specks.
    config["schedule"] = (
        {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
        if space == "latent"
        else {"beta_schedule": "cosine", "prediction_type": "v_prediction"}
    )

    fixed = space == "latent" or options.resolution is not None
    network, shape = _choose_network(chosen, name, text, len(images), minutes, device, keeps_size=fixed)
    config["sample"] = {"prompts": sample_prompts(samples), "images_per_prompt": 4, "guidance_scale": 3.0}
    _choose_steps(chosen, network, shape, text, _batch_size(len(images), 64), len(images), minutes, device)
    config["train"] |= {"learning_rate": 4e-4, "lr_schedule": "cosine"}
    parse_config(config, LDMConfig, "the chosen config")
    if chosen.first_stage is not None:
        parse_config(chosen.first_stage, AutoencoderTrainingConfig, "the chosen config")
    return chosen


def _choose_start(
    chosen: ChosenConfig, images: CaptionedImages, options: TrainOptions, device: torch.device
) -> tuple[str | None, str]:
    """As `choose_start`, by the speed of the smallest new network; that of the CPU's threads is measured before."""
    if options.first_stage is not None:
        load_first_stage(options.first_stage)  # refused now, if it cannot be opened
    resolution = images.config.resolution
    side = min(resolution, TIMED_RESOLUTION)
    network = _make_unet(unet_keys(side, 64), 3, TIMED_TEXT[1], device)
    _choose_threads(chosen, network, (3, side, side), TIMED_TEXT, options, device)
    if options.anyway:
        return None, "a new UNet, since --anyway asks for it"
    # On latents of a quarter of the size where there may be a first stage.
    side = resolution if resolution <= MAX_PIXEL_RESOLUTION else resolution // 4
    shape, base = (4, side, side), 64 if device.type == "cuda" else 32
    network = _make_unet(unet_keys(side, base), shape[0], TIMED_TEXT[1], device)
    seconds = unet_seconds(network, shape, TIMED_TEXT, 4 * TIMED_IMAGES, device, "no")
    given = (options.space, options.first_stage, options.encoder, options.resolution) != ("auto", None, "minilm", None)
    return choose_start(
        images,
        minutes=options.minutes,
        samples_per_second=4 * TIMED_IMAGES / seconds,
        device=device,
        may_fine_tune=not (given or options.new_model),
    )


def _choose_resolution(samples: Sequence[Sample], device: torch.device) -> tuple[int, str]:
    """The largest of RESOLUTIONS that the median image fills and that this machine trains in hours; the reason."""
    # Curated sets are not inspected; a few of their images represent all.
    inspected = [sample for sample in samples if sample.size] or samples[:: max(1, len(samples) // 100)]
    median = sorted(min(sample.size or sample.load().size) for sample in inspected)[len(inspected) // 2]
    max_side = GPU_RESOLUTION if device.type == "cuda" else CPU_RESOLUTION
    side = max((r for r in RESOLUTIONS if r <= min(median, max_side)), default=RESOLUTIONS[0])
    limited = median > max_side == CPU_RESOLUTION
    limit = f"; without a GPU {max_side} is what trains in reasonable time" if limited else ""
    return side, f"image size: {side}, since half of the images have a shorter side of {median} or more{limit}"


def _choose_network(
    chosen: ChosenConfig,
    first_stage: str | None,
    text: tuple[int, int],
    count: int,
    minutes: float,
    device: torch.device,
    *,
    keeps_size: bool,
) -> tuple[UNet, tuple[int, int, int]]:
    """The largest network, and without `keeps_size` the largest images, for which enough samples fit into the time:
    (the network, its latent shape (C, h, w)). Sets `unet` and `data.resolution`.
    """
    config, resolution = chosen.config, chosen.config["data"]["resolution"]
    needed = min(MAX_SAMPLES_NEEDED, max(MIN_SAMPLES_NEEDED, EPOCHS_NEEDED * count))
    sides = [resolution >> halving for halving in range(1 if keeps_size else max(1, int(math.log2(resolution)) - 3))]
    for side, base in itertools.product(sides, (128, 64) if device.type == "cuda" else (64, 32)):
        if config["space"] == "pixel":
            shape = (3, side, side)
        elif first_stage is None:  # it will be trained: see `_first_stage_config`
            shape = (4, side // 4, side // 4)
        else:
            shape = load_first_stage(first_stage).latent_shape(side, side)
        config["unet"], config["data"]["resolution"] = unet_keys(shape[1], base), side
        network = _make_unet(config["unet"], shape[0], text[1], device)
        possible = int(minutes * 60 * TIMED_IMAGES / unet_seconds(network, shape, text, TIMED_IMAGES, device, "no"))
        if possible >= needed:
            break
    if side < resolution:
        chosen.explain(
            f"image size: {side} after all; at {resolution} fewer than {needed} samples, which {count} images need, "
            f"would fit into --minutes {minutes:g}"
        )
    size = format_millions(sum(p.numel() for p in network.parameters()))
    slow = f"; too slow for the {needed} samples needed: raise --minutes" if possible < needed else ""
    chosen.explain(f"network: {size} parameters on {shape[1]}x{shape[2]}{slow}")
    return network, shape


def _choose_finetuning(
    chosen: ChosenConfig, samples: Sequence[Sample], options: TrainOptions, device: torch.device
) -> None:
    """Image size, method, batch size and steps of fine-tuning."""
    assert options.start_from is not None
    pipeline = Pipeline.from_pretrained(options.start_from, device=device)
    unet, encoder, config = pipeline.unet, pipeline.text_encoder, chosen.config
    side = options.resolution or pipeline.default_size[0]
    config["data"]["resolution"] = side
    of = "as given" if options.resolution is not None else f"that of {options.start_from}"
    chosen.explain(f"image size: {side}, {of}")
    shape = pipeline.codec.latent_shape(side, side)
    parameters = sum(p.numel() for p in unet.parameters())
    large = parameters > LARGE
    method = options.method or ("lora" if large or len(samples) < 50 else "full")
    why = "as given" if options.method else f"for {len(samples)} images and {format_millions(parameters)} parameters"
    chosen.explain(f"method: {method}, {why}")
    config |= {"start_from": options.start_from, "finetune": {"method": method}}
    if (find_pipeline(options.start_from) / "prompts.txt").is_file():
        config["finetune"]["prior_weight"] = 1.0
        chosen.explain(f"prior preservation: weight 1, on prompts of {options.start_from}")
    # Captions of the data, and what the model should still know.
    config["sample"] = {"prompts": [*sample_prompts(samples, PROMPTS - 2), *OTHER_PROMPTS], "images_per_prompt": 4}
    config["sample"] |= {key: getattr(pipeline, key) for key in ("guidance_scale", "num_inference_steps", "sampler")}
    if method != "full":  # an adapter takes little time itself; what counts is where gradients are needed
        unet.requires_grad_(False)
        for layer in attention_layers(unet):
            layer.requires_grad_(True)
    count, text = len(_training_images(samples, config["data"])), (encoder.max_length, encoder.hidden_size)
    _choose_threads(chosen, unet, shape, text, options, device)
    batch = _batch_size(count, 4 if large else 16)
    _choose_steps(chosen, unet, shape, text, batch, count, options.minutes, device)
    rate = (1e-4 if large else 1e-3) if method == "lora" else (1e-5 if large else 1e-4)
    config["train"] |= {"learning_rate": rate, "lr_schedule": "constant", "final_weights": "best"}


def _choose_threads(
    chosen: ChosenConfig,
    network: UNet,
    shape: tuple[int, int, int],
    text: tuple[int, int],
    options: TrainOptions,
    device: torch.device,
) -> None:
    """On a CPU, once: the number of threads of all later timings and of training, measured with a similar network."""
    if device.type != "cpu" or chosen.threads is not None:
        return
    found = threads.resolve_threads(threads.available_threads(), options.cpu_threads, None)
    if found.number is None:
        training_pass = threads.unet_pass(network, shape, text, 1, device, "no")
        found = threads.measure_threads(found, lambda: threads.timed_call(training_pass), "an image forward and back")
        network.zero_grad(set_to_none=True)
    assert found.number is not None
    torch.set_num_threads(found.number)
    chosen.threads = found.number
    chosen.explain(f"threads: {found}")


def unet_seconds(
    unet: UNet, shape: tuple[int, int, int], text: tuple[int, int], batch: int, device: torch.device, precision: str
) -> float:
    """Seconds of forward and backward for `batch` latents of a shape (C, h, w), text states of (tokens, width), and a
    precision "no" or "bf16", as `train.mixed_precision`.
    """
    return seconds_per_call(threads.unet_pass(unet, shape, text, batch, device, precision), unet, device)


def autoencoder_seconds(autoencoder: FirstStage, resolution: int, batch: int, device: torch.device) -> float:
    """Seconds of forward and backward for `batch` square images."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    return seconds_per_call(lambda: autoencoder(images)[0].square().mean().backward(), autoencoder, device)


def _make_unet(keys: dict[str, Any], channels: int, text_width: int, device: torch.device) -> UNet:
    sizes = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": text_width}
    return UNet(TypeAdapter(UNetConfig).validate_python(keys | sizes)).to(device)


def _training_images(samples: Sequence[Sample], data: dict[str, Any]) -> CaptionedImages:
    config = DataConfig(**data)
    training, _ = split(samples, config.held_out)
    return CaptionedImages(training, config, 0)


def unet_keys(size: int, base: int) -> dict[str, Any]:
    """A UNet for `size`x`size` latents: levels down to 4 or 8 positions per side, attention from 16 per side on.

    Args:
        base: channels of the first level; level i has (i + 1) × base.
    """
    levels = min(4, max(2, int(math.log2(size)) - 1))
    attends = [size >> level <= 16 and level > 0 for level in range(levels)]
    attends[-1] = True
    return {
        "block_out_channels": [base * (level + 1) for level in range(levels)],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": 1,
        "attention_head_dim": 4,  # heads, as in Stable Diffusion
        "norm_num_groups": base // 4,
    }


def _first_stage_config(
    data: dict[str, Any], options: TrainOptions, count: int, device: torch.device, base: str | None
) -> dict[str, Any]:
    """A first stage that is trained as long as its part of the time allows.

    Args:
        base: a first stage whose decoder is fine-tuned; None trains a new one like configs/openmoji-first-stage.yaml.
    """
    batch = _batch_size(count, 16)
    content: dict[str, Any] = {
        "output_dir": options.output_dir.rstrip("/") + FIRST_STAGE_SUFFIX,
        "seed": 0,
        "data": dict(data),
        "train": {"max_steps": 1, "batch_size": batch, "learning_rate": 1e-3, "lr_schedule": "cosine"},
    }
    if base is not None:
        content |= {"start_from": base, "trained": "decoder"}
        network = load_first_stage(base).autoencoder.requires_grad_(True)  # an upper bound: its encoder is timed too
    else:
        content["autoencoder"] = {
            "block_out_channels": [16, 32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
        }
        config = parse_config(content, AutoencoderTrainingConfig, "the chosen config").autoencoder
        assert config is not None
        network = AutoencoderKL(config)
    seconds = autoencoder_seconds(network.to(device), data["resolution"], batch, device)
    steps = int(options.minutes * 60 * FIRST_STAGE_FRACTION / seconds)
    steps = min(steps, MAX_FIRST_STAGE_STEPS if base is None else MAX_DECODER_STEPS)
    content["train"] |= {"max_steps": max(MIN_STEPS, _round_steps(steps)), "ema_decay": 0.995}
    return content


def _batch_size(count: int, max_size: int) -> int:
    """The largest power of two that is at most `max_size` and the number of images."""
    return 2 ** int(math.log2(max(1, min(max_size, count))))


def _round_steps(steps: int) -> int:
    """Round down to two digits or more."""
    return steps // 100 * 100 if steps >= 1000 else steps // 10 * 10


def _choose_steps(
    chosen: ChosenConfig,
    network: UNet,
    shape: tuple[int, int, int],
    text: tuple[int, int],
    batch: int,
    count: int,
    minutes: float,
    device: torch.device,
) -> None:
    """Precision, the number of steps that fit into the time, and how often to validate, sample and save.

    Sets `train`, and shrinks sample grids that would take too much of the time.
    """
    timed = min(batch, 4 * TIMED_IMAGES)
    seconds = {name: unet_seconds(network, shape, text, timed, device, name) * batch / timed for name in ("no", "bf16")}
    precision = "bf16" if seconds["bf16"] < 0.9 * seconds["no"] else "no"
    per_step = seconds[precision]
    holds_prior = bool(chosen.config.get("finetune", {}).get("prior_weight"))
    if holds_prior:
        per_step *= 1 + prior.PRIOR_FRACTION
    max_steps = max(MIN_STEPS, _round_steps(MAX_EPOCHS * count // batch))
    available = min(minutes * 60, max_steps * per_step)
    # Two evaluations of the network per image and sampling step, each a third of a training step (Kaplan et al. 2020,
    # section 2.1: backward costs two forward passes).
    sample = chosen.config["sample"]
    evaluations, seconds_each = 2 * sample.get("num_inference_steps", 50), per_step / batch / 3

    def grid() -> float:
        return evaluations * sample["images_per_prompt"] * len(sample["prompts"]) * seconds_each

    # Of a model to fine-tune before the first step too.
    before = 0 if chosen.config.get("start_from") is None else 1
    rounds = 1 + before
    evaluating = rounds * evaluations * EVALUATED_IMAGES * seconds_each
    if count < EVALUATED_IMAGES or evaluating > available * GRID_FRACTION:
        evaluating = 0.0
    while grid() > available * GRID_FRACTION / 2 and sample["images_per_prompt"] > 1:
        sample["images_per_prompt"] //= 2
    while grid() > available * GRID_FRACTION and len(sample["prompts"]) > 2:
        sample["prompts"] = sample["prompts"][::2]
    grids = max(1, min(MAX_GRIDS, int(available * GRID_FRACTION / grid())))
    others = (grids + before) * grid() + evaluating
    if holds_prior:
        others += prior.SAMPLES * (prior.SAMPLING_STEPS + prior.TIMESTEPS_PER_SAMPLE) * seconds_each
    possible = _round_steps(int((available - others) / per_step))
    steps = min(max_steps, max(MIN_STEPS, possible))
    if possible < MIN_STEPS:
        why = f"the fewest that make sense; --minutes {minutes:g} is not enough"
    elif available < max_steps * per_step:
        why = f"--minutes {minutes:g}"
    else:
        why = f"{MAX_EPOCHS} times through the data"
    chosen.explain(
        f"steps: {steps} of {batch} images, about "
        f"{format_duration(steps * per_step + others)} at "
        f"{per_step:.2g} s a step ({'bf16' if precision == 'bf16' else 'float32'}, measured) with "
        f"{plural(grids, 'sample grid')}{' and an evaluation' if evaluating else ''}: {why}"
    )
    chosen.config["train"] = {
        "max_steps": steps,
        "batch_size": batch,
        "warmup_steps": min(100, steps // 10),
        "mixed_precision": precision,
        "ema_decay": round(min(0.9999, max(0.9, 1 - 10 / steps)), 4),
        "validate_every": math.ceil(steps / 8),
        "sample_every": math.ceil(steps / grids),
        "checkpoint_every": min(steps // 4, max(50, int(CHECKPOINT_SECONDS / per_step))),
        "log_every": min(20, steps // 10),
    }
    if evaluating:
        chosen.config["train"] |= {
            "evaluate_every": steps,
            "evaluation_samples": EVALUATED_IMAGES,
            "evaluation_features": "efficientnet" if is_installed() else "pixel",
        }


def sample_prompts(samples: Sequence[Sample], max_count: int = PROMPTS) -> list[str]:
    """A few different captions, spread evenly over the data, for sample grids; long ones only if all are long."""
    captions = list(dict.fromkeys(min(sample.captions, key=len) for sample in samples))
    captions = [caption for caption in captions if len(caption) <= LONG_PROMPT] or captions
    count = min(max_count, len(captions))
    return [captions[i * len(captions) // count] for i in range(count)]
