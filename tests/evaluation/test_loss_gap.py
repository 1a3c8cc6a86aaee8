"""The gap of the loss: nothing where there is none, exact where theory says, positive for what was learned by heart."""

import json
import math

import numpy as np
import pytest
import torch

from ldm.codecs import PixelCodec
from ldm.data import CaptionedImages, DataConfig, to_signed
from ldm.data.layouts import open_source
from ldm.diffusion import NoiseSchedule, ScheduleConfig, diffusion_loss
from ldm.evaluation.memorization import BandGap, LossGap, loss_gap
from tests import tiny


def digits(*places):
    config = DataConfig(path="digits", resolution=8)
    samples = open_source(config).samples
    return CaptionedImages([samples[i] for i in places], config, 0)


@pytest.fixture
def pipeline(tmp_path):
    made = tiny.pipeline(tmp_path)
    made.codec = PixelCodec((-0.3,) * 3, (0.7,) * 3)
    made.schedule = ScheduleConfig(num_train_timesteps=40)
    return made


def silent(pipeline):
    """The same with a network that predicts zero."""
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    torch.nn.init.zeros_(pipeline.unet.conv_out.bias)
    return pipeline


def test_a_network_that_predicts_no_noise_has_no_gap_since_noise_is_paired(pipeline):
    """Its loss is the mean square of the noise, whatever the images."""
    gap = loss_gap(silent(pipeline), digits(*range(6)), digits(*range(20, 26)), draws=2)
    assert [(band.first, band.last) for band in gap.bands] == [(0, 9), (10, 19), (20, 29), (30, 39)]
    for band in gap.bands:
        assert band.training == pytest.approx(1, abs=0.15)
        assert band.gap == pytest.approx(0, abs=1e-6)
        assert band.interval > 0
    assert len({band.training for band in gap.bands}) == 4  # each band has noise of its own


def test_means_and_interval_are_those_of_the_images(pipeline):
    """Zero as a prediction of x_0 has the mean square of the normalised images as its loss."""
    pipeline = silent(pipeline)
    pipeline.schedule = ScheduleConfig(num_train_timesteps=40, prediction_type="sample")
    sides = digits(0, 1, 2, 3), digits(4, 5, 6)
    gap = loss_gap(pipeline, *sides, draws=1)
    squares = [
        np.array([float(((to_signed(side.image_at(i)) + 0.3) / 0.7).square().mean()) for i in range(len(side))])
        for side in sides
    ]
    reach = 4.302653 * math.sqrt(sum(square.var(ddof=1) / len(square) for square in squares))  # t, 2 degrees, 95 %
    for band in gap.bands:
        assert (band.training, band.held_out) == pytest.approx([square.mean() for square in squares], rel=1e-5)
        assert band.gap == pytest.approx(squares[1].mean() - squares[0].mean(), rel=1e-4)
        assert band.interval == pytest.approx(reach, rel=1e-4)
    assert (gap.training_images, gap.held_out_images) == (4, 3)


def test_what_a_network_was_trained_on_has_a_lower_loss_than_the_rest(pipeline):
    """Trained on two scans under much noise, where what is drawn can only be known by heart."""
    pipeline.schedule = ScheduleConfig(num_train_timesteps=40, prediction_type="sample")
    ours, theirs = digits(0, 1), digits(*range(20, 28))
    before = loss_gap(pipeline, ours, theirs, draws=2).bands[3]
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    latents = pipeline.codec.sample_latents(to_signed(torch.stack([ours.image_at(i) for i in range(2)])))
    states = pipeline.text_encoder([sample.captions[0] for sample in ours.samples])
    optimizer = torch.optim.Adam(pipeline.unet.parameters(), lr=1e-2)
    for _ in range(40):
        loss = diffusion_loss(
            pipeline.unet,
            schedule,
            latents,
            states,
            timesteps=torch.randint(30, 40, (2,)),
            noise=torch.randn_like(latents),
            prediction_type="sample",
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = loss_gap(pipeline, ours, theirs, draws=2).bands[3]
    assert after.training < 0.75 * after.held_out
    assert before.training > 0.9 * before.held_out


def test_images_are_drawn_by_seed_and_counted(pipeline):
    told = []
    data = digits(*range(12)), digits(20, 21)
    one = loss_gap(pipeline, *data, images=5, draws=2, progress=told.append)
    assert sum(told) == (5 + 2) * 4 * 2
    assert (one.training_images, one.held_out_images, one.draws) == (5, 2, 2)
    assert loss_gap(pipeline, *data, images=5, draws=2) == one
    assert loss_gap(pipeline, *data, images=5, draws=2, seed=1) != one


def test_latents_and_learned_variances_are_looked_at(tmp_path):
    made = tiny.pipeline(tmp_path, "latent")
    config = DataConfig(path="digits", resolution=16)
    data = CaptionedImages(open_source(config).samples[:3], config, 0)
    gap = loss_gap(made, data, data, draws=1)
    assert all(band.gap == 0 and band.training > 0 for band in gap.bands)


def test_widest_band_and_json():
    bands = (
        BandGap(0, 9, 1.0, 1.5, 0.5, 0.4),
        BandGap(10, 19, 0.1, 0.2, 0.1, 0.01),
        BandGap(20, 29, 0.1, 9, 8.9, math.nan),
    )
    gap = LossGap(bands, 4, 1, 2)
    assert gap.widest() is bands[1]
    assert bands[1].min_relative_gap == pytest.approx(0.9)
    plain = json.loads(json.dumps(gap.to_dict(), allow_nan=False))
    assert plain["bands"][2]["interval"] is None
    assert plain["bands"][0]["gap"] == 0.5


def test_faults_are_named(pipeline):
    data = digits(0, 1)
    with pytest.raises(ValueError, match="draws is 0"):
        loss_gap(pipeline, data, data, draws=0)
    with pytest.raises(ValueError, match="images is -1"):
        loss_gap(pipeline, data, data, images=-1, draws=1)
