"""A first stage judged: figures against their definitions, the readout, the advice, the report and the command."""

import dataclasses
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.data import CaptionedImages, DataConfig, split, to_signed
from ldm.data.layouts import open_source
from ldm.evaluation import autoencoder as module
from ldm.evaluation.autoencoder import (
    ReconstructionQuality,
    advise,
    linear_probe_psnr,
    measure_autoencoder,
    measure_reconstruction,
    worst_sheet,
)
from ldm.evaluation.features import feature_space
from ldm.evaluation.fidelity import frechet_interval
from ldm.models import kl_divergence
from ldm.models.efficientnet import perceptual_distance
from ldm.models.similarity import psnr, ssim
from ldm.report.text import advice_line, autoencoder_lines
from ldm.training.setup import load_first_stage
from tests import tiny
from tests.test_cli import call

CPU = torch.device("cpu")
BUILT_IN = "openmoji-first-stage"


@cache
def drawings():
    return open_source(DataConfig(path="openmoji", resolution=64)).samples


def emoji(count, resolution=64, start=0):
    samples = drawings()[start : start + 20 * count : 20]
    return CaptionedImages(samples, DataConfig(path="openmoji", resolution=resolution), 0)


@pytest.fixture(scope="module")
def images():
    return emoji(80, 32)


@pytest.fixture(scope="module")
def perceptual():
    return perceptual_distance()


def faces(folder, count):
    """Pictures like those that the built-in first stage has learned from, large enough for it at 40 pixels."""
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", (40, 40), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse([4 + i % 7, 6, 26 + i % 5, 14 + i % 11], fill=(252, 234, 43), outline="black", width=2)
        draw.line([14, 18 + i % 13, 30, 18 + i % 17], fill="black", width=2)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"face number {i}")
    return folder


@pytest.fixture(scope="module")
def pixel():
    return feature_space("pixel", device=CPU)


def changed(change):
    """The built-in first stage, after `change` to its network."""
    codec = load_first_stage(BUILT_IN)
    with torch.no_grad():
        change(codec.autoencoder)
    return codec


def mirrored(autoencoder):
    """Shows the negative of every picture: the decoder is at fault, and what it was given holds all."""
    autoencoder.decoder.conv_out.weight *= -1
    autoencoder.decoder.conv_out.bias *= -1


def forgetful(autoencoder):
    """Latents that hold one number a place in all channels, and little of that."""
    autoencoder.quant_conv.weight[:4] = autoencoder.quant_conv.weight[:1] * 0.02


def uncertain(autoencoder):
    """A wide posterior; reconstructions are from its mean, so that they stay what they were."""
    autoencoder.quant_conv.weight[4:] = 0
    autoencoder.quant_conv.bias[4:] = -0.5


def pictures(images, count):
    return [to_signed(images.image_at(i))[None] for i in range(count)]


# ---- PSNR and SSIM


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (1, 3, 11, 17)])
def test_psnr_and_ssim_are_those_of_torchmetrics(shape):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    images = torch.rand(shape) * 2 - 1
    others = (images + 0.3 * torch.randn(shape)).clamp(-1, 1)
    expected = metrics.structural_similarity_index_measure(others, images, data_range=2.0, reduction="none")
    torch.testing.assert_close(ssim(images, others), expected.view(-1), rtol=1e-4, atol=1e-5)
    each = [metrics.peak_signal_noise_ratio(b, a, data_range=2.0) for a, b in zip(images, others, strict=True)]
    torch.testing.assert_close(psnr(images, others), torch.stack(each))


def test_the_same_image_is_as_similar_as_can_be():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(ssim(images, images), torch.ones(2))
    torch.testing.assert_close(psnr(images, images), torch.full((2,), 120.0))
    assert float(psnr(torch.full((1, 3, 4, 4), -1.0), torch.ones(1, 3, 4, 4))) == 0
    with pytest.raises(ValueError, match="images are 10x16; SSIM needs 11"):
        ssim(images[:, :, :10], images[:, :, :10])


# ---- the readout


def test_a_readout_finds_what_the_decoder_does_not_show():
    data = pictures(emoji(8), 8)
    whole = load_first_stage(BUILT_IN)

    def both(codec):
        with torch.no_grad():
            shown = [psnr(x, codec.decode(codec.sample_latents(codec.moments(x))).clamp(-1, 1)) for x in data]
        return float(torch.cat(shown).mean()), float(linear_probe_psnr(codec, data).mean())

    shown, read = both(whole)
    assert shown > 24 and read < shown + 0.5  # a sound decoder leaves nothing to be read
    shown, read_of_negative = both(changed(mirrored))
    assert shown < 5 and read_of_negative > 24
    shown, read = both(changed(forgetful))
    assert read < 15 and read < read_of_negative - 8


def test_a_readout_is_measured_on_images_that_it_was_not_fitted_to():
    """Latents of noise tell nothing of other images of noise, whatever a fit to these made of them."""
    noise = list((torch.rand(32, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1).unbind())
    constant = 10 * math.log10(4 / (1 / 3))  # the mean alone: the variance of noise in [−1, 1] is a third
    codec = changed(lambda autoencoder: autoencoder.quant_conv.weight[:4].zero_())
    assert float(linear_probe_psnr(codec, noise).mean()) == pytest.approx(constant, abs=0.3)


def test_a_readout_needs_images_to_fit_to(images):
    codec = load_first_stage(BUILT_IN)
    assert linear_probe_psnr(codec, pictures(images, 1)) is None
    assert linear_probe_psnr(codec, pictures(images, 8)) is None
    sizes = [to_signed(emoji(1, side).image_at(0))[None] for side in (32, 160, 160)]  # 160: more blocks than are drawn
    read = linear_probe_psnr(codec, sizes)
    assert read.shape == (3,) and read.isfinite().all()


# ---- the advice

GOOD = ReconstructionQuality("it", 64, 500, psnr=25.0, perceptual=0.1, readout=None, factor=4)


@pytest.mark.parametrize(
    ("changes", "action", "part"),
    [
        ({}, "use", "25.0 dB and a perceptual distance of 0.10"),
        ({"perceptual": None}, "use", "25.0 dB"),
        ({"resolution": 32, "psnr": 5.0}, "pixels", "32 pixels a side are few enough"),
        ({"perceptual": 0.3}, "pixels", "distance of 0.30, above 0.2 and 500 images"),
        ({"psnr": 23.9}, "pixels", "below 24 and 500 images"),
        ({"psnr": 23.9, "readout": 22.9}, "pixels", "below 24"),
        ({"psnr": 14.0, "readout": 23.1}, "tune", "23.1 dB"),
        ({"perceptual": 0.3, "readout": 25.0}, "tune", "above 0.2"),
        ({"psnr": 14.0, "images": 1000}, "train", "1000 images"),
        ({"psnr": 14.0, "images": 1000, "readout": 24.0}, "tune", "trained: decoder"),
        ({"psnr": 14.0, "images": 999, "resolution": 128}, "use", "128 pixels a side are too many"),
        ({"psnr": None, "perceptual": None, "images": 5000, "resolution": 50}, "pixels", "factor 4 of it does not"),
    ],
)
def test_the_rule(changes, action, part):
    advice = advise(dataclasses.replace(GOOD, **changes))
    assert advice.action == action and part in advice.why
    assert advice_line(advice).startswith("advice: ") and "\n" not in advice_line(advice)


def test_the_rule_holds_for_first_stages_that_were_broken_on_purpose(perceptual):
    data = emoji(8)
    for change, action in ((lambda network: None, "use"), (mirrored, "tune"), (forgetful, "pixels")):
        found = measure_reconstruction(changed(change), "it", data, CPU, perceptual)
        assert advise(found).action == action, found
        assert (found.readout is None) == (action == "use")


# ---- the report


def report_of(codec, images, training, space, perceptual, **more):
    return measure_autoencoder(
        codec, "it", images, training, space=space, perceptual=perceptual, device=CPU,
        training_images=500, **more,
    )  # fmt: skip


def test_figures_are_means_over_all_images_whatever_is_computed_at_once(images, pixel, perceptual, monkeypatch):
    codec, told = changed(uncertain), []
    monkeypatch.setattr(module, "BATCH_PIXELS", 7 * 32 * 32)
    report = report_of(codec, images, None, pixel, perceptual, progress=told.append)
    assert sum(told) == len(images) == report.images == 80 and max(told) == 7
    x = torch.cat(pictures(images, 80))
    with torch.no_grad():
        moments = codec.moments(x)
        y = codec.decode(codec.sample_latents(moments)).clamp(-1, 1)
        distances = perceptual(x, y)
    for found, each in ((report.psnr, psnr(x, y)), (report.ssim, ssim(x, y)), (report.perceptual, distances)):
        assert found.mean == pytest.approx(float(each.mean()), rel=1e-4)
        assert found.high - found.low == pytest.approx(2 * 1.99 * float(each.std()) / 80**0.5, rel=1e-2)
    # Statistics of the latents: drawn from the posterior often, they are the same.
    noise = torch.randn(40, *moments[:, :4].shape)
    drawn = torch.stack([codec.sample_latents(moments, n) for n in noise]).movedim(2, 0).flatten(1)  # [4, …]
    torch.testing.assert_close(torch.tensor(report.latents.mean), drawn.mean(dim=1), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(report.latents.std), drawn.std(dim=1), atol=0.01, rtol=0)
    assert report.latents.kl == pytest.approx(float(kl_divergence(moments).mean()) / (4 * 8 * 8), rel=1e-4)
    # With more images than features it is the distance itself, of the two sets to each other.
    expected = frechet_interval(pixel.compute([y]), pixel.compute([x]))
    assert not report.frechet.is_ratio and report.frechet.samples == 80
    assert report.frechet.interval.mean == pytest.approx(expected.mean, rel=1e-3)
    worst = distances.argsort(descending=True)[:12].tolist()
    assert [name for name, _ in report.worst] == [images.samples[i].id for i in worst]
    assert report.worst[0][1] == pytest.approx(float(distances.max()), rel=1e-4)


def test_latents_that_are_not_standard_are_named(pixel, perceptual):
    codec = load_first_stage(BUILT_IN)
    few = emoji(4, 32)
    plain = report_of(codec, few, None, pixel, perceptual)
    codec.autoencoder.config = dataclasses.replace(codec.autoencoder.config, scaling_factor=3.0, shift_factor=0.5)
    scaled = report_of(codec, few, None, pixel, perceptual)
    for mean, other in zip(plain.latents.mean, scaled.latents.mean, strict=True):
        assert other == pytest.approx(3 * (mean - 0.5), abs=1e-4)
    for std, other in zip(plain.latents.std, scaled.latents.std, strict=True):
        assert other == pytest.approx(3 * std, rel=1e-4)
    assert scaled.psnr.mean == pytest.approx(plain.psnr.mean, abs=1e-3) and scaled.latents.kl == plain.latents.kl
    off = next(line for line in autoencoder_lines(scaled) if line.startswith("Channels of the latents"))
    assert ": 0 (mean -" in off and "3 (mean" in off
    text = "\n".join(autoencoder_lines(scaled))
    assert "Left out: the Fréchet ratio, for there are 2 images on a side; at least 22" in text
    assert "Left out: the linear probe" in text


def test_few_held_out_images_get_the_advice_that_training_follows(pixel, perceptual):
    codec, held_out, training = changed(mirrored), emoji(6), emoji(20, start=7)
    assert report_of(codec, held_out, None, pixel, perceptual).readout is None
    report = report_of(codec, held_out, training, pixel, perceptual)
    assert (
        report.advice.action == advise(measure_reconstruction(codec, "it", training, CPU, perceptual)).action == "tune"
    )
    # Measured on the held-out images alone.
    parts = [*pictures(held_out, 6), *pictures(training, 20)]
    assert report.readout == pytest.approx(float(linear_probe_psnr(codec, parts)[:6].mean()), abs=1e-3)


def test_few_images_get_a_ratio_that_knows_better_from_worse(pixel, perceptual):
    good, held_out, training = load_first_stage(BUILT_IN), emoji(24, 32), emoji(40, 32, start=7)
    ratio = report_of(good, held_out, training, pixel, perceptual).frechet
    assert ratio.is_ratio and (ratio.samples, ratio.references) == (24, 40)
    assert 0.9 < ratio.interval.mean < 1.5 and ratio.against == "40 training images"
    poor = report_of(changed(mirrored), held_out, training, pixel, perceptual).frechet
    assert poor.interval.low > 2 * ratio.interval.high
    halves = report_of(good, emoji(44, 32), None, pixel, perceptual).frechet
    assert (halves.samples, halves.references) == (22, 22) and halves.against == "22 other originals"


def test_images_of_several_sizes(tmp_path, pixel, perceptual):
    for i in range(9):
        size = [(64, 32), (32, 64), (48, 48)][i % 3]
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    config = DataConfig(path=str(tmp_path), resolution=64, buckets=True)
    data = CaptionedImages(open_source(config).samples, config, 0)
    codec = load_first_stage(BUILT_IN)
    report = report_of(codec, data, None, pixel, perceptual)
    assert len(report.sizes) == 3 and report.images == 9
    sheet = worst_sheet(codec, data, report, CPU)
    assert sheet.width >= 9 * 96
    with pytest.raises(ValueError, match="there is 1 image to measure"):
        report_of(codec, CaptionedImages(data.samples[:1], config, 0), None, pixel, perceptual)


# ---- the command


def evaluate(monkeypatch, *arguments):
    return call(monkeypatch, "autoencoder", "evaluate", *arguments)


def test_the_command_says_draws_and_writes_json(tmp_path, monkeypatch, capsys):
    data = faces(tmp_path / "faces", 60)
    arguments = [BUILT_IN, data, "--held-out", 0.5, "--samples", 22, "--resolution", 40, "--features", "pixel"]
    assert evaluate(monkeypatch, *arguments, "-o", tmp_path / "new" / "worst.png") == 0
    out = capsys.readouterr().out
    assert f"{BUILT_IN} on {data}, held-out: 22 images of 40x40; means, with 95 % intervals over images" in out
    assert "advice: use it, because openmoji-first-stage reconstructs these images at" in out
    assert Image.open(tmp_path / "new" / "worst.png").width > 12 * 96
    assert evaluate(monkeypatch, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 22 and found["advice"]["action"] == "use" and len(found["worst"]) == 12
    assert f"{found['psnr']['mean']:9.4g}  ({found['psnr']['low']:.4g}" in out
    config = DataConfig(path=str(data), resolution=40)
    training, _ = split(open_source(config).samples, 0.5)
    assert found["frechet"]["is_ratio"] and found["frechet"]["references"] == len(training)


def test_the_command_needs_no_captions(tmp_path, monkeypatch, capsys):
    data = faces(tmp_path / "faces", 6)
    for text in data.glob("*.txt"):
        text.unlink()
    arguments = [BUILT_IN, data, "--split", "all", "--resolution", 32, "--features", "pixel", "--json"]
    assert evaluate(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6


def test_the_command_takes_an_autoencoder_a_pipeline_and_all_images(tmp_path, monkeypatch, capsys):
    pipeline = tiny.pipeline(tmp_path / "parts", "latent")
    pipeline.save_pretrained(tmp_path / "pipeline")
    figures = []
    for model in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        assert evaluate(monkeypatch, model, "digits", "--split", "all", "--samples", 6, "--json") == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["psnr"] == figures[1]["psnr"]
    assert (figures[0]["split"], figures[0]["resolution"], figures[0]["images"]) == ("all", 16, 6)
    assert figures[0]["advice"]["action"] == "pixels"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["./nothing", "digits"], "there is no model folder ./nothing"),
        ([BUILT_IN, "nowhere"], "nowhere"),
        ([BUILT_IN, "digits", "--split", "training"], "split is training"),
        ([BUILT_IN, "digits", "--samples", "1"], "samples is 1"),
        ([BUILT_IN, "digits", "--samples", "100000"], "samples is 100000; there are 176 images (held-out)"),
        ([BUILT_IN, "digits", "--held-out", "0"], "split all"),
        ([BUILT_IN, "digits", "--resolution", "30"], "image size 30x30 is not divisible by the codec's factor 4"),
        ([BUILT_IN, "digits", "--resolution", "4"], "resolution is 4; reconstructions need"),
        ([BUILT_IN, "digits", "--features", "fid"], 'there are no features "fid"'),
        ([BUILT_IN, "digits", "--features", "inception"], "inception"),
        ([BUILT_IN, "digits", "-o", "worst.jpg"], "--output is worst.jpg"),
        ([BUILT_IN, "digits", "--tile", "few"], "tile is 'few'"),
        ([BUILT_IN, "digits", "--device", "abacus"], "abacus"),
        (["digits-model", "digits"], "digits-model"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate(monkeypatch, *arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert part in error
    assert not list(tmp_path.iterdir())


def test_a_model_of_pixels_has_no_first_stage(tmp_path, monkeypatch, capsys):
    tiny.pipeline(tmp_path / "parts").save_pretrained(tmp_path / "model")
    assert evaluate(monkeypatch, tmp_path / "model", "digits") == 2
    assert "is a model of pixels, which has no autoencoder" in capsys.readouterr().err
