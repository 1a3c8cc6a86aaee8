"""Precision and recall on sets whose balls can be counted by hand, and what Wilson's interval holds."""

import math

import pytest
import torch

from ldm.evaluation import fidelity as module
from ldm.evaluation.fidelity import precision_recall
from ldm.evaluation.stats import wilson_interval

REAL = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])


def test_shares_can_be_counted():
    # Third neighbours of 0, 1, 2, 3, 4 are 3, 2, 2, 2, 3 away: together the balls cover -3 to 7.
    generated = torch.tensor([[-3.1], [-3.0], [7.0], [7.1], [100.0]])
    assert precision_recall(generated, REAL).precision.mean == pytest.approx(2 / 5)
    # Third neighbours of 3, 3.5, 10, 10.5, 11: their balls are 7.5, 7, 6.5, 7, 7.5 wide and reach down to -4.5.
    assert precision_recall(torch.tensor([[3.0], [3.5], [10.0], [10.5], [11.0]]), REAL).recall.mean == 1.0
    # Of 3.5, 4, 4.5, 5, 5.5: balls of radius 1.5, 1, 1, 1, 1.5, from 2 to 7.
    assert precision_recall(torch.tensor([[3.5], [4.0], [4.5], [5.0], [5.5]]), REAL).recall.mean == pytest.approx(3 / 5)
    apart = precision_recall(REAL * 0.1 + 50, REAL)
    assert (apart.precision.mean, apart.recall.mean) == (0.0, 0.0)
    assert apart.precision.low == apart.recall.low == 0.0 < apart.precision.high


def test_what_is_drawn_again_and_again_is_precise_but_recalls_little():
    real = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    narrow = real.mean(dim=0) + 0.1 * torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    wide = 5 * torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    same = precision_recall(narrow, real)
    assert same.precision.mean == 1.0 and same.recall.mean < 0.1
    assert precision_recall(wide, real).precision.mean < 0.4 and precision_recall(wide, real).recall.mean > 0.8
    swapped = precision_recall(real, narrow)
    assert (swapped.precision.mean, swapped.recall.mean) == (same.recall.mean, same.precision.mean)


def test_it_agrees_with_all_distances_at_once_in_whatever_parts(monkeypatch):
    x, y = torch.randn(70, 5).double() + 0.5, torch.randn(90, 5).double()

    def inside(points, centres):
        distances = torch.cdist(centres, centres).fill_diagonal_(math.inf)
        radii = distances.sort(dim=1).values[:, 2]
        return float((torch.cdist(points, centres) <= radii).any(dim=1).double().mean())

    whole = precision_recall(x + 1e7, y + 1e7)  # far from 0, where squares lose digits
    assert (whole.precision.mean, whole.recall.mean) == (inside(x, y), inside(y, x))
    assert 0 < whole.recall.mean < 1 and 0 < whole.precision.mean < 1
    monkeypatch.setattr(module, "_MAX_ENTRIES", 1000)
    assert precision_recall(x + 1e7, y + 1e7) == whole


def test_copies_of_one_another_are_each_others_neighbours():
    # Five copies: the third neighbour of each is at distance 0, and only what is the same is inside.
    real = torch.tensor([[1.0, 2.0]] * 5)
    found = precision_recall(torch.tensor([[1.0, 2.0], [1.0, 2.1], [0.0, 0.0], [5.0, 5.0], [9.0, 0.0]]), real)
    assert found.precision.mean == pytest.approx(0.2)


def test_wilson():
    # Wilson 1927, for 8 of 10 and 0 of 10.
    assert (wilson_interval(0.8, 10).low, wilson_interval(0.8, 10).high) == pytest.approx(
        (0.4901625, 0.9433178), abs=1e-6
    )
    assert (wilson_interval(0.0, 10).low, wilson_interval(0.0, 10).high) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert (wilson_interval(1.0, 10).low, wilson_interval(1.0, 10).high) == pytest.approx((0.7224672, 1.0), abs=1e-6)


def test_intervals_hold_where_other_pictures_of_the_model_lie():
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(400, 4, generator=generator)
    found = [precision_recall(0.8 * torch.randn(60, 4, generator=generator) + 0.8, real) for _ in range(60)]
    for name in ("precision", "recall"):
        intervals = [getattr(one, name) for one in found]
        middle = sum(interval.mean for interval in intervals) / len(intervals)
        assert 0.3 < middle < 0.97
        assert 50 <= sum(interval.low <= middle <= interval.high for interval in intervals) <= 60
        # Nor are they much wider than the shares scatter.
        spread = float(torch.tensor([interval.mean for interval in intervals]).std())
        assert sum(interval.high - interval.low for interval in intervals) / 60 < 2 * 1.96 * 1.6 * spread


def test_the_variance_of_recall_is_that_of_leaving_groups_out():
    generator = torch.Generator().manual_seed(4)
    drawn, real = torch.randn(50, 3, generator=generator) + 1.2, torch.randn(300, 3, generator=generator)
    recall = precision_recall(drawn, real).recall
    without = []
    for group in range(20):
        kept = torch.arange(50) % 20 != group
        without.append(precision_recall(drawn[kept], real).recall.mean)
    middle = sum(without) / 20
    variance = 19 / 20 * sum((share - middle) ** 2 for share in without)
    draws = recall.mean * (1 - recall.mean) / variance
    assert draws < 40  # or the bound of 50 would be tested
    expected = wilson_interval(recall.mean, draws)
    assert (recall.low, recall.high) == pytest.approx((expected.low, expected.high))
    # Where the jackknife sees less than independent draws would vary, the smaller side counts.
    few = precision_recall(real[:30] * 0.9, real[30:]).recall
    assert few.high - few.low >= wilson_interval(few.mean, 30).high - wilson_interval(few.mean, 30).low - 1e-12


def test_a_recall_of_all_or_nothing_that_hangs_on_some_pictures_has_an_interval_too():
    generator = torch.Generator().manual_seed(5)
    # The ball of the far picture alone reaches the real images: without it, recall falls from 1 to 0.
    close, real = torch.randn(40, 2, generator=generator), 0.1 * torch.randn(60, 2, generator=generator)
    held = precision_recall(torch.cat([close, torch.tensor([[30.0, 0.0]])]), real + torch.tensor([31.0, 0.0])).recall
    assert held.mean == held.high == 1.0 and 0.0 < held.low < 0.5
    # Two pairs of pictures far off: without the first of a pair, a ball of the other reaches back over the real images.
    pairs = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [0.1, 0.1]])
    missed = precision_recall(torch.cat([close, pairs + 30]), real + torch.tensor([25.0, 25.0])).recall
    assert missed.mean == missed.low == 0.0 and 0.5 < missed.high < 1.0


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.zeros(4, 2), torch.zeros(9, 2), "4 samples against 9; give at least 5"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "2 and 3 features"),
        (torch.full((9, 2), float("inf")), torch.zeros(9, 2), "9 of 9 samples"),
    ],
)
def test_what_says_nothing_is_refused(x, y, said):
    with pytest.raises(ValueError, match=said):
        precision_recall(x, y)
