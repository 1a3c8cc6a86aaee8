import json

import numpy as np
from PIL import Image

from ldm.pipelines import contact_sheet, save_png


def test_a_sheet_shows_pictures_of_any_shape_whole_and_in_the_middle_of_their_cells() -> None:
    shapes = [(40, 40), (80, 20), (20, 80), (8, 4), (400, 1)]
    pictures = [Image.new("RGB", shape, "black") for shape in shapes]
    sheet = np.asarray(contact_sheet([pictures], size=80).convert("L"))
    assert sheet.shape == (88, 4 + 5 * 84)
    expected = [(80, 80), (80, 20), (20, 80), (80, 40), (80, 1)]
    for column, (width, height) in enumerate(expected):
        cell = sheet[4:84, 4 + 84 * column : 84 + 84 * column] == 0
        rows, columns = np.flatnonzero(cell.any(axis=1)), np.flatnonzero(cell.any(axis=0))
        assert (len(columns), len(rows)) == (width, height)
        assert (columns[0], rows[0]) == ((80 - width) // 2, (80 - height) // 2)
        assert cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert (sheet == 0).sum() == sum(width * height for width, height in expected)  # nothing between the cells


def test_settings_with_a_file_name_that_is_no_unicode_can_be_read_back(tmp_path):
    settings = {"model": "folder \udcff", "word": "grün"}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {"prompt": "grün", "settings": settings})
    text = Image.open(tmp_path / "a.png").text
    assert text["prompt"] == "grün" and json.loads(text["settings"]) == settings
