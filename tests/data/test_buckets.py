import itertools
import math

import numpy as np
import pytest

from ldm.data.dataset import Buckets, assign_buckets, bucket_sizes, bucket_step

SIZES = bucket_sizes(512)


def shapes_like(sizes: list[tuple[int, int]], counts: list[int]) -> list[tuple[int, int]]:
    """(width, height) of images that fit a size exactly, twice as large."""
    return [(2 * w, 2 * h) for (h, w), count in zip(sizes, counts, strict=True) for _ in range(count)]


def kept(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """The share of an image that is left when it is cropped to a size, by its definition."""
    (width, height), (h, w) = shape, size
    scale = max(h / height, w / width)
    return h * w / (height * scale * width * scale)


def test_the_sizes_of_stable_diffusion() -> None:
    assert (
        *((704, 384), (640, 384), (640, 448), (576, 448), (512, 512)),
        *((448, 576), (448, 640), (384, 640), (384, 704)),
    ) == SIZES
    assert (bucket_step(512), bucket_step(768), bucket_step(256), bucket_step(64)) == (64, 64, 32, 8)
    assert bucket_step(200) == 8  # 16 does not divide it


@pytest.mark.parametrize("resolution", [1, 2, 7, 8, 16, 24, 32, 64, 96, 128, 150, 151, 160, 200, 256, 320, 768, 1024])
def test_bucket_areas_and_aspect_ratios(resolution: int) -> None:
    sizes, step = bucket_sizes(resolution), bucket_step(resolution)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert len(sizes) <= 9
    assert resolution % step == 0
    assert all(h % step == 0 and w % step == 0 for h, w in sizes)
    aspects = [w / h for h, w in sizes]
    assert aspects == sorted(aspects)
    if resolution >= 64:
        assert all(0.9 < h * w / resolution**2 < 1.12 for h, w in sizes)
        assert 1.8 < max(aspects) < 2.2
        assert max(b / a for a, b in itertools.pairwise(aspects)) < 1.33
        assert all(h % 8 == 0 and w % 8 == 0 for h, w in sizes) == (resolution % 8 == 0)


def test_an_image_goes_where_least_of_it_is_cropped() -> None:
    random = np.random.default_rng(0)
    shapes = [(int(w), int(h)) for w, h in random.integers(50, 3000, (500, 2))]
    buckets = assign_buckets(shapes, SIZES, batch_size=1)
    for shape, place in zip(shapes, buckets.assignment, strict=True):
        best = max(kept(shape, size) for size in SIZES)
        assert kept(shape, buckets.sizes[place]) == pytest.approx(best, rel=1e-9)
    taken = [1 - kept(shape, buckets.sizes[place]) for shape, place in zip(shapes, buckets.assignment, strict=True)]
    assert buckets.cropped == pytest.approx(np.mean(taken))
    assert buckets.cropped_as_squares == pytest.approx(np.mean([1 - kept(shape, (512, 512)) for shape in shapes]))
    assert buckets.moved == 0
    assert sorted(itertools.chain.from_iterable(buckets.members())) == list(range(500))
    assert all(buckets.assignment[i] == place for place, members in enumerate(buckets.members()) for i in members)


def test_photographs_lose_little() -> None:
    def lost(width: int, height: int) -> float | None:
        return assign_buckets([(width, height)], SIZES, batch_size=1).cropped

    assert lost(1000, 1000) == 0
    for width, height, most in ((4, 3, 0.04), (3, 2, 0.05), (16, 9, 0.04), (2, 1, 0.09), (4, 1, 0.55)):
        assert 0 < lost(width, height) < most  # type: ignore[operator]
        assert lost(width, height) == lost(height, width)


def test_a_size_with_too_few_images_for_a_batch_is_given_up() -> None:
    sizes = [(448, 576), (448, 640), (384, 640), (384, 704)]
    shapes = shapes_like(sizes, [20, 7, 8, 30])
    buckets = assign_buckets(shapes, SIZES, batch_size=8)
    # 448x640 (1.43) is nearer to 448x576 (1.29) than to 384x640 (1.67).
    assert buckets.sizes == ((448, 576), (384, 640), (384, 704))
    assert buckets.assignment == (0,) * 27 + (1,) * 8 + (2,) * 30
    assert buckets.moved == 7
    untouched = assign_buckets(shapes, SIZES, batch_size=7)
    assert untouched.sizes == tuple(sizes)
    assert untouched.moved == 0
    assert buckets.cropped > untouched.cropped == pytest.approx(0, abs=1e-12)  # type: ignore[operator]
    assert buckets.cropped == pytest.approx(7 * (1 - kept(shapes[20], (448, 576))) / 65)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 50, 150, 151])
def test_sizes_in_use_fill_a_batch_and_are_nearest(batch_size: int) -> None:
    random = np.random.default_rng(1)
    aspects = np.exp(random.normal(0, 0.4, 150))
    shapes = [(round(1000 * math.sqrt(a)), round(1000 / math.sqrt(a))) for a in aspects]
    buckets = assign_buckets(shapes, SIZES, batch_size)
    sizes = set(buckets.assignment)
    assert sizes == set(range(len(buckets.sizes)))
    if len(sizes) > 1:
        assert min(len(members) for members in buckets.members()) >= batch_size
    for shape, place in zip(shapes, buckets.assignment, strict=True):
        best = max(kept(shape, size) for size in buckets.sizes)
        assert kept(shape, buckets.sizes[place]) == pytest.approx(best, rel=1e-9)
    own = assign_buckets(shapes, SIZES, 1)
    moved = sum(own.sizes[a] != buckets.sizes[b] for a, b in zip(own.assignment, buckets.assignment, strict=True))
    assert buckets.moved == moved
    assert len(buckets.sizes) == 1 or batch_size < 75
    # The order of the images does not matter.
    backwards = assign_buckets(shapes[::-1], SIZES, batch_size)
    assert (backwards.sizes, backwards.assignment[::-1]) == (buckets.sizes, buckets.assignment)


def test_the_line_says_what_happens() -> None:
    shapes = shapes_like([(448, 576), (448, 640)], [20, 7])
    line = assign_buckets(shapes, SIZES, batch_size=8).summary()
    assert "448x576 (27); 2.6% of an image is cropped away (of squares 24.2%); moved to the next size" in line
    assert line.endswith("make a batch: 7")
    assert "moved" not in assign_buckets(shapes, SIZES, batch_size=7).summary()
    assert Buckets(((8, 8),), (0, 0)).summary().endswith("8x8 (2)")
