"""From a YAML file and `--set a.b=value` to a config and back.

An unknown key is refused with its dotted path and the nearest valid one, a wrong value with the reason and the way out.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.config.reading import from_text, read_yaml, section_of, typed
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
    """Reads a YAML file, applies `a.b=value` overrides, and validates the whole. See `ldm.config.reading`. Raises
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
