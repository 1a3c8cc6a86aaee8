"""The page of measured first stages, and the designs themselves."""

import json
from pathlib import Path

import pytest

from experiments import first_stages
from ldm.config import AutoencoderTrainingConfig
from ldm.config.overrides import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", first_stages.DESIGNS)
def test_every_design_is_a_config(name: str) -> None:
    design = first_stages.DESIGNS[name]
    settings = [text.replace("{half}", "300") for text in design.settings]
    config = load_config(ROOT / "configs" / f"{design.config}.yaml", settings, AutoencoderTrainingConfig)
    assert config.network is not None
    factor = 2 ** (len(config.network.block_out_channels) - 1)
    assert name.startswith(f"f{factor}-c{config.network.latent_channels}")
    assert (config.loss.perceptual_weight == 0) == name.endswith("-l1")
    assert (config.loss.adversarial_weight > 0) == name.endswith("-adversarial")


def test_the_page_says_what_the_figures_are() -> None:
    figures = json.loads((ROOT / "docs" / "first-stage.json").read_text())
    settings = {key: figures[key] for key in ("steps", "unet_steps", "threads")}
    text = first_stages.page(figures, settings)
    committed = (ROOT / "docs" / "first-stage.md").read_text(encoding="utf-8")
    assert committed.startswith(text), "docs/first-stage.md is out of date"
    found = figures["first stages"]["f4-c4"]["found"]
    assert f"| {found['psnr']['mean']:.3g} ± " in text
    assert "| f8-c16 |" in text.partition("## A UNet on the latents")[2]
