"""What a user wrote, brought to one text and one seed an image."""

from __future__ import annotations

import secrets
from collections.abc import Sequence


def image_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, num_images_per_prompt: int
) -> tuple[list[str], list[str]]:
    """One prompt and one negative prompt an image."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("the prompt list is empty; give at least one text")
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
    if seed is None:
        seed = secrets.randbelow(2**31 - images)
    seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
    if len(seeds) != images:
        raise ValueError(f"there are {len(seeds)} seeds for {images} images; give one int, or one an image")
    for s in seeds:
        if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63:
            raise ValueError(f"seed is {s!r}; it must be a whole number from 0 to 2**63 - 1")
    return seeds
