"""What the frozen networks say about the data, encoded once and kept on disk.

CACHE/moments/KEY/    posterior moments of images; KEY covers the encoder of the first stage
CACHE/captions/KEY/   hidden states of captions; KEY covers the text encoder

A row of moments stands under the image's bytes and the transform, a row of states under the caption. So what has
changed, and nothing else, is encoded again. Only what is deterministic is kept: the posterior is drawn, and flips
and captions are chosen and dropped, when a batch is made.
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
from ldm.cores import usable_cores
from ldm.data import Batch, CaptionedImages, Sample, ignore_signals, to_signed
from ldm.data.cache import CachedRows, RowCache
from ldm.data.images import TRANSFORM_VERSION, resize_and_crop
from ldm.data.rng import content_hash
from ldm.text import TextEncoder

# Raised when rows of one key come out otherwise than before.
VERSION = 1
IMAGES_AT_ONCE = 32
CAPTIONS_AT_ONCE = 16
# Larger images are encoded fewer at once: as many pixels as IMAGES_AT_ONCE have at 128 by 128.
PIXELS_AT_ONCE = 32 * 128**2
# What a killed process loses, at most.
SHARD_ROWS, SHARD_BYTES = 256, 64 * 2**20
STATISTICS_ROWS = 1024
# Of what is renewed: few in a batch, so that fewer are encoded at once, and most bytes of moments and of states each.
RENEWED_AT_ONCE, KEPT_BYTES = 8, 2**30
# Where all is renewed, a GPU waits for launches if few are encoded at once. What takes no more than so many bytes stays
# there: to copy a batch of it takes as long as a step of a small network.
ON_GPU_AT_ONCE, ON_GPU_BYTES = 64, 2**29

T = TypeVar("T")


class LatentCache:
    """Posterior moments of the images and hidden states of the captions, read from disk batch by batch.

    With random crops, and on pixels, images are not kept but encoded batch by batch, and then alone the codec is
    held on to: otherwise whoever made the encoders may free both networks.

    Args:
        images: the data set; told to stop loading images where their moments are kept.
        encoders: what encodes all that is not in the cache yet, now.

    Attributes:
        null: states of the empty caption, [1, L, D] float32.
        new_images, new_captions: how many were not in the cache.
    """

    def __init__(self, images: CaptionedImages, encoders: CachedEncoders) -> None:
        started = time.perf_counter()
        self.images = images
        self.device = encoders.device
        # What is there for some epochs only is encoded when it comes; of composed images their parts last.
        self._renewed = MemoryCache(images, encoders) if images.renewed_fraction > 0 else None
        lasting = tuple(sample for sample in images.samples if sample.renew is None)
        captions = sorted({"", *(caption for sample in lasting for caption in sample.captions)})
        self._row_of = {caption: row for row, caption in enumerate(captions)}
        self._states, self.new_captions = encoders.encode_captions(captions)
        self._moments, self.new_images = encoders.encode_images(images) if lasting else (None, 0)
        self._draw = encoders.codec.latents_sampler()
        self._codec = encoders.codec if self._moments is None and lasting else None
        self._channels, self._factor = encoders.codec.channels, encoders.codec.factor
        self.null = self.text([""])
        images.with_images = self._codec is not None
        kept = "" if self._moments is None else f"{self.new_images} of {len(images)} images and "
        encoders.print(
            f"encoded {kept}{self.new_captions} of {len(captions)} captions (with the empty one) in "
            f"{time.perf_counter() - started:.1f} s; all are kept in {encoders.cache_folder}"
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of `height` × `width` pixels."""
        assert height % self._factor == width % self._factor == 0, (height, width)
        return self._channels, height // self._factor, width // self._factor

    @torch.no_grad()
    def latents(self, batch: Batch, posterior: Tensor | None) -> Tensor:
        """Latents [B, C, h, w] float32, drawn with `posterior` [B, C, h, w]; None takes the mean."""
        if self._codec is not None:
            assert batch.images is not None
            moments = self._codec.moments(to_signed(batch.images).to(self.device))
        else:
            moments = self._kept_moments(batch).to(self.device)  # [B, M, h, w]
        return self._draw(moments, posterior)

    def _kept_moments(self, batch: Batch) -> Tensor:
        """[B, M, h, w] float32: of what lasts from disk, of the rest as it is kept in memory."""
        renewed = batch.renewed.nonzero().flatten()  # [R]
        if self._renewed is None or not len(renewed):
            assert self._moments is not None
            return self._moments[batch.indices + len(self.images) * batch.flipped]
        rows = self._renewed.moments(batch, renewed.tolist())  # [R, M, h, w]
        if len(rows) == len(batch.ids):
            return rows
        assert self._moments is not None
        moments = rows.new_empty(len(batch.ids), *rows.shape[1:])
        moments[batch.renewed] = rows
        plain = ~batch.renewed
        moments[plain] = self._moments[(batch.indices + len(self.images) * batch.flipped)[plain]].to(rows.device)
        return moments

    def text(self, captions: Sequence[str]) -> Tensor:
        """Hidden states [B, L, D] float32 of captions of the data, or the empty one."""
        fresh = [place for place, caption in enumerate(captions) if caption not in self._row_of]
        if self._renewed is None or not fresh:
            return self._states[[self._row_of[caption] for caption in captions]].to(self.device)
        rows = self._renewed.states([captions[place] for place in fresh])  # [R, L, D]
        states = rows.new_empty(len(captions), *rows.shape[1:])
        states[fresh] = rows
        known = [place for place, caption in enumerate(captions) if caption in self._row_of]
        if known:
            states[known] = self._states[[self._row_of[captions[place]] for place in known]].to(rows.device)
        return states.to(self.device)

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation [C] of the latents over the data, from about 1,024 images; None if nothing is kept."""
        if self._moments is None:
            return None
        chosen = range(0, len(self.images), max(1, len(self.images) // STATISTICS_ROWS))
        shapes = _shapes(self.images)
        values = []
        for group in _grouped(chosen, lambda index: shapes[index]).values():
            for part in _parts(group, IMAGES_AT_ONCE):
                latents = self._draw(self._moments[part].to(self.device), None)  # [b, C, h, w]
                values.append(latents.transpose(0, 1).flatten(1).cpu())  # [C, b·h·w]
        joined = torch.cat(values, dim=1)
        return joined.mean(dim=1), joined.std(dim=1)


class MemoryCache:
    """Moments and states of what is there for `data.renew_every` epochs only, in memory, half precision.

    They are encoded in the step that first asks for them, so that no step encodes more than a batch: over
    `renew_every` epochs each is encoded once, by each process that sees it. Rows are functions of image and caption
    alone, so that a resumed run, whose memory is empty, goes on as an unbroken one.

    What does not fit into KEPT_BYTES is encoded whenever it is shown. Images that no worker has loaded are loaded here.
    """

    def __init__(self, images: CaptionedImages, encoders: CachedEncoders) -> None:
        self._images, self._encoders = images, encoders
        self._moments: dict[int, tuple[int, Tensor]] = {}  # index → (epoch // renew_every, [M, h, w])
        self._states: dict[str, Tensor] = {}  # the newest last
        share, codec, text = images.renewed_fraction, encoders.codec, encoders.text_encoder
        # Mean and log-variance, of two bytes each; of the largest shape.
        row_bytes = max(4 * math.prod(codec.latent_shape(*size)) for size in images.buckets.sizes)
        self._kept = min(len(images), int(KEPT_BYTES / (row_bytes * share)))
        # In a later epoch a sample may come to a process that has not seen it yet.
        images.renewed_cached = self._kept if encoders.world == 1 else 0
        # The same caption may come again with another image, so that the oldest go, not those of the last block.
        in_use = math.ceil(1.25 * share * len(images))
        state_bytes = 2 * text.max_length * text.hidden_size
        self._most_states = min(in_use, KEPT_BYTES // state_bytes)
        kept_bytes = share * self._kept * row_bytes + self._most_states * state_bytes
        self._home = encoders.device if kept_bytes <= ON_GPU_BYTES else torch.device("cpu")
        self._at_once = ON_GPU_AT_ONCE if encoders.device.type != "cpu" and share == 1 else RENEWED_AT_ONCE

    @torch.no_grad()
    def moments(self, batch: Batch, places: Sequence[int]) -> Tensor:
        """[R, M, h, w] float32, of the R items at these places of a batch, at least one."""
        every, indices = self._images.config.renew_every, batch.indices.tolist()
        keys = [(indices[place], batch.epochs[place] // every) for place in places]
        rows: dict[tuple[int, int], Tensor] = {}
        pixels: dict[tuple[int, int], Tensor] = {}
        image_of = {place: i for i, place in enumerate(batch.loaded.nonzero().flatten().tolist())}
        for place, (index, block) in zip(places, keys, strict=True):
            kept = self._moments.get(index)
            if kept is not None and kept[0] == block:
                rows[index, block] = kept[1]
            elif place in image_of:
                assert batch.images is not None
                pixels[index, block] = batch.images[image_of[place]]
            elif (index, block) not in pixels:
                sample = self._images.sample_at(batch.epochs[place], index)
                pixels[index, block] = resize_and_crop(sample.load(), batch.size)
        size = _at_once(*batch.size, self._at_once)
        with _exact(self._encoders.device):
            for part in _parts(list(pixels), size):
                encoded = self._encoders.moments_of(torch.stack([pixels[key] for key in part]), size, self._home)
                # A row that is a view would keep those encoded with it in memory.
                rows |= zip(part, (row.clone() for row in encoded.to(torch.float16)), strict=True)
        # What is plain now may have been composed before.
        for index in indices:
            self._moments.pop(index, None)
        self._moments |= {index: (block, rows[index, block]) for index, block in keys if index < self._kept}
        return torch.stack([rows[key] for key in keys]).float()

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> Tensor:
        """[B, L, D] float32."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._states]
        with _exact(self._encoders.device):
            for part in _parts(missing, self._at_once):
                rows = self._encoders.states_of(part, self._at_once, self._home).to(torch.float16)
                self._states |= zip(part, (row.clone() for row in rows), strict=True)
        found = [self._states[caption] for caption in captions]
        for caption in list(self._states)[: max(0, len(self._states) - self._most_states)]:
            del self._states[caption]
        return torch.stack(found).float()


class CachedEncoders:
    """Both frozen networks, and the stores of what they have said.

    A row is a function of its image or caption alone, bit for bit, whatever else is encoded with it: batches have
    one size for each shape of image, and arithmetic is float32 whatever the run trains in.

    Several processes encode a share each, then wait for each other.

    Args:
        cache_folder: holds the stores; made when something is written.
        device: where both networks are.
        rank, world: this process, and how many there are.
        wait: returns when all processes have called it, however long that takes: `long_barrier`.
        num_workers: processes that load and decode images; 0 does so in this one.
        print: is told what was encoded, and of damaged files.
        show_progress: whether long work shows a bar.

    Raises:
        ValueError: here and in `encode_…`, if the cache cannot be written or an image has become unreadable.
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
        """States of captions, a row [L, D] float32 each, and how many of them were new."""
        keys = [content_hash(caption.encode("utf-8", "surrogatepass")) for caption in captions]

        def encode(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            row_bytes = self.text_encoder.max_length * self.text_encoder.hidden_size * 4
            for part in _parts(missing, _shard_rows(row_bytes)):
                batches = _parts(part, CAPTIONS_AT_ONCE)
                yield part, torch.cat([self.states_of([captions[i] for i in batch]) for batch in batches])  # [N, L, D]

        return self._filled(self._captions, keys, len(keys), encode, "captions")

    def encode_images(self, images: CaptionedImages) -> tuple[CachedRows | None, int]:
        """Moments of images, a row [M, h, w] float32 each, all unflipped before all flipped, and how many images
        were new. None where they cannot be kept.
        """
        if self._moments is None:  # images themselves are diffused
            return None, 0
        if images.config.crop == "random":
            self.print('latents are not cached: data.crop is "random", so that every step shows other crops')
            return None, 0
        keys, shapes, count = _image_keys(images), _shapes(images), len(images)

        def encode(missing: list[int]) -> Iterator[tuple[list[int], Tensor]]:
            return self._moments_by_shard(images, shapes, missing)

        return self._filled(self._moments, keys, count, encode, "images")

    # ---- the same for both

    def _filled(
        self,
        store: RowCache,
        keys: list[str],
        count: int,
        encode: Callable[[list[int]], Iterator[tuple[list[int], Tensor]]],
        what: str,
    ) -> tuple[CachedRows, int]:
        """The rows of `keys`, encoded where they are missing; those at p, p + count, … belong to one thing."""
        missing = store.missing(keys)
        new = len({position % count for position in missing})
        self._wait()  # all have looked before the first writes
        self._add(store, keys, [p for p in missing if p % count % self.world == self._rank], encode, what)
        self._wait()
        # Machines that share no folder each need all rows.
        self._add(store, keys, store.missing(keys), encode, what)
        return store.open(keys), new

    def _add(
        self,
        store: RowCache,
        keys: list[str],
        missing: list[int],
        encode: Callable[[list[int]], Iterator[tuple[list[int], Tensor]]],
        what: str,
    ) -> None:
        to_come = len(missing)
        bar = tqdm(
            total=to_come,
            desc=f"encoding {what}",
            leave=False,
            delay=3,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            disable=not self._show_progress,
        )
        with bar, torch.no_grad(), _exact(self.device):
            for positions, rows in encode(missing) if missing else ():
                if not bool(rows.isfinite().all()):
                    raise ValueError(f"encoding {what} gave numbers that are not finite; the weights must be damaged")
                to_come -= len(positions)
                store.add([keys[p] for p in positions], rows, to_come)
                bar.update(len(positions))

    # ---- what the networks compute

    def states_of(self, captions: list[str], size: int = CAPTIONS_AT_ONCE, to: torch.device | str = "cpu") -> Tensor:
        """At most `size` captions → [B, L, D] on `to`. The same size gives the same bits."""
        padding = [""] * (size - len(captions))
        return self.text_encoder([*captions, *padding])[: len(captions)].to(to, torch.float32)

    def moments_of(self, images: Tensor, size: int, to: torch.device | str = "cpu") -> Tensor:
        """uint8 [B, 3, H, W], at most `size` of them → [B, M, h, w] on `to`. The same size gives the same bits."""
        padding = images[-1:].expand(size - len(images), -1, -1, -1)
        moments = self.codec.moments(to_signed(torch.cat([images, padding])).to(self.device))
        return moments[: len(images)].to(to, torch.float32)

    def _moments_by_shard(
        self, images: CaptionedImages, shapes: list[tuple[int, int]], missing: list[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Positions and rows of one shape at a time. An image whose two flips are missing is loaded once."""
        flips = _grouped(missing, lambda position: position % len(images))  # index → its positions
        groups = _grouped(flips, lambda index: (shapes[index], tuple(p >= len(images) for p in flips[index])))
        jobs = [
            (part, _at_once(*shape), flipped)
            for (shape, flipped), indices in groups.items()
            for part in _parts(indices, max(1, self._images_a_shard(*shape) // len(flipped)))
        ]
        batches = [batch for indices, size, _ in jobs for batch in _parts(indices, size)]
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
            parts = []
            for _ in _parts(indices, size):
                pixels = _stacked(next(loader))
                both = [self.moments_of(pixels.flip(-1) if mirror else pixels, size) for mirror in flipped]
                parts.append(torch.stack(both))  # [flips, B, M, h, w]
            positions = [index + len(images) * mirror for mirror in flipped for index in indices]
            yield positions, torch.cat(parts, dim=1).flatten(0, 1)  # [flips · N, M, h, w]

    def _images_a_shard(self, height: int, width: int) -> int:
        channels, h, w = self.codec.latent_shape(height, width)
        return _shard_rows(2 * channels * h * w * 4)  # mean and log-variance, float32


def long_barrier(processes: int) -> Callable[[], None]:
    """Waits for all processes. The run's own group gives up after minutes, and encoding takes as long as it takes."""
    if processes == 1:
        return lambda: None
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    return lambda: torch.distributed.barrier(group)


class _Pixels(Dataset[Tensor | ValueError]):
    """Images by index, unflipped, for a DataLoader. An error is handed over: raised in a worker it would be wrapped
    in a traceback.
    """

    def __init__(self, images: CaptionedImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor | ValueError:
        try:
            return self.images.image_at(index)
        except ValueError as error:
            return error


def _stacked(images: list[Tensor | ValueError]) -> Tensor:
    tensors = []
    for image in images:
        if isinstance(image, ValueError):
            raise image
        tensors.append(image)
    return torch.stack(tensors)  # [B, 3, H, W]


def _image_keys(images: CaptionedImages) -> list[str]:
    """A key for each image, and with flips one more for each mirrored one."""
    config = images.config
    transform = (TRANSFORM_VERSION, config.resolution, config.crop, config.background_rgb)
    # Reading and hashing release the interpreter lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        unknown = iter(list(pool.map(_digest, [sample for sample in images.samples if sample.digest is None])))
    named = list(zip([sample.digest or next(unknown) for sample in images.samples], _shapes(images), strict=True))
    return [
        content_hash(repr((*transform, shape, flipped, digest)).encode())
        for flipped in ((False, True) if config.flip else (False,))
        for digest, shape in named
    ]


def _digest(sample: Sample) -> str:
    try:
        return content_hash(sample.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{sample.id} cannot be read: {error}; restore or remove it") from error


def _shapes(images: CaptionedImages) -> list[tuple[int, int]]:
    """(height, width) of each image as it is encoded."""
    return [images.shape_of(index) for index in range(len(images))]


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Arithmetic in full float32, in convolutions too, by algorithms that do not depend on what was timed as fastest:
    what is kept must not depend on who was first to ask for it.
    """
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), cudnn:
        yield


def _at_once(height: int, width: int, most: int = IMAGES_AT_ONCE) -> int:
    return max(1, min(most, PIXELS_AT_ONCE // (height * width)))


def _shard_rows(row_bytes: int) -> int:
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def _parts(things: list[T], size: int) -> list[list[T]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def _grouped(things: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups
