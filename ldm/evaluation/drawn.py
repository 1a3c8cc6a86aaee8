"""Which captions are asked for, and the pictures that a model draws for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.data import Sample, generator
from ldm.pipelines import Pipeline
from ldm.text import ignore_cut_prompts


def captions_of(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[str], list[int]]:
    """`count` captions of the samples of a split, and the index of the sample that each belongs to.

    Images are drawn without repetition; when all have been asked for, a new round begins in another order. Round r
    takes the r-th of an image's captions, in an order drawn for that image, so that none comes twice before all have
    come. A function of (seed, sample ids, captions): the first n of a larger count are those of n.

    Raises:
        ValueError: if there are no samples, or for a count below 1.
    """
    if not samples:
        raise ValueError("there are no images to take captions of; give a split that has some (data.held_out)")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1 caption")
    captions, own = [], []
    for place in range(count):
        turn, offset = divmod(place, len(samples))
        if offset == 0:
            order = generator(seed, "asked", turn).permutation(len(samples))
        index = int(order[offset])
        known = samples[index].captions
        asked = generator(seed, "asked caption", samples[index].id).permutation(len(known))
        captions.append(known[int(asked[turn % len(known)])])
        own.append(index)
    return captions, own


def draw(
    pipeline: Pipeline,
    captions: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    at_once: int,
    first: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """One picture a caption, uint8 [N, 3, H, W] on the CPU, in the size of training.

    The noise of picture i is a function of (seed, i): neither of its caption, so that two models or two settings draw
    from the same noise, nor of `at_once` (batched arithmetic may still change a grey level).

    Args:
        num_inference_steps, guidance_scale: None takes the defaults that are stored with the model.
        at_once: how many go through the network together.
        first: the number of the first of these pictures, where those before it are drawn already.
        progress: is told how many pictures were finished since.

    Raises:
        ValueError: for no captions, `at_once` below 1, and settings out of range.
    """
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; it must be at least 1 picture")
    if not captions:
        raise ValueError("there are no captions to draw; give at least one")
    seeds = [int(generator(seed, "drawn", place).integers(2**63 - 1)) for place in range(first, first + len(captions))]
    parts = []
    for start in range(0, len(captions), at_once):
        chunk = slice(start, start + at_once)
        with ignore_cut_prompts():  # of captions, by those who know the data
            drawn = pipeline(
                list(captions[chunk]),
                seed=seeds[chunk],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
        parts.append(torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])))
        if progress is not None:
            progress(len(drawn))
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()  # [N, 3, H, W]
