"""From text to images: the class that a user calls."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import adapters, checkpoint
from ldm.codecs import Codec, LatentCodec, PixelCodec
from ldm.diffusion import NoiseSchedule, ScheduleConfig, State, classifier_free_guidance, ddim
from ldm.models import AutoencoderKL, UNet, set_attention_backend
from ldm.pipelines.images import to_pil
from ldm.text import TextEncoder, load_text_encoder_folders

LATENT_CLASS = "StableDiffusionPipeline"
PIXEL_CLASS = "PixelDiffusionPipeline"
SKIPPED = {"safety_checker", "feature_extractor", "image_encoder"}
READ = {"unet", "vae", "codec", "text_encoder", "tokenizer", "scheduler"}


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL, RGB; `seeds`: the seed of each, which gives that image again, alone or in any batch."""

    images: list[Image.Image]
    seeds: list[int]


class Pipeline:
    """A text-to-image model: UNet, codec, text encoder and schedule.

    Args:
        guidance_scale, num_inference_steps: the defaults of `__call__`, stored with the model.
    """

    def __init__(
        self,
        *,
        unet: UNet,
        codec: Codec,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 50,
    ) -> None:
        if unet.config.in_channels != codec.channels:
            raise ValueError(
                f"unet/config.json says in_channels {unet.config.in_channels} but the codec makes {codec.channels} "
                "channels; the parts are from different models"
            )
        if unet.config.cross_attention_dim != text_encoder.hidden_size:
            raise ValueError(
                f"unet/config.json says cross_attention_dim {unet.config.cross_attention_dim} but the text encoder "
                f"makes states of size {text_encoder.hidden_size}; the parts are from different models"
            )
        self.unet = unet
        self.codec = codec
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> Pipeline:
        """Opens a pipeline folder, ours or a Stable Diffusion 1.x/2.x one of diffusers, or a hub id.

        Args:
            device: where it runs; None takes CUDA where there is one, else the CPU.
            dtype: of weights and computation; float32, or float16/bfloat16 on a GPU.
            attention: "sdpa", or "xformers" where that is installed, on CUDA.

        Raises:
            ValueError: naming the file that is missing, damaged or of another model.
        """
        place = _usable_device(device)
        folder = checkpoint.find_pipeline(name)
        index = checkpoint.read_json(folder / "model_index.json")
        _check_index(index, folder)
        unet = checkpoint.load_model(folder / "unet", "UNet2DConditionModel", dtype)
        assert isinstance(unet, UNet)
        codec: PixelCodec | LatentCodec
        if "codec" in index:
            codec = checkpoint.load_pixel_codec(folder / "codec")
        else:
            autoencoder = checkpoint.load_model(folder / "vae", "AutoencoderKL", dtype)
            assert isinstance(autoencoder, AutoencoderKL)
            codec = LatentCodec(autoencoder, source=folder / "vae")
        schedule = checkpoint.load_schedule(folder / "scheduler")
        if not index.get("_ldm"):
            # diffusers' StableDiffusionPipeline sets this whatever the file says.
            schedule = dataclasses.replace(schedule, steps_offset=1)
        defaults = index.get("_ldm") or {}
        pipeline = cls(
            unet=unet,
            codec=codec,
            text_encoder=load_text_encoder_folders(folder / "text_encoder", folder / "tokenizer"),
            schedule=schedule,
            guidance_scale=defaults.get("guidance_scale", 7.5),
            num_inference_steps=defaults.get("num_inference_steps", 50),
        )
        pipeline.to(place, dtype)
        set_attention_backend(pipeline.unet, attention)
        return pipeline

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Pipeline:
        """Moves every network to `device` (and `dtype`); returns the pipeline."""
        self.unet.to(device=device, dtype=dtype)
        self.codec.to(device=device, dtype=dtype)
        self.text_encoder.to(device, dtype)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the pipeline folder, atomically; a latent one opens in diffusers' StableDiffusionPipeline.

        Args:
            folder: where; an old folder of that name is replaced when the new one is complete.

        Raises:
            ValueError: for a folder that holds other things, and while LoRAs are loaded that are not merged.
        """
        loaded = {
            name for part in self._adapted for name in adapters.adapter_names(part) if not adapters.is_merged(part)
        }
        if loaded:
            raise ValueError(
                f"the LoRA {min(loaded)!r} is loaded; merge_lora() to save the model with it, unload_lora() to save it "
                "without"
            )
        with checkpoint.atomic_folder(Path(folder)) as target:
            checkpoint.write_json(target / "model_index.json", self.index())
            checkpoint.save_model(target / "unet", self.unet)
            checkpoint.save_schedule(target / "scheduler", self.schedule)
            self.save_frozen(target)

    def save_frozen(self, folder: Path) -> None:
        """Writes the parts that training of the UNet leaves alone: text encoder, tokenizer, codec."""
        self.text_encoder.save(folder, changed=adapters.is_merged(self.text_encoder.model))
        if isinstance(self.codec, LatentCodec):
            if self.codec.source is None:
                checkpoint.save_model(folder / "vae", self.codec.autoencoder)
            else:
                checkpoint.copy_model(self.codec.source, folder / "vae")
        elif isinstance(self.codec, PixelCodec):
            checkpoint.save_pixel_codec(folder / "codec", self.codec)

    @property
    def _adapted(self) -> tuple[nn.Module, nn.Module]:
        """The networks that a LoRA may change."""
        return self.unet, self.text_encoder.model

    @property
    def lora(self) -> dict[str, float]:
        """The LoRAs that are on, with their weights."""
        return {name: weight for part in self._adapted for name, weight in adapters.adapter_weights(part).items()}

    def load_lora(self, source: str | os.PathLike[str], *, name: str = "default", weight: float = 1.0) -> None:
        """Adds a LoRA of diffusers, peft or kohya to UNet and text encoder; others that are loaded stay as they are.

        Args:
            source: a `.safetensors` file, a folder with one, or a hub id.
            name: by which `set_lora` and `unload_lora` know it.
            weight: how much of it is added: 1 as it was trained, 0 nothing.

        Raises:
            ValueError: naming the file and what is wrong with it; the pipeline is unchanged then.
        """
        adapters.load_adapter(self.unet, source, name, weight=weight, text_encoder=self.text_encoder.model)

    def set_lora(self, weights: Mapping[str, float]) -> None:
        """Turns on the LoRAs that are named, with these weights, and turns off the others; {} is all off."""
        loaded = [set(adapters.adapter_names(part)) for part in self._adapted]
        for name in weights.keys() - set.union(*loaded):
            raise ValueError(
                f"there is no LoRA {name!r}; loaded are: {', '.join(sorted(set.union(*loaded))) or 'none'}"
            )
        for name, weight in weights.items():
            adapters.check_weight(name, weight)  # before anything is changed
        for part, names in zip(self._adapted, loaded, strict=True):
            adapters.set_adapters(part, {name: weight for name, weight in weights.items() if name in names})

    def merge_lora(self) -> None:
        """Folds the LoRAs that are on into the weights: as fast as without, and `save_pretrained` writes them."""
        adapted = [part for part in self._adapted if adapters.adapter_names(part)]
        if not adapted:
            raise ValueError("no LoRA is loaded; load_lora() first")
        for part in adapted:
            adapters.merge_adapters(part)

    def unmerge_lora(self) -> None:
        """Undoes `merge_lora`, exactly: the LoRAs are loaded and on as they were before."""
        merged = [part for part in self._adapted if adapters.is_merged(part)]
        if not merged:
            raise ValueError("no LoRA is merged; there is nothing to undo")
        for part in merged:
            adapters.unmerge_adapters(part)

    def unload_lora(self) -> None:
        """Takes all LoRAs out, merged ones too: the pipeline is, bit for bit, what it was before the first."""
        for part in self._adapted:
            adapters.remove_adapters(part)

    def index(self) -> dict[str, Any]:
        """Content of `model_index.json`."""
        latent = isinstance(self.codec, LatentCodec)
        index: dict[str, Any] = {"_class_name": LATENT_CLASS if latent else PIXEL_CLASS}
        # Keys with an underscore are ours; diffusers leaves them alone.
        index["_ldm"] = {
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
        }
        index |= {name: list(classes) for name, classes in self.text_encoder.library_classes.items()}
        index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
        if not latent:
            return index | {"codec": ["ldm", "PixelCodec"]}
        index |= {"vae": ["diffusers", "AutoencoderKL"], "requires_safety_checker": False}
        return index | {name: [None, None] for name in sorted(SKIPPED)}

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[State], None] | None = None,
    ) -> PipelineOutput:
        """Draws images: DDIM with classifier-free guidance, then decoding.

        Args:
            prompt: one text, or a list; images come in its order, `num_images_per_prompt` of each.
            negative_prompt: what to lead away from: one text, or one a prompt; "" by default.
            height, width: in pixels, divisible by the codec's factor; the size of training by default.
            num_inference_steps: S, 1 to the number of training timesteps.
            guidance_scale: w of ε_∅ + w (ε_c − ε_∅), finite; 1 is no guidance.
            eta: 0 (deterministic) to 1 (the variance of DDPM).
            seed: an int (image i gets seed + i), one int an image, or None for fresh ones. Image i equals what
                its seed gives alone; noise comes from `torch.Generator("cpu").manual_seed(seed)`.
            latents: x_T instead of noise from the seeds, [images, C, h, w], standard normal.
            on_step: called with the `State` of every step, for previews.

        Raises:
            ValueError: naming the argument, its value and the range.
        """
        prompts, negatives = _prompts(prompt, negative_prompt, num_images_per_prompt)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale is {scale}; it must be a finite number (1 is no guidance, 7.5 usual)")
        schedule = NoiseSchedule.from_config(self.schedule)
        grid = schedule.grid(
            self.num_inference_steps if num_inference_steps is None else num_inference_steps,
            self.schedule.timestep_spacing,
            steps_offset=self.schedule.steps_offset,
        )
        seeds = _seeds(seed, len(prompts))
        generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
        default_height, default_width = self.default_size
        shape = self.codec.latent_shape(
            default_height if height is None else height, default_width if width is None else width
        )
        device, dtype = self.unet.conv_in.weight.device, self.unet.conv_in.weight.dtype

        def noise() -> Tensor:
            drawn = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            return drawn.to(device, dtype)  # [B, C, h, w]

        if latents is None:
            latents = noise()
        elif tuple(latents.shape) != (len(prompts), *shape):
            raise ValueError(
                f"latents have shape {list(latents.shape)}; {len(prompts)} images of this size need "
                f"{[len(prompts), *shape]}"
            )
        denoise = classifier_free_guidance(
            self.unet, self._states(prompts, dtype), self._states(negatives, dtype), scale
        )
        state = None
        for state in ddim(
            denoise,
            latents.to(device, dtype),
            schedule,
            grid,
            eta=eta,
            noise=noise,
            project=self.codec.project,
            prediction_type=self.schedule.prediction_type,
        ):
            if on_step is not None:
                on_step(state)
        assert state is not None
        return PipelineOutput(to_pil(self.codec.decode(state.latents)), seeds)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of training, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) or size is None else size
        return (height or 64) * self.codec.factor, (width or 64) * self.codec.factor

    def _states(self, prompts: list[str], dtype: torch.dtype) -> Tensor:
        """Hidden states [B, L, D]; each different prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(prompt) for prompt in prompts])
        states = self.text_encoder(unique)
        return states[rows.to(states.device)].to(dtype)  # [B, L, D]


def _usable_device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(name)!r}, which cannot be used here ({reason}); cpu always can") from None


def _check_index(index: dict[str, Any], folder: Path) -> None:
    name = index.get("_class_name")
    if name not in (LATENT_CLASS, PIXEL_CLASS):
        raise ValueError(
            f"{folder / 'model_index.json'} describes a {name}; supported are {LATENT_CLASS} (1.x and 2.x) and "
            "the models of ldm itself"
        )
    parts = {key for key, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    unknown = parts - READ - SKIPPED
    if unknown:
        raise ValueError(
            f"{folder / 'model_index.json'} has the component {min(unknown)}, which is not supported; "
            f"supported are {', '.join(sorted(READ))}"
        )
    missing = {"unet", "text_encoder", "tokenizer", "scheduler"} - parts
    if missing:
        raise ValueError(f"{folder / 'model_index.json'} has no {min(missing)}; the model folder is incomplete")


def _prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, num_images_per_prompt: int
) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt an image."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("the prompt list is empty; give at least one text")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
    negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one a prompt"
        )
    for text in [*prompts, *negatives]:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is {text!r}; prompts are texts")
    repeat = range(num_images_per_prompt)
    return [p for p in prompts for _ in repeat], [n for n in negatives for _ in repeat]


def _seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**31 - images)
    seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
    if len(seeds) != images:
        raise ValueError(f"there are {len(seeds)} seeds for {images} images; give one int, or one an image")
    for s in seeds:
        if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63:
            raise ValueError(f"seed is {s!r}; it must be a whole number from 0 to 2**63 - 1")
    return seeds
