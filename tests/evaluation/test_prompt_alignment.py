"""Retrieval, CLIP score and digits: closed forms, chance by simulation, and real pictures with a known answer."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data import CaptionedImages, DataConfig, split, to_signed, to_uint8
from ldm.data.layouts import open_source
from ldm.evaluation.features import Clip, feature_space
from ldm.evaluation.images import generate_images, sample_captions
from ldm.evaluation.prompt_alignment import (
    DigitClassifier,
    RetrievalGallery,
    clip_score,
    digit_accuracy,
    digit_of,
    retrieval,
)
from ldm.evaluation.stats import fraction_interval
from ldm.report.text import clip_line, retrieval_lines
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_source(DataConfig(path="digits", resolution=8)).samples


@pytest.fixture(scope="module")
def emoji():
    """Every 24th drawing, and two whose pictures are the same but whose names are not."""
    config = DataConfig(path="openmoji", resolution=32)
    samples = open_source(config).samples
    flags = [s for s in samples if s.captions[0] in ("flag of Norway", "flag of Svalbard & Jan Mayen")]
    chosen = [s for s in samples[::24] if s not in flags] + flags
    return CaptionedImages(chosen[:40], config, 0), CaptionedImages(chosen[40:], config, 0)


def test_captions_come_without_repetition_until_all_have_come(digits):
    samples = digits[:20]
    captions, own = sample_captions(samples, 47, seed=3)
    for start in (0, 20):
        assert sorted(own[start : start + 20]) == list(range(20))
    assert own[:20] != own[20:40]
    assert all(caption in samples[index].captions for caption, index in zip(captions, own, strict=True))
    pairs = list(zip(own, captions, strict=True))
    assert len(set(pairs)) == len(pairs)  # an image that comes again comes with another caption
    again = sample_captions(samples, 30, seed=3)
    assert again == (captions[:30], own[:30])
    assert sample_captions(samples, 30, seed=4) != again


def test_an_image_with_one_caption_is_asked_for_again(digits):
    single = [dataclasses.replace(sample, captions=sample.captions[:1]) for sample in digits[:2]]
    captions, own = sample_captions(single, 5, seed=0)
    assert [single[index].captions[0] for index in own] == captions


def test_counts_and_splits_are_checked(digits):
    with pytest.raises(ValueError, match="count is 0; it must be at least 1"):
        sample_captions(digits, 0, seed=0)
    with pytest.raises(ValueError, match="no images"):
        sample_captions([], 3, seed=0)


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(tmp_path):
    pipeline = tiny.pipeline(tmp_path)
    captions = ["a dog", "a cat", "a dog"]
    told: list[int] = []
    drawn = generate_images(pipeline, captions, seed=5, batch_size=2, progress=told.append)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, 3, 8, 8)
    assert told == [2, 1]
    alone = generate_images(pipeline, captions, seed=5, batch_size=1)
    assert int((drawn.int() - alone.int()).abs().max()) <= 1
    assert not torch.equal(drawn[0], drawn[2])  # of one caption, from other noise
    assert not torch.equal(drawn, generate_images(pipeline, captions, seed=6, batch_size=2))
    assert not torch.equal(drawn, generate_images(pipeline, captions, seed=5, batch_size=2, guidance_scale=1.0))
    assert not torch.equal(drawn, generate_images(pipeline, captions, seed=5, batch_size=2, num_inference_steps=2))
    # The first pictures of many are those of few.
    assert int((generate_images(pipeline, captions[:1], seed=5, batch_size=2).int() - drawn[:1].int()).abs().max()) <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"captions": []}, "no captions"),
        ({"num_inference_steps": 0}, "0"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ],
)
def test_settings_of_drawing_are_checked(tmp_path, changes, said):
    settings: dict[str, Any] = {"captions": ["a dog"], "seed": 0, "batch_size": 1} | changes
    with pytest.raises(ValueError, match=said):
        generate_images(tiny.pipeline(tmp_path), settings.pop("captions"), **settings)


def test_ranks_by_hand():
    gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 2.0], [-1.0, 0.0], [0.0, 1.0]])
    generated = torch.tensor([[5.0, 0.1], [0.7, 0.6], [0.0, 3.0], [0.9, 0.5]])
    found = retrieval(generated, gallery, [(0,), (0,), (2,), (3, 2)])
    # Length does not count; 4 is as near as 2 and counts half; of two own images the nearer one counts, and the
    # other is not in its way.
    assert found.ranks.tolist() == [1, 2, 1.5, 3.5]
    assert found.gallery == 5
    assert found.within[1].mean == 0.25
    assert found.within[5].mean == 1
    assert found.median.mean == 1.75
    assert found.median.low <= 1.75 <= found.median.high


def test_features_that_are_all_the_same_find_nothing():
    found = retrieval(torch.ones(30, 4), torch.ones(100, 4), [(i,) for i in range(30)])
    assert found.within[10].mean == 0
    assert found.median.mean == pytest.approx(50.5)


def test_chance_is_what_blind_drawing_gives():
    draws = torch.Generator().manual_seed(0)
    own = [(0,), (1, 2, 3), (4,), (5, 6)] * 300
    found = retrieval(torch.randn(1200, 8, generator=draws), torch.randn(40, 8, generator=draws), own)
    blind = torch.stack([torch.randperm(40, generator=draws) for _ in range(1200)])
    best = torch.stack([blind[row, list(indices)].min() for row, indices in enumerate(own)])
    # The definition of the rank leaves the other own images out, which lets a rank only become smaller.
    for k in (1, 5, 10):
        assert found.chance[k] == pytest.approx(float((best < k).double().mean()), abs=0.03)
        assert found.within[k].mean == pytest.approx(found.chance[k], abs=0.12)  # one gallery of 40 points
    assert abs(found.median_by_chance - float(best.double().median() + 1)) <= 1
    assert retrieval(torch.randn(3, 2), torch.randn(1918, 2), [(0,), (1,), (2,)]).median_by_chance == 959


def test_wilsons_interval():
    found = fraction_interval(torch.tensor([1.0] * 8 + [0.0] * 2))
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-3)
    none = fraction_interval(torch.zeros(20))
    assert (none.mean, none.low) == (0, 0)
    assert none.high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert fraction_interval(torch.ones(20)).low == pytest.approx(1 - none.high)


def test_captions_of_one_image_count_once():
    hits = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    alone = fraction_interval(hits)
    fourfold = fraction_interval(hits.repeat_interleave(4), torch.arange(8).repeat_interleave(4))
    assert fourfold.mean == alone.mean
    # Eight groups of four equal answers are eight answers; the sample deviation makes a little of it.
    assert fourfold.high - fourfold.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert fraction_interval(hits, torch.arange(8)) == alone
    assert fraction_interval(torch.zeros(8), torch.arange(2).repeat(4)) == fraction_interval(torch.zeros(2))


def test_retrieval_knows_that_captions_of_one_image_are_no_new_evidence():
    draws = torch.Generator().manual_seed(0)
    gallery = torch.randn(200, 6, generator=draws)
    generated = gallery[:40] + 0.8 * torch.randn(40, 6, generator=draws)
    once = retrieval(generated, gallery, [(i,) for i in range(40)])
    fourfold = retrieval(generated.repeat(4, 1), gallery, [(i,) for i in range(40)] * 4)
    assert fourfold.median == once.median  # the same images, drawn again the same way
    assert once.median.low < once.median.mean < once.median.high
    one, four = (found.within[5].high - found.within[5].low for found in (once, fourfold))
    assert four == pytest.approx(one, rel=0.05)


def test_intervals_hold_what_they_promise():
    """Captions of 40 images, five each, whose hits depend on the image: the share of all is inside 95 times in 100."""
    random = np.random.default_rng(0)
    groups = torch.arange(40).repeat_interleave(5)
    inside = ungrouped = 0
    for _ in range(300):
        chances = random.beta(0.6, 1.4, size=40)  # mean 0.3
        hits = torch.from_numpy(random.random(200) < np.repeat(chances, 5)).double()
        found, plain = fraction_interval(hits, groups), fraction_interval(hits)
        inside += found.low <= 0.3 <= found.high
        ungrouped += plain.low <= 0.3 <= plain.high
    assert 0.91 <= inside / 300 <= 0.985
    assert ungrouped / 300 < 0.85


@pytest.mark.parametrize(
    ("generated", "gallery", "own", "said"),
    [
        (torch.ones(2, 3), torch.ones(5, 4), [(0,), (1,)], r"\[2, 3\] and those of the gallery \[5, 4\]"),
        (torch.ones(0, 3), torch.ones(5, 3), [], r"shape \[0, 3\]"),
        (torch.ones(2, 3), torch.ones(5, 3), [(0,)], "1 captions for 2 images"),
        (torch.ones(2, 3), torch.ones(5, 3), [(0,), ()], r"\[\]; give at least one"),
        (torch.ones(2, 3), torch.ones(5, 3), [(0,), (5,)], r"\[5\]; give at least one index of 0 to 4"),
        (torch.full((2, 3), math.inf), torch.ones(5, 3), [(0,), (1,)], "generated features are not all finite"),
        (torch.ones(2, 3), torch.full((5, 3), math.nan), [(0,), (1,)], "gallery features are not all finite"),
    ],
)
def test_what_is_no_question_is_refused(generated, gallery, own, said):
    with pytest.raises(ValueError, match=said):
        retrieval(generated, gallery, own)


def test_real_pictures_lead_back_and_others_do_not(emoji):
    """Drawings that were blurred a little find themselves among all, whichever part they are of."""
    training, held_out = emoji
    space = feature_space("pixel", device=CPU)
    gallery = RetrievalGallery.from_images([training, held_out], space)
    assert gallery.samples == (*training.samples, *held_out.samples)
    alone = space.compute([to_signed(held_out.image_at(3)[None])])
    torch.testing.assert_close(gallery.features[[len(training) + 3]], alone)

    captions, own = sample_captions(held_out.samples, 60, seed=0)
    pictures = to_signed(torch.stack([held_out.image_at(index) for index in own]))
    blurred = F.interpolate(F.avg_pool2d(pictures, 2), 32, mode="bilinear").clamp(-1, 1)
    found = retrieval(space.compute([blurred]), gallery.features, gallery.matches(captions))
    assert found.within[1].mean > 0.9
    assert found.within[1].low > found.chance[10]
    moved = retrieval(space.compute([blurred.roll(1, 0)]), gallery.features, gallery.matches(captions))
    assert moved.within[10].low < 2 * found.chance[10]
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["captions"] == 60
    assert content["gallery"] == len(training) + len(held_out)
    assert content["within"]["10"]["chance"] == found.chance[10]
    said = "\n".join(retrieval_lines(found, space.label()))
    assert space.label() in said
    assert f"among all {content['gallery']}" in said
    assert f"among the 10 nearest  {100 * found.within[10].mean:.1f} %".replace("  ", " ") in said.replace("  ", " ")


def test_features_stand_in_the_order_of_the_samples_whatever_their_shapes(emoji):
    config = dataclasses.replace(emoji[0].config, resolution=64, buckets=True)
    sizes = [(64, 64), (40, 80), (80, 40), (64, 64), (80, 40)]
    samples = [dataclasses.replace(s, size=size) for s, size in zip(emoji[0].samples, sizes, strict=False)]
    images = CaptionedImages(samples, config, 0)
    assert [index for chunk in images.chunks(32) for index in chunk] != list(range(5))
    space = feature_space("pixel", device=CPU)
    alone = torch.cat([space.compute([to_signed(images.image_at(index)[None])]) for index in range(5)])
    torch.testing.assert_close(RetrievalGallery.from_images([images], space).features, alone)


def test_own_images_bear_the_caption_or_are_the_same_picture(emoji, digits):
    training, held_out = emoji
    gallery = RetrievalGallery.from_images([training, held_out], feature_space("pixel", device=CPU))
    norway, svalbard = gallery.matches(["flag of Norway", "Svalbard & Jan Mayen flag"])
    assert norway == svalbard
    assert {gallery.samples[i].captions[0] for i in norway} == {"flag of Norway", "flag of Svalbard & Jan Mayen"}
    (dog,) = gallery.matches([training.samples[7].captions[0]])
    assert dog == (7,)
    assert gallery.indices(held_out.samples[:2]) == [len(training), len(training) + 1]
    with pytest.raises(ValueError, match="the caption 'a teapot in space'"):
        gallery.matches(["a teapot in space"])

    scans = CaptionedImages(digits[:60], DataConfig(path="digits", resolution=8), 0)
    threes = RetrievalGallery.from_images([scans], feature_space("pixel", device=CPU)).matches(
        ["a handwritten three", "the digit 3"]
    )
    assert threes[0] == threes[1] == tuple(i for i in range(60) if digit_of(digits[i]) == 3)


def test_the_share_that_is_read_as_asked(digits):
    training, held_out = split(digits, 0.1)
    reader = DigitClassifier.fit(training)
    asked = [digit_of(sample) for sample in held_out]
    pictures = torch.stack([CaptionedImages(held_out, DataConfig(path="digits", resolution=16), 0).image_at(i)
                            for i in range(len(held_out))])  # fmt: skip
    found = digit_accuracy(reader, pictures, asked)
    assert found.mean >= 0.97
    assert 0.9 < found.low < found.mean < found.high <= 1
    assert digit_accuracy(reader, pictures, [(digit + 1) % 10 for digit in asked]).mean < 0.02
    with pytest.raises(ValueError, match="3 images and 2 digits"):
        digit_accuracy(reader, pictures[:3], asked[:2])


class ColourModel(torch.nn.Module):
    """In the place of open_clip's network: a picture is its mean colour, a text the colour that it names."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.eye(3), -torch.eye(3)])[tokens] * 7


def colour_clip() -> Clip:
    names = ["red", "green", "blue", "no red"]
    return Clip(
        name="colours",
        model=ColourModel(),
        tokenizer=lambda texts: torch.tensor([names.index(text) for text in texts]),
        size=(8, 8),
        mean=torch.zeros(3, 1, 1),
        std=torch.ones(3, 1, 1),
        filter="bilinear",
        dimensions=3,
    )


def test_clip_score_by_hand():
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.6, 0.0, 0.8]])
    pictures = to_uint8(colours.view(3, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1)
    found = clip_score(colour_clip(), pictures, ["red", "green", "red"])
    assert found.hundred.mean == pytest.approx(100 * (1 + 1 + 0.6) / 3, abs=0.1)
    assert found.hundred.low < found.hundred.mean < found.hundred.high
    assert found.score == pytest.approx(2.5 * 2.6 / 3, abs=3e-3)
    assert found.others == pytest.approx(100 * (0 + 1 + 0 + 0 + 0.6 + 0) / 6, abs=0.1)
    # What is less than unlike is 0 for CLIPScore, and not for the cosine.
    opposite = clip_score(colour_clip(), pictures, ["no red", "green", "blue"])
    assert opposite.hundred.mean == pytest.approx(100 * (-1 + 1 + 0.8) / 3, abs=0.1)
    assert opposite.score == pytest.approx(2.5 * 1.8 / 3, abs=3e-3)
    said = clip_line(found)
    assert "100 x cosine" in said
    assert "colours" in said
    assert json.loads(json.dumps(found.to_dict()))["pictures"] == 3
    with pytest.raises(ValueError, match="3 images and 2 captions"):
        clip_score(colour_clip(), pictures, ["red", "green"])
    with pytest.raises(ValueError, match="at least 2"):
        clip_score(colour_clip(), pictures[:1], ["red"])
