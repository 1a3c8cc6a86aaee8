"""The sheet that the README opens with."""

import numpy as np
from PIL import Image

from tools.gallery import LARGE, MARGIN, PROMPTS, SMALL, sheet

TWELVE = PROMPTS[:12]


def test_every_picture_stands_enlarged_in_its_place_with_its_prompt_beneath() -> None:
    colours = [(20 * i, 255 - 20 * i, 100) for i in range(len(TWELVE))]
    whole = np.asarray(sheet([Image.new("RGB", (8, 8), colour) for colour in colours], TWELVE))
    side = LARGE.enlarged * 8
    assert whole.shape[1] == 6 * (side + MARGIN) + MARGIN
    rows = [MARGIN, MARGIN + whole.shape[0] // 2]
    for place, colour in enumerate(colours):
        top, left = rows[place // 6], MARGIN + place % 6 * (side + MARGIN)
        assert (whole[top : top + side, left : left + side] == colour).all()
        beneath = whole[top + side : top + side + 20, left : left + side]
        assert (beneath < 128).any(), f"no text beneath {TWELVE[place]}"


def test_all_forty_prompts_fit_into_a_smaller_sheet() -> None:
    assert len(set(PROMPTS)) == 40
    whole = sheet([Image.new("RGB", (64, 64), "red")] * 40, PROMPTS, SMALL)
    assert whole.width == 8 * (2 * 64 + MARGIN) + MARGIN
    assert whole.getpixel((whole.width - MARGIN - 2, 2 * MARGIN)) == (255, 0, 0)
