"""What a user gives: a YAML file and `--set a.b=value`, by the types of the keys."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config import (
    SCRIPTS,
    ConfigT,
    element_hints,
    list_in,
    members_of,
    number_of,
    parse_config,
    read_config,
    read_yaml,
    section_of,
    takes_text,
    typed,
)
from ldm.config.schema import LDMConfig

# Tool → dotted keys of its configs. None of them is a key of ours.
FOREIGN_KEYS = {
    "CompVis's latent-diffusion and what came of it": ("model.target", "model.base_learning_rate"),
    "kohya's sd-scripts": ("network_module", "network_dim", "model_arguments", "datasets"),
    "the scripts of diffusers and kohya": ("pretrained_model_name_or_path", "instance_data_dir", "train_data_dir"),
    "ai-toolkit": ("job",),
    "SimpleTuner": ("--model_type",),
    "OneTrainer": ("training_method",),
    "a part of a model of diffusers": ("_class_name",),
    "a model of transformers": ("model_type", "architectures"),
    "accelerate (accelerate launch --config_file takes it)": ("compute_environment",),
    "Lightning": ("trainer",),
    "Hydra": ("_target_", "defaults"),
}
NULLS = ("null", "Null", "NULL", "~")
# An element of a list, up to the comma behind it: quoted as in YAML, or text without a comma.
_ELEMENT = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,"'\s][^,]*?|)\s*(,|\Z)""", re.DOTALL)


def load_config(path: Path, overrides: Sequence[str], kind: type[ConfigT]) -> ConfigT:
    """Reads a YAML file, applies `a.b=value` overrides, and validates the whole. Raises
    ValueError in one line that names the file or the dotted key, the cause and the way out.
    """
    given, where = read_config(path), f"config {path}"
    for tool, keys in FOREIGN_KEYS.items():
        for key in keys:
            section, _, last = key.rpartition(".")
            inside = given.get(section) if section else given
            if isinstance(inside, Mapping) and last in inside:
                raise ValueError(f"{where} has {key}, a key of {tool}; start from one of the files in configs/")
    other = next(one for one in SCRIPTS if one is not kind)
    known, theirs = ({item.name for item in dataclasses.fields(one)} for one in (kind, other))
    foreign = sorted(map(str, given.keys() - known))
    if foreign and theirs.issuperset(foreign):
        missing = " and no ".join(foreign)
        raise ValueError(f"{where} is for {SCRIPTS[other]}, not for {SCRIPTS[kind]}, which has no {missing}")
    content = read_config(path, kind)
    return parse_config(with_overrides(content, overrides, kind), kind, str(path))


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str], kind: type = LDMConfig) -> dict[str, Any]:
    """A copy of a nested mapping in which each `a.b=value` is set, by the types of the keys of `kind`."""

    def type_of(key: str, section: Any) -> Any:  # None if there is no such key, or section
        kind = section and section_of(section)
        return typing.get_type_hints(kind).get(key) if kind else None

    changed = copy.deepcopy(dict(content))
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set {override!r} is not of the form key=value, such as train.max_steps=500")
        *parents, last = key.split(".")
        target, hint = changed, typing.cast(Any, kind)
        for i, parent in enumerate(parents):
            hint = type_of(parent, hint)
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict) or (hint is not None and section_of(hint) is None):
                raise ValueError(f"--set {key}: {'.'.join(parents[: i + 1])} is a value, not a section")
        hint = type_of(last, hint)
        try:  # what is no key is refused with all others
            target[last] = value if hint is None else from_text(value, hint, key)
        except ValueError as error:
            raise ValueError(f"--set {error}") from None
    return changed


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
            one = dataclasses.fields(section)[0].name
            raise ValueError(f"{path} is {text!r}, and it is a section; set one of its keys, {path}.{one}=…")
        return typed(_read_value(bare, path), hint, path)
    if listed is not None and bare.startswith("["):
        # "[a, 'b, c']" → the elements, quotes and all
        if not bare.endswith("]") or len(bare) < 2:
            raise ValueError(f"{path} is {text!r}, a list without its closing bracket; write [a, b]")
        inside, items, at = bare[1:-1].strip(), [], 0
        while at < len(inside):
            element = _ELEMENT.match(inside, at)
            if element is None:
                why = "in which a quote is not closed, or not at the end of its element"
                raise ValueError(f"{path} is {text!r}, {why}")
            if not element[1] or element[1][0] == "[":
                what = "has an empty element" if not element[1] else "has a list in it"
                raise ValueError(f'{path} is {text!r}, which {what}; put texts in quotes, such as ["", "[a]"]')
            items.append(element[1])
            at = element.end()
        hints = element_hints(listed, len(items))
        found = []
        for i, item in enumerate(items):
            types_of, key = members_of(hints[i]), f"{path}.{i}"
            inside = str(_read_value(item, key)) if item[0] in "\"'" else item
            found.append(inside if takes_text(types_of) else number_of(inside, types_of, key))
        return found
    return number_of(bare, members, path)


def _read_value(text: str, path: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is {text!r}, which is no value in YAML ({error})") from None
