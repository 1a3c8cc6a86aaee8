"""What training leaves alone: linked into every export, and opened around a network."""

import pytest

from ldm import Pipeline
from ldm.config import SampleConfig
from ldm.training.setup import FrozenComponents
from tests import tiny


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_frozen_parts_are_linked_not_copied(space, tmp_path):
    pipeline = tiny.pipeline(tmp_path / "text", space)
    pipeline.save_frozen(tmp_path / "frozen")
    sample = SampleConfig(prompts=("a",), num_inference_steps=4, guidance_scale=2.0)
    frozen = FrozenComponents(tmp_path / "frozen", pipeline.index(), pipeline.schedule, sample)
    for name in ("one", "two"):
        frozen.save(tmp_path / name, pipeline.unet)
    weights = [tmp_path / name / "text_encoder" / "model.safetensors" for name in ("frozen", "one", "two")]
    assert len({path.stat().st_ino for path in weights}) == 1
    drawn = [made("a", seed=0).images[0] for made in (pipeline, Pipeline.from_pretrained(tmp_path / "two"))]
    drawn.append(frozen.pipeline(pipeline.unet)("a", seed=0).images[0])
    assert drawn[0] == drawn[1] == drawn[2]
