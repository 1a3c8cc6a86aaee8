"""The model that is part of the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm import Pipeline, hub
from tests.pipelines.test_diffusers import same_picture

NAME = "scenes-64"
FOLDER = hub.BUILT_IN_PIPELINES[NAME]
ROOT = Path(__file__).parents[2]


def test_it_is_small_enough_for_any_host_and_has_its_card() -> None:
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 16 * 2**20 and sum(sizes.values()) <= 30e6
    assert {path.suffix for path in sizes} == {".json", ".safetensors", ".md", ".txt", ".yaml"}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card == (ROOT / "docs" / f"{NAME}.md").read_text(encoding="utf-8")
    for word in ("CC BY-SA 4.0", "configs/scenes-64.yaml", "memoriz", "cannot"):
        assert word in card


def test_it_draws_by_its_name_and_a_seed_gives_its_picture_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # a folder of that name is asked for as ./openmoji-64
    pipeline = Pipeline.from_pretrained(NAME)
    first, again, other = (
        np.asarray(pipeline(prompt, seed=seed, num_inference_steps=4).images[0], dtype=np.int16)
        for prompt, seed in (("a red heart", 0), ("a red heart", 0), ("a blue car", 0))
    )
    assert first.shape == (64, 64, 3)
    assert (first == again).all()
    assert np.abs(first - other).mean() > 5
    with pytest.raises(ValueError, match=r"scenes-64 holds no model_index\.json"):
        Pipeline.from_pretrained(f"./{NAME}")
    with pytest.raises(ValueError, match='there is no model folder Scenes64; did you mean "scenes-64"'):
        Pipeline.from_pretrained("Scenes64")
    with pytest.raises(ValueError, match=r"openmoji-64 is no longer part of the package.*configs/openmoji-64\.yaml"):
        Pipeline.from_pretrained("openmoji-64")
    assert hub.find_autoencoder(NAME) == FOLDER / "vae"


def test_saved_with_all_its_files_it_draws_the_same_here_and_in_diffusers(tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(NAME)
    pipeline.save_pretrained(tmp_path / "whole")
    whole = Pipeline.from_pretrained(tmp_path / "whole")
    drawn = [p("a red heart", seed=1, num_inference_steps=4).images[0] for p in (pipeline, whole)]
    assert (np.asarray(drawn[0]) == np.asarray(drawn[1])).all()
    same_picture(tmp_path / "whole", size=64)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "whole").unet.config.sample_size == 16


def test_it_says_where_it_is() -> None:
    assert Pipeline.from_pretrained(NAME, device="cpu").device == torch.device("cpu")
