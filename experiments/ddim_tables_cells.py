"""What experiments/ddim_tables.py computes: pictures of a model, kept piece by piece, and what is measured on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.small_models import SCHEDULE, Data, Patched
from ldm import hub
from ldm.data import generator, to_signed, to_uint8
from ldm.diffusion import Denoise, NoiseSchedule, PredictionType, ddim, ddim_inversion, to_epsilon_model, with_condition
from ldm.diffusion.samplers import identity
from ldm.pipelines.sampling import sample_noise

PIECE = 64  # pictures that are drawn at once and kept as one file
# The columns of DDIM, Table 1: η and the variance of the noise.
VARIANTS: dict[str, tuple[float, Literal["ddim", "sigma_hat"]]] = {
    "0": (0.0, "ddim"),
    "0.2": (0.2, "ddim"),
    "0.5": (0.5, "ddim"),
    "1": (1.0, "ddim"),
    "sigma_hat": (1.0, "sigma_hat"),
}
Grid = Literal["leading", "trailing"]
# DDIM's τ_i = ⌊c i⌋ as published in code starts at timestep 0, so that the last step removes next to no noise;
# "trailing" starts at T − 1 and ends with a step of full length. With S = T they are one grid.
GRIDS: tuple[Grid, ...] = ("leading", "trailing")


@dataclass(frozen=True)
class Model:
    """A trained network with all that draws pictures with it."""

    data: Data
    unet: Patched
    prediction_type: PredictionType
    folder: Path
    device: torch.device

    def denoise(self, captions: Sequence[str]) -> Denoise:
        """What predicts ε for these captions, at guidance 1."""
        denoise = with_condition(self.unet, self.data.condition(captions).to(self.device))
        if self.prediction_type == "epsilon":
            return denoise
        return to_epsilon_model(denoise, NoiseSchedule.from_config(SCHEDULE), self.prediction_type)


def start_of(model: Model, seed: int, places: Sequence[int]) -> tuple[list[torch.Generator], Tensor]:
    """A generator for each picture, and its x_T [B, C, H, W]: the same for every S, column and model."""
    seeds = [int(generator(seed, "x_T", place).integers(2**62)) for place in places]
    generators = [torch.Generator("cpu").manual_seed(value) for value in seeds]
    blank = torch.empty(len(places), *model.data.images.shape[1:], device=model.device)
    return generators, sample_noise(generators, blank)


@torch.inference_mode()
def draw_piece(model: Model, grid: Grid, steps: int, variant: str, seed: int, places: Sequence[int]) -> Tensor:
    """Pictures [B, C, H, W] uint8, captions drawn as in the data."""
    schedule, codec = NoiseSchedule.from_config(SCHEDULE), model.data.codec().to(model.device)
    generators, latents = start_of(model, seed, places)
    _, captions = model.data.draw_captions(seed, places)
    eta, variance = VARIANTS[variant]
    *_, last = ddim(
        model.denoise(captions),
        latents,
        schedule,
        schedule.grid(steps, grid),
        eta=eta,
        variance=variance,
        noise=lambda: sample_noise(generators, latents),
        clip_x0=codec.clip_x0,
    )
    return to_uint8(codec.decode(last.latents))


def pictures(model: Model, grid: Grid, steps: int, variant: str, seed: int, count: int) -> tuple[Tensor, float]:
    """`count` pictures of a cell and the seconds they took, from the folder or drawn now."""
    pieces, seconds = [], 0.0
    kind = "full" if steps == SCHEDULE.num_train_timesteps else grid
    folder = model.folder / "pictures" / f"{kind}-{steps:04d}-{variant}"
    for first in range(0, count, PIECE):
        places = range(first, min(first + PIECE, count))
        path = folder / f"{seed}-{places.start}-{places.stop}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            drawn = draw_piece(model, grid, steps, variant, seed, places)
            took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            folder.mkdir(parents=True, exist_ok=True)
            hub.save_tensors(path, {"pictures": drawn, "seconds": took})
        kept = hub.load_tensors(path)
        pieces.append(kept["pictures"])
        seconds += float(kept["seconds"])
    return torch.cat(pieces), seconds


@torch.inference_mode()
def reconstruction_errors(model: Model, steps: int, count: int) -> list[float]:
    """Mean square error of held-out images, pixels in [0, 1], after DDIM forwards and back with `steps`; DDIM, Table 2.

    Without bounds on x̂_0 in either direction, as the two are then the same ODE; with the first caption of each image.
    """
    path = model.folder / "inversion" / f"{steps:04d}-{count}.json"
    if path.is_file():
        return list(hub.read_json(path)["errors"])
    schedule, codec = NoiseSchedule.from_config(SCHEDULE), model.data.codec().to(model.device)
    errors: list[float] = []
    for first in range(0, count, PIECE):
        images = model.data.held_out[first : min(first + PIECE, count)].to(model.device)
        captions = model.data.captions[model.data.training + first :][: len(images)]
        denoise, grid = model.denoise([each[0] for each in captions]), schedule.grid(steps, GRIDS[0])
        *_, end = ddim_inversion(denoise, codec.sample_latents(images), schedule, grid)
        *_, back = ddim(denoise, end.latents, schedule, grid, clip_x0=identity)
        difference = (codec.decode(back.latents) - images) / 2
        errors += difference.square().flatten(1).mean(dim=1).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    hub.write_json(path, {"errors": errors})
    return errors


def consistency(short: Tensor, long: Tensor, kinds: Sequence[Any]) -> dict[str, float]:
    """How much pictures [B, …] uint8 of S steps are like those of the same x_T with 1000, and with other x_T.

    The other x_T of a picture is that of the next one of its kind, so that the two do not differ by caption.

    Returns:
        mean square difference in [0, 1] and correlation over pixels, `same` and `other`; `found`: the share of pictures
        whose nearest among all of 1000 steps is the one of their own x_T.
    """
    a, b = (to_signed(each).double().flatten(1) / 2 + 0.5 for each in (short, long))  # [B, D]
    ordered = sorted(range(len(kinds)), key=lambda place: (kinds[place], place))
    other = torch.empty(len(kinds), dtype=torch.int64)
    other[ordered] = torch.tensor(ordered[1:] + ordered[:1])
    nearest = torch.cdist(a, b).argmin(dim=1)
    return {
        "mse_same": float((a - b).square().mean()),
        "mse_other": float((a - b[other]).square().mean()),
        "correlation_same": _correlation(a, b),
        "correlation_other": _correlation(a, b[other]),
        "found": float((nearest == torch.arange(len(a))).double().mean()),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over the pixels of each pair, averaged over the pairs; a picture of one tone has 0."""
    a, b = (each - each.mean(dim=1, keepdim=True) for each in (a, b))
    return float(torch.cosine_similarity(a, b, dim=1).mean())
