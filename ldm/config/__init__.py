"""Training configs: validated, frozen objects, their YAML. `ldm.config.overrides` reads what a user gives.

An unknown key is refused with its dotted path and the nearest valid one, a wrong value with the reason and the way out.
YAML 1.1 takes `no` for false, `1e-4` for a text, `010` for 8 and `12:30` for 750. Here a plain scalar is text, and the
type of its key says what it means: a text as it stands, or a number.
"""

from __future__ import annotations

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

from ldm.config.schema import (
    AutoencoderLossConfig,
    AutoencoderTrainingConfig,
    DiffusionTrainConfig,
    FinetuneConfig,
    LDMConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
    check_autoencoder,
    check_objective,
    section_name,
)

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
FROM_START = {"space", "first_stage", "unet", "text", "schedule"}  # what that model brings with it
SCRIPTS: dict[type, str] = {LDMConfig: "train/train_ldm.py", AutoencoderTrainingConfig: "train/train_autoencoder.py"}
NEAR = 0.7  # of difflib: max_step and max_steps have 0.94, model and method 0.55

# What is shown of a wrong value: aliases of YAML can make it larger than memory.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 4, 4

ConfigT = TypeVar("ConfigT", LDMConfig, AutoencoderTrainingConfig)


def read_config(path: Path, kind: type | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, in which everything is text, None, or a list or mapping of these; with a `kind` of
    config, its numbers are numbers. Raises ValueError as `load_config`.
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


def parse_config(content: Mapping[str, Any], kind: type[ConfigT], where: str) -> ConfigT:
    """Validates a nested mapping as a config of `kind`; `where` names its origin in errors."""
    if content.get("start_from") is not None:
        for key in sorted(FROM_START & content.keys()):
            raise ValueError(f"{where}: {key} follows from start_from, the model that is trained; leave it out")
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


# ---- YAML, read by the types of the keys

MAX_INT = 2**63 - 1  # torch and numpy count in 64 bits
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_DOTTED = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


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
                problem = f"{key.value} stands in line {lines[key.value]} and again in line {line}; leave one out"
                raise yaml.MarkedYAMLError(problem=problem)
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
    `path` of the key and the value.
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
        return [typed(item, elements[i], f"{path}.{i}") for i, item in enumerate(value)]
    return number_of(value, members, path) if isinstance(value, str) else value


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


def number_of(text: str, members: Sequence[Any], path: str) -> Any:
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
                if not fractions:  # 1e3 is a whole number; beyond 2^53 a float says nothing of the last digit
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
