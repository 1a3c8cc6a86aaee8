"""The pictures that the README opens with: the built-in model's first picture for each of twelve prompts.

    python tools/gallery.py                                      # docs/gallery.png
    python tools/gallery.py --model runs/openmoji-64 -o gallery.png

Prompts and seed were fixed before the model was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import Pipeline
from ldm.pipelines import contact_sheet, save_png

PROMPTS = (
    *("dog face", "red apple", "pizza", "a blue car", "smiling face with sunglasses", "a clock"),
    *("green tree", "a house", "a cat", "a rocket", "a red heart", "a corgi wearing a hat"),
)
SEED = 0
COLUMNS = 6
ENLARGED = 4
OUTPUT = Path(__file__).parents[1] / "docs" / "gallery.png"
