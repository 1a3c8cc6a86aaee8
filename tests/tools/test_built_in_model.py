"""The tools of the built-in model: what is asked of it, and how it is packed."""

import json
from pathlib import Path

import pytest

from experiments import unseen_phrasings
from ldm import Pipeline, hub
from ldm.config import LDMConfig, to_yaml
from ldm.config.overrides import load_config
from ldm.data import DataConfig
from ldm.data.layouts import open_source
from ldm.text import load_text_encoder, loading
from ldm.training.run_info import find_run
from tests import tiny
from tools import release_model

ROOT = Path(__file__).parents[2]


def test_a_hundred_phrasings_mean_names_of_the_data_and_are_no_captions_of_it() -> None:
    samples = open_source(DataConfig(path="openmoji", resolution=8, caption_templates=("a {}",))).samples
    assert len(unseen_phrasings.PHRASINGS) == 100
    assert unseen_phrasings.PHRASINGS.keys() <= {sample.captions[0] for sample in samples}
    captions = {caption.casefold() for sample in samples for caption in sample.captions}
    assert not captions & {phrasing.casefold() for phrasing in unseen_phrasings.PHRASINGS.values()}


def test_a_release_is_small_has_its_card_and_draws_by_its_defaults(tmp_path, monkeypatch) -> None:
    package = tiny.text_folder(tmp_path / "package")
    for path in (package / "tokenizer").iterdir():
        path.rename(package / "text_encoder" / path.name)
    monkeypatch.setitem(loading._PACKAGED, "minilm", lambda: package / "text_encoder")
    pipeline = tiny.pipeline(tmp_path / "parts", "latent")
    pipeline.text_encoder = load_text_encoder("minilm", pipeline.text_encoder.max_length)
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    card, target = tmp_path / "card.md", tmp_path / "released"
    card.write_text("# A model")
    with pytest.raises(ValueError, match="run is no run folder with a checkpoint"):
        release_model.release(tmp_path / "run", target, card, 3.0, 5)
    (tmp_path / "run" / "config.yaml").write_text((ROOT / "configs" / "openmoji-64.yaml").read_text())
    state = tmp_path / "run" / "checkpoints" / "step_00000001" / "training" / "state.json"
    state.parent.mkdir(parents=True)
    (state.parents[1] / "manifest.json").write_text("{}")
    state.write_text(json.dumps({"data": {"samples": 7, "sha256": "abc"}}))
    card.unlink()
    with pytest.raises(ValueError, match=r"card\.md is missing; a model without a card is not released"):
        release_model.release(tmp_path / "run", target, card, 3.0, 5)
    card.write_text("# A model")

    size = release_model.release(tmp_path / "run", target, card, 3.0, 5)
    assert size == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert (target / "README.md").read_text() == "# A model"
    monkeypatch.setitem(hub.BUILT_IN_PIPELINES, "scenes-64", target)
    known = find_run("scenes-64")
    assert known is not None and (known.samples, known.sha256, known.config.data.path) == (7, "abc", "openmoji")
    released = Pipeline.from_pretrained("scenes-64")
    assert (released.guidance_scale, released.num_inference_steps) == (3.0, 5)
    assert json.loads((target / "text_encoder" / "reference.json").read_text())["name"] == "minilm"

    assert known.scenes is None
    scenes = ["data.path=scenes", "data.scenes=6", "data.renew_every=2", "data.first_scene=10", "train.batch_size=16"]
    config = load_config(ROOT / "configs" / "scenes-64.yaml", scenes, LDMConfig)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    release_model.release(tmp_path / "run", target, card, 3.0, 5)
    assert find_run("scenes-64").scenes == 10 + 2 * 6  # one step: a block of 12 samples, and one that was begun

    monkeypatch.setattr(release_model, "ALL_BYTES", 1000)
    with pytest.raises(ValueError, match="bytes, and 1,000 may be; train a smaller one"):
        release_model.release(tmp_path / "run", target, card, 4.0, 5)
    assert Pipeline.from_pretrained(target).guidance_scale == 3.0  # as it was
