"""Captions to evaluate with, and the images that a model generates for them, cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data import Sample, generator
from ldm.data.cache import RowCache
from ldm.data.rng import content_hash
from ldm.pipelines import Pipeline
from ldm.text import ignore_cut_prompts

CACHE_VERSION = 1  # increase when the images of a key change
SHARD_IMAGES = 8  # an interruption loses no more


def sample_captions(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[str], list[int]]:
    """`count` captions, and the index of the sample that each belongs to.

    Samples are drawn without replacement; when all were drawn, a new round begins in another order. Round r takes the
    r-th caption of a sample, in an order drawn for it. The first n captions do not depend on `count`.

    Raises:
        ValueError: without samples, or for a count below 1.
    """
    if not samples:
        raise ValueError("there are no images to take captions from; give a split that has some (data.held_out)")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1 caption")
    captions, indices = [], []
    for position in range(count):
        turn, offset = divmod(position, len(samples))
        if offset == 0:
            order = generator(seed, "asked", turn).permutation(len(samples))
        index = int(order[offset])
        choices = samples[index].captions
        caption_order = generator(seed, "asked caption", samples[index].id).permutation(len(choices))
        captions.append(choices[int(caption_order[turn % len(choices)])])
        indices.append(index)
    return captions, indices


def generate_images(
    pipeline: Pipeline,
    captions: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int,
    first: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """One image per caption, uint8 [N, 3, H, W] on the CPU, in the size of training.

    The noise of image i depends on (seed, i) only, so that models and settings are compared on the same noise.

    Args:
        num_inference_steps, guidance_scale: None takes the defaults stored with the model.
        first: the number i of the first image.
        progress: called with the number of images finished since.

    Raises:
        ValueError: without captions, for `batch_size` below 1, and for settings out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 image")
    if not captions:
        raise ValueError("there are no captions; give at least one")
    seeds = [int(generator(seed, "drawn", i).integers(2**63 - 1)) for i in range(first, first + len(captions))]
    parts = []
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        with ignore_cut_prompts():  # the caller knows the data, and warns once
            images = pipeline(
                list(captions[batch]),
                seed=seeds[batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
        parts.append(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
        progress(len(images))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()  # [N, 3, H, W]


class SampleCache:
    """Generates only the images that are not in the cache yet: FOLDER/MODEL holds one row per image.

    Args:
        folder: of the cache.
        model: a hash of the weights: `ldm.evaluation.sweep.model_digest`.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._store = RowCache(folder / content_hash(f"{CACHE_VERSION} {model}".encode()))

    def generate(
        self,
        pipeline: Pipeline,
        captions: Sequence[str],
        *,
        seed: int,
        num_inference_steps: int,
        guidance_scale: float,
        batch_size: int,
        progress: Callable[[int], object],
    ) -> Tensor:
        """As `generate_images`: uint8 [N, 3, H, W]."""
        settings = (seed, num_inference_steps, guidance_scale, *pipeline.default_size)
        keys = [content_hash(repr((*settings, i, caption)).encode()) for i, caption in enumerate(captions)]
        missing = self._store.missing(keys)
        first = min(missing, default=len(keys))  # the first n images do not depend on their number
        progress(first)
        shard = max(1, SHARD_IMAGES // batch_size) * batch_size
        for start in range(first, len(keys), shard):
            part = slice(start, start + shard)
            images = generate_images(
                pipeline,
                captions[part],
                first=start,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                progress=progress,
            )
            self._store.add(keys[part], images, max(0, len(keys) - start - shard))
        rows = self._store.open(keys)
        return rows[range(len(keys))] if keys else torch.empty(0, dtype=torch.uint8)
