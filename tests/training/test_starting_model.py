"""What `ldm train FOLDER` starts from."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.data import CaptionedImages, DataConfig
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.pipelines import Pipeline
from ldm.training.estimate import MEASURED_RUNS
from ldm.training.starting_model import (
    BUILT_IN_MODEL,
    BUILT_IN_SIDE,
    FEW_IMAGES,
    NEW_SAMPLES,
    choose_start,
    measure_fit,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Disks and boxes of plain colors."""
    folder = tmp_path_factory.mktemp("drawings")
    for i, color in enumerate(("red", "green", "blue", "orange", "black", "purple", "gray", "brown")):
        image = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if i % 2 else draw.rectangle)((20, 15 + i, 70 + i, 80), fill=color)
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {color} shape")
    return images_of(folder)


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """Images with detail everywhere, as photographs that fill their frame."""
    folder = tmp_path_factory.mktemp("textures")
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"a photograph of gravel, {i}")
    return images_of(folder)


def images_of(folder, resolution=64):
    config = DataConfig(path=str(folder), resolution=resolution)
    return CaptionedImages(list(inspect(open_source(config), config).used), config, 0)


def start(images, minutes, samples_per_second, may_fine_tune=True):
    return choose_start(
        images, minutes=minutes, samples_per_second=samples_per_second, device=CPU, may_fine_tune=may_fine_tune
    )


def test_the_built_in_model_fits_drawings_and_not_textures(drawings, textures):
    pipeline = Pipeline.from_pretrained(BUILT_IN_MODEL)
    assert pipeline.default_size == (BUILT_IN_SIDE, BUILT_IN_SIDE)
    good, bad = measure_fit(pipeline, drawings), measure_fit(pipeline, textures)
    assert good.is_good and good.psnr > bad.psnr + 5
    assert not bad.is_good
    assert bad.error_ratio > 1 > good.error_ratio > 0.02  # of noise it knows less than the mean image
    assert measure_fit(pipeline, drawings) == good  # its noise is fixed


def test_a_new_model_needs_what_the_least_of_our_runs_needed():
    runs = json.loads(MEASURED_RUNS.read_text(encoding="utf-8"))
    assert min(run["samples"] for run in runs if run["kind"] == "new") == NEW_SAMPLES


def test_the_same_images_have_no_variance_to_explain(drawings):
    same = CaptionedImages([drawings.samples[0]], drawings.config, 0)
    assert not measure_fit(Pipeline.from_pretrained(BUILT_IN_MODEL), same).is_good


def test_too_little_time_for_a_new_model_of_drawings(drawings):
    model, reason = start(drawings, minutes=5, samples_per_second=40)
    assert model == BUILT_IN_MODEL
    assert "needs about 128,000 samples, and 12,000 fit into --minutes 5" in reason
    assert "--anyway --minutes 54" in reason
    # Few images are fine-tuned on, whatever the time.
    model, reason = start(drawings, minutes=500, samples_per_second=40)
    assert model == BUILT_IN_MODEL and "8 images teach a new model little" in reason
    with pytest.raises(
        ValueError, match=r"12,000 fit into --minutes 5.*leave out --resolution.*--minutes 54, 54 min.*--anyway"
    ):
        start(drawings, minutes=5, samples_per_second=40, may_fine_tune=False)
    model, reason = start(drawings, minutes=20, samples_per_second=40, may_fine_tune=False)
    assert model is None and "expect less" in reason and "8 images teach" in reason


def test_enough_time_and_images_are_a_new_model(drawings):
    many = CaptionedImages(
        [dataclasses.replace(drawings.samples[i % 8], id=str(i)) for i in range(FEW_IMAGES)], drawings.config, 0
    )
    model, reason = start(many, minutes=1, samples_per_second=NEW_SAMPLES / 60)
    assert (
        model is None
        and reason == "a new UNet: a new model needs about 128,000 samples, and 128,000 fit into --minutes 1"
    )


def test_photographs_need_a_model_that_knows_them(textures):
    with pytest.raises(ValueError, match=r"noise or averages.*20,000,000 samples.*dB.*--start-from.*3 d 10 h"):
        start(textures, minutes=30, samples_per_second=67)
    model, reason = start(textures, minutes=30_000, samples_per_second=67)
    assert model is None and "--start-from" in reason


def test_images_of_less_than_half_the_size_of_the_built_in_model(textures):
    small = CaptionedImages(textures.samples, dataclasses.replace(textures.config, resolution=31), 0)
    model, reason = start(small, minutes=10, samples_per_second=100)
    assert model is None and "128,000" in reason and "dB" not in reason
