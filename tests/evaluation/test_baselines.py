"""The four verdicts on pictures of which the answer is known: noise, the mean image, blur, copies, unseen images …"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm import hub
from ldm.codecs import LatentCodec
from ldm.data import CaptionedImages, DataConfig, split, to_uint8
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.evaluation.evaluate import GeneratedImages, evaluate_pipeline, measure_generated, select_captions
from ldm.evaluation.features import feature_space
from ldm.evaluation.images import Reference, subset
from ldm.evaluation.verdict import baselines_of, compare_with_baselines
from ldm.report.text import evaluation_lines
from tests import tiny
from tests.training.runs import captioned_folder

FAR, LEARNING, MEMORIZING, UNDECIDED = "not yet a model of this data", "learning", "memorizing", "undecided"
CPU = torch.device("cpu")
PIXELS = feature_space("pixel", device=CPU)


def opened(path, resolution, cache, most=None, held_out=0.5):
    config = DataConfig(path=path, resolution=resolution, cache_dir=str(cache), held_out=held_out)
    ours, theirs = split(inspect(open_source(config), config).used, held_out)
    sides = CaptionedImages(ours, config, 0), CaptionedImages(theirs, config, 0)
    return tuple(side if most is None else subset(side, most, 0) for side in sides)


def stack(images):
    return torch.stack([images.image_at(index) for index in range(len(images))])


class Known:
    """Pictures [n, 3, H, W] of which the answer is known; `own` are the images that they are asked for."""

    def __init__(self, training, held_out, seed=0):
        self.training, self.held_out = stack(training), stack(held_out)
        self.random = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(self.held_out), generator=self.random)
        self.given = 0
        self.size = self.training.shape[-2:]

    def own(self, side, own):
        return (self.training if side == "training" else self.held_out)[own]

    def normal(self, count, *shape):
        return torch.randn(count, *shape, generator=self.random, dtype=torch.float64)

    def near(self, images, std=3.0):
        return (images.double() + std * self.normal(len(images), 3, *self.size)).round().clamp(0, 255).byte()

    def uniform_noise(self, side, own):
        return torch.randint(256, (len(own), 3, *self.size), generator=self.random).byte()

    def noise_in_colors(self, side, own):
        values = self.training.double().transpose(0, 1).flatten(1)
        mean, std = values.mean(dim=1).view(3, 1, 1), values.std(dim=1).view(3, 1, 1)
        return (mean + std * self.normal(len(own), 3, *self.size)).round().clamp(0, 255).byte()

    def noise_at_each_place(self, side, own):
        values = self.training.double()
        drawn = values.mean(dim=0) + values.std(dim=0) * self.normal(len(own), 3, *self.size)
        return drawn.round().clamp(0, 255).byte()

    def mean_image(self, side, own):
        return self.training.double().mean(dim=0).byte().expand(len(own), -1, -1, -1)

    def mean_image_with_jitter(self, side, own):
        return self.near(self.mean_image(side, own))

    def blurred(self, side, own):
        small = F.interpolate(self.own(side, own).float(), 3, mode="area")
        return F.interpolate(small, self.size, mode="bilinear").round().byte()

    def one_color_each(self, side, own):
        return self.own(side, own).double().mean(dim=(2, 3), keepdim=True).byte().expand(-1, -1, *self.size)

    def other_colors(self, side, own):
        drawn = F.interpolate(self.normal(len(own), 3, 4, 4), self.size, mode="bilinear")
        return (127.5 + 100 * drawn).clamp(0, 255).byte()

    def one_unseen_again(self, side, own):
        return self.near(self.held_out[self.order[:1]].expand(len(own), -1, -1, -1))

    def five_unseen_again(self, side, own):
        return self.near(self.held_out[self.order[torch.arange(len(own)) % 5]])

    def five_copies_again(self, side, own):
        return self.near(self.training[torch.arange(len(own)) % 5])

    def copies(self, side, own):
        return self.near(self.training[[index % len(self.training) for index in own]])

    def copies_and_noise(self, side, own):
        half = (torch.arange(len(own)) % 2 == 0).view(-1, 1, 1, 1)
        return torch.where(half, self.copies(side, own), self.noise_in_colors(side, own))

    def unseen(self, side, own):
        some = self.order[(self.given + torch.arange(len(own))) % len(self.order)]
        self.given += len(own)
        return self.held_out[some]


EXPECTED = {
    "uniform_noise": FAR,
    "noise_in_colors": FAR,
    "noise_at_each_place": FAR,
    "mean_image": FAR,
    "mean_image_with_jitter": FAR,
    "blurred": FAR,
    "one_color_each": FAR,
    "other_colors": FAR,
    "one_unseen_again": FAR,
    "five_unseen_again": UNDECIDED,
    "five_copies_again": MEMORIZING,
    "copies": MEMORIZING,
    "copies_and_noise": MEMORIZING,
    "unseen": LEARNING,
}


def measured(reference, known, name, count, draw=None):
    draw = draw or getattr(known, name)
    wanted = select_captions(reference, count, 0)
    asked = tuple(
        GeneratedImages(side, tuple(texts), tuple(own), draw(side, list(own))) for side, (texts, own) in wanted.items()
    )
    return measure_generated(
        asked, reference, seed=0, sampling={"num_inference_steps": 1, "sampler": "ddim", "guidance_scale": 1}
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(reference of 300 training and 200 held-out scans, their pictures)."""
    training, held_out = opened("digits", 8, tmp_path_factory.mktemp("cache"))
    sides = subset(training, 300, 0), subset(held_out, 200, 0)
    return Reference.from_data(*sides, PIXELS), sides


@pytest.mark.parametrize("name", EXPECTED)
def test_digits(name, digits):
    reference, sides = digits
    found = measured(reference, Known(*sides), name, 64)
    assert found.verdict.kind == EXPECTED[name], found.verdict.sentence


def test_the_figures_and_those_of_the_controls_are_in_the_sentence_and_the_json(digits):
    reference, sides = digits
    found = measured(reference, Known(*sides), "uniform_noise", 64)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["verdict"] == {"kind": FAR, "sentence": found.verdict.sentence}
    assert content["standing"]["controls"].keys() == {"noise", "the mean image", "blurred images"}
    assert content["standing"]["generated"]["precision"]["mean"] == 0
    unseen, mean = found.baselines.unseen, found.baselines.baselines["the mean image"]
    assert (mean.precision.mean, mean.recall.mean, mean.distinct) == (1, 0, 1)
    for part in (
        "their precision is 0 % and their recall 0 %",
        f"unseen real images have {100 * unseen.precision.mean:.0f} % and {100 * unseen.recall.mean:.0f} %",
        "the mean image 100 % and 0 %",
        f"{found.retrieval['training'].median.mean:g} of 500 for training captions",
    ):
        assert part in found.verdict.sentence
    assert found.verdict.sentence in "\n".join(evaluation_lines(found))


def test_figures_of_different_pictures_are_those_of_the_quality(digits):
    reference, sides = digits
    found = measured(reference, Known(*sides), "unseen", 64)
    figures, stands = found.fidelity.generated, found.baselines
    assert stands.generated.precision.mean == pytest.approx(figures.precision.value)
    if stands.generated.distinct == 64:
        assert stands.generated.recall.mean == pytest.approx(figures.recall.value)
    assert stands.reference_samples == 300 and stands.unseen.samples == 200


def test_an_untrained_model_is_no_model_of_the_data(digits, tmp_path):
    pipeline = tiny.pipeline(tmp_path, num_inference_steps=1, guidance_scale=1.0)
    assert evaluate_pipeline(pipeline, digits[0], samples=60, with_loss_gap=False).verdict.kind == FAR


def test_unseen_pictures_that_repeat_are_still_learning_and_few_are_undecided(digits):
    reference, sides = digits
    known = Known(*sides)
    known.order = known.order[:40]
    assert measured(reference, known, "unseen", 120).verdict.kind == LEARNING
    few = measured(reference, Known(*sides), "unseen", 20)
    assert few.verdict.kind == UNDECIDED and few.fidelity is None
    assert "20 images and 300 training images" in few.verdict.sentence


def test_without_held_out_images_noise_is_still_told(digits):
    _, sides = digits
    alone = Reference.from_data(sides[0], None, PIXELS)
    assert measured(alone, Known(*sides), "noise_in_colors", 64).verdict.kind == FAR
    found = measured(alone, Known(*sides), "unseen", 64)
    assert found.baselines.kind == "near" and found.verdict.kind == UNDECIDED
    assert "no held-out images" in found.verdict.sentence


def test_noise_is_told_where_all_training_images_are_variants_of_a_few(digits):
    reference, sides = digits
    alike = [dataclasses.replace(sample, group=str(i % 5)) for i, sample in enumerate(sides[0].samples)]
    training = CaptionedImages(alike, sides[0].config, 0)
    grouped = Reference.from_data(training, None, reference.space)
    found = measured(grouped, Known(*sides), "uniform_noise", 64)
    assert found.copying is None and found.verdict.kind == FAR
    assert measured(grouped, Known(*sides), "unseen", 64).verdict.kind == UNDECIDED


def test_images_of_one_group_are_left_out_one_by_one(digits):
    reference, sides = digits
    alike = [dataclasses.replace(sample, group="one") for sample in sides[0].samples]
    one = Reference.from_data(CaptionedImages(alike, sides[0].config, 0), None, reference.space)
    found = baselines_of(one, 64, (8, 8), 0)
    assert (found.unseen.samples, found.reference_samples) == (64, len(alike) - 64)


def test_controls_have_the_size_of_the_pictures_whatever_the_shapes_of_the_data(tmp_path):
    folder = captioned_folder(tmp_path / "data", 120, side=16)
    for path in sorted(folder.glob("*.png"))[::2]:
        with Image.open(path) as image:
            image.resize((24, 16)).save(path)
    config = DataConfig(path=str(folder), resolution=16, buckets=True, cache_dir=str(tmp_path), held_out=0.45)
    sides = [CaptionedImages(part, config, 0) for part in split(inspect(open_source(config), config).used, 0.45)]
    reference = Reference.from_data(*sides, PIXELS)
    black = measured(reference, None, "", 60, lambda side, own: torch.zeros(len(own), 3, 16, 16, dtype=torch.uint8))
    assert black.verdict.kind == FAR and black.baselines.baselines["noise"].samples > 0


def test_data_that_is_noise_cannot_be_told_from_noise(tmp_path):
    sides = opened(str(captioned_folder(tmp_path / "data", 200, side=8)), 8, tmp_path / "cache")
    reference = Reference.from_data(*sides, PIXELS)
    assert measured(reference, Known(*sides), "unseen", 64).verdict.kind != MEMORIZING
    assert measured(reference, Known(*sides), "copies", 64).verdict.kind == MEMORIZING


def test_what_is_shared_is_measured_once_and_follows_the_seed(digits):
    reference = dataclasses.replace(digits[0])
    one = baselines_of(reference, 64, (8, 8), 0)
    assert baselines_of(reference, 64, (8, 8), 0) is one and len(reference.baselines) == 1
    assert baselines_of(dataclasses.replace(reference), 64, (8, 8), 0).figures == one.figures
    assert baselines_of(reference, 64, (8, 8), 1).unseen != one.unseen
    pictures = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    black = compare_with_baselines(pictures, reference.space.compute([pictures.float() - 1]), {}, reference, seed=0)
    assert black.kind == "far" and black.generated.distinct == 1


@pytest.mark.slow
@pytest.mark.parametrize("features", ["pixel", "efficientnet"])
def test_drawings(features, tmp_path, capsys):
    """OpenMoji at 64 pixels, with pictures of digits and latents of noise too; prints the table of the docs (-s)."""
    sides = opened("openmoji", 64, tmp_path / "cache", held_out=0.1)
    reference = Reference.from_data(*sides, feature_space(features, device=CPU))
    known = Known(*sides)
    codec = LatentCodec(hub.load_autoencoder(hub.find_autoencoder("openmoji-first-stage")).eval())
    digits = F.interpolate(stack(opened("digits", 8, tmp_path / "cache")[0]).float(), 64, mode="bilinear").byte()

    def latents(side, own):
        noise = torch.randn(len(own), *codec.latent_shape(64, 64), generator=known.random)
        with torch.no_grad():
            return to_uint8(codec.decode(noise))

    more = {"other images (digits)": lambda side, own: digits[: len(own)], "noise in latents": latents}
    rows = []
    for name, expected in (EXPECTED | dict.fromkeys(more, FAR)).items():
        found = measured(reference, known, name, 128, more.get(name))
        drawn = found.baselines.generated
        share = found.copying.flagged_fraction
        rows.append(
            f"| {name.replace('_', ' ')} | {drawn.precision.mean:.2f} | {drawn.recall.mean:.2f} | {drawn.distinct} | "
            f"{share.count} of {share.total} | {found.verdict.kind} |"
        )
        assert found.verdict.kind == expected, found.verdict.sentence
    print("\n".join([f"{features}: {found.baselines.unseen}", *rows]))
