"""First stages side by side: what a design costs, what it keeps of held-out emoji, what a UNet makes of its latents.

    python experiments/first_stages.py                     # trains and measures what is not in --work yet
    python experiments/first_stages.py --only f4-c4 f8-c16

A design is a first-stage config with a few keys changed. All are trained for the same number of steps on the same
images in the same order; then the same UNet learns the latents of some of them, as long on each. Everything is kept in
--work, so an interrupted call goes on where it was. Writes docs/first-stage.json, .md, and a sheet of reconstructions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm import disk, hub
from ldm.pipelines import contact_sheet, save_png

ROOT = Path(__file__).parents[1]
READING = "## Reading"
PERCEPTUAL = "loss.perceptual_weight=0.3"
DISCRIMINATOR = "discriminator={channels: 32, levels: 2}"
SHOWN = 8  # columns of the sheet


@dataclass(frozen=True)
class Design:
    """What is changed of a config, and why it is tried.

    Attributes:
        unet: whether a UNet learns its latents too.
    """

    why: str
    settings: tuple[str, ...]
    config: str = "openmoji-first-stage"
    unet: bool = False


def levels(*widths: int) -> tuple[str, ...]:
    """The settings of an autoencoder with a level for each width."""
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    names = [f"autoencoder.{key}=[{', '.join([name] * len(widths))}]" for key, name in blocks.items()]
    return (f"autoencoder.block_out_channels=[{', '.join(map(str, widths))}]", *names)


DESIGNS = {
    "f4-c4-l1": Design("factor 4, 4 channels, L1 and KL", ("loss.perceptual_weight=0",), unet=True),
    "f4-c4": Design("with the perceptual term", (PERCEPTUAL,), unet=True),
    "f4-c4-adversarial": Design(
        "and a discriminator in the second half",
        (PERCEPTUAL, "loss.adversarial_weight=0.3", "loss.adversarial_start={half}", DISCRIMINATOR),
    ),
    "f4-c3": Design("three channels", (PERCEPTUAL, "autoencoder.latent_channels=3")),
    "f8-c8": Design("factor 8", (PERCEPTUAL, *levels(16, 32, 64, 64), "autoencoder.latent_channels=8")),
    "f8-c16": Design(
        "factor 8, as many numbers as f4-c4",
        (PERCEPTUAL, *levels(16, 32, 64, 64), "autoencoder.latent_channels=16"),
        unet=True,
    ),
    "f4-c4-wide": Design("32 channels at full size instead of 16", (PERCEPTUAL, *levels(32, 64, 64))),
    "f4-c4-vq": Design("1,024 codes instead of the KL term", (PERCEPTUAL,), "openmoji-first-stage-vq"),
}


@dataclass(frozen=True)
class Study:
    """Where results are kept, and how long is trained.

    Attributes:
        steps, unet_steps: of each first stage, and of each UNet.
    """

    work: Path
    steps: int
    unet_steps: int
    threads: int

    def call(self, *command: str) -> str:
        """A program of this project in a process of its own; what it prints on stdout."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(
            [sys.executable, *command], check=True, env=environment, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    def train(self, script: str, config: str, run: Path, steps: int, settings: tuple[str, ...]) -> None:
        """A run to its last step, gone on with where it was broken off."""
        if (run / "checkpoints" / f"step_{steps:08d}").is_dir():
            return
        own = (f"output_dir={run}", f"train.max_steps={steps}", f"train.cpu_threads={self.threads}")
        path = str(ROOT / "configs" / f"{config}.yaml")
        self.call(str(ROOT / "train" / script), "--config", path, "--resume", "--set", *own, *settings)

    def evaluated(self, path: Path, *command: str) -> dict[str, Any]:
        """What a command of `ldm` prints as JSON, kept in `path`."""
        if not path.is_file():
            found = json.loads(self.call("-m", "ldm.cli", *command, "--json"))
            hub.write_json(path, found)
        return dict(hub.read_json(path))

    def first_stage(self, name: str, design: Design) -> dict[str, Any]:
        """What is measured of a design on the held-out emoji."""
        run = self.work / name
        settings = tuple(text.replace("{half}", str(self.steps // 2)) for text in design.settings)
        self.train("train_autoencoder.py", design.config, run, self.steps, ("train.validate_every=200", *settings))
        folder, sheet = run / "autoencoder", run / "worst.png"
        found = self.evaluated(
            run / "evaluation.json", "autoencoder", "evaluate", str(folder), "openmoji", "-o", str(sheet)
        )
        plan = hub.read_json(run / "plan.json")
        weights = hub.load_autoencoder(folder)
        size = {"parameters": sum(p.numel() for p in weights.parameters()), "channels": weights.channels}
        return {**size, "factor": weights.factor, "why": design.why, "took": plan["took_seconds"], "found": found}

    def diffusion(self, name: str) -> dict[str, Any]:
        """What is measured of a UNet on the latents of a design."""
        run = self.work / f"{name}-unet"
        settings = (f"first_stage={self.work / name / 'autoencoder'}", "train.evaluate_every=null")
        quiet = ("train.validate_every=100000", "train.sample_every=100000", "train.ema_decay=0.995")
        self.train("train_ldm.py", "openmoji", run, self.unet_steps, settings + quiet)
        command = ("evaluate", str(run), "--samples", "200", "--steps", "20", "-o", str(run / "evaluation"))
        found = self.evaluated(run / "evaluation.json", *command)
        kept = {key: found[key] for key in ("samples", "num_inference_steps", "guidance_scale", "quality", "retrieval")}
        return {"took": hub.read_json(run / "plan.json")["took_seconds"], "found": kept}

    def sheet(self, names: list[str]) -> Image.Image:
        """Held-out emoji above what each design makes of them."""
        from ldm.codecs import LatentCodec
        from ldm.data import CaptionedImages, DataConfig, split, to_signed
        from ldm.data.layouts import open_source
        from ldm.pipelines import to_pil

        config = DataConfig(path="openmoji", resolution=64)
        images = CaptionedImages(split(open_source(config).samples, config.held_out)[1], config, 0)
        chosen = [to_signed(images.image_at(i * len(images) // SHOWN))[None] for i in range(SHOWN)]
        rows, captions = [[to_pil(image)[0] for image in chosen]], ["held-out emoji"]
        for name in names:
            codec = LatentCodec(hub.load_autoencoder(self.work / name / "autoencoder"))
            rows.append(
                [to_pil(codec.decode(codec.sample_latents(codec.moments(image))).detach())[0] for image in chosen]
            )
            captions.append(name)
        return contact_sheet(rows, captions, size=96)


def page(results: Mapping[str, Any], study: Mapping[str, Any]) -> str:
    """The tables, without what a person says of them."""
    columns = ["design", "what differs", "factor, channels", "parameters", "time"]
    columns += ["PSNR, dB", "SSIM", "perceptual", "Fréchet ratio"]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    for name, row in results["first stages"].items():
        found = row["found"]
        cells = [
            name,
            row["why"],
            f"{row['factor']}, {row['channels']}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['took'] / 60:.1f} min",
            *(_shown(found[key]) for key in ("psnr", "ssim", "perceptual")),
            _shown(found["frechet"]["interval"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    parts = [
        "# First stages, measured",
        "    python experiments/first_stages.py",
        f"OpenMoji at 64×64, {study['steps']:,} steps of 16 images each; threads of torch: {study['threads']}, of a "
        "machine that had other work too, so that times are rough. Figures are those of the held-out images, ± half of "
        "the 95 % interval over images; the perceptual distance is about 1 between different images; the Fréchet ratio "
        "(EfficientNet-Lite0 features) is 1 for reconstructions that are as near to the training images as the "
        "originals are.",
        "\n".join(lines),
        "![held-out emoji and what each design makes of them](first-stage.png)",
    ]
    if results["unets"]:
        parts += ["## A UNet on the latents", _unets(results["unets"], study)]
    return "\n\n".join(parts)


def _unets(results: Mapping[str, Any], study: Mapping[str, Any]) -> str:
    lines = [
        "| latents of | time | Fréchet ratio | KID | own image among 10, training captions |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        found = row["found"]
        ratio, kid = found["quality"]["frechet_ratio"], found["quality"]["generated"]["kid"]
        near = found["retrieval"]["training"]["within"]["10"]
        lines.append(
            f"| {name} | {row['took'] / 60:.1f} min | {_bounds(ratio)} | {_bounds(kid)} | {100 * near['mean']:.0f} % "
            f"({100 * near['low']:.0f} to {100 * near['high']:.0f}) |"
        )
    return (
        f"The UNet of configs/openmoji.yaml, {study['unet_steps']:,} steps of 64, then 200 images of 20 steps "
        "against the training images.\n\n" + "\n".join(lines)
    )


def _shown(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['mean']:.3g} ± {(interval['high'] - interval['low']) / 2:.2g}"


def _bounds(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--steps", type=int, default=600, help="of each first stage")
    parser.add_argument("--unet-steps", type=int, default=400, help="of each UNet; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--work", type=Path, default=Path("runs/first-stages"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    study = Study(arguments.work, arguments.steps, arguments.unet_steps, arguments.threads)
    results: dict[str, Any] = {"first stages": {}, "unets": {}}
    names = [name for name in DESIGNS if name in arguments.only]
    for name in names:
        results["first stages"][name] = study.first_stage(name, DESIGNS[name])
    save_png(study.sheet(names), arguments.output / "first-stage.png")
    for name in names:
        if DESIGNS[name].unet and study.unet_steps:
            results["unets"][name] = study.diffusion(name)
    settings = {"steps": study.steps, "unet_steps": study.unet_steps, "threads": study.threads}
    hub.write_json(arguments.output / "first-stage.json", settings | results)
    path = arguments.output / "first-stage.md"
    _, found, reading = path.read_text(encoding="utf-8").partition(READING) if path.is_file() else ("", "", "")
    disk.write_text(path, page(results, settings) + (f"\n\n{READING}{reading}".rstrip() if found else "") + "\n")


if __name__ == "__main__":
    main()
