"""Text and JSON of unknown origin (captions, file names, prompts, configs) as XHTML."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.progress import format_duration

MAX_CHARACTERS = 300  # of one text in a table
MAX_LIST = 200  # entries of one list
MAX_ROWS = 2000  # of one document
_SUSPICIOUS = re.compile(r"[^\n\t\x20-\x7e]")


def _visible(character: str) -> str:
    """Characters that would break markup or reorder text, as escapes: U+001B → `\\x1b`."""
    if character in "\n\t":
        return character
    # Controls, invisible formatting, lone surrogates, and the noncharacters U+FFFE and U+FFFF. The joiners U+200C and
    # U+200D are of these categories too, but Persian words and compound emoji need them.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"
    if not hidden and ord(character) & 0xFFFE != 0xFFFE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: object) -> str:
    """`str(text)` with invisible characters as escapes."""
    return _SUSPICIOUS.sub(lambda match: _visible(match[0]), str(text))


def escaped(text: object) -> str:
    """`visible` text for element content and quoted attributes."""
    return html.escape(visible(text), quote=True)


def shortened(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """The text, or its start and its length."""
    return text if len(text) <= max_characters else f"{text[:max_characters]}… ({len(text):,} characters)"


def format_number(value: float) -> str:
    """Floats with 4 digits, integers with separated thousands."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else shortened(str(value), 20)
    return f"{value:.4g}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError, or ValueError with its name for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not a JSON object")
    return content


@dataclass
class Rows:
    """How many rows of a document are left, and the file (`name`) with all of it."""

    name: str
    left: int = MAX_ROWS
    most: int = MAX_LIST

    def take(self, entries: Sequence[Any]) -> Sequence[Any]:
        """The first entries, as many as one list may have and are left."""
        taken = entries[: max(0, min(self.most, self.left))]
        self.left -= len(taken)
        return taken

    @staticmethod
    def columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
        """The first eight keys."""
        return list(dict.fromkeys(key for record in records for key in record))[:8]


def is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def label(key: str) -> str:
    """A key as a heading."""
    return shortened(key.replace("_", " "), 60)


def scalar(value: Any, key: str = "") -> str:
    """A value on one line; a list or object in a cell as short JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        in_words = key.endswith("seconds") and 60 <= value < 1e9
        return format_number(value) + (f" ({format_duration(value)})" if in_words else "")
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return shortened(", ".join(value))
    try:
        return shortened(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return "(nested too deeply to show)"
