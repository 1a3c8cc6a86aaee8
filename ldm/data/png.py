"""PNG files without the texts in them: Pillow refuses a sound picture whose texts are long."""

from __future__ import annotations

import zlib

from PIL.PngImagePlugin import MAX_TEXT_CHUNK

# The texts that say how a picture is turned, where nothing else does.
_UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")
# Profiles of printers have a few MiB, more than Pillow takes of a PNG.
_MAX_PROFILE = 2**24


def strip_text_chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG → (it without its texts, its color profile if that is too large for Pillow); other files stay as they are.

    A profile of more than 16 MiB is cut off, and so damaged.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data, None
    view, kept, profile = memoryview(data), [], None
    start, copied = 8, 0
    while start + 12 <= len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        content = view[start + 8 : end - 4]
        dropped = kind in (b"tEXt", b"zTXt", b"iTXt") and not _says_upright(content)
        if kind == b"iCCP" and len(_unpacked(content, MAX_TEXT_CHUNK)) > MAX_TEXT_CHUNK:
            profile, dropped = _unpacked(content, _MAX_PROFILE), True
        if dropped:
            kept.append(view[copied:start])
            copied = end
        start = end
    return b"".join([*kept, view[copied:]]) if kept else data, profile


def _says_upright(content: memoryview) -> bool:
    name = bytes(content[:80]).split(b"\0")[0]
    return name in _UPRIGHT and len(_unpacked(content, MAX_TEXT_CHUNK)) <= MAX_TEXT_CHUNK


def _unpacked(content: memoryview, most: int) -> bytes:
    """What is compressed in a chunk, at most a byte more than `most`; nothing if nothing is."""
    _, _, rest = bytes(content).partition(b"\0")
    # iCCP and zTXt: a byte, and the data. iTXt: two bytes, language, NUL, translated name, NUL, and the data.
    for packed in (rest[1:], rest[2:].partition(b"\0")[2].partition(b"\0")[2]):
        try:
            return zlib.decompressobj().decompress(packed, most + 1)
        except zlib.error:
            continue
    return b""
