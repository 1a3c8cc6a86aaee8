"""Information about a trained model: the run it belongs to, and whether its data is unchanged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import hub
from ldm.config import LDMConfig, read_yaml
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, DataConfig
from ldm.pipelines import Pipeline
from ldm.training.checkpoints import checkpoint_step, list_checkpoints
from ldm.training.resume import data_differences, data_fingerprint, flatten
from ldm.training.run_folder import PATH_KEYS, START_FILE, is_relative_path

CONFIG = "config.yaml"
# Of a built-in model: number and fingerprint of its training images; for scenes also how many it was shown.
DATA = "data.json"
# RUN/pipeline, RUN/best/pipeline and RUN/checkpoints/step_…/pipeline.
MAX_DEPTH = 3


@dataclass(frozen=True)
class RunInfo:
    """The run that made a model. None is unknown, as before the first checkpoint."""

    folder: Path
    config: LDMConfig
    samples: int | None  # number of its images
    sha256: str | None  # their `data_fingerprint`
    scenes: int | None = None  # how many it and the models that it continues were shown at most, from number 0 on

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


def base_folder(run: Path, content: Mapping[str, Any], overridden: Collection[str] = ()) -> Path:
    """The folder that a run's relative paths are read from: where it was started, or the working folder if the files
    have moved there. Raises ValueError if a path in `content`, its config, exists in neither and is not overridden.
    """
    here = Path.cwd()
    if not (run / START_FILE).is_file():  # an older version
        return here
    stored = hub.read_json(run / START_FILE)
    then, paths = Path(stored.get("folder", here)), stored.get("paths", {})
    given = flatten(content)
    needed = {key: path for key, path in paths.items() if key not in overridden and given.get(key) == path}
    if not needed or then == here:
        return here
    missing = [key for key, path in needed.items() if not is_relative_path(path, then)]
    if not missing:
        return then
    if all(is_relative_path(path, here) for path in needed.values()):
        return here
    raise ValueError(
        f"{missing[0]} of {run} is {needed[missing[0]]}, relative to {then}, where the run was started, and no longer "
        f"exists there; restore it, change to the folder where it is now, or set --set {missing[0]}=PATH"
    )


def with_absolute_paths(config: LDMConfig, run: Path) -> LDMConfig:
    """The config of a run, with absolute paths of data and start model if it was started in another folder. Raises
    ValueError as `base_folder`.
    """
    base = base_folder(run, dataclasses.asdict(config), set(PATH_KEYS) - {"data.path", "start_from"})
    if base == Path.cwd():
        return config
    if is_relative_path(config.data.path, base):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(base / config.data.path)))
    if config.start_from is not None and is_relative_path(config.start_from, base):
        config = dataclasses.replace(config, start_from=str(base / config.start_from))
    return config


def find_run(model: str) -> RunInfo | None:
    """The run that a folder is, or lies in; None for other folders and for hub ids. Raises ValueError for the run of a
    first stage, and for an unreadable config.
    """
    if model in hub.BUILT_IN_PIPELINES:
        folder = hub.BUILT_IN_PIPELINES[model]
        if not (folder / CONFIG).is_file():
            return None
        config, data = load_config(folder / CONFIG, [], LDMConfig), hub.read_json(folder / DATA)
        scenes = data.get("scenes", scenes_after(config, config.train.max_steps))
        return RunInfo(folder, config, data["samples"], data["sha256"], scenes)
    where = Path(model).expanduser().resolve()
    if not where.is_dir():
        return None
    for run in (where, *where.parents[:MAX_DEPTH]):
        inside = where.relative_to(run).parts
        is_of_run = inside in ((), ("pipeline",), ("best", "pipeline")) or (
            len(inside) == MAX_DEPTH and inside[0] == "checkpoints" and inside[2] == "pipeline"
        )
        if is_of_run and (run / CONFIG).is_file():
            break
    else:
        return None
    folder, path = run, run / CONFIG
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


def scenes_after(config: LDMConfig, steps: int) -> int | None:
    """How many scenes a run has shown after `steps`, with those before `data.first_scene`; blocks that have begun
    count as a whole. None if its data is not scenes.
    """
    data = config.data
    if data.path != "scenes":
        return None
    blocks = math.ceil(steps * config.train.batch_size / (data.scenes * data.renew_every))
    return data.first_scene + blocks * data.scenes


def open_model(model: str, run: RunInfo | None, device: str | torch.device | None) -> tuple[Pipeline, str]:
    """(pipeline of a run folder, pipeline folder or hub id; a description of its source). Raises ValueError if it
    cannot be opened.

    A LoRA run gives its start model with the LoRA applied, at the size of training.
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
    """The data config of a run with changes; None leaves a key unchanged. Raises ValueError for another held-out
    fraction than in training: the model has seen some of those images.
    """
    held_out = changes.get("held_out")
    if held_out is not None and held_out != run.config.data.held_out:
        raise ValueError(
            f"held_out is {held_out}, but {run.folder} was trained with {run.config.data.held_out}: images that it has "
            "seen would count as held out; leave the option out"
        )
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(with_absolute_paths(run.config, run.folder).data, **given)  # type: ignore[arg-type]
