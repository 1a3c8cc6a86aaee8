"""The parts of a pipeline that training leaves alone: on disk, and in memory only while they are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldm import checkpoint
from ldm.codecs import Codec, LatentCodec
from ldm.config import SampleConfig
from ldm.diffusion import ScheduleConfig
from ldm.models import UNet
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder_folders


@dataclass(frozen=True)
class FrozenComponents:
    """Everything of a pipeline but its UNet.

    Args:
        folder: what `Pipeline.save_frozen` wrote: text encoder, tokenizer, codec.
        index: content of `model_index.json`.
        sample: defaults of sampling.
    """

    folder: Path
    index: dict[str, Any]
    schedule: ScheduleConfig
    sample: SampleConfig

    def pipeline(self, unet: nn.Module) -> Pipeline:
        """Opens the parts and puts them around a network, on its device and in its dtype.

        The network itself is left as it is: an adapter in it may be of another dtype than the weights beneath.
        """
        assert isinstance(unet, UNet)
        device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        codec: Codec
        if (self.folder / "codec" / "config.json").is_file():
            codec = checkpoint.load_pixel_codec(self.folder / "codec")
        else:
            codec = LatentCodec(checkpoint.load_autoencoder(self.folder / "vae"), source=self.folder / "vae")
        text_encoder = load_text_encoder_folders(self.folder / "text_encoder", self.folder / "tokenizer")
        codec.to(device=device, dtype=dtype)
        return Pipeline(
            unet=unet,
            codec=codec,
            text_encoder=text_encoder.to(device, dtype),
            schedule=self.schedule,
            guidance_scale=self.sample.guidance_scale,
            num_inference_steps=self.sample.num_inference_steps,
            sampler=self.sample.sampler,
        )

    def save(self, folder: Path, unet: nn.Module) -> None:
        """Writes a pipeline folder around a network; the parts are hard links to `self.folder`."""
        assert isinstance(unet, UNet)
        with checkpoint.atomic_folder(folder) as target:
            checkpoint.write_json(target / "model_index.json", self.index)
            checkpoint.save_model(target / "unet", unet)
            checkpoint.save_schedule(target / "scheduler", self.schedule, unet.config.learned_variance)
            for part in sorted(self.folder.iterdir()):
                checkpoint.link_tree(part, target / part.name)
