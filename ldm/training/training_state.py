"""The networks and optimizer of a run, and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm import hub
from ldm.training.autoencoder_loss import AdversarialLoss
from ldm.training.codebook import Codebook
from ldm.training.trainable import optimizer_tensors, restore_optimizer, trainable_names
from ldm.weights import plain_name, plain_names, tensors_hash


@dataclass(frozen=True)
class TrainingState:
    """The trained network, its optimizer and EMA. A checkpoint holds the trainable weights only.

    Attributes:
        adversary: of an autoencoder; its discriminator has the same optimizer and no EMA.
        codebook: usage tracker of a VQ autoencoder.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    adversary: AdversarialLoss | None = None
    codebook: Codebook | None = None

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

    def load(self, module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Load what `trainable_weights` returned."""
        if set(weights) != set(trainable_names(self.model)):
            raise ValueError(f"{folder} holds other weights than this config trains; start a new run")
        stored = {plain_name(name): name for name in module.state_dict()}  # parts of it may be compiled
        module.load_state_dict({stored[name]: value for name, value in weights.items()}, strict=False)

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
        self.load(self.model, hub.load_tensors(folder / "model.safetensors"), folder)
        self.load(self.ema.module, hub.load_tensors(folder / "ema.safetensors"), folder)
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
        stored = {plain_name(name): name for name in network.state_dict()}
        weights = hub.load_tensors(folder / "discriminator.safetensors")
        network.load_state_dict({stored[name]: value for name, value in weights.items()})
        moments = hub.load_tensors(folder / "discriminator_optimizer.safetensors")
        restore_optimizer(network, self.optimizer, moments)
        self.adversary.weight = adversarial_weight
