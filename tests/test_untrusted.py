"""What is refused by name in the folders of a pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldm import Pipeline, hub
from tests import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.stable_diffusion().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PLACES = [".", "unet", "vae", "text_encoder", "tokenizer", "scheduler"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_are_refused_wherever_they_lie(name: str, model: Path) -> None:
    for place in PLACES:
        (model / place / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match=f"{name} is an adapter"):
            Pipeline.from_pretrained(model)
        (model / place / name).unlink()
    Pipeline.from_pretrained(model)
    (model / "adapters.txt").write_text("what was tried")
    Pipeline.from_pretrained(model)


def configs(model: Path) -> list[Path]:
    found = sorted(model.rglob("*config.json"))
    return [model / "model_index.json", *found, model / "text_encoder" / "generation_config.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "code.Model"}),
        ("custom_pipeline", "someone/pipeline"),
        ("quantization_config", {"quant_method": "gguf"}),
        ("_attn_implementation", "someone/kernel"),
    ],
)
def test_keys_are_refused_in_every_config(key: str, value: Any, model: Path) -> None:
    assert len(configs(model)) == 7
    for path in configs(model):
        before = path.read_bytes() if path.is_file() else None
        content = json.loads(before) if before else {}
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=rf"{path.name} has .*{key}"):
            Pipeline.from_pretrained(model)
        path.unlink()
        if before:
            path.write_bytes(before)
    Pipeline.from_pretrained(model)


def test_a_component_from_a_module_in_the_folder_is_refused(model: Path) -> None:
    (model / "unet" / "planted.py").write_text("raise SystemExit('ran')")
    index = json.loads((model / "model_index.json").read_text())
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        tiny.edit_json(model / "model_index.json", **{part: ["planted", "Planted"]})
        with pytest.raises(ValueError, match=f"takes the {part} from 'planted', code that comes with the model"):
            Pipeline.from_pretrained(model)
        tiny.edit_json(model / "model_index.json", **{part: index[part]})
    Pipeline.from_pretrained(model)


def test_an_autoencoder_alone_is_looked_at_too(model: Path) -> None:
    hub.load_autoencoder(model / "vae")
    (model / "vae" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is an adapter"):
        hub.load_autoencoder(model / "vae")
