"""Copies are found though noisy, blurred, mirrored or one of several variants; unseen and average pictures are none."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from ldm.data import DataConfig, split
from ldm.data.layouts import open_source
from ldm.evaluation.memorization import (
    BandGap,
    CountedFraction,
    LossGap,
    color_layout,
    find_copies,
    nearest_sheet,
)
from ldm.evaluation.stats import beta_binomial_tail
from ldm.evaluation.verdict import Verdict, verdict
from ldm.pipelines.images import from_pil


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture(scope="module")
def digits():
    """(600 training, 176 held-out) scans [N, 3, 8, 8]."""
    samples = open_source(DataConfig(path="digits", resolution=8)).samples
    training, held_out = split(samples, 0.1)
    return tuple(from_pil([s.load() for s in side]) for side in (training[:600], held_out))


@pytest.fixture(scope="module")
def tones():
    """150 drawings in three tones, of which 30 are held out: (training, groups, held-out)."""
    drawings = F.interpolate(normal(3, 150, 3, 3, 3), size=16, mode="bilinear").tanh()
    shades = torch.tensor([[0.08, 0, 0], [0, 0, 0], [-0.08, 0, 0.04]]).view(1, 3, 3, 1, 1)
    toned = drawings[:, None] + shades  # [150, 3, 3, 16, 16]
    return toned[:120].flatten(0, 1), [f"drawing {i}" for i in range(120) for _ in range(3)], toned[120:, 0]


def features(*images):
    return tuple(color_layout(some) for some in images)


def noisy(images, amount, seed=0):
    return (images + amount * normal(seed, *images.shape)).clamp(-1, 1).float()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("calibrated_on", [100, 5, None])
def test_held_out_scans_passed_off_as_pictures_are_not_memorised(digits, seed, calibrated_on):
    training, held_out = features(*digits)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(176))
    rest = None if calibrated_on is None else held_out[order[76 : 76 + calibrated_on]]
    found = find_copies(held_out[order[:76]], training, rest)
    assert found.chance > 1e-3
    assert 0.02 < found.expected <= 0.05
    assert verdict(found, None).kind == ("undecided" if rest is None else "learning")


@pytest.mark.parametrize("held_out", [176, 5, None])
def test_noisy_copies_of_50_scans_are_memorised(digits, held_out):
    training, unseen = digits
    pictures = noisy(training[:50].repeat(2, 1, 1, 1), 0.1)
    compared = None if held_out is None else color_layout(unseen[:held_out])
    found = find_copies(*features(pictures, training[:50]), compared)
    assert found.nearest.tolist() == list(range(50)) * 2
    assert found.calibrated_on == (held_out or 0, 0 if held_out == 176 else 50)
    said = verdict(found, None)
    assert said.kind == "memorizing"
    assert (
        f"{found.flagged_fraction.count} of 100 images ({found.flagged_fraction.fraction:.0%}".replace("%", " %")
        in said.sentence
    )


def test_averages_of_neighbours_are_nearer_than_unseen_scans_and_no_copies(digits):
    training, held_out = features(*digits)
    nearest = torch.cdist(held_out, training).topk(2, largest=False).indices
    found = find_copies(training[nearest].mean(dim=1), training, held_out)
    unseen = find_copies(held_out, training, held_out)
    assert found.distance.mean() < 0.8 * unseen.distance.mean()
    assert found.closer.fraction > unseen.closer.fraction + 0.3  # a plain distance is deceived
    assert verdict(found, None).kind == "learning"


def test_the_share_of_copies_in_a_mixture_shows(digits):
    training, held_out = digits
    shares, kinds = [], []
    for copies in (0, 4, 38, 76):
        pictures = torch.cat([noisy(training[:copies], 0.05), held_out[: 76 - copies]])
        found = find_copies(*features(pictures, training, held_out[76:]))
        shares.append(found.flagged_fraction.fraction)
        kinds.append(verdict(found, None).kind)
        assert bool(found.flagged[:copies].all())
    assert shares == sorted(shares)
    assert kinds[0] == "learning"
    assert kinds[1] != "memorizing"
    assert kinds[2:] == ["memorizing"] * 2


def test_variants_of_one_drawing_do_not_hide_copies_of_it(tones):
    training, groups, held_out = tones
    pictures = noisy(training[::4], 0.2)
    known, alike = features(training, pictures)
    grouped = find_copies(alike, known, color_layout(held_out), groups=groups)
    assert grouped.flagged_fraction.fraction > 0.9
    # Without groups, what is near enough counts as a variant.
    assert find_copies(alike, known, None).flagged_fraction.fraction > 0.9
    apart = find_copies(alike, known[1::3], None)
    assert apart.flagged_fraction.fraction > 0.9
    unseen = find_copies(color_layout(held_out), known, None, groups=groups)
    assert unseen.flagged_fraction.fraction < 0.2


def test_training_images_are_left_out_with_their_whole_group(tones):
    training, groups, held_out = tones
    # Far apart in features, so that only their names tell that they are variants.
    far = features(training)[0]
    far[1::3] += 0.35 * far[1::3].std() * normal(5, 1, far.shape[1])
    with_names = find_copies(color_layout(held_out), far, None, groups=groups)
    without = find_copies(color_layout(held_out), far, None)
    assert with_names.threshold > without.threshold
    # Names are believed: what they tell apart is not left out, however near it is.
    apart = find_copies(color_layout(held_out), color_layout(training), None, groups=[str(i) for i in range(360)])
    assert apart.threshold < 0.5 * find_copies(color_layout(held_out), color_layout(training), None).threshold


def test_mirrored_copies_are_found_where_training_flips(digits):
    training, held_out = digits
    pictures = noisy(training[:60].flip(-1), 0.05)
    known, unseen, alike, mirrored = features(training, held_out, pictures, training.flip(-1))
    assert find_copies(alike, known, unseen, mirrored=mirrored).nearest.tolist() == list(range(60))
    assert find_copies(alike, known, unseen, mirrored=mirrored).flagged_fraction.fraction > 0.95
    assert find_copies(alike, known, unseen).flagged_fraction.fraction < 0.2


def test_ratio_and_closer_are_those_of_a_line():
    """Training images on a line; of variants only the nearest counts."""
    training = torch.tensor([[0.0], [0.02], [1], [3], [6], [10], [15], [21], [28], [36], [45], [55]]).double()
    found = find_copies(torch.tensor([[0.25], [14.0], [100.0]]).double(), training, None)
    assert found.nearest.tolist() == [1, 6, 11]
    torch.testing.assert_close(found.distance, torch.tensor([0.23, 1.0, 45]).double())
    # The spread makes variants of what is nearer than 5.26: 0 to 3 of 0.02, and 10 of 15, but not 21.
    torch.testing.assert_close(found.ratio, torch.tensor([0.23 / 5.75, 1 / 7, 45 / 55]).double())
    assert found.closer.count == 2  # 45 is not below the 10 between 55 and 45


def test_chance_is_beta_binomial():
    for count, total, below, above in ((0, 20, 3, 50), (4, 20, 3, 50), (97, 128, 1, 20), (256, 256, 8, 170)):
        expected = stats.betabinom(total, below, above).sf(count - 1)
        assert beta_binomial_tail(count, total, below, above) == pytest.approx(expected, rel=1e-6)


def test_share_has_the_interval_of_wilson():
    for count, total in ((0, 20), (23, 256), (50, 50)):
        share = CountedFraction.from_mask(torch.arange(total) < count)
        expected = stats.binomtest(count, total).proportion_ci(method="wilson")
        assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def gap_of(training, held_out, interval=0.001):
    band = BandGap(0, 249, training, held_out, held_out - training, interval)
    return LossGap((band, BandGap(250, 499, 0.1, 0.1, 0.0, 0.01)), 50, 50, 2)


def test_a_loss_that_is_known_by_heart_raises_doubt_and_convicts_no_picture(digits):
    training, held_out = features(*digits)
    found = find_copies(held_out[:76], training, held_out[76:])
    assert verdict(found, gap_of(0.30, 0.31)).kind == "learning"
    doubt = verdict(found, gap_of(0.05, 0.6))
    assert doubt.kind == "undecided"
    assert "at timesteps 0 to 249 the loss is 0.05 on training and 0.6 " in doubt.sentence
    assert verdict(found, gap_of(0.05, 0.6, interval=0.9)).kind == "learning"


def test_a_picture_that_is_drawn_again_is_evidence_once(digits):
    training, held_out = features(*digits)
    lowest = int(find_copies(held_out, training, held_out).ratio.argmin())  # suspect, though unseen
    again = find_copies(held_out[lowest].repeat(60, 1), training, held_out)
    assert again.flagged_fraction.count == 60 and again.distinct == 1
    assert again.chance > 0.01 and verdict(again, None).kind != "memorizing"
    for copies in (1, 3, 5):
        found = find_copies(training[torch.arange(60) % copies], training, held_out)
        assert (found.distinct, verdict(found, None).kind) == (copies, "memorizing")


def test_pictures_of_something_else_that_are_nearest_to_one_odd_image_are_no_copies(digits):
    training, held_out = digits
    odd = noisy(torch.zeros(40, 3, 8, 8), 0.1)  # grey, all of them nearest to the one grey training image
    known, alike, unseen = features(torch.cat([training[:50], odd[:1]]), odd[1:] + 0.5, held_out[:60])
    found = find_copies(alike, known, unseen)
    assert found.flagged_fraction.count > 30 and found.distinct == 1
    assert verdict(found, None).kind != "memorizing"


def test_of_images_with_one_nearest_the_first_is_evidence(digits):
    training, held_out = features(*digits)
    found = find_copies(held_out, training, held_out)
    own = int(found.flagged.logical_not().nonzero()[0])
    both = torch.stack([training[int(found.nearest[own])], held_out[own]])
    first, last = (find_copies(images, training, held_out) for images in (both, both.flip(0)))
    assert first.distinct == last.distinct == 1
    assert first.chance < 0.1 and last.chance == pytest.approx(1)


def test_a_verdict_is_read_as_it_is_stored_now_and_as_it_was(digits):
    training, held_out = features(*digits)
    now = verdict(find_copies(training[:20], training, held_out), None)
    assert Verdict.from_json(json.loads(json.dumps(vars(now)))) == now
    assert Verdict.from_json({"kind": "memorising", "sentence": "Memorising: all."}).kind == "memorizing"
    for wrong in (None, [], {}, {"kind": "good", "sentence": ""}, {"kind": ["learning"], "sentence": ""},
                  {"kind": "learning", "sentence": 3}):  # fmt: skip
        with pytest.raises(ValueError, match="is no verdict"):
            Verdict.from_json(wrong)


def test_few_pictures_decide_nothing_unless_they_are_copies(digits):
    training, held_out = features(*digits)
    assert verdict(find_copies(held_out[:5], training, held_out[5:]), None).kind == "undecided"
    assert verdict(find_copies(training[:20], training, held_out), None).kind == "memorizing"


def test_sheet_shows_the_closest_first_beside_its_nearest(digits):
    training, held_out = features(*digits)
    pictures = torch.cat([held_out[:3], training[7:8]])
    found = find_copies(pictures, training, held_out)
    colours = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    known = [Image.new("RGB", (8, 8), (0, 0, i % 256)) for i in range(len(training))]
    sheet = nearest_sheet(colours, known.__getitem__, found)
    first, second = sheet.getpixel((52, 70)), sheet.getpixel((152, 70))
    assert first == (180, 0, 0)
    assert second == (0, 0, 7)
    assert sheet.size == (8 * (96 + 4) + 4, 96 + 4 + 18 + 4)
    with pytest.raises(ValueError, match="3 images but 4"):
        nearest_sheet(colours[:3], known.__getitem__, found)


def test_result_is_plain_json(digits):
    training, held_out = features(*digits)
    found = json.loads(json.dumps(find_copies(held_out[:20], training, held_out[76:]).to_dict(), allow_nan=False))
    assert found["suspects"]["total"] == len(found["ratio"]) == 20
    assert found["calibrated_on"] == [100, 0]
    assert found["held_out"]["share"] == found["held_out"]["count"] / 100


def test_features_see_places_of_colours_and_not_noise():
    image = F.interpolate(normal(0, 1, 3, 8, 8), size=64, mode="nearest")
    assert color_layout(image).shape == (1, 192)
    torch.testing.assert_close(color_layout(image), normal(0, 1, 3, 8, 8).flatten(1))
    away = color_layout(image + normal(1, 1, 3, 64, 64)) - color_layout(image)
    assert away.std() < 0.2
    with pytest.raises(ValueError, match="images are 4x64"):
        color_layout(image[:, :, :4])


def test_faults_are_named(digits):
    training, held_out = features(*digits)
    with pytest.raises(ValueError, match="9 different training images; at least 10"):
        find_copies(held_out, training[:18], None, groups=[str(i // 2) for i in range(18)])
    with pytest.raises(ValueError, match=r"generated features have shape \[176, 5\]"):
        find_copies(held_out[:, :5], training, None)
    with pytest.raises(ValueError, match="held-out features are not all finite"):
        find_copies(held_out, training, held_out / 0)
    with pytest.raises(ValueError, match="600 training images and 3 groups"):
        find_copies(held_out, training, None, groups=["a", "b", "c"])
    with pytest.raises(ValueError, match="no generated images"):
        find_copies(held_out[:0], training, None)
