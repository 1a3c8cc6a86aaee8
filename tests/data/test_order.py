import itertools

import pytest

from ldm.data import SampleOrder, micro_batches


def test_each_epoch_shows_each_sample_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(length=10, seed=3)
    stream = order.at(range(30))
    epochs = [[index for epoch, index in stream if epoch == number] for number in range(3)]
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10 + [2] * 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert SampleOrder(length=10, seed=4).at(range(10)) != stream[:10]


def test_batches_cross_epochs_and_are_a_function_of_the_step() -> None:
    order = SampleOrder(length=10, seed=3)
    stream = order.at(range(40))
    for step in (9, 2, 0, 5):  # in any order, from a fresh order too
        assert order.batch(step, 4) == stream[4 * step : 4 * step + 4]
        assert SampleOrder(length=10, seed=3).batch(step, 4) == stream[4 * step : 4 * step + 4]
    assert {epoch for epoch, _ in order.batch(2, 4)} == {0, 1}
    assert order.at([7, 1]) == [stream[7], stream[1]]


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_ranks_and_accumulation_cut_the_global_batch_without_changing_it(accumulation: int, world: int) -> None:
    order = SampleOrder(length=20, seed=0)
    ranks = [
        list(
            micro_batches(
                order,
                first_step=2,
                last_step=6,
                batch_size=12,
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
    assert list(together) == [position for step in range(2, 6) for position in order.batch(step, 12)]


def test_what_cannot_be_cut_is_refused_before_the_first_batch() -> None:
    order = SampleOrder(length=8, seed=0)
    with pytest.raises(ValueError, match=r"8 training images, train\.batch_size 9; set .* at most 8"):
        micro_batches(order, first_step=0, last_step=1, batch_size=9)
    with pytest.raises(ValueError, match=r"train\.batch_size 8 does not split .* multiple of 6"):
        micro_batches(order, first_step=0, last_step=1, batch_size=8, accumulation=2, world=3)
    with pytest.raises(ValueError, match=r"train\.batch_size 0"):
        micro_batches(order, first_step=0, last_step=1, batch_size=0)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        micro_batches(order, first_step=0, last_step=1, batch_size=8, rank=2, world=2)
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        SampleOrder(length=0, seed=0)
    with pytest.raises(ValueError, match="start at 0, not -1"):
        order.at([-1])
    assert len(list(micro_batches(order, first_step=0, last_step=1, batch_size=8))) == 1
