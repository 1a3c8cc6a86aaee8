"""A judge of scenes: a small network that says which things a picture shows, where, how large and in what color.

`tools/scene_judge.py` trains it on composed scenes of a stream that no model is trained on, and on no generated
picture. Objects as points: CenterNet, arXiv:1904.07850. A cell of an 8×8 grid says whether
something has its center there, and what; of every thing that is asked for, the cell where it is most likely says how
large it is and in what color, so that glasses in the middle of a face are read apart from the face.
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

from ldm import checkpoint
from ldm.data import to_signed
from ldm.data.scenes.catalog import load_catalog
from ldm.data.scenes.scene import COLORS
from ldm.weights import converted

FOLDER = checkpoint.ASSETS / "scenes-judge"
SIZE, GRID = 64, 8
OWN = "own"  # the color of what is not tinted
ALL_COLORS = (*COLORS, OWN)
# A peak of what may be the center of something counts from here on; chosen on scenes, see `tools/scene_judge.py`.
PEAK = 0.4
IMAGES_AT_ONCE = 64
WEIGHTS = "judge.safetensors"
HOW_TO_TRAIN = "train it again: python tools/scene_judge.py"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What a judge knows, and how wide it is.

    Args:
        things: the names of the things that it tells apart.
        tier: of the catalog, whose things these are.
        widths: channels at 1/2, 1/4 and 1/8 of the image's side.
        query: length of the vector by which a thing is asked for.
        blocks: at 1/4 and at 1/8.
        peak: from what value on a center counts.
    """

    things: tuple[str, ...]
    tier: int = 1
    widths: tuple[int, int, int] = (48, 96, 192)
    query: int = 96
    blocks: tuple[int, int] = (1, 5)
    peak: float = PEAK


class JudgeNetwork(nn.Module):
    """Images [B, 3, 64, 64] in [−1, 1] → maps on a grid of 8×8."""

    def __init__(self, config: JudgeConfig) -> None:
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
        self.place = nn.Conv2d(third, config.query, 1)
        self.asked = nn.Embedding(len(config.things), config.query)
        self.about = nn.Sequential(
            nn.Linear(config.query, config.query), nn.ReLU(), nn.Linear(config.query, len(ALL_COLORS) + 4)
        )
        # Near 1 all things begin with one reading of colors and sizes; with any signs each would have to learn its own.
        nn.init.normal_(self.asked.weight, 1.0, 0.1)
        nn.init.constant_(self.center.bias, -3.0)  # type: ignore[arg-type]  # few cells are centers

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of a center [B, 8, 8], logits of things [B, K, 8, 8], and features [B, Q, 8, 8] for `describe`."""
        x = self.trunk(images)
        return self.center(x)[:, 0], self.things(x), self.place(x)

    def describe(self, features: Tensor, things: Tensor) -> tuple[Tensor, Tensor]:
        """Of things [N] at cells with features [N, Q]: logits of colors [N, 12], and [N, 4]: where in the cell its
        center lies (x, y, in cells), its width and its height (in shares of the image).
        """
        found = self.about(features * self.asked(things))
        return found[:, : len(ALL_COLORS)], found[:, len(ALL_COLORS) :]


def _convolution(channels: int, out: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU()]


class _Residual(nn.Module):
    """x + f(x), with a 3×3 convolution of `inner` channels in the middle of f; `outer` is the size of the others."""

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
class Look:
    """How a thing that was asked for looks in a picture.

    Attributes:
        rank: its place among all things by how surely they are seen, 1 for the first.
        color: one of `ALL_COLORS`.
        box: left, top, right, bottom, in shares of the image.
    """

    rank: int
    color: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture.

    Attributes:
        count: how many things, whatever they are.
        first: the five things that are seen most surely.
        looks: of what was asked for, in its order.
    """

    count: int
    first: tuple[str, ...]
    looks: tuple[Look, ...]


class Judge:
    """Reads pictures.

    Args:
        network: of that config; put into evaluation.
    """

    def __init__(self, config: JudgeConfig, network: JudgeNetwork) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False)
        self._numbers = {name: number for number, name in enumerate(config.things)}

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Judge:
        """Raises:
        ValueError: where there is none, it is damaged, or it knows other things than the catalog has.
        """
        config = read_judge_config(folder)
        network = JudgeNetwork(config)
        weights = checkpoint.load_tensors(folder / WEIGHTS)
        checkpoint.assign_weights(network, {name: _widened(value) for name, value in weights.items()}, folder)
        known = {thing.name for thing in load_catalog().things if thing.tier <= config.tier}
        if known != set(config.things):
            different = min(known ^ set(config.things))
            raise ValueError(
                f'the judge in {folder} does not know the things that are drawn now, such as "{different}"; '
                f"{HOW_TO_TRAIN}"
            )
        return cls(config, network)

    def save(self, folder: Path) -> None:
        """Weights in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value for name, value in self.network.state_dict().items() if value.is_floating_point()}
        whole = {name: value for name, value in self.network.state_dict().items() if name not in weights}
        checkpoint.save_tensors(folder / WEIGHTS, whole | converted(weights, torch.float16, "the judge"))
        checkpoint.write_json(folder / "config.json", asdict(self.config))

    @property
    def digest(self) -> str:
        """Names these weights, beside figures that were read with them."""
        return _digest(self.network)

    @torch.no_grad()
    def read(self, pictures: Tensor, asked: Sequence[Sequence[str]]) -> list[Reading]:
        """Pictures uint8 [N, 3, H, W] → what is seen in each.

        Args:
            asked: of each picture, the names of the things to look for.

        Raises:
            ValueError: for a thing that the judge does not know.
        """
        for name in {name for names in asked for name in names} - self._numbers.keys():
            raise ValueError(f'the judge knows no "{name}"; {HOW_TO_TRAIN}')
        assert len(pictures) == len(asked)
        found: list[Reading] = []
        for start in range(0, len(pictures), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            images = to_signed(pictures[part])
            if images.shape[-2:] != (SIZE, SIZE):
                images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
            found += self._read(images, asked[part])
        return found

    def _read(self, images: Tensor, asked: Sequence[Sequence[str]]) -> list[Reading]:
        center, things, features = self.network(images)
        center = center.sigmoid()  # [B, 8, 8]
        seen = (things.softmax(dim=1) * center[:, None]).flatten(2)  # [B, K, 64]
        scores, cells = seen.max(dim=2)  # [B, K]
        counts = peaks(center, self.config.peak).flatten(1).sum(dim=1).tolist()
        readings = []
        for place, names in enumerate(asked):
            first = scores[place].topk(min(5, scores.shape[1])).indices.tolist()
            numbers = torch.tensor([self._numbers[name] for name in names], dtype=torch.int64)
            at = cells[place][numbers]  # [n]
            colors, boxes = self.network.describe(features[place].flatten(1).T[at], numbers)
            ranks = 1 + (scores[place][None] > scores[place][numbers][:, None]).sum(dim=1)
            looks = tuple(
                Look(int(rank), ALL_COLORS[int(color)], box_of(int(cell), box.tolist()))
                for rank, color, cell, box in zip(ranks, colors.argmax(dim=1), at, boxes, strict=True)
            )
            readings.append(Reading(int(counts[place]), tuple(self.config.things[i] for i in first), looks))
        return readings


def peaks(center: Tensor, least: float) -> Tensor:
    """Cells of [B, 8, 8] that are `least` or more, and no less than any of their neighbors; bool."""
    return (center >= least) & (center == F.max_pool2d(center[:, None], 3, 1, 1)[:, 0])


def box_of(cell: int, box: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what has its center in a cell, by `JudgeNetwork.describe`."""
    row, column = divmod(cell, GRID)
    x, y = (column + box[0]) / GRID, (row + box[1]) / GRID
    return x - box[2] / 2, y - box[3] / 2, x + box[2] / 2, y + box[3] / 2


def read_judge_config(folder: Path) -> JudgeConfig:
    """ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no judge in {folder}; {HOW_TO_TRAIN}")
    content = checkpoint.read_json(folder / "config.json")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    try:
        return JudgeConfig(**values)
    except TypeError:
        raise ValueError(f"{folder / 'config.json'} is not that of a judge of this version; {HOW_TO_TRAIN}") from None


@cache
def load_judge() -> Judge:
    """The judge in `FOLDER`, where `tools/scene_judge.py` leaves it; ValueError if there is none."""
    return Judge.load()


def _widened(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
