import itertools
from collections import Counter

import pytest

from ldm.data import SampleOrder, generator, micro_batches
from ldm.data.rng import BatchOrder

SIZES = ((16, 8), (8, 8), (8, 16))


def one_bucket(length: int, batch_size: int, seed: int = 0) -> BatchOrder:
    return BatchOrder((range(length),), ((8, 8),), batch_size, seed)


def buckets(*lengths: int, batch_size: int, seed: int = 0) -> BatchOrder:
    """Buckets whose images lie interleaved, as they do in a folder."""
    owners = [bucket for bucket, length in enumerate(lengths) for _ in range(length)]
    owners = owners[::3] + owners[1::3] + owners[2::3]
    members = tuple(tuple(i for i, owner in enumerate(owners) if owner == k) for k in range(len(lengths)))
    sizes = SIZES if len(lengths) == 3 else tuple((8, 8 + k) for k in range(len(lengths)))
    return BatchOrder(members, sizes, batch_size, seed)


def test_each_epoch_is_its_own_permutation() -> None:
    order = SampleOrder(length=10, seed=3)
    stream = order.at(range(30))
    epochs = [[index for epoch, index in stream if epoch == number] for number in range(3)]
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10 + [2] * 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert SampleOrder(length=10, seed=4).at(range(10)) != stream[:10]


def test_batches_are_a_function_of_the_step() -> None:
    order = SampleOrder(length=10, seed=3)
    stream = order.at(range(40))
    for step in (9, 2, 0, 5):  # in any order, from a fresh order too
        assert order.batch(step, 4) == stream[4 * step : 4 * step + 4]
        assert SampleOrder(length=10, seed=3).batch(step, 4) == stream[4 * step : 4 * step + 4]
    assert {epoch for epoch, _ in order.batch(2, 4)} == {0, 1}
    assert order.at([7, 1]) == [stream[7], stream[1]]


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_ranks_and_accumulation_slice_the_global_batch(accumulation: int, world: int) -> None:
    order = buckets(14, 20, 13, batch_size=12)
    ranks = [
        list(
            micro_batches(
                order,
                first_step=2,
                last_step=9,
                accumulation=accumulation,
                rank=rank,
                world=world,
            )
        )
        for rank in range(world)
    ]
    assert {len(micro_batch) for rank in ranks for micro_batch in rank} == {12 // (accumulation * world)}
    # All ranks run side by side: micro-batch m of every rank, then m + 1.
    together = itertools.chain.from_iterable(itertools.chain.from_iterable(zip(*ranks, strict=True)))
    assert list(together) == [position for step in range(2, 9) for position in order.batch(step)]


def test_uneven_batches_raise_immediately() -> None:
    with pytest.raises(ValueError, match=r"8 .*train\.batch_size 9; .* 8\b"):
        micro_batches(one_bucket(8, batch_size=9), first_step=0, last_step=1)
    with pytest.raises(ValueError, match=r"train\.batch_size 8 .* 6\b"):
        micro_batches(one_bucket(8, batch_size=8), first_step=0, last_step=1, accumulation=2, world=3)
    with pytest.raises(ValueError, match=r"train\.batch_size 0"):
        micro_batches(one_bucket(8, batch_size=0), first_step=0, last_step=1)
    with pytest.raises(ValueError, match="rank 2"):
        micro_batches(one_bucket(8, batch_size=8), first_step=0, last_step=1, rank=2, world=2)
    with pytest.raises(ValueError, match="not 0"):
        SampleOrder(length=0, seed=0)
    with pytest.raises(ValueError, match="not -1"):
        SampleOrder(length=8, seed=0).at([-1])
    with pytest.raises(ValueError, match="not -1"):
        one_bucket(8, batch_size=8).batch(-1)
    assert len(list(micro_batches(one_bucket(8, batch_size=8), first_step=0, last_step=1))) == 1


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (8, 8), (100, 7), (3, 1)])
def test_one_bucket_has_the_batches_of_a_single_stream(length: int, batch_size: int) -> None:
    order, stream = one_bucket(length, batch_size, seed=5), SampleOrder(length, seed=5)
    for step in range(60):
        assert order.batch(step) == stream.batch(step, batch_size)
    assert order.batch(10**6) == stream.batch(10**6, batch_size)


def test_the_order_of_squares_is_that_of_earlier_versions() -> None:
    """Runs that were started before there were buckets go on as they began."""
    epochs = [generator(3, "order", epoch).permutation(10) for epoch in range(3)]
    stream = [(epoch, int(index)) for epoch, indices in enumerate(epochs) for index in indices]
    order = one_bucket(10, 4, seed=3)
    assert [position for step in range(7) for position in order.batch(step)] == stream[:28]


def test_batch_has_one_bucket_and_no_repeats_in_an_epoch() -> None:
    order = buckets(9, 40, 13, batch_size=8)
    owner = {index: bucket for bucket, members in enumerate(order.members) for index in members}
    for step in range(300):
        batch = order.batch(step)
        assert len(batch) == len(set(batch)) == 8
        assert len({owner[index] for _, index in batch}) == 1


@pytest.mark.parametrize("lengths", [(9, 40, 13), (64, 65, 127), (8, 8, 8), (8, 1000, 8)])
def test_every_image_is_seen_equally_often_up_to_rounding(lengths: tuple[int, ...]) -> None:
    order = buckets(*lengths, batch_size=8)
    seen: Counter[int] = Counter(dict.fromkeys(range(sum(lengths)), 0))
    epochs: dict[int, list[int]] = {}
    for step in range(12 * sum(lengths) // 8):
        for epoch, index in order.batch(step):
            seen[index] += 1
            epochs.setdefault(index, []).append(epoch)
        if step >= sum(lengths) // 8:
            assert max(seen.values()) - min(seen.values()) <= 2
    assert all(10 <= count <= 13 for count in seen.values())
    # Each epoch of a bucket shows each of its images once.
    assert all(found == list(range(len(found))) for found in epochs.values())


def test_buckets_are_shuffled_in_every_round() -> None:
    order = buckets(80, 80, 80, batch_size=8)
    owner = {index: bucket for bucket, members in enumerate(order.members) for index in members}
    rounds = [[owner[order.batch(30 * r + step)[0][1]] for step in range(30)] for r in range(20)]
    assert all(Counter(one) == {0: 10, 1: 10, 2: 10} for one in rounds)
    changes = [sum(a != b for a, b in itertools.pairwise(one)) for one in rounds]
    assert 17 < sum(changes) / 20 < 22  # 29 pairs, of which 20 in 29 differ where all orders are equally likely
    assert len(set(map(tuple, rounds))) == 20
    assert rounds[0] != [owner[buckets(80, 80, 80, batch_size=8, seed=1).batch(s)[0][1]] for s in range(30)]


def test_streams_of_buckets_are_permutations_of_their_own() -> None:
    order = buckets(16, 16, batch_size=16)
    batches = [order.batch(step) for step in range(40)]
    places: dict[int, list[list[int]]] = {0: [], 1: []}
    for batch in batches:
        bucket = 0 if batch[0][1] in order.members[0] else 1
        assert sorted(index for _, index in batch) == list(order.members[bucket])
        places[bucket].append([order.members[bucket].index(index) for _, index in batch])
    assert len(places[0]) == len(places[1]) == 20
    assert all(one != other for one, other in zip(places[0], places[1], strict=True))
    assert len(set(map(tuple, places[0]))) == 20
    # A bucket's stream follows from its size, not from which others there are.
    alone = BatchOrder((order.members[0], range(5)), (order.sizes[0], (99, 99)), 16, 0)
    mine = [batch for step in range(8) if (batch := alone.batch(step))[0][1] in order.members[0]]
    assert [index for _, index in mine[0]] == [order.members[0][place] for place in places[0][0]]


def test_a_bucket_smaller_than_a_batch_crosses_epochs() -> None:
    order = buckets(3, 30, batch_size=8)
    small = [batch for step in range(100) if (batch := order.batch(step))[0][1] in order.members[0]]
    stream = [position for batch in small for position in batch]
    assert [epoch for epoch, _ in stream] == [i // 3 for i in range(len(stream))]
    assert len(small) == pytest.approx(100 * 3 / 33, abs=1)


def test_any_step_is_found_at_once_whatever_came_before() -> None:
    lengths = [64 + 997 * k for k in range(20)]
    order = buckets(*lengths, batch_size=64)
    walked = [order.batch(step) for step in range(200)]
    for step in (199, 0, 57, 120):
        assert buckets(*lengths, batch_size=64).batch(step) == walked[step]
    fresh = buckets(*lengths, batch_size=64)
    fresh.batch(10**12)  # would never come back if it were walked to
    # The count in closed form is the one that is walked to.
    small = buckets(9, 40, 13, batch_size=8)
    numbers: Counter[int] = Counter()
    streams = [SampleOrder(len(of), 0, size) for of, size in zip(small.members, small.sizes, strict=True)]
    for step in range(2000):
        batch = small.batch(step)
        bucket = next(k for k, of in enumerate(small.members) if batch[0][1] in of)
        expected = streams[bucket].batch(numbers[bucket], 8)
        assert batch == [(epoch, small.members[bucket][place]) for epoch, place in expected]
        numbers[bucket] += 1
