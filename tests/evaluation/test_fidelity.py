"""The account of quality: which figures are printed, on what they stand, and what is refused."""

import json

import pytest
import torch

from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.fidelity import (
    frechet_distance,
    frechet_interval,
    frechet_ratio,
    kid,
    measure_fidelity,
    precision_recall,
)
from ldm.report.text import fidelity_lines


def drawn(count, dimensions, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) * scale + shift


def space(dimensions, name="efficientnet"):
    return FeatureSpace(name, dimensions, "128 bicubic", lambda images: images.flatten(1), "Some")


def test_below_the_feature_dimension_only_the_ratio_is_printed():
    generated, training, held_out = drawn(60, 100, 0, 1.2), drawn(150, 100, 1), drawn(80, 100, 2)
    found = measure_fidelity(generated, training, held_out, space(100), seed=3)
    expected = frechet_ratio(generated, held_out, training, seed=3)
    ratio = found.frechet_ratio
    assert (ratio.value, ratio.low, ratio.high) == (expected.mean, expected.low, expected.high)
    assert (ratio.samples, ratio.yardstick, ratio.reference_samples) == (60, 60, 150)
    assert found.generated.frechet is found.held_out.frechet is None
    assert not any(line.startswith(("Fréchet distance", "FID")) for line in fidelity_lines(found))
    assert [line.split(";")[0] for line in found.left_out] == [
        "Left out: the Fréchet distance of 60 generated images to 150 training images",
        "Left out: the Fréchet distance of 80 held-out images to 150 training images",
    ]
    assert "at least 101" in found.left_out[0]


@pytest.mark.parametrize(
    ("name", "dimensions", "is_fid"),
    [("inception", 2048, True), ("inception", 64, False), ("clip", 64, False)],
)
def test_fid_is_what_is_measured_on_all_features_of_inception(name, dimensions, is_fid):
    # A distance on 2048 features needs more samples than a test has time for: only this is looked at there.
    assert space(dimensions, name).is_fid == is_fid


def test_above_the_feature_dimension_the_distance_is_printed_too():
    generated, training, held_out = drawn(90, 8, 0, 1.2, 0.2), drawn(150, 8, 1), drawn(70, 8, 2)
    found = measure_fidelity(generated, training, held_out, space(8))
    assert found.left_out == ()
    for figures, features in ((found.generated, generated), (found.held_out, held_out)):
        interval = frechet_interval(features, training)
        assert (figures.frechet.value, figures.frechet.low) == (interval.mean, interval.low)
        assert figures.frechet.value == pytest.approx(frechet_distance(features, training))
        assert figures.frechet.samples == figures.kid.samples == figures.precision.samples == len(features)
        assert figures.kid.value == kid(features, training).mean
        shares = precision_recall(features, training)
        assert (figures.precision.value, figures.precision.high) == (shares.precision.mean, shares.precision.high)
    # Recall grows with the number of pictures, so both have 70.
    assert found.generated.recall.samples == found.held_out.recall.samples == 70
    assert found.held_out.recall.value == precision_recall(held_out, training).recall.mean
    assert found.generated.recall.value <= precision_recall(generated, training).recall.mean


def test_a_reference_of_too_few_images_leaves_no_distance_either():
    found = measure_fidelity(drawn(90, 60, 0), drawn(60, 60, 1), None, space(60))
    assert found.generated.frechet is None
    assert "90 generated images to 60 training images; with 60 features" in found.left_out[1]


def test_every_line_says_what_it_stands_on():
    found = measure_fidelity(drawn(60, 8, 0), drawn(150, 8, 1), drawn(70, 8, 2), space(8))
    lines = fidelity_lines(found)
    assert len(lines) == len(found.metrics()) == 9
    label = "Some features (8, images resized to 128 bicubic)"
    assert all(line.endswith(f"against 150 training images, {label}") for line in lines)
    assert lines[0].startswith("Fréchet ratio") and "60 generated over 60 held-out against" in lines[0]
    assert [line.split()[0] for line in lines] == ["Fréchet"] * 3 + ["KID"] * 2 + ["precision"] * 2 + ["recall"] * 2
    assert "70 held-out against" in lines[2] and "60 generated against" in lines[1]
    assert f"{found.generated.kid.value:.4g}" in lines[3] and f"({found.generated.kid.low:.4g} to " in lines[3]
    read = json.loads(json.dumps(found.to_dict()))
    assert read["generated"]["kid"]["samples"] == 60 and read["held_out"]["recall"]["value"] > 0
    assert read["frechet_ratio"]["yardstick"] == 60 and read["left_out"] == []


def test_without_held_out_images_it_says_what_is_missing():
    generated, training = drawn(60, 8, 0), drawn(150, 8, 1)
    for held_out, count in ((None, 0), (drawn(49, 8, 2), 49)):
        found = measure_fidelity(generated, training, held_out, space(8))
        assert found.frechet_ratio is found.held_out is None
        assert found.generated.frechet is not None and found.generated.recall.samples == 60
        (said,) = found.left_out
        assert said.startswith("Left out: the Fréchet ratio") and f"of which there are {count}; at least 50" in said
        assert fidelity_lines(found)[-1] == said and len(fidelity_lines(found)) == 5
    assert json.loads(json.dumps(found.to_dict()))["held_out"] is None


def test_the_seed_draws_the_subsets():
    generated, training, held_out = drawn(200, 20, 0), drawn(80, 20, 1), drawn(60, 20, 2)
    one, again, other = (measure_fidelity(generated, training, held_out, space(20), seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.frechet_ratio != other.frechet_ratio and one.generated.recall != other.generated.recall
    assert one.generated.kid == other.generated.kid


@pytest.mark.parametrize(
    ("generated", "training", "held_out", "said"),
    [
        (drawn(49, 8, 0), drawn(90, 8, 1), None, "49 generated images; at least 50"),
        (drawn(90, 8, 0), drawn(49, 8, 1), None, "49 training images; at least 50"),
        (drawn(90, 8, 0), drawn(90, 8, 1), drawn(90, 7, 2), r"held-out images have shape \[90, 7\]; .*\[images, 8\]"),
        (drawn(90, 8, 0)[0], drawn(90, 8, 1), None, r"generated images have shape \[8\]"),
        (drawn(90, 8, 0) / 0, drawn(90, 8, 1), None, "90 of 90 samples have features that are not finite"),
    ],
)
def test_what_says_nothing_is_refused(generated, training, held_out, said):
    with pytest.raises(ValueError, match=said):
        measure_fidelity(generated, training, held_out, space(8))
