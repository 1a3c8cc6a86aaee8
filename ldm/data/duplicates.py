"""Near-duplicate detection: re-saved, resized, brightened, retouched and mirrored copies.

Images are reduced to 16×16 RGB pixels, minus their mean color, divided by their contrast (RMS). Two images are
near-duplicates if these differ, in units of the contrast, by

- RMS below 0.10 and below 0.30 in each of 8×8 cells (a global change), or
- RMS below 0.20 and below 0.05 in all cells but four (a local retouch),

and if aspect ratio, contrast and mean color are about the same. Measured in docs/data.md ("Near-duplicates").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 16
_CELLS = 8
_SIDE = THUMBNAIL // _CELLS

# Calibrated on the table in docs/data.md.
_OVERALL, _CELL = 0.10, 0.30
_TOUCHED_OVERALL, _TOUCHED_CELL, _TOUCHED_CELLS = 0.20, 0.05, 4
# Noise of flat images, in gray levels.
_NOISE = 7.0
_GAIN = 1.33
# The distance of a member from the first of its cluster, so that chains of similar images end.
_RADIUS = 0.25
# Members of a cluster that later images are compared with, so that large clusters stay cheap.
_COMPARED = 16

_ROWS, _COLUMNS, _PAIRS = 256, 8192, 4096

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def thumbnail(image: Image.Image) -> Bytes:
    """An RGB image of any size → uint8 [16, 16, 3]; the aspect ratio is ignored."""
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def near_duplicate_clusters(thumbnails: Bytes, sizes: Sequence[tuple[int, int]]) -> Indices:
    """For each image, the index of the first one in its cluster of near-duplicates.

    An image joins the cluster of its earliest near-duplicate if it is also near the first of that cluster. Clusters are
    never merged, and images appended at the end do not change earlier results. All pairs are compared in blocks:
    100,000 images take minutes, and 1.5 kB of memory per image.

    Args:
        thumbnails: uint8 [N, 16, 16, 3], from `thumbnail`.
        sizes: (width, height) of each image in pixels.

    Returns:
        int64 [N], each at most its position.
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
    """Thumbnails minus their mean color, divided by their contrast; candidates are found at 8×8 by matrix products.

    Averaging cells never increases a distance, so no pair is lost at 8×8.
    """

    def __init__(self, thumbnails: Bytes, sizes: Sequence[tuple[int, int]]) -> None:
        self.thumbnails = thumbnails.reshape(len(thumbnails), THUMBNAIL * THUMBNAIL, 3)
        self.log_aspect = np.log([width / height for width, height in sizes])
        # A resized image has whole pixels.
        self.slack = np.array([0.025 + 1 / min(size) for size in sizes])
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
        for mirrored in (False, True):
            for row, column in self._candidates(rows, columns, mirrored):
                for start in range(0, len(row), _PAIRS):
                    pair = row[start : start + _PAIRS], column[start : start + _PAIRS]
                    near = self._near(*pair, mirrored)
                    for one, other in zip(pair[0][near].tolist(), pair[1][near].tolist(), strict=True):
                        found.setdefault(one, set()).add(other)
        return {row: sorted(others) for row, others in found.items()}

    def _candidates(self, rows: Indices, columns: Indices, mirrored: bool) -> Iterator[tuple[Indices, Indices]]:
        seen = self.coarse[rows]
        if mirrored:
            seen = seen.reshape(-1, _CELLS, _CELLS, 3)[:, :, ::-1].reshape(seen.shape)
        # -|a - b|² / 2 as one product: [a, -|a|² / 2, 1] · [b, 1, -|b|² / 2].
        halves, ones = self.squares[:, None] / -2, np.ones((len(self.squares), 1), np.float32)
        seen = np.concatenate([seen, halves[rows], ones[rows]], axis=1)
        # 1 % more than the bound, as products are rounded.
        minimum = -self.coarse.shape[1] * (_TOUCHED_OVERALL * 1.01) ** 2 / 2
        for start in range(0, len(columns), _COLUMNS):
            part = columns[start : start + _COLUMNS]
            others = np.concatenate([self.coarse[part], ones[part], halves[part]], axis=1)
            row, column = np.nonzero(seen @ others.T > minimum)
            before = part[column] < rows[row]
            yield rows[row[before]], part[column[before]]

    def _near(self, rows: Indices, columns: Indices, mirrored: bool) -> NDArray[np.bool_]:
        difference = self._embedded(rows) - self._embedded(columns, mirrored)  # [n, 256, 3]
        cells = np.sqrt(np.square(difference).reshape(len(rows), -1) @ _POOL)  # [n, 64]
        overall = np.sqrt(np.square(cells).mean(1))
        beside = np.partition(cells, -1 - _TOUCHED_CELLS, axis=1)[:, -1 - _TOUCHED_CELLS]
        processed = (overall < _OVERALL) & (cells.max(1) < _CELL)
        touched = (overall < _TOUCHED_OVERALL) & (beside < _TOUCHED_CELL)
        return (processed | touched) & self._alike(rows, columns)

    def _alike(self, rows: Indices, columns: Indices) -> NDArray[np.bool_]:
        """Whether aspect ratio, contrast and mean color are about the same."""
        shape = np.abs(self.log_aspect[rows] - self.log_aspect[columns]) < self.slack[rows] + self.slack[columns]
        gain = (self.contrast[rows] + 1) / (self.contrast[columns] + 1)
        # Brightening scales mean and contrast alike; other changes hardly move the mean.
        brighter = np.abs(self.mean[rows] - gain[:, None] * self.mean[columns]).max(1)
        shift = np.minimum(brighter, np.abs(self.mean[rows] - self.mean[columns]).max(1))
        contrast = np.minimum(self.contrast[rows], self.contrast[columns])
        bound = 0.25 * contrast + np.minimum(contrast, 4) + 4.5
        return shape & (np.abs(np.log(gain)) < np.log(_GAIN)) & (shift < bound)

    def within_radius(self, one: int, other: int) -> bool:
        """Whether two images, mirrored or not, are near enough for one cluster."""
        ours, theirs = np.array([one]), np.array([other])
        sides = (self._embedded(ours, mirrored) for mirrored in (False, True))
        return bool(min(np.square(side - self._embedded(theirs)).mean() for side in sides) < _RADIUS**2)


def _pool() -> Floats:
    """[768, 64]: a matrix that averages 2×2 pixels and three colors."""
    cells = np.arange(_CELLS * _CELLS).reshape(_CELLS, _CELLS).repeat(_SIDE, 0).repeat(_SIDE, 1)  # [16, 16]
    return np.eye(_CELLS * _CELLS, dtype=np.float32)[cells.ravel().repeat(3)] / np.float32(3 * _SIDE**2)


_POOL = _pool()
