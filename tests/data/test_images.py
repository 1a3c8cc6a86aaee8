import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import DataConfig
from ldm.data.images import FORMATS, decode, resize_and_crop, to_rgb
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from tests.data import profiles

WHITE = (255, 255, 255)
GREEN = (0, 128, 0)


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), 0 * rows], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grays_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grays = np.array([[0, 200, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grays).save(tmp_path / f"a.{suffix}")
    image = decode((tmp_path / f"a.{suffix}").read_bytes(), WHITE).image
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def png_of_16_bits(pixels: np.ndarray, color_type: int) -> bytes:
    """uint16 [h, w, channels] as a PNG, which Pillow only writes for grays."""

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_reported_of_colors_too(color_type: int, channels: int) -> None:
    pixels = np.full((4, 5, channels), 65535, np.uint16)
    pixels[..., 0] = 257 * 100
    decoded = decode(png_of_16_bits(pixels, color_type), WHITE)
    assert "16-bit" in decoded.traits
    assert decoded.image.getpixel((0, 0))[0] == 100
    eight = io.BytesIO()
    Image.new("RGB", (4, 4)).save(eight, "PNG")
    assert decode(eight.getvalue(), WHITE).traits == ()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_of_images_that_are_not_opaque(mode: str) -> None:
    for alpha, expected in ((255, None), (254, (254, 254))):
        data = io.BytesIO()
        image = Image.new("L", (2, 2), 100).convert(mode)
        image.putalpha(alpha)
        image.save(data, "PNG")
        decoded = decode(data.getvalue(), WHITE)
        assert (decoded.alpha.getextrema() if decoded.alpha else None) == expected


def test_transparent_pixels_blend_with_the_background(tmp_path: Path) -> None:
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8), "RGBA")
    rgba.save(tmp_path / "a.png")
    pixels = np.asarray(decode((tmp_path / "a.png").read_bytes(), GREEN).image).astype(int)[0]
    assert pixels[:2].tolist() == [[255, 0, 0], [0, 128, 0]]
    assert np.abs(pixels[2] - [100, 64, 0]).max() <= 1

    gray = Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8), "LA")
    gray.save(tmp_path / "b.png")
    assert np.asarray(decode((tmp_path / "b.png").read_bytes(), GREEN).image)[0].tolist() == [[10, 10, 10], [0, 128, 0]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for name in ("c.png", "c.gif"):
        palette.save(tmp_path / name, transparency=1)
        assert np.asarray(decode((tmp_path / name).read_bytes(), GREEN).image)[0].tolist() == [[255, 0, 0], [0, 128, 0]]


def test_cmyk_and_black_and_white_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = np.asarray(decode((tmp_path / "a.jpg").read_bytes(), WHITE).image)[4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60
    Image.new("1", (2, 2), 1).save(tmp_path / "a.bmp")
    assert np.asarray(decode((tmp_path / "a.bmp").read_bytes(), WHITE).image).tolist() == [[[255] * 3] * 2] * 2


def test_an_image_that_the_camera_turned_stands_upright(tmp_path: Path) -> None:
    upright = gradient(12, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left; to be shown turned to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(decode((tmp_path / "a.png").read_bytes(), WHITE).image), np.asarray(upright))


@pytest.mark.parametrize(("orientation", "traits"), [(0, ()), (1, ()), (3, ("rotated",)), (8, ("rotated",)), (99, ())])
def test_only_what_is_turned_is_said_to_be(tmp_path: Path, orientation: int, traits: tuple[str, ...]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient(12, 6).save(tmp_path / "a.jpg", exif=exif)
    assert decode((tmp_path / "a.jpg").read_bytes(), WHITE).traits == traits


def test_a_moving_image_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode((tmp_path / "a.gif").read_bytes(), WHITE).image.getpixel((0, 0)) == (255, 0, 0)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunks(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG of 12 by 6 pixels with more chunks, before its pixels or behind them."""
    data = io.BytesIO()
    gradient(12, 6).save(data, "PNG")
    place = data.getvalue().index(b"IEND" if behind else b"IDAT") - 4
    return data.getvalue()[:place] + b"".join(chunks) + data.getvalue()[place:]


@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_long_texts_is_read(behind: bool) -> None:
    """Pillow refuses more than 1 MiB in one text and 64 MiB in all."""
    long = zlib.compress(bytes(2**21))
    many = [chunk(b"tEXt", b"Comment\0" + b"a" * 2**20)] * 65
    for chunks in (
        [chunk(b"zTXt", b"prompt\0\0" + long)],
        [chunk(b"iTXt", b"workflow\0\1\0en\0workflow\0" + long)],
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + long)],
        [chunk(b"zTXt", b"broken\0\0" + long[:40])],
        many,
    ):
        found = decode(with_chunks(*chunks, behind=behind), WHITE)
        assert np.array_equal(np.asarray(found.image), np.asarray(gradient(12, 6)))


def test_texts_that_say_how_a_png_is_turned_are_heeded() -> None:
    turned = b'<x:xmpmeta tiff:Orientation="6"/>'
    plain = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned)
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(turned))
    for text in (plain, packed):
        found = decode(with_chunks(text), WHITE)
        assert (found.image.size, found.traits) == ((6, 12), ("rotated",))


def test_a_png_with_a_large_profile_is_read() -> None:
    profile = profiles.rgb(profiles.P3, None)
    large = profile + bytes(2**21)
    data = with_chunks(chunk(b"iCCP", b"P3\0\0" + zlib.compress(large)))
    expected = profiles.converted(np.asarray(gradient(12, 6)), profiles.P3, None)
    assert np.abs(np.asarray(decode(data, WHITE).image) - expected).max() <= 2
    bomb = with_chunks(chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile + bytes(2**25))))
    assert decode(bomb, WHITE).traits == ("color-profile",)  # of which 16 MiB are unpacked


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if "AVIF" in FORMATS else [])]
)
def test_what_can_be_decoded_is_whatever_its_name_says(tmp_path: Path, kind: str) -> None:
    gradient(12, 6).save(tmp_path / "a.jpg", kind)
    (tmp_path / "a.txt").write_text("a caption")
    config = DataConfig(path=str(tmp_path), resolution=8)
    inspection = inspect(open_source(config), config)
    assert [(found.id, found.size) for found in inspection.used] == [("a.jpg", (12, 6))]
    assert inspection.formats[0].format == kind


@pytest.mark.parametrize(
    ("beginning", "reason"),
    [
        (b"\0\0\0\x24ftypheic", "a HEIC image.*PNG or JPEG"),
        (b"\0\0\0\x18ftypmif1", "a HEIC image"),
        (b"\0\0\0\x18ftypisom", "an MP4 video.*frames"),
        (b"\0\0\0\x0cJXL \r\n", "a JPEG XL image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "not an SVG that can be drawn"),
        (b"<!DOCTYPE html><html><svg xmlns='x'/></html>", "a web page"),
        (b"\n<!DOCTYPE html><html>", "a web page.*download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-LFS.*git lfs pull"),
        (b"PK\x03\x04", "a zip archive.*unpack"),
    ],
)
def test_what_is_no_image_is_named_whatever_its_name_says(beginning: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        decode(beginning + bytes(100), WHITE)


def test_why_a_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    gradient(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    Image.new("F", (2, 2)).save(tmp_path / "floats.tif")
    reasons = {
        "empty.png": "the file is empty",
        "text.png": "not an image in a known format",
        "script.png": "a PostScript document",
        "cut.jpg": "truncated",
        "floats.tif": "32-bit grays",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as caught:
            decode((tmp_path / name).read_bytes(), WHITE)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64·64 is more than twice that: a bomb
    with pytest.raises(ValueError, match="2,000 pixels"):
        decode((tmp_path / "whole.jpg").read_bytes(), WHITE)


@pytest.mark.parametrize(("width", "height"), [(30, 10), (10, 30), (23, 10), (10, 10)])
def test_a_square_at_its_own_size_is_cut_out_at_whole_pixels(width: int, height: int) -> None:
    image = gradient(width, height)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for place, start in (
        (0.0, 0),
        (0.5, (max(width, height) - 10 + 1) // 2),
        (1 - 1e-9, max(width, height) - 10),
    ):
        cut = pixels[:, :, start : start + 10] if width > height else pixels[:, start : start + 10]
        result = resize_and_crop(image, (10, 10), place)
        assert (result.dtype, result.shape, result.is_contiguous()) == (torch.uint8, (3, 10, 10), True)
        assert torch.equal(result, cut), (width, height, place)


def test_resize_and_crop_equals_both_steps() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    short_side_first = image.resize((60, 20), Image.Resampling.BICUBIC)
    for place, left in ((0.0, 0), (0.5, 20), (1 - 1e-9, 40)):
        expected = np.asarray(short_side_first)[:, left : left + 20].transpose(2, 0, 1).astype(int)
        assert np.abs(resize_and_crop(image, (20, 20), place).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("size", "native", "spare"), [
    ((20, 40), (120, 40), (20, 0)),  # wider than the target: the width is cropped
    ((20, 40), (60, 50), (0, 13)),
    ((40, 20), (50, 60), (13, 0)),
    ((20, 40), (80, 40), (0, 0)),
    ((20, 40), (20, 11), (0, 2)),  # smaller than the target: enlarged until it is covered
])  # fmt: skip
def test_an_image_is_resized_until_it_covers_the_size_and_no_further(
    size: tuple[int, int], native: tuple[int, int], spare: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (native[1], native[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    (height, width), (across, down) = size, spare
    for place in (0.0, 0.5, 0.3, 1 - 1e-9):
        left, top = int(place * (across + 1)), int(place * (down + 1))
        # Both steps in turn; the resized side that is cropped need not be whole, so it is resized with a box.
        scale = min(native[0] / width, native[1] / height)
        whole = (width + across, height + down)
        covering = image.resize(whole, Image.Resampling.BICUBIC, box=(0, 0, *(side * scale for side in whole)))
        expected = np.asarray(covering)[top : top + height, left : left + width].transpose(2, 0, 1).astype(int)
        result = resize_and_crop(image, size, place)
        assert (result.dtype, tuple(result.shape), result.is_contiguous()) == (torch.uint8, (3, *size), True)
        assert np.abs(result.numpy().astype(int) - expected).max() <= 1, place


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert (resize_and_crop(Image.fromarray(stripes), (16, 16)).int() - 128).abs().max() < 12


def test_rgb_stays_as_it_is() -> None:
    image = gradient(5, 3)
    assert np.array_equal(np.asarray(to_rgb(image, GREEN)), np.asarray(image))
