"""What a file is that is not read, by how it begins, whatever its name says."""

from __future__ import annotations

import re

_BEGINNINGS = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "a HEIC picture"),
        (rb"....ftypavi[fs]", "an AVIF picture"),
        (rb"....ftypqt|....moov", "a QuickTime video"),
        (rb"....ftyp", "an MP4 video"),
        (rb"\x1aE\xdf\xa3", "a Matroska or WebM video"),
        (rb"RIFF....AVI ", "an AVI video"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
        (rb"8BPS", "a Photoshop document"),
        (rb"gimp xcf", "a GIMP document"),
        (rb"%PDF", "a PDF document"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript document"),
        (rb"\x76\x2f\x31\x01", "an OpenEXR picture"),
        (rb"#\?RADIANCE", "a Radiance picture"),
        (rb"DDS ", "a DDS texture"),
        (rb"qoif", "a QOI picture"),
        (rb"P[1-7]\s", "a PNM picture"),
        (rb"\0\0\x01\0", "a Windows icon"),
        (rb"PK\x03\x04", "a zip archive"),
        (rb"\x1f\x8b", "a gzip archive"),
        (rb"version https://git-lfs", "a pointer of git-LFS"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
        (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "a web page"),
    )
)
_WAYS = {
    "video": "save frames of it as PNG or JPEG",
    "archive": "unpack it",
    "page": "download the picture itself",
    "git-LFS": "run: git lfs pull",
}


def file_type(data: bytes) -> str | None:
    """What the bytes are and what to do, as in "a HEIC picture, which is not read; convert it to PNG or JPEG"; None for
    what is not known.
    """
    for beginning, kind in _BEGINNINGS:
        if beginning.match(data[:1024]):
            return f"{kind}, which is not read; {_WAYS.get(kind.split()[-1], 'convert it to PNG or JPEG')}"
    return None
