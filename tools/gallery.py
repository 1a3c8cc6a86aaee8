"""The pictures that the README opens with: the built-in model's first picture for each of twelve prompts.

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
MARGIN, LINE, LETTERS = 12, 26, 22  # pixels, pixels, letters a line of text
OUTPUT = Path(__file__).parents[1] / "docs" / "gallery.png"


def sheet(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """The pictures in rows, enlarged, each with its prompt beneath."""
    font = ImageFont.load_default(size=20)
    texts = [textwrap.wrap(prompt, LETTERS) for prompt in prompts]
    width, height = (ENLARGED * side for side in pictures[0].size)
    below = LINE * max(map(len, texts)) + MARGIN
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN)), "white")
    draw = ImageDraw.Draw(whole)
    for place, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * (height + below + MARGIN)
        whole.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        for number, line in enumerate(lines):
            draw.text((left + width // 2, top + height + number * LINE + 4), line, fill="black", font=font, anchor="ma")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openmoji-64")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="others than the twelve")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    pipeline = Pipeline.from_pretrained(arguments.model)
    pictures = [pipeline(prompt, seed=arguments.seed).images[0] for prompt in arguments.prompts]
    save_png(sheet(pictures, arguments.prompts), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
