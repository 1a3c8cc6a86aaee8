"""The images at the top of the README: the built-in model's first image for each of twelve prompts.

    python tools/gallery.py                                      # docs/gallery.png
    python tools/gallery.py --model runs/openmoji-64/pipeline -o gallery.png

Prompts and seed were fixed before the model was trained.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm import Pipeline
from ldm.pipelines import save_png

PROMPTS = (
    *("dog face", "red apple", "pizza", "a blue car", "smiling face with sunglasses", "a clock"),
    *("green tree", "a house", "a cat", "a rocket", "a red heart", "a corgi wearing a hat"),
)
SEED = 0
COLUMNS = 6
ENLARGED = 4
MARGIN, LINE_HEIGHT, LINE_LETTERS = 12, 26, 22  # pixels, pixels, letters
OUTPUT = Path(__file__).parents[1] / "docs" / "gallery.png"


def sheet(images: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """The images in rows, enlarged, each above its prompt."""
    font = ImageFont.load_default(size=20)
    texts = [textwrap.wrap(prompt, LINE_LETTERS) for prompt in prompts]
    width, height = (ENLARGED * side for side in images[0].size)
    below = LINE_HEIGHT * max(map(len, texts)) + MARGIN
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN)), "white")
    canvas = ImageDraw.Draw(whole)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * (height + below + MARGIN)
        whole.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for number, line in enumerate(lines):
            position = (left + width // 2, top + height + number * LINE_HEIGHT + 4)
            canvas.text(position, line, fill="black", font=font, anchor="ma")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openmoji-64")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="instead of the twelve")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    pipeline = Pipeline.from_pretrained(arguments.model)
    images = [pipeline(prompt, seed=arguments.seed).images[0] for prompt in arguments.prompts]
    save_png(sheet(images, arguments.prompts), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
