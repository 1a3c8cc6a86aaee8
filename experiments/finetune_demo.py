"""A model of emoji learns a new style, line drawings, from 20 captioned pictures; and what it forgets meanwhile.

    python experiments/finetune_demo.py --method lora

The 20 pictures are emoji without their colours (the `line` group of OpenMoji's SVG files), captioned "line drawing of
…". Then the style is asked for of things that were not among them, and other prompts are drawn again. Leaves
RUN/demo/: the folder of pictures, before.png, after.png, other.png and figures.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data import DataConfig
from ldm.data.builtin import render
from ldm.data.layouts import open_source
from ldm.hub import find_pipeline
from ldm.pipelines import Pipeline, contact_sheet, save_png

ROOT = Path(__file__).parents[1]
LEARNT = [
    *("dog face", "red apple", "lemon", "automobile", "bus", "cat face", "house", "alarm clock", "red heart"),
    *("evergreen tree", "sunflower", "banana", "soccer ball", "hammer", "sailboat", "airplane", "key", "umbrella"),
    *("cow face", "teacup without handle"),
]
ASKED = ["pig face", "pear", "taxi", "star", "deciduous tree", "fish", "grinning face", "balloon"]
OTHER = ["red heart", "a blue car", "dog face", "green tree", "smiling face", "flag of France", "pizza", "a rocket"]
SEEDS = [0, 1, 2, 3]
RESOLUTION, BACKGROUND = 64, (255, 255, 255)


def line_drawing(svg: bytes) -> bytes:
    """The SVG without what fills it with colour."""
    without = re.sub(r'<g id="color">.*?(?=<g id=")', "", svg.decode("utf-8"), flags=re.DOTALL)
    return without.encode("utf-8")


def write_folder(folder: Path) -> list[str]:
    """Writes the pictures and their captions; returns the names that OpenMoji has of those asked for."""
    samples = {sample.captions[0]: sample for sample in open_source(DataConfig(path="openmoji", resolution=8)).samples}
    folder.mkdir(parents=True, exist_ok=True)
    for name in LEARNT:
        drawing = render(line_drawing(samples[name].read()), 2 * RESOLUTION, BACKGROUND).image
        drawing.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"line drawing of {name}\n", encoding="utf-8")
    return [name for name in ASKED if name in samples]


def draw(pipeline: Pipeline, prompts: list[str]) -> list[list[Image.Image]]:
    """A row of pictures a prompt, from the same seeds."""
    drawn = pipeline(prompts, num_images_per_prompt=len(SEEDS), seed=SEEDS * len(prompts)).images
    return [drawn[i : i + len(SEEDS)] for i in range(0, len(drawn), len(SEEDS))]


def saturation(rows: list[list[Image.Image]]) -> float:
    """Mean difference of the largest and the smallest colour channel, 0 to 255: line drawings have none."""
    pixels = np.concatenate([np.asarray(image, np.float32).reshape(-1, 3) for row in rows for image in row])
    return float((pixels.max(1) - pixels.min(1)).mean())


def distance(one: list[list[Image.Image]], other: list[list[Image.Image]]) -> float:
    """Root mean square difference of pictures in the same places, in grey levels."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    errors = [np.square(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]
    return float(np.sqrt(np.mean(errors)))


def shifted(rows: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """The same pictures, each in the place of the next seed."""
    return [row[1:] + row[:1] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-from", default="scenes-64", help="a model")
    parser.add_argument("--method", choices=("full", "attention", "lora"), default="lora")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune-demo"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the config")
    arguments = parser.parse_args()
    try:
        find_pipeline(arguments.start_from)
    except ValueError as error:
        parser.error(str(error))
    run = arguments.output / arguments.method
    demo = arguments.output / f"{arguments.method}-demo"
    names = write_folder(demo / "pictures")
    styled = [f"line drawing of {name}" for name in names]

    pipeline = Pipeline.from_pretrained(arguments.start_from)
    before, other_before = draw(pipeline, styled), draw(pipeline, OTHER)
    started = time.perf_counter()
    config = "lora.yaml" if arguments.method == "lora" else "finetune.yaml"
    settings = [f"output_dir={run}", f"start_from={arguments.start_from}", f"data.path={demo / 'pictures'}"]
    settings += [f"finetune.method={arguments.method}", f"sample.prompts=[{', '.join(styled[:4])}]"]
    command = [sys.executable, str(ROOT / "train/train_ldm.py"), "--config", str(ROOT / "configs" / config)]
    subprocess.run([*command, "--set", *settings, *arguments.set], check=True)
    seconds = time.perf_counter() - started

    if arguments.method == "lora":
        pipeline.load_lora(run / "lora")
    else:
        pipeline = Pipeline.from_pretrained(run / "pipeline")
    after, other_after = draw(pipeline, styled), draw(pipeline, OTHER)
    figures = {
        "method": arguments.method,
        "pictures": len(LEARNT),
        "seconds": round(seconds),
        # Of the style: 0 in a line drawing.
        "saturation before": round(saturation(before), 1),
        "saturation after": round(saturation(after), 1),
        "saturation of the 20 pictures": round(
            saturation([[Image.open(path).convert("RGB") for path in (demo / "pictures").glob("*.png")]]), 1
        ),
        # Of everything else: how far the same seeds moved, beside how far other seeds are apart.
        "drift of other prompts": round(distance(other_before, other_after), 1),
        "distance between seeds": round(distance(other_before, shifted(other_before)), 1),
        "saturation of other prompts before": round(saturation(other_before), 1),
        "saturation of other prompts after": round(saturation(other_after), 1),
    }
    save_png(contact_sheet(before, styled), demo / "before.png")
    save_png(contact_sheet(after, styled), demo / "after.png")
    pairs = [a + b for a, b in zip(other_before, other_after, strict=True)]
    save_png(contact_sheet(pairs, [f"{p}: before, then after" for p in OTHER]), demo / "other.png")
    (demo / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    print(f"pictures: {demo}/before.png, after.png, other.png")


if __name__ == "__main__":
    main()
