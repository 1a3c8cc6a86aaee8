"""From a YAML file and `--set a.b=value` to a config and back.

An unknown key is refused with its dotted path and the nearest valid one, a wrong value with the reason and the way out.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.config.schema import AutoencoderTrainingConfig, LDMConfig

DERIVED = {
    "unet": {
        "in_channels": "the codec",
        "out_channels": "the codec, and from train.loss.weighting",
        "sample_size": "data.resolution and the codec",
        "cross_attention_dim": "the text encoder",
    },
    "autoencoder": {
        "sample_size": "data.resolution",
        "scaling_factor": "the statistics of the latents, which training folds into quant_conv",
        "shift_factor": "the statistics of the latents, which training folds into quant_conv",
    },
    "vq": {
        "sample_size": "data.resolution",
        "scaling_factor": "the statistics of the latents, which training measures",
        "latents_mean": "the statistics of the latents, which training measures",
        "latents_std": "the statistics of the latents, which training measures",
    },
}


# What a model that training starts from brings with it.
FROM_START = {"space", "first_stage", "unet", "text", "schedule"}


C = TypeVar("C", LDMConfig, AutoencoderTrainingConfig)


def load_config(path: Path, overrides: Sequence[str], kind: type[C]) -> C:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML too), and validates the whole.

    Raises:
        ValueError: in one line that names the file or the dotted key, the cause and the way out.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} cannot be read ({error}); name an existing YAML file with --config") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path} holds no keys; start from one of the files in configs/")
    return parse_config(with_overrides(content, overrides), kind, str(path))


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested mapping in which each `a.b=value` is set."""
    changed = copy.deepcopy(dict(content))
    for override in overrides:
        _apply(changed, override)
    return changed


def parse_config(content: Mapping[str, Any], kind: type[C], where: str) -> C:
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
        return TypeAdapter(kind).validate_python(dict(content))
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error, kind)}") from None


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override!r} is not of the form key=value, such as train.max_steps=500")
    *parents, last = key.strip().split(".")
    target = content
    for i, parent in enumerate(parents):
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(f"--set {key}: {'.'.join(parents[: i + 1])} is a value, not a section")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: {value!r} is not a valid value") from None


def _explain(error: ValidationError, kind: type) -> str:
    """The first fault as one line with its dotted path; unknown keys before all others."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "unexpected_keyword_argument")
    fault = faults[0]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "unexpected_keyword_argument":
        known = _dotted_keys(kind)
        by_name = {key.rsplit(".", 1)[-1]: key for key in known}
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        last = difflib.get_close_matches(path.rsplit(".", 1)[-1], by_name, n=1, cutoff=0.5)
        nearest = close[0] if close else by_name[last[0]] if last else None
        advice = f"did you mean {nearest}?" if nearest else f"known are {', '.join(sorted(known))}"
        return f"unknown key {path}; {advice}"
    if fault["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{path} is missing; set it in the file or with --set {path}=…"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if fault["type"] == "tuple_type":
        return f"{path} is {fault['input']!r}: write a list, [{fault['input']}]"
    return f"{path} is {fault['input']!r}: {message[0].lower()}{message[1:]}"


def _dotted_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        keys.append(prefix + item.name)
        for part in (hints[item.name], *typing.get_args(hints[item.name])):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                keys += _dotted_keys(part, f"{prefix}{item.name}.")
    return keys


def to_yaml(config: LDMConfig | AutoencoderTrainingConfig) -> str:
    """The complete config, every default spelled out, in a form that `load_config` reads back."""
    content = TypeAdapter(type(config)).dump_python(config, mode="json")
    if isinstance(config, LDMConfig):
        for key in FROM_START if config.start_from is not None else {"start_from", "finetune"}:
            del content[key]
    for section, derived in DERIVED.items():
        for key in derived.keys() & (content.get(section) or {}):
            del content[section][key]
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text
