"""What a user wrote, brought to one text and one seed an image."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Sequence
from typing import Any


def image_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, num_images_per_prompt: int
) -> tuple[list[str], list[str]]:
    """The prompts and one negative prompt for each; image i is of prompt i // num_images_per_prompt."""
    prompts = [prompt] if isinstance(prompt, str) else as_list("prompt", prompt, "a text, or a list of texts")
    if not prompts:
        raise ValueError("the prompt list is empty; give at least one text")
    if as_int("num_images_per_prompt", num_images_per_prompt) < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
    if negative is None or isinstance(negative, str):
        negatives = [negative or ""] * len(prompts)
    else:
        negatives = as_list("negative_prompt", negative, "a text, or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one a prompt"
        )
    for text in prompts:
        check_text("prompt", text)
    for text in negatives:
        check_text("negative prompt", text)
    return prompts, negatives


def check_text(name: str, text: Any) -> None:
    """`ValueError` unless it is a text that a tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"a {name} is {text!r}; prompts are texts")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f"a {name} has half of a surrogate pair at place {error.start} ({around}), which is no text; write it in "
            "UTF-8"
        ) from None


def image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """One seed an image: seed + i from one number, fresh ones from None."""
    if seed is None:
        seed = secrets.randbelow(2**31 - images)
    # A list, or an array of numpy or torch.
    several: Any = seed if isinstance(seed, Sequence) or getattr(seed, "ndim", None) else None
    if several is not None:
        seeds = [as_int("seed", s) for s in several]
    else:
        seeds = [as_int("seed", seed) + i for i in range(images)]
    if len(seeds) != images:
        raise ValueError(f"there are {len(seeds)} seeds for {images} images; give one int, or one an image")
    for s in seeds:
        if not 0 <= s < 2**63:
            raise ValueError(f"seed is {s}; it must be a whole number from 0 to 2**63 - 1")
    return seeds


def check_steps(steps: int | None) -> None:
    """`ValueError` for a number of steps that no model can take; what is above T depends on the model."""
    if steps is not None and steps < 1:
        raise ValueError(f"num_inference_steps is {steps}; it must be at least 1")


def check_size(height: int | None, width: int | None) -> None:
    """`ValueError` for a side that no picture has."""
    for name, side in (("height", height), ("width", width)):
        if side is not None and side < 1:
            raise ValueError(f"{name} is {side}; it is a number of pixels, at least 1")


def as_list(name: str, values: Iterable[Any], wanted: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}; give {wanted}") from None


def as_int(name: str, value: Any) -> int:
    """The value as an int, of whatever package; no float, and no truth value."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}; it must be a whole number")


def as_float(name: str, value: Any) -> float:
    """The value as a float, of whatever package; no text, and no truth value."""
    try:
        if not isinstance(value, bool | str):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}; it must be a number")
