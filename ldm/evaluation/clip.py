"""CLIP (arXiv:2103.00020) through open_clip: joint embeddings of images and captions."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.requirements import pip_install
from ldm.text.open_clip import PREFIX, weights_path


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model.

    Attributes:
        name: as open_clip calls it, such as "ViT-B-32".
        size: (height, width) of its input in pixels.
        mean, std: [3, 1, 1], for the normalization of images in [0, 1].
        filter: "bicubic" or "bilinear".
        dimensions: of the embeddings.
    """

    name: str
    model: Any
    tokenizer: Any
    size: tuple[int, int]
    mean: Tensor
    std: Tensor
    filter: str
    dimensions: int

    @property
    def resize(self) -> str:
        """How images are resized, such as "224 bicubic"."""
        height, width = self.size
        return f"{height if height == width else f'{height}x{width}'} {self.filter}"

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [−1, 1] → [B, D], not normalized.

        The shorter side is resized and the center cropped, as in open_clip.
        """
        images = images.to(self.mean) / 2 + 0.5
        height, width = self.size
        scale = max(height / images.shape[-2], width / images.shape[-1])
        across = [max(round(side * scale), minimum) for side, minimum in zip(images.shape[-2:], self.size, strict=True)]
        images = F.interpolate(images, across, mode=self.filter, antialias=True).clamp(0, 1)
        top, left = (across[0] - height) // 2, (across[1] - width) // 2
        images = images[..., top : top + height, left : left + width]
        return self.model.encode_image((images - self.mean) / self.std)

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """B captions → [B, D], not normalized; captions are truncated to the model's length."""
        return self.model.encode_text(self.tokenizer(list(captions)).to(self.mean.device))


def load_clip(weights: str, device: torch.device) -> Clip:
    """The model of "MODEL:TAG" (open_clip downloads the tag) or "MODEL:PATH.safetensors", in float32 on `device`.

    Raises:
        ValueError: where open_clip is missing; for an unknown model or tag; for weights that are not safetensors, or
            not of the model.
    """
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise ValueError(f"CLIP needs open_clip ({error}): {pip_install('open_clip')}") from None
    name, _, source = weights.removeprefix(PREFIX).partition(":")
    config = open_clip.get_model_config(name) if name else None
    if config is None:
        raise ValueError(
            f"open_clip knows no model {name!r}: give MODEL:TAG or MODEL:PATH.safetensors, such as "
            "ViT-B-32:laion2b_s34b_b79k; open_clip.list_models() lists all"
        )
    path = weights_path(open_clip, name, bool(config.get("quick_gelu")), source)
    # A tag has its own mean, std and filter; a path has not.
    known = source in open_clip.list_pretrained_tags_by_model(name)
    try:
        model = open_clip.create_model(name, pretrained=source if known else str(path), device=device)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from None
    model.eval().requires_grad_(False)
    return _clip(name, model, open_clip.get_tokenizer(name), device)


def _clip(name: str, model: Any, tokenizer: Any, device: torch.device) -> Clip:
    wanted = model.visual.preprocess_cfg
    if wanted["resize_mode"] != "shortest" or wanted["interpolation"] not in ("bicubic", "bilinear"):
        raise ValueError(
            f"{name} wants images resized by {wanted['resize_mode']}, {wanted['interpolation']}, which is not "
            "supported; choose a model that takes the shortest side, bicubic or bilinear, such as ViT-B-32"
        )
    size = wanted["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (torch.tensor(wanted[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        dimensions = model.encode_image(torch.zeros(1, 3, height, width, device=device)).shape[1]
    return Clip(name, model, tokenizer, (height, width), mean, std, wanted["interpolation"], dimensions)
