"""Fréchet distances of few samples: the same number as from full covariances, and what the intervals hold."""

import math

import pytest
import torch

from ldm.data import generator as keyed
from ldm.evaluation import fidelity
from ldm.evaluation.fidelity import Gaussian, distance_between, frechet_distance, frechet_interval, frechet_ratio
from ldm.evaluation.stats import student_quantile


def drawn(count, dimensions, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) * scale + shift


def singular(features):
    """The Gaussian of fewer samples than dimensions, which `Gaussian.fit` refuses."""
    return Gaussian(features.mean(dim=0), features.T.cov())


@pytest.mark.parametrize(("count", "real"), [(30, 50), (30, 300), (100, 40)])
def test_a_ratio_below_the_dimension_is_that_of_singular_covariances(count, real):
    one, held, reference = drawn(count, 60, 0, 1.2, 5), drawn(count, 60, 1, shift=5), drawn(real, 60, 2, shift=5)
    with pytest.raises(ValueError, match="needs at least 61"):
        frechet_distance(one[:60], reference[:60])
    expected = distance_between(singular(one), singular(reference)) / distance_between(
        singular(held), singular(reference)
    )
    assert frechet_ratio(one, held, reference).mean == pytest.approx(expected, rel=1e-6)


def test_the_distance_is_that_of_all_and_its_interval_that_of_leaving_groups_out():
    one, reference = drawn(70, 5, 3, 1.3, 2), drawn(90, 5, 4)
    interval = frechet_interval(one, reference)
    assert interval.mean == pytest.approx(frechet_distance(one, reference), rel=1e-10)
    kept = [torch.arange(70) % 20 != group for group in range(20)]
    without = torch.tensor([frechet_distance(one[rows], reference) for rows in kept], dtype=torch.float64).log()
    reach = student_quantile(0.95, 19) * math.sqrt(19 * float(without.var(unbiased=False)))
    assert math.log(interval.high / interval.mean) == pytest.approx(reach, rel=1e-6)
    assert math.log(interval.mean / interval.low) == pytest.approx(reach, rel=1e-6)


def test_both_forms_are_the_same_number():
    # As many samples as dimensions, and one more: [N, N] and [D, D] matrices.
    for count in (24, 25):
        one, reference = drawn(count, 24, 5), drawn(80, 24, 6)
        distances = fidelity._distances(one, singular(reference), 20)
        kept = torch.ones(count, dtype=torch.bool)
        kept[3::20] = False
        assert len(distances) == 21
        for place, rows in ((0, one), (1 + 3, one[kept])):
            expected = distance_between(singular(rows), singular(reference))
            assert distances[place] == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_ratio_adds_the_variances_of_both_sides():
    one, held, reference = drawn(30, 60, 17, 1.2), drawn(30, 60, 18), drawn(90, 60, 19)
    variance = 0.0
    for features in (one, held):
        kept = [torch.arange(30) % 20 != group for group in range(20)]
        distances = [distance_between(singular(features[rows]), singular(reference)) for rows in kept]
        variance += 19 * float(torch.tensor(distances, dtype=torch.float64).log().var(unbiased=False))
    interval = frechet_ratio(one, held, reference)
    reach = student_quantile(0.95, 19) * math.sqrt(variance)
    assert math.log(interval.high / interval.mean) == pytest.approx(reach, rel=1e-5)
    assert math.log(interval.mean / interval.low) == pytest.approx(reach, rel=1e-5)


def test_subsets_share_what_they_have_in_common():
    # 24 of 80: 0.3 of the variance is that of all images, the rest is averaged over 8 subsets.
    many, reference = drawn(80, 40, 20), drawn(100, 40, 21)
    target = singular(reference)
    first = torch.from_numpy(keyed(3, "frechet", "generated").permutation(80)[:24])
    _, alone = fidelity._log_distance(many[first], target)
    _, together = fidelity._subset_log_distance(many, 24, target, 3, "generated")
    assert together == pytest.approx(alone * (0.3 + 0.7 / 8))


def test_the_distance_of_gaussians_is_found_and_held():
    # N(m, s²) and N(0, 1) in D = 4: |m|² + D (s − 1)²; by 4,000 samples of both the bias is small.
    reference = drawn(4000, 4, 7)
    truth = 4 * 0.5**2 + 4 * 0.5**2
    assert frechet_interval(drawn(4000, 4, 8, 1.5, 0.5), reference).mean == pytest.approx(truth, rel=0.06)
    intervals = [frechet_interval(drawn(60, 4, 100 + seed, 1.5, 0.5), reference[:500]) for seed in range(80)]
    middle = sum(interval.mean for interval in intervals) / 80
    assert middle > truth  # biased upwards by few samples
    assert 70 <= sum(interval.low <= middle <= interval.high for interval in intervals) <= 79


def test_real_images_have_a_ratio_of_one_and_the_interval_holds_it():
    reference = drawn(150, 40, 9)
    intervals = [
        frechet_ratio(drawn(30, 40, 200 + seed), drawn(40, 40, 300 + seed), reference, seed=seed) for seed in range(40)
    ]
    assert sum(interval.low <= 1 <= interval.high for interval in intervals) >= 37
    worse = [frechet_ratio(drawn(44, 40, 400 + seed, 1.4), drawn(30, 40, 500 + seed), reference) for seed in range(10)]
    assert sum(interval.low > 1 for interval in worse) >= 9
    # Nor are they wider than three times what the ratios scatter.
    spread = float(torch.tensor([interval.mean for interval in intervals]).std())
    assert sum(interval.high - interval.low for interval in intervals) / 40 < 3 * 2 * 1.96 * spread


def test_subsets_of_the_larger_side_are_drawn_by_the_seed_and_narrow_the_interval():
    few, many, reference = drawn(30, 40, 10), drawn(300, 40, 11), drawn(100, 40, 12)
    one, again = (frechet_ratio(many, few, reference, seed=1) for _ in range(2))
    assert one == again != frechet_ratio(many, few, reference, seed=2)
    alone = frechet_ratio(many[:30], few, reference)
    assert one.high / one.low < alone.high / alone.low
    # Sorted features: the subsets are drawn from all of them.
    mixed = torch.cat([drawn(150, 40, 13, shift=-2), drawn(150, 40, 14, shift=2)])
    assert frechet_ratio(mixed, few, reference).mean < 0.95 * frechet_ratio(mixed[:30], few, reference).mean


@pytest.mark.parametrize(
    ("generated", "held_out", "said"),
    [
        (torch.zeros(21, 3), drawn(40, 3, 0), "21 samples against 30; give at least 22"),
        (drawn(40, 3, 0), torch.zeros(21, 3), "21 samples against 30; give at least 22"),
        (drawn(40, 2, 0), drawn(40, 3, 0), "2 and 3 features"),
    ],
)
def test_what_says_nothing_is_refused(generated, held_out, said):
    with pytest.raises(ValueError, match=said):
        frechet_ratio(generated, held_out, drawn(30, 3, 1))


def test_the_reference_itself_has_no_ratio():
    reference = drawn(60, 40, 15)
    with pytest.raises(ValueError, match="of the reference"):
        frechet_ratio(reference, drawn(60, 40, 16), reference)


def test_a_distance_needs_more_samples_than_dimensions():
    for one, other in ((30, 90), (90, 30)):
        with pytest.raises(ValueError, match="30 samples of 40 features each; their covariance needs at least 41"):
            frechet_interval(drawn(one, 40, 0), drawn(other, 40, 1))
