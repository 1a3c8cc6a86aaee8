"""The kernel distance against its definition and torchmetrics, and what its interval holds."""

import pytest
import torch

from ldm.evaluation import fidelity as module
from ldm.evaluation.fidelity import kid


def drawn(count, dimensions, seed, shift=0.0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_definition(x, y):
    """Demystifying MMD GANs, the unbiased estimator, pair by pair."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z):
        return sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


def test_it_is_what_the_definition_says(monkeypatch):
    x, y = drawn(9, 4, 0), drawn(12, 4, 1, shift=0.5)
    whole = kid(x, y)
    assert whole.mean == pytest.approx(by_definition(x, y), rel=1e-10)
    assert kid(y, x).mean == pytest.approx(whole.mean, rel=1e-10)
    monkeypatch.setattr(module, "_MAX_ENTRIES", 30)  # two rows of the kernel at a time
    in_parts = kid(x, y)
    assert (in_parts.low, in_parts.high) == pytest.approx((whole.low, whole.high), rel=1e-10)


def test_the_interval_is_that_of_the_jackknife_over_images_of_both_sides():
    x, y = drawn(6, 3, 2), drawn(7, 3, 3, shift=1.0)
    variance = 0.0
    for side in (0, 1):
        count = len((x, y)[side])
        without = []
        for left_out in range(count):
            kept = [i for i in range(count) if i != left_out]
            without.append(by_definition(x[kept], y) if side == 0 else by_definition(x, y[kept]))
        mean = sum(without) / count
        variance += (count - 1) / count * sum((value - mean) ** 2 for value in without)
    interval = kid(x, y)
    assert interval.high - interval.mean == pytest.approx(1.959964 * variance**0.5, rel=1e-9)
    assert interval.mean - interval.low == pytest.approx(1.959964 * variance**0.5, rel=1e-9)


def test_it_is_unbiased_and_its_interval_holds_the_truth():
    # Normal features moved by s in one of D = 4: E k(x, y) in closed form from the moments of a normal variable.
    shift = torch.tensor([1.5, 0, 0, 0]).double()
    same = [kid(drawn(40, 4, 2 * seed), drawn(30, 4, 2 * seed + 1)) for seed in range(200)]
    assert sum(interval.low <= 0 <= interval.high for interval in same) >= 190
    means = torch.tensor([interval.mean for interval in same])
    assert abs(float(means.mean())) < 4 * float(means.std()) / 200**0.5
    assert float(means.min()) < 0
    truth = (
        expected_kernel(shift, shift) + expected_kernel(shift * 0, shift * 0) - 2 * expected_kernel(shift, shift * 0)
    )
    moved = [kid(drawn(40, 4, 2 * seed) + shift, drawn(30, 4, 2 * seed + 1)) for seed in range(200)]
    assert 176 <= sum(interval.low <= truth <= interval.high for interval in moved) <= 198


def expected_kernel(a, b):
    """E (x·y / D + 1)³ for independent x ~ N(a, 1) and y ~ N(b, 1)."""
    dimensions = len(a)
    first = float(a @ b)
    # Var(x·y) = D + |a|² + |b|², and the third central moment of a sum of products of independent normals: 6 a·b.
    variance = dimensions + float(a @ a + b @ b)
    third = 6 * first
    u, v, w = first / dimensions + 1, variance / dimensions**2, third / dimensions**3
    return u**3 + 3 * u * v + w


def test_blocks_average_what_they_estimate_and_do_not_mind_sorted_features(monkeypatch):
    x, y = drawn(60, 4, 4), drawn(45, 4, 5, shift=0.3)
    monkeypatch.setattr(module, "KID_BLOCK_SIZE", 20)
    blocks = [kid(x[i::3], y[i::3]) for i in range(3)]
    together = kid(x, y)
    assert together.mean == pytest.approx(sum(block.mean for block in blocks) / 3)
    reach = sum((block.high - block.mean) ** 2 for block in blocks) ** 0.5 / 3
    assert together.high - together.mean == pytest.approx(reach)
    # Two clusters, sorted on one side only: blocks in order would hold one of them against both.
    clusters = torch.cat([drawn(30, 4, 6), drawn(30, 4, 7, shift=2)])
    mixed = torch.stack([drawn(30, 4, 8), drawn(30, 4, 9, shift=2)], dim=1).flatten(0, 1)
    in_order = [kid(*pair).mean for pair in zip(clusters.tensor_split(3), mixed.tensor_split(3), strict=True)]
    assert abs(kid(clusters, mixed).mean) < sum(in_order) / 3 / 5


def test_torchmetrics_has_the_same_number():
    metrics = pytest.importorskip("torchmetrics.image.kid")
    images, others = torch.rand(12, 3, 4, 4), torch.rand(12, 3, 4, 4).square()
    # One subset that is all of them.
    metric = metrics.KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=1, subset_size=12)
    metric.update(images, real=True)
    metric.update(others, real=False)
    mean, _ = metric.compute()
    assert kid(others.flatten(1), images.flatten(1)).mean == pytest.approx(float(mean), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.zeros(5, 2), torch.zeros(2, 2), "5 samples against 2; give at least 3"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "2 and 3 features"),
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2), "5 of 5 samples have features that are not finite"),
        (torch.zeros(5), torch.zeros(5, 1), r"shape \[5\]"),
        (torch.zeros(20_001, 1), torch.zeros(8, 1), "20001 samples against 8 are too unequal; give 9"),
    ],
)
def test_what_says_nothing_is_refused(x, y, said):
    with pytest.raises(ValueError, match=said):
        kid(x, y)
