"""Trains the scene classifier, `ldm/evaluation/scene_classifier.py`, on composed scenes.

    python tools/train_scene_classifier.py                # about 25 minutes of one core
    python tools/train_scene_classifier.py --scores-only  # of the existing classifier

No model is trained on its scenes, which include the combinations that are held out from models. Some go through first
stages, with a little noise on the latents, since the classifier is used on decoded images; all are augmented. At the
end its accuracies on real held-out scenes are printed by axis; a reliable classifier reaches 85 %.

The classifier is saved every few minutes. `--go-on` starts from the existing weights: known things keep theirs, new
ones are added, so a changed catalog takes less time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import hub
from ldm.codecs import LatentCodec
from ldm.data import generator, to_signed
from ldm.data.builtin import TIERS
from ldm.data.scenes import COLORS, Part, Scene, SceneKind, SceneSampler, invisible_colors, load_catalog
from ldm.data.scenes.render import RenderedPart, render_parts
from ldm.evaluation.composition import AXES, axis_prompts, measure_axis, real_scenes
from ldm.evaluation.scene_classifier import (
    ALL_COLORS,
    FOLDER,
    GRID,
    OWN,
    SIZE,
    WEIGHTS,
    SceneClassifier,
    SceneClassifierConfig,
    SceneClassifierNetwork,
    peaks,
    read_classifier_config,
)

VERSION = 1
KINDS: dict[SceneKind, float] = {
    "one": 0.3, "count": 0.13, "pair": 0.28, "three": 0.05, "worn": 0.12, "held": 0.05, "worn pair": 0.07
}  # fmt: skip
TEST = 10**9  # scenes from this number on, and this seed, are for testing
PEAKS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
TINTED = 0.45  # probability for things that can be
CENTER_STD = 0.7  # of the target of a center, in cells
SECONDS_BETWEEN_SAVES = 240
LOSSES = ("center", "thing", "color", "box")


@dataclass(frozen=True)
class Objects:
    """The objects of a batch of images, one row each.

    Attributes:
        image, thing, color: int64 [n].
        box: float [n, 4]: x and y of the center, width and height, in fractions of the image.
    """

    image: Tensor
    thing: Tensor
    color: Tensor
    box: Tensor


def classifier_scene(sampler: SceneSampler, number: int) -> tuple[Scene, np.random.Generator]:
    """Scene `number` of the classifier's own stream, and its random generator."""
    rng = generator(VERSION, "judge", number)
    kind = list(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
    scene = sampler.sample_kind(kind, rng)
    scene = dataclasses.replace(scene, parts=tuple(_tinted(part, rng) for part in scene.parts))
    tints = {part.color for part in scene.all_parts}
    while invisible_colors(scene.background) & tints:
        scene = dataclasses.replace(scene, background=COLORS[int(rng.integers(len(COLORS)))])
    return scene, rng


def _tinted(part: Part, rng: np.random.Generator) -> Part:
    """In any color, more often than in training scenes, where a quarter of the things is tinted."""
    worn, held = part.worn and _tinted(part.worn, rng), part.held and _tinted(part.held, rng)
    color = COLORS[int(rng.integers(len(COLORS)))] if part.thing.tint and rng.random() < TINTED else None
    return dataclasses.replace(part, color=color, worn=worn, held=held)


def rows_of(drawn: Sequence[RenderedPart], numbers: dict[str, int]) -> np.ndarray:
    """[n, 6]: index of the thing, index of its color, center, width and height."""
    rows = []
    for one in drawn:
        left, top, right, low = one.box
        color = ALL_COLORS.index(one.part.color or OWN)
        name = numbers[one.part.thing.name]
        rows.append((name, color, (left + right) / 2, (top + low) / 2, right - left, low - top))
    return np.array(rows, np.float32)


class Stream:
    """Images and their objects. Two thirds of each batch are repeated, with another augmentation.

    Args:
        things: names in the order of their numbers.
        first: the number of the first scene.
    """

    def __init__(self, sampler: SceneSampler, things: Sequence[str], first: int = 0, most: int = 16384) -> None:
        self.sampler, self.next, self.most = sampler, first, most
        self.numbers = {name: number for number, name in enumerate(things)}
        self.images: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Objects]:
        """uint8 [size, 3, 64, 64], and their objects."""
        old = rng.integers(len(self.images), size=2 * size // 3).tolist() if self.images else []
        images, rows = [self.images[place] for place in old], [self.rows[place] for place in old]
        while len(images) < size:
            scene, rng_of_scene = classifier_scene(self.sampler, self.next)
            image, drawn = render_parts(scene, rng_of_scene, SIZE)
            images.append(np.asarray(image))
            rows.append(rows_of(drawn, self.numbers))
            if len(self.images) < self.most:
                self.images.append(images[-1])
                self.rows.append(rows[-1])
            else:
                self.images[self.next % self.most], self.rows[self.next % self.most] = images[-1], rows[-1]
            self.next += 1
        table = torch.from_numpy(np.concatenate(rows))
        image = torch.repeat_interleave(torch.arange(size), torch.tensor([len(one) for one in rows]))
        scenes = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        return scenes, Objects(image, table[:, 0].long(), table[:, 1].long(), table[:, 2:])


def changed(
    scenes: Tensor, objects: Objects, codecs: Sequence[LatentCodec], rng: np.random.Generator
) -> tuple[Tensor, Objects]:
    """Augmented images [B, 3, 64, 64] in [−1, 1], as from a decoder, and their visible objects."""
    images = to_signed(scenes)
    size = len(images)
    # A part goes through a first stage.
    if codecs:
        some = torch.from_numpy(rng.permutation(size)[: size // 6])
        codec = codecs[int(rng.integers(len(codecs)))]
        with torch.no_grad():
            latents = codec.sample_latents(codec.moments(images[some]))
            noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
            amount = torch.from_numpy(rng.uniform(0, 0.25, (len(some), 1, 1, 1)).astype(np.float32))
            images[some] = codec.decode(latents + amount * noise).clamp(-1, 1)
    # Zoom and translation.
    zoom = torch.from_numpy(np.exp(rng.uniform(-0.16, 0.16, size)).astype(np.float32))
    move = torch.from_numpy(rng.uniform(-0.08, 0.08, (size, 2)).astype(np.float32))
    turn = torch.zeros(size, 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = 1 / zoom
    turn[:, :, 2] = -2 * move / zoom[:, None]
    grid = F.affine_grid(turn, [size, 3, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    own = objects.image
    center = (objects.box[:, :2] - 0.5) * zoom[own, None] + 0.5 + move[own]
    box = torch.cat([center, objects.box[:, 2:] * zoom[own, None]], dim=1)
    visible = ((center > 0.01) & (center < 0.99)).all(dim=1)
    # Contrast, brightness, saturation; some blur and noise.
    unit = torch.from_numpy(rng.uniform(-1, 1, (3, size, 1, 1, 1)).astype(np.float32))
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (1 + 0.25 * unit[0])
    images = images * (1 + 0.15 * unit[1]) + 0.12 * unit[2]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    much = torch.from_numpy(np.maximum(rng.uniform(-0.6, 1.0, (size, 1, 1, 1)), 0).astype(np.float32))
    images = images + (blurred - images) * much
    noisy = torch.from_numpy(np.maximum(rng.uniform(-0.06, 0.06, (size, 1, 1, 1)), 0).astype(np.float32))
    images = images + noisy * torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    return images.clamp(-1, 1), Objects(own[visible], objects.thing[visible], objects.color[visible], box[visible])


def loss_of(network: SceneClassifierNetwork, images: Tensor, objects: Objects) -> tuple[Tensor, list[float]]:
    """The loss, and its terms: centers, things, colors, boxes."""
    center, things, features = network(images)
    center, things, features = center.float(), things.float(), features.float()
    x, y = (objects.box[:, :2] * GRID).unbind(dim=1)  # [n], in cells
    cells = torch.arange(GRID) + 0.5
    near = torch.exp(
        -((cells - y[:, None]).square()[:, :, None] + (cells - x[:, None]).square()[:, None]) / (2 * CENTER_STD**2)
    )
    count = len(images)
    target = torch.zeros(count, GRID, GRID)
    for i in range(len(x)):  # the maximum, where several are near
        own = int(objects.image[i])
        target[own] = torch.maximum(target[own], near[i])
    column, row = x.long(), y.long()
    target[objects.image, row, column] = 1.0
    focal = _focal(center, target)
    # Things are predicted by the cell of their center and its neighbors, weighted by distance.
    near[torch.arange(len(x)), row, column] = 1.0
    which, at_row, at_column = (near > 0.35).nonzero(as_tuple=True)
    weight = near[which, at_row, at_column]
    weight = weight / weight.sum()
    own, thing = objects.image[which], objects.thing[which]
    naming = F.cross_entropy(things[own, :, at_row, at_column], thing, reduction="none")
    colors, boxes = network.describe(features[own, :, at_row, at_column], thing)
    coloring = F.cross_entropy(colors, objects.color[which], reduction="none")
    wanted = torch.stack([x[which] - at_column, y[which] - at_row, *objects.box[which, 2:].T], dim=1)
    boxing = (boxes - wanted).abs() @ torch.tensor([0.5, 0.5, 2.0, 2.0])
    parts = [focal, *((one * weight).sum() for one in (naming, coloring, boxing))]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    return total, [float(part.detach()) for part in parts]


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    """Equation 1 of CenterNet, arXiv:1904.07850, over the number of centers."""
    probability = logits.sigmoid()
    found = target == 1
    there = (1 - probability).square() * F.logsigmoid(logits)
    elsewhere = (1 - target) ** 4 * probability.square() * F.logsigmoid(-logits)
    return -torch.where(found, there, elsewhere).sum() / found.sum().clamp(min=1)


def initial_network(config: SceneClassifierConfig, folder: Path | None) -> SceneClassifierNetwork:
    """A new network, with the weights of the classifier in a folder for the things that both have."""
    network = SceneClassifierNetwork(config)
    if folder is None:
        return network
    before = read_classifier_config(folder)
    weights = {name: value.float() for name, value in hub.load_tensors(folder / WEIGHTS).items()}
    own = network.state_dict()
    rows = {name: number for number, name in enumerate(before.things)}
    pairs = [(new, rows[name]) for new, name in enumerate(config.things) if name in rows]
    for name, value in own.items():
        if name in ("things.weight", "things.bias", "queries.weight"):
            for new, old in pairs:
                value[new] = weights[name][old]
        else:
            value.copy_(weights[name])
    print(f"continues from {folder}: {len(pairs)} of {len(config.things)} things are known", flush=True)
    return network


def train(
    config: SceneClassifierConfig,
    folder: Path,
    codecs: Sequence[LatentCodec],
    *,
    samples: int,
    batch_size: int = 64,
    rate: float,
    first: int = 0,
    go_on: bool = False,
) -> SceneClassifier:
    """Trains for `samples` images, a third of them new scenes; saves into a folder."""
    torch.manual_seed(0)
    network = initial_network(config, folder if go_on else None).to(memory_format=torch.channels_last).train()
    stream = Stream(SceneSampler(load_catalog(), config.tier), config.things, first)
    rng = generator(VERSION, "judge's training", first)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    steps = max(1, samples // batch_size)
    begun = saved = time.monotonic()
    averaged = [0.0] * 4
    for step in range(steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        images, objects = changed(*stream.batch(batch_size, rng), codecs, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = loss_of(network, images.to(memory_format=torch.channels_last), objects)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        averaged = [0.98 * old + 0.02 * new if step else new for old, new in zip(averaged, parts, strict=True)]
        if step % 100 == 0 or step == steps - 1:
            losses = ", ".join(f"{name} {part:.3f}" for name, part in zip(LOSSES, averaged, strict=True))
            print(
                f"{step + 1}/{steps}, {time.monotonic() - begun:.0f} s, {stream.next - first} scenes: {losses}",
                flush=True,
            )
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or step == steps - 1:
            SceneClassifier(config, network).save(folder)
            network.requires_grad_(True).train()
            saved = time.monotonic()
    return SceneClassifier.load(folder)


def best_peak(classifier: SceneClassifier, count: int = 600) -> float:
    """The threshold of a center that gives the most correct counts on scenes without worn things."""
    sampler = SceneSampler(load_catalog(), classifier.config.tier)
    images, counts, number = [], [], TEST
    while len(images) < count:
        scene, rng = classifier_scene(sampler, number)
        number += 1
        if scene.kind in ("one", "count", "pair"):
            image, drawn = render_parts(scene, rng, SIZE)
            images.append(np.asarray(image))
            counts.append(len(drawn))
    batch = to_signed(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    with torch.no_grad():
        center = torch.cat([classifier.network(chunk)[0].sigmoid() for chunk in batch.split(64)])
    wanted = torch.tensor(counts)
    right = {peak: int((peaks(center, peak).sum(dim=(1, 2)) == wanted).sum()) for peak in PEAKS}
    print(f"counted right of {count}: {right}", flush=True)
    return max(right, key=lambda peak: right[peak])


def scores(classifier: SceneClassifier, codecs: Mapping[str, LatentCodec], count: int | None = None) -> dict[str, Any]:
    """Accuracies on real held-out scenes, as they are and through first stages, by axis."""
    sampler = SceneSampler(load_catalog(), classifier.config.tier)
    found: dict[str, Any] = {}
    print(f"{'axis':<17}{'right':<8}{'scenes':>7}{'as drawn':>10}" + "".join(f"{name:>24}" for name in codecs))
    for axis in AXES:
        prompts = axis_prompts(axis, count, TEST, sampler)
        scenes = real_scenes(prompts, SIZE, TEST)
        parts = {name: measure_axis(axis, prompts, scenes, codec, classifier, TEST) for name, codec in codecs.items()}
        for row, accuracy in enumerate(next(iter(parts.values())).accuracies):
            through = {name: part.accuracies[row].real.mean for name, part in parts.items()}
            found.setdefault(axis, {})[accuracy.what] = {
                "scenes": len(scenes),
                "as drawn": accuracy.untouched,
                **through,
            }
            columns = "".join(f"{value:>24.1%}" for value in through.values())
            print(f"{axis:<17}{accuracy.what:<8}{len(scenes):>7}{accuracy.untouched:>10.1%}{columns}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--samples", type=int, default=300_000, help="images to train on; a third are new scenes")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate; falls by a cosine")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene of the classifier's stream")
    parser.add_argument("--things", choices=("common", "all"), default="common")
    parser.add_argument("--first-stages", nargs="*", default=["openmoji-first-stage"], help="names or folders")
    parser.add_argument("--scores-only", action="store_true", help="train nothing")
    parser.add_argument("--go-on", action="store_true", help="start from the existing classifier")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tier = TIERS[arguments.things]
    things = tuple(thing.name for thing in load_catalog().things if thing.tier <= tier)
    codecs = {
        name: LatentCodec(hub.load_autoencoder(hub.find_autoencoder(name)).eval().requires_grad_(False))
        for name in arguments.first_stages
    }
    if not arguments.scores_only:
        train(
            SceneClassifierConfig(things=things, tier=tier),
            arguments.output,
            list(codecs.values()),
            samples=arguments.samples,
            rate=arguments.rate,
            first=arguments.first,
            go_on=arguments.go_on,
        )
    classifier = SceneClassifier.load(arguments.output)
    classifier = SceneClassifier(dataclasses.replace(classifier.config, peak=best_peak(classifier)), classifier.network)
    classifier.save(arguments.output)
    record = {"classifier": SceneClassifier.load(arguments.output).digest, "catalog": load_catalog().digest}
    hub.write_json(arguments.output / "scores.json", record | {"axes": scores(classifier, codecs)})


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
