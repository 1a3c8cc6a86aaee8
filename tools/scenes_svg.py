"""Short SVGs: numbers rounded as far as the image allows, and a tight view box."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image
from resvg_py import svg_to_bytes

COMPARED = 128  # pixels of the longer side, for the comparison with the original
MEASURED = 256  # pixels, for the measurement of the box
VISIBLE = 8  # alpha of 255
MEAN, LOCAL = 1.0, 20.0  # of 255: allowed mean differences overall, and in each square of 8 × 8 pixels

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_COMMAND = re.compile(r"([MmZzLlHhVvCcSsQqTtAa])([^MmZzLlHhVvCcSsQqTtAa]*)")
_PATH = re.compile(r'(\sd=")([^"]*)(")')
_PLAIN = re.compile(
    r'(\s(?:x|y|x1|y1|x2|y2|cx|cy|r|rx|ry|fx|fy|width|height|points|stroke-width|stroke-dasharray)=")([^"]*)(")'
)
_MATRIX = re.compile(r'(ransform=")([^"]*)(")')
_IDS = re.compile(r'\sid="([^"]+)"')


def render(svg: str, size: int) -> np.ndarray:
    """Renders an SVG with `size` pixels on its longer side: uint8 [H, W, 4], not premultiplied.

    Raises:
        ValueError: if resvg cannot render it.
    """
    width, height = view_box(svg)[2:]
    side = {"width": size} if width >= height else {"height": size}
    png = bytes(svg_to_bytes(svg_string=svg, skip_system_fonts=True, **side))
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


def view_box(svg: str) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the root element."""
    found = re.search(r'viewBox="([^"]+)"', svg)
    assert found
    x, y, width, height = map(float, found.group(1).split())
    return x, y, width, height


def colors(svg: str) -> list[str]:
    """The names of the colors of at least a fifth of the pixels, in descending order; thresholds set by eye."""
    image = render(svg, 64)
    seen = image[image[..., 3] > 127][:, :3]  # [N, 3]
    hsv = np.asarray(Image.fromarray(seen[None]).convert("HSV"), np.float32)[0] / 255  # [N, 3]
    hue, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    rules = {
        "black": value < 0.25,
        "white": (saturation < 0.15) & (value > 0.88),
        "gray": saturation < 0.15,
        "brown": (hue >= 8) & (hue < 48) & ((value < 0.72) | (saturation < 0.5) & (value < 0.9)),
        "pink": ((hue < 15) | (hue >= 345)) & (saturation < 0.5) | (hue >= 300) & (hue < 345) & (value >= 0.5),
        "red": (hue < 15) | (hue >= 345),
        "orange": hue < 38,
        "yellow": hue < 68,
        "green": hue < 165,
        "blue": hue < 252,
        "purple": hue < 345,
    }
    names = np.select(list(rules.values()), list(range(len(rules))))  # the first that holds
    fractions = np.bincount(names, minlength=len(rules)) / len(seen)
    largest = sorted(zip(-fractions, rules, strict=True), key=lambda one: one[0])
    return [name for fraction, name in largest if -fraction >= 0.2]


def document(body: str, box: tuple[float, float, float, float]) -> str:
    """An SVG of elements within a view box."""
    x, y, width, height = (_short(value, 3) for value in box)
    links = ' xmlns:xlink="http://www.w3.org/1999/xlink"' if "xlink:" in body else ""
    size = f'width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg"{links} {size} viewBox="{x} {y} {width} {height}">{body}</svg>'


def crop(svg: str) -> str:
    """Sets a tight view box.

    Raises:
        ValueError: if nothing is visible.
    """
    seen = render(svg, MEASURED)[..., 3] > VISIBLE  # [H, W]
    if not seen.any():
        raise ValueError("nothing is visible")
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    x, y, width, height = view_box(svg)
    unit = max(width, height) / MEASURED
    left, top = columns[0] * unit, rows[0] * unit
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return document(body, (x + left, y + top, (columns[-1] + 1) * unit - left, (rows[-1] + 1) * unit - top))


def shorten(svg: str) -> str:
    """Crops an SVG from `document`, and removes decimals as long as it looks the same.

    Raises:
        ValueError: if nothing is visible.
    """
    svg = _short_ids(crop(svg))
    reference = _premultiplied(render(svg, COMPARED))
    # About a hundredth of the box; small details need more.
    first = 1 - math.floor(math.log10(max(view_box(svg)[2:]) / 4))
    for decimals in range(first, first + 5):
        shorter = round_numbers(svg, decimals)
        if len(shorter) < len(svg) and _same(reference, _premultiplied(render(shorter, COMPARED))):
            return shorter
    return svg


def round_numbers(svg: str, decimals: int) -> str:
    """Rounds the numbers of shapes, and those of matrices to five digits."""
    svg = _PATH.sub(lambda found: found[1] + _round_path(found[2], decimals) + found[3], svg)
    svg = _MATRIX.sub(lambda found: found[1] + _significant(found[2]) + found[3], svg)
    return _PLAIN.sub(lambda found: found[1] + _round_list(found[2], max(decimals, 1)) + found[3], svg)


def _round_list(text: str, decimals: int) -> str:
    if "%" in text or re.search(r"[a-df-zA-DF-Z]", text):
        return text
    return _join([_short(float(number), decimals) for number in re.findall(_NUMBER, text)])


def _significant(transform: str) -> str:
    def five(number: str) -> str:
        value = float(number)
        return _short(value, 4 - math.floor(math.log10(abs(value)))) if value else "0"

    return re.sub(r"\(([^)]*)\)", lambda found: f"({_join([*map(five, re.findall(_NUMBER, found[1]))])})", transform)


def _round_path(path: str, decimals: int) -> str:
    """Rounds a path, without accumulating the errors of relative commands."""
    parts: list[str] = []
    error = [0.0, 0.0]  # of the current point: true minus written
    start = [0.0, 0.0]
    previous = ""
    for command, text in _COMMAND.findall(path):
        numbers = [*_arguments(command, text)]
        written, error, start = _round_arguments(command, numbers, decimals, error, start)
        joint = _join(written)
        # Omit repeated commands, except m and z, which have another meaning when repeated.
        if command == previous and command not in "MmZz":
            parts.append(joint if joint.startswith("-") else " " + joint)
        else:
            parts.append(command + joint)
        previous = command
    return "".join(parts)


_COUNTS = {"m": 2, "l": 2, "t": 2, "h": 1, "v": 1, "c": 6, "s": 4, "q": 4, "a": 7, "z": 0}


def _arguments(command: str, text: str) -> Iterator[float]:
    """The numbers after a command; flags of arcs need no separators."""
    if command not in "Aa":
        yield from map(float, re.findall(_NUMBER, text))
        return
    place, index = 0, 0
    pattern = re.compile(r"[\s,]*(" + _NUMBER + ")")
    flag = re.compile(r"[\s,]*([01])")
    while found := (flag if index % 7 in (3, 4) else pattern).match(text, place):
        yield float(found[1])
        place, index = found.end(), index + 1


def _round_arguments(
    command: str, numbers: list[float], decimals: int, error: list[float], start: list[float]
) -> tuple[list[str], list[float], list[float]]:
    kind, relative = command.lower(), command.islower()
    if kind == "z":
        return [], list(start), start
    count, out = _COUNTS[kind], []
    for first in range(0, len(numbers), count):
        values = numbers[first : first + count]
        end = error if relative else [0.0, 0.0]
        after = list(error)
        for place, value in enumerate(values):
            axis = {"h": 0, "v": 1}.get(kind, (place - 5) % 2 if kind == "a" else place % 2)
            if kind == "a" and place < 5:
                # Radii (with one more decimal), angle, flags.
                out.append(_short(value, decimals + 1) if place < 2 else _short(value, 1))
                continue
            exact = value + end[axis]
            text = _short(exact, decimals)
            out.append(text)
            if place >= count - 2 or kind in "hv":
                after[axis] = exact - float(text)
        error = after
        if kind == "m" and first == 0:
            start = list(error)
    return out, error, start


def _short(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):.{max(decimals, 0)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    if text.startswith("0."):
        return text[1:]
    if text.startswith("-0."):
        return "-" + text[2:]
    return "0" if text == "-0" else text


def _join(numbers: list[str]) -> str:
    """Joins numbers with as few spaces as possible."""
    out = ""
    for number in numbers:
        out += number if not out or number.startswith("-") else " " + number
    return out


def _short_ids(svg: str) -> str:
    """Renames ids to i0, i1 …, and drops unused ones."""
    names = list(dict.fromkeys(_IDS.findall(svg)))
    used = [name for name in names if f"#{name})" in svg or f'"#{name}"' in svg or f"#{name}'" in svg]
    for name in names:
        if name not in used:
            svg = svg.replace(f' id="{name}"', "")
    for number, name in enumerate(used):
        new = f"i{number}"
        svg = svg.replace(f'id="{name}"', f'id="{new}"')
        for before, after in (("(#", ")"), ('"#', '"'), ("'#", "'")):
            svg = svg.replace(f"{before}{name}{after}", f"{before}{new}{after}")
    return svg


def _premultiplied(image: np.ndarray) -> np.ndarray:
    values = image.astype(np.float32)
    values[..., :3] *= values[..., 3:] / 255
    return values


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape:
        return False
    difference = np.abs(first - second).mean(-1)  # [H, W]
    height, width = (side // 8 * 8 for side in difference.shape)
    squares = difference[:height, :width].reshape(height // 8, 8, width // 8, 8).mean((1, 3))
    return bool(difference.mean() < MEAN and (not squares.size or squares.max() < LOCAL))
