"""Samples that are not finite end in an error that names the step, not in a black image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion import Denoise, State

_USUAL_SCALE = 30  # of guidance; what is above is the likely cause
_MAX_NAMED = 5
# Elsewhere the CPU would wait for the device at every step.
CHECKED_AT_ONCE = ("cpu",)


class NotFinite(ValueError):
    """A sample, its text states or its image hold nan or inf."""


class _CheckedStep(NamedTuple):
    """A step, and which of the images were finite after it: [B] bool, on their device."""

    number: int
    timestep: int
    is_finite: Tensor


class FiniteCheck:
    """Checks what a sampler computes for a batch of images, at every step; on an accelerator at the end.

    An `on_step` sees finite states alone. The guidance scale and the number of the first image are for the error.
    """

    def __init__(self, guidance_scale: float = 1.0, first: int = 0) -> None:
        self._scale, self._first = guidance_scale, first
        self._predictions: list[Tensor] = []  # [B] bool each, since the last step
        self._seen: list[_CheckedStep] = []

    def wrap(self, denoise: Denoise) -> Denoise:
        """The same function, its predictions checked: where pixels bound x̂_0, states do not show an infinite one."""

        def watched(x_t: Tensor, t: int) -> Tensor:
            prediction = denoise(x_t, t)
            self._predictions = [torch.stack([*self._predictions, is_finite(prediction)]).all(dim=0)]
            return prediction

        return watched

    def final_latents(self, states: Iterable[State], on_step: Callable[[State], None] | None = None) -> Tensor:
        """The latents [B, C, h, w] of the last state; `NotFinite` names images and the first step."""
        latents = None
        for state in states:
            latents = state.latents
            sound = [is_finite(latents), is_finite(state.pred_original_sample), *self._predictions]
            self._predictions = []
            self._seen.append(_CheckedStep(state.index + 1, state.timestep, torch.stack(sound).all(dim=0)))
            if on_step is not None or latents.device.type in CHECKED_AT_ONCE:
                self._check(latents.dtype)
            if on_step is not None:
                on_step(state)
        assert latents is not None
        self._check(latents.dtype)
        return latents

    def _check(self, dtype: torch.dtype) -> None:
        if not self._seen:
            return
        for step, sound in zip(self._seen, torch.stack([step.is_finite for step in self._seen]).tolist(), strict=True):
            if not all(sound):
                raise NotFinite(
                    f"{image_names(sound, self._first)} left the finite numbers (nan or inf) at step {step.number}, "
                    f"timestep {step.timestep}; {remedy(dtype, self._scale)}"
                )
        self._seen = []


def is_finite(values: Tensor) -> Tensor:
    """Which of the entries of [B, ...] are finite in all of their numbers: [B] bool."""
    return values.isfinite().flatten(1).all(dim=1)


def image_names(sound: Sequence[bool], first: int) -> str:
    """ "image 3", "images 0, 1, …": those that are not finite, counted from `first`."""
    wrong = [str(first + place) for place, good in enumerate(sound) if not good]
    more = ", …" if len(wrong) > _MAX_NAMED else ""
    return f"image{'s' if len(wrong) > 1 else ''} {', '.join(wrong[:_MAX_NAMED])}{more}"


def remedy(dtype: torch.dtype, guidance_scale: float = 1.0) -> str:
    """What the likely cause is, and what to do."""
    likely = []
    if dtype == torch.float16:
        likely.append("float16 ends at 65504: open the model in bfloat16 or float32")
    if abs(guidance_scale) > _USUAL_SCALE:
        likely.append(f"guidance_scale is {guidance_scale:g}: lower it")
    return ", or ".join(likely) or (
        "its numbers are too large for this model: lower guidance_scale and the weights of LoRAs, or train or download "
        "the model again"
    )
