"""From text to images: the class that a user calls."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm import adapters, checkpoint, disk
from ldm.codecs import LatentCodec, PixelCodec
from ldm.diffusion.schedule import check_precision, scheduler_class
from ldm.models import UNet, set_attention_backend
from ldm.pipelines.editing import Editing
from ldm.pipelines.memory import said_in_one_line
from ldm.text import REFERENCE, load_text_encoder_folders, reference_to
from ldm.untrusted import refuse_untrusted
from ldm.weights import check_dtype, check_weights, converted

LATENT_CLASS = "StableDiffusionPipeline"
CODEBOOK_CLASS = "CodebookDiffusionPipeline"  # latent too, but nothing that diffusers' pipelines could decode
PIXEL_CLASS = "PixelDiffusionPipeline"
CLASSES = {"AutoencoderKL": LATENT_CLASS, "VQModel": CODEBOOK_CLASS, None: PIXEL_CLASS}  # by the first stage
SKIPPED = {"safety_checker", "feature_extractor", "image_encoder"}
READ = {"unet", "vae", "codec", "text_encoder", "tokenizer", "scheduler"}
LIBRARIES = ("diffusers", "transformers", "ldm")  # of components; any other name is a module in the folder


class Pipeline(Editing):
    """A text-to-image model: UNet, codec, text encoder and schedule, in a folder, with LoRAs on top.

    Calling it draws; `interpolate`, `variations`, `invert` and `preview` are what else can be done with it.
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> Pipeline:
        """Opens a pipeline folder, ours or a Stable Diffusion 1.x/2.x one of diffusers, a hub id, or "openmoji-64".

        Args:
            device: where it runs; None takes `default_device`.
            dtype: of weights and computation; float32, or float16/bfloat16 on a GPU.
            attention: "sdpa", or "xformers" where that is installed, on CUDA.

        Raises:
            ValueError: naming the file that is missing, damaged or of another model.
        """
        place = usable_device(device)
        check_dtype(dtype)
        folder = checkpoint.find_pipeline(name)
        for part in (".", *checkpoint.PARTS):
            refuse_untrusted(folder / part)
        index = checkpoint.read_json(folder / "model_index.json")
        _check_index(index, folder)
        unet = checkpoint.load_model(folder / "unet", "UNet2DConditionModel", dtype)
        assert isinstance(unet, UNet)
        codec: PixelCodec | LatentCodec
        if "codec" in index:
            codec = checkpoint.load_pixel_codec(folder / "codec")
        else:
            codec = LatentCodec(checkpoint.load_autoencoder(folder / "vae", dtype), source=folder / "vae")
        schedule = checkpoint.load_schedule(folder / "scheduler", str(index["scheduler"][-1]))
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
            sampler=defaults.get("sampler", "ddim"),
        )
        pipeline.to(place, dtype)
        set_attention_backend(pipeline.unet, attention)
        return pipeline

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Pipeline:
        """Moves every network to `device` (and `dtype`); returns the pipeline.

        Raises:
            ValueError: for a device that is not there or holds no numbers, a dtype that networks cannot have, and
                where the memory of the device is too small.
        """
        if device is not None:
            device = usable_device(device)
        if dtype is not None:
            check_dtype(dtype)
        with said_in_one_line(f"the model on {device}", "take a dtype of half the size, or another device"):
            self._move(device, dtype)
        return self

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.unet.to(device=device, dtype=dtype)
        self.codec.to(device=device, dtype=dtype)
        self.text_encoder.to(device, dtype)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        shard_bytes: int | None = None,
        text_encoder: Literal["files", "reference"] = "files",
    ) -> None:
        """Writes the pipeline folder, atomically; a latent one opens in diffusers' StableDiffusionPipeline.

        Where the first stage has a codebook, that pipeline cannot decode; UNet and VQModel open one by one.

        Args:
            folder: where. An older model there is replaced when the new one is complete: the files that the format
                names (see `checkpoint.atomic_folder`). Whatever else lies there stays, such as README.md and .git of a
                clone. Where the folder is a link, what it points to is written.
            dtype: of the stored weights of the UNet.
            shard_bytes: they are split into files with at most so many bytes of weights; None writes one.
            text_encoder: "reference" writes the name of an encoder that is part of a package in place of its files,
                for a small folder; diffusers cannot open that.

        Raises:
            ValueError: for a folder that holds other things and no model, a file, a link to nothing, a text encoder
                that no package holds where it is to be named, for weights of the UNet that are not finite in `dtype`,
                for half precision where they predict the posterior mean, and while LoRAs are loaded that are not
                merged.
        """
        if text_encoder not in ("files", "reference"):
            raise ValueError(f"text_encoder is {text_encoder!r}; it is 'files' or 'reference'")
        loaded = {
            name for part in self._adapted for name in adapters.adapter_names(part) if not adapters.is_merged(part)
        }
        if loaded:
            raise ValueError(
                f"the LoRA {min(loaded)!r} is loaded; merge_lora() to save the model with it, unload_lora() to save it "
                "without"
            )
        check_dtype(dtype)
        check_precision(self.schedule.prediction_type, str(dtype).removeprefix("torch."))
        weights = self.unet.state_dict()
        check_weights(weights, "unet")
        converted(weights, dtype, "unet")
        codec = _unwrapped(self.codec)
        if isinstance(codec, LatentCodec):
            check_weights(codec.autoencoder.state_dict(), "the autoencoder")
        reference = reference_to(self.text_encoder) if text_encoder == "reference" else None
        place = disk.folder_to_write(folder)
        with checkpoint.atomic_folder(place) as target:
            checkpoint.write_json(target / "model_index.json", self.index())
            checkpoint.save_model(target / "unet", self.unet, dtype, shard_bytes)
            checkpoint.save_schedule(target / "scheduler", self.schedule, self.unet.config.learned_variance)
            if reference is None:
                self.save_frozen(target)
            else:
                (target / "text_encoder").mkdir()
                checkpoint.write_json(target / "text_encoder" / REFERENCE, reference)
                self._save_codec(target)
        if reference is None:
            self.text_encoder.is_now_in(place, changed=adapters.is_merged(self.text_encoder.model))

    def save_frozen(self, folder: Path) -> None:
        """Writes the parts that training of the UNet leaves alone: text encoder, tokenizer, codec."""
        self.text_encoder.save(folder, changed=adapters.is_merged(self.text_encoder.model))
        self._save_codec(folder)

    def _save_codec(self, folder: Path) -> None:
        codec = _unwrapped(self.codec)
        if isinstance(codec, LatentCodec):
            if codec.source is not None and checkpoint.holds(codec.source, codec.autoencoder):
                checkpoint.copy_model(codec.source, folder / "vae")
            else:
                checkpoint.save_model(folder / "vae", codec.autoencoder)
        elif isinstance(codec, PixelCodec):
            checkpoint.save_pixel_codec(folder / "codec", codec)

    @property
    def _adapted(self) -> tuple[nn.Module, nn.Module]:
        """The networks that a LoRA may change."""
        return _unwrapped(self.unet), _unwrapped(self.text_encoder.model)

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
        codec = _unwrapped(self.codec)
        stage = codec.autoencoder.config.diffusers_class if isinstance(codec, LatentCodec) else None
        index: dict[str, Any] = {"_class_name": CLASSES[stage]}
        # Keys with an underscore are ours; diffusers leaves them alone.
        index["_ldm"] = {
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "sampler": self.sampler,
        }
        index |= {name: list(classes) for name, classes in self.text_encoder.library_classes.items()}
        scheduler = scheduler_class(self.unet.config.learned_variance)
        index |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", scheduler]}
        if stage is None:
            return index | {"codec": ["ldm", "PixelCodec"]}
        index |= {"vae": ["diffusers", stage], "requires_safety_checker": False}
        return index | {name: [None, None] for name in sorted(SKIPPED)}


def _unwrapped(module: Any) -> Any:
    """The network that `torch.compile` has wrapped, or the network itself."""
    return getattr(module, "_orig_mod", module)


def default_device() -> torch.device:
    """The accelerator of this machine (CUDA, Apple's MPS, XPU, NPU, …), as accelerate takes it, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type)


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, None for `default_device`; ValueError if it cannot be used."""
    if name is None:
        return default_device()
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device "meta" gives no numbers back
        return probe.device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # the second without CUDA in torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device is {str(name)!r}, which cannot be used here ({reason}); cpu always can") from None


def _check_index(index: dict[str, Any], folder: Path) -> None:
    name = index.get("_class_name")
    if name not in CLASSES.values():
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
    for part in sorted(parts & READ):
        if index[part][0] not in LIBRARIES:
            raise ValueError(
                f"{folder / 'model_index.json'} takes the {part} from {index[part][0]!r}, code that comes with the "
                f"model, which is never run here; components are of {', '.join(LIBRARIES)}"
            )
    missing = {"unet", "text_encoder", "tokenizer", "scheduler"} - parts
    if missing:
        raise ValueError(f"{folder / 'model_index.json'} has no {min(missing)}; the model folder is incomplete")
