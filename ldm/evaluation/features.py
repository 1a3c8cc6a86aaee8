"""Image features for distances between sets of images, and their cache on disk.

A distance depends on the network and on how images are resized for it: the label of a `FeatureSpace` says both.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import disk
from ldm.data import CaptionedImages, to_signed, to_uint8
from ldm.data.cache import RowCache
from ldm.data.images import TRANSFORM_VERSION
from ldm.data.rng import content_hash
from ldm.environment import pip_install
from ldm.models.efficientnet import DIMENSIONS as EFFICIENTNET_DIMENSIONS
from ldm.models.efficientnet import EfficientNetLite0
from ldm.text.loading import find_open_clip, weights_path

PIXEL_DIMENSIONS = 64
GRID, GRADIENT_GRID = 8, 4
EFFICIENTNET_SIZE = 128
"""Chosen among 64, 128 and 224 by which damages to images it shows, and in what time: docs/evaluation.md."""
EXTRACT_BATCH = 16  # fastest on a CPU (11 ms an image at 128 pixels; 17 with 32), and memory stays small at 299

# Of weights-inception-2015-12-05-6726825d.pth, the network of arXiv:1706.08500 converted from TensorFlow.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_DIMENSIONS, INCEPTION_SIZE = 2048, 299

CACHE_VERSION = 1  # increase when the features of a key change
READ_BATCH = 32
SHARD_ROWS = 256  # an interruption loses no more


@dataclass(frozen=True)
class FeatureSpace:
    """A function from images [B, 3, H, W] in [−1, 1], on any device, to features [B, dimensions].

    `resize` are side and filter of its resizing, such as "128 bicubic", or "none"; `title` the name in print.
    """

    name: str
    dimensions: int
    resize: str
    extract: Callable[[Tensor], Tensor]
    title: str = ""

    @property
    def is_fid(self) -> bool:
        """Whether the Fréchet distance in this space is the FID of arXiv:1706.08500."""
        return self.name == "inception" and self.dimensions == INCEPTION_DIMENSIONS

    def label(self) -> str:
        """Such as "EfficientNet-Lite0 features (1280, images resized to 128 bicubic)"."""
        resized = "not resized" if self.resize == "none" else f"resized to {self.resize}"
        return f"{self.title or self.name} features ({self.dimensions}, images {resized})"

    def compute(self, images: Iterable[Tensor]) -> Tensor:
        """Batches of images [B, 3, H, W] in [−1, 1], of any sizes → features [N, D], float64 on the CPU.

        ValueError without images, for other shapes, and for values that are not floats in [−1, 1].
        """
        parts: list[Tensor] = []
        with torch.no_grad():
            for batch in images:
                if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
                    raise ValueError(f"images are {batch.dtype} {list(batch.shape)}; they must be floats [B, 3, H, W]")
                largest = float(batch.abs().max()) if batch.numel() else 0.0
                if not largest <= 1 + 1e-3:  # also for nan
                    raise ValueError(f"images reach {largest:g}; they must be finite and in [-1, 1]")
                parts += [self.extract(chunk).to("cpu", torch.float64) for chunk in batch.split(EXTRACT_BATCH)]
        if not parts:
            raise ValueError("there are no images to compute features of; give at least one batch")
        return torch.cat(parts)


def feature_space(
    name: str = "efficientnet", *, device: torch.device, weights: Path | str | None = None
) -> FeatureSpace:
    """One of four spaces. Only weights of CLIP may be downloaded, if a tag of open_clip names them.

    Args:
        name: "efficientnet": the 1280 pooled features of EfficientNet-Lite0, whose weights come with a package, on
            images resized to 128 pixels (bicubic, antialiased). "pixel": `pixel_features`, without a network.
            "inception": the 2048 pooled features of FID's network, on 8-bit images resized as it resizes them; only
            here is the Fréchet distance FID. "clip": image embeddings of an open_clip model, not normalized (with
            length 1 the kernel of KID would be almost linear).
        weights: for "inception" the path of its weights; for "clip" MODEL:TAG or MODEL:PATH.safetensors.

    Raises:
        ValueError: for another name, weights that are missing, not needed or unknown, and missing packages.
    """
    known = ("efficientnet", "pixel", "inception", "clip")
    if name not in known:
        raise ValueError(f'there are no features "{name}"; choose one of {", ".join(known)}')
    if weights is not None and name in ("efficientnet", "pixel"):
        raise ValueError(f'features "{name}" take no weights, but {weights} is given; leave it out')
    source = "" if weights is None else str(weights)
    if name == "pixel":  # on the CPU, since some devices have no float64; the work is small
        return FeatureSpace("pixel", PIXEL_DIMENSIONS, "none", lambda images: pixel_features(images.cpu()))
    if name == "clip":
        clip = load_clip(source, device)
        return FeatureSpace("clip", clip.dimensions, clip.resize, clip.embed_images, f"CLIP {clip.name}")
    if name == "inception":
        inception, resize = load_inception(source).to(device), f"{INCEPTION_SIZE} bilinear as TensorFlow 1"
        return FeatureSpace(
            "inception",
            INCEPTION_DIMENSIONS,
            resize,
            lambda images: inception(to_uint8(images.to(device, torch.float32))),
            "Inception v3",
        )
    network = EfficientNetLite0().to(device)
    return FeatureSpace(
        "efficientnet",
        EFFICIENTNET_DIMENSIONS,
        f"{EFFICIENTNET_SIZE} bicubic",
        lambda images: network(resized(images.to(device, torch.float32), EFFICIENTNET_SIZE)),
        "EfficientNet-Lite0",
    )


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] → [B, 3, side, side], bicubic and antialiased, clamped to the range."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def pixel_features(images: Tensor) -> Tensor:
    """Colors and edges without a network, projected to 64 random directions: [B, 1 or 3, H, W] → [B, 64].

    Colors are averaged to 8×8 cells, absolute differences of gray along each axis to 4×4; orthonormal directions reduce
    these 224 numbers, so that a few hundred images suffice for a covariance. They show noise, blur, wrong colors and
    missing variety, but not content. ValueError for images below 8×8.
    """
    if min(images.shape[-2:]) < GRID:
        raise ValueError(f"images are {images.shape[-2]}x{images.shape[-1]}; pixel features need {GRID}x{GRID} or more")
    images = images.to(torch.float64).expand(-1, 3, -1, -1)
    gray = images.mean(dim=1, keepdim=True)  # [B, 1, H, W]
    parts = [F.adaptive_avg_pool2d(images, GRID)]
    parts += [F.adaptive_avg_pool2d(gray.diff(dim=axis).abs(), GRADIENT_GRID) for axis in (-2, -1)]
    described = torch.cat([part.flatten(1) for part in parts], dim=1)  # [B, 224]
    return described @ random_directions(described.shape[1], PIXEL_DIMENSIONS)


def random_directions(dimensions: int, count: int) -> Tensor:
    """[dimensions, count] orthonormal columns, the same at every call; float64."""
    normal = torch.randn(dimensions, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(normal).Q


def load_inception(weights: str) -> nn.Module:
    """The frozen network of FID, from torch-fidelity: uint8 images [B, 3, H, W] → 2048 pooled features.

    It resizes to 299 as FID does, bilinear without antialiasing. Its weights are a path of `INCEPTION_FILE`; other
    files are refused, since torch-fidelity unpickles them. ValueError for these, and missing packages.
    """
    if not weights:
        what = "their weights, a file of 91 MiB that is not downloaded here"
        raise ValueError(f"Inception features need {what}: fetch {INCEPTION_URL} and give its path")
    path = disk.expand_user(weights)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); give the path of {INCEPTION_FILE}") from None
    if digest != INCEPTION_SHA256:
        why = f"SHA-256 {digest}, not {INCEPTION_SHA256}: it is damaged, or not the network of FID"
        raise ValueError(f"{path} has {why}; fetch {INCEPTION_URL}")
    try:
        importlib.import_module("torch_fidelity")  # torchmetrics misses it only when it builds the network
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        how = pip_install("torch_fidelity", "torchmetrics")
        raise ValueError(f"Inception features need torch-fidelity ({error}): {how}") from None
    name = str(INCEPTION_DIMENSIONS)
    network: nn.Module = NoTrainInceptionV3("inception-v3-compat", [name], str(path), antialias=False)
    return network.requires_grad_(False)


# ---- the cache: CACHE/features/KEY, where KEY covers network and resize; a row's key covers its image and transform


def cached_features(
    images: CaptionedImages,
    space: FeatureSpace,
    *,
    progress: Callable[[int], object] = lambda done: None,
    log: Callable[[str], None] = print,
) -> Tensor:
    """Features [N, D] float64 of every image, center-cropped and not flipped, cached in `images.config.cache_folder`.

    `progress` is called with the number of images done since, `log` is told of damaged files. ValueError for an image
    that has become unreadable, or a cache that cannot be written.
    """
    if space.name == "clip":  # its label does not identify its weights
        found = torch.empty(len(images), space.dimensions, dtype=torch.float64)
        for chunk in images.chunks(SHARD_ROWS):
            found[chunk] = space.compute(_batches(images, chunk, progress))
        return found
    key = content_hash(f"{CACHE_VERSION} {space.label()}".encode())
    store, keys = RowCache(images.config.cache_folder / "features" / key, log), []
    for index, sample in enumerate(images.samples):
        transform = (TRANSFORM_VERSION, images.config.background_rgb, images.shape_of(index))
        digest = sample.digest or content_hash(sample.read())
        keys.append(content_hash(repr((*transform, digest)).encode()))
    missing = set(store.missing(keys))
    left = len(missing)
    progress(len(images) - left)
    for chunk in images.chunks(SHARD_ROWS):
        if chunk := [i for i in chunk if i in missing]:
            rows = space.compute(_batches(images, chunk, progress))  # [n, D]
            left -= len(chunk)
            store.add([keys[i] for i in chunk], rows.to(torch.float32), left)
    return store.open(keys)[range(len(keys))].to(torch.float64)


def _batches(images: CaptionedImages, indices: Sequence[int], progress: Callable[[int], object]) -> Iterator[Tensor]:
    """Images of one shape, [B, 3, H, W] in [−1, 1]."""
    for start in range(0, len(indices), READ_BATCH):
        part = indices[start : start + READ_BATCH]
        yield to_signed(torch.stack([images.image_at(index) for index in part]))
        progress(len(part))


# ---- CLIP (arXiv:2103.00020) through open_clip: joint embeddings of images and captions


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model of open_clip, and the size (height, width), mean, std [3, 1, 1] and filter of its input."""

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
        """[B, 3, H, W] in [−1, 1] → [B, D], not normalized; resized and center-cropped as in open_clip."""
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

    ValueError without open_clip, and for an unknown model or tag, or weights that are not safetensors of that model.
    """
    open_clip, name, config, source = find_open_clip(weights)
    path = weights_path(open_clip, name, config, source)
    # A tag has its own mean, std and filter; a path has not.
    known = source in open_clip.list_pretrained_tags_by_model(name)
    try:
        model = open_clip.create_model(name, pretrained=source if known else str(path), device=device)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[0]}") from None
    model.eval().requires_grad_(False)
    wanted = model.visual.preprocess_cfg
    if wanted["resize_mode"] != "shortest" or wanted["interpolation"] not in ("bicubic", "bilinear"):
        how = f"{wanted['resize_mode']}, {wanted['interpolation']}"
        raise ValueError(f"{name} resizes images by {how}; choose one that takes the shortest side, bicubic/bilinear")
    size = wanted["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (torch.tensor(wanted[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        dimensions = model.encode_image(torch.zeros(1, 3, height, width, device=device)).shape[1]
    tokenizer, kind = open_clip.get_tokenizer(name), wanted["interpolation"]
    return Clip(name, model, tokenizer, (height, width), mean, std, kind, dimensions)
