"""Pictures that are kept as they are drawn, so that an interruption loses the last few only.

FOLDER/MODEL/    MODEL names the weights that drew; a row stands under all that else decides a picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.cache import RowCache
from ldm.data.rng import content_hash
from ldm.evaluation.drawn import draw
from ldm.pipelines import Pipeline

VERSION = 1  # raised when pictures of one key come out otherwise than before
PICTURES_A_SHARD = 8  # what an interruption loses, at most


class KeptPictures:
    """Draws what is not there yet.

    Args:
        folder: where pictures are kept.
        model: a digest of the weights: `ldm.evaluation.sweep.model_digest`.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._store = RowCache(folder / content_hash(f"{VERSION} {model}".encode()))

    def draw(
        self,
        pipeline: Pipeline,
        captions: Sequence[str],
        *,
        seed: int,
        num_inference_steps: int,
        guidance_scale: float,
        at_once: int,
        progress: Callable[[int], object],
    ) -> Tensor:
        """As `ldm.evaluation.drawn.draw`: uint8 [N, 3, H, W]."""
        settings = (seed, num_inference_steps, guidance_scale, *pipeline.default_size)
        keys = [content_hash(repr((*settings, place, caption)).encode()) for place, caption in enumerate(captions)]
        missing = self._store.missing(keys)
        first = min(missing, default=len(keys))  # captions of a larger number begin with those of a smaller one
        progress(first)
        shard = max(1, PICTURES_A_SHARD // at_once) * at_once
        for start in range(first, len(keys), shard):
            part = slice(start, start + shard)
            pictures = draw(
                pipeline,
                captions[part],
                first=start,
                seed=seed,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                at_once=at_once,
                progress=progress,
            )
            self._store.add(keys[part], pictures, max(0, len(keys) - start - shard))
        rows = self._store.open(keys)
        return rows[range(len(keys))] if keys else torch.empty(0, dtype=torch.uint8)
