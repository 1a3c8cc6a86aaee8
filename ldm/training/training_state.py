"""What is trained, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm import checkpoint
from ldm.training.adversarial import AdversarialLoss
from ldm.training.codebook import Codebook
from ldm.training.files import tensors_hash
from ldm.training.optimizer import optimizer_tensors, restore_optimizer, trainable_names
from ldm.wrapped import plain_name, plain_names


@dataclass(frozen=True)
class TrainingState:
    """The network that is trained; a checkpoint holds what learns of it and leaves out what stays as it was.

    A first stage may have an adversary, whose discriminator learns too, with the same optimizer and without an average,
    and a codebook, whose use is counted.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    adversary: AdversarialLoss | None = None
    codebook: Codebook | None = None

    @property
    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        networks = [self.model] if self.adversary is None else [self.model, self.adversary.network]
        return [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]

    @property
    def trainable_parameters(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.learning)

    def discard_gradients(self) -> None:
        """Forgets a step that is not made."""
        self.model.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary.forget()
        if self.codebook is not None:
            self.codebook.forget()

    def trained(self, module: nn.Module) -> dict[str, Tensor]:
        """The weights in `module` (the network or its average) that learn."""
        state = plain_names(module.state_dict())
        assert len(state) == len(list(module.parameters())), "buffers would be lost"
        return {name: state[name] for name in trainable_names(self.model)}

    def load(self, module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Puts back what `trained` gave."""
        if set(weights) != set(trainable_names(self.model)):
            raise ValueError(f"{folder} holds other weights than those that this config trains; start a new run")
        stored = {plain_name(name): name for name in module.state_dict()}  # a part of it may be compiled
        module.load_state_dict({stored[name]: value for name, value in weights.items()}, strict=False)

    @cached_property
    def frozen_hash(self) -> str | None:
        """A hash of the weights that do not learn, since a checkpoint stands on them; None where all do."""
        names = set(trainable_names(self.model))
        others = {name: value for name, value in plain_names(self.model.state_dict()).items() if name not in names}
        return tensors_hash(others) if others else None

    def save(self, folder: Path) -> None:
        """Writes weights, average and moments into `folder`."""
        checkpoint.save_tensors(folder / "model.safetensors", self.trained(self.model))
        checkpoint.save_tensors(folder / "ema.safetensors", self.trained(self.ema.module))
        checkpoint.save_tensors(folder / "optimizer.safetensors", optimizer_tensors(self.model, self.optimizer))
        if self.codebook is not None:
            checkpoint.save_tensors(folder / "codebook.safetensors", self.codebook.state())
        if self.adversary is not None:
            network = self.adversary.network
            checkpoint.save_tensors(folder / "discriminator.safetensors", plain_names(network.state_dict()))
            moments = optimizer_tensors(network, self.optimizer)
            checkpoint.save_tensors(folder / "discriminator_optimizer.safetensors", moments)

    def restore(self, folder: Path, ema_updates: int, adversarial_weight: float | None) -> None:
        """Puts back what `save` wrote."""
        self.load(self.model, checkpoint.load_tensors(folder / "model.safetensors"), folder)
        self.load(self.ema.module, checkpoint.load_tensors(folder / "ema.safetensors"), folder)
        self.ema.n_averaged.fill_(ema_updates)
        restore_optimizer(self.model, self.optimizer, checkpoint.load_tensors(folder / "optimizer.safetensors"))
        if self.codebook is not None:
            self.codebook.restore(checkpoint.load_tensors(folder / "codebook.safetensors"))
        if self.adversary is None:
            return
        if adversarial_weight is None:
            raise ValueError(
                f"{folder} holds no discriminator, as that run had none; start a new run that goes on from its "
                "autoencoder: start_from"
            )
        network = self.adversary.network
        stored = {plain_name(name): name for name in network.state_dict()}
        weights = checkpoint.load_tensors(folder / "discriminator.safetensors")
        network.load_state_dict({stored[name]: value for name, value in weights.items()})
        restore_optimizer(
            network, self.optimizer, checkpoint.load_tensors(folder / "discriminator_optimizer.safetensors")
        )
        self.adversary.weight = adversarial_weight
