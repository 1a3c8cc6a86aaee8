"""The defaults that are stored with a model: how a picture is drawn where nobody says how."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldm import checkpoint, disk

INDEX = "model_index.json"


def check_storable(folder: Path) -> None:
    """Refuses a folder whose defaults cannot be changed, before hours are spent on finding better ones.

    Raises:
        ValueError: if it is no local pipeline folder that `ldm` has written, or one that must stay as it is.
    """
    folder = disk.expand_user(folder)
    _index(folder)
    if (folder.parent / "manifest.json").exists():
        raise ValueError(
            f"{folder} is a part of the checkpoint {folder.parent}, which its manifest keeps as it is; store the "
            "defaults in the exported pipeline of the run"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written; copy the model to a folder of your own")


def store_defaults(folder: Path, guidance_scale: float, num_inference_steps: int) -> None:
    """Changes the two numbers in `model_index.json`, atomically; all else stays as it is.

    Raises:
        ValueError: as `check_storable`.
        OSError: if the disk does not take it; the old file stands then.
    """
    folder = disk.expand_user(folder)
    check_storable(folder)
    index = _index(folder)
    changed = index["_ldm"] | {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    checkpoint.write_json(folder / INDEX, index | {"_ldm": changed})


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is no pipeline folder on this machine; save the model with save_pretrained() to one, and give it"
        )
    index = checkpoint.read_json(folder / INDEX)
    if not isinstance(index.get("_ldm"), dict):
        # Its presence also says that the scheduler's offset is to be taken as it stands: it cannot just be added.
        raise ValueError(
            f"{folder / INDEX} has no defaults of ldm, as models of diffusers do not; open it with "
            "Pipeline.from_pretrained, save_pretrained() it to a new folder, and store them there"
        )
    return index
