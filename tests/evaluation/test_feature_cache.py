"""Features of a data set on disk: those of its images, computed once, and again only for what has changed."""

import dataclasses

import pytest
import torch

from ldm.data import CaptionedImages, DataConfig, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.evaluation.features import cached_features, feature_space
from tests.training.runs import captioned_folder


@pytest.fixture
def counted():
    """A feature space, and how many images its network has seen."""
    space, seen = feature_space("pixel", device=torch.device("cpu")), []

    def extract(images):
        seen.extend(range(len(images)))
        return space.extract(images)

    return dataclasses.replace(space, extract=extract), seen


def opened(path, cache, **settings):
    config = DataConfig(path=str(path), resolution=16, cache_dir=str(cache), **settings)
    return CaptionedImages(inspect(open_source(config), config).used, config, 0)


def test_each_image_is_seen_once_and_rows_stand_in_their_order(tmp_path, counted):
    space, seen = counted
    folder = captioned_folder(tmp_path / "data", 40)
    images, done = opened(folder, tmp_path / "cache"), []
    found = cached_features(images, space, progress=done.append)
    assert found.dtype == torch.float64 and len(seen) == 40 and sum(done) == 40
    expected = space.extract(to_signed(torch.stack([images.image_at(i) for i in range(40)])))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # float32 on disk
    seen.clear()
    done.clear()
    assert torch.equal(cached_features(images, space, progress=done.append), found)
    assert not seen and done == [40]


def test_what_has_changed_is_computed_again_and_nothing_else(tmp_path, counted):
    space, seen = counted
    folder = captioned_folder(tmp_path / "data", 12)
    before = cached_features(opened(folder, tmp_path / "cache"), space)
    (folder / "3.png").write_bytes(captioned_folder(tmp_path / "other", 99).joinpath("98.png").read_bytes())
    seen.clear()
    images = opened(folder, tmp_path / "cache")
    after = cached_features(images, space)
    changed = [i for i in range(12) if not torch.equal(before[i], after[i])]
    assert [images.samples[i].id for i in changed] == ["3.png"] and len(seen) == 1
    seen.clear()
    cached_features(opened(folder, tmp_path / "cache", background="black"), space)
    assert len(seen) == 12  # another background is another image, wherever it is transparent
    seen.clear()
    cached_features(images, dataclasses.replace(space, resize="4 bicubic"))
    assert len(seen) == 12


def test_images_of_several_shapes(tmp_path, counted):
    space, _ = counted
    folder = captioned_folder(tmp_path / "data", 6)
    from PIL import Image

    for name in ("1.png", "4.png"):
        Image.open(folder / name).resize((32, 16)).save(folder / name)
    images = opened(folder, tmp_path / "cache", buckets=True)
    assert len({images.shape_of(i) for i in range(6)}) == 2
    found = cached_features(images, space)
    unkept = cached_features(images, dataclasses.replace(space, name="clip"))  # whose label does not say its weights
    torch.testing.assert_close(unkept, found, rtol=1e-6, atol=1e-6)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
    for i in range(6):
        expected = space.extract(to_signed(images.image_at(i))[None])[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)
