"""Inspection of a data set before training: which images can be used, and which are duplicates."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, features

from ldm.data.cache import RowCache
from ldm.data.images import FORMATS, cutout_color
from ldm.data.rng import content_hash
from ldm.data.sources import CaptionSource, DataConfig, Sample, Skipped, Source
from ldm.environment import usable_cores

THUMBNAIL = 16
_BLOCK = 256  # images between two writes of the cache, which an interruption loses
WORKERS = usable_cores()  # threads; the result does not depend on them
_VERSION = 6  # raised when the record or the result of `decode` changes
# Of an image in the cache; `rest` is JSON: size, format, cutout.
_RECORD = np.dtype([("pixels", "u1", 16), ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3)), ("rest", "S240")])


Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


class ImageFormat(NamedTuple):
    """How an image is stored, and its conversions (`Decoded`)."""

    format: str
    mode: str
    traits: tuple[str, ...]


@dataclass(frozen=True)
class Duplicate:
    """A sample with the same pixels as the sample `of`, and its additional captions. Both by `Sample.display_name`."""

    path: str
    of: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a source.

    Args:
        name, caption_sources, languages: of the source.
        used: the samples to train on, in the order of the source, with digest and size. Near-duplicates share a group.
        skipped, duplicates: unusable entries, and exact copies, whose captions are added to the used sample; in natural
            order.
        near_duplicates: ids of used samples that are one image re-saved, resized, retouched or mirrored.
        formats: of each used sample; empty for a curated source that was not inspected.
        cache_error: why the image info could not be cached; "" if it was.
    """

    name: str
    used: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]
    duplicates: tuple[Duplicate, ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()
    formats: tuple[ImageFormat, ...] = ()
    cache_error: str = ""
    caption_sources: tuple[CaptionSource, ...] = ()
    languages: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of entries of the source: used + skipped + duplicates."""
        return len(self.used) + len(self.skipped) + len(self.duplicates)


def inspect(source: Source, config: DataConfig, *, progress: bool = False, include_curated: bool = False) -> Inspection:
    """Hashes and decodes every image, finds duplicates, and groups near-duplicates.

    The bytes are hashed every time. What decoding tells is cached by their hash, so that the next start decodes new
    images only.

    Of exact copies (same upright RGB pixels on the background) the first in natural order is used, with the captions of
    all. Near-duplicates (`near_duplicate_clusters`) get the group of the first in natural order. So files that sort
    last leave older groups as they are, unless one ties two of them together; files that sort first may rename groups,
    and so move them to the other side of the split.

    Args:
        progress: show a progress bar on stderr after two seconds.
        include_curated: also inspect curated sources. Their samples are not dropped or regrouped.
    """
    if source.curated and not include_curated:
        return Inspection(source.name, source.samples, source.skipped, caption_sources=source.caption_sources)
    assert len({sample.id for sample in source.samples}) == len(source.samples), "ids are distinct"
    found, unreadable, thumbnails, cache_error = _decode_all(source, config, progress)
    by_name = sorted(found, key=lambda one: natural_order(one.sample.id))
    first: dict[bytes, _Found] = {}  # the used sample of these pixels
    copies: set[str] = set()
    captions: dict[str, tuple[str, ...]] = {}  # of the samples that have copies
    duplicates = []
    ties: list[tuple[str, str]] = []  # groups to merge
    for one in by_name if not source.curated else ():
        of = first.setdefault(one.pixels, one)
        if of is not one:
            so_far = captions.get(of.sample.id, of.sample.captions)
            added = tuple(text for text in dict.fromkeys(one.sample.captions) if text not in so_far)
            captions[of.sample.id] = so_far + added
            duplicates.append(Duplicate(one.sample.display_name, of.sample.display_name, added))
            ties.append((one.sample.group, of.sample.group))
            copies.add(one.sample.id)
    distinct = [one for one in by_name if one.sample.id not in copies]
    firsts = near_duplicate_clusters(thumbnails[[one.place for one in distinct]], [one.size for one in distinct])
    members: dict[int, list[_Found]] = defaultdict(list)
    for one, of_cluster in zip(distinct, firsts.tolist(), strict=True):
        members[of_cluster].append(one)
    clusters = [cluster for _, cluster in sorted(members.items()) if len(cluster) > 1]
    ties += [(cluster[0].sample.group, one.sample.group) for cluster in clusters for one in cluster[1:]]
    merged = {one.sample.group: one.sample.group for one in by_name}  # group → one that it was merged into (union-find)
    rank = {group: place for place, group in enumerate(merged)}

    def root(group: str) -> str:
        while merged[group] != group:
            merged[group] = merged[merged[group]]
            group = merged[group]
        return group

    for tie in () if source.curated else ties:
        earlier, later = sorted(map(root, tie), key=rank.__getitem__)
        merged[later] = earlier
    used = [one for one in found if one.sample.id not in copies]
    inspection = Inspection(
        source.name,
        tuple(
            replace(
                one.sample,
                captions=captions.get(one.sample.id, one.sample.captions),
                group=root(one.sample.group),
                digest=one.digest,
                size=one.size,
                cutout=one.sample.cutout if source.curated else one.cutout,
            )
            for one in used
        ),
        tuple(sorted((*source.skipped, *unreadable), key=lambda entry: natural_order(entry.path))),
        tuple(duplicates),
        tuple(tuple(one.sample.id for one in cluster) for cluster in clusters),
        tuple(one.format for one in used),
        cache_error,
        source.caption_sources,
        source.languages,
    )
    assert inspection.total == len(source.samples) + len(source.skipped), "every sample is counted once"
    return inspection


def natural_order(path: str) -> tuple[object, ...]:
    """A sort key: "x2" before "x10", "x.png" before "x (1).png" and "x_copy.png"."""

    def tokens(text: str) -> tuple[object, ...]:
        # "a10b" → ("a", (2, "10"), "b"): numbers compare by their length, then by their digits.
        parts: list[object] = list(re.split(r"([0-9]+)", text.casefold()))
        for place in range(1, len(parts), 2):
            digits = str(parts[place]).lstrip("0")
            parts[place] = (len(digits), digits)
        return tuple(parts)

    *folders, name = path.split("/")
    stem, dot, suffix = name.rpartition(".") if "." in name[1:] else (name, "", "")
    return tuple(tokens(part) for part in (*folders, stem)), tokens(dot + suffix), path


class _Info(NamedTuple):
    """What decoding tells of an image; `pixels` is a hash of the size and the RGB pixels."""

    pixels: bytes
    size: tuple[int, int]
    format: ImageFormat
    cutout: tuple[int, int, int] | None
    thumbnail: Bytes


class _Found(NamedTuple):
    """A decodable sample: its place in the source, and what `_Info` tells."""

    sample: Sample
    digest: str
    place: int
    pixels: bytes
    size: tuple[int, int]
    format: ImageFormat
    cutout: tuple[int, int, int] | None


def info_cache(config: DataConfig) -> RowCache:
    """The cache of image info by the hash of the file, in a folder named after everything else it depends on."""
    depends = (_VERSION, PIL.__version__, features.version("littlecms2"), FORMATS, config.background_rgb, _RECORD.descr)
    name = hashlib.blake2b(repr(depends).encode(), digest_size=8).hexdigest()
    return RowCache(config.cache_folder / "facts" / name, print=lambda _: None)


def _decode_all(source: Source, config: DataConfig, progress: bool) -> tuple[list[_Found], list[Skipped], Bytes, str]:
    """(decodable samples, others, thumbnails [N, 16, 16, 3], why the cache cannot be written)."""
    from tqdm import tqdm

    samples = source.samples
    cache = None if source.curated else info_cache(config)
    known = cache.keys() if cache else set()
    found: list[_Found] = []
    unreadable: list[Skipped] = []
    thumbnails = np.zeros((len(samples), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    formats: dict[ImageFormat, ImageFormat] = {}  # share equal objects
    cache_error = ""
    with (
        warnings.catch_warnings(),  # Pillow warns on stderr, without a name; problems that matter are in the report
        tqdm(total=len(samples), desc="inspecting images", unit=" images", disable=not progress, delay=2) as bar,
        ThreadPoolExecutor(WORKERS) as pool,  # decoding, hashing and resizing release the interpreter lock
    ):
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        for start in range(0, len(samples), _BLOCK):
            block = samples[start : start + _BLOCK]
            results = list(pool.map(lambda sample: _examine(sample, known, source.captioned), block))
            cached: dict[str, _Info] = {}
            if cache is not None:
                hits = list(dict.fromkeys(one[0] for one in results if not isinstance(one, str) and one[1] is None))
                lost = set(cache.missing(hits))  # of damaged shards, are computed again
                hits = [digest for place, digest in enumerate(hits) if place not in lost]
                rows = cache.open(hits)[range(len(hits))].numpy().view(_RECORD)[:, 0] if hits else ()
                for digest, row in zip(hits, rows, strict=True):
                    size, (format, mode, traits), cutout = json.loads(row["rest"])
                    color = None if cutout is None else tuple(cutout)
                    stored = ImageFormat(format, mode, tuple(traits))
                    cached[digest] = _Info(row["pixels"].tobytes(), tuple(size), stored, color, row["thumbnail"])
            new = {}
            for place, result in enumerate(results, start):
                if not isinstance(result, str) and result[1] is None and result[0] not in cached:
                    result = _examine(samples[place], (), source.captioned)
                if isinstance(result, str):
                    unreadable.append(Skipped(samples[place].display_name, result))
                    continue
                digest, computed = result
                if computed is not None:
                    new[digest] = computed
                info = computed or cached[digest]
                thumbnails[place] = info.thumbnail
                stored = formats.setdefault(info.format, info.format)
                found.append(_Found(samples[place], digest, place, info.pixels, info.size, stored, info.cutout))
            bar.update(len(block))
            if cache is None or cache_error or not new:
                continue
            records = np.zeros(len(new), _RECORD)
            for record, info in zip(records, new.values(), strict=True):
                rest = json.dumps([info.size, info.format, info.cutout]).encode()
                assert len(rest) <= _RECORD["rest"].itemsize, f"{rest!r} would be cut short"
                record["pixels"] = np.frombuffer(info.pixels, np.uint8)
                record["thumbnail"], record["rest"] = info.thumbnail, rest
            try:
                cache.add(list(new), torch.from_numpy(records.view(np.uint8).reshape(len(new), -1)))
            except ValueError as error:
                cache_error = str(error)
    return found, unreadable, thumbnails, cache_error


def _examine(sample: Sample, known: Collection[str], captioned: bool) -> tuple[str, _Info | None] | str:
    """(digest, info, None if the digest is known), or why the sample cannot be used."""
    if captioned and not sample.captions:
        return "no caption"
    try:
        data = sample.read()
        digest = content_hash(data)
        if digest in known:
            return digest, None
        decoded = sample.decode(data)
        image = decoded.image
        hashed = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
        hashed.update(image.tobytes())
        stored = ImageFormat(decoded.format, decoded.mode, decoded.traits)
        cutout = cutout_color(decoded.alpha, image)
        return digest, _Info(hashed.digest(), image.size, stored, cutout, thumbnail(image))
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    except (ValueError, MemoryError) as error:
        return str(error) or type(error).__name__


# ---- near-duplicates: re-saved, resized, brightened, retouched and mirrored copies
#
# Images are reduced to 16×16 RGB pixels, minus their mean color, divided by their contrast (RMS). Two images are
# near-duplicates if these differ, in units of the contrast, by
# - RMS below 0.10 and below 0.30 in each of 8×8 cells (a global change), or
# - RMS below 0.20 and below 0.05 in all cells but four (a local retouch),
# and if aspect ratio, contrast and mean color are about the same. Measured in docs/data.md ("Near-duplicates").

_CELLS = 8
_SIDE = THUMBNAIL // _CELLS

# Calibrated on the table in docs/data.md.
_OVERALL, _CELL = 0.10, 0.30
_TOUCHED_OVERALL, _TOUCHED_CELL, _TOUCHED_CELLS = 0.20, 0.05, 4
_NOISE = 7.0  # noise of flat images, in gray levels
_GAIN = 1.33
_RADIUS = 0.25  # the distance of a member from the first of its cluster, so that chains of similar images end
_COMPARED = 16  # members of a cluster that later images are compared with, so that large clusters stay cheap

_ROWS, _COLUMNS, _PAIRS = 256, 8192, 4096


def thumbnail(image: Image.Image) -> Bytes:
    """An RGB image of any size → uint8 [16, 16, 3]; the aspect ratio is ignored."""
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def near_duplicate_clusters(thumbnails: Bytes, sizes: Sequence[tuple[int, int]]) -> Indices:
    """For each image, the index of the first one in its cluster of near-duplicates: int64 [N], each at most its
    position.

    An image joins the cluster of its earliest near-duplicate if it is also near the first of that cluster. Clusters are
    never merged, and images appended at the end do not change earlier results. All pairs are compared in blocks:
    100,000 images take minutes, and 1.5 kB of memory per image.

    Args:
        thumbnails: uint8 [N, 16, 16, 3], from `thumbnail`.
        sizes: (width, height) of each image in pixels.
    """
    embeddings = _Embeddings(thumbnails, sizes)
    first = np.arange(len(thumbnails))
    members = np.zeros(len(thumbnails), np.int64)
    compared = np.zeros(len(thumbnails), bool)
    for start in range(0, len(thumbnails), _ROWS):
        stop = min(start + _ROWS, len(thumbnails))
        columns = np.concatenate([np.flatnonzero(compared[:start]), np.arange(start, stop)])
        matches = embeddings.matches(np.arange(start, stop), columns)
        for index in range(start, stop):
            for earlier in matches.get(index, ()):
                leader = first[earlier]
                joined = compared[earlier] and (leader == earlier or embeddings.within_radius(leader, index))
                if joined:
                    first[index] = leader
                    break
            members[first[index]] += 1
            compared[index] = members[first[index]] <= _COMPARED
    return first


class _Embeddings:
    """Thumbnails minus their mean color, divided by their contrast. Candidates are found at 8×8 by matrix products:
    averaging cells never increases a distance, so no pair is lost.
    """

    def __init__(self, thumbnails: Bytes, sizes: Sequence[tuple[int, int]]) -> None:
        self.thumbnails = thumbnails.reshape(len(thumbnails), THUMBNAIL * THUMBNAIL, 3)
        self.log_aspect = np.log([width / height for width, height in sizes])
        self.slack = np.array([0.025 + 1 / min(size) for size in sizes])  # a resized image has whole pixels
        self.mean = np.empty((len(thumbnails), 3), np.float32)
        self.contrast = np.empty(len(thumbnails), np.float32)
        self.coarse = np.empty((len(thumbnails), _CELLS * _CELLS * 3), np.float32)
        for start in range(0, len(thumbnails), _PAIRS):
            some = np.arange(start, min(start + _PAIRS, len(thumbnails)))
            pixels = self.thumbnails[some].astype(np.float32)
            self.mean[some] = pixels.mean(1)
            self.contrast[some] = np.sqrt(np.square(pixels - self.mean[some][:, None]).mean((1, 2)))
            embedded = self._embedded(some).reshape(-1, _CELLS, _SIDE, _CELLS, _SIDE, 3)
            self.coarse[some] = embedded.mean((2, 4)).reshape(len(some), -1)
        self.squares = np.einsum("nd,nd->n", self.coarse, self.coarse)

    def _embedded(self, which: Indices, mirrored: bool = False) -> Floats:
        pixels = self.thumbnails[which]
        if mirrored:
            pixels = pixels.reshape(-1, THUMBNAIL, THUMBNAIL, 3)[:, :, ::-1].reshape(pixels.shape)
        return (pixels - self.mean[which][:, None]) / (self.contrast[which] + np.float32(_NOISE))[:, None, None]

    def matches(self, rows: Indices, columns: Indices) -> dict[int, list[int]]:
        """Row → its near-duplicates among earlier columns, in order."""
        found: dict[int, set[int]] = {}
        # -|a - b|² / 2 as one product: [a, -|a|² / 2, 1] · [b, 1, -|b|² / 2].
        halves, ones = self.squares[:, None] / -2, np.ones((len(self.squares), 1), np.float32)
        minimum = -self.coarse.shape[1] * (_TOUCHED_OVERALL * 1.01) ** 2 / 2  # products are rounded
        coarse = self.coarse[rows]
        flipped = coarse.reshape(-1, _CELLS, _CELLS, 3)[:, :, ::-1].reshape(coarse.shape)
        for mirrored, seen in ((False, coarse), (True, flipped)):
            seen = np.concatenate([seen, halves[rows], ones[rows]], axis=1)
            for start in range(0, len(columns), _COLUMNS):
                part = columns[start : start + _COLUMNS]
                others = np.concatenate([self.coarse[part], ones[part], halves[part]], axis=1)
                row, column = np.nonzero(seen @ others.T > minimum)
                before = part[column] < rows[row]
                row, column = rows[row[before]], part[column[before]]
                for first in range(0, len(row), _PAIRS):
                    pair = row[first : first + _PAIRS], column[first : first + _PAIRS]
                    near = self.are_near(*pair, mirrored)
                    for one, other in zip(pair[0][near].tolist(), pair[1][near].tolist(), strict=True):
                        found.setdefault(one, set()).add(other)
        return {row: sorted(others) for row, others in found.items()}

    def are_near(self, rows: Indices, columns: Indices, mirrored: bool) -> NDArray[np.bool_]:
        difference = self._embedded(rows) - self._embedded(columns, mirrored)  # [n, 256, 3]
        cells = np.sqrt(np.square(difference).reshape(len(rows), -1) @ _POOL)  # [n, 64]
        overall = np.sqrt(np.square(cells).mean(1))
        beside = np.partition(cells, -1 - _TOUCHED_CELLS, axis=1)[:, -1 - _TOUCHED_CELLS]
        processed = (overall < _OVERALL) & (cells.max(1) < _CELL)
        touched = (overall < _TOUCHED_OVERALL) & (beside < _TOUCHED_CELL)
        shape = np.abs(self.log_aspect[rows] - self.log_aspect[columns]) < self.slack[rows] + self.slack[columns]
        gain = (self.contrast[rows] + 1) / (self.contrast[columns] + 1)
        # Brightening scales mean and contrast alike; other changes hardly move the mean.
        brighter = np.abs(self.mean[rows] - gain[:, None] * self.mean[columns]).max(1)
        shift = np.minimum(brighter, np.abs(self.mean[rows] - self.mean[columns]).max(1))
        contrast = np.minimum(self.contrast[rows], self.contrast[columns])
        bound = 0.25 * contrast + np.minimum(contrast, 4) + 4.5
        return (processed | touched) & shape & (np.abs(np.log(gain)) < np.log(_GAIN)) & (shift < bound)

    def within_radius(self, one: int, other: int) -> bool:
        """Whether two images, mirrored or not, are near enough for one cluster."""
        ours, theirs = np.array([one]), np.array([other])
        sides = (self._embedded(ours, mirrored) for mirrored in (False, True))
        return bool(min(np.square(side - self._embedded(theirs)).mean() for side in sides) < _RADIUS**2)


# [768, 64]: averages 2×2 pixels and three colors.
_CELL_OF = np.arange(_CELLS * _CELLS).reshape(_CELLS, _CELLS).repeat(_SIDE, 0).repeat(_SIDE, 1)  # [16, 16]
_POOL = np.eye(_CELLS * _CELLS, dtype=np.float32)[_CELL_OF.ravel().repeat(3)] / np.float32(3 * _SIDE**2)
