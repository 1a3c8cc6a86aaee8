"""Tiny real components: a Stable Diffusion folder as diffusers writes it, and our own pipelines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from ldm import models
from ldm.codecs import LatentCodec, PixelCodec
from ldm.diffusion import ScheduleConfig
from ldm.lora import adapter_loras
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder_folders

WIDTH, LENGTH = 16, 12
UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "sample_size": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}


VQ: dict[str, Any] = VAE | {
    "num_vq_embeddings": 32,
    "latents_mean": (0.1, -0.2, 0.3, 0.0),
    "latents_std": (0.5, 1.5, 1.0, 2.0),
    "scaling_factor": 1.0,
}


def clip_tokenizer() -> Any:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = LENGTH
    return tokenizer


def clip_text_model() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=514,
            max_position_embeddings=LENGTH,
            bos_token_id=512,
            eos_token_id=513,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def stable_diffusion(scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of diffusers with random weights."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**(UNET | unet)),
        vae=AutoencoderKL(**VAE),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler or DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_folder(folder: Path) -> Path:
    """`text_encoder/` and `tokenizer/` of a tiny CLIP, in a folder."""
    torch.manual_seed(1)
    clip_text_model().save_pretrained(folder / "text_encoder")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def pipeline(folder: Path, space: str = "pixel", **settings: Any) -> Pipeline:
    """One of our own pipelines, with random weights."""
    text = text_folder(folder)
    torch.manual_seed(0)
    codec: PixelCodec | LatentCodec
    if space == "pixel":
        codec = PixelCodec((-0.5, 0.0, 0.2), (0.5, 1.0, 0.7))
    elif space == "codebook":
        codec = LatentCodec(models.VQModel(models.VQConfig(**VQ)))
    else:
        codec = LatentCodec(models.AutoencoderKL(models.AutoencoderConfig(**VAE, scaling_factor=1.0)))
    channels = {"in_channels": codec.channels, "out_channels": codec.channels}
    unet = models.UNet(models.UNetConfig(**UNET, **channels))
    for parameter in unet.parameters():  # a new network predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(
        unet=unet.eval(),
        codec=codec,
        text_encoder=load_text_encoder_folders(text / "text_encoder", text / "tokenizer"),
        schedule=ScheduleConfig(),
        **({"guidance_scale": 2.0, "num_inference_steps": 4} | settings),
    )


def widened(pipeline: Pipeline) -> None:
    """Gives the network learned variances: ν is 0.3 times its prediction, and 0.2 more."""
    narrow, channels = pipeline.unet.conv_out, pipeline.codec.channels
    wide = torch.nn.Conv2d(narrow.in_channels, 2 * channels, 3, padding=1)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([narrow.weight, 0.3 * narrow.weight]))
        wide.bias.copy_(torch.cat([narrow.bias, 0.3 * narrow.bias + 0.2]))
    pipeline.unet.conv_out = wide
    pipeline.unet.config = dataclasses.replace(pipeline.unet.config, out_channels=2 * channels)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def adapter_tensors(model: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The tensors of an adapter, not copied: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, by name."""
    ends = {".lora_A.weight": "down", ".lora_B.weight": "up"}
    loras = adapter_loras(model, name).items()
    return dict(sorted((path + end, getattr(lora, part)) for path, lora in loras for end, part in ends.items()))
