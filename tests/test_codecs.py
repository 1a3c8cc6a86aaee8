"""Both charts: statistics, bounds, shapes."""

import pytest
import torch

from ldm.codecs import LatentCodec, PixelCodec
from ldm.data import CaptionedImages, DataConfig, image_statistics, open_source, to_signed
from ldm.models import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from tests import tiny


def latent_codec(**changes):
    return LatentCodec(AutoencoderKL(AutoencoderConfig(**(tiny.VAE | changes))).double())


def test_pixels_of_the_training_data_become_standard():
    config = DataConfig(path="digits", resolution=8)
    data = CaptionedImages(open_source(config).samples, config, 0)
    mean, std = image_statistics(data)
    codec = PixelCodec(tuple(mean.tolist()), tuple(std.tolist()))
    images = to_signed(torch.stack([data.image_at(i) for i in range(len(data))]))
    latents = codec.draw(codec.moments(images))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(latents), images)


def test_pixels_bound_what_is_predicted_by_the_range_of_images():
    codec = PixelCodec((0.1, -0.5, 0.0), (0.5, 0.25, 2.0))
    wild = 100 * torch.randn(2, 3, 4, 4)
    bounded = codec.decode(codec.project(wild))
    assert float(bounded.max()) == pytest.approx(1)
    assert float(bounded.min()) == pytest.approx(-1)
    inside = codec.draw(torch.rand(2, 3, 4, 4) * 1.98 - 0.99)
    torch.testing.assert_close(codec.project(inside), inside)
    assert codec.bounded


def test_latents_are_scaled_as_stable_diffusion_scales_them():
    codec = latent_codec(scaling_factor=0.2, shift_factor=0.3)
    images = torch.rand(2, 3, 16, 16).double() * 2 - 1
    moments = codec.moments(images)
    mean, _ = moments.chunk(2, dim=1)
    torch.testing.assert_close(codec.draw(moments), (mean - 0.3) * 0.2)
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
    latents = codec.draw(z)
    torch.testing.assert_close(latents, (z - mean) / std)
    assert torch.equal(codec.draw(z, torch.randn_like(z)), latents), "there is no posterior"
    torch.testing.assert_close(codec.drawing()(z, None), latents)
    decoded = codec.decode(latents)
    codes = codec.autoencoder.quantize(z).latents
    assert not torch.allclose(codes, z, atol=1e-2)
    torch.testing.assert_close(decoded, codec.autoencoder.decoder(codec.autoencoder.post_quant_conv(codes)))
    assert codec.latent_shape(16, 8) == (4, 8, 4)
    half = codebook_codec(scaling_factor=0.5)
    torch.testing.assert_close(half.draw(z), 0.5 * latents)
    torch.testing.assert_close(half.decode(half.draw(half.moments(images))), decoded)


def test_the_statistics_of_half_precision_latents_keep_their_digits():
    codec = latent_codec(scaling_factor=0.18215, shift_factor=0.3)
    moments = torch.linspace(-4, 4, 1024).view(1, 8, 16, 8).half()
    expected = (moments.double()[:, :4] - 0.3) * 0.18215
    assert codec.draw(moments).dtype == torch.float16
    assert torch.equal(codec.draw(moments), expected.half())


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
    torch.testing.assert_close(codec.draw(moments, noise), 0.5 * (3 + 2**0.5 * noise))


def test_latents_have_no_bound():
    wild = 100 * torch.randn(1, 4, 2, 2)
    codec = latent_codec()
    assert codec.project(wild) is wild
    assert not codec.bounded


@pytest.mark.parametrize(("height", "width", "nearest"), [(15, 16, "16x16"), (16, 7, "16x8"), (1, 16, "2x16")])
def test_sizes_that_the_factor_does_not_divide_are_refused(height, width, nearest):
    codec = latent_codec()
    assert codec.latent_shape(16, 8) == (4, 8, 4)
    with pytest.raises(ValueError, match=f"{height}x{width} is not divisible by the codec's factor 2; .* {nearest}"):
        codec.latent_shape(height, width)


@pytest.mark.parametrize(("mean", "std"), [((0.0,), (1.0, 1.0)), ((0.0,), (0.0,))])
def test_wrong_statistics_are_refused(mean, std):
    with pytest.raises(ValueError, match="one entry a channel"):
        PixelCodec(mean, std)
