"""Image info (size, hash of the pixels, thumbnail), cached on disk by the hash of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from PIL import features

from ldm.data.cache import RowCache
from ldm.data.duplicates import THUMBNAIL, Bytes, thumbnail
from ldm.data.images import FORMATS, cutout_color
from ldm.data.sources import DataConfig, Decoded

# Raised when the record or the result of `decode` changes.
_VERSION = 5

_DIGEST = 16
_RECORD = np.dtype(
    [
        ("pixels", np.uint8, _DIGEST),
        ("size", "<u4", 2),
        ("format", "S8"),
        ("mode", "S8"),
        ("traits", "S96"),
        ("thumbnail", np.uint8, (THUMBNAIL, THUMBNAIL, 3)),
        ("is_cutout", np.uint8),
        ("cutout", np.uint8, 3),
    ]
)


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
    """Image info by the hash of the file, in a folder named after everything else it depends on.

    Undecodable images are not stored.

    Attributes:
        known: the hashes that were stored at the start.
    """

    def __init__(self, config: DataConfig) -> None:
        depends = repr(
            (_VERSION, PIL.__version__, features.version("littlecms2"), FORMATS, config.background_rgb, _RECORD.descr)
        )
        name = hashlib.blake2b(depends.encode(), digest_size=8).hexdigest()
        self._rows = RowCache(config.cache_folder / "facts" / name, print=lambda _: None)
        self.folder = self._rows.folder
        self.known = self._rows.keys()

    def write(self, info: Mapping[str, ImageInfo]) -> None:
        """Adds info by hash. Raises ValueError if the folder cannot be written."""
        if not info:
            return
        records = np.zeros(len(info), _RECORD)
        for record, one in zip(records, info.values(), strict=True):
            record["pixels"] = np.frombuffer(one.pixels, np.uint8)
            record["size"] = one.size
            for field, text in (("format", one.format), ("mode", one.mode), ("traits", ",".join(one.traits))):
                assert len(text.encode()) <= _RECORD[field].itemsize, f"{text} would be cut short"
                record[field] = text.encode()
            record["thumbnail"] = one.thumbnail
            record["is_cutout"], record["cutout"] = one.cutout is not None, one.cutout or (0, 0, 0)
        self._rows.add(list(info), torch.from_numpy(records.view(np.uint8).reshape(len(info), -1)))

    def read(self, digests: Sequence[str]) -> dict[str, ImageInfo]:
        """The info by hash, without that of damaged files."""
        missing = {digests[place] for place in self._rows.missing(digests)}
        found = [digest for digest in dict.fromkeys(digests) if digest not in missing]
        if not found:
            return {}
        records = self._rows.open(found)[range(len(found))].numpy().view(_RECORD)[:, 0]
        return {digest: _info(record) for digest, record in zip(found, records, strict=True)}


def _info(record: np.void) -> ImageInfo:
    width, height = record["size"].tolist()
    red, green, blue = record["cutout"].tolist()
    return ImageInfo(
        record["pixels"].tobytes(),
        (width, height),
        record["format"].decode(),
        record["mode"].decode(),
        tuple(record["traits"].decode().split(",")) if record["traits"] else (),
        record["thumbnail"].copy(),
        (red, green, blue) if record["is_cutout"] else None,
    )
