"""Information about a trained model: the run it belongs to, and whether its data is unchanged."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm import hub
from ldm.config import LDMConfig, load_config
from ldm.config.reading import read_yaml
from ldm.data import CaptionedImages, DataConfig
from ldm.pipelines import Pipeline
from ldm.training.checkpoints import checkpoint_step, list_checkpoints
from ldm.training.resume import data_differences, data_fingerprint
from ldm.training.run_folder import with_absolute_paths

CONFIG = "config.yaml"
# Of a built-in model: number and fingerprint of its training images; for scenes also how many it was shown.
DATA = "data.json"
# RUN/pipeline, RUN/best/pipeline and RUN/checkpoints/step_…/pipeline.
MAX_DEPTH = 3


@dataclass(frozen=True)
class RunInfo:
    """The run that made a model.

    Attributes:
        folder: the run folder.
        config: its config.
        samples, sha256: number and `data_fingerprint` of its images; None before the first checkpoint.
        scenes: of a model of scenes, how many it and the models that it continues were shown, at most: those from
            number 0 on. None for other data, and before the first checkpoint.
    """

    folder: Path
    config: LDMConfig
    samples: int | None
    sha256: str | None
    scenes: int | None = None

    def data_mismatch(self, images: CaptionedImages, held_out: CaptionedImages | None) -> str | None:
        """A message if these are not the images that the run trained on and held out, or None."""
        if self.sha256 is None:
            return f"{self.folder} has no checkpoint that says which images it was trained on"
        before = {"samples": self.samples, "sha256": self.sha256}
        present = {"samples": len(images), "sha256": data_fingerprint(images, held_out)}
        found = data_differences(self.folder, before, present, images, held_out)
        if not found:
            return None
        then, now = found["data"]
        older = "" if (self.folder / "fingerprints.json").is_file() else ", as far as its older version of ldm tells"
        return f"the data is not what {self.folder} was trained on{older}: {then} then, {now} now"


def find_run(model: str) -> RunInfo | None:
    """The run that a folder is, or lies in; None for other folders and for hub ids.

    Raises:
        ValueError: for the run of a first stage, and for an unreadable config.
    """
    if model in hub.BUILT_IN_PIPELINES:
        return _built_in_run(hub.BUILT_IN_PIPELINES[model])
    where = Path(model).expanduser()
    if not where.is_dir():
        return None
    folders = [where.resolve(), *where.resolve().parents[:MAX_DEPTH]]
    folder = next((path for path in folders if (path / CONFIG).is_file() and _is_of(path, where.resolve())), None)
    if folder is None:
        return None
    path = folder / CONFIG
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name a pipeline folder") from None
    if not isinstance(content, dict) or "data" not in content:
        return None
    if "autoencoder" in content:
        raise ValueError(f"{folder} is the run of a first stage, which generates no images; name the run of a model")
    checkpoints = list_checkpoints(folder)
    data = hub.read_json(checkpoints[-1] / "training" / "state.json")["data"] if checkpoints else {}
    config = load_config(path, [], LDMConfig)
    with suppress(ValueError):  # `data_config` raises it when the data is needed
        config = with_absolute_paths(config, folder)
    scenes = scenes_after(config, checkpoint_step(checkpoints[-1])) if checkpoints else None
    return RunInfo(folder, config, data.get("samples"), data.get("sha256"), scenes)


def _built_in_run(folder: Path) -> RunInfo | None:
    """What `tools/release_model.py` stored beside the model."""
    if not (folder / CONFIG).is_file():
        return None
    config = load_config(folder / CONFIG, [], LDMConfig)
    data = hub.read_json(folder / DATA)
    scenes = data.get("scenes", scenes_after(config, config.train.max_steps))
    return RunInfo(folder, config, data["samples"], data["sha256"], scenes)


def scenes_after(config: LDMConfig, steps: int) -> int | None:
    """How many scenes a run has shown after `steps`, with those before `data.first_scene`; blocks that have begun
    count as a whole. None if its data is not scenes.
    """
    data = config.data
    if data.path != "scenes":
        return None
    blocks = math.ceil(steps * config.train.batch_size / (data.scenes * data.renew_every))
    return data.first_scene + blocks * data.scenes


def _is_of(run: Path, model: Path) -> bool:
    """Whether `model` is the run folder or a model folder that the run wrote."""
    if run == model:
        return True
    inside = model.relative_to(run).parts
    return inside in (("pipeline",), ("best", "pipeline")) or (
        len(inside) == MAX_DEPTH and inside[0] == "checkpoints" and inside[2] == "pipeline"
    )


def open_model(model: str, run: RunInfo | None, device: str | torch.device | None) -> tuple[Pipeline, str]:
    """(pipeline of a run folder, pipeline folder or hub id; a description of its source).

    A LoRA run gives its start model with the LoRA applied, at the size of training.

    Raises:
        ValueError: if it cannot be opened.
    """
    if run is None or Path(model).expanduser().resolve() != run.folder:
        return Pipeline.from_pretrained(model, device=device), model
    folder = run.folder / run.config.export
    if not folder.is_dir():
        raise ValueError(
            f"{model} has no {run.config.export}/ yet: the first checkpoint writes it; train it further, or name a "
            "pipeline folder"
        )
    if run.config.export == "pipeline":
        return Pipeline.from_pretrained(folder, device=device), str(folder)
    assert run.config.start_from is not None
    pipeline = Pipeline.from_pretrained(run.config.start_from, device=device)
    pipeline.load_lora(folder)
    resolution = run.config.data.resolution
    _, size, _ = pipeline.codec.latent_shape(resolution, resolution)
    pipeline.unet.config = dataclasses.replace(pipeline.unet.config, sample_size=size)
    for key in ("guidance_scale", "num_inference_steps", "sampler"):
        setattr(pipeline, key, getattr(run.config.sample, key))
    return pipeline, f"{run.config.start_from} with {folder}"


def uses_same_data(run: RunInfo, path: str) -> bool:
    """Whether a path is the data path of a run."""
    own = run.config.data.path
    return path == own or Path(path).expanduser().resolve() == Path(own).expanduser().resolve()


def data_config(run: RunInfo, **changes: str | float | None) -> DataConfig:
    """The data config of a run with changes; None leaves a key unchanged.

    Raises:
        ValueError: for another held-out fraction than in training: the model has seen some of those images.
    """
    held_out = changes.get("held_out")
    if held_out is not None and held_out != run.config.data.held_out:
        raise ValueError(
            f"held_out is {held_out}, but {run.folder} was trained with {run.config.data.held_out}: images that it has "
            "seen would count as held out; leave the option out"
        )
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(with_absolute_paths(run.config, run.folder).data, **given)  # type: ignore[arg-type]
