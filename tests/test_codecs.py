"""Both charts: statistics, bounds, shapes."""

import copy
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ldm.codecs import LatentCodec, PixelCodec, _warn_of_overflow
from ldm.data import CaptionedImages, DataConfig, image_statistics, to_signed
from ldm.data.layouts import open_source
from ldm.models import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from ldm.models.blocks import ResnetBlock
from ldm.training.setup import load_first_stage
from tests import tiny


def latent_codec(**changes):
    return LatentCodec(AutoencoderKL(AutoencoderConfig(**(tiny.VAE | changes))).double())


def test_pixels_of_the_training_data_become_standard():
    config = DataConfig(path="digits", resolution=8)
    data = CaptionedImages(open_source(config).samples, config, 0)
    mean, std = image_statistics(data)
    codec = PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    images = to_signed(torch.stack([data.image_at(i) for i in range(len(data))]))
    latents = codec.sample_latents(codec.moments(images))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(latents), images)


def test_pixels_bound_what_is_predicted_by_the_range_of_images():
    codec = PixelCodec((0.1, -0.5, 0.0), (0.5, 0.25, 2.0))
    wild = 100 * torch.randn(2, 3, 4, 4)
    bounded = codec.decode(codec.clip_x0(wild))
    assert float(bounded.max()) == pytest.approx(1)
    assert float(bounded.min()) == pytest.approx(-1)
    inside = codec.sample_latents(torch.rand(2, 3, 4, 4) * 1.98 - 0.99)
    torch.testing.assert_close(codec.clip_x0(inside), inside)
    assert codec.bounded


def test_latents_are_scaled_as_stable_diffusion_scales_them():
    codec = latent_codec(scaling_factor=0.2, shift_factor=0.3)
    images = torch.rand(2, 3, 16, 16).double() * 2 - 1
    moments = codec.moments(images)
    mean, _ = moments.chunk(2, dim=1)
    torch.testing.assert_close(codec.sample_latents(moments), (mean - 0.3) * 0.2)
    latents = torch.randn(2, 4, 8, 8).double()
    torch.testing.assert_close(codec.decode(latents), codec.autoencoder.decode(latents / 0.2 + 0.3))


def codebook_codec(**changes):
    torch.manual_seed(0)
    return LatentCodec(VQModel(VQConfig(**(tiny.VQ | changes))).double())


def test_a_codebook_is_looked_up_when_latents_are_decoded():
    codec = codebook_codec()
    images = torch.rand(2, 3, 16, 16).double() * 2 - 1
    z = codec.moments(images)
    mean, std = (torch.tensor(tiny.VQ[key]).double().view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(z, codec.autoencoder.quant_conv(codec.autoencoder.encoder(images)))
    latents = codec.sample_latents(z)
    torch.testing.assert_close(latents, (z - mean) / std)
    assert torch.equal(codec.sample_latents(z, torch.randn_like(z)), latents), "there is no posterior"
    torch.testing.assert_close(codec.latents_sampler()(z, None), latents)
    decoded = codec.decode(latents)
    codes = codec.autoencoder.quantize(z).latents
    assert not torch.allclose(codes, z, atol=1e-2)
    torch.testing.assert_close(decoded, codec.autoencoder.decoder(codec.autoencoder.post_quant_conv(codes)))
    assert codec.latent_shape(16, 8) == (4, 8, 4)
    half = codebook_codec(scaling_factor=0.5)
    torch.testing.assert_close(half.sample_latents(z), 0.5 * latents)
    torch.testing.assert_close(half.decode(half.sample_latents(half.moments(images))), decoded)


def test_the_statistics_of_half_precision_latents_keep_their_digits():
    codec = latent_codec(scaling_factor=0.18215, shift_factor=0.3)
    moments = torch.linspace(-4, 4, 1024).view(1, 8, 16, 8).half()
    expected = (moments.double()[:, :4] - 0.3) * 0.18215
    assert codec.sample_latents(moments).dtype == torch.float16
    assert torch.equal(codec.sample_latents(moments), expected.half())


def test_what_is_kept_of_images_depends_on_the_encoder_alone():
    """Codes and statistics come in when latents are made of it, or decoded."""
    codec = codebook_codec()
    with torch.no_grad():
        codec.autoencoder.quantize.embedding.weight.zero_()
    assert codec.fingerprint() == codebook_codec().fingerprint()
    assert codebook_codec(latents_std=(1.0,) * 4).fingerprint() == codec.fingerprint()
    with torch.no_grad():
        codec.autoencoder.quant_conv.bias[0] += 1
    assert codec.fingerprint() != codebook_codec().fingerprint()
    kept = {name: value for name, value in tiny.VQ.items() if name in tiny.VAE}
    assert latent_codec(**kept).fingerprint() != codebook_codec().fingerprint()


def test_the_posterior_is_drawn_with_the_noise_that_is_given():
    codec = latent_codec(scaling_factor=0.5)
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0).log()], dim=1)
    noise = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(codec.sample_latents(moments, noise), 0.5 * (3 + 2**0.5 * noise))


def test_latents_have_no_bound():
    wild = 100 * torch.randn(1, 4, 2, 2)
    codec = latent_codec()
    assert codec.clip_x0(wild) is wild
    assert not codec.bounded


@pytest.mark.parametrize(("height", "width", "nearest"), [(15, 16, "16x16"), (16, 7, "16x8"), (1, 16, "2x16")])
def test_sizes_that_the_factor_does_not_divide_are_refused(height, width, nearest):
    codec = latent_codec()
    assert codec.latent_shape(16, 8) == (4, 8, 4)
    with pytest.raises(ValueError, match=f"{height}x{width} is not divisible by the codec's factor 2; .* {nearest}"):
        codec.latent_shape(height, width)


@pytest.mark.parametrize(("mean", "std"), [((0.0,), (1.0, 1.0)), ((0.0,), (0.0,))])
def test_wrong_statistics_are_refused(mean, std):
    with pytest.raises(ValueError, match="one entry per channel"):
        PixelCodec(mean, std)


# ---- large images: strips


def test_strips_give_the_picture_and_the_moments_of_the_whole():
    codec = latent_codec()
    images, latents = torch.rand(2, 3, 44, 32).double() * 2 - 1, torch.randn(2, 4, 22, 16).double()
    with torch.no_grad():
        whole = codec.moments(images), codec.decode(latents)
        for size in (16, 23, 37):  # strips of 8 rows, of 16 and 28 left over, of 42 and 2 left over
            codec.tile(size)
            torch.testing.assert_close(codec.moments(images), whole[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(codec.decode(latents), whole[1], rtol=1e-9, atol=1e-9)


def test_a_large_emoji_has_no_seams():
    """On the built-in first stage: its picture in strips differs from the whole by rounding, and as little across the
    border of two strips as elsewhere.
    """
    codec = load_first_stage("openmoji-first-stage")
    config = DataConfig(path="openmoji", resolution=256)
    data = CaptionedImages([open_source(config).samples[123]], config, 0)
    image = to_signed(data.image_at(0))[None]
    with torch.no_grad():
        latents = codec.sample_latents(codec.moments(image))
        whole = codec.decode(latents)
        codec.tile(64)  # strips of 16 rows
        torch.testing.assert_close(codec.sample_latents(codec.moments(image)), latents, rtol=0, atol=1e-4)
        difference = (codec.decode(latents) - whole).abs()
    assert 0 < float(difference.max()) < 1e-4  # a grey level is 8e-3
    jumps = difference.diff(dim=2).abs().mean(dim=(0, 1, 3))  # [255]
    seams = torch.zeros(255, dtype=torch.bool)
    seams[15::16] = True
    assert float(jumps[seams].mean()) < 2 * float(jumps[~seams].mean())


def test_strips_take_less_memory():
    # What is held at once, seen by torch itself.
    shape = {"block_out_channels": (8, 32), "mid_block_add_attention": False}
    codec = LatentCodec(AutoencoderKL(AutoencoderConfig(**(tiny.VAE | shape))).eval())
    latents, peaks = torch.randn(1, 4, 64, 64), {}
    for size in ("off", 16):
        codec.tile(size)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            codec.decode(latents)
        peaks[size] = _peak(seen)
    assert peaks["off"] > 128 * 128 * 32 * 4 * 2
    assert peaks[16] < peaks["off"] / 3


def _peak(seen):
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_strips_set_in_by_the_memory_that_an_image_would_need(monkeypatch):
    asked = []

    class Recorder(AutoencoderKL):
        def decode(self, latents, strips=None):
            asked.append(strips)
            return latents

    codec = LatentCodec(Recorder(latent_codec(force_upcast=False).autoencoder.config)).float()
    monkeypatch.setattr("ldm.codecs.WHOLE_BYTES", 2**22)
    monkeypatch.setattr("ldm.codecs.STRIP_BYTES", 2**20)
    codec.requires_grad_(False)
    each = 4 * 4 * 16  # bytes, maps, channels of the second level
    rows = 2**22 // (each * 128)
    for height in (rows // 2, rows // 2 + 1):
        codec.decode(torch.zeros(3, 4, height, 64))
    codec.half().decode(torch.zeros(1, 4, rows // 2 + 1, 64, dtype=torch.float16))
    assert asked == [None, 2**20 // each, None]
    codec.float().tile("off")
    codec.decode(torch.zeros(1, 4, rows, 64))
    codec.tile(64)
    codec.decode(torch.zeros(1, 4, 32, 32))
    codec.decode(torch.zeros(1, 4, 33, 32))
    assert asked[3:] == [None, None, 4096]


def test_gradients_flow_through_a_decoder_that_is_tiled():
    codec = latent_codec()
    codec.tile(16)
    latents = torch.randn(1, 4, 16, 16).double().requires_grad_()
    codec.decode(latents).sum().backward()
    assert float(latents.grad.abs().sum()) > 0


@pytest.mark.parametrize("size", [0, -64, 15, 64.0, True, "64", "none", None])
def test_wrong_tiles_are_refused(size):
    for codec in (latent_codec(), PixelCodec((0.0,), (1.0,))):
        codec.tile("auto")
        with pytest.raises(ValueError, match="it is auto, off, or the side of a square in pixels, at least 16"):
            codec.tile(size)


# ---- half precision


def loud_codec(gain, **changes):
    """A real autoencoder in float16 whose inner maps are `gain` times larger, with the same output but for rounding."""
    autoencoder = AutoencoderKL(AutoencoderConfig(**(tiny.VAE | {"mid_block_add_attention": False} | changes)))
    with torch.no_grad():
        for part in (autoencoder.encoder, autoencoder.decoder):
            part.conv_in.weight *= gain
            for block in [*part.modules()]:
                if isinstance(block, ResnetBlock):
                    block.conv2.weight *= gain
                    block.conv2.bias *= gain
            part.conv_in.bias *= gain
    return LatentCodec(autoencoder.eval().requires_grad_(False).half())


@pytest.fixture
def fresh_warning():
    _warn_of_overflow.cache_clear()
    yield
    _warn_of_overflow.cache_clear()


def quiet():
    return warnings.catch_warnings(record=True)


def test_what_half_precision_cannot_hold_is_computed_again_in_float32_and_said_once(fresh_warning):
    codec = loud_codec(1e5, scaling_factor=1.0)
    exact = LatentCodec(copy.deepcopy(codec.autoencoder).float())
    images, latents = torch.rand(2, 3, 16, 16).half() * 2 - 1, torch.randn(2, 4, 8, 8).half()
    assert not codec.autoencoder.decode(latents).isfinite().all()
    assert not codec.autoencoder.encode(images).isfinite().all()
    with pytest.warns(UserWarning, match=r"range of float16; .* in float32"):
        decoded = codec.decode(latents)
    with quiet() as caught:
        warnings.simplefilter("always")
        moments = codec.moments(images)
        torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=0)
    assert not caught
    assert decoded.dtype == moments.dtype == torch.float16
    assert codec.autoencoder.encoder.conv_in.weight.dtype == torch.float16
    torch.testing.assert_close(decoded, exact.decode(latents.float()).half())
    torch.testing.assert_close(moments, exact.moments(images.float()).half())


def test_only_the_images_that_overflow_are_computed_again(fresh_warning):
    """So that a picture does not depend on the others of its batch, nor on those before."""
    codec = loud_codec(4e3, scaling_factor=1.0)
    latents = torch.randn(3, 4, 8, 8).half() * torch.tensor([1.0, 100.0, 1.0]).half()[:, None, None, None]
    alone = codec.autoencoder.decode(latents)
    assert alone.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True]
    with pytest.warns(UserWarning, match="float16"):
        decoded = codec.decode(latents)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded[::2], alone[::2], rtol=0, atol=0)
    latents[0, 0, 0, 0] = torch.nan  # which no arithmetic mends, so that none is tried
    _warn_of_overflow.cache_clear()
    with quiet() as caught:
        warnings.simplefilter("always")
        assert codec.decode(latents[::2]).isfinite().flatten(1).all(dim=1).tolist() == [False, True]
    assert not caught


def test_high_resolution_is_upcast_where_the_config_says_so(fresh_warning, monkeypatch):
    monkeypatch.setattr("ldm.codecs.HIGH_RESOLUTION", 16 * 16)
    latents = torch.randn(1, 4, 8, 8).half()
    forced, free = loud_codec(1e5, force_upcast=True), loud_codec(1e5, force_upcast=False)
    with quiet() as caught:
        warnings.simplefilter("always")
        assert forced.decode(latents).isfinite().all()
        assert not caught
        assert forced.decode(latents[:, :, :7]).isfinite().all()  # smaller: half precision first
        assert len(caught) == 1
    _warn_of_overflow.cache_clear()
    with pytest.warns(UserWarning, match="float16"):
        assert free.decode(latents).isfinite().all()


def test_a_first_stage_in_autocast_is_computed_again_without(fresh_warning):
    codec = LatentCodec(loud_codec(1e5).autoencoder.float())
    latents = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="float16"):
        decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, codec.decode(latents).half())


def test_a_first_stage_with_a_codebook_works_in_strips_and_in_half_precision_too(fresh_warning):
    shape = {key: value for key, value in tiny.VAE.items() if key != "latent_channels"}
    codec = LatentCodec(
        VQModel(VQConfig(**shape, latent_channels=3, num_vq_embeddings=16)).eval().requires_grad_(False)
    )
    images = torch.rand(1, 3, 40, 32) * 2 - 1
    moments = codec.moments(images)
    whole = codec.decode(moments)
    codec.tile(16)
    torch.testing.assert_close(codec.moments(images), moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.decode(moments), whole, rtol=1e-4, atol=1e-4)
    codec.half().autoencoder.decoder.conv_out.bias.fill_(torch.inf)  # which float32 does not mend, but tries to
    with pytest.warns(UserWarning, match="float16"):
        codec.decode(moments.half())
