"""What the frozen networks say about the data, encoded once and kept in memory where it fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.codecs import Codec
from ldm.data import Batch, CaptionedImages, to_signed
from ldm.text import TextEncoder

CACHE_BYTES = 4 * 2**30
IMAGES_AT_ONCE = 32


class EncodedImages:
    """Posterior moments of the images and hidden states of the captions.

    Only what is deterministic is kept: the posterior is drawn anew, captions are chosen and dropped at batch
    time. Random crops, or more data than `cache_bytes`, are encoded batch by batch instead, with the same
    results.

    Args:
        images: the data set; told to stop loading images once their moments are kept.
        device: where the codec and the text encoder run.
    """

    def __init__(
        self,
        images: CaptionedImages,
        codec: Codec,
        text_encoder: TextEncoder,
        *,
        device: torch.device,
        cache_bytes: int = CACHE_BYTES,
        show_progress: bool = True,
    ) -> None:
        self.images = images
        self.codec = codec
        self.text_encoder = text_encoder
        self.device = device
        self.show_progress = show_progress
        self.null = text_encoder([""]).to(device, torch.float32)  # [1, L, D]
        captions = sorted({caption for sample in images.samples for caption in sample.captions})
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._states = self._encode_captions(captions, cache_bytes)
        self._moments = self._encode_images(images, cache_bytes)
        images.with_images = self._moments is None

    @torch.no_grad()
    def latents(self, batch: Batch, posterior: Tensor | None) -> Tensor:
        """Latents [B, C, h, w] float32, drawn with `posterior` [B, C, h, w]; None takes the mean."""
        if self._moments is None:
            assert batch.images is not None
            moments = self.codec.moments(to_signed(batch.images).to(self.device))
        else:
            flip = batch.flipped.to(torch.int64) if self._moments.shape[1] > 1 else torch.zeros_like(batch.indices)
            moments = self._moments[batch.indices, flip].to(self.device)  # [B, M, h, w]
        return self.codec.draw(moments, posterior)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Hidden states [B, L, D] float32."""
        if self._states is None:
            return self.text_encoder(captions).to(self.device, torch.float32)
        return self._states[[self._rows[caption] for caption in captions]].to(self.device)

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation [C] of the latents over the data, from up to 1,024 images; None if nothing is kept."""
        if self._moments is None:
            return None
        moments = self._moments[:: max(1, len(self._moments) // 1024), 0]  # [N, M, h, w]
        latents = self.codec.draw(moments.to(self.device))
        return latents.mean(dim=(0, 2, 3)).cpu(), latents.std(dim=(0, 2, 3)).cpu()

    def _encode_captions(self, captions: list[str], cache_bytes: int) -> Tensor | None:
        if len(captions) * self.null.numel() * 4 > cache_bytes:
            return None
        chunks = self._chunks(captions, "encoding captions")
        return torch.cat([self.text_encoder(chunk).to("cpu", torch.float32) for chunk in chunks])  # [N, L, D]

    @torch.no_grad()
    def _encode_images(self, images: CaptionedImages, cache_bytes: int) -> Tensor | None:
        if images.config.crop == "random":
            return None
        flips = (False, True) if images.config.flip else (False,)

        def encode(indices: Sequence[int], flipped: bool) -> Tensor:
            pixels = torch.stack([images.image_at(index, flipped) for index in indices])  # [B, 3, R, R]
            return self.codec.moments(to_signed(pixels).to(self.device)).cpu()

        if encode([0], False).nbytes * len(flips) * len(images) > cache_bytes:
            return None
        chunks = self._chunks(range(len(images)), "encoding images")
        parts = [torch.stack([encode(chunk, flipped) for flipped in flips], dim=1) for chunk in chunks]
        return torch.cat(parts)  # [N, flips, M, h, w]

    def _chunks(self, things: Sequence, what: str) -> Sequence:  # type: ignore[type-arg]
        starts = range(0, len(things), IMAGES_AT_ONCE)
        bar = tqdm(starts, desc=what, leave=False, disable=not self.show_progress or len(things) < 500)
        return [things[start : start + IMAGES_AT_ONCE] for start in bar]
