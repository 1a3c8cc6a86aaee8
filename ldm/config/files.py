"""From a YAML file and `--set a.b=value` to a config and back.

An unknown key is refused with its dotted path and the nearest valid one, a wrong value with the reason and the way out.
YAML 1.1 takes `no` for false, `1e-4` for a text, `010` for 8 and `12:30` for 750. Here a plain scalar is text, and the
type of its key says what it means: a text as it stands, or a number.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.config.schema import AutoencoderTrainingConfig, LDMConfig

_MEASURED = "the statistics of the latents, which training measures"
_FOLDED = "the statistics of the latents, which training folds into quant_conv"
# Keys that a config leaves out, and what they follow from.
DERIVED = {
    "unet": {
        "in_channels": "the codec",
        "out_channels": "the codec, and from train.loss.weighting",
        "sample_size": "data.resolution and the codec",
        "cross_attention_dim": "the text encoder",
    },
    "autoencoder": {"sample_size": "data.resolution", "scaling_factor": _FOLDED, "shift_factor": _FOLDED},
    "vq": {"sample_size": "data.resolution"}
    | dict.fromkeys(("scaling_factor", "latents_mean", "latents_std"), _MEASURED),
}
# What a model that training starts from brings with it.
FROM_START = {"space", "first_stage", "unet", "text", "schedule"}
SCRIPTS: dict[type, str] = {
    LDMConfig: "train/train_ldm.py",
    AutoencoderTrainingConfig: "train/train_autoencoder.py",
}
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

NEAR = 0.7  # of difflib: max_step and max_steps have 0.94, model and method 0.55

# What is shown of a wrong value: aliases of YAML can make it larger than memory.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 4, 4

ConfigT = TypeVar("ConfigT", LDMConfig, AutoencoderTrainingConfig)


def load_config(path: Path, overrides: Sequence[str], kind: type[ConfigT]) -> ConfigT:
    """Reads a YAML file, applies `a.b=value` overrides, and validates the whole. Raises
    ValueError in one line that names the file or the dotted key, the cause and the way out.
    """
    check_scripts(read_config(path), kind, f"config {path}")
    content = read_config(path, kind)
    return parse_config(with_overrides(content, overrides, kind), kind, str(path))


def read_config(path: Path, kind: type | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, in which everything is text, None, or a list or mapping of these. Raises ValueError
    as `load_config`.

    Args:
        kind: of config; keys of it that hold numbers have numbers then.
    """
    path = path.expanduser()
    if path.is_dir():
        inside = path / "config.yaml"
        raise ValueError(f"config {path} is a folder; name a YAML file{f', {inside}' if inside.is_file() else ''}")
    if path.suffix.lower() == ".toml":
        raise ValueError(f"config {path} is TOML, and configs are YAML; start from one of the files in configs/")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} cannot be read ({error}); name an existing YAML file with --config") from None
    except ValueError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path} holds no keys; start from one of the files in configs/")
    try:
        return content if kind is None else typing.cast(dict[str, Any], typed(content, kind, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str], kind: type = LDMConfig) -> dict[str, Any]:
    """A copy of a nested mapping in which each `a.b=value` is set, by the types of the keys of `kind`."""

    def type_of(key: str, section: Any) -> Any:  # None if there is no such key, or section
        return typing.get_type_hints(section).get(key) if (section := section and section_of(section)) else None

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


def check_scripts(content: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuses a config of another tool, and one of the other script. Raises ValueError naming the keys, and the tool or
    script.
    """
    for tool, keys in FOREIGN_KEYS.items():
        for key in keys:
            section, _, last = key.rpartition(".")
            inside = content.get(section) if section else content
            if isinstance(inside, Mapping) and last in inside:
                raise ValueError(
                    f"{where} has {key}, a key of {tool}; ldm does not read such configs: start from one of the files "
                    "in configs/, and name a model to go on from in start_from"
                )
    other = next(one for one in SCRIPTS if one is not kind)
    known, theirs = ({item.name for item in dataclasses.fields(one)} for one in (kind, other))
    foreign = sorted(map(str, content.keys() - known))
    if foreign and theirs.issuperset(foreign):
        raise ValueError(
            f"{where} is for {SCRIPTS[other]}, not for {SCRIPTS[kind]}, which has no {' and no '.join(foreign)}; run "
            "it with that script"
        )


def parse_config(content: Mapping[str, Any], kind: type[ConfigT], where: str) -> ConfigT:
    """Validates a nested mapping as a config of `kind`; `where` names its origin in errors."""
    if content.get("start_from") is not None:
        for key in sorted(FROM_START & content.keys()):
            raise ValueError(
                f"{where}: {key} follows from start_from, the model that training goes on from; leave it out"
            )
    elif "finetune" in content:
        raise ValueError(f"{where}: finetune says how to go on from a model; name that model in start_from")
    for section, derived in DERIVED.items():
        given = content.get(section)
        for key in derived.keys() & (given.keys() if isinstance(given, Mapping) else set()):
            raise ValueError(f"{where}: {section}.{key} follows from {derived[key]}; leave it out")
    try:
        return typing.cast(ConfigT, _adapter(typing.cast(Any, kind)).validate_python(dict(content)))
    except ValidationError as error:  # unknown keys before all others
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "unexpected_keyword_argument")
    fault, shown = faults[0], "null" if faults[0]["input"] is None else _short.repr(faults[0]["input"])
    path, message = ".".join(str(part) for part in fault["loc"]), fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "unexpected_keyword_argument":
        text = f"unknown key {path}; {_advice(path, kind)}"
    elif fault["type"] in ("missing", "missing_keyword_only_argument"):
        text = f"{path} is missing; set it in the file or with --set {path}=…"
    elif fault["type"] == "value_error":
        text = f"{path}: {message}" if path else message
    elif fault["type"] == "tuple_type":
        text = f"{path} is {shown}: write a list, [{fault['input'] if isinstance(fault['input'], str) else shown}]"
    elif fault["type"] == "string_type":
        text = f"{path} is {shown}, where a text is wanted; put it in quotes if it is one"
    else:
        text = f"{path} is {shown}: {message[0].lower()}{message[1:]}"
    raise ValueError(f"{where}: {text}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _advice(path: str, kind: type) -> str:
    """What to say of a key that a config does not have: the nearest one, if any is near, or all of its section."""
    for other, script in SCRIPTS.items():
        if other is not kind and path in _dotted_keys(other):
            return f"it is a key of {script}"
    section, _, last = path.rpartition(".")
    known = _dotted_keys(kind)
    beside = [key for key in known if key.rpartition(".")[0] == section]
    for keys in (beside, known):
        by_name = {key.rpartition(".")[2]: key for key in keys}
        close = difflib.get_close_matches(last, by_name, n=1, cutoff=NEAR)
        if close:
            return f"did you mean {by_name[close[0]]}?"
    return f"known {f'in {section} ' if section else ''}are {', '.join(sorted(beside))}"


def _dotted_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        if name not in {item.name for item in dataclasses.fields(kind)}:
            continue
        keys.append(prefix + name)
        section = section_of(hint)
        keys += [] if section is None else _dotted_keys(section, f"{prefix}{name}.")
    return keys


def to_yaml(config: LDMConfig | AutoencoderTrainingConfig) -> str:
    """The complete config, every default spelled out, in a form that `load_config` reads back."""
    content = _adapter(typing.cast(Any, type(config))).dump_python(config, mode="json")
    if isinstance(config, LDMConfig):
        for key in FROM_START if config.start_from is not None else {"start_from", "finetune"}:
            del content[key]
    for section, derived in DERIVED.items():
        for key in derived.keys() & (content.get(section) or {}):
            del content[section][key]
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


# ---- YAML and `--set` values, read by the types of the keys

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
