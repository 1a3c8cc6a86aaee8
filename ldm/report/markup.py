"""Text and JSON of unknown origin (captions, file names, prompts, configs) as XHTML."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ldm.progress import format_duration

MAX_CHARACTERS = 300  # of one text in a table
MAX_LIST = 200  # entries of one list
MAX_ROWS = 2000  # of one document
MAX_UNFOLDED = 20  # longer lists are folded
MAX_DEPTH = 4
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


class Document:
    """Any JSON object as tables and lists; long ones are shortened, and say in which file (`name`) all of it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._left = MAX_ROWS

    def render(self, content: Mapping[str, Any]) -> Markup:
        """One table of the scalars, then each list and object below its name."""
        return Markup(self._object(content, 0))

    def _object(self, content: Mapping[str, Any], depth: int) -> str:
        plain = {key: value for key, value in content.items() if not _nested(value)}
        parts = [self._table([(key, _scalar(value, key)) for key, value in plain.items()])] if plain else []
        nested = [(key, value) for key, value in content.items() if _nested(value)]
        for key, value in nested[:MAX_LIST]:
            if self._left <= 0:
                break
            level = min(3 + depth, 6)
            parts.append(f"<h{level} dir='auto'>{_label(key)}</h{level}>{self._below(value, depth + 1)}")
            self._left -= 1
            nested = nested[1:]
        return "".join([*parts, self._left_out(len(nested))])

    def _below(self, value: Any, depth: int) -> str:
        if depth >= MAX_DEPTH:
            return f"<p dir='auto'>{_scalar(value)}</p>"
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if value and all(isinstance(entry, Mapping) for entry in value):
            return self._records(value)
        return self._items(value)

    def _records(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Objects as rows of one table, with a column for each key."""
        shown = self._take(records)
        keys = list(dict.fromkeys(key for record in shown for key in record))[:8]
        head = "".join(f"<th>{_label(key)}</th>" for key in keys)
        rows = "".join(
            "<tr>" + "".join(f"<td dir='auto'>{_scalar(record.get(key, ''), key)}</td>" for key in keys) + "</tr>"
            for record in shown
        )
        table = f"<div class='wide'><table><tr>{head}</tr>{rows}</table></div>" if shown else ""
        return _folded(table, len(shown), len(records)) + self._left_out(len(records) - len(shown))

    def _items(self, items: Sequence[Any]) -> str:
        shown = self._take(items)
        entries = "".join(f"<li dir='auto'>{_scalar(item)}</li>" for item in shown)
        return _folded(f"<ul>{entries}</ul>" if shown else "", len(shown), len(items)) + self._left_out(
            len(items) - len(shown)
        )

    def _table(self, rows: Sequence[tuple[str, str]]) -> str:
        shown = self._take(rows)
        body = "".join(f"<tr><th>{_label(key)}</th><td dir='auto'>{value}</td></tr>" for key, value in shown)
        return (f"<table>{body}</table>" if shown else "") + self._left_out(len(rows) - len(shown))

    def _take(self, entries: Sequence[Any]) -> Sequence[Any]:
        taken = entries[: max(0, min(MAX_LIST, self._left))]
        self._left -= len(taken)
        return taken

    def _left_out(self, count: int) -> str:
        return f"<p class='note'>… and {count:,} more in {escaped(self.name)}.</p>" if count > 0 else ""


def _folded(content: str, shown: int, total: int) -> str:
    if total == 0:
        return "<p class='note'>none</p>"
    return f"<details><summary>{shown:,} of {total:,}</summary>{content}</details>" if shown > MAX_UNFOLDED else content


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def _label(key: str) -> str:
    return escaped(shortened(key.replace("_", " "), 60))


def _scalar(value: Any, key: str = "") -> str:
    """A value on one line; a list or object in a cell as short JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        in_words = key.endswith("seconds") and 60 <= value < 1e9
        return escaped(format_number(value) + (f" ({format_duration(value)})" if in_words else ""))
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return escaped(shortened(", ".join(value)))
    if isinstance(value, str):
        return escaped(shortened(value))
    try:
        return escaped(shortened(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        return "(nested too deeply to show)"
