"""What `ldm train FOLDER` decides: a complete config for a folder, and the reason for each choice in one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config
from ldm.data import CaptionedImages, DataConfig, Sample, split
from ldm.data.captions import plural
from ldm.models import AutoencoderKL, UNet, UNetConfig
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder
from ldm.training import finetune, threads
from ldm.training.plan import duration, format_millions
from ldm.training.space import DEFAULT_FIRST_STAGE, SpaceChoice, decide_space, load_first_stage
from ldm.training.speed import autoencoder_seconds, unet_pass, unet_seconds

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)
CPU_RESOLUTION, GPU_RESOLUTION = 64, 256  # what a UNet learns from nothing in hours, by what we measured
TEXT_LENGTHS = (16, 32, 77)
MAX_EPOCHS = 1000
MIN_STEPS = 100
# A network and a size are affordable if the time allows this many samples: 75 a training image made plain emoji
# recognisable (docs/openmoji.md), and few images are seen more often.
EPOCHS_NEEDED, MIN_SAMPLES_NEEDED, MAX_SAMPLES_NEEDED = 75, 8_000, 200_000
PROBED_IMAGES = 4
PROBED_SIDE, PROBED_TEXT = 32, (16, 384)  # of a network and of text whose size is not chosen yet
MIN_IMAGES, FEW_IMAGES = 2, 1000
FIRST_STAGE = "-first-stage"  # the folder of its run, after the name of that which it is for
FIRST_STAGE_FRACTION = 0.4
# A decoder that starts from one for other images has most of what it gains after 120 steps: `ldm.evaluation.readout`.
MAX_FIRST_STAGE_STEPS, MAX_DECODER_STEPS = 10_000, 2_000
GRID_FRACTION = 0.2
MOST_SHEETS = 4
PROMPTS, LONG_PROMPT = 6, 80
LARGE = 200_000_000  # parameters: Stable Diffusion has 860 million, ours have 10
SECONDS_BETWEEN_CHECKPOINTS = 600


@dataclass
class ChosenConfig:
    """Configs as nested mappings, ready for YAML, in the order in which they are trained; and why they are so.

    Args:
        threads: with which all was measured, and has to be trained; None on a GPU.
    """

    config: dict[str, Any]
    first_stage: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)
    threads: int | None = None


@dataclass(frozen=True)
class TrainOptions:
    """What the user may say; None leaves it to us.

    Args:
        output_dir: the run folder; a first stage that is trained too gets `-first-stage` behind it.
        minutes: about how long training may take.
        start_from: a pipeline to go on from; `method` is "full", "attention" or "lora".
        space, first_stage: of a new model, as in `LDMConfig`; "auto" leaves it to us.
        cpu_threads: as in `TrainConfig`.
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


def choose_config(
    samples: Sequence[Sample], data: dict[str, Any], options: TrainOptions, device: torch.device
) -> ChosenConfig:
    """Decides everything that the user did not say, from the data and from short measurements on this machine.

    Args:
        samples: inspected, all that can be used.
        data: the keys of `data` that are given already, at least `path`.

    Raises:
        ValueError: if there are too few images, or a wish cannot be fulfilled.
    """
    if len(samples) < MIN_IMAGES:
        raise ValueError(f"{data['path']} holds {len(samples)} image that can be used; training needs {MIN_IMAGES}")
    chosen = ChosenConfig({"output_dir": options.output_dir, "seed": 0, "data": dict(data)})
    if options.start_from is not None:
        _go_on(chosen, samples, options, device)
    else:
        _begin(chosen, samples, options, device)
    # What is written is complete and has been validated.
    parse_config(chosen.config, LDMConfig, "the chosen config")
    if chosen.first_stage is not None:
        parse_config(chosen.first_stage, AutoencoderTrainingConfig, "the chosen config")
    return chosen


def _begin(chosen: ChosenConfig, samples: Sequence[Sample], options: TrainOptions, device: torch.device) -> None:
    """A new model: image size, space, network, batch, steps."""
    data = chosen.config["data"]
    data["resolution"] = options.resolution or _resolution(samples, device, chosen)
    chosen.reasons.append(f"start: a new UNet, for there is no --start-from{_few(len(samples))}")
    images = _training_images(samples, data)
    side = min(data["resolution"], PROBED_SIDE)
    keys = unet_keys(side, 64) | {"in_channels": 3, "out_channels": 3, "cross_attention_dim": PROBED_TEXT[1]}
    network = UNet(TypeAdapter(UNetConfig).validate_python(keys)).to(device)
    _settle_threads(chosen, network, (3, side, side), PROBED_TEXT, options, device)
    choice = _space(chosen, images, options, device)
    minutes = options.minutes * (1 if chosen.first_stage is None else 1 - FIRST_STAGE_FRACTION)
    chosen.config["space"] = choice.space
    if chosen.first_stage is not None:
        chosen.config["first_stage"] = f"{chosen.first_stage['output_dir']}/autoencoder"
    elif choice.first_stage is not None:
        chosen.config["first_stage"] = choice.first_stage
    length, *text = _text(samples, options.encoder, chosen)
    chosen.config["text"] = {"encoder": options.encoder, "max_length": length}
    # Pixels bound what is predicted, so that a schedule that ends in pure noise is safe; v leaves no specks there.
    chosen.config["schedule"] = (
        {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
        if choice.space == "latent"
        else {"beta_schedule": "cosine", "prediction_type": "v_prediction"}
    )
    place = Budget((text[0], text[1]), minutes, device)
    network, shape = _affordable(chosen, choice, len(images), place, keep_size=options.resolution is not None)
    chosen.config["sample"] = {"prompts": sample_prompts(samples), "images_per_prompt": 4, "guidance_scale": 3.0}
    _steps(chosen, network, shape, _batch_size(len(images), 64), len(images), place)
    chosen.config["train"] |= {"learning_rate": 4e-4, "lr_schedule": "cosine"}


def _settle_threads(
    chosen: ChosenConfig,
    network: UNet,
    shape: tuple[int, int, int],
    text: tuple[int, int],
    options: TrainOptions,
    device: torch.device,
) -> None:
    """On a CPU: with how many threads all that follows is measured and trained, by a network like that of the run."""
    if device.type != "cpu":
        return
    found = threads.resolve_threads(threads.available_threads(), options.cpu_threads, None)
    if found.number is None:
        passes = unet_pass(network, shape, text, 1, device, "no")
        found = threads.measure_threads(found, lambda: threads.timed_call(passes), "an image forward and back")
        network.zero_grad(set_to_none=True)
    assert found.number is not None
    torch.set_num_threads(found.number)
    chosen.threads = found.number
    chosen.reasons.append(f"threads: {found}")


def _space(chosen: ChosenConfig, images: CaptionedImages, options: TrainOptions, device: torch.device) -> SpaceChoice:
    """The space, and a config for a first stage where one is to be trained on these images before."""
    if options.space != "auto":
        name = (options.first_stage or DEFAULT_FIRST_STAGE) if options.space == "latent" else None
        chosen.reasons.append(f"space: {options.space}, as asked")
        return SpaceChoice("latent" if options.space == "latent" else "pixel", name, "as asked")
    choice = decide_space(images, options.first_stage, device)
    learns = choice.tune_decoder or choice.train_first_stage
    chosen.reasons.append(f"space: {'latent' if learns else choice.space}, because {choice.reason}")
    base: str | None = None
    if choice.tune_decoder:
        base = options.first_stage or DEFAULT_FIRST_STAGE
        chosen.first_stage = tuning_config(chosen.config["data"], base, options, len(images), device)
        what = f"the decoder of {base} is fine-tuned"
    elif choice.train_first_stage:
        chosen.first_stage = first_stage_config(chosen.config["data"], options, len(images), device)
        what = "one is trained"
    else:
        return choice
    chosen.reasons.append(
        f"first stage: {what} on these images before, {chosen.first_stage['train']['max_steps']} steps in "
        f"up to {FIRST_STAGE_FRACTION:.0%} of the time"
    )
    return dataclasses.replace(choice, space="latent", first_stage=base)


@dataclass(frozen=True)
class Budget:
    """What bounds a network: (tokens, width) of the text's states, minutes, and where it computes."""

    text: tuple[int, int]
    minutes: float
    device: torch.device


def _affordable(
    chosen: ChosenConfig, choice: SpaceChoice, count: int, place: Budget, *, keep_size: bool
) -> tuple[UNet, tuple[int, int, int]]:
    """The largest network, and on pixels the largest images, of which enough samples fit into the time.

    Sets `unet` and, where smaller images are needed, `data.resolution`. Returns the network and the shape (C, h, w)
    of what it works on.
    """
    needed = min(MAX_SAMPLES_NEEDED, max(MIN_SAMPLES_NEEDED, EPOCHS_NEEDED * count))
    resolution = chosen.config["data"]["resolution"]
    halvings = 1 if choice.space == "latent" or keep_size else max(1, int(math.log2(resolution)) - 3)
    bases = (128, 64) if place.device.type == "cuda" else (64, 32)
    options = [(resolution >> halving, base) for halving in range(halvings) for base in bases]
    for side, base in options:
        shape = _diffused(choice, side)
        keys = unet_keys(shape[1], base)
        sizes = {"in_channels": shape[0], "out_channels": shape[0], "cross_attention_dim": place.text[1]}
        network = UNet(TypeAdapter(UNetConfig).validate_python(keys | sizes)).to(place.device)
        seconds = unet_seconds(network, shape, place.text, PROBED_IMAGES, place.device, "no") / PROBED_IMAGES
        possible = int(place.minutes * 60 / seconds)
        if possible >= needed or (side, base) == options[-1]:
            break
    chosen.config["unet"] = keys
    chosen.config["data"]["resolution"] = side
    if side < resolution:
        chosen.reasons.append(
            f"image size: {side} after all; at {resolution} fewer than {needed} samples, which {count} images need, "
            f"would fit into --minutes {place.minutes:g}"
        )
    size = format_millions(sum(p.numel() for p in network.parameters()))
    slow = f"; too slow for the {needed} samples wanted: raise --minutes" if possible < needed else ""
    chosen.reasons.append(f"network: {size} parameters on {shape[1]}x{shape[2]}{slow}")
    return network, shape


def _diffused(choice: SpaceChoice, side: int) -> tuple[int, int, int]:
    """(C, h, w) of what is diffused for square images."""
    if choice.space == "pixel":
        return 3, side, side
    if choice.first_stage is None:  # one is trained: see `first_stage_config`
        return 4, side // 4, side // 4
    return load_first_stage(choice.first_stage).latent_shape(side, side)


def _training_images(samples: Sequence[Sample], data: dict[str, Any]) -> CaptionedImages:
    config = DataConfig(**data)
    training, _ = split(samples, config.held_out)
    return CaptionedImages(training, config, 0)


def _go_on(chosen: ChosenConfig, samples: Sequence[Sample], options: TrainOptions, device: torch.device) -> None:
    """A model to start from brings all but image size, batch and steps."""
    assert options.start_from is not None
    pipeline = Pipeline.from_pretrained(options.start_from, device=device)
    side = options.resolution or pipeline.default_size[0]
    data = chosen.config["data"]
    data["resolution"] = side
    of = "as asked" if options.resolution is not None else f"that of {options.start_from}"
    chosen.reasons.append(f"image size: {side}, {of}")
    shape = pipeline.codec.latent_shape(side, side)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    large = parameters > LARGE
    method = options.method or ("lora" if large or len(samples) < 50 else "full")
    why = "as asked" if options.method else f"for {len(samples)} images and {format_millions(parameters)} parameters"
    chosen.reasons.append(f"start: {options.start_from}, method {method}, {why}")
    chosen.config |= {"start_from": options.start_from, "finetune": {"method": method}}
    chosen.config["sample"] = {
        "prompts": sample_prompts(samples),
        "images_per_prompt": 4,
        "guidance_scale": pipeline.guidance_scale,
        "num_inference_steps": pipeline.num_inference_steps,
        "sampler": pipeline.sampler,
    }
    if method != "full":  # an adapter is too small to take time of its own; what counts is where gradients are needed
        pipeline.unet.requires_grad_(False)
        for layer in finetune.attention_layers(pipeline.unet):
            layer.requires_grad_(True)
    count = len(_training_images(samples, data))
    encoder = pipeline.text_encoder
    place = Budget((encoder.max_length, encoder.hidden_size), options.minutes, device)
    _settle_threads(chosen, pipeline.unet, shape, place.text, options, device)
    _steps(chosen, pipeline.unet, shape, _batch_size(count, 4 if large else 16), count, place)
    rate = (1e-4 if large else 1e-3) if method == "lora" else (1e-5 if large else 1e-4)
    chosen.config["train"] |= {"learning_rate": rate, "lr_schedule": "constant"}


def _resolution(samples: Sequence[Sample], device: torch.device, chosen: ChosenConfig) -> int:
    """The largest of our sizes that the middle image fills, and that this machine learns in hours."""
    # Curated sets are not looked at before training; a few of their images speak for all.
    seen = [sample for sample in samples if sample.size] or samples[:: max(1, len(samples) // 100)]
    sides = sorted(min(sample.size or sample.load().size) for sample in seen)
    middle = sides[len(sides) // 2]
    most = GPU_RESOLUTION if device.type == "cuda" else CPU_RESOLUTION
    side = max((r for r in RESOLUTIONS if r <= min(middle, most)), default=RESOLUTIONS[0])
    limit = f"; without a GPU {most} is what trains in reasonable time" if middle > most == CPU_RESOLUTION else ""
    chosen.reasons.append(f"image size: {side}, for half of the images have a shorter side of {middle} or more{limit}")
    return side


def _few(count: int) -> str:
    if count >= FEW_IMAGES:
        return ""
    return (
        f"; {count} images teach a new model little more than themselves, so expect it to repeat them; going on from a "
        "model (--start-from) needs far fewer"
    )


def _text(samples: Sequence[Sample], encoder: str, chosen: ChosenConfig) -> tuple[int | None, int, int]:
    """(`text.max_length`, tokens, the encoder's hidden size): of MiniLM the shortest of a few lengths that 99 % of the
    captions fit into; of others their own.
    """
    if encoder != "minilm":
        loaded = load_text_encoder(encoder)
        return None, loaded.max_length, loaded.hidden_size
    captions = sorted({caption for sample in samples for caption in sample.captions})
    shortest = load_text_encoder(encoder, TEXT_LENGTHS[0])
    overflow = shortest.overflow(captions)
    for length in TEXT_LENGTHS:
        longer = sum(lost > length - TEXT_LENGTHS[0] for lost in overflow)
        if longer <= len(captions) / 100:
            break
    lose = "; none is longer" if not longer else f"; {longer} of {len(captions)} are longer and lose their end"
    chosen.reasons.append(f"captions: {length} tokens{lose}")
    return length, length, shortest.hidden_size


def unet_keys(size: int, base: int) -> dict[str, Any]:
    """A UNet for `size`x`size` latents: levels down to 4 or 8 positions a side, attention from 16 a side on.

    Args:
        base: channels of the first level; level i has i + 1 times as many.
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


def first_stage_config(data: dict[str, Any], options: TrainOptions, count: int, device: torch.device) -> dict[str, Any]:
    """The design of configs/openmoji-first-stage.yaml on these images, as long as its share of the time allows."""
    batch = _batch_size(count, 16)
    content: dict[str, Any] = {
        "output_dir": options.output_dir.rstrip("/") + FIRST_STAGE,
        "seed": 0,
        "data": dict(data),
        "autoencoder": {
            "block_out_channels": [16, 32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
        "train": {"max_steps": 1, "batch_size": batch, "learning_rate": 1e-3, "lr_schedule": "cosine"},
    }
    config = parse_config(content, AutoencoderTrainingConfig, "the chosen config").autoencoder
    assert config is not None
    seconds = autoencoder_seconds(AutoencoderKL(config).to(device), data["resolution"], batch, device)
    content["train"] |= _first_steps(options, seconds, MAX_FIRST_STAGE_STEPS)
    return content


def tuning_config(
    data: dict[str, Any], first_stage: str, options: TrainOptions, count: int, device: torch.device
) -> dict[str, Any]:
    """The decoder of a first stage goes on learning on these images, as long as its share of the time allows."""
    batch = _batch_size(count, 16)
    network = load_first_stage(first_stage).autoencoder.requires_grad_(True).to(device)
    seconds = autoencoder_seconds(network, data["resolution"], batch, device)  # with the encoder: an upper bound
    return {
        "output_dir": options.output_dir.rstrip("/") + FIRST_STAGE,
        "seed": 0,
        "data": dict(data),
        "start_from": first_stage,
        "trained": "decoder",
        "train": {"batch_size": batch, "learning_rate": 1e-3, "lr_schedule": "cosine"}
        | _first_steps(options, seconds, MAX_DECODER_STEPS),
    }


def _first_steps(options: TrainOptions, seconds: float, most: int) -> dict[str, Any]:
    """How long a first stage is trained at so many seconds a step, and how long its weights are averaged over."""
    steps = int(options.minutes * 60 * FIRST_STAGE_FRACTION / seconds)
    return {"max_steps": max(MIN_STEPS, _round(min(steps, most))), "ema_decay": 0.995}


def _batch_size(count: int, most: int) -> int:
    """The largest power of two that is not above `most` or the number of images."""
    return 2 ** int(math.log2(max(1, min(most, count))))


def _round(steps: int) -> int:
    """Down to two digits or more."""
    return steps // 100 * 100 if steps >= 1000 else steps // 10 * 10


def _steps(
    chosen: ChosenConfig, network: UNet, shape: tuple[int, int, int], batch: int, count: int, place: Budget
) -> None:
    """Precision, the number of steps that fit into the time, and how often is measured, drawn and saved.

    Sets `train`, and where grids would take too much of the time draws fewer pictures.
    """
    probed = min(batch, 4 * PROBED_IMAGES)
    precisions = {
        name: unet_seconds(network, shape, place.text, probed, place.device, name) * batch / probed
        for name in ("no", "bf16")
    }
    precision = "bf16" if precisions["bf16"] < 0.9 * precisions["no"] else "no"
    second = precisions[precision]
    limit = max(MIN_STEPS, _round(MAX_EPOCHS * count // batch))
    allowed = min(place.minutes * 60, limit * second)
    sheet, sheets = _sheets(chosen.config["sample"], second / batch / 3, allowed)
    possible = _round(int((allowed - sheets * sheet) / second))
    steps = min(limit, max(MIN_STEPS, possible))
    if possible < MIN_STEPS:
        why = f"the fewest that make sense; --minutes {place.minutes:g} is not enough"
    else:
        why = f"--minutes {place.minutes:g}" if allowed < limit * second else f"{MAX_EPOCHS} times through the data"
    chosen.reasons.append(
        f"steps: {steps} of {batch} images, about {duration(steps * second + sheets * sheet)} at {second:.2g} s a step "
        f"({'bf16' if precision == 'bf16' else 'float32'}, measured) with {plural(sheets, 'sample grid')}: {why}"
    )
    chosen.config["train"] = {
        "max_steps": steps,
        "batch_size": batch,
        "warmup_steps": min(100, steps // 10),
        "mixed_precision": precision,
        "ema_decay": round(min(0.9999, max(0.9, 1 - 10 / steps)), 4),
        "validate_every": math.ceil(steps / 8),
        "sample_every": math.ceil(steps / sheets),
        "checkpoint_every": min(steps // 4, max(50, int(SECONDS_BETWEEN_CHECKPOINTS / second))),
        "log_every": min(20, steps // 10),
    }


def _sheets(sample: dict[str, Any], evaluation: float, allowed: float) -> tuple[float, int]:
    """(seconds of a sample grid, how many): fewer pictures, then fewer grids, take at most a fifth of the time.

    Args:
        evaluation: seconds of the network for one picture; a training step has three (Kaplan et al. 2020, section 2.1:
            the backward pass costs two forward ones).
    """
    steps = sample.get("num_inference_steps", 50)

    def seconds() -> float:
        return 2 * steps * sample["images_per_prompt"] * len(sample["prompts"]) * evaluation

    while seconds() > allowed * GRID_FRACTION / 2 and sample["images_per_prompt"] > 1:
        sample["images_per_prompt"] //= 2
    while seconds() > allowed * GRID_FRACTION and len(sample["prompts"]) > 2:
        sample["prompts"] = sample["prompts"][::2]
    return seconds(), max(1, min(MOST_SHEETS, int(allowed * GRID_FRACTION / seconds())))


def sample_prompts(samples: Sequence[Sample]) -> list[str]:
    """A few different captions, evenly from the data, what the sample grids draw; long ones only where all are."""
    captions = list(dict.fromkeys(min(sample.captions, key=len) for sample in samples))
    captions = [caption for caption in captions if len(caption) <= LONG_PROMPT] or captions
    count = min(PROMPTS, len(captions))
    return [captions[i * len(captions) // count] for i in range(count)]
