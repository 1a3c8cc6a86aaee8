"""ICC profiles made from numbers, after ICC.1:2001-04, for the tests of colors."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.9505, 1.0, 1.0890)
# Bradford, from D65 to D50, which profiles are relative to
ADAPTATION = np.array(
    [[1.0478112, 0.0228866, -0.0501270], [0.0295424, 0.9904844, -0.0170491], [-0.0092345, 0.0150436, 0.7521316]]
)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def matrix(primaries: Sequence[tuple[float, float]], white: tuple[float, float, float] = D65) -> np.ndarray:
    """Linear RGB → XYZ, float64 [3, 3]: the columns sum to the white."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, np.array(white))


def _number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_number, values))


def curve(gamma: float | None) -> bytes:
    """A curve of one gamma, or that of sRGB in 1,024 steps."""
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    coded = np.linspace(0, 1, 1024)
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + (linear * 65535).round().astype(">u2").tobytes()


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connected: bytes = b"XYZ ") -> bytes:
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(78), b"wtpt": _xyz(D50), **tags}
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0" + b"\x02\x10\0\0" + kind + space + connected
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(_number, D50)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def rgb(primaries: Sequence[tuple[float, float]], gamma: float | None) -> bytes:
    columns = (ADAPTATION @ matrix(primaries)).T
    tags = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def gray(gamma: float | None) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


def cmyk() -> bytes:
    """A press whose inks are weak: white paper, and all four inks together are L* = 20; neutral, whatever the inks."""
    table = bytearray()
    for corner in range(16):
        inks = bin(corner).count("1")
        table += bytes((round(255 * (1 - 0.8 * inks / 4)), 128, 128))  # L*, a*, b*
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + b"".join(map(_number, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut += bytes(range(256)) * 4 + bytes(table) + bytes(range(256)) * 3
    return profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, b"scnr", b"Lab ")


def converted(pixels: np.ndarray, primaries: Sequence[tuple[float, float]], gamma: float | None) -> np.ndarray:
    """uint8 [..., 3] in an RGB space → what is the same color in sRGB, clipped, float64 in 0..255."""
    coded = pixels / 255
    linear = coded**gamma if gamma else np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(matrix(SRGB)) @ matrix(primaries)).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
