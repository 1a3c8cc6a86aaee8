"""What the configs of all networks share: reading, checking and writing the `config.json` of diffusers."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config", bound="ComponentConfig")
# What libraries note beside the keys of a network: of the file, and of a moving average of weights (`unet_ema/`).
_NOTES = {"torch_dtype", "dtype", "architectures", "transformers_version", "diffusers_version", "library_name"}
_NOTES |= {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
_NOTES_IF_NULL = {"quantization_config"}
_MAX_LAYERS = 100  # more would be built for minutes before the weights are seen not to fit
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ComponentConfig:
    """Base of the frozen dataclasses from which networks are built; a field is a config key of diffusers.

    A subclass names the class of diffusers that it describes and, in `neutral_values`, every key of that
    class that it does not support, with the values at which such a key changes nothing.
    """

    diffusers_class: ClassVar[str]
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]]

    @classmethod
    def from_dict(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """Builds the config from the content of a diffusers `config.json`.

        Keys that begin with `_`, and others that say nothing of the network (`_NOTES`), are skipped; missing keys get
        diffusers' defaults; lists become tuples. ValueError for an unknown key, a value that a field cannot have, and a
        key that is not supported unless its value is neutral.
        """
        valid = {field.name for field in fields(cls)}
        hints = get_type_hints(cls)
        supported = {}
        for key, value in config.items():
            if key.startswith("_") or key in _NOTES or (key in _NOTES_IF_NULL and value is None):
                continue
            if key in valid:
                supported[key] = _tuples(value)
                _check_type(key, supported[key], hints[key])
            elif key in cls.neutral_values:
                neutral = cls.neutral_values[key]  # True == 1 in Python, but not in a config; JSON may write 1.0 as 1
                if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
                    accepted = " or ".join(map(repr, neutral))
                    refuse(key, value, f"this option of diffusers is not supported and must be {accepted}")
            elif key in _NOTES_IF_NULL:
                refuse(key, value, "weights must be stored as they are used; take the model in full or half precision")
            else:
                nearest = difflib.get_close_matches(key, sorted(valid | cls.neutral_values.keys()), n=1)
                hint = f"the nearest key of {cls.diffusers_class} is {nearest[0]!r}" if nearest else "leave it out"
                raise ValueError(f"unknown key {key!r}, which {cls.diffusers_class} does not have; {hint}")
        return cls(**supported)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values under diffusers' names, from which diffusers builds the same network."""
        values = {field.name: _lists(getattr(self, field.name)) for field in fields(self)}
        return {"_class_name": self.diffusers_class, **values}

    def check_numbers(self) -> None:
        """Raises `ValueError` for the first field with a number that is not finite or larger than any network has."""
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):  # Python reads NaN and 1e999 from JSON
                    refuse(field.name, value, "must be finite")
                most = _MAX_LAYERS if field.name.endswith("layers_per_block") else _MAX_INT
                if isinstance(number, int) and number > most:
                    refuse(field.name, value, f"must be at most {most}")

    def check_positive(self, *keys: str) -> None:
        """Raises `ValueError` for the first of these fields with a number not above zero or infinite."""
        for key in keys:
            value = getattr(self, key)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(0 < number < float("inf") for number in numbers):
                refuse(key, value, "must be above zero and finite")

    def check_names(self, key: str, valid: Iterable[str]) -> None:
        """Raises `ValueError` for the first name in a tuple of names that is not among the valid ones."""
        for name in getattr(self, key):
            if name not in valid:
                refuse(key, getattr(self, key), f"{name!r} is not supported; choose from {', '.join(valid)}")


def refuse(key: str, value: Any, reason: str) -> NoReturn:
    """Raises the `ValueError` of all configs: the key, its value, and what is wrong with it."""
    raise ValueError(f"{key} = {_lists(value)!r}: {reason}")


def _check_type(key: str, value: Any, hint: Any) -> None:
    import pydantic  # late: who builds a network without a file needs torch alone

    try:
        _adapter(hint).validate_python(value)
    except pydantic.ValidationError:
        refuse(key, value, f"must be {_readable(hint)}")


@cache
def _adapter(hint: Any) -> Any:
    """Of an annotation, strict: a bool is no number, and an int may stand for a float."""
    import pydantic

    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _readable(hint: Any) -> str:
    """An annotation in words: `int | tuple[int, ...]` → "int or list of int"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_readable(choice) for choice in args)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin is tuple:
        return f"list of {_readable(args[0])}" if args[-1] is Ellipsis else f"list of {len(args)} {_readable(args[0])}"
    return "null" if hint is types.NoneType else str(hint.__name__)
