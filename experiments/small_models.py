"""Small pixel models that a study trains for itself: the data as tensors, a network, and a loop that can go on.

The algorithm is that of `train/train_ldm.py` on one process of a CPU; what differs is that loss and prediction are
chosen in code, that digits have one channel as their scans do, and that nothing but the averaged weights is kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import hub
from ldm.codecs import PixelCodec
from ldm.config import TrainConfig
from ldm.data import DataConfig, SampleOrder, generator, split
from ldm.data.layouts import open_source
from ldm.diffusion import LossConfig, NoiseSchedule, PredictionType, ScheduleConfig, diffusion_loss
from ldm.models import UNet, UNetConfig
from ldm.pipelines.images import from_pil
from ldm.text import load_text_encoder
from ldm.training.noise import step_noise
from ldm.training.trainable import learning_rate, make_ema, make_optimizer, optimizer_tensors, restore_optimizer

SIMPLE = LossConfig()
# DDPM, section 4: T = 1000, β from 1e-4 to 0.02.
SCHEDULE = ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set in memory.

    Attributes:
        images: [N, C, H, W] float32 in [−1, 1], the training images first.
        captions: of each image; all of them have states.
        training: how many of the images are for training; the rest is held out.
        states: caption → text states [L, D].
    """

    ids: tuple[str, ...]
    images: Tensor
    captions: tuple[tuple[str, ...], ...]
    training: int
    states: dict[str, Tensor]

    @property
    def held_out(self) -> Tensor:
        return self.images[self.training :]

    def codec(self) -> PixelCodec:
        """Pixels with the mean and deviation of each channel of the training images."""
        pixels = self.images[: self.training].double().transpose(0, 1).flatten(1)  # [C, N·H·W]
        return PixelCodec(tuple(pixels.mean(dim=1).tolist()), tuple(pixels.std(dim=1).tolist()))

    def condition(self, captions: Sequence[str]) -> Tensor:
        """[B, L, D] on the CPU."""
        return torch.stack([self.states[caption] for caption in captions])

    def draw_captions(self, seed: int, places: Sequence[int]) -> tuple[list[int], list[str]]:
        """As captions occur in the data: for each place of a seed a training image, and one of its captions."""
        images, captions = [], []
        for place in places:
            draw = generator(seed, "caption", place)
            images.append(int(draw.integers(self.training)))
            choices = self.captions[images[-1]]
            captions.append(choices[draw.integers(len(choices))])
        return images, captions


def read_data(name: str, resolution: int, *, grey: bool, max_length: int) -> Data:
    """A built-in data set ("digits" or "openmoji"), its captions encoded by MiniLM.

    Args:
        grey: keep one channel of images without colour.
        max_length: tokens of a caption.
    """
    training, held_out = split(open_source(DataConfig(path=name, resolution=resolution)).samples, HELD_OUT)
    samples = (*training, *held_out)
    images = from_pil([sample.load() for sample in samples])  # [N, 3, H, W]
    assert not grey or bool((images[:, :1] == images).all()), "the images have colours"
    captions = sorted({caption for sample in samples for caption in sample.captions})
    states = load_text_encoder("minilm", max_length)(captions)  # [captions, L, D]
    return Data(
        ids=tuple(sample.id for sample in samples),
        images=images[:, :1].contiguous() if grey else images,
        captions=tuple(sample.captions for sample in samples),
        training=len(training),
        states=dict(zip(captions, states, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made; its text width, channels and size follow from the data.

    Attributes:
        train: its `mixed_precision` may be bf16.
        patch: pixels a side that the network takes as one position with more channels, to be cheaper; a permutation of
            the pixels, so that what is diffused stays the same.
        save_every: steps between two states on disk, from which an interrupted training goes on.
    """

    unet: UNetConfig
    train: TrainConfig
    prediction_type: PredictionType = "epsilon"
    loss: LossConfig = SIMPLE
    seed: int = 0
    patch: int = 1
    save_every: int = 1000


class Patched(nn.Module):
    """A UNet that sees `patch` × `patch` pixels as one position."""

    def __init__(self, unet: UNet, patch: int) -> None:
        super().__init__()
        self.unet, self.patch = unet, patch

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        folded = F.pixel_unshuffle(x, self.patch)  # [B, C patch², H / patch, W / patch]
        return F.pixel_shuffle(self.unet(folded, timesteps, condition), self.patch)


def make_unet(recipe: Recipe, data: Data) -> Patched:
    """A new network, a function of the recipe."""
    channels, _, size = data.images.shape[1:]
    folded = channels * recipe.patch**2
    width = next(iter(data.states.values())).shape[-1]
    torch.manual_seed(recipe.seed)
    sizes = {"in_channels": folded, "out_channels": folded, "cross_attention_dim": width}
    unet = UNet(dataclasses.replace(recipe.unet, sample_size=size // recipe.patch, **sizes))
    return Patched(unet, recipe.patch)


def trained_model(recipe: Recipe, data: Data, folder: Path, device: torch.device) -> Patched:
    """The averaged weights of a training run, from `folder` or made now; the run goes on where it was interrupted.

    On the CPU it ends in the same bits as one that was not. Leaves `folder/unet` and `folder/training.json` (steps,
    seconds, the last losses).
    """
    if not (folder / "training.json").is_file():
        _train(recipe, data, folder, device)
    unet = hub.load_model(folder / "unet", "UNet2DConditionModel")
    assert isinstance(unet, UNet)
    return Patched(unet, recipe.patch).to(device).requires_grad_(False)


def _train(recipe: Recipe, data: Data, folder: Path, device: torch.device) -> None:
    config, schedule = recipe.train, NoiseSchedule.from_config(SCHEDULE)
    unet = make_unet(recipe, data).to(device)

    def predict(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            return unet(x, timesteps, condition).float()

    ema, optimizer = make_ema(unet, config.ema_decay), make_optimizer(unet, config)
    latents = data.codec().sample_latents(data.images[: data.training]).to(device)
    order = SampleOrder(data.training, recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.safetensors"
    step, seconds, losses = 0, 0.0, []
    if state.is_file():
        tensors = hub.load_tensors(state)
        step, seconds = int(tensors["step"]), float(tensors["seconds"])
        unet.load_state_dict(_part(tensors, "model."))
        ema.load_state_dict(_part(tensors, "ema."))
        restore_optimizer(unet, optimizer, _part(tensors, "optimizer."))
    started = time.perf_counter() - seconds
    while step < config.max_steps:
        batch = order.batch(step, config.batch_size)
        epochs, places = [epoch for epoch, _ in batch], [place for _, place in batch]
        ids = [data.ids[place] for place in places]
        shape = (latents.shape[1], latents.shape[2], latents.shape[3])
        draws = step_noise(
            recipe.seed, epochs, ids, step, shape=shape, num_train_timesteps=schedule.num_train_timesteps, device=device
        )
        captions = [
            data.captions[place][generator(recipe.seed, "caption", epoch, place).integers(len(data.captions[place]))]
            for epoch, place in batch
        ]
        loss = diffusion_loss(
            predict,
            schedule,
            latents[places],
            data.condition(captions).to(device),
            timesteps=draws.timesteps,
            noise=draws.noise,
            prediction_type=recipe.prediction_type,
            loss=recipe.loss,
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(unet)
        step += 1
        losses.append(float(loss.detach()))
        if step % recipe.save_every == 0 and step < config.max_steps:
            hub.save_tensors(state, _state(unet, ema, optimizer, step, time.perf_counter() - started))
            print(f"  {folder.name}: step {step}, loss {sum(losses[-100:]) / len(losses[-100:]):.4g}", flush=True)
    averaged = ema.module
    assert isinstance(averaged, Patched)
    hub.save_model(folder / "unet", averaged.unet)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    record = {
        "parameters": parameters,
        "steps": step,
        "batch_size": config.batch_size,
        "seconds": round(time.perf_counter() - started, 1),
        "loss": sum(losses[-100:]) / max(1, len(losses[-100:])),
    }
    hub.write_json(folder / "training.json", record)
    state.unlink(missing_ok=True)


def _state(
    unet: Patched, ema: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> dict[str, Tensor]:
    parts = {"model": unet.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_tensors(unet, optimizer)}
    tensors = {f"{part}.{name}": value for part, content in parts.items() for name, value in content.items()}
    return {**tensors, "step": torch.tensor(step), "seconds": torch.tensor(seconds, dtype=torch.float64)}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
