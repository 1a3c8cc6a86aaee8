"""Inspection of a data set before training: which images can be used, and which are duplicates."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import features

from ldm.cores import usable_cores
from ldm.data.cache import RowCache
from ldm.data.duplicates import THUMBNAIL, Bytes, near_duplicate_clusters, thumbnail
from ldm.data.images import FORMATS, cutout_color
from ldm.data.rng import content_hash
from ldm.data.sources import CaptionSource, DataConfig, Sample, Skipped, Source

# Images between two writes of the cache, which an interruption loses.
_BLOCK = 256
_PROGRESS_DELAY = 2.0  # seconds
# Raised when the record or the result of `decode` changes.
_VERSION = 6
# Of an image in the cache; `rest` is JSON: size, format, cutout.
_RECORD = np.dtype([("pixels", "u1", 16), ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3)), ("rest", "S240")])


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
        name: of the source.
        used: the samples to train on, in the order of the source, with digest and size. Near-duplicates share a group.
        skipped: unusable entries and the reasons, in natural order.
        duplicates: exact copies, in natural order. Their captions are added to the used sample.
        near_duplicates: ids of used samples that show the same picture, re-saved, resized, retouched or mirrored.
        formats: of each used sample; empty for a curated source that was not inspected.
        cache_error: why the image info could not be cached; "" if it was.
        caption_sources: of the source.
    """

    name: str
    used: tuple[Sample, ...]
    skipped: tuple[Skipped, ...]
    duplicates: tuple[Duplicate, ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()
    formats: tuple[ImageFormat, ...] = ()
    cache_error: str = ""
    caption_sources: tuple[CaptionSource, ...] = ()

    @property
    def total(self) -> int:
        """The number of entries of the source: used + skipped + duplicates."""
        return len(self.used) + len(self.skipped) + len(self.duplicates)


def inspect(
    source: Source,
    config: DataConfig,
    *,
    workers: int | None = None,
    progress: bool = False,
    include_curated: bool = False,
) -> Inspection:
    """Hashes and decodes every image, finds duplicates, and groups near-duplicates.

    The bytes are hashed every time. What decoding tells is cached by their hash, so that the next start decodes new
    images only.

    Of exact copies (same upright RGB pixels on the background) the first in natural order is used, with the captions
    of all. Near-duplicates (`near_duplicate_clusters`) get the group of the first in natural order. So files that sort
    last leave older groups as they are, unless one ties two of them together; files that sort first may rename groups,
    and so move them to the other side of the split.

    Args:
        workers: number of threads; None is one per usable core. The result does not depend on it.
        progress: show a progress bar on stderr after two seconds.
        include_curated: also inspect curated sources. Their samples are not dropped or regrouped.
    """
    if source.curated and not include_curated:
        return Inspection(source.name, source.samples, source.skipped, caption_sources=source.caption_sources)
    assert len({sample.id for sample in source.samples}) == len(source.samples), "ids are distinct"
    found, unreadable, thumbnails, cache_error = _decode_all(source, config, workers, progress)
    by_name = sorted(found, key=lambda one: natural_order(one.sample.id))
    copies: dict[str, _Found] = {}  # id → the used sample with the same pixels
    if not source.curated:
        first: dict[bytes, _Found] = {}
        for one in by_name:
            if first.setdefault(one.pixels, one) is not one:
                copies[one.sample.id] = first[one.pixels]
    captions: dict[str, tuple[str, ...]] = {}  # of the samples that have copies
    duplicates = []
    for one in by_name:
        of = copies.get(one.sample.id)
        if of is not None:
            so_far = captions.get(of.sample.id, of.sample.captions)
            added = tuple(text for text in dict.fromkeys(one.sample.captions) if text not in so_far)
            captions[of.sample.id] = so_far + added
            duplicates.append(Duplicate(one.sample.display_name, of.sample.display_name, added))
    distinct = [one for one in by_name if one.sample.id not in copies]
    firsts = near_duplicate_clusters(thumbnails[[one.place for one in distinct]], [one.size for one in distinct])
    members: dict[int, list[_Found]] = defaultdict(list)
    for one, of_cluster in zip(distinct, firsts.tolist(), strict=True):
        members[of_cluster].append(one)
    clusters = [cluster for _, cluster in sorted(members.items()) if len(cluster) > 1]
    groups = {} if source.curated else _merge_groups(by_name, copies, clusters)
    used = [one for one in found if one.sample.id not in copies]
    inspection = Inspection(
        source.name,
        tuple(
            replace(
                one.sample,
                captions=captions.get(one.sample.id, one.sample.captions),
                group=groups.get(one.sample.group, one.sample.group),
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
    )
    assert inspection.total == len(source.samples) + len(source.skipped), "every sample is counted once"
    return inspection


def natural_order(path: str) -> tuple[object, ...]:
    """A sort key: "x2" before "x10", "x.png" before "x (1).png" and "x_copy.png"."""
    *folders, name = path.split("/")
    stem, dot, suffix = name.rpartition(".") if "." in name[1:] else (name, "", "")
    return tuple(_tokens(part) for part in (*folders, stem)), _tokens(dot + suffix), path


def _tokens(text: str) -> tuple[object, ...]:
    """ "a10b" → ("a", (2, "10"), "b"): numbers compare by their length, then by their digits."""
    parts: list[object] = list(re.split(r"([0-9]+)", text.casefold()))
    for place in range(1, len(parts), 2):
        digits = str(parts[place]).lstrip("0")
        parts[place] = (len(digits), digits)
    return tuple(parts)


class _Info(NamedTuple):
    """What decoding tells of an image: a hash of the size and the RGB pixels, size, format, cutout (`Sample`) and
    `duplicates.thumbnail`.
    """

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


def _write_info(cache: RowCache, info: Mapping[str, _Info]) -> None:
    records = np.zeros(len(info), _RECORD)
    for record, one in zip(records, info.values(), strict=True):
        rest = json.dumps([one.size, one.format, one.cutout]).encode()
        assert len(rest) <= _RECORD["rest"].itemsize, f"{rest!r} would be cut short"
        record["pixels"] = np.frombuffer(one.pixels, np.uint8)
        record["thumbnail"], record["rest"] = one.thumbnail, rest
    if len(info):
        cache.add(list(info), torch.from_numpy(records.view(np.uint8).reshape(len(info), -1)))


def _read_info(cache: RowCache, digests: Sequence[str]) -> dict[str, _Info]:
    """The info by hash, without that of damaged files."""
    missing = {digests[place] for place in cache.missing(digests)}
    hits = [digest for digest in dict.fromkeys(digests) if digest not in missing]
    found: dict[str, _Info] = {}
    if not hits:
        return found
    records = cache.open(hits)[range(len(hits))].numpy().view(_RECORD)[:, 0]
    for digest, record in zip(hits, records, strict=True):
        size, (format, mode, traits), cutout = json.loads(record["rest"])
        stored = ImageFormat(format, mode, tuple(traits))
        color = None if cutout is None else tuple(cutout)
        found[digest] = _Info(record["pixels"].tobytes(), tuple(size), stored, color, record["thumbnail"])
    return found


def _decode_all(
    source: Source, config: DataConfig, workers: int | None, progress: bool
) -> tuple[list[_Found], list[Skipped], Bytes, str]:
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
        # Pillow warns on stderr, without a name; problems that matter are in the report.
        warnings.catch_warnings(),
        tqdm(
            total=len(samples), desc="looking at images", unit=" images", disable=not progress, delay=_PROGRESS_DELAY
        ) as bar,
        # Decoding, hashing and resizing release the interpreter lock.
        ThreadPoolExecutor(workers or usable_cores()) as pool,
    ):
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        for start in range(0, len(samples), _BLOCK):
            block = samples[start : start + _BLOCK]
            results = list(pool.map(lambda sample: _examine(sample, known, source.captioned), block))
            hits = [one[0] for one in results if not isinstance(one, str) and one[1] is None]
            cached = _read_info(cache, hits) if cache else {}
            new = {}
            for place, result in enumerate(results, start):
                # Damaged records are computed again.
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
            try:
                if cache and not cache_error:
                    _write_info(cache, new)
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


def _merge_groups(
    by_name: Sequence[_Found], copies: Mapping[str, _Found], clusters: Sequence[Sequence[_Found]]
) -> dict[str, str]:
    """Group of the source → merged group, named after its first in natural order (union-find)."""
    rank: dict[str, int] = {}
    for one in by_name:
        rank.setdefault(one.sample.group, len(rank))
    parent = {group: group for group in rank}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    ties = [(one.sample.group, copies[one.sample.id].sample.group) for one in by_name if one.sample.id in copies]
    ties += [(cluster[0].sample.group, one.sample.group) for cluster in clusters for one in cluster[1:]]
    for tie in ties:
        earlier, later = sorted(map(root, tie), key=rank.__getitem__)
        parent[later] = earlier
    return {group: root(group) for group in rank}
