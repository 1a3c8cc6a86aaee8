"""Near-duplicates: the table in docs/data.md, held on openmoji and the digits, and what clusters guarantee."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from ldm.data import DataConfig
from ldm.data.inspection import near_duplicate_clusters, thumbnail
from ldm.data.layouts import open_source


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def spotted(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((60, 30, 68, 38), fill=(200, 30, 90))
    return image


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 30": lambda image: jpeg(image, 30),
    "half": half,
    "double": lambda image: image.resize((256, 256), Image.Resampling.BICUBIC),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.8),
    "spotted": spotted,
    "mirrored": ImageOps.mirror,
    "mirrored, half, jpeg 30": lambda image: jpeg(half(ImageOps.mirror(image)), 30),
}


def first_of(images: list[Image.Image]) -> np.ndarray:
    return near_duplicate_clusters(np.stack([thumbnail(image) for image in images]), [image.size for image in images])


@pytest.fixture(scope="module")
def emoji() -> list[Image.Image]:
    """128 pixels wide; every 19th, so that few are variants of each other."""
    samples = open_source(DataConfig(path="openmoji", resolution=128)).samples
    return [sample.load() for sample in samples[::19]]


@pytest.mark.parametrize("kind", COPIES)
def test_processed_copies_join_their_original(kind: str, emoji: list[Image.Image]) -> None:
    count = len(emoji)
    first = first_of(emoji + [COPIES[kind](image) for image in emoji])
    found = (first[count:] == first[:count]).mean()
    assert found >= (0.9 if kind in ("brighter", "spotted") else 0.97)


def test_different_drawings_and_scans_stay_apart(emoji: list[Image.Image]) -> None:
    assert (first_of(emoji) != np.arange(len(emoji))).mean() < 0.03
    digits = [sample.load() for sample in open_source(DataConfig(path="digits", resolution=8)).samples]
    assert (first_of(digits) == np.arange(len(digits))).all()


def test_color_shape_and_flat_images(emoji: list[Image.Image]) -> None:
    def flat(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
        return Image.new("RGB", size, color)

    red, darker, blue = (200, 0, 0), (190, 0, 0), (0, 0, 200)
    assert first_of([flat(red), flat(darker), flat(blue)]).tolist() == [0, 1, 2]
    assert first_of([flat(red), flat(red, (80, 60)), jpeg(flat(red), 30)]).tolist() == [0, 0, 0]
    assert first_of([flat(red), flat(red, (30, 40))]).tolist() == [0, 1]
    other_hue = Image.merge("RGB", emoji[0].split()[::-1])
    assert first_of([emoji[0], other_hue]).tolist() == [0, 1]
    stretched = emoji[0].resize((160, 128))
    assert first_of([emoji[0], stretched]).tolist() == [0, 1]


def steps(count: int, step: float) -> np.ndarray:
    """Pictures that turn into another a little at a time: neighbors are near-duplicates, the ends are not."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(0, 1, (2, 16, 16, 3))
    angles = step * np.arange(count)
    mixed = np.cos(angles)[:, None, None, None] * one + np.sin(angles)[:, None, None, None] * other
    return np.clip(128 + 35 * mixed, 0, 255).astype(np.uint8)


def test_chains_of_similar_images_are_cut() -> None:
    # Neighbors differ by 0.06 of their contrast; the first and the fourth by 0.18, more than near-duplicates may.
    first = near_duplicate_clusters(steps(60, 0.06), [(64, 64)] * 60)
    lengths = np.bincount(first)
    assert lengths.max() <= 6
    assert first[3] == 0  # linked through its neighbors
    assert len(set(first.tolist())) >= 10


def test_what_is_added_behind_changes_nothing_before_it() -> None:
    thumbnails = np.concatenate([steps(40, 0.06), steps(40, 0.06)[::-1, :, ::-1]])
    thumbnails = thumbnails[np.random.default_rng(1).permutation(80)]
    sizes = [(64, 64)] * 80
    all_of_them = near_duplicate_clusters(thumbnails, sizes)
    assert len(set(all_of_them.tolist())) < 40
    for count in (1, 17, 63):
        assert (near_duplicate_clusters(thumbnails[:count], sizes[:count]) == all_of_them[:count]).all()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    thumbnails = steps(80, 0.05)[np.random.default_rng(1).permutation(80)]
    whole = near_duplicate_clusters(thumbnails, [(64, 64)] * 80)
    for name in ("_ROWS", "_COLUMNS", "_PAIRS"):
        monkeypatch.setattr(f"ldm.data.inspection.{name}", 7)
    assert (near_duplicate_clusters(thumbnails, [(64, 64)] * 80) == whole).all()


def test_a_large_cluster_stays_one_and_none_are_nothing() -> None:
    thumbnails = np.repeat(steps(1, 0.0), 700, axis=0)
    assert (near_duplicate_clusters(thumbnails, [(64, 64)] * 700) == 0).all()
    assert near_duplicate_clusters(thumbnails[:0], []).tolist() == []
