"""The sheet that the README opens with."""

import numpy as np
from PIL import Image

from tools.gallery import ENLARGED, MARGIN, PROMPTS, sheet


def test_every_picture_stands_enlarged_in_its_place_with_its_prompt_beneath() -> None:
    colours = [(20 * i, 255 - 20 * i, 100) for i in range(len(PROMPTS))]
    whole = np.asarray(sheet([Image.new("RGB", (8, 8), colour) for colour in colours], PROMPTS))
    side = ENLARGED * 8
    assert whole.shape[1] == 6 * (side + MARGIN) + MARGIN
    rows = [MARGIN, MARGIN + whole.shape[0] // 2]
    for place, colour in enumerate(colours):
        top, left = rows[place // 6], MARGIN + place % 6 * (side + MARGIN)
        assert (whole[top : top + side, left : left + side] == colour).all()
        beneath = whole[top + side : top + side + 20, left : left + side]
        assert (beneath < 128).any(), f"no text beneath {PROMPTS[place]}"
