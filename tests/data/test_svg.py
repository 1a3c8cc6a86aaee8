"""SVG files as images."""

import pytest

from ldm.data import DataConfig
from ldm.data.images import SVG_SIDE, decode
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20" width="40" height="20">'
RED = f'{HEAD}<rect width="20" height="20" fill="#f00"/></svg>'


def test_a_drawing_is_rendered_on_the_background():
    found = decode(RED.encode(), (0, 0, 255))
    assert (found.image.size, found.format) == ((SVG_SIDE, SVG_SIDE // 2), "SVG")
    assert found.image.getpixel((10, 10)) == (255, 0, 0) and found.image.getpixel((SVG_SIDE - 10, 10)) == (0, 0, 255)
    assert "transparent" in found.traits
    thin = RED.replace('viewBox="0 0 40 20" width="40" height="20"', 'viewBox="0 0 1 1000000"')
    assert decode(thin.encode(), (0, 0, 0)).image.size == (1, SVG_SIDE)
    embedded = RED.replace("</svg>", '<image href="data:image/png;base64,"/></svg>')
    assert decode(embedded.encode(), (0, 0, 0)).format == "SVG"
    tall = RED.replace('viewBox="0 0 40 20" width="40" height="20"', 'viewBox="0 0 10 40"')
    assert decode(b"\xef\xbb\xbf<?xml version='1.0'?>\n" + tall.encode(), (0, 0, 0)).image.height == SVG_SIDE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<svg", "not an SVG that can be drawn"),
        (f"{HEAD}<text>hello</text></svg>", "convert its text to paths"),
        (f'{HEAD}<image href="../secret.png"/></svg>', "refers to another file"),
        (f"{HEAD}<image xlink:href='/home/me/photo.JPG'/></svg>", "refers to another file"),
        (f'{HEAD}<image width="9" href="my photo.png"/></svg>', "refers to another file"),
        (f'{HEAD}<image href="/etc/no_suffix"/></svg>', "refers to another file"),
        (f'{HEAD}<filter id="f"><feImage href="a.png"/></filter></svg>', "refers to another file"),
        ('<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>', "not an SVG that can be drawn"),
        (f"{HEAD}{' ' * 2**22}</svg>", "more than 4 MiB"),
        ("", "the file is empty"),
    ],
)
def test_what_cannot_be_drawn_says_why(content, reason):
    with pytest.raises(ValueError, match=reason):
        decode(content.encode(), (255, 255, 255))


def test_a_folder_of_drawings(tmp_path):
    for i, color in enumerate(("red", "green")):
        (tmp_path / f"{i}.svg").write_text(RED.replace("#f00", color))
        (tmp_path / f"{i}.txt").write_text(f"a {color} square")
    config = DataConfig(path=str(tmp_path), resolution=16)
    inspection = inspect(open_source(config), config)
    assert [sample.captions[0] for sample in inspection.used] == ["a red square", "a green square"]
    assert [kind.format for kind in inspection.formats] == ["SVG", "SVG"]
