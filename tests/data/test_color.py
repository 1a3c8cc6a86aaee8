"""Colors that a profile describes become sRGB, by the value; what has no profile, or that of sRGB, stays as it is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ldm.data import DataConfig
from ldm.data.images import decode
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from ldm.pipelines.images import from_pil
from ldm.report.text import report_text
from tests.data import profiles

WHITE = (255, 255, 255)
COLORS = np.array([[[200, 100, 50], [255, 255, 255], [0, 0, 0], [90, 160, 120], [20, 30, 40]]], dtype=np.uint8)
P3 = profiles.rgb(profiles.P3, None)
ADOBE = profiles.rgb(profiles.ADOBE, 563 / 256)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def pixels(data: bytes, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(decode(data, background).image).astype(int)


@pytest.mark.parametrize(
    ("primaries", "gamma"),
    [(profiles.P3, None), (profiles.ADOBE, 563 / 256), (profiles.SRGB, 1.8), (profiles.SRGB, 1.0)],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_rgb_profiles(primaries: Any, gamma: float | None, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = stored(Image.fromarray(COLORS), kind, icc_profile=profiles.rgb(primaries, gamma), **options)
    expected = profiles.converted(COLORS, primaries, gamma)
    assert np.abs(expected - COLORS).max() > 5  # what was there is not what is asked for
    assert np.abs(pixels(data) - expected).max() <= 2
    assert decode(data, WHITE).traits == ("color-profile",)


def test_a_jpeg_is_converted_after_it_is_decoded() -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    plain, tagged = stored(image, "JPEG", quality=95), stored(image, "JPEG", quality=95, icc_profile=ADOBE)
    expected = profiles.converted(pixels(plain), profiles.ADOBE, 563 / 256)
    assert np.abs(pixels(tagged) - expected).max() <= 2
    assert np.abs(pixels(tagged) - pixels(plain)).max() > 20


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profiles.rgb(profiles.SRGB, None),
    ],
)
def test_what_is_srgb_stays_as_it_is_pixel_for_pixel(profile: bytes) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA"):
        image = Image.fromarray(noise).convert(mode)
        assert np.array_equal(pixels(stored(image, icc_profile=profile)), pixels(stored(image)))
        assert "color-profile" not in decode(stored(image, icc_profile=profile), WHITE).traits


def test_colors_are_converted_before_blending() -> None:
    half = np.concatenate([COLORS, np.full((1, 5, 1), 128, np.uint8)], axis=-1)
    opaque = profiles.converted(COLORS, profiles.P3, None)
    background = np.array((0, 200, 0))
    expected = opaque * 128 / 255 + background * 127 / 255
    assert np.abs(pixels(stored(Image.fromarray(half), icc_profile=P3), (0, 200, 0)) - expected).max() <= 2
    palette = Image.fromarray(COLORS).quantize(8)
    before = np.asarray(palette.convert("RGB"))
    found = decode(stored(palette, icc_profile=P3), WHITE)
    assert np.abs(np.asarray(found.image) - profiles.converted(before, profiles.P3, None)).max() <= 2
    assert found.traits == ("color-profile", "palette")
    clear = stored(palette, icc_profile=P3, transparency=palette.getpixel((0, 0)))
    assert pixels(clear, (0, 200, 0))[0, 0].tolist() == [0, 200, 0]
    one_color = stored(Image.fromarray(COLORS), icc_profile=P3, transparency=(200, 100, 50))
    assert pixels(one_color, (0, 200, 0))[0, 0].tolist() == [0, 200, 0]
    assert np.abs(pixels(one_color)[0, 3] - opaque[0, 3]).max() <= 2


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_gray_profiles_of_8_and_16_bits(gamma: float) -> None:
    levels = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    profile = profiles.gray(gamma)
    expected = profiles.converted(np.repeat((levels / 257)[..., None], 3, -1), profiles.SRGB, gamma)
    eight = Image.fromarray((levels // 257).astype(np.uint8))
    assert np.abs(pixels(stored(eight, icc_profile=profile)) - expected).max() <= 2
    for kind in ("PNG", "TIFF"):
        found = decode(stored(Image.fromarray(levels), kind, icc_profile=profile), WHITE)
        assert np.abs(np.asarray(found.image) - expected).max() <= 2
        assert found.traits == ("color-profile", "16-bit")
    # Between two of the 256 grays too: 1/512 of white is 6 in sRGB where the grays are linear.
    between = Image.fromarray(np.full((1, 1), 128, np.uint16))
    assert abs(pixels(stored(between, icc_profile=profiles.gray(1.0)))[0, 0, 0] - 6.4) <= 1
    with_alpha = Image.merge("LA", [eight, Image.new("L", eight.size, 0)])
    assert pixels(stored(with_alpha, icc_profile=profile), (1, 2, 3))[0, 200].tolist() == [1, 2, 3]


def test_grays_with_the_profile_of_a_screen() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    expected = profiles.converted(np.repeat(levels[..., None], 3, -1), profiles.ADOBE, 563 / 256)
    assert np.abs(pixels(stored(Image.fromarray(levels), icc_profile=ADOBE)) - expected).max() <= 2


def test_a_press_and_lab() -> None:
    """White paper is white, and the darkest ink black: black point compensation."""
    inks = {(0, 0, 0, 0): 255, (255, 255, 255, 255): 0}
    for ink, level in inks.items():
        for kind in ("TIFF", "JPEG"):
            found = decode(stored(Image.new("CMYK", (8, 8), ink), kind, icc_profile=profiles.cmyk()), WHITE)
            assert np.abs(np.asarray(found.image).astype(int) - level).max() <= 2, (kind, ink)
            assert found.traits == ("color-profile",)
    half = pixels(stored(Image.new("CMYK", (8, 8), (255, 0, 0, 255)), "TIFF", icc_profile=profiles.cmyk()))[0, 0]
    assert half.max() - half.min() <= 2  # neutral, where cyan would be without the profile
    assert 90 < half[0] < 160
    lab = stored(Image.new("LAB", (2, 2), (128, 128, 128)), "TIFF")  # L* = 50
    assert np.abs(pixels(lab) - 119).max() <= 1


@pytest.mark.parametrize(
    ("profile", "mode"),
    [
        (b"not a profile", "RGB"),
        (P3[:200], "RGB"),
        (profiles.gray(2.2), "RGB"),
        (profiles.cmyk(), "RGB"),
        (P3, "CMYK"),
        (P3[:128] + bytes(len(P3) - 128), "RGB"),
    ],
)
def test_unusable_profile_is_counted_and_taken_as_srgb(profile: bytes, mode: str) -> None:
    image = Image.fromarray(COLORS).convert(mode)
    found = decode(stored(image, "TIFF", icc_profile=profile), WHITE)
    assert found.traits == ("bad-profile", *(["cmyk"] if mode == "CMYK" else []))
    assert np.array_equal(np.asarray(found.image), pixels(stored(image, "TIFF")))


def test_a_profile_that_cannot_be_unpacked() -> None:
    data = stored(Image.fromarray(COLORS), "JPEG", icc_profile=P3)
    assert data.count(b"ICC_PROFILE\0\x01\x01") == 1
    cut = data.replace(b"ICC_PROFILE\0\x01\x01", b"ICC_PROFILE\0\x01\x02")  # the first of two, the second is lost
    assert decode(cut, WHITE).traits == ("bad-profile",)


def test_other_statements_about_colors_are_named() -> None:
    def with_chunk(kind: bytes, content: bytes) -> bytes:
        info = PngInfo()
        info.add(kind, content)
        return stored(Image.fromarray(COLORS), pnginfo=info)

    linear, usual = (100000).to_bytes(4, "big"), (45455).to_bytes(4, "big")
    assert decode(with_chunk(b"gAMA", linear), WHITE).traits == ("png-gamma",)
    assert decode(with_chunk(b"gAMA", usual), WHITE).traits == ()
    wide = b"".join(round(100000 * v).to_bytes(4, "big") for v in (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    assert decode(with_chunk(b"cHRM", wide), WHITE).traits == ("png-gamma",)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    assert decode(stored(Image.fromarray(COLORS), "JPEG", exif=exif), WHITE).traits == ("adobe-rgb",)


def test_the_account_counts_and_names_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, profile in (("a", P3), ("b", ADOBE), ("c", b"broken"), ("d", None)):
        noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        noise.save(tmp_path / f"{name}.png", icc_profile=profile)
        (tmp_path / f"{name}.txt").write_text(name)
    config = DataConfig(path=str(tmp_path), resolution=8)
    for _ in range(2):  # the second time from what is kept
        account = dataset_report(inspect(open_source(config), config), config)
        assert account.traits == {"color-profile": 2, "bad-profile": 1}
        assert account.treatment["color-profile"] == "converted from their color profiles to sRGB"
        assert "2 color-profile: converted" in report_text(account)
        assert any(
            line.startswith("1 image has a color profile") and "c.png" in line for line in account.needs_attention
        )


def test_pictures_that_a_pipeline_is_given_are_converted_too() -> None:
    image = Image.open(io.BytesIO(stored(Image.fromarray(COLORS), icc_profile=P3)))
    found = (from_pil([image])[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(found - profiles.converted(COLORS, profiles.P3, None)).max() <= 2
