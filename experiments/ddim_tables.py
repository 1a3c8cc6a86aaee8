"""The tables of DDIM and DDPM on real data: few steps and their noise, inversion, what x_T decides, what is trained.

    python -m experiments.ddim_tables --only digits ablation      # --estimate says how long it takes
    python -m experiments.ddim_tables --only openmoji             # much longer

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
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.ddim_tables_cells import (
    GRIDS,
    PIECE,
    VARIANTS,
    Grid,
    Model,
    consistency,
    pictures,
    reconstruction_errors,
)
from experiments.ddim_tables_page import write_page
from experiments.small_models import Data, Recipe, make_unet, read_data, trained_model
from ldm import hub
from ldm.config import TrainConfig
from ldm.data import generator, to_signed
from ldm.data.builtin import DIGIT_WORDS
from ldm.diffusion import LossConfig, PredictionType
from ldm.evaluation.features import GRID, PIXEL_DIMENSIONS, pixel_features, random_directions
from ldm.evaluation.fidelity import frechet_distance
from ldm.models import UNetConfig
from ldm.models.efficientnet import DIMENSIONS, EfficientNetLite0
from ldm.pipelines.images import contact_sheet, save_png, to_pil

ROOT = Path(__file__).parents[1]
STEPS = (5, 10, 20, 50, 100, 1000)  # the last is T
INVERSION_STEPS = (5, 10, 20, 50, 100, 200, 1000)
FLOOR_DRAWS = 10
SEEN_AT = 64  # pixels a side for EfficientNet, whose maps are halved five times
INVERTED = 64  # held-out images, at most
SHEET_STEPS, SHEET_VARIANTS, SHEET_WIDTH = (5, 20, 100, 1000), ("0", "1", "sigma_hat"), 14
# The rows of DDPM, Table 2. Its L is the bound with σ² = β̃.
ABLATION: dict[str, tuple[PredictionType, LossConfig]] = {
    "mean-L": ("posterior_mean", LossConfig(weighting="vlb")),
    "mean-simple": ("posterior_mean", LossConfig()),
    "epsilon-L": ("epsilon", LossConfig(weighting="vlb")),
    "epsilon-simple": ("epsilon", LossConfig()),
}
MAIN = "epsilon-simple"


Features = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [−1, 1], C 1 or 3 → features [B, D], float64."""


@dataclass(frozen=True)
class DigitFeatures:
    """The last hidden layer, 32 numbers, of a small classifier of 8×8 scans of digits.

    Attributes:
        layers: (weight [in, out], bias [out]) of the hidden layers, float64.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def fit(cls, images: Tensor, digits: Sequence[int]) -> DigitFeatures:
        """Fits to scans [N, C, H, W] in [−1, 1] and the digits that they show; the same at every call."""
        from sklearn.neural_network import MLPClassifier

        network = MLPClassifier((64, 32), alpha=1e-2, max_iter=1000, random_state=0)
        network.fit(_grays(images).numpy(), np.asarray(digits))
        weights = [torch.from_numpy(weight) for weight in network.coefs_[:-1]]
        return cls(tuple(zip(weights, map(torch.from_numpy, network.intercepts_[:-1]), strict=True)))

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [−1, 1] → [B, 32]."""
        hidden = _grays(images)  # [B, 64]
        for weight, bias in self.layers:
            hidden = F.relu(hidden @ weight + bias)
        return hidden


def _grays(images: Tensor) -> Tensor:
    gray = images.to(torch.float64).mean(dim=1, keepdim=True)  # [B, 1, H, W]
    return F.adaptive_avg_pool2d(gray, GRID).flatten(1)  # [B, 64]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A data set of the study.

    Attributes:
        long_variants: the columns that are measured at S = T too.
        grids: that Table 1 is measured on.
        features: what the Fréchet distance is measured on, from the data; the first is the one that is discussed.
    """

    name: str
    read: Callable[[], Data]
    recipe: Recipe
    long_variants: tuple[str, ...]
    grids: tuple[Grid, ...]
    features: Callable[[Data], dict[str, Features]]


def digit_of(caption: str) -> int:
    """The digit that one of its phrasings names, as a word or a numeral."""
    word = caption.rsplit(" ", 1)[-1]
    return int(word) if word.isdigit() else DIGIT_WORDS.index(word)


def _digit_features(data: Data) -> dict[str, Features]:
    digits = [digit_of(captions[0]) for captions in data.captions[: data.training]]
    return {"digit": DigitFeatures.fit(data.images[: data.training], digits), "pixel": pixel_features}


def _seen_features(data: Data) -> dict[str, Features]:
    """Colours and edges, and what a network trained on photographs sees, in as many random directions."""
    network = EfficientNetLite0()
    directions = random_directions(DIMENSIONS, PIXEL_DIMENSIONS)

    @torch.inference_mode()
    def seen(images: Tensor) -> Tensor:
        enlarged = F.interpolate(images.float(), size=SEEN_AT, mode="bicubic", align_corners=False).clamp(-1, 1)
        return torch.cat([network(batch) for batch in enlarged.split(PIECE)]).double() @ directions

    return {"pixel": pixel_features, "efficientnet": seen}


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
    long_variants=tuple(VARIANTS),
    grids=GRIDS,
    features=_digit_features,
)
OPENMOJI = Domain(
    name="openmoji",
    read=lambda: read_data("openmoji", 32, grey=False, max_length=16),
    recipe=Recipe(
        unet=UNetConfig(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        train=TrainConfig(
            max_steps=15_000,
            batch_size=32,
            learning_rate=1e-3,
            lr_schedule="cosine",
            warmup_steps=100,
            mixed_precision="bf16",
            ema_decay=0.999,
        ),
        patch=2,
        save_every=250,
    ),
    long_variants=("0", "1", "sigma_hat"),
    grids=("leading",),
    features=_seen_features,
)
DOMAINS = {domain.name: domain for domain in (DIGITS, OPENMOJI)}


class Study:
    """The results of one data set, cell by cell, into a dictionary that is JSON."""

    def __init__(self, domain: Domain, work: Path, *, samples: int, seeds: int, device: str) -> None:
        self.domain, self.samples, self.seeds, self.device = domain, samples, seeds, torch.device(device)
        self.folder = work / domain.name
        self._check_settings()
        self.data = domain.read()
        self.features = domain.features(self.data)
        self.reference = {name: features(self.data.images) for name, features in self.features.items()}

    def _check_settings(self) -> None:
        """Refuses a folder whose pieces were made by another recipe."""
        path, settings = self.folder / "recipe.json", {"recipe": json.loads(_as_json(self.domain.recipe))}
        if path.is_file() and hub.read_json(path) != settings:
            raise ValueError(f"{path} is of another recipe than this program's; choose another --work, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.write_json(path, settings)

    def model(self, name: str) -> Model:
        prediction_type, loss = ABLATION[name]
        recipe = dataclasses.replace(self.domain.recipe, prediction_type=prediction_type, loss=loss)
        folder = self.folder / name
        unet = trained_model(recipe, self.data, folder, self.device)
        return Model(self.data, unet, prediction_type, folder, self.device)

    def about(self) -> dict[str, Any]:
        """What the numbers stand on, and the distance of real pictures from the rest, as a floor."""
        floor: dict[str, list[float]] = {name: [] for name in self.reference}
        for draw in range(FLOOR_DRAWS):
            order = generator(draw, "floor").permutation(len(self.data.images))
            aside, rest = order[: self.samples], order[self.samples :]
            for name, features in self.reference.items():
                floor[name].append(frechet_distance(features[aside], features[rest]))
        training = hub.read_json(self.folder / MAIN / "training.json")
        about = {"samples": self.samples, "images": len(self.data.images), "held_out": len(self.data.held_out)}
        machine = f"{torch.get_num_threads()} thread of a CPU ({platform.machine()})"
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
        machine += f", torch {torch.__version__}"
        size = list(self.data.images.shape[1:])
        return {**about, "machine": machine, "size": size, "floor": floor, "training": training}

    def distances(self, model: Model, grid: Grid, steps: int, variant: str, seed: int) -> dict[str, float]:
        drawn, seconds = pictures(model, grid, steps, variant, seed, self.samples)
        found = {
            name: frechet_distance(features(to_signed(drawn)), self.reference[name])
            for name, features in self.features.items()
        }
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"{model.folder.name} {grid} S={steps} {variant} seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
        return {**found, "seconds": seconds}

    def parts(self, results: dict[str, Any]) -> Iterator[None]:
        """Fills in everything about the main model, the cheap cells first; yields whenever a table has grown."""
        for steps in STEPS[:-1]:
            yield from self.row(results, steps)
        self.inversion(results)
        yield
        yield from self.row(results, STEPS[-1])
        self.same_start(results)
        yield

    def row(self, results: dict[str, Any], steps: int) -> Iterator[None]:
        """A row of Table 1 on both grids, seed after seed."""
        model, columns = self.model(MAIN), VARIANTS if steps < STEPS[-1] else self.domain.long_variants
        tables = results.setdefault("table_1", {grid: {} for grid in self.domain.grids})
        for table in tables.values():
            table[str(steps)] = {variant: [] for variant in columns}
        for seed in range(self.seeds):
            for variant, (grid, table) in itertools.product(columns, tables.items()):
                table[str(steps)][variant].append(self.distances(model, grid, steps, variant, seed))
            yield

    def inversion(self, results: dict[str, Any]) -> None:
        model, count = self.model(MAIN), min(INVERTED, len(self.data.held_out))
        results["table_2"] = {str(steps): reconstruction_errors(model, steps, count) for steps in INVERSION_STEPS}

    def same_start(self, results: dict[str, Any]) -> None:
        model, found = self.model(MAIN), results.setdefault("same_start", {})
        for steps in STEPS[:-1]:
            found[str(steps)] = []
            for seed in range(self.seeds):
                chosen, _ = self.data.draw_captions(seed, range(self.samples))
                kinds = [self.data.captions[image][0] for image in chosen]
                short, long = (pictures(model, GRIDS[0], s, "0", seed, self.samples)[0] for s in (steps, STEPS[-1]))
                found[str(steps)].append(consistency(short, long, kinds))

    def ablation(self, results: dict[str, Any]) -> Iterator[None]:
        """At S = T and η = 1, where a step of DDIM is one of DDPM with σ² = β̃."""
        for name in ABLATION:
            model = self.model(name)
            cells = [self.distances(model, GRIDS[0], STEPS[-1], "1", seed) for seed in range(self.seeds)]
            results.setdefault("ablation", {})[name] = cells
            yield

    def sheet(self) -> Image.Image:
        """The first pictures of seed 0: a column an x_T, a row S and a column of the table."""
        model, rows, captions = self.model(MAIN), [], []
        for steps in SHEET_STEPS:
            for variant in SHEET_VARIANTS:
                drawn, _ = pictures(model, GRIDS[0], steps, variant, 0, self.samples)
                rows.append(to_pil(to_signed(drawn[:SHEET_WIDTH]).expand(-1, 3, -1, -1)))
                captions.append(f"S = {steps}, " + {"sigma_hat": "sigma hat"}.get(variant, f"eta = {variant}"))
        return contact_sheet(rows, captions, size=48)


def _as_json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True, default=str)


def run(arguments: argparse.Namespace) -> None:
    """Everything that was asked for; the page is written whenever a table has grown."""
    path = arguments.output / "ddim_tables.json"
    everything: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, domain in DOMAINS.items():
        ablation = name == "digits" and "ablation" in arguments.only
        if name not in arguments.only and not ablation:
            continue
        study = Study(domain, arguments.work, samples=arguments.samples, seeds=arguments.seeds, device=arguments.device)
        old, fresh = everything.get(name, {}), {}
        wanted = [study.parts(fresh)] * (name in arguments.only) + [study.ablation(fresh)] * ablation
        for _ in itertools.chain(*wanted):
            everything[name] = joined(old, study.about(), fresh)
            write_page(everything, arguments.output)
        if name in arguments.only:
            save_png(study.sheet(), arguments.output / f"ddim_tables-{name}.png")


def joined(old: dict[str, Any], about: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Old results beside new ones, unless they are of another number of pictures: such do not stand in one table.

    What is dropped is not lost: --work has the pictures.
    """
    return {**(old if old.get("samples") == about["samples"] else {}), **about, **fresh}


def evaluations(domain: Domain, samples: int, seeds: int) -> int:
    """How often the network looks at one picture in the tables of the main model."""
    short = len(domain.grids) * len(VARIANTS) * sum(STEPS[:-1])
    drawn = samples * seeds * (short + len(domain.long_variants) * STEPS[-1])
    return drawn + INVERTED * 2 * sum(INVERSION_STEPS)


def estimate(domain: Domain, samples: int, seeds: int, device: torch.device) -> str:
    """How long a study will take here, from the speed of its network now."""
    data = domain.read()
    unet, config = make_unet(domain.recipe, data).to(device), domain.recipe.train
    batch = PIECE // 4
    images, timesteps = torch.randn(batch, *data.images.shape[1:], device=device), torch.tensor(0, device=device)
    condition = data.condition([data.captions[0][0]] * batch).to(device)
    times = []
    for _ in range(4):  # the first is slower
        started = time.perf_counter()
        with torch.no_grad():
            float(unet(images, timesteps, condition).sum())  # waits until it is computed
        middle = time.perf_counter()
        unet(images, timesteps, condition).square().mean().backward()
        float(unet.unet.conv_in.weight.grad.sum())
        times.append((middle - started, time.perf_counter() - middle))
    forward, both = (min(column) / batch for column in zip(*times, strict=True))
    training = config.max_steps * config.batch_size * both / 3600
    drawing = evaluations(domain, samples, seeds) * forward / 3600
    return f"{domain.name}: training {training:.1f} h, drawing and inverting {drawing:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*DOMAINS, "ablation"), default=["digits", "ablation"])
    parser.add_argument("--samples", type=int, default=128, help="pictures a cell and seed")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, for intervals")
    parser.add_argument("--work", type=Path, default=Path("runs/ddim-tables"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
            print(estimate(DOMAINS[name], arguments.samples, arguments.seeds, torch.device(arguments.device)))
    return None


if __name__ == "__main__":
    main()
