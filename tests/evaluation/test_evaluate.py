"""One evaluation: its parts are those of the modules beneath, over the right pictures, captions and images."""

import dataclasses
import json

import pytest
import torch

from ldm.data import CaptionedImages, DataConfig, split, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.evaluation.evaluate import (
    GeneratedImages,
    estimate_duration,
    evaluate_pipeline,
    measure_generated,
    select_captions,
)
from ldm.evaluation.features import feature_space
from ldm.evaluation.fidelity import measure_fidelity
from ldm.evaluation.images import Reference, SampleCache, generate_images, subset
from ldm.evaluation.prompt_alignment import retrieval
from ldm.progress import no_progress
from ldm.report.text import alignment_lines, evaluation_lines
from tests import tiny
from tests.training.runs import captioned_folder

PIXELS = feature_space("pixel", device=torch.device("cpu"))


def opened(path, cache, held_out, **settings):
    config = DataConfig(path=str(path), resolution=8, cache_dir=str(cache), held_out=held_out, **settings)
    ours, theirs = split(inspect(open_source(config), config).used, held_out)
    return CaptionedImages(ours, config, 0), CaptionedImages(theirs, config, 0) if theirs else None


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Both sides of 160 pictures, half of them held out."""
    folder = tmp_path_factory.mktemp("noise")
    return Reference.from_data(*opened(captioned_folder(folder / "data", 160, side=8), folder / "cache", 0.5), PIXELS)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipeline"), num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture(scope="module")
def found(pipeline, noise):
    return evaluate_pipeline(pipeline, noise, samples=60, seed=3)


def real(images, indices):
    """Images of the data, as if they were drawn."""
    return torch.stack([images.image_at(index % len(images)) for index in indices])


def asked_with(reference, draw):
    """What would be asked for in 60 pictures; `draw(side, own)` are the pictures."""
    wanted = select_captions(reference, 60, 0)
    return tuple(
        GeneratedImages(side, tuple(texts), tuple(own), draw(side, own)) for side, (texts, own) in wanted.items()
    )


def test_half_of_the_pictures_are_of_held_out_captions_and_each_is_its_own_image_s(found, noise):
    ours, theirs = found.generated
    assert (ours.side, theirs.side, len(ours.indices), len(theirs.indices)) == ("training", "held-out", 30, 30)
    assert len(set(theirs.indices)) == 30
    for side, images in ((ours, noise.training), (theirs, noise.held_out)):
        assert side.images.shape == (30, 3, 8, 8) and side.images.dtype == torch.uint8
        assert all(
            caption in images.samples[own].captions for caption, own in zip(side.captions, side.indices, strict=True)
        )


def test_figures_are_those_of_the_parts(found, noise):
    features = PIXELS.compute([to_signed(found.images)])
    expected = measure_fidelity(features, noise.features, noise.held_out_features, PIXELS, seed=3)
    assert [figure.name for figure in found.fidelity.metrics()] == [figure.name for figure in expected.metrics()]
    values, others = ([figure.value for figure in each.metrics()] for each in (found.fidelity, expected))
    assert values == pytest.approx(others, rel=1e-6) and expected.held_out is not None
    for side, rows in zip(found.generated, (features[:30], features[30:]), strict=True):
        own = noise.gallery.matches(side.captions)
        again = retrieval(rows, noise.gallery.features, own, seed=3)
        assert torch.equal(found.retrieval[side.side].ranks, again.ranks)
        # The gallery has training images first: a caption leads to the image that it was taken from.
        before = 0 if side.side == "training" else len(noise.training)
        assert all(before + index in places for index, places in zip(side.indices, own, strict=True))
    assert found.copying is not None and len(found.copying.ratio) == 30, "copies are looked for in training captions"
    assert found.gap is not None and found.gap.held_out_images == len(noise.held_out)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["samples"] == {"training": 30, "held-out": 30} and content["guidance_scale"] == 1.0
    assert content["features"] == PIXELS.label() and content["verdict"]["kind"] == found.verdict.kind
    text = "\n".join(evaluation_lines(found))
    assert found.verdict.sentence in text and "guidance 1, seed 3" in text
    assert all(f"{band.held_out:9.4f}" in text for band in found.gap.bands)


def test_training_images_as_pictures_are_called_memorizing_and_unseen_ones_are_not(noise):
    sides = {"training": noise.training, "held-out": noise.held_out}
    copies = measure_generated(asked_with(noise, lambda side, own: real(sides[side], own)), noise, seed=0, sampling={})
    assert copies.verdict.kind == "memorizing"
    assert all(found.within[1].mean == 1 for found in copies.retrieval.values())
    unseen = measure_generated(
        asked_with(noise, lambda side, own: real(noise.held_out, own)), noise, seed=0, sampling={}
    )
    assert unseen.verdict.kind != "memorizing"
    assert unseen.retrieval["held-out"].within[1].mean == 1 and unseen.retrieval["training"].within[1].mean < 0.2


def test_a_mirrored_copy_is_one_where_training_mirrors(tmp_path, noise):
    folder = captioned_folder(tmp_path / "data", 120, side=8)
    kinds = {}
    for flip in (False, True):
        reference = Reference.from_data(*opened(folder, tmp_path / "cache", 0.5, flip=flip), PIXELS)
        asked = asked_with(reference, lambda side, own: real(reference.training, own).flip(-1))  # noqa: B023
        kinds[flip] = measure_generated(asked, reference, seed=0, sampling={}).verdict.kind
    assert kinds[True] == "memorizing" != kinds[False]


def test_digits_are_read(tmp_path):
    training, held_out = (subset(images, 400, seed=0) for images in opened("digits", tmp_path, 0.1))
    reference = Reference.from_data(training, held_out, PIXELS)
    sides = {"training": training, "held-out": held_out}
    found = measure_generated(
        asked_with(reference, lambda side, own: real(sides[side], own)), reference, seed=0, sampling={}
    )
    assert found.digit_accuracy["training"].mean == 1 and found.digit_accuracy["held-out"].mean > 0.9
    wrong = measure_generated(
        asked_with(reference, lambda side, own: real(training, [0] * len(own))), reference, seed=0, sampling={}
    )
    assert wrong.digit_accuracy["held-out"].mean < 0.4
    assert any("digit 100.0 %" in line for line in alignment_lines(found, "training"))


def test_what_cannot_be_said_of_few_images_is_named(tmp_path, pipeline):
    few = Reference.from_data(*opened(captioned_folder(tmp_path / "data", 8, side=8), tmp_path / "cache", 0.0), PIXELS)
    assert few.held_out is None
    found = evaluate_pipeline(pipeline, few, samples=50)
    assert [side.side for side in found.generated] == ["training"] and len(found.images) == 50
    assert found.fidelity is None and found.copying is None and found.baselines is None and found.gap is None
    assert found.verdict.kind == "undecided" and "50 images and 8 training images" in found.verdict.sentence
    assert [text.split(",")[0] for text in found.left_out] == [
        "Left out: whether images are copies of training images", "Left out: all metrics of fidelity",
    ]  # fmt: skip
    assert all(text in "\n".join(evaluation_lines(found)) for text in found.left_out)
    json.dumps(found.to_dict(), allow_nan=False)


def test_too_few_pictures_and_other_sizes_are_refused(pipeline, noise, tmp_path):
    with pytest.raises(ValueError, match="samples is 49; at least 50"):
        evaluate_pipeline(pipeline, noise, samples=49)
    config = dataclasses.replace(noise.training.config, resolution=16)
    larger = CaptionedImages(noise.training.samples, config, 0)
    with pytest.raises(ValueError, match=r"16x16 pixels but the model .* 8x8"):
        evaluate_pipeline(pipeline, dataclasses.replace(noise, training=larger), samples=50)


def test_what_is_done_is_told(pipeline, noise):
    told = []

    def bar(what, total):
        told.append((what, total))
        return no_progress(what, total)

    evaluate_pipeline(pipeline, noise, samples=50, with_loss_gap=False, progress=bar)
    assert told == [
        ("images for training captions", 25),
        ("images for held-out captions", 25),
        ("features of the images", 50),
    ]


def test_the_time_is_that_of_one_picture_times_all_of_them(pipeline, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("ldm.evaluation.evaluate.time.perf_counter", lambda: clock[0])
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 3))
    text = estimate_duration(pipeline, 100, num_inference_steps=4, guidance_scale=1.0)
    hook.remove()
    # 4 evaluations of 3 s a picture, and 4096 for the losses.
    assert text == "100 images at 12 s each or less, and the loss of 256 images: at most 3 h 45 min"
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        estimate_duration(pipeline, 100, num_inference_steps=0, guidance_scale=None)
    with pytest.raises(ValueError, match="samples is 3"):
        estimate_duration(pipeline, 3, num_inference_steps=None, guidance_scale=None)


def test_a_part_of_many_images_is_compared_with(noise):
    part = subset(noise.training, 20, seed=1)
    assert len(part) == 20 and {sample.id for sample in part.samples} < {s.id for s in noise.training.samples}
    assert [s.id for s in subset(noise.training, 20, seed=1).samples] == [s.id for s in part.samples]
    assert subset(noise.training, len(noise.training), seed=1) is noise.training
    with pytest.raises(ValueError, match="0 images"):
        subset(noise.training, 0, seed=1)


# ---- pictures that are kept


class Counted:
    """How many pictures the network of a pipeline was asked for."""

    def __init__(self, pipeline):
        self.count = 0
        self.hook = pipeline.unet.register_forward_pre_hook(self._add)

    def _add(self, _, arguments):
        self.count += len(arguments[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def kept(pipeline, folder, count, *, progress=lambda done: None, model="a", guidance=1.0, seed=0):
    captions = [f"noise number {i}" for i in range(count)]
    drawn = {"seed": seed, "num_inference_steps": 1, "guidance_scale": guidance, "batch_size": 4}
    with Counted(pipeline) as counter:
        pictures = SampleCache(folder, model).generate(pipeline, captions, progress=progress, **drawn)
    return pictures, counter.count


def test_an_interruption_loses_the_last_few_pictures_only(pipeline, tmp_path):
    whole, count = kept(pipeline, tmp_path / "whole", 30)
    captions = [f"noise number {i}" for i in range(30)]
    at_once = generate_images(pipeline, captions, seed=0, num_inference_steps=1, guidance_scale=1.0, batch_size=4)
    assert count == 30 and torch.equal(whole, at_once)
    done = []

    def stop(pictures):
        done.append(pictures)
        if sum(done) > 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(pipeline, tmp_path / "broken", 30, progress=stop)
    done.clear()
    again, count = kept(pipeline, tmp_path / "broken", 30, progress=done.append)
    assert torch.equal(again, whole) and count == 30 - 16 and done[0] == 16 and sum(done) == 30
    assert kept(pipeline, tmp_path / "broken", 30)[1] == 0
    more, count = kept(pipeline, tmp_path / "broken", 37)
    assert count == 7 and torch.equal(more[:30], whole)


def test_pictures_of_another_model_or_setting_are_drawn_anew(pipeline, tmp_path):
    kept(pipeline, tmp_path, 8)
    assert kept(pipeline, tmp_path, 8, model="b")[1] == 8
    assert kept(pipeline, tmp_path, 8, guidance=2.0)[1] == 16  # twice an evaluation
    assert kept(pipeline, tmp_path, 8, seed=1)[1] == 8
    assert kept(pipeline, tmp_path, 8)[1] == 0
