import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import (
    Batch,
    CaptionedImages,
    DataConfig,
    Sample,
    collate,
    image_statistics,
    micro_batches,
    split,
    to_signed,
    to_uint8,
)
from ldm.data.dataset import MIN_STD, Item
from ldm.data.rng import content_hash
from ldm.data.sources import Decoded


def noise(data: bytes, width: int, height: int) -> Decoded:
    pixels = np.random.default_rng(int(data)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Decoded(Image.fromarray(pixels), "", "RGB")


def stored(number: int) -> bytes:
    return str(number).encode()


def samples(count: int, width: int = 24, height: int = 8) -> tuple[Sample, ...]:
    captions = ("one", "two", "three")
    return tuple(
        Sample(
            id=f"s{number}",
            captions=captions,
            group=f"g{number // 2}",
            read=partial(stored, number),
            decode=partial(noise, width=width, height=height),
            digest=content_hash(stored(number)),
            size=(width, height),
        )
        for number in range(count)
    )


def dataset(count: int = 12, seed: int = 0, **options: object) -> CaptionedImages:
    config = DataConfig(**{"path": "anything", "resolution": 8} | options)  # type: ignore[arg-type]
    return CaptionedImages(samples(count), config, seed)


SHAPES = ((40, 20), (20, 40), (30, 30), (44, 20), (33, 24))  # (width, height)


def bucketed(count: int = 20, batch_size: int = 1, **options: object) -> CaptionedImages:
    """Images of five shapes in turn, at about 16² pixels: two of them near enough to share 12x24."""
    mixed = [
        replace(s, decode=partial(noise, width=w, height=h), size=(w, h))
        for s, (w, h) in zip(samples(count), itertools.cycle(SHAPES))
    ]
    config = DataConfig(**{"path": "anything", "resolution": 16, "buckets": True} | options)  # type: ignore[arg-type]
    return CaptionedImages(mixed, config, 0, batch_size=batch_size)


def same(one: Item, other: Item) -> bool:
    named = [(item.id, item.epoch, item.index, item.caption, item.flipped, item.size) for item in (one, other)]
    return named[0] == named[1] and torch.equal(seen(one), seen(other))


def seen(shown: Item | Batch) -> torch.Tensor:
    image = shown.image if isinstance(shown, Item) else shown.images
    assert image is not None
    return image


def test_an_item_is_a_function_of_seed_epoch_and_id() -> None:
    data = dataset(flip=True, crop="random")
    again = dataset(flip=True, crop="random")
    backwards = {position: again[position] for position in [(e, i) for e in range(3) for i in range(12)][::-1]}
    assert all(same(data[position], item) for position, item in backwards.items())
    # The place in the data set does not count, only the id: other samples may come and go.
    moved = CaptionedImages(data.samples[5:], data.config, seed=0)
    assert torch.equal(seen(moved[2, 0]), seen(data[2, 5]))
    assert moved[2, 0].caption == data[2, 5].caption
    other = dataset(seed=1, flip=True, crop="random")
    assert not all(torch.equal(seen(data[0, i]), seen(other[0, i])) for i in range(12))


def test_every_choice_is_drawn_and_all_of_its_values_occur() -> None:
    data = dataset(flip=True, crop="random")
    items = [data[epoch, 3] for epoch in range(300)]
    captions = [item.caption for item in items]
    assert all(70 < captions.count(caption) < 130 for caption in ("one", "two", "three"))
    flips = [item.flipped for item in items]
    assert 120 < sum(flips) < 180
    # Each item is one of the 17 places of the image, as it is or mirrored; the draws do not move together.
    pixels = torch.from_numpy(np.array(noise(stored(3), 24, 8).image)).permute(2, 0, 1)
    places = {pixels[:, :, left : left + 8].numpy().tobytes(): left for left in range(17)}
    found = [places[(seen(item).flip(-1) if item.flipped else seen(item)).numpy().tobytes()] for item in items]
    assert set(found) == set(range(17))
    # The three draws do not move together.
    numbers = np.array([[("one", "two", "three").index(c) for c in captions], flips, found], dtype=float)
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.2


def test_without_options_an_image_is_its_middle_square() -> None:
    data = dataset()
    pixels = torch.from_numpy(np.array(noise(stored(3), 24, 8).image)).permute(2, 0, 1)
    assert torch.equal(data.image_at(3), pixels[:, :, 8:16])
    assert all(torch.equal(seen(data[epoch, 3]), pixels[:, :, 8:16]) for epoch in range(5))
    assert torch.equal(data.image_at(3, flipped=True), pixels[:, :, 8:16].flip(-1))
    assert not any(data[epoch, 3].flipped for epoch in range(20))
    assert torch.equal(dataset(crop="random").image_at(3), pixels[:, :, 8:16])
    flipped = next(item for epoch in range(50) if (item := dataset(flip=True)[epoch, 3]).flipped)
    assert torch.equal(seen(flipped), pixels[:, :, 8:16].flip(-1))


def counted(loads: list[str], name: str, read: Callable[[], bytes]) -> bytes:
    loads.append(name)
    return read()


@pytest.mark.parametrize(("cache_bytes", "crop", "loads_of_three_rounds"), [
    (2**20, "center", 4),
    (2 * 193, "center", 2 + 3 * 2),  # two of four images fit, each 192 bytes and a mark
    (0, "center", 12),
    (2**20, "random", 12),
])  # fmt: skip
def test_images_are_kept_within_the_budget(cache_bytes: int, crop: str, loads_of_three_rounds: int) -> None:
    loads: list[str] = []
    counting = [replace(s, read=partial(counted, loads, s.id, s.read)) for s in samples(4)]
    config = DataConfig(path="anything", resolution=8, crop=crop)  # type: ignore[arg-type]
    data = CaptionedImages(counting, config, 0, cache_bytes)
    rounds = [[seen(data[0, index]) for index in range(4)] for _ in range(3)]
    assert len(loads) == loads_of_three_rounds
    data.image_at(0)
    data.image_at(0)
    kept = crop == "center" and cache_bytes > 0
    assert len(loads) == loads_of_three_rounds + 2 * (not kept)
    assert all(torch.equal(image, rounds[0][index]) for one in rounds for index, image in enumerate(one))
    rounds[2][0].zero_()  # what is handed out is a copy
    assert torch.equal(seen(data[0, 0]), rounds[0][0])


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("buckets", [False, True])
def test_workers_change_nothing_and_share_the_cache(crop: str, buckets: bool) -> None:
    data = bucketed(batch_size=4, flip=True, crop=crop) if buckets else dataset(flip=True, crop=crop)

    def batches(workers: int) -> list[Batch]:
        sampler = list(micro_batches(data.order(4), first_step=1, last_step=15))
        context = "fork" if workers else None
        return list(
            DataLoader(
                data,
                batch_sampler=sampler,
                num_workers=workers,
                collate_fn=collate,
                multiprocessing_context=context,
            )
        )

    forked = batches(2)
    if crop == "center":
        assert data._cache.filled.all()  # by the workers: this process has read nothing so far
    for one, other in zip(forked, batches(0), strict=True):
        assert (one.ids, one.captions, one.size) == (other.ids, other.captions, other.size)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.flipped, other.flipped)
        assert torch.equal(seen(one), seen(other))


@pytest.mark.parametrize("data", [dataset(flip=True), bucketed(12, flip=True, batch_size=3)])
def test_a_data_set_travels_to_a_spawned_process(data: CaptionedImages) -> None:
    data.image_at(0)
    travelled = pickle.loads(pickle.dumps(data))
    assert all(same(travelled[1, index], data[1, index]) for index in range(12))
    assert travelled.order(3).batch(7) == data.order(3).batch(7)


def test_without_images_nothing_is_loaded_and_items_are_equal() -> None:
    def fail() -> bytes:
        raise AssertionError("loaded")

    unloadable = [replace(s, read=fail) for s in samples(4)]
    for crop in ("center", "random"):
        data = dataset(count=4, flip=True, crop=crop)
        without = CaptionedImages(unloadable, data.config, seed=0)
        without.with_images = False
        positions = [(epoch, index) for epoch in range(4) for index in range(4)]
        batch, full = (collate([one[position] for position in positions]) for one in (without, data))
        assert batch.images is None
        assert batch.size == full.size == (8, 8)
        assert (batch.ids, batch.epochs, batch.captions) == (full.ids, full.epochs, full.captions)
        assert torch.equal(batch.flipped, full.flipped)


def test_collate_keeps_the_order() -> None:
    data = dataset()
    batch = collate([data[0, 4], data[1, 2]])
    assert batch.epochs == [0, 1]
    assert batch.ids == ["s4", "s2"]
    assert batch.captions == [data[0, 4].caption, data[1, 2].caption]
    assert (batch.indices.dtype, batch.indices.tolist()) == (torch.int64, [4, 2])
    assert (batch.flipped.dtype, batch.flipped.tolist()) == (torch.bool, [False, False])
    assert batch.size == (8, 8)
    assert (seen(batch).dtype, seen(batch).shape) == (torch.uint8, (2, 3, 8, 8))
    assert torch.equal(seen(batch)[1], data.image_at(2))


def test_buckets_by_resolution_else_squares() -> None:
    def sizes(**options: object) -> tuple[tuple[int, int], ...]:
        config = DataConfig(path="anything", **options)  # type: ignore[arg-type]
        return CaptionedImages(samples(4, width=24, height=12), config, 0).buckets.sizes

    assert sizes(resolution=128) == ((128, 128),)
    assert sizes(resolution=129) != ((129, 129),)
    assert sizes(resolution=256) == ((192, 352),)
    assert sizes(resolution=256, buckets=False) == ((256, 256),)
    assert sizes(resolution=128, buckets=True) == ((96, 176),)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_an_image_has_the_size_of_its_bucket_and_covers_it(crop: str) -> None:
    data = bucketed(crop=crop)
    assert data.buckets.sizes == ((24, 12), (16, 16), (12, 20), (12, 24))
    assert [data.shape_of(index) for index in range(5)] == [(12, 24), (24, 12), (16, 16), (12, 24), (12, 20)]
    for index in range(20):
        height, width = data.shape_of(index)
        item = data[3, index]
        assert item.size == (height, width)
        assert data.image_at(index).shape == seen(item).shape == (3, height, width)
    # 40x20 has the shape of 12x24: all of it is there, whatever is drawn.
    whole = noise(stored(0), 40, 20).image.resize((24, 12), Image.Resampling.BICUBIC)
    assert np.array_equal(seen(data[0, 0]).permute(1, 2, 0).numpy(), np.asarray(whole))
    # 44x20 is resized to a height of 12 and cropped to a width of 24 of 26.
    seen_parts = {seen(data[epoch, 3]).numpy().tobytes() for epoch in range(40)}
    assert len(seen_parts) == (1 if crop == "center" else 3)


def test_a_size_that_is_not_known_is_learned_from_the_image() -> None:
    known = bucketed()
    unknown = CaptionedImages([replace(s, size=None) for s in known.samples], known.config, 0)
    assert unknown.buckets == known.buckets

    def fail() -> bytes:
        raise OSError("gone")

    broken = [replace(known.samples[0], read=fail, size=None)]
    with pytest.raises(ValueError, match=r"^s0 .*gone"):
        CaptionedImages(broken, known.config, 0)
    # Squares need no sizes, so nothing is read.
    CaptionedImages(broken, replace(known.config, buckets=False), 0)


def test_small_buckets_are_given_up_and_held_out_uses_training_sizes() -> None:
    merged = bucketed(batch_size=5)
    assert merged.buckets.sizes == ((16, 16), (12, 24))
    assert merged.buckets.moved == 8
    order = merged.order(5)
    assert {merged.shape_of(index) for step in range(20) for _, index in order.batch(step)} == {(16, 16), (12, 24)}
    assert all(len({merged.shape_of(i) for _, i in order.batch(step)}) == 1 for step in range(50))
    held_out = CaptionedImages(merged.samples[1:2], merged.config, 0, sizes=merged.buckets.sizes)
    assert held_out.shape_of(0) == (16, 16)
    assert CaptionedImages(merged.samples[1:2], merged.config, 0).shape_of(0) == (24, 12)


def test_chunks_have_one_shape_and_all_images() -> None:
    data = bucketed()
    chunks = data.chunks(3)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(20))
    assert all(len({data.shape_of(index) for index in chunk}) == 1 for chunk in chunks)
    assert max(map(len, chunks)) == 3
    assert chunks[:2] == [[1, 6, 11], [16]]
    assert sorted(index for chunk in data.chunks(3, limit=7) for index in chunk) == list(range(7))
    assert dataset(8).chunks(3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert dataset(8).chunks(3, limit=4) == [[0, 1, 2], [3]]
    assert dataset(8).chunks(9, limit=100) == [list(range(8))]


def test_images_of_any_shape_are_kept_within_the_budget() -> None:
    loads: list[str] = []
    data = bucketed(5)
    counting = [replace(s, read=partial(counted, loads, s.id, s.read)) for s in data.samples]
    needed = [3 * h * w + 1 for h, w in map(data.shape_of, range(5))]
    for fitting in range(6):
        for spare in (0, min(needed) - 1):
            kept = CaptionedImages(counting, data.config, 0, sum(needed[:fitting]) + spare * (fitting < 5))
            loads.clear()
            for _ in range(2):
                images = [kept.image_at(index) for index in (4, 2, 0, 3, 1)]
            assert loads == [f"s{i}" for i in (4, 2, 0, 3, 1)] + [f"s{i}" for i in (4, 2, 0, 3, 1) if i >= fitting]
            assert all(torch.equal(a, data.image_at(i)) for a, i in zip(images, (4, 2, 0, 3, 1), strict=True))


def test_sizes_that_a_codec_does_not_divide_are_refused() -> None:
    bucketed().check_factor(4)
    with pytest.raises(ValueError, match=r"24x12 .* factor 8; .*data\.resolution .* 64, .*data\.buckets"):
        bucketed().check_factor(8)
    with pytest.raises(ValueError, match=r"14x14 .* factor 4; .*data\.resolution .* 32$"):
        CaptionedImages([replace(samples(1)[0], size=(14, 14))], bucketed(resolution=14).config, 0).check_factor(4)
    with pytest.raises(ValueError, match=r"15x15 .* factor 4; .*data\.resolution .* 16$"):
        dataset(resolution=15).check_factor(4)
    for resolution in range(64, 1025, 64):  # the way out that is named leads out
        bucketed(resolution=resolution).check_factor(8)


def test_signed_round_trip_is_exact_and_rounds_like_diffusers() -> None:
    from diffusers.image_processor import VaeImageProcessor

    levels = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(levels)
    assert (signed.dtype, signed[0].item(), signed[-1].item()) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_uint8(signed), levels)
    images = torch.linspace(-1.2, 1.2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    processor = VaeImageProcessor()
    arrays = processor.pt_to_numpy(processor.denormalize(images))
    expected = np.asarray(processor.numpy_to_pil(arrays)[0]).transpose(2, 0, 1)
    assert np.array_equal(to_uint8(images)[0].numpy(), expected)


def test_statistics_are_those_of_all_pixels() -> None:
    data = dataset(count=7)
    images = torch.stack([data.image_at(index) for index in range(7)]).double() / 127.5 - 1
    mean, std = image_statistics(data)
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, images.mean((0, 2, 3)), rtol=0, atol=1e-14)
    torch.testing.assert_close(std, images.std((0, 2, 3), correction=0), rtol=1e-13, atol=0)
    mirrored = image_statistics(CaptionedImages(data.samples[::-1], data.config, seed=0))
    assert torch.equal(mirrored[0], mean)
    assert torch.equal(mirrored[1], std)


def test_statistics_count_pixels_alike_whatever_the_shape() -> None:
    data = bucketed(7)
    pixels = torch.cat([data.image_at(index).flatten(1) for index in range(7)], dim=1).double() / 127.5 - 1
    mean, std = image_statistics(data)
    torch.testing.assert_close(mean, pixels.mean(1), rtol=0, atol=1e-14)
    torch.testing.assert_close(std, pixels.std(1, correction=0), rtol=1e-13, atol=0)


def test_a_constant_channel_has_a_deviation_to_divide_by() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    plain = Sample("plain", ("plain",), "plain", bytes, lambda _: Decoded(image, "", "RGB"), "0", (8, 8))
    mean, std = image_statistics(CaptionedImages([plain], DataConfig(path="anything", resolution=4), seed=0))
    torch.testing.assert_close(mean, torch.tensor([1.0, -1.0, -0.6], dtype=torch.float64))
    assert std.tolist() == [MIN_STD] * 3


def test_split_keeps_groups_whole_and_is_stable() -> None:
    few, many = samples(200), samples(2000)
    training, held_out = split(many, 0.2)
    assert {s.group for s in training}.isdisjoint({s.group for s in held_out})
    assert sorted(s.id for s in training + held_out) == sorted(s.id for s in many)
    assert 0.15 < len(held_out) / len(many) < 0.25
    small_training, small_held_out = split(few, 0.2)
    assert set(small_training) <= set(training)
    assert set(small_held_out) <= set(held_out)
    assert split(many[::-1], 0.2) == (training[::-1], held_out[::-1])
    # A larger share holds out the same groups and more.
    assert set(held_out) < set(split(many, 0.4)[1])


@pytest.mark.parametrize("held_out", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_empty_where_two_groups_allow_it(held_out: float) -> None:
    for count in range(3, 12):
        training, others = split(samples(count), held_out)
        assert training
        assert others
        assert split(samples(count)[::-1], held_out)[0] == training[::-1]
        # The group that had to move is the first that a change of the share would move.
        if held_out < 0.5:
            assert set(others) <= set(split(samples(count), 0.5)[1])
        else:
            assert set(others) >= set(split(samples(count), 0.5)[1])
    assert split(samples(2), held_out) == (samples(2), ())  # one group


def test_the_edges_of_a_split() -> None:
    assert split(samples(20), 0) == (samples(20), ())
    with pytest.raises(ValueError, match="no images"):
        split((), 0.1)
    with pytest.raises(ValueError, match=r"data\.held_out is 1"):
        split(samples(2), 1)
    with pytest.raises(ValueError, match="no images in anything"):
        CaptionedImages((), DataConfig(path="anything", resolution=8), seed=0)
