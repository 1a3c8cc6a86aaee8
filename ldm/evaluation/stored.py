"""Features of the images of a data set, computed once and kept on disk.

CACHE/features/KEY/    KEY covers the network and how images are resized for it

A row stands under the image's bytes and the transform, so what has changed, and nothing else, is computed again; an
interruption loses the images since the last shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldm.data import CaptionedImages, to_signed
from ldm.data.cache import RowCache
from ldm.data.images import TRANSFORM_VERSION
from ldm.data.rng import content_hash
from ldm.evaluation.features import FeatureSpace

VERSION = 1  # raised when features of one key come out otherwise than before
IMAGES_AT_ONCE = 32
SHARD_ROWS = 256  # what an interruption loses, at most


def stored_features(
    images: CaptionedImages,
    space: FeatureSpace,
    *,
    progress: Callable[[int], object] = lambda done: None,
    print: Callable[[str], None] = print,
) -> Tensor:
    """Features [N, D] float64 of the middle of every image, unflipped, in the order of `images`.

    Args:
        images: kept under `images.config.cache_folder`.
        progress: is told how many images are done since, those that were kept included.
        print: is told of damaged files.

    Raises:
        ValueError: if an image has become unreadable or the cache cannot be written.
    """
    if space.name == "clip":  # its label does not say which file its weights are from
        found = torch.empty(len(images), space.dimensions, dtype=torch.float64)
        for chunk in images.chunks(SHARD_ROWS):
            found[chunk] = space.of(_batches(images, chunk, progress))
        return found
    store = RowCache(
        images.config.cache_folder / "features" / content_hash(f"{VERSION} {space.label()}".encode()), print
    )
    keys = [_key(images, index) for index in range(len(images))]
    missing = set(store.missing(keys))
    progress(len(images) - len(missing))
    chunks = [[i for i in chunk if i in missing] for chunk in images.chunks(SHARD_ROWS)]
    left = len(missing)
    for chunk in filter(None, chunks):
        rows = space.of(_batches(images, chunk, progress))  # [n, D]
        left -= len(chunk)
        store.add([keys[i] for i in chunk], rows.to(torch.float32), left)
    return store.open(keys)[range(len(keys))].to(torch.float64)


def _batches(images: CaptionedImages, indices: Sequence[int], progress: Callable[[int], object]) -> Iterator[Tensor]:
    """Images of one shape, [B, 3, H, W] in [−1, 1], a few at once."""
    for start in range(0, len(indices), IMAGES_AT_ONCE):
        part = indices[start : start + IMAGES_AT_ONCE]
        yield to_signed(torch.stack([images.image_at(index) for index in part]))
        progress(len(part))


def _key(images: CaptionedImages, index: int) -> str:
    sample, config = images.samples[index], images.config
    digest = sample.digest or content_hash(sample.read())
    transform = (TRANSFORM_VERSION, config.background_rgb, images.shape_of(index), digest)
    return content_hash(repr(transform).encode())
