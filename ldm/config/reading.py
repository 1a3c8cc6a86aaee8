"""YAML and `--set` values, read by the types of the keys.

YAML 1.1 takes `no` for false, `1e-4` for a text, `010` for 8 and `12:30` for 750. Here a plain scalar is text, and
the type of its key says what it means: a text as it stands, or a number.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import yaml

NULLS = ("null", "Null", "NULL", "~")
# torch and numpy count in 64 bits.
MAX_INT = 2**63 - 1
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_DOTTED = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)
# An element of a list, up to the comma behind it: quoted as in YAML, or text without a comma.
_ELEMENT = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,"'\s][^,]*?|)\s*(,|\Z)""", re.DOTALL)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain scalars are text, all but null and the merge key; a key that stands twice is refused."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands in line {lines[key.value]} and again in line {line}; leave one out"
                )
            lines[key.value] = line
            if key.tag.endswith(":null"):
                key.tag = "tag:yaml.org,2002:str"
        return node


def read_yaml(text: str) -> Any:
    """Mappings, lists, None, and everything else as text. Raises ValueError with the reason, in one line."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def typed(value: Any, hint: Any, path: str) -> Any:
    """What `read_yaml` gave, with numbers where the type `hint` of the key wants numbers. Raises ValueError naming the
    key and the value.

    Args:
        path: of the key, with dots, for errors.
    """
    members = members_of(hint)
    section, listed = section_of(hint), list_in(members)
    if isinstance(value, dict) and section is not None:
        hints = typing.get_type_hints(section)
        return {
            key: typed(item, hints[key], f"{path}.{key}" if path else key) if key in hints else item
            for key, item in value.items()
        }
    if isinstance(value, list) and listed is not None:
        elements = element_hints(listed, len(value))
        return [
            typed(item, element, f"{path}.{i}") for i, (item, element) in enumerate(zip(value, elements, strict=True))
        ]
    return _number(value, members, path) if isinstance(value, str) else value


def from_text(text: str, hint: Any, path: str) -> Any:
    """The value that `--set path=text` gives a key of type `hint`. Text keys take their text as it stands. Raises
    ValueError naming the key and the value.

    A list is written `[a, b]`; an element with a comma, or with blanks at an end, stands in quotes. `null` is None for
    keys that may be. A section is written as in YAML, `{key: value}`.
    """
    members = members_of(hint)
    section, listed, bare = section_of(hint), list_in(members), text.strip()
    if types.NoneType in members:
        if text == "null" or (bare in NULLS and not takes_text(members)):
            return None
        if not bare:
            raise ValueError(f"{path} is empty; write {path}=null for none")
    if takes_text(members):
        # One of a few words may stand in quotes, as YAML needs them around "no".
        quoted = str not in members and len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "'\""
        return bare[1:-1] if quoted else text
    if section is not None:
        if not (bare.startswith("{") and bare.endswith("}")):
            raise ValueError(
                f"{path} is {text!r}, and it is a section; set one of its keys, "
                f"{path}.{dataclasses.fields(section)[0].name}=…"
            )
        return typed(_read_value(bare, path), hint, path)
    if listed is not None and bare.startswith("["):
        items = _elements(bare, path)
        hints = element_hints(listed, len(items))
        found = []
        for i, item in enumerate(items):
            element, key = members_of(hints[i]), f"{path}.{i}"
            inside = str(_read_value(item, key)) if item[0] in "\"'" else item
            found.append(inside if takes_text(element) else _number(inside, element, key))
        return found
    return _number(bare, members, path)


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types that a key may have: those of a union, or the one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def section_of(hint: Any) -> Any:
    """The dataclass that a key may hold, or None."""
    return next((one for one in members_of(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def list_in(members: Sequence[Any]) -> Any:
    """The tuple type among them, or None."""
    return next((member for member in members if typing.get_origin(member) is tuple), None)


def takes_text(members: Sequence[Any]) -> bool:
    """Whether a key of these types is text, one of a few words included."""
    return any(member is str or typing.get_origin(member) is Literal for member in members)


def element_hints(listed: Any, count: int) -> Sequence[Any]:
    """The type of each of so many elements of a tuple type; of the last, for those that are too many."""
    args = typing.get_args(listed)
    return [args[0] if args[-1] is Ellipsis else args[min(i, len(args) - 1)] for i in range(count)]


def _read_value(text: str, path: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is {text!r}, which is no value in YAML ({error})") from None


def _elements(text: str, path: str) -> list[str]:
    """ "[a, 'b, c']" → the elements, quotes and all."""
    if not text.endswith("]") or len(text) < 2:
        raise ValueError(f"{path} is {text!r}, a list without its closing bracket; write [a, b]")
    inside, items, at = text[1:-1].strip(), [], 0
    while at < len(inside):
        found = _ELEMENT.match(inside, at)
        if found is None:
            raise ValueError(f"{path} is {text!r}, in which a quote is not closed, or not at the end of its element")
        if not found[1] or found[1][0] == "[":
            what = "has an empty element" if not found[1] else "has a list in it"
            raise ValueError(f'{path} is {text!r}, which {what}; put texts in quotes, such as ["", "[a]"]')
        items.append(found[1])
        at = found.end()
    return items


def _number(text: str, members: Sequence[Any], path: str) -> Any:
    """The number that a text means, for keys that want one; other text as it is."""
    if not {int, float} & set(members):
        return text
    number: Any = None
    bare, fractions = text.strip(), float in members
    if bare.isascii() and not _LEADING_ZERO.fullmatch(bare):
        try:
            number = int(bare, 0)
            number = float(number) if fractions and abs(number) <= MAX_INT else number
        except ValueError:
            with suppress(ValueError):
                number = float(_DOTTED.sub(r"\1\2", bare))
                # 1e3 is a whole number; beyond 2^53 a float says nothing of the last digit.
                if not fractions:
                    is_whole = math.isfinite(number) and number.is_integer() and abs(number) < 2**53
                    number = int(number) if is_whole else None
    if number is None:
        wanted = "a number" if fractions else "a whole number"
        wanted += ", without leading zeros" if _LEADING_ZERO.fullmatch(bare) else ""
        wanted += ", or a list of them: [1, 2]" if list_in(members) is not None else ""
        wanted += ", or null" if types.NoneType in members else ""
        raise ValueError(f"{path} is {text!r}; it must be {wanted}")
    if isinstance(number, int) and abs(number) > MAX_INT:
        raise ValueError(f"{path} is {text}; it must be a whole number below 2**63")
    return number
