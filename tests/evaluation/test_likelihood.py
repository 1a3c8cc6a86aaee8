"""The bound in bits per dimension: what theory says of a network that knows nothing, fewer bits once it has learned."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.codecs import PixelCodec
from ldm.data import CaptionedImages, DataConfig, image_statistics, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.diffusion import NoiseSchedule, ScheduleConfig, diffusion_loss
from ldm.diffusion.losses import log_variance_tables, prior_term
from ldm.evaluation.likelihood import measure_likelihood
from ldm.models import UNet
from tests import tiny

STEPS = 40


def grey(folder, count=12, side=8):
    """Pictures between two greys, so that nothing a network says about them leaves the range of pixels."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(108, 148, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"grey number {i}")
    return folder


def images_of(folder, resolution=8, **settings):
    config = DataConfig(path=str(folder), resolution=resolution, **settings)
    return CaptionedImages(inspect(open_source(config), config).used, config, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return images_of(grey(tmp_path_factory.mktemp("grey") / "pictures"))


@pytest.fixture
def pipeline(tmp_path):
    """Linear betas that end early, so that ε̂ = 0 keeps x̂_0 = x_t/α inside the range of pixels."""
    made = tiny.pipeline(tmp_path)
    made.codec = PixelCodec((0.0, 0.01, -0.02), (0.1, 0.12, 0.09))
    made.schedule = ScheduleConfig(num_train_timesteps=STEPS, beta_schedule="linear", beta_start=1e-3, beta_end=0.02)
    return made


def silent(pipeline):
    """The same with a new network, which predicts zero."""
    pipeline.unet = UNet(pipeline.unet.config).eval()
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    torch.nn.init.zeros_(pipeline.unet.conv_out.bias)
    return pipeline


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_network_that_says_there_is_no_noise_has_the_bound_of_theory(variance, pipeline, data):
    found = measure_likelihood(silent(pipeline), data, variance=variance)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    beta, posterior = schedule.betas, schedule.posterior_variance
    # DDPM, Eq. 12 with ε_θ = 0: ‖ε‖² is 1 a dimension, and where σ² is β there is KL(β̃ ‖ β) besides.
    sigma2 = posterior if variance == "small" else beta
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - schedule.alphas_cumprod))
    ratio = posterior / sigma2
    expected = (weight + 0.5 * (ratio - 1 - ratio.log())) / math.log(2)
    assert found.terms == pytest.approx(float(expected[1:].sum()), rel=0.01)
    for stratum in found.curve[1:]:
        assert stratum.bits == pytest.approx(float(expected[stratum.first]), rel=0.1)
    # The decoder's mean is x_1/α, its deviation that of σ_1² in units of pixels: nearly a density over a level.
    std = torch.tensor(pipeline.codec.config["std"]).double()
    small, large = log_variance_tables(schedule)
    deviation = (small if variance == "small" else large)[0].mul(0.5).exp() * std
    noise = schedule.sigma[0] / schedule.alpha[0] * std  # of x_1/α around x_0, in pixels
    nats = torch.log(deviation * math.sqrt(2 * math.pi) / (2 / 255)) + (noise / deviation) ** 2 / 2
    assert found.decoder == pytest.approx(float(nats.mean() / math.log(2)), abs=0.15)
    x_0 = pipeline.codec.sample_latents(to_signed(torch.stack([data.image_at(i) for i in range(len(data))])))
    assert found.prior == pytest.approx(float(prior_term(schedule, x_0).mean()), rel=1e-5)
    assert found.total == pytest.approx(found.prior + found.terms + found.decoder)
    assert found.evaluations == 12 * STEPS


def test_the_figures_are_those_of_the_images(pipeline, data):
    whole = measure_likelihood(pipeline, data)
    assert whole.per_image.shape == (12,)
    assert whole.total == pytest.approx(float(whole.per_image.mean()))
    assert whole.interval == pytest.approx(2.201 * float(whole.per_image.std()) / math.sqrt(12), rel=1e-4)  # Student
    assert whole.timesteps_interval == 0
    # Each image is measured as it would be alone, whatever else is looked at, by its own noise and caption.
    few = measure_likelihood(pipeline, data, samples=3, seed=0)
    assert len(set(few.ids)) == 3
    known = dict(zip(whole.ids, whole.per_image.tolist(), strict=True))
    np.testing.assert_allclose(few.per_image, [known[name] for name in few.ids], rtol=1e-4)
    other = measure_likelihood(pipeline, data, samples=3, seed=1)
    assert set(other.ids) != set(few.ids)
    assert measure_likelihood(pipeline, data, seed=1).total != whole.total
    assert math.isnan(measure_likelihood(pipeline, data, samples=1).interval)


def test_captions_are_conditions_of_their_own_image(pipeline, data, tmp_path):
    renamed = grey(tmp_path / "renamed")
    (renamed / "7.txt").write_text("zzz")
    before, after = measure_likelihood(pipeline, data), measure_likelihood(pipeline, images_of(renamed))
    assert before.ids == after.ids
    moved = (before.per_image - after.per_image).abs().tolist()
    assert before.ids[int(np.argmax(moved))] == "7.png"
    assert sorted(moved)[-2] < max(moved) / 10 and max(moved) > 1e-5


def test_a_predicted_image_is_bounded_as_in_sampling(pipeline, data):
    pipeline.schedule = ScheduleConfig(num_train_timesteps=STEPS, beta_schedule="cosine")
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    found = measure_likelihood(silent(pipeline), data)
    # At the end x̂_0 = x_t/α is far outside; it is brought to ±1 of the pixels, about 10 deviations from these greys.
    farthest = max((1 + abs(m)) / s for m, s in zip(*(pipeline.codec.config[k] for k in ("mean", "std")), strict=True))
    weight = schedule.posterior_mean_coefficients[0][-1] ** 2 / (2 * schedule.posterior_variance[-1]) / math.log(2)
    assert 0 < found.curve[-1].bits < float(weight) * (farthest + 2) ** 2
    unbounded = float(weight / schedule.snr[-1])  # of ‖ε‖² = 1 a dimension
    assert found.curve[-1].bits < unbounded / 2


def test_an_estimate_is_as_near_to_the_sum_as_it_says(pipeline, data):
    exact = measure_likelihood(pipeline, data)
    wide = measure_likelihood(pipeline, data, steps_per_image=4)
    assert wide.evaluations == 12 * 5
    off = []
    for images in range(8):  # with other timesteps, about the same noise: each is off by its own error alone
        estimate = measure_likelihood(pipeline, data, steps_per_image=8, seed=images)
        reference = exact if images == 0 else measure_likelihood(pipeline, data, seed=images)
        assert (estimate.prior, estimate.decoder) == pytest.approx((reference.prior, reference.decoder), rel=1e-5)
        assert estimate.timesteps_interval > 0
        off.append((estimate.total - reference.total) / (estimate.timesteps_interval / 1.96))
    assert max(map(abs, off)) < 4
    assert 0.4 < math.sqrt(sum(x * x for x in off) / len(off)) < 1.8  # of 1, the error that it says
    assert estimate.timesteps_interval < 0.8 * wide.timesteps_interval
    # With 19 strata of 39 timesteps all but one stratum are looked at whole.
    full = measure_likelihood(pipeline, data, steps_per_image=STEPS - 2)
    assert full.total == pytest.approx(exact.total, abs=4 * full.timesteps_interval / 1.96)
    assert full.timesteps_interval < 0.2 * estimate.timesteps_interval


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_fewer_bits_once_something_is_learned(kind, pipeline):
    config = DataConfig(path="digits", resolution=8)
    digits = CaptionedImages(open_source(config).samples[:24], config, 0)
    mean, std = image_statistics(digits)
    pipeline.codec = PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    pipeline.schedule = ScheduleConfig(num_train_timesteps=STEPS, beta_schedule="cosine", prediction_type=kind)
    before = measure_likelihood(silent(pipeline), digits, steps_per_image=20)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    x_0 = pipeline.codec.sample_latents(to_signed(torch.stack([digits.image_at(i) for i in range(24)])))
    states = pipeline.text_encoder([sample.captions[0] for sample in digits.samples])
    optimizer = torch.optim.Adam(pipeline.unet.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        loss = diffusion_loss(
            pipeline.unet, schedule, x_0, states,
            timesteps=torch.randint(STEPS, (24,), generator=generator),
            noise=torch.randn(x_0.shape, generator=generator),
            prediction_type=kind,
        )  # fmt: skip
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure_likelihood(pipeline, digits, steps_per_image=20)
    saved = before.per_image - after.per_image  # the same images, noise and timesteps
    assert float(saved.mean()) > 0.1 and float(saved.min()) > -0.5, saved
    assert after.prior == before.prior


def test_a_learned_variance_is_used(pipeline, data):
    def bits(nu):
        config = pipeline.unet.config.to_dict() | {"out_channels": 6}
        pipeline.unet = UNet(type(pipeline.unet.config).from_dict(config)).eval()
        torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
        with torch.no_grad():
            pipeline.unet.conv_out.bias[:3], pipeline.unet.conv_out.bias[3:] = 0, nu
        return measure_likelihood(pipeline, data).total

    learned = {nu: bits(nu) for nu in (-1.0, 1.0)}
    pipeline.unet = UNet(type(pipeline.unet.config).from_dict(pipeline.unet.config.to_dict() | {"out_channels": 3}))
    for nu, variance in ((-1.0, "small"), (1.0, "large")):
        expected = measure_likelihood(silent(pipeline), data, variance=variance).total
        assert learned[nu] == pytest.approx(expected, rel=1e-4)
    assert learned[-1.0] != pytest.approx(learned[1.0], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples is 0; it must be 1 to 12"),
        ({"samples": 13}, "samples is 13"),
        ({"steps_per_image": 3}, "steps per image is 3; it must be an even number from 2 to 39"),
        ({"steps_per_image": 0}, "steps per image is 0"),
        ({"steps_per_image": STEPS}, "steps per image is 40"),
    ],
)
def test_wrong_numbers_are_named(arguments, message, pipeline, data):
    with pytest.raises(ValueError, match=message):
        measure_likelihood(pipeline, data, **arguments)


def test_latents_and_other_sizes_are_refused(tmp_path, pipeline, data):
    with pytest.raises(ValueError, match="this model diffuses latents"):
        measure_likelihood(tiny.pipeline(tmp_path / "latent", "latent"), data)
    with pytest.raises(ValueError, match="resolution is 16 but the model was trained on 8x8 pixels"):
        measure_likelihood(pipeline, images_of(data.config.path, 16))


def test_buckets_are_measured_shape_by_shape(tmp_path, pipeline):
    folder = grey(tmp_path / "mixed", 4)
    for i in range(3):
        pixels = np.random.default_rng(90 + i).integers(108, 148, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"wide{i}.png")
        (folder / f"wide{i}.txt").write_text("wide")
    images = images_of(folder, buckets=True)
    assert len({images.shape_of(i) for i in range(len(images))}) > 1
    found = measure_likelihood(pipeline, images, steps_per_image=4)
    assert len(set(found.ids)) == 7 and bool(found.per_image.isfinite().all())
