"""The Fréchet distance against closed forms and other libraries, its features, and Student's interval."""

import math

import pytest
import torch
import torch.nn.functional as F

from experiments.ddim_tables import DigitFeatures
from ldm.data import DataConfig, split
from ldm.data.layouts import open_source
from ldm.evaluation.features import pixel_features, random_directions
from ldm.evaluation.fidelity import Gaussian, distance_between, frechet_distance
from ldm.evaluation.prompt_alignment import digit_of
from ldm.evaluation.stats import student_interval, student_quantile
from ldm.pipelines.images import from_pil


def drawn(count, dimensions, seed, scale=1.0):
    return scale * torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, dimensions=6):
    factor = drawn(dimensions, dimensions, seed)
    return factor @ factor.T


def test_gaussians_with_one_eigenbasis_have_a_closed_form():
    basis = random_directions(5, 5)
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.25, 0.0]).double(), torch.tensor([4.0, 1.0, 0.0, 2.25, 0.0]).double()
    mean = torch.tensor([1.0, 2.0, 0.0, 0.0, 2.0]).double()
    one = Gaussian(torch.zeros(5).double(), basis @ a.diag() @ basis.T)
    other = Gaussian(mean, basis @ b.diag() @ basis.T)
    expected = 9.0 + float((a.sqrt() - b.sqrt()).square().sum())  # singular directions included
    assert distance_between(one, other) == pytest.approx(expected, rel=1e-7)  # rounding, under a root


def test_any_two_gaussians_agree_with_the_root_of_a_general_matrix():
    linalg = pytest.importorskip("scipy.linalg")
    one, other = (Gaussian(drawn(1, 6, seed)[0], covariance(seed)) for seed in (1, 2))
    root = linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    expected = float((one.mean - other.mean).square().sum())
    expected += float(one.covariance.trace() + other.covariance.trace()) - 2 * root.trace()
    assert distance_between(one, other) == pytest.approx(expected, rel=1e-8)
    assert distance_between(other, one) == pytest.approx(expected, rel=1e-8)


def test_samples_agree_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = drawn(300, 8, 3), drawn(200, 8, 4, scale=2.0) + 1
    expected = fid._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_samples_give_their_unbiased_covariance_in_float64():
    features = drawn(40, 3, 5).float()
    fitted = Gaussian.fit(features)
    centred = features.double() - features.double().mean(dim=0)
    torch.testing.assert_close(fitted.covariance, centred.T @ centred / 39)
    assert fitted.mean.dtype == fitted.covariance.dtype == torch.float64
    assert Gaussian.fit(features[:, :1]).covariance.shape == (1, 1)


def test_a_set_is_at_no_distance_from_itself_and_at_that_of_its_mean_when_it_is_moved():
    features = drawn(100, 6, 6) + 1e3
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 2) == pytest.approx(24, rel=1e-6)
    for seed in range(10):  # covariances of rank 2, whose other eigenvalues are rounding of either sign
        thin = drawn(100, 2, seed) @ drawn(2, 12, 100 + seed)
        assert 0 <= frechet_distance(thin, thin) < 1e-5


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.zeros(6, 6), "6 samples of 6 features each; their covariance needs at least 7"),
        (torch.zeros(5), r"shape \[5\]"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), "2 of 3 samples"),
    ],
)
def test_what_says_nothing_is_refused(features, said):
    with pytest.raises(ValueError, match=said):
        Gaussian.fit(features)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(drawn(9, 3, 0), drawn(9, 2, 0))


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062047), (2, 4.3026527), (9, 2.2621572), (29, 2.0452296)])
def test_quantiles_of_student(freedom, t):
    assert student_quantile(0.95, freedom) == pytest.approx(t, rel=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = sum(
        abs(interval.mean) <= interval.high - interval.mean
        for interval in map(student_interval, drawn(400, 3, 8).tolist())
    )
    assert 0.91 < held / 400 < 0.99
    interval = student_interval([1.0, 3.0])
    assert (interval.mean, interval.high) == pytest.approx((2, 2 + 12.7062047), rel=1e-6)
    assert interval.low == pytest.approx(4 - interval.high)
    with pytest.raises(ValueError, match="1 value"):
        student_interval([1.0])
    with pytest.raises(ValueError, match="confidence is 95"):
        student_interval([1.0, 2.0], 95)


@pytest.fixture(scope="module")
def scans():
    training, held_out = split(open_source(DataConfig(path="digits", resolution=8)).samples, 0.1)
    return from_pil([sample.load() for sample in (*training, *held_out)])[:, :1], [digit_of(s) for s in training]


@pytest.fixture(scope="module")
def digit_features(scans):
    images, digits = scans
    return DigitFeatures.fit(images[: len(digits)], digits)


@pytest.mark.parametrize("name", ["digit", "pixel"])
def test_what_is_wrong_with_pictures_shows(scans, digit_features, name):
    features = digit_features if name == "digit" else pixel_features
    images, _ = scans
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))]
    aside, rest = images[:300], images[300:]
    reference = features(rest)
    noise = torch.randn(aside.shape, generator=torch.Generator().manual_seed(2))
    real = frechet_distance(features(aside), reference)
    for worse, factor in (
        ((aside + 0.7 * noise).clamp(-1, 1), 5),
        (F.avg_pool2d(F.pad(aside, (1, 1, 1, 1), value=-1), 3, 1), 5),
        (aside.flip(-2), 5),
        (0.7 * aside - 0.3, 3),
    ):
        assert frechet_distance(features(worse), reference) > factor * real


def test_digit_features_do_not_see_size_or_channels(scans, digit_features):
    images = scans[0][:4]
    large = images.repeat_interleave(4, -1).repeat_interleave(4, -2).expand(-1, 3, -1, -1)
    torch.testing.assert_close(digit_features(large), digit_features(images))
    assert digit_features(images).shape == (4, 32)


def test_pixel_features_see_colours_and_edges_and_refuse_what_is_too_small():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert pixel_features(images).shape == (4, 64)
    assert not torch.allclose(pixel_features(images), pixel_features(images.flip(1)))
    # The same colours in each of the 8×8 places, other edges.
    inside = images.unflatten(-1, (8, 4)).flip(-1).flatten(-2)
    assert not torch.allclose(pixel_features(images), pixel_features(inside))
    with pytest.raises(ValueError, match="7x9"):
        pixel_features(torch.zeros(1, 1, 7, 9))
    directions = random_directions(20, 6)
    torch.testing.assert_close(directions.T @ directions, torch.eye(6).double())
    assert math.isclose(float(directions.std()), 0.22, abs_tol=0.03)
