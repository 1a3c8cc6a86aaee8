"""The images at the top of the README: the built-in model's first image for each of the first twelve prompts of
tools/scene_prompts.txt.

    python tools/gallery.py                                      # docs/gallery.png
    python tools/gallery.py --all                                # docs/scenes-64-prompts.png, of all forty
    python tools/gallery.py --model runs/scenes-64/pipeline -o gallery.png

Prompts and seed were fixed before the model was trained.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm import Pipeline
from ldm.pipelines import save_png

PROMPTS = (Path(__file__).parent / "scene_prompts.txt").read_text(encoding="utf-8").splitlines()
SEED = 0
DOCS = Path(__file__).parents[1] / "docs"
MARGIN = 12


@dataclass(frozen=True)
class Layout:
    """A gallery: columns, enlargement, and the size of the text in pixels and letters."""

    columns: int
    enlarged: int
    font_size: int
    line_letters: int


LARGE, SMALL = Layout(6, 4, 20, 22), Layout(8, 2, 13, 18)


def sheet(images: Sequence[Image.Image], prompts: Sequence[str], layout: Layout = LARGE) -> Image.Image:
    """The images in rows, enlarged, each above its prompt."""
    font = ImageFont.load_default(size=layout.font_size)
    line_height = layout.font_size + 6
    texts = [textwrap.wrap(prompt, layout.line_letters) for prompt in prompts]
    width, height = (layout.enlarged * side for side in images[0].size)
    below = line_height * max(map(len, texts)) + MARGIN
    columns = min(layout.columns, len(images))
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN)), "white")
    canvas = ImageDraw.Draw(whole)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * (height + below + MARGIN)
        whole.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for number, line in enumerate(lines):
            position = (left + width // 2, top + height + number * line_height + 4)
            canvas.text(position, line, fill="black", font=font, anchor="ma")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-64")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all forty prompts, smaller: docs/scenes-64-prompts.png")
    which.add_argument("--prompts", nargs="+", help="instead of the twelve")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    prompts = arguments.prompts or (PROMPTS if arguments.all else PROMPTS[:12])
    output = arguments.output or DOCS / ("scenes-64-prompts.png" if arguments.all else "gallery.png")
    pipeline = Pipeline.from_pretrained(arguments.model)
    images = [pipeline(prompt, seed=arguments.seed).images[0] for prompt in prompts]
    save_png(sheet(images, prompts, SMALL if arguments.all else LARGE), output)
    print(output)


if __name__ == "__main__":
    main()
