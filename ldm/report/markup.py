"""Text and JSON of unknown origin as markup: captions, file names, prompts, configs.

Everything here yields well-formed XML that is HTML as well, so that one parser can check a whole page.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST = 300  # characters of one text in a table
LONGEST_LIST = 200  # entries of one list
MOST_ROWS = 2000  # of one document
FOLDED = 20  # a longer list is folded until it is asked for
DEEPEST = 4


def _visible(character: str) -> str:
    """A character that would break markup or reorder its surroundings, written out: U+001B → `\\x1b`."""
    if character in "\n\t":
        return character
    # Controls, directional formatting and other invisibles, lone surrogates; U+FFFE and U+FFFF are no characters.
    # A joiner (U+200C, U+200D) is of that category too, but shapes Persian words and compound emoji.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"
    if not hidden and ord(character) & 0xFFFE != 0xFFFE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_SUSPECT = re.compile(r"[^\n\t\x20-\x7e]")


def escaped(text: object) -> str:
    """`str(text)` for element content and for quoted attributes; what cannot be seen is written out, not dropped."""
    return html.escape(_SUSPECT.sub(lambda match: _visible(match[0]), str(text)), quote=True)


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its start and how long it was."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def duration(seconds: float) -> str:
    """2280 → "38 min": two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def number(value: float) -> str:
    """A figure as people write it: 4 digits, thousands separated, no trailing zeros."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else cut(str(value), 20)
    return f"{value:.4g}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if it is none, in one line that names the file.
        FileNotFoundError: if there is no such file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({error or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not a JSON object")
    return content


class Document:
    """A JSON object as tables and lists, whatever its keys are.

    Long lists are shortened, and say so, so that an account of a million files still makes a page that opens.

    Args:
        name: the file that holds all of it, named where something is left out.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._left = MOST_ROWS

    def render(self, content: Mapping[str, Any], depth: int = 0) -> str:
        """The scalars of an object as one table of names and values, then each list and object below its name."""
        plain = {key: value for key, value in content.items() if not _nested(value)}
        parts = [self._table([(key, _scalar(value, key)) for key, value in plain.items()])] if plain else []
        nested = [(key, value) for key, value in content.items() if _nested(value)]
        for key, value in nested[:LONGEST_LIST]:
            if self._left <= 0:
                break
            level = min(3 + depth, 6)
            parts.append(f"<h{level} dir='auto'>{_label(key)}</h{level}>{self._below(value, depth + 1)}")
            self._left -= 1
            nested = nested[1:]
        return "".join([*parts, self._left_out(len(nested))])

    def _below(self, value: Any, depth: int) -> str:
        if depth >= DEEPEST:
            return f"<p dir='auto'>{_scalar(value)}</p>"
        if isinstance(value, Mapping):
            return self.render(value, depth)
        if value and all(isinstance(entry, Mapping) for entry in value):
            return self._records(value)
        return self._items(value)

    def _records(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Objects as the rows of one table, with a column for each key that any of them has."""
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
        taken = entries[: max(0, min(LONGEST_LIST, self._left))]
        self._left -= len(taken)
        return taken

    def _left_out(self, count: int) -> str:
        return f"<p class='note'>… and {count:,} more in {escaped(self.name)}.</p>" if count > 0 else ""


def _folded(content: str, shown: int, total: int) -> str:
    if total == 0:
        return "<p class='note'>none</p>"
    return f"<details><summary>{shown:,} of {total:,}</summary>{content}</details>" if shown > FOLDED else content


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list))


def _label(key: str) -> str:
    return escaped(cut(key.replace("_", " "), 60))


def _scalar(value: Any, key: str = "") -> str:
    """A value on one line; a list or object in a cell as short JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        in_words = key.endswith("seconds") and 60 <= value < 1e9
        return escaped(number(value) + (f" ({duration(value)})" if in_words else ""))
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return escaped(cut(", ".join(value)))
    if isinstance(value, str):
        return escaped(cut(value))
    try:
        return escaped(cut(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        return "(nested too deeply to show)"
