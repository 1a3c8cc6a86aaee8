"""What a checkpoint holds, and checkpoints on disk: once the first is written, there is always one that verifies."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm import disk, hub
from ldm.training.distributed import sum_over_processes
from ldm.training.trainable import optimizer_tensors, restore_optimizer, trainable_names
from ldm.weights import plain_name, plain_names, tensors_hash


class Adversary(Protocol):
    """A discriminator and the weight of its loss: `AdversarialLoss`."""

    weight: float

    @property
    def discriminator(self) -> nn.Module: ...

    def discard_gradients(self) -> None: ...


class CodebookTracker(Protocol):
    """The usage of a codebook: `Codebook`."""

    def figures(self) -> dict[str, float]: ...

    def reset_counts(self) -> None: ...

    def discard_step(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """The trained network, its optimizer and EMA. A checkpoint holds the trainable weights only."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    adversary: Adversary | None = None  # of an autoencoder; its discriminator has the same optimizer and no EMA
    codebook: CodebookTracker | None = None  # of a VQ autoencoder

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters, those of a discriminator included."""
        networks = [self.model] if self.adversary is None else [self.model, self.adversary.discriminator]
        return [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.trainable)

    def discard_gradients(self) -> None:
        """Drop everything that a step left behind which is not made."""
        self.model.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary.discard_gradients()
        if self.codebook is not None:
            self.codebook.discard_step()

    def trainable_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The trainable weights in `module` (the network or its EMA)."""
        weights = plain_names(module.state_dict())
        assert len(weights) == len(list(module.parameters())), "buffers would be lost"
        return {name: weights[name] for name in trainable_names(self.model)}

    @cached_property
    def frozen_hash(self) -> str | None:
        """Hash of the frozen weights, which a checkpoint depends on; None if there are none."""
        names = set(trainable_names(self.model))
        others = {name: value for name, value in plain_names(self.model.state_dict()).items() if name not in names}
        return tensors_hash(others) if others else None

    def save(self, folder: Path) -> None:
        """Write weights, EMA and optimizer into `folder`."""
        hub.save_tensors(folder / "model.safetensors", self.trainable_weights(self.model))
        hub.save_tensors(folder / "ema.safetensors", self.trainable_weights(self.ema.module))
        hub.save_tensors(folder / "optimizer.safetensors", optimizer_tensors(self.model, self.optimizer))
        if self.codebook is not None:
            hub.save_tensors(folder / "codebook.safetensors", self.codebook.state_dict())
        if self.adversary is not None:
            network = self.adversary.discriminator
            hub.save_tensors(folder / "discriminator.safetensors", plain_names(network.state_dict()))
            moments = optimizer_tensors(network, self.optimizer)
            hub.save_tensors(folder / "discriminator_optimizer.safetensors", moments)

    def restore(self, folder: Path, ema_updates: int, adversarial_weight: float | None) -> None:
        """Load what `save` wrote."""
        for module, name in ((self.model, "model"), (self.ema.module, "ema")):
            weights = hub.load_tensors(folder / f"{name}.safetensors")
            if set(weights) != set(trainable_names(self.model)):
                raise ValueError(f"{folder} holds other weights than this config trains; start a new run")
            load_weights(module, weights)
        self.ema.n_averaged.fill_(ema_updates)
        restore_optimizer(self.model, self.optimizer, hub.load_tensors(folder / "optimizer.safetensors"))
        if self.codebook is not None:
            self.codebook.load_state_dict(hub.load_tensors(folder / "codebook.safetensors"))
        if self.adversary is None:
            return
        if adversarial_weight is None:
            raise ValueError(
                f"{folder} holds no discriminator, as that run had none; start a new run from its autoencoder: "
                "start_from"
            )
        network = self.adversary.discriminator
        weights = hub.load_tensors(folder / "discriminator.safetensors")
        if weights.keys() != {plain_name(name) for name in network.state_dict()}:
            raise ValueError(f"{folder} holds another discriminator than this config describes; start a new run")
        load_weights(network, weights)
        moments = hub.load_tensors(folder / "discriminator_optimizer.safetensors")
        restore_optimizer(network, self.optimizer, moments)
        self.adversary.weight = adversarial_weight


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights by their plain names: parts of the module may be compiled. Others stay as they are."""
    stored = {plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({stored[name]: value for name, value in weights.items()}, strict=False)


PREFIX = "step_"
MANIFEST = "manifest.json"


def resume_command(run: Path) -> str:
    """The command line that resumes a run."""
    return f"ldm train --resume {shlex.quote(str(run))}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first. Copies under other names are ignored."""
    named = [path for path in run.glob(f"checkpoints/{PREFIX}*") if re.fullmatch(PREFIX + r"\d{8,}", path.name)]
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=checkpoint_step)


def describe_newest(run: Path) -> str:
    """The newest checkpoint, for an error message."""
    newest = list_checkpoints(run)[-1:]
    return f"the newest checkpoint is {newest[0]}" if newest else "there is no earlier checkpoint"


# ---- hashes of files


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path → size and SHA-256 of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first file in which two results of `file_hashes` differ, or None."""
    return next((name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)), None)


def find_damage(folder: Path, manifest: str = MANIFEST) -> str | None:
    """The first file that differs from the manifest, or None. Extra files other than weights and JSON are allowed."""
    try:
        files = hub.read_json(folder / manifest)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest}: {error}"
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.json"))):
        name = path.relative_to(folder).as_posix()
        if name not in expected and name != manifest:
            return f"{name} is not in {manifest}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{name} has changed"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing


def write_checkpoint(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder by `fill`, with a manifest of sizes and hashes, and verify it by reading it back. Raises OSError
    if the disk fails; no partial checkpoint is left.

    An existing file or folder of that name, which is no valid checkpoint, is renamed like a damaged one.
    """
    run = target.parents[1]
    try:
        if target.exists() or target.is_symlink():
            rename_damaged([target])
        with disk.new_folder(target) as folder:
            fill(folder)
            disk.sync_tree(folder)
            hub.write_json(folder / MANIFEST, {"files": file_hashes(folder)})  # the last file
        damage = find_damage(target)
        if damage is not None:
            disk.remove_folder(target)
            raise OSError(f"it does not read back as it was written: {damage}")
    except OSError as error:
        raise OSError(
            f"the checkpoint of step {checkpoint_step(target)} cannot be written ({error}); {describe_newest(run)}; "
            f"fix that, and resume with {resume_command(run)}"
        ) from error


def prune_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and those of every `keep_every`-th step.

    Checkpoints with files outside their manifest stay, but for those that systems add.
    """
    for old in list_checkpoints(run)[:-keep]:
        if keep_every is not None and checkpoint_step(old) % keep_every == 0:
            continue
        with suppress(ValueError, KeyError, AttributeError):  # unknown files stay
            named = hub.read_json(old / MANIFEST)["files"].keys() | {MANIFEST}
            files = (path for path in old.rglob("*") if not path.is_dir() and path.name not in hub.OS_FILES)
            if all(path.relative_to(old).as_posix() in named for path in files):
                disk.remove_folder(old)


def rename_damaged(damaged: list[Path]) -> None:
    """Rename damaged checkpoints, so that a new one of the same step can be written."""
    for folder in damaged:
        taken = {path.name for path in folder.parent.iterdir()}
        endings = ("", *(f".{i}" for i in range(2, 10**6)))
        folder.rename(folder.with_name(next(n for i in endings if (n := f"damaged.{folder.name}{i}") not in taken)))


# ---- finding


def find_checkpoint(accelerator: Accelerator, run: Path, log: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """(newest intact checkpoint or None, damaged newer ones), found by the main process and sent to all. Raises
    ValueError in each process, if there are checkpoints but none is intact.
    """
    newest: Path | None = None
    damaged: list[Path] = []
    folders = list_checkpoints(run) if accelerator.is_main_process else []
    for folder in reversed(folders):
        try:
            step = hub.read_json(folder / "training" / "state.json").get("step")
            wrong_step = None if step == checkpoint_step(folder) else f"it was made at step {step}"
        except ValueError as error:
            wrong_step = str(error)
        damage = find_damage(folder) or wrong_step
        if damage is None:
            newest = folder
            break
        log(f"{folder} is damaged ({damage}); using the one before")
        damaged.append(folder)
    found = checkpoint_step(newest) if newest else -2 if folders else -1
    (step,) = sum_over_processes(accelerator, [found if accelerator.is_main_process else 0])
    if step == -2:
        raise ValueError(
            f"no checkpoint in {run / 'checkpoints'} is intact; restore one from a copy, or start a new run by leaving "
            "--resume out"
        )
    return (None if step == -1 else checkpoint_folder(run, step)), damaged
