"""A chart as a file: the same line in SVG and in PNG."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ldm.report.charts import BOTTOM, LEFT, LEGEND_ROW, LIGHT, PNG_SCALE, RIGHT, Line, save_chart

POINTS = [(0, 1.0), (50, 0.1), (100, 0.01)]  # a straight line on a logarithmic axis


def inked(image, colour):
    """Where a colour is, as [N, 2] of (x, y) in units of an SVG."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero((np.asarray(image) == wanted).all(axis=2))
    return np.stack([x, y], axis=1) / PNG_SCALE


def rasterized(folder, points):
    save_chart(folder / "chart.png", Line("L_t", points), axis="t")
    return Image.open(folder / "chart.png")


def test_a_line_goes_from_corner_to_corner(tmp_path):
    image = rasterized(tmp_path, POINTS)
    assert image.size == (640 * PNG_SCALE, 320 * PNG_SCALE)
    at = inked(image, LIGHT.lines[0])
    at = at[at[:, 1] > LEGEND_ROW - 5]  # without the swatch
    left, right, top, bottom = LEFT, 640 - RIGHT, LEGEND_ROW, 320 - BOTTOM
    assert at.min(axis=0) == pytest.approx([left, top], abs=4)
    assert at.max(axis=0) == pytest.approx([right, bottom], abs=4)
    expected = top + (at[:, 0] - left) / (right - left) * (bottom - top)
    assert np.abs(at[:, 1] - expected).max() < 5
    assert len(inked(image, LIGHT.ink)) > 300  # the numbers and names


def test_what_is_zero_somewhere_is_on_a_linear_axis(tmp_path):
    at = inked(rasterized(tmp_path, [(0, 1.0), (50, 0.0), (100, 0.0)]), LIGHT.lines[0])
    assert np.abs(at[at[:, 0] > 360][:, 1] - (320 - BOTTOM)).max() < 5


@pytest.mark.parametrize("name", ["a.svg", "new/a.PNG"])
def test_the_name_of_a_file_says_its_format(name, tmp_path):
    save_chart(tmp_path / name, Line("bits <of> L_t", POINTS), axis="t & more")
    if name.endswith("svg"):
        svg = ElementTree.parse(tmp_path / name)
        texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
        assert "bits <of> L_t" in texts and "t & more; values on a logarithmic scale" in texts
    else:
        assert Image.open(tmp_path / name).text["title"] == "bits <of> L_t"
