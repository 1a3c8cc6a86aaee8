"""A classifier of scenes: a small network that finds things in an image, with their position, size and color.

`tools/train_scene_classifier.py` trains it on composed scenes that no model is trained on. Objects are points
(CenterNet, arXiv:1904.07850): each cell of an 8×8 grid predicts whether a thing has its center there, and which. For
each queried thing, its likeliest cell predicts size and color, so that glasses are distinguished from the face below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import hub
from ldm.data import to_signed
from ldm.data.scenes import COLORS, load_catalog
from ldm.weights import converted

FOLDER = hub.ASSETS / "scenes-classifier"
SIZE, GRID = 64, 8
OWN = "own"  # the color of things that are not tinted
ALL_COLORS = (*COLORS, OWN)
PEAK = 0.4  # least probability of a center; chosen on scenes by `tools/train_scene_classifier.py`
BATCH_SIZE = 64
WEIGHTS = "model.safetensors"
HOW_TO_TRAIN = "train one: python tools/train_scene_classifier.py"


@dataclass(frozen=True, kw_only=True)
class SceneClassifierConfig:
    """Args:
    things: names of the classes.
    tier: of the catalog that they are from.
    widths: channels at 1/2, 1/4 and 1/8 of the image's side.
    query: length of the embedding of a thing.
    blocks: residual blocks at 1/4 and at 1/8.
    peak: least probability of a center.
    """

    things: tuple[str, ...]
    tier: int = 1
    widths: tuple[int, int, int] = (48, 96, 192)
    query: int = 96
    blocks: tuple[int, int] = (1, 5)
    peak: float = PEAK


class SceneClassifierNetwork(nn.Module):
    """Images [B, 3, 64, 64] in [−1, 1] → maps on a grid of 8×8."""

    def __init__(self, config: SceneClassifierConfig) -> None:
        super().__init__()
        first, second, third = config.widths
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),  # [B, 12, 32, 32]
            *_convolution(12, first),
            *_convolution(first, second, stride=2),  # [B, C, 16, 16]
            *(_Residual(second, second, 3) for _ in range(config.blocks[0])),
            *_convolution(second, third, stride=2),  # [B, C, 8, 8]
            *(_Residual(third, third // 2, 1) for _ in range(config.blocks[1])),
        )
        self.center = nn.Conv2d(third, 1, 1)
        self.things = nn.Conv2d(third, len(config.things), 1)
        self.features = nn.Conv2d(third, config.query, 1)
        self.queries = nn.Embedding(len(config.things), config.query)
        width, outputs = config.query, len(ALL_COLORS) + 4
        self.attributes = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
        # Near 1, all things start with the same attributes; with random signs each would have to learn its own.
        nn.init.normal_(self.queries.weight, 1.0, 0.1)
        nn.init.constant_(self.center.bias, -3.0)  # type: ignore[arg-type]  # few cells are centers

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of a center [B, 8, 8], logits of things [B, K, 8, 8], and features [B, Q, 8, 8] for `describe`."""
        x = self.trunk(images)
        return self.center(x)[:, 0], self.things(x), self.features(x)

    def describe(self, features: Tensor, things: Tensor) -> tuple[Tensor, Tensor]:
        """Things [N] at cells with features [N, Q] → logits of colors [N, 12], and boxes [N, 4]: the center in the cell
        (x, y, in cells), width and height (in fractions of the image).
        """
        found = self.attributes(features * self.queries(things))
        return found[:, : len(ALL_COLORS)], found[:, len(ALL_COLORS) :]


def _convolution(channels: int, out: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU()]


class _Residual(nn.Module):
    """x + f(x). `outer` is the kernel of the first and last convolution of f; if it is 1, a 3×3 one is between them."""

    def __init__(self, channels: int, inner: int, outer: int) -> None:
        super().__init__()
        layers = _convolution(channels, inner, kernel=outer)
        if outer == 1:
            layers += _convolution(inner, inner)
        last = nn.BatchNorm2d(channels)
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(*layers, nn.Conv2d(inner, channels, outer, 1, outer // 2, bias=False), last)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@dataclass(frozen=True)
class Detection:
    """A queried thing in an image.

    Attributes:
        rank: among all things by score, from 1.
        color: one of `ALL_COLORS`.
        box: left, top, right, bottom, in fractions of the image.
    """

    rank: int
    color: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ScenePrediction:
    """The contents of an image.

    Attributes:
        count: number of things of any kind.
        top_things: the five things with the highest scores.
        detections: of the queried things, in their order.
    """

    count: int
    top_things: tuple[str, ...]
    detections: tuple[Detection, ...]


class SceneClassifier:
    """Args:
    network: of that config; it is put into evaluation mode.
    """

    def __init__(self, config: SceneClassifierConfig, network: SceneClassifierNetwork) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False)
        self._numbers = {name: number for number, name in enumerate(config.things)}

    @classmethod
    def load(cls, folder: Path = FOLDER) -> SceneClassifier:
        """Raises:
        ValueError: for a missing or damaged folder, and for other things than those of the catalog.
        """
        config = read_classifier_config(folder)
        network = SceneClassifierNetwork(config)
        weights = hub.load_tensors(folder / WEIGHTS)
        weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        hub.assign_weights(network, weights, folder)
        catalog = {thing.name for thing in load_catalog().things if thing.tier <= config.tier}
        if catalog != set(config.things):
            different = min(catalog ^ set(config.things))
            raise ValueError(f'{folder} has other things than the catalog, such as "{different}"; {HOW_TO_TRAIN}')
        return cls(config, network)

    def save(self, folder: Path) -> None:
        """Weights in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value for name, value in self.network.state_dict().items() if value.is_floating_point()}
        whole = {name: value for name, value in self.network.state_dict().items() if name not in weights}
        hub.save_tensors(folder / WEIGHTS, whole | converted(weights, torch.float16, "the scene classifier"))
        hub.write_json(folder / "config.json", asdict(self.config))

    @property
    def digest(self) -> str:
        """A hash of the weights, to be stored with results."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def predict(self, images: Tensor, queries: Sequence[Sequence[str]]) -> list[ScenePrediction]:
        """Of images uint8 [N, 3, H, W], resized to 64×64.

        Args:
            queries: for each image, the names of the things to find.

        Raises:
            ValueError: for an unknown thing.
        """
        for name in {name for names in queries for name in names} - self._numbers.keys():
            raise ValueError(f'the scene classifier knows no "{name}"; {HOW_TO_TRAIN}')
        assert len(images) == len(queries)
        found: list[ScenePrediction] = []
        for start in range(0, len(images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            batch = to_signed(images[part])
            if batch.shape[-2:] != (SIZE, SIZE):
                batch = F.interpolate(batch, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
            center, things, features = self.network(batch)
            center = center.sigmoid()  # [B, 8, 8]
            scores, cells = (things.softmax(dim=1) * center[:, None]).flatten(2).max(dim=2)  # [B, K]
            counts = peaks(center, self.config.peak).flatten(1).sum(dim=1).tolist()
            for row, names in enumerate(queries[part]):
                top = scores[row].topk(min(5, scores.shape[1])).indices.tolist()
                numbers = torch.tensor([self._numbers[name] for name in names], dtype=torch.int64)
                at = cells[row][numbers]  # [n]
                colors, boxes = self.network.describe(features[row].flatten(1).T[at], numbers)
                ranks = 1 + (scores[row][None] > scores[row][numbers][:, None]).sum(dim=1)
                detections = tuple(
                    Detection(int(rank), ALL_COLORS[int(color)], box_of(int(cell), box.tolist()))
                    for rank, color, cell, box in zip(ranks, colors.argmax(dim=1), at, boxes, strict=True)
                )
                names_of_top = tuple(self.config.things[i] for i in top)
                found.append(ScenePrediction(int(counts[row]), names_of_top, detections))
        return found


def peaks(center: Tensor, min_value: float) -> Tensor:
    """Cells of [B, 8, 8] that are at least `min_value`, and no less than any of their neighbors; bool."""
    return (center >= min_value) & (center == F.max_pool2d(center[:, None], 3, 1, 1)[:, 0])


def box_of(cell: int, box: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom from a cell and the box of `SceneClassifierNetwork.describe`."""
    row, column = divmod(cell, GRID)
    x, y = (column + box[0]) / GRID, (row + box[1]) / GRID
    return x - box[2] / 2, y - box[3] / 2, x + box[2] / 2, y + box[3] / 2


def read_classifier_config(folder: Path) -> SceneClassifierConfig:
    """Raises ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no scene classifier in {folder}; {HOW_TO_TRAIN}")
    content = hub.read_json(folder / "config.json")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    try:
        return SceneClassifierConfig(**values)
    except TypeError:
        raise ValueError(f"{folder / 'config.json'} is of another version; {HOW_TO_TRAIN}") from None


@cache
def load_scene_classifier() -> SceneClassifier:
    """The classifier in `FOLDER`, where `tools/train_scene_classifier.py` writes it; ValueError if there is none."""
    return SceneClassifier.load()
