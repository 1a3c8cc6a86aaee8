"""Latents and text states of the data, encoded once and cached on disk.

CACHE/moments/KEY/    posterior moments of images; KEY covers the encoder of the first stage
CACHE/captions/KEY/   hidden states of captions; KEY covers the text encoder

A row of moments is stored under the image's bytes and transform, a row of states under the caption, so that only what
changed is encoded again. Random choices (posterior samples, flips, caption dropout) are made when a batch is read.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.codecs import Codec
from ldm.data import Batch, CaptionedImages, Sample, ignore_signals, to_signed
from ldm.data.cache import CachedRows, RowCache
from ldm.data.images import TRANSFORM_VERSION, resize_and_crop
from ldm.data.rng import content_hash
from ldm.environment import usable_cores
from ldm.text import TextEncoder

# Increase it when rows of the same key change.
VERSION = 1
IMAGE_BATCH_SIZE = 32
CAPTION_BATCH_SIZE = 16
# Batches of larger images have as many pixels as IMAGE_BATCH_SIZE images of 128 by 128.
MAX_BATCH_PIXELS = 32 * 128**2
# A killed process loses one shard at most.
SHARD_ROWS, SHARD_BYTES = 256, 64 * 2**20
STATISTICS_IMAGES = 1024
# Samples that are renewed every few epochs: a batch has few of them, so they are encoded in smaller batches. The memory
# limit holds for moments and for states each.
RENEWED_BATCH_SIZE, MEMORY_BYTES = 8, 2**30
# If all samples are renewed, a GPU is fed larger batches. Up to this size, rows stay on the GPU: copying a batch takes
# as long as a step of a small network.
GPU_BATCH_SIZE, GPU_BYTES = 64, 2**29

T = TypeVar("T")


class LatentCache:
    """Posterior moments of the images and hidden states of the captions, read from disk batch by batch.

    Pixels, and latents of random crops, are encoded batch by batch instead; only then the codec is held. Otherwise the
    caller may free both networks.

    The constructor encodes what is missing in the cache; `images` are not loaded if their moments are cached. `null`
    are the states of the empty caption, [1, L, D] float32; `new_images` and `new_captions` count newly encoded ones.
    """

    def __init__(self, images: CaptionedImages, encoders: CachedEncoders) -> None:
        started = time.perf_counter()
        self.images = images
        self.device = encoders.device
        # Renewed samples are encoded when they are read. Of composed images only the parts are permanent.
        self._memory = MemoryCache(images, encoders) if images.renewed_fraction > 0 else None
        permanent = tuple(sample for sample in images.samples if sample.renew is None)
        captions = sorted({"", *(caption for sample in permanent for caption in sample.captions)})
        self._row_of = {caption: row for row, caption in enumerate(captions)}
        self._states, self.new_captions = encoders.encode_captions(captions)
        self._moments, self.new_images = encoders.encode_images(images) if permanent else (None, 0)
        self._sample = encoders.codec.latents_sampler()
        self._codec = encoders.codec if self._moments is None and permanent else None
        self._channels, self._factor = encoders.codec.channels, encoders.codec.factor
        self.null = self.text([""])
        images.with_images = self._codec is not None
        counts = "" if self._moments is None else f"{self.new_images} of {len(images)} images and "
        encoders.print(
            f"encoded {counts}{self.new_captions} of {len(captions)} captions (with the empty one) in "
            f"{time.perf_counter() - started:.1f} s; all are cached in {encoders.cache_folder}"
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent shape (C, h, w) of images of `height` × `width` pixels."""
        assert height % self._factor == width % self._factor == 0, (height, width)
        return self._channels, height // self._factor, width // self._factor

    @torch.no_grad()
    def latents(self, batch: Batch, posterior: Tensor | None) -> Tensor:
        """Latents [B, C, h, w] float32, sampled with the noise `posterior` [B, C, h, w]; None takes the mean."""
        renewed = batch.renewed.nonzero().flatten()  # [R]
        rows = batch.indices + len(self.images) * batch.flipped
        if self._codec is not None:
            assert batch.images is not None
            moments = self._codec.moments(to_signed(batch.images).to(self.device))
        elif self._memory is None or not len(renewed):
            assert self._moments is not None
            moments = self._moments[rows]
        else:  # permanent samples from disk, renewed ones from memory
            moments = self._memory.moments(batch, renewed.tolist())  # [R, M, h, w]
            if len(renewed) < len(batch.ids):
                assert self._moments is not None
                both = moments.new_empty(len(batch.ids), *moments.shape[1:])
                both[batch.renewed] = moments
                both[~batch.renewed] = self._moments[rows[~batch.renewed]].to(moments.device)
                moments = both
        return self._sample(moments.to(self.device), posterior)  # of [B, M, h, w] float32

    def text(self, captions: Sequence[str]) -> Tensor:
        """Hidden states [B, L, D] float32 of captions of the data, or the empty one."""
        rows = [self._row_of.get(caption, -1) for caption in captions]
        renewed = [i for i, row in enumerate(rows) if row < 0]
        if self._memory is None or not renewed:
            assert not renewed
            return self._states[rows].to(self.device)
        found = self._memory.states([captions[i] for i in renewed])  # [R, L, D]
        states = found.new_empty(len(captions), *found.shape[1:])
        states[renewed] = found
        permanent = [i for i, row in enumerate(rows) if row >= 0]
        if permanent:
            states[permanent] = self._states[[rows[i] for i in permanent]].to(found.device)
        return states.to(self.device)

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std [C] of the latents, from about 1,024 images; None if nothing is cached."""
        if self._moments is None:
            return None
        chosen = range(0, len(self.images), max(1, len(self.images) // STATISTICS_IMAGES))
        shapes = _shapes(self.images)
        values = []
        for group in _group_by(chosen, lambda index: shapes[index]).values():
            for part in _chunks(group, IMAGE_BATCH_SIZE):
                latents = self._sample(self._moments[part].to(self.device), None)  # [b, C, h, w]
                values.append(latents.transpose(0, 1).flatten(1).cpu())  # [C, b·h·w]
        joined = torch.cat(values, dim=1)
        return joined.mean(dim=1), joined.std(dim=1)


class MemoryCache:
    """Moments and states of samples that are renewed every `data.renew_every` epochs, in memory, half precision.

    They are encoded in the first step that reads them; those beyond MEMORY_BYTES in every step. Rows depend on image
    and caption alone, so a resumed run, which starts with an empty memory, continues like an unbroken one. Images that
    no worker has loaded are loaded here.
    """

    def __init__(self, images: CaptionedImages, encoders: CachedEncoders) -> None:
        self._images, self._encoders = images, encoders
        self._moments: dict[int, tuple[int, Tensor]] = {}  # index → (epoch // renew_every, [M, h, w])
        self._states: dict[str, Tensor] = {}  # the newest last
        fraction, codec, text = images.renewed_fraction, encoders.codec, encoders.text_encoder
        # Mean and log-variance of two bytes each, of the largest shape.
        row_bytes = max(4 * math.prod(codec.latent_shape(*size)) for size in images.buckets.sizes)
        self._capacity = min(len(images), int(MEMORY_BYTES / (row_bytes * fraction)))
        # In a later epoch a sample may come to a process that has not seen it yet.
        images.renewed_cached = self._capacity if encoders.world == 1 else 0
        # A caption may come again with another image, so the oldest are dropped, not those of the last block.
        in_use = math.ceil(1.25 * fraction * len(images))
        state_bytes = 2 * text.max_length * text.hidden_size
        self._max_states = min(in_use, MEMORY_BYTES // state_bytes)
        total_bytes = fraction * self._capacity * row_bytes + self._max_states * state_bytes
        self._device = encoders.device if total_bytes <= GPU_BYTES else torch.device("cpu")
        self._batch_size = GPU_BATCH_SIZE if encoders.device.type != "cpu" and fraction == 1 else RENEWED_BATCH_SIZE

    @torch.no_grad()
    def moments(self, batch: Batch, positions: Sequence[int]) -> Tensor:
        """[R, M, h, w] float32 of the R items at these positions of a batch, at least one."""
        every, indices = self._images.config.renew_every, batch.indices.tolist()
        keys = [(indices[position], batch.epochs[position] // every) for position in positions]
        rows: dict[tuple[int, int], Tensor] = {}
        pixels: dict[tuple[int, int], Tensor] = {}
        loaded = {position: i for i, position in enumerate(batch.loaded.nonzero().flatten().tolist())}
        for position, (index, block) in zip(positions, keys, strict=True):
            cached = self._moments.get(index)
            if cached is not None and cached[0] == block:
                rows[index, block] = cached[1]
            elif position in loaded:
                assert batch.images is not None
                pixels[index, block] = batch.images[loaded[position]]
            elif (index, block) not in pixels:
                sample = self._images.sample_at(batch.epochs[position], index)
                pixels[index, block] = resize_and_crop(sample.load(), batch.size)
        size = _batch_size(*batch.size, self._batch_size)
        with _deterministic_fp32(self._encoders.device):
            for part in _chunks(list(pixels), size):
                encoded = self._encoders.moments_of(torch.stack([pixels[key] for key in part]), size, self._device)
                # A view would hold all rows of its batch in memory.
                rows |= zip(part, (row.clone() for row in encoded.to(torch.float16)), strict=True)
        # A sample that is permanent now may have been composed before.
        for index in indices:
            self._moments.pop(index, None)
        self._moments |= {index: (block, rows[index, block]) for index, block in keys if index < self._capacity}
        return torch.stack([rows[key] for key in keys]).float()

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> Tensor:
        """[B, L, D] float32."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._states]
        with _deterministic_fp32(self._encoders.device):
            for part in _chunks(missing, self._batch_size):
                rows = self._encoders.states_of(part, self._batch_size, self._device).to(torch.float16)
                self._states |= zip(part, (row.clone() for row in rows), strict=True)
        found = [self._states[caption] for caption in captions]
        for caption in list(self._states)[: max(0, len(self._states) - self._max_states)]:
            del self._states[caption]
        return torch.stack(found).float()


class CachedEncoders:
    """The frozen first stage and text encoder, with their caches on disk. Raises ValueError here and in `encode_…`, if
    the cache cannot be written or an image cannot be read any more.

    A row depends on its image or caption alone, bit for bit: batches have one size per image shape, and arithmetic is
    float32. Several processes encode a part each, then wait for each other.

    Args:
        rank, world: index of this process, number of processes.
        wait: a barrier without a timeout: `long_barrier`.
        num_workers: processes that load and decode images; 0 loads them in this one.
        print: logs what was encoded, and damaged files.
    """

    def __init__(
        self,
        codec: Codec,
        text_encoder: TextEncoder,
        cache_folder: Path,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], None] = lambda: None,
        num_workers: int = 0,
        print: Callable[[str], None] = print,
        show_progress: bool = False,
    ) -> None:
        self.codec, self.text_encoder = codec, text_encoder
        self.cache_folder, self.device = cache_folder, device
        self.print = print
        self._rank, self.world, self._wait = rank, world, wait
        self._num_workers, self._show_progress = num_workers, show_progress
        self._captions = RowCache(cache_folder / "captions" / f"{text_encoder.fingerprint()}-{VERSION}", print)
        name = codec.fingerprint()
        self._moments = None if name is None else RowCache(cache_folder / "moments" / f"{name}-{VERSION}", print)

    def encode_captions(self, captions: Sequence[str]) -> tuple[CachedRows, int]:
        """(states of captions, a row [L, D] float32 each; number of new ones)."""
        keys = [content_hash(caption.encode("utf-8", "surrogatepass")) for caption in captions]

        def encode(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            row_bytes = self.text_encoder.max_length * self.text_encoder.hidden_size * 4
            for part in _chunks(missing, _shard_rows(row_bytes)):
                batches = _chunks(part, CAPTION_BATCH_SIZE)
                yield part, torch.cat([self.states_of([captions[i] for i in batch]) for batch in batches])  # [N, L, D]

        return self._rows(self._captions, keys, len(keys), encode, "captions")

    def encode_images(self, images: CaptionedImages) -> tuple[CachedRows | None, int]:
        """(moments of images, a row [M, h, w] float32 each, all unflipped before all flipped; number of new images).

        None where moments cannot be cached.
        """
        if self._moments is None:  # pixels are diffused
            return None, 0
        if images.config.crop == "random":
            self.print('latents are not cached: data.crop is "random", so that every step has other crops')
            return None, 0
        shapes = _shapes(images)

        def encode(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            """Positions and rows, one shape at a time. An image with both flips missing is loaded once."""
            flips = _group_by(missing, lambda position: position % len(images))  # index → its positions
            groups = _group_by(flips, lambda index: (shapes[index], tuple(p >= len(images) for p in flips[index])))
            jobs = []
            for (shape, flipped), indices in groups.items():
                row_bytes = 2 * math.prod(self.codec.latent_shape(*shape)) * 4  # mean and log-variance, float32
                parts = _chunks(indices, max(1, _shard_rows(row_bytes) // len(flipped)))
                jobs += [(part, _batch_size(*shape), flipped) for part in parts]
            batches = [batch for indices, size, _ in jobs for batch in _chunks(indices, size)]
            loader = iter(
                DataLoader(
                    _Pixels(images),
                    batch_sampler=batches,
                    num_workers=self._num_workers,
                    collate_fn=list,
                    worker_init_fn=ignore_signals,
                    generator=torch.Generator(),  # a full cache must not change the random numbers of a run
                )
            )
            for indices, size, flipped in jobs:
                encoded = []
                for _ in _chunks(indices, size):
                    pixels = _stack(next(loader))
                    both = [self.moments_of(pixels.flip(-1) if mirror else pixels, size) for mirror in flipped]
                    encoded.append(torch.stack(both))  # [flips, B, M, h, w]
                positions = [index + len(images) * mirror for mirror in flipped for index in indices]
                yield positions, torch.cat(encoded, dim=1).flatten(0, 1)  # [flips · N, M, h, w]

        return self._rows(self._moments, _image_keys(images), len(images), encode, "images")

    def _rows(
        self,
        store: RowCache,
        keys: list[str],
        count: int,
        encode: Callable[[list[int]], Iterator[tuple[list[int], Tensor]]],
        what: str,
    ) -> tuple[CachedRows, int]:
        """The rows of `keys`, missing ones encoded; positions p, p + count, … belong to one item."""

        def encode_missing(missing: list[int]) -> None:
            remaining = len(missing)
            progress = tqdm(
                total=remaining,
                desc=f"encoding {what}",
                leave=False,
                delay=3,
                mininterval=0.5 if sys.stderr.isatty() else 20,
                disable=not self._show_progress,
            )
            with progress, torch.no_grad(), _deterministic_fp32(self.device):
                for positions, rows in encode(missing) if missing else ():
                    if not bool(rows.isfinite().all()):
                        raise ValueError(
                            f"encoding {what} gave numbers that are not finite; the weights must be damaged"
                        )
                    remaining -= len(positions)
                    store.add([keys[p] for p in positions], rows, remaining)
                    progress.update(len(positions))

        missing = store.missing(keys)
        new = len({position % count for position in missing})
        self._wait()  # every process reads before the first writes
        encode_missing([p for p in missing if p % count % self.world == self._rank])
        self._wait()
        encode_missing(store.missing(keys))  # machines without a shared folder need all rows each
        return store.open(keys), new

    def states_of(self, captions: list[str], size: int = CAPTION_BATCH_SIZE, to: torch.device | str = "cpu") -> Tensor:
        """At most `size` captions → [B, L, D] on `to`. The same size gives the same bits."""
        padding = [""] * (size - len(captions))
        return self.text_encoder([*captions, *padding])[: len(captions)].to(to, torch.float32)

    def moments_of(self, images: Tensor, size: int, to: torch.device | str = "cpu") -> Tensor:
        """uint8 [B, 3, H, W], at most `size` images → [B, M, h, w] on `to`. The same size gives the same bits."""
        padding = images[-1:].expand(size - len(images), -1, -1, -1)
        moments = self.codec.moments(to_signed(torch.cat([images, padding])).to(self.device))
        return moments[: len(images)].to(to, torch.float32)


def long_barrier(processes: int) -> Callable[[], None]:
    """A barrier for encoding, which may take longer than the timeout of the run's own process group."""
    if processes == 1:
        return lambda: None
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    return lambda: torch.distributed.barrier(group)


class _Pixels(Dataset[Tensor | ValueError]):
    """Unflipped images by index. Errors are returned: a DataLoader would wrap them in a traceback."""

    def __init__(self, images: CaptionedImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor | ValueError:
        try:
            return self.images.image_at(index)
        except ValueError as error:
            return error


def _stack(images: list[Tensor | ValueError]) -> Tensor:
    tensors = []
    for image in images:
        if isinstance(image, ValueError):
            raise image
        tensors.append(image)
    return torch.stack(tensors)  # [B, 3, H, W]


def _image_keys(images: CaptionedImages) -> list[str]:
    """A key per image, and with flips another per mirrored image."""

    def digest(sample: Sample) -> str:
        try:
            return content_hash(sample.read())
        except (OSError, ValueError) as error:
            raise ValueError(f"{sample.id} cannot be read: {error}; restore or remove it") from error

    config = images.config
    transform = (TRANSFORM_VERSION, config.resolution, config.crop, config.background_rgb)
    # Reading and hashing release the interpreter lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        read = iter(list(pool.map(digest, [sample for sample in images.samples if sample.digest is None])))
    named = list(zip([sample.digest or next(read) for sample in images.samples], _shapes(images), strict=True))
    return [
        content_hash(repr((*transform, shape, flipped, name)).encode())
        for flipped in ((False, True) if config.flip else (False,))
        for name, shape in named
    ]


def _shapes(images: CaptionedImages) -> list[tuple[int, int]]:
    """(height, width) at which each image is encoded."""
    return [images.shape_of(index) for index in range(len(images))]


@contextmanager
def _deterministic_fp32(device: torch.device) -> Iterator[None]:
    """Full float32 without autotuned algorithms: cached rows must not depend on who encoded them first."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), cudnn:
        yield


def _batch_size(height: int, width: int, max_size: int = IMAGE_BATCH_SIZE) -> int:
    return max(1, min(max_size, MAX_BATCH_PIXELS // (height * width)))


def _shard_rows(row_bytes: int) -> int:
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _group_by(items: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
