import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import CaptionedImages, DataConfig, Sample, collate, split
from ldm.data.composer import Composer, Composition, Wording
from ldm.data.images import decode
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.data.report import dataset_report
from ldm.data.scenes.render import RGB
from ldm.report.text import report_text

WORDS = (
    "ant",
    "bee",
    "cat",
    "dog",
    "elk",
    "fox",
    "gnu",
    "hen",
    "ibex",
    "jay",
    "kiwi",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pig",
)
WORDS += ("ram", "seal", "toad", "wolf")
COLORS = [(200, 30 + 10 * i, 255 - 12 * i) for i in range(len(WORDS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawings on transparent ground and ten photographs, of 40 pixels, each of one color."""
    folder = tmp_path_factory.mktemp("data")
    for i, (word, color) in enumerate(zip(WORDS, COLORS, strict=True)):
        if i % 2:
            image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
            image.paste((*color, 255), (8, 8, 32, 32))
        else:
            # No two pixels of its border are alike, and its middle is of its color.
            noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            image.paste(color, (4, 4, 36, 36))
        image.save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f"a {word}")
    return folder


def composed_images(samples: Sequence[Sample], config: DataConfig, seed: int) -> CaptionedImages:
    return CaptionedImages(samples, config, seed, composer=Composer(samples, config, seed))


def images(folder: Path, tmp_path: Path, seed: int = 0, **changes: object) -> CaptionedImages:
    settings = {"path": str(folder), "resolution": 32, "compose": 0.5, "renew_every": 2, "cache_dir": str(tmp_path)}
    config = DataConfig(**settings | changes)  # type: ignore[arg-type]
    used = inspect(open_source(config), config).used
    return composed_images(used, config, seed)


def names(data: CaptionedImages, epoch: int) -> list[str]:
    return [data.sample_at(epoch, index).id for index in range(len(data))]


def test_fraction_of_an_epoch_is_composed_for_renew_every_epochs(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    plain = [sample.id for sample in data.samples]
    made = [sum(a != b for a, b in zip(names(data, epoch), plain, strict=True)) for epoch in range(0, 80, 2)]
    assert np.mean(made) == pytest.approx(0.5 * len(data), rel=0.1)
    assert names(data, 0) == names(data, 1) != names(data, 2) == names(data, 3)
    assert names(data, 0) != names(images(folder, tmp_path, seed=1), 0)
    # The same, whichever others there are: which is composed; with whom is drawn among those that there are.
    fewer = composed_images(data.samples[::-1], data.config, 0)
    assert [" + " in a or " on " in a for a in names(fewer, 0)[::-1]] == [
        " + " in a or " on " in a for a in names(data, 0)
    ]
    for index in range(len(data)):
        for epoch in range(6):
            item = data[epoch, index]
            assert item.renewed == (item.id != plain[index])
            assert item.id.count(plain[index]) == 1
    assert names(CaptionedImages(data.samples, data.config, 0), 0) == plain, "not those held out"
    assert names(images(folder, tmp_path, compose=0.0, renew_every=6), 0) == plain


def test_what_is_composed_is_never_mirrored_and_has_its_size(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path, flip=True, crop="random")
    items = [data[epoch, index] for epoch in (0, 2, 4) for index in range(len(data))]
    assert any(item.flipped for item in items)
    assert not any(item.flipped for item in items if item.renewed)
    for item in items:
        assert item.image is not None and item.image.shape == (3, 32, 32) and item.image.dtype == torch.uint8
    bucketed = images(folder, tmp_path, buckets=True, resolution=48)
    assert {item.size for item in (bucketed[0, i] for i in range(len(bucketed)))} == {(48, 48)}


def test_a_ground_takes_a_color_where_every_part_on_it_is_a_cutout(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    cutouts = {one.id for one in data.samples if one.cutout is not None}
    keys = [
        json.loads(one.read())
        for epoch in range(0, 40, 2)
        for index in range(len(data))
        if (one := data.sample_at(epoch, index)) is not data.samples[index]
    ]
    colored = [(layout, parts) for parts, layout, color, *_ in keys if color is not None]
    assert all(cutouts.issuperset(parts[:1] if layout == "inset" else parts) for layout, parts in colored)
    assert any(layout == "inset" and parts[1] not in cutouts for layout, parts in colored)  # covers a part of it


def sample(data: CaptionedImages, word: str) -> Sample:
    return next(one for one in data.samples if one.id == f"{word}.png")


def drawn(
    layout: str, parts: tuple[Sample, ...], color: str | None, places: tuple[float, ...] = (0.5, 0.5, 0.5)
) -> np.ndarray:
    made = Composition(layout, parts, color, (255, 255, 255), places).sample("said", (32, 32))  # type: ignore[arg-type]
    return np.asarray(made.load()).astype(int)


def near(pixel: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel - np.array(color)).max() <= 2)


def test_parts_stand_where_the_caption_says(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    ant, bee, cat, dog = (sample(data, word) for word in WORDS[:4])
    assert ant.cutout is None and bee.cutout is not None and np.abs(np.array(bee.cutout) - COLORS[1]).max() < 9
    pixels = drawn("beside", (ant, cat), None)
    assert near(pixels[16, 8], COLORS[0]) and near(pixels[16, 24], COLORS[2])
    pixels = drawn("above", (ant, cat), None)
    assert near(pixels[8, 16], COLORS[0]) and near(pixels[24, 16], COLORS[2])
    # What is transparent stands whole on one ground.
    pixels = drawn("beside", (bee, dog), "blue")
    assert near(pixels[16, 8], COLORS[1]) and near(pixels[16, 24], COLORS[3])
    for place in ((0, 0), (31, 31), (0, 31), (6, 0), (26, 15), (26, 16), (2, 8)):
        assert near(pixels[place], RGB["blue"]), place
    assert near(drawn("beside", (bee, dog), None)[0, 0], (255, 255, 255))
    pixels = drawn("ground", (bee,), "orange")
    assert near(pixels[16, 16], COLORS[1]) and near(pixels[0, 0], RGB["orange"])
    made = Composition("inset", (ant, cat), None, (255, 255, 255), (0.0, 0.9, 0.5))
    assert all("top right" in text for text in made.captions(Wording((0, 0), 0, False, 0)))
    pixels = drawn("inset", (ant, cat), None, (0.0, 0.9, 0.5))
    assert near(pixels[6, 26], COLORS[2]) and near(pixels[26, 6], COLORS[0]) and near(pixels[26, 26], COLORS[0])
    # A drawing in the corner lets see what is behind it.
    pixels = drawn("inset", (ant, bee), None, (0.9, 0.0, 0.5))
    assert near(pixels[26, 6], COLORS[1]) and near(pixels[22, 13], COLORS[0])


def test_half_transparent_pixels_show_the_ground(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((200, 100, 0, 128), (8, 8, 56, 56))
    image.save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    one = Sample("a", ("a",), "a", partial(bytes, stored), partial(decode, background=(255, 255, 255)), size=(64, 64))
    pixels = drawn("ground", (one,), "blue")
    expected = [round((128 * c + 127 * g) / 255) for c, g in zip((200, 100, 0), RGB["blue"], strict=True)]
    assert np.abs(pixels[16, 16] - expected).max() <= 2


def test_what_fills_its_border_with_one_color_is_not_cut(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), (250, 250, 240))
    image.paste((0, 100, 0), (2, 15, 38, 25))
    image.save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    one = Sample("a", ("a",), "a", partial(bytes, stored), partial(decode, background=(255, 255, 255)), size=(40, 40))
    pixels = drawn("beside", (one, one), None)
    assert all(near(pixels[y, x], (250, 250, 240)) for y in (0, 8, 24, 31) for x in (0, 7, 15, 31))
    assert near(pixels[16, 8], (0, 100, 0))


def test_captions_fit_or_nothing_is_composed(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    assert data.composer is not None

    def said(longest: int) -> list[str]:
        data.composer.fits = lambda text: len(text.split()) <= longest  # type: ignore[union-attr]
        made = [data.sample_at(epoch, index) for epoch in range(0, 12, 2) for index in range(len(data))]
        return [one.captions[0] for one in made if " + " in one.id or " on " in one.id]

    free, short, none = said(99), said(6), said(3)
    assert max(len(text.split()) for text in free) > 6
    assert max(len(text.split()) for text in short) == 6
    assert len(short) > 0.6 * len(free), "what can be said shorter is"
    assert none == []
    line = data.composer.summary(data.shape_of)
    assert line.startswith("0 % of the samples") and "text.max_length" in line
    data.composer.fits = None
    assert "text.max_length" not in data.composer.summary(data.shape_of)


def test_no_composition_within_a_group_or_caption(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    photographs = [one for one in data.samples if one.cutout is None]
    for same in (
        [replace(one, captions=("a thing",)) for one in photographs],
        [replace(one, group="g") for one in photographs],
        photographs[:1],
    ):
        alone = composed_images(same, data.config, 0)
        assert names(alone, 0) == [one.id for one in same]
    templated = [
        replace(one, captions=(*one.captions, f"photo of {one.captions[0]}"), templated=1) for one in photographs
    ]
    told = composed_images(templated, data.config, 0)
    assert not any("photo of" in told.caption_at(0, i) for i in range(len(told)) if told[0, i].renewed)


def test_wide_images_are_not_side_by_side(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path, compose=0.99)
    wide = [replace(one, size=(80, 40), cutout=None) for one in data.samples]
    told = composed_images(wide, data.config, 0)
    captions = [told.caption_at(epoch, index) for epoch in range(0, 8, 2) for index in range(len(told))]
    assert any("above" in text for text in captions)
    assert not any("left of" in text or "next to" in text for text in captions)


def test_workers_and_pickles_compose_the_same(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    batches = [[(epoch, index) for index in range(len(data))] for epoch in (0, 3)]
    expected = [collate([data[position] for position in batch]) for batch in batches]
    with_workers = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=1)  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(data))
    for found, other, batch in zip(with_workers, batches, expected, strict=True):
        assert found.ids == batch.ids and found.captions == batch.captions
        assert torch.equal(found.images, batch.images) and torch.equal(found.renewed, batch.renewed)
        assert torch.equal(collate([again[position] for position in other]).images, batch.images)


def test_renewed_images_are_loaded_once(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    data.with_images = False
    data.renewed_cached = 10
    for epoch in (0, 1):
        batch = collate([data[epoch, index] for index in range(len(data))])
        expected = batch.renewed & ((torch.arange(len(data)) >= 10) | torch.tensor(epoch == 0))
        assert torch.equal(batch.loaded, expected)
        assert batch.images is not None and len(batch.images) == int(expected.sum())


def test_a_part_that_became_unreadable_is_named(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    ant, cat = sample(data, "ant"), sample(data, "cat")
    broken = replace(cat, read=partial(bytes, b"nothing"))
    made = Composition("beside", (ant, broken), None, (255, 255, 255), (0.5,) * 3).sample("said", (32, 32))
    with pytest.raises(ValueError, match=r"^cat.png .*not an image") as caught:
        made.load()
    assert str(caught.value).count("could be read") == 1


def test_uncaptioned_images_are_composed_without_a_word(folder: Path, tmp_path: Path) -> None:
    data = images(folder, tmp_path)
    bare = composed_images([replace(one, captions=()) for one in data.samples], data.config, 0)
    items = [bare[0, index] for index in range(len(bare))]
    assert any(item.renewed for item in items) and {item.caption for item in items} == {""}


def test_report_counts_compositions(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(folder), resolution=32, compose=0.3, cache_dir=str(tmp_path))
    for _ in range(2):  # found out, and known
        account = dataset_report(inspect(open_source(config), config), config)
        assert account.summary().endswith("; 30 % of the samples of an epoch are composed")
        assert any("10 of 20 images" in line for line in account.notes)
    plain = replace(config, compose=0.0)
    assert "composed" not in report_text(dataset_report(inspect(open_source(plain), plain), plain))


def test_openmoji_stand_on_colored_grounds() -> None:
    source = open_source(DataConfig(path="openmoji", resolution=32, compose=0.5))
    assert sum(one.cutout is not None for one in source.samples) > 0.97 * len(source.samples)
    plain = open_source(DataConfig(path="openmoji", resolution=32))
    for one, other in zip(source.samples[::400], plain.samples[::400], strict=True):
        assert one.digest == other.digest and one.load().tobytes() == other.load().tobytes()
    training, _ = split(source.samples, 0.1)
    told = composed_images(training, DataConfig(path="openmoji", resolution=32, compose=0.5), 0)
    items = [told[0, index] for index in range(60)]
    assert any("background" in item.caption for item in items if item.renewed)
