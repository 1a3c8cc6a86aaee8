"""Looking at every image before training: what can be used, what cannot and why, and what is there twice."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ldm.cores import usable_cores
from ldm.data.duplicates import THUMBNAIL, Bytes, near_duplicate_clusters
from ldm.data.image_info import CachedImageInfo, ImageInfo, ImageInfoCache, image_info
from ldm.data.rng import content_hash
from ldm.data.sources import CaptionSource, DataConfig, Sample, Skipped, Source

# Images that are looked at before what was found is written: what an interruption costs.
_BLOCK = 256
_BAR_AFTER = 2.0  # seconds


class ImageFormat(NamedTuple):
    """How an image is stored, and what is done with it: see `Decoded`."""

    format: str
    mode: str
    traits: tuple[str, ...]


@dataclass(frozen=True)
class Duplicate:
    """A sample that shows exactly the pixels of another, `of`, and captions which that one did not have.

    Both are named as a person finds them: `Sample.display_name`.
    """

    path: str
    of: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What a source holds.

    Args:
        name: that of the source.
        used: what there is to train on, in the order of the source, with digests and sizes. Near-duplicates share
            a group, and so a side of the split.
        skipped: what cannot be used, and why, in natural order.
        duplicates: exact copies, in natural order: not used themselves, but their captions are.
        near_duplicates: ids of used samples that show the same image, re-saved, resized, retouched or mirrored.
        formats: of each used sample; empty where a curated source was passed through unseen.
        cache_error: why what was found could not be kept for the next start; "" where it was.
        caption_sources: those of the source.
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
        """All that the source named: used + skipped + duplicates."""
        return len(self.used) + len(self.skipped) + len(self.duplicates)


def inspect(
    source: Source,
    config: DataConfig,
    *,
    workers: int | None = None,
    progress: bool = False,
    everything: bool = False,
) -> Inspection:
    """Reads, hashes and decodes every image once, and says what can be trained on.

    What decoding tells is kept under `config.cache_folder / "facts"` by the digest of the bytes, so that the next
    start only reads and hashes. The bytes are hashed every time: an edit that keeps size and time is seen too.

    Of exact copies (the same upright RGB pixels on the background) the first in natural order is used, with the
    captions of all. The group of near-duplicates (`near_duplicate_clusters`) is that of the first in natural order. So
    files that sort behind all others leave the groups of those as they are, unless one of them ties two older groups
    together by sharing a caption file with one and the picture with the other. Files that sort before others may
    give them a new group, and with it another side of the split.

    Args:
        workers: threads; None for one a core that may be used. Their number changes nothing in the result.
        progress: a bar on stderr, if it takes longer than two seconds.
        everything: look at the images of a curated source too. Nothing of it is dropped or regrouped, for training
            takes it as it is; what is alike is only reported.
    """
    if source.curated and not everything:
        return Inspection(source.name, source.samples, source.skipped, caption_sources=source.caption_sources)
    assert len({sample.id for sample in source.samples}) == len(source.samples), "ids are distinct"
    store = None if source.curated else ImageInfoCache(config)
    found, unreadable, thumbnails, cache_error = _look(source, store, workers, progress)
    by_name = sorted(found, key=lambda one: natural_order(one.sample.id))
    first = by_name if source.curated else _first_of_pixels(by_name)
    copies = {one.sample.id: of for one, of in zip(by_name, first, strict=True) if one is not of}
    kept = [one for one in by_name if one.sample.id not in copies]
    near = _alike(kept, thumbnails)
    captions, duplicates = _merged(by_name, copies)
    groups = {} if source.curated else _groups(by_name, copies, near)
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
        tuple(tuple(one.sample.id for one in alike) for alike in near),
        tuple(one.kind for one in used),
        cache_error,
        source.caption_sources,
    )
    assert inspection.total == len(source.samples) + len(source.skipped), "every sample is accounted for once"
    return inspection


def natural_order(path: str) -> tuple[object, ...]:
    """A key to sort paths by as people do: "x2" before "x10", "x.png" before "x (1).png" and "x_copy.png"."""
    *folders, name = path.split("/")
    stem, dot, suffix = name.rpartition(".") if "." in name[1:] else (name, "", "")
    return tuple(_tokens(part) for part in (*folders, stem)), _tokens(dot + suffix), path


def _tokens(text: str) -> tuple[object, ...]:
    """ "a10b" → ("a", (2, "10"), "b"): text and numbers in turn, numbers by their length and then their digits."""
    parts: list[object] = list(re.split(r"([0-9]+)", text.casefold()))
    for place in range(1, len(parts), 2):
        digits = str(parts[place]).lstrip("0")
        parts[place] = (len(digits), digits)
    return tuple(parts)


class _Found(NamedTuple):
    """A sample that could be decoded; its thumbnail is at `place`."""

    sample: Sample
    digest: str
    pixels: bytes
    size: tuple[int, int]
    kind: ImageFormat
    place: int
    cutout: tuple[int, int, int] | None


def _look(
    source: Source, store: ImageInfoCache | None, workers: int | None, progress: bool
) -> tuple[list[_Found], list[Skipped], Bytes, str]:
    """(what can be decoded, what cannot, thumbnails [N, 16, 16, 3], why nothing is kept in `store`)."""
    samples = source.samples
    known = store.open() if store else None
    found: list[_Found] = []
    unreadable: list[Skipped] = []
    thumbnails = np.zeros((len(samples), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    kinds: dict[ImageFormat, ImageFormat] = {}  # one object for all that are alike
    cache_error = ""
    # Decoding, hashing and resizing release the interpreter lock, so threads use all cores.
    with _quiet_decoding(), _bar(len(samples), progress) as bar, ThreadPoolExecutor(workers or usable_cores()) as pool:
        for start in range(0, len(samples), _BLOCK):
            block = samples[start : start + _BLOCK]
            fresh = []
            for place, seen in enumerate(
                pool.map(lambda sample: _examine(sample, known, source.captioned), block), start
            ):
                if isinstance(seen, str):
                    unreadable.append(Skipped(samples[place].display_name, seen))
                    continue
                digest, info, is_fresh = seen
                if is_fresh:
                    fresh.append((digest, info))
                kind = ImageFormat(info.format, info.mode, info.traits)
                kind = kinds.setdefault(kind, kind)
                thumbnails[place] = info.thumbnail
                found.append(_Found(samples[place], digest, info.pixels, info.size, kind, place, info.cutout))
            bar.update(len(block))
            try:
                if store:
                    store.write(fresh)
            except OSError as error:
                cache_error, store = f"{store.folder if store else ''}: {error.strerror or error}", None
    return found, unreadable, thumbnails, cache_error


def _examine(sample: Sample, known: CachedImageInfo | None, captioned: bool) -> tuple[str, ImageInfo, bool] | str:
    """(digest, info, whether they had to be found out), or why the sample cannot be used."""
    if captioned and not sample.captions:
        return "no caption"
    try:
        data = sample.read()
        digest = content_hash(data)
        info = known.get(digest) if known else None
        return (digest, info, False) if info else (digest, image_info(sample.decode(data)), True)
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    except (ValueError, MemoryError) as error:
        return str(error) or type(error).__name__


@contextmanager
def _quiet_decoding() -> Iterator[None]:
    # Pillow warns of large images (decompression bombs), odd metadata and much else, on stderr and without a name.
    # What matters of it is in the account: an image either decodes or does not.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc="looking at images", unit=" images", disable=not progress, delay=_BAR_AFTER) as bar:
        yield bar


def _first_of_pixels(by_name: Sequence[_Found]) -> list[_Found]:
    """For each, the first that shows exactly the same."""
    first: dict[bytes, _Found] = {}
    return [first.setdefault(one.pixels, one) for one in by_name]


def _merged(
    by_name: Sequence[_Found], copies: Mapping[str, _Found]
) -> tuple[dict[str, tuple[str, ...]], list[Duplicate]]:
    """Captions of those that have copies, with what each copy adds; and the copies."""
    captions: dict[str, tuple[str, ...]] = {}
    duplicates = []
    for one in by_name:
        of = copies.get(one.sample.id)
        if of is not None:
            so_far = captions.get(of.sample.id, of.sample.captions)
            added = tuple(text for text in dict.fromkeys(one.sample.captions) if text not in so_far)
            captions[of.sample.id] = so_far + added
            duplicates.append(Duplicate(one.sample.display_name, of.sample.display_name, added))
    return captions, duplicates


def _alike(kept: Sequence[_Found], thumbnails: Bytes) -> list[list[_Found]]:
    """The clusters of near-duplicates that have more than one member, in the order given."""
    members: dict[int, list[_Found]] = defaultdict(list)
    for one, leader in zip(
        kept,
        near_duplicate_clusters(thumbnails[[one.place for one in kept]], [one.size for one in kept]).tolist(),
        strict=True,
    ):
        members[leader].append(one)
    return [cluster for _, cluster in sorted(members.items()) if len(cluster) > 1]


def _groups(
    by_name: Sequence[_Found], copies: Mapping[str, _Found], near: Iterable[Sequence[_Found]]
) -> dict[str, str]:
    """Group of the source → group to use: groups tied by a picture become that of their first in natural order."""
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
    ties += [(cluster[0].sample.group, one.sample.group) for cluster in near for one in cluster[1:]]
    for tie in ties:
        earlier, later = sorted(map(root, tie), key=rank.__getitem__)
        parent[later] = earlier
    return {group: root(group) for group in rank}
