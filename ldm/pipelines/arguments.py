"""What a user wrote, brought to one text and one seed an image."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from numbers import Integral


def image_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, num_images_per_prompt: int
) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt an image."""
    if prompt is None:
        raise ValueError('prompt is None; give a text ("" for none)')
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("the prompt list is empty; give at least one text")
    check_whole("num_images_per_prompt", num_images_per_prompt)
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
    negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one a prompt"
        )
    for text in [*prompts, *negatives]:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is {text!r}; prompts are texts")
    repeat = range(num_images_per_prompt)
    return [p for p in prompts for _ in repeat], [n for n in negatives for _ in repeat]


def image_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """One seed an image: seed + i from one number, fresh ones from None."""
    if seed is None:
        seed = secrets.randbelow(2**31 - images)
    given = list(seed) if isinstance(seed, Iterable) else [seed]
    for s in given:
        if isinstance(s, bool) or not isinstance(s, Integral) or not 0 <= s < 2**63:
            raise ValueError(f"seed is {s!r}; it must be a whole number from 0 to 2**63 - 1")
    if not isinstance(seed, Iterable):
        return [int(seed) + i for i in range(images)]
    if len(given) != images:
        raise ValueError(f"there are {len(given)} seeds for {images} images; give one int, or one an image")
    return [int(s) for s in given]


def check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
