"""The tables of DDIM and DDPM on real data: few steps and their noise, inversion, what x_T decides, what is trained.

    python -m tools.ddim_tables --only digits ablation      # --estimate says how long it takes
    python -m tools.ddim_tables --only openmoji             # much longer

(a) DDIM (arXiv:2010.02502), Table 1: the Fréchet distance for S steps and noise of η, and with σ̂.
(b) Table 2: the error of pictures that DDIM has inverted and drawn again, against S.
(c) Section 5.2, Figure 5: whether one x_T gives one picture, whatever S.
(d) DDPM (arXiv:2006.11239), Table 2: what is predicted (μ̃ or ε) and by which loss (L or L_simple).

It trains the models it needs. All that is computed is kept in --work, piece by piece, so an interrupted call goes on
where it was, and more samples or seeds add to what is there. Writes docs/ddim_tables.md and .json, and for each data
set a chart and a sheet of pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm import checkpoint
from ldm.config import TrainConfig
from ldm.data import generator, to_signed, to_uint8
from ldm.data.digits import DIGIT_WORDS
from ldm.diffusion import (
    Denoise,
    LossConfig,
    NoiseSchedule,
    PredictionType,
    as_noise,
    conditioned,
    ddim,
    ddim_inversion,
)
from ldm.diffusion.sampling import identity
from ldm.evaluation.features import DigitFeatures, Features, pixel_features
from ldm.evaluation.frechet import frechet_distance
from ldm.models import UNet, UNetConfig
from ldm.pipelines.images import contact_sheet, save_png, to_pil
from ldm.pipelines.sampling import draw_noise
from tools.ddim_tables_page import COLUMNS, write_page
from tools.small_models import SCHEDULE, Data, Recipe, make_unet, read_data, trained_model

ROOT = Path(__file__).parents[1]
PIECE = 64  # pictures that are drawn at once and kept as one file
STEPS = (5, 10, 20, 50, 100, 1000)  # the last is T
INVERSION_STEPS = (5, 10, 20, 50, 100, 200, 1000)
# The columns of Table 1: η and the variance of the noise.
VARIANTS: dict[str, tuple[float, Literal["ddim", "sigma_hat"]]] = {
    "0": (0.0, "ddim"),
    "0.2": (0.2, "ddim"),
    "0.5": (0.5, "ddim"),
    "1": (1.0, "ddim"),
    "sigma_hat": (1.0, "sigma_hat"),
}
SHEET_STEPS, SHEET_VARIANTS = (5, 20, 100, 1000), ("0", "1", "sigma_hat")
# The rows of DDPM, Table 2. Its L is the bound with σ² = β̃.
ABLATION: dict[str, tuple[PredictionType, LossConfig]] = {
    "mean-L": ("posterior_mean", LossConfig(weighting="vlb")),
    "mean-simple": ("posterior_mean", LossConfig()),
    "epsilon-L": ("epsilon", LossConfig(weighting="vlb")),
    "epsilon-simple": ("epsilon", LossConfig()),
}
MAIN = "epsilon-simple"


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A data set of the study.

    Attributes:
        long_variants: the columns that are measured at S = T too.
        features: what the Fréchet distance is measured on, from the data; the first is the one that is discussed.
    """

    name: str
    read: Callable[[], Data]
    recipe: Recipe
    samples: int
    long_variants: tuple[str, ...]
    features: Callable[[Data], dict[str, Features]]

    def cells(self) -> list[tuple[int, str]]:
        """(S, column), short ones first."""
        return [(s, name) for s in STEPS for name in VARIANTS if s < STEPS[-1] or name in self.long_variants]


def digit_of(caption: str) -> int:
    """The digit that one of its phrasings names, as a word or a numeral."""
    word = caption.rsplit(" ", 1)[-1]
    return int(word) if word.isdigit() else DIGIT_WORDS.index(word)


def _digit_features(data: Data) -> dict[str, Features]:
    digits = [digit_of(captions[0]) for captions in data.captions[: data.training]]
    return {"digit": DigitFeatures.fit(data.images[: data.training], digits), "pixel": pixel_features}


DIGITS = Domain(
    name="digits",
    read=lambda: read_data("digits", 8, grey=True, max_length=8),
    recipe=Recipe(
        unet=UNetConfig(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        train=TrainConfig(
            max_steps=1200, batch_size=128, learning_rate=2e-3, lr_schedule="cosine", warmup_steps=50, ema_decay=0.995
        ),
        save_every=250,
    ),
    samples=256,
    long_variants=tuple(VARIANTS),
    features=_digit_features,
)
OPENMOJI = Domain(
    name="openmoji",
    read=lambda: read_data("openmoji", 32, grey=False, max_length=16),
    recipe=Recipe(
        unet=UNetConfig(
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=16,
        ),
        train=TrainConfig(
            max_steps=10_000, batch_size=32, learning_rate=4e-4, lr_schedule="cosine", warmup_steps=200, ema_decay=0.999
        ),
        save_every=250,
    ),
    samples=512,
    long_variants=("0", "1", "sigma_hat"),
    features=lambda data: {"pixel": pixel_features},
)
DOMAINS = {domain.name: domain for domain in (DIGITS, OPENMOJI)}


@dataclass(frozen=True)
class Model:
    """A trained network with all that draws pictures with it."""

    data: Data
    unet: UNet
    prediction_type: PredictionType
    folder: Path

    def denoise(self, captions: Sequence[str]) -> Denoise:
        """What predicts ε for these captions, at guidance 1."""
        denoise = conditioned(self.unet, self.data.condition(captions))
        if self.prediction_type == "epsilon":
            return denoise
        return as_noise(denoise, NoiseSchedule.from_config(SCHEDULE), self.prediction_type)


def start_of(data: Data, seed: int, places: Sequence[int]) -> tuple[list[torch.Generator], Tensor]:
    """A generator for each picture, and its x_T [B, C, H, W]: the same for every S, column and model."""
    seeds = [int(generator(seed, "x_T", place).integers(2**62)) for place in places]
    generators = [torch.Generator("cpu").manual_seed(value) for value in seeds]
    return generators, draw_noise(generators, torch.empty(len(places), *data.images.shape[1:]))


@torch.inference_mode()
def draw_piece(model: Model, steps: int, variant: str, seed: int, places: Sequence[int]) -> Tensor:
    """Pictures [B, C, H, W] uint8, captions drawn as in the data."""
    schedule, codec = NoiseSchedule.from_config(SCHEDULE), model.data.codec()
    generators, latents = start_of(model.data, seed, places)
    _, captions = model.data.draw_captions(seed, places)
    eta, variance = VARIANTS[variant]
    *_, last = ddim(
        model.denoise(captions),
        latents,
        schedule,
        schedule.grid(steps),
        eta=eta,
        variance=variance,
        noise=lambda: draw_noise(generators, latents),
        project=codec.project,
    )
    return to_uint8(codec.decode(last.latents))


def pictures(model: Model, steps: int, variant: str, seed: int, count: int) -> tuple[Tensor, float]:
    """`count` pictures of a cell and the seconds they took, from the folder or drawn now."""
    pieces, seconds = [], 0.0
    for first in range(0, count, PIECE):
        places = range(first, min(first + PIECE, count))
        path = model.folder / "pictures" / f"{variant}-{steps:04d}" / f"{seed}-{places.start}-{places.stop}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            drawn = draw_piece(model, steps, variant, seed, places)
            took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_tensors(path, {"pictures": drawn, "seconds": took})
        kept = checkpoint.load_tensors(path)
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
        return list(checkpoint.read_json(path)["errors"])
    schedule, codec = NoiseSchedule.from_config(SCHEDULE), model.data.codec()
    errors: list[float] = []
    for first in range(0, count, PIECE):
        images = model.data.held_out[first : min(first + PIECE, count)]
        captions = model.data.captions[model.data.training + first :][: len(images)]
        denoise, grid = model.denoise([each[0] for each in captions]), schedule.grid(steps)
        *_, end = ddim_inversion(denoise, codec.draw(images), schedule, grid)
        *_, back = ddim(denoise, end.latents, schedule, grid, project=identity)
        difference = (codec.decode(back.latents) - images) / 2
        errors += difference.square().flatten(1).mean(dim=1).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, {"errors": errors})
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


class Study:
    """The results of one data set, cell by cell, into a dictionary that is JSON."""

    def __init__(self, domain: Domain, work: Path, *, samples: int, seeds: int) -> None:
        self.domain, self.samples, self.seeds = domain, samples, seeds
        self.folder = work / domain.name
        self._check_settings()
        self.data = domain.read()
        self.features = domain.features(self.data)
        self.reference = {name: features(self.data.images) for name, features in self.features.items()}

    def _check_settings(self) -> None:
        """Refuses a folder whose pieces were made by another recipe."""
        path, settings = self.folder / "recipe.json", {"recipe": json.loads(_as_json(self.domain.recipe))}
        if path.is_file() and checkpoint.read_json(path) != settings:
            raise ValueError(f"{path} is of another recipe than this program's; choose another --work, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, settings)

    def model(self, name: str) -> Model:
        prediction_type, loss = ABLATION[name]
        recipe = dataclasses.replace(self.domain.recipe, prediction_type=prediction_type, loss=loss)
        folder = self.folder / name
        return Model(self.data, trained_model(recipe, self.data, folder), prediction_type, folder)

    def about(self) -> dict[str, Any]:
        """What the numbers stand on, and the distance of real pictures from the rest, as a floor."""
        order = generator(0, "floor").permutation(len(self.data.images))
        aside, rest = order[: self.samples], order[self.samples :]
        floor = {name: frechet_distance(features[aside], features[rest]) for name, features in self.reference.items()}
        training = checkpoint.read_json(self.folder / MAIN / "training.json")
        about = {"samples": self.samples, "images": len(self.data.images), "held_out": len(self.data.held_out)}
        machine = f"{torch.get_num_threads()} thread of a CPU ({platform.machine()}), torch {torch.__version__}"
        size = list(self.data.images.shape[1:])
        return {**about, "machine": machine, "size": size, "floor": floor, "training": training}

    def distances(self, model: Model, steps: int, variant: str, seed: int) -> dict[str, float]:
        drawn, seconds = pictures(model, steps, variant, seed, self.samples)
        found = {
            name: frechet_distance(features(to_signed(drawn)), self.reference[name])
            for name, features in self.features.items()
        }
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{model.folder.name} S={steps} {variant} seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
        return {**found, "seconds": seconds}

    def table_1(self, results: dict[str, Any], seed: int) -> None:
        model = self.model(MAIN)
        for steps, variant in self.domain.cells():
            cell = results.setdefault("table_1", {}).setdefault(str(steps), {}).setdefault(variant, [])
            cell.append(self.distances(model, steps, variant, seed))

    def table_2(self, results: dict[str, Any]) -> None:
        model, count = self.model(MAIN), min(self.samples, len(self.data.held_out))
        for steps in INVERSION_STEPS:
            results.setdefault("table_2", {})[str(steps)] = reconstruction_errors(model, steps, count)

    def same_start(self, results: dict[str, Any], seed: int) -> None:
        model = self.model(MAIN)
        chosen, _ = self.data.draw_captions(seed, range(self.samples))
        kinds = [self.data.captions[image][0] for image in chosen]
        long, _ = pictures(model, STEPS[-1], "0", seed, self.samples)
        for steps in STEPS[:-1]:
            short, _ = pictures(model, steps, "0", seed, self.samples)
            found = results.setdefault("same_start", {}).setdefault(str(steps), [])
            found.append(consistency(short, long, kinds))

    def sheet(self, path: Path) -> None:
        """The first pictures of seed 0: a column an x_T, a row S and a column of the table."""
        model, shown = self.model(MAIN), min(14, self.samples)
        rows, captions = [], []
        for steps in SHEET_STEPS:
            for variant in SHEET_VARIANTS:
                drawn, _ = pictures(model, steps, variant, 0, self.samples)
                rows.append(to_pil(to_signed(drawn[:shown]).expand(-1, 3, -1, -1)))
                captions.append(f"S = {steps}, {COLUMNS[variant]}")
        save_png(contact_sheet(rows, captions, size=48), path)

    def ablation(self, results: dict[str, Any], seed: int) -> None:
        """At S = T = 1000 and η = 1, where a step of DDIM is one of DDPM with σ² = β̃."""
        for name in ABLATION:
            model = self.model(name)
            results.setdefault("ablation", {}).setdefault(name, []).append(self.distances(model, STEPS[-1], "1", seed))


def _as_json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True, default=str)


def run(arguments: argparse.Namespace) -> None:
    """Everything that was asked for, a whole seed after the other; the page is written after each."""
    path = arguments.output / "ddim_tables.json"
    everything: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = [name for name in DOMAINS if name in arguments.only or (name == "digits" and "ablation" in arguments.only)]
    for name in names:
        domain = DOMAINS[name]
        study = Study(domain, arguments.work, samples=arguments.samples or domain.samples, seeds=arguments.seeds)
        fresh: dict[str, Any] = {}
        if name in arguments.only:
            study.table_2(fresh)
        for seed in range(arguments.seeds):
            if name in arguments.only:
                study.table_1(fresh, seed)
                study.same_start(fresh, seed)
                if seed == 0:
                    study.sheet(arguments.output / f"ddim_tables-{name}.png")
            if name == "digits" and "ablation" in arguments.only:
                study.ablation(fresh, seed)
            everything[name] = {**everything.get(name, {}), **study.about(), **fresh}
            write_page(everything, arguments.output)


def estimate(domain: Domain, samples: int, seeds: int) -> str:
    """How long a study will take here, from the speed of its network now."""
    data = domain.read()
    unet = make_unet(domain.recipe, data)
    batch, config = min(PIECE, 16), domain.recipe.train
    images = torch.randn(batch, *data.images.shape[1:])
    condition = data.condition([captions[0] for captions in data.captions[:batch]])
    timesteps = torch.zeros(batch, dtype=torch.int64)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            unet(images, timesteps, condition)
        middle = time.perf_counter()
        unet(images, timesteps, condition).square().mean().backward()
        times.append((middle - started, time.perf_counter() - middle))
    forward, step = (min(column) / batch for column in zip(*times, strict=True))
    evaluations = samples * seeds * sum(steps for steps, _ in domain.cells())
    evaluations += 2 * sum(INVERSION_STEPS) * min(samples, len(data.held_out))
    training = config.max_steps * config.batch_size * step / 3600
    return f"{domain.name}: training {training:.1f} h, drawing and inverting {evaluations * forward / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*DOMAINS, "ablation"), default=["digits", "ablation"])
    parser.add_argument("--samples", type=int, help="pictures a cell and seed; by default 256 digits, 512 OpenMoji")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, for intervals")
    parser.add_argument("--work", type=Path, default=Path("runs/ddim-tables"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--estimate", action="store_true", help="only say how long it will take")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; an interval needs at least 2")
    if not arguments.estimate:
        return run(arguments)
    for name in arguments.only:
        if name in DOMAINS:
            print(estimate(DOMAINS[name], arguments.samples or DOMAINS[name].samples, arguments.seeds))
    return None


if __name__ == "__main__":
    main()
