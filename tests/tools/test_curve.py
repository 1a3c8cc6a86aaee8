"""The curve of a run: every point where it belongs."""

import itertools
import json
import xml.etree.ElementTree as ElementTree

import pytest

from tools.curve import plot, read, smooth


def test_a_curve_falls_from_top_left_to_bottom_right(tmp_path):
    lines = [{"step": step, "loss": 10 ** (-step / 100)} for step in range(0, 201, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 5, "x": 1}]))
    points = read(tmp_path, "loss")
    assert len(points) == 21
    svg = ElementTree.fromstring(plot({"loss": points}))
    (line,) = [element for element in svg.iter() if element.tag.endswith("polyline")]
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert places[0] == (60, 20)
    assert places[-1] == (630, 280)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(places)]
    assert max(slopes) - min(slopes) < 0.02  # exponential decay is a straight line on a logarithmic axis
    with pytest.raises(ValueError, match="holds no psnr"):
        read(tmp_path, "psnr")


def test_smoothing_is_a_running_mean():
    points = [(i, float(i % 2)) for i in range(100)]
    assert [step for step, _ in smooth(points)] == list(range(100))
    assert all(0.39 < value < 0.61 for _, value in smooth(points)[2:-2])
    assert smooth(points[:10]) == points[:10]
