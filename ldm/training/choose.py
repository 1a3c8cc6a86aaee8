"""What `ldm train FOLDER` decides: a complete config for a folder, and the reason for each choice in one line."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter

from ldm.config import LDMConfig, parse_config, to_yaml
from ldm.data import CaptionedImages, DataConfig, Sample, split
from ldm.models import UNet, UNetConfig
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder
from ldm.training.plan import duration, millions
from ldm.training.space import Choice, choose

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)
CPU_RESOLUTION, GPU_RESOLUTION = 64, 256  # what a UNet learns from nothing in hours, by what we measured
TEXT_LENGTHS = (16, 32, 77)
MOST_EPOCHS = 1000
# A network and a size are affordable if the time allows this many samples: 75 a training image made plain emoji
# recognisable (docs/openmoji.md), and few images are seen more often.
EPOCHS_NEEDED, FEWEST_SAMPLES_NEEDED, MOST_SAMPLES_NEEDED = 75, 8_000, 200_000
PROBED_IMAGES = 4
FEW_IMAGES = 1000
SHARE_OF_FIRST_STAGE = 0.4
PROMPTS = 6


@dataclass
class Chosen:
    """Configs as nested mappings, ready for YAML, in the order in which they are trained; and why they are so."""

    config: dict[str, Any]
    first_stage: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wishes:
    """What the user may say; None leaves it to us.

    Args:
        output_dir: the run folder; a first stage that is trained too gets `-first-stage` behind it.
        minutes: about how long training may take.
        start_from: a pipeline to go on from; `method` is "full", "attention" or "lora".
    """

    output_dir: str
    minutes: float = 30
    resolution: int | None = None
    start_from: str | None = None
    method: str | None = None
    encoder: str = "minilm"


def choose_config(samples: Sequence[Sample], data: dict[str, Any], wishes: Wishes, device: torch.device) -> Chosen:
    """Decides everything that the user did not say, from the data and from short measurements on this machine.

    Args:
        samples: inspected, all that can be used.
        data: the keys of `data` that are given already, at least `path`.
    """
    chosen = Chosen({"output_dir": wishes.output_dir, "seed": 0, "data": dict(data)})
    if wishes.start_from is not None:
        _go_on(chosen, samples, wishes, device)
    else:
        _begin(chosen, samples, wishes, device)
    # What is written is complete and has been validated.
    parse_config(chosen.config, LDMConfig, "the chosen config")
    return chosen


def _begin(chosen: Chosen, samples: Sequence[Sample], wishes: Wishes, device: torch.device) -> None:
    """A new model: image size, space, network, batch, steps."""
    data = chosen.config["data"]
    data["resolution"] = wishes.resolution or _resolution(samples, device, chosen)
    chosen.reasons.append(f"start: a new UNet, for there is no --start-from{_few(len(samples))}")
    images = _training_images(samples, data)
    choice = choose(images, None, device)
    chosen.reasons.append(f"space: {choice.space}, because {choice.reason}")
    minutes = wishes.minutes
    if choice.train_first_stage:
        minutes *= 1 - SHARE_OF_FIRST_STAGE
        chosen.first_stage = first_stage_config(data, wishes, len(images), device)
        choice = Choice("latent", f"{chosen.first_stage['output_dir']}/autoencoder", "")
        chosen.reasons.append("first stage: one is trained on these images before, and then space is latent")
    latent = choice.space == "latent"
    chosen.config["space"] = choice.space
    if choice.first_stage is not None:
        chosen.config["first_stage"] = choice.first_stage
    length, width = _text(samples, wishes.encoder, chosen)
    chosen.config["text"] = {"encoder": wishes.encoder, "max_length": length}
    # Pixels bound what is predicted, so that a schedule that ends in pure noise is safe; v leaves no specks there.
    chosen.config["schedule"] = (
        {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
        if latent
        else {"beta_schedule": "cosine", "prediction_type": "v_prediction"}
    )
    batch = _batch_size(len(images), 64)
    network, shape = _affordable(chosen, len(images), minutes, width, wishes.resolution is not None, device)
    _time(chosen, network, shape, width, batch, len(images), minutes, device)
    chosen.config["train"] |= {"learning_rate": 4e-4, "lr_schedule": "cosine"}
    chosen.config["sample"] = {"prompts": prompts(samples), "images_per_prompt": 4, "guidance_scale": 3.0}


def _affordable(
    chosen: Chosen, count: int, minutes: float, text_width: int, keep_size: bool, device: torch.device
) -> tuple[UNet, tuple[int, int, int]]:
    """The largest network, and on pixels the largest images, of which enough samples fit into the time.

    Sets `unet` and, where smaller images are needed, `data.resolution`.
    """
    needed = min(MOST_SAMPLES_NEEDED, max(FEWEST_SAMPLES_NEEDED, EPOCHS_NEEDED * count))
    latent = chosen.config["space"] == "latent"
    resolution = chosen.config["data"]["resolution"]
    halvings = 1 if latent or keep_size else max(1, int(math.log2(resolution)) - 3)
    bases = (64, 32) if device.type != "cuda" else (128, 64)
    for halving in range(halvings):
        for base in bases:
            side = (resolution >> halving) // (4 if latent else 1)
            channels = 4 if latent else 3
            keys = unet_keys(side, base)
            sizes = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": text_width}
            network = UNet(TypeAdapter(UNetConfig).validate_python(keys | sizes)).to(device)
            shape = (channels, side, side)
            speed = PROBED_IMAGES / step_seconds(network, shape, text_width, PROBED_IMAGES, "no", device)
            possible = int(speed * minutes * 60)
            last = (halving, base) == (halvings - 1, bases[-1])
            if possible < needed and not last:
                continue
            chosen.config["unet"] = keys
            chosen.config["data"]["resolution"] = resolution >> halving
            if halving:
                chosen.reasons.append(
                    f"image size: {resolution >> halving} after all; at {resolution} fewer than {needed} samples, "
                    f"which {count} images need, would fit into {minutes:g} minutes"
                )
            chosen.reasons.append(
                f"network: {millions(sum(p.numel() for p in network.parameters()))} parameters on {side}x{side}"
                + (f"; too slow for the {needed} samples wanted: raise --minutes" if possible < needed else "")
            )
            return network, shape
    raise AssertionError("the last is always taken")


def _training_images(samples: Sequence[Sample], data: dict[str, Any]) -> CaptionedImages:
    config = DataConfig(**data)
    training, _ = split(samples, config.held_out)
    return CaptionedImages(training, config, 0)


def _go_on(chosen: Chosen, samples: Sequence[Sample], wishes: Wishes, device: torch.device) -> None:
    """A model to start from brings all but image size, batch and steps."""
    assert wishes.start_from is not None
    pipeline = Pipeline.from_pretrained(wishes.start_from, device=device)
    side = wishes.resolution or pipeline.default_size[0]
    data = chosen.config["data"]
    data["resolution"] = side
    chosen.reasons.append(
        f"image size: {side}, that of {wishes.start_from}"
        if wishes.resolution is None
        else f"image size: {side}, as asked"
    )
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    large = parameters > 2e8
    method = wishes.method or ("lora" if large or len(samples) < 50 else "full")
    why = "as asked" if wishes.method else f"for {len(samples)} images and {millions(parameters)} parameters"
    chosen.reasons.append(f"start: {wishes.start_from}, method {method}, {why}")
    chosen.config |= {"start_from": wishes.start_from, "finetune": {"method": method}}
    training, _ = split(samples, DataConfig(**data).held_out)
    batch = _batch_size(len(training), 4 if large else 16)
    shape = pipeline.codec.latent_shape(side, side)
    width = pipeline.text_encoder.hidden_size
    _time(chosen, pipeline.unet, shape, width, batch, len(training), wishes.minutes, device)
    rate = {
        "full": 1e-4 if not large else 1e-5,
        "attention": 1e-4 if not large else 1e-5,
        "lora": 1e-3 if not large else 1e-4,
    }
    chosen.config["train"] |= {"learning_rate": rate[method], "lr_schedule": "constant"}
    chosen.config["sample"] = {
        "prompts": prompts(samples),
        "images_per_prompt": 4,
        "guidance_scale": pipeline.guidance_scale,
        "num_inference_steps": pipeline.num_inference_steps,
    }


def _resolution(samples: Sequence[Sample], device: torch.device, chosen: Chosen) -> int:
    """The largest of our sizes that the middle image fills, and that this machine learns in hours."""
    sides = sorted(min(sample.size) for sample in samples if sample.size)
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


def _text(samples: Sequence[Sample], encoder: str, chosen: Chosen) -> tuple[int | None, int]:
    """(tokens of a caption, the encoder's hidden size): of MiniLM the shortest of a few lengths that 99 % fit into."""
    captions = sorted({caption for sample in samples for caption in sample.captions})
    if encoder != "minilm":
        return None, load_text_encoder(encoder).hidden_size
    shortest = load_text_encoder(encoder, TEXT_LENGTHS[0])
    overflow = shortest.overflow(captions)
    for length in TEXT_LENGTHS:
        longer = sum(lost > length - TEXT_LENGTHS[0] for lost in overflow)
        if longer <= len(captions) / 100:
            break
    chosen.reasons.append(f"captions: {length} tokens; {longer} of {len(captions)} are longer and lose their end")
    return length, shortest.hidden_size


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


def first_stage_config(data: dict[str, Any], wishes: Wishes, count: int, device: torch.device) -> dict[str, Any]:
    """The design of configs/openmoji-first-stage.yaml on these images, as long as its share of the time allows."""
    batch = _batch_size(count, 16)
    # 70 images a second at 64 pixels on two cores, docs/openmoji.md; a GPU is faster, which the script then says.
    rate = 70 * (64 / data["resolution"]) ** 2
    steps = int(wishes.minutes * 60 * SHARE_OF_FIRST_STAGE * rate / batch)
    return {
        "output_dir": f"{wishes.output_dir}-first-stage",
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
        "train": {
            "max_steps": max(100, min(steps, 10_000)),
            "batch_size": batch,
            "learning_rate": 1e-3,
            "lr_schedule": "cosine",
            "ema_decay": 0.995,
        },
    }


def _batch_size(count: int, most: int) -> int:
    """The largest power of two that is not above `most` or the number of images."""
    return 2 ** int(math.log2(max(1, min(most, count))))


def _time(
    chosen: Chosen,
    network: UNet,
    shape: tuple[int, int, int],
    text_width: int,
    batch: int,
    count: int,
    minutes: float,
    device: torch.device,
) -> None:
    """Precision, and the number of steps that fit into the time, by measuring a few."""
    probed = min(batch, 4 * PROBED_IMAGES)
    seconds = {
        precision: step_seconds(network, shape, text_width, probed, precision, device) * batch / probed
        for precision in ("no", "bf16")
    }
    precision = "bf16" if seconds["bf16"] < 0.9 * seconds["no"] else "no"
    steps = int(minutes * 60 / seconds[precision])
    limit = MOST_EPOCHS * count // batch
    steps = max(100, min(steps, limit))
    steps = round(steps, -2)
    reason = f"{minutes:g} minutes" if steps < limit // 100 * 100 else f"{MOST_EPOCHS} times through the data"
    chosen.reasons.append(
        f"steps: {steps} of {batch} images, about {duration(steps * seconds[precision])} at "
        f"{seconds[precision]:.2g} s a step ({'bf16' if precision == 'bf16' else 'float32'}, measured): {reason}"
    )
    every = max(50, round(steps / 8, -1))
    chosen.config["train"] = {
        "max_steps": steps,
        "batch_size": batch,
        "warmup_steps": min(100, steps // 10),
        "mixed_precision": precision,
        "ema_decay": round(min(0.9999, max(0.9, 1 - 10 / steps)), 4),
        "validate_every": every,
        "sample_every": 2 * every,
        "checkpoint_every": 2 * every,
        "log_every": min(20, every),
    }


def step_seconds(
    network: UNet, shape: tuple[int, int, int], text_width: int, batch: int, precision: str, device: torch.device
) -> float:
    """Seconds of a step of the network alone, forward and backward: the third, or the first if it is slow."""
    latents = torch.randn(batch, *shape, device=device)
    text = torch.randn(batch, 16, text_width, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    elapsed = 0.0
    for _ in range(3):
        started = time.perf_counter()
        with autocast:
            loss = network(latents, timesteps, text).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        if elapsed > 20:
            break
    return elapsed


def prompts(samples: Sequence[Sample]) -> list[str]:
    """A few different captions, evenly from the data, short ones first: what the sample grids draw."""
    captions = list(dict.fromkeys(min(sample.captions, key=len) for sample in samples))
    return [captions[i * len(captions) // min(PROMPTS, len(captions))] for i in range(min(PROMPTS, len(captions)))]


def write_yaml(content: dict[str, Any]) -> str:
    """A chosen config with every default spelled out."""
    return to_yaml(parse_config(content, LDMConfig, "the chosen config"))
