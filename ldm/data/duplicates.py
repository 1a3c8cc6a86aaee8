"""Which images are one picture: saved again, resized, brightened, touched up a little, or mirrored.

Every image is reduced to 16×16 RGB pixels, its mean colour removed and its contrast (root mean square of what
remains) divided out, so that brightness and gain do not count. Two images are near-duplicates if these differ, in
units of the contrast, by

- less than 0.10 (root mean square) and less than 0.30 in each of 8×8 cells: the picture was processed as a whole; or
- less than 0.20, and less than 0.05 in all cells but four: it was touched up in one place.

Besides, shape, contrast and mean colour must be about the same. Mirrored images are compared too, as training flips.

Measured: copies found, in per cent of 300 (openmoji) and of 168 (96 pixel pieces of two photographs, a third of them
sky or petals with hardly any contrast; whole photographs are easier).

    copy                          openmoji 128 px   openmoji 64 px   photographs 96 px
    mirrored                            100               100              100
    half the size                       100               100              100
    JPEG, quality 75 / 30             100 / 100         100 / 100        100 / 80
    mirrored, half size, JPEG 30         99                22               39
    brightness x 0.9 / x 1.1          100 / 95          100 / 96         97 / 86
    contrast x 0.9 / saturation x 0.8 100 / 100         100 / 100        100 / 93
    64 colours                          100               100               89
    a spot of 1/14 of the width          98                99               76
    2 % cropped away                      1                 1               92

Different pictures taken for one: of the 1.8 million pairs of openmoji 199, all but 92 of which are identical, mirrored
or variants of one emoji; the 92 are the clocks of neighbouring hours, neighbouring smileys, and flags that share their
stripes. Of the 1.6 million pairs of scans of scikit-learn's digits none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 16
_CELLS = 8
_SIDE = THUMBNAIL // _CELLS

# What follows is calibrated: see the table above.
_OVERALL, _CELL = 0.10, 0.30
_TOUCHED_OVERALL, _TOUCHED_CELL, _TOUCHED_CELLS = 0.20, 0.05, 4
# Noise of this many grey levels counts as no contrast: a flat image has nothing else.
_NOISE = 7.0
_GAIN = 1.33
# How far a member may be from the first of its cluster, so that chains of look-alikes end.
_RADIUS = 0.25
# Members of a cluster that later images are compared with; more would make the work quadratic in a cluster's size.
_COMPARED = 16

_ROWS, _COLUMNS, _PAIRS = 256, 8192, 4096

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def thumbnail(image: Image.Image) -> Bytes:
    """An RGB image of any size → uint8 [16, 16, 3], its shape disregarded."""
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def near_duplicate_clusters(thumbnails: Bytes, sizes: Sequence[tuple[int, int]]) -> Indices:
    """For each image, the first one of its cluster of near-duplicates; its own index where it stands first or alone.

    An image joins the cluster of the earliest image that it nearly duplicates, if it is also not too far from the
    first of that cluster; it never joins two clusters into one. So a cluster has a bounded width, however long a chain
    of look-alikes is, and images that are added at the end never change what is said of those before them. All pairs
    are compared, in blocks: 100,000 images take minutes, and memory for 1.5 kB an image.

    Args:
        thumbnails: uint8 [N, 16, 16, 3], from `thumbnail`.
        sizes: width and height of each image in pixels.

    Returns:
        int64 [N], each at most its position.
    """
    pictures = _Pictures(thumbnails, sizes)
    first = np.arange(len(thumbnails))
    members = np.zeros(len(thumbnails), np.int64)
    compared = np.zeros(len(thumbnails), bool)
    for start in range(0, len(thumbnails), _ROWS):
        stop = min(start + _ROWS, len(thumbnails))
        columns = np.concatenate([np.flatnonzero(compared[:start]), np.arange(start, stop)])
        matches = pictures.matches(np.arange(start, stop), columns)
        for index in range(start, stop):
            for earlier in matches.get(index, ()):
                leader = first[earlier]
                joined = compared[earlier] and (leader == earlier or pictures.within_radius(leader, index))
                if joined:
                    first[index] = leader
                    break
            members[first[index]] += 1
            compared[index] = members[first[index]] <= _COMPARED
    return first


class _Pictures:
    """All thumbnails, and their embeddings at 8×8, of which distances are quick matrix products.

    The embedding of a thumbnail is what remains without its mean colour, divided by its contrast. Averaging cells only
    shortens a difference, so that no pair is lost by comparing at 8×8 first.
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
        """Row → the columns before it that it nearly duplicates, the earliest first."""
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
        # A little more than the bound: products are rounded.
        least = -self.coarse.shape[1] * (_TOUCHED_OVERALL * 1.01) ** 2 / 2
        for start in range(0, len(columns), _COLUMNS):
            part = columns[start : start + _COLUMNS]
            others = np.concatenate([self.coarse[part], ones[part], halves[part]], axis=1)
            row, column = np.nonzero(seen @ others.T > least)
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
        """Whether shape, contrast and mean colour are about the same."""
        shape = np.abs(self.log_aspect[rows] - self.log_aspect[columns]) < self.slack[rows] + self.slack[columns]
        gain = (self.contrast[rows] + 1) / (self.contrast[columns] + 1)
        # Brightening multiplies mean and contrast alike; other changes leave the mean about where it is.
        brighter = np.abs(self.mean[rows] - gain[:, None] * self.mean[columns]).max(1)
        shift = np.minimum(brighter, np.abs(self.mean[rows] - self.mean[columns]).max(1))
        least = np.minimum(self.contrast[rows], self.contrast[columns])
        bound = 0.25 * least + np.minimum(least, 4) + 4.5
        return shape & (np.abs(np.log(gain)) < np.log(_GAIN)) & (shift < bound)

    def within_radius(self, one: int, other: int) -> bool:
        """Whether two images are near enough, one of them mirrored or not, to be of one cluster."""
        ours, theirs = np.array([one]), np.array([other])
        sides = (self._embedded(ours, mirrored) for mirrored in (False, True))
        return bool(min(np.square(side - self._embedded(theirs)).mean() for side in sides) < _RADIUS**2)


def _pool() -> Floats:
    """[768, 64]: means of 2×2 pixels and their three colours, as a matrix."""
    cells = np.arange(_CELLS * _CELLS).reshape(_CELLS, _CELLS).repeat(_SIDE, 0).repeat(_SIDE, 1)  # [16, 16]
    return np.eye(_CELLS * _CELLS, dtype=np.float32)[cells.ravel().repeat(3)] / np.float32(3 * _SIDE**2)


_POOL = _pool()
