"""Image info (size, hash of the pixels, thumbnail), cached on disk by the hash of the file."""

from __future__ import annotations

import hashlib
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from ldm.data.duplicates import THUMBNAIL, Bytes, thumbnail
from ldm.data.images import FORMATS, cutout_color
from ldm.data.sources import DataConfig, Decoded

# Raised when the record or the result of `decode` changes.
_VERSION = 4

_DIGEST = 16
_RECORD = np.dtype(
    [
        ("digest", np.uint8, _DIGEST),
        ("pixels", np.uint8, _DIGEST),
        ("size", "<u4", 2),
        ("format", "S8"),
        ("mode", "S8"),
        ("traits", "S96"),
        ("thumbnail", np.uint8, (THUMBNAIL, THUMBNAIL, 3)),
        ("is_cutout", np.uint8),
        ("cutout", np.uint8, 3),
        ("check", "<u4"),
    ]
)
Records = NDArray[np.void]


@dataclass(frozen=True)
class ImageInfo:
    """What is known of one image.

    Args:
        pixels: hash of the size and the RGB pixels.
        size: (width, height) in pixels, upright.
        format, mode, traits: as in `Decoded`.
        thumbnail: uint8 [16, 16, 3], from `duplicates.thumbnail`.
        cutout: as in `Sample`.
    """

    pixels: bytes
    size: tuple[int, int]
    format: str
    mode: str
    traits: tuple[str, ...]
    thumbnail: Bytes
    cutout: tuple[int, int, int] | None = None


def image_info(decoded: Decoded) -> ImageInfo:
    """The info of a decoded image."""
    image = decoded.image
    hashed = hashlib.blake2b(repr(image.size).encode(), digest_size=_DIGEST)
    hashed.update(image.tobytes())
    return ImageInfo(
        hashed.digest(),
        image.size,
        decoded.format,
        decoded.mode,
        decoded.traits,
        thumbnail(image),
        cutout_color(decoded.alpha, image),
    )


class ImageInfoCache:
    """Image info on disk by the digest of the file, in a folder named after everything else it depends on.

    Files are immutable and get random names, so that processes can write at the same time. Each record has a checksum;
    damaged ones count as missing. Undecodable images are not stored. Files begin with all digests, for fast lookups.
    """

    def __init__(self, config: DataConfig) -> None:
        depends = repr(
            (_VERSION, PIL.__version__, features.version("littlecms2"), FORMATS, config.background_rgb, _RECORD.descr)
        )
        self.folder = config.cache_folder / "facts" / hashlib.blake2b(depends.encode(), digest_size=8).hexdigest()

    def write(self, info: Sequence[tuple[str, ImageInfo]]) -> None:
        """Adds (digest, info) pairs. Raises OSError if the folder cannot be written."""
        if not info:
            return
        records = np.zeros(len(info), _RECORD)
        for record, (digest, known) in zip(records, info, strict=True):
            record["digest"] = np.frombuffer(bytes.fromhex(digest), np.uint8)
            record["pixels"] = np.frombuffer(known.pixels, np.uint8)
            record["size"] = known.size
            for field, text in (("format", known.format), ("mode", known.mode), ("traits", ",".join(known.traits))):
                assert len(text.encode()) <= _RECORD[field].itemsize, f"{text} would be cut short"
                record[field] = text.encode()
            record["thumbnail"] = known.thumbnail
            record["is_cutout"], record["cutout"] = known.cutout is not None, known.cutout or (0, 0, 0)
            record["check"] = _checksum(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = secrets.token_hex(8)
        temporary = self.folder / f".{name}.part"
        try:
            with open(temporary, "wb") as file:
                file.write(records["digest"].tobytes() + records.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}.facts")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def open(self) -> CachedImageInfo:
        """The present content."""
        return CachedImageInfo(sorted(self.folder.glob("*.facts")))


class CachedImageInfo:
    """Image info in some files, by digest. Digests are in memory, records are read on demand."""

    def __init__(self, paths: Sequence[Path]) -> None:
        keys, places = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.int64)]
        for number, path in enumerate(paths):
            found = _keys(path)
            keys.append(found)
            places.append(np.stack([np.full(len(found), number), np.arange(len(found))], axis=1))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys, self._places, self._paths = joined[order], np.concatenate(places)[order], list(paths)
        # Starts read images in a similar order, so neighbors are in one file.
        self._records = lru_cache(maxsize=64)(_records)

    def get(self, digest: str) -> ImageInfo | None:
        """The info of an image; None if there is no intact record."""
        wanted = np.frombuffer(bytes.fromhex(digest), np.uint8)
        key = wanted[:8].view("<u8")[0]
        start, stop = np.searchsorted(self._keys, [key, key + np.uint64(1)]) if key < _LAST_KEY else (0, 0)
        for file, row in self._places[start:stop]:
            records = self._records(self._paths[file])
            if row < len(records) and (records[row]["digest"] == wanted).all():
                record = records[row]
                if record["check"] == _checksum(record):
                    return _info(record)
        return None


# key + 1 would overflow; an image with this key is always decoded again.
_LAST_KEY = np.uint64(2**64 - 1)


def _keys(path: Path) -> NDArray[np.uint64]:
    """The first 8 bytes of each digest in a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            count = os.fstat(file.fileno()).st_size // (_DIGEST + _RECORD.itemsize)
            stored = file.read(count * _DIGEST)
    except OSError:
        return np.zeros(0, np.uint64)
    return np.frombuffer(stored, "<u8")[::2].astype(np.uint64)


def _records(path: Path) -> Records:
    try:
        stored = path.read_bytes()
    except OSError:
        return np.zeros(0, _RECORD)
    count = len(stored) // (_DIGEST + _RECORD.itemsize)
    return np.frombuffer(stored, _RECORD, count, offset=count * _DIGEST)


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[: _RECORD.itemsize - 4])


def _info(record: np.void) -> ImageInfo:
    width, height = record["size"].tolist()
    traits = tuple(record["traits"].decode().split(",")) if record["traits"] else ()
    red, green, blue = record["cutout"].tolist()
    return ImageInfo(
        record["pixels"].tobytes(),
        (width, height),
        record["format"].decode(),
        record["mode"].decode(),
        traits,
        record["thumbnail"].copy(),
        (red, green, blue) if record["is_cutout"] else None,
    )
