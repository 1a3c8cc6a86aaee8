"""Configs of other tools, told by the keys that only they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Dotted keys → the tool. None of them is a key of ours.
FOREIGN_KEYS = {
    "model.target": "CompVis's latent-diffusion and what came of it",
    "model.base_learning_rate": "CompVis's latent-diffusion and what came of it",
    "network_module": "kohya's sd-scripts",
    "network_dim": "kohya's sd-scripts",
    "pretrained_model_name_or_path": "the scripts of diffusers and kohya",
    "instance_data_dir": "the scripts of diffusers and kohya",
    "train_data_dir": "the scripts of diffusers and kohya",
    "model_arguments": "kohya's sd-scripts",
    "datasets": "kohya's sd-scripts",
    "job": "ai-toolkit",
    "--model_type": "SimpleTuner",
    "training_method": "OneTrainer",
    "_class_name": "a part of a model of diffusers",
    "model_type": "a model of transformers",
    "architectures": "a model of transformers",
    "compute_environment": "accelerate (accelerate launch --config_file takes it)",
    "trainer": "Lightning",
    "_target_": "Hydra",
    "defaults": "Hydra",
}


def refuse_other_tools(content: Mapping[str, Any], where: str) -> None:
    """Refuses a config that was written for another tool.

    Raises:
        ValueError: naming the key and the tool.
    """
    for key, tool in FOREIGN_KEYS.items():
        section, _, last = key.rpartition(".")
        inside = content.get(section) if section else content
        if isinstance(inside, Mapping) and last in inside:
            raise ValueError(
                f"{where} has {key}, a key of {tool}; ldm does not read such configs: start from one of the files in "
                "configs/, and name a model to go on from in start_from"
            )
