"""The frozen components of a pipeline: opened by name, stored in a run, in memory only while they are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ldm import hub
from ldm.codecs import Codec, LatentCodec
from ldm.config import SampleConfig
from ldm.diffusion import ScheduleConfig
from ldm.models import UNet
from ldm.pipelines import Pipeline
from ldm.text import load_text_encoder_folders


def load_first_stage(name: str) -> LatentCodec:
    """The autoencoder of a folder or hub id, or the `vae/` of a pipeline folder, frozen."""
    folder = hub.find_autoencoder(name)
    autoencoder = hub.load_autoencoder(folder)
    autoencoder.requires_grad_(False)
    return LatentCodec(autoencoder, source=folder)


@dataclass(frozen=True)
class FrozenComponents:
    """All parts of a pipeline but its UNet.

    Attributes:
        folder: written by `Pipeline.save_frozen`: text encoder, tokenizer, codec.
        index: content of `model_index.json`.
        sample: default sampling settings.
    """

    folder: Path
    index: dict[str, Any]
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
        """Write a pipeline folder around `unet`; the components are hard links to `self.folder`."""
        assert isinstance(unet, UNet)
        with hub.atomic_folder(folder) as target:
            hub.write_json(target / "model_index.json", self.index)
            hub.save_model(target / "unet", unet)
            hub.save_schedule(target / "scheduler", self.schedule, unet.config.learned_variance)
            for part in sorted(self.folder.iterdir()):
                hub.link_tree(part, target / part.name)
