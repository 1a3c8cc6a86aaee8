"""The discriminator's part in first-stage training: what it learns, what the autoencoder learns from it, how much."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.config import AutoencoderLossConfig
from ldm.models import PatchDiscriminator, discriminator_loss, generator_loss

DELTA = 1e-6


class AdversarialTerms(NamedTuple):
    """What becomes of a micro-batch under a discriminator.

    Attributes:
        gradient: at the reconstructions, of what the autoencoder minimises in them, [B, 3, H, W].
        generator, discriminator: the losses of both sides, [B] each; the second has a gradient for the discriminator
            alone, the first none.
        weight: by which the generator's loss is multiplied.
    """

    gradient: Tensor
    generator: Tensor
    discriminator: Tensor
    weight: float


class AdversarialLoss:
    """A discriminator, and the weight of its opinion.

    The adaptive weight (VQGAN, arXiv:2012.09841, Eq. 7) is the ratio of the gradients that distance and generator loss
    have at the last layer of the decoder. Those gradients are summed over the micro-batches and processes of a step
    before their norms are taken, since a mean of ratios would depend on how a batch is cut. They are known when the
    step is over, so the weight is used in the next: at its first step the discriminator learns and is not yet heeded.

    Args:
        network: the discriminator.
        prepared: the same as accelerate gave it back, whose backward pass gathers gradients from all processes.

    Attributes:
        weight: the adaptive weight of the next step; 0 before there was one. Part of what a checkpoint keeps.
    """

    def __init__(self, network: PatchDiscriminator, prepared: nn.Module, config: AutoencoderLossConfig) -> None:
        self.network = network
        self.weight = 0.0
        self._prepared = prepared
        self._config = config
        self._wishes: list[Tensor] = []  # of the micro-batches of this step

    def judge(
        self, images: Tensor, reconstruction: Tensor, seen: Tensor, distance: Tensor, last_layer: Tensor
    ) -> AdversarialTerms:
        """What both networks learn from images [B, 3, H, W] and their reconstructions.

        Args:
            seen: `reconstruction` cut from the autoencoder: a leaf that needs a gradient.
            distance: of `seen` to the images, a function of `seen`, [B].
            last_layer: the weight of the autoencoder that made `reconstruction`, of which it is still a function.
        """
        kind = self._config.adversarial
        # The network itself, not what gathers gradients; and of this pass only the gradient at `seen` is computed.
        generator = generator_loss(self.network(seen), kind)
        (pull,) = torch.autograd.grad(distance.mean(), seen)
        (push,) = torch.autograd.grad(generator.mean(), seen)
        at_last_layer = [
            torch.autograd.grad(reconstruction, last_layer, wish, retain_graph=True)[0].flatten()
            for wish in (pull, push)
        ]
        self._wishes.append(torch.stack(at_last_layer))  # [2, P]
        logits = self._prepared(torch.cat([images, seen.detach()]))  # [2 B, 1, h, w]: one call, one backward pass
        of_images, of_fakes = logits.chunk(2)
        weight = self._config.adversarial_weight * self.weight
        return AdversarialTerms(
            gradient=pull + weight * push,
            generator=generator.detach(),
            discriminator=discriminator_loss(of_images, of_fakes, kind),
            weight=weight,
        )

    def settle(self, accelerator: Accelerator, moved: bool) -> None:
        """Ends a step: the weight of the next one, the same in all processes, which all have to call this.

        Args:
            moved: whether the step was made; a step that was skipped leaves the weight as it was.
        """
        options, self._wishes = self._wishes, []
        if not options or not moved:
            return
        mean = torch.stack(options).mean(dim=0)
        if accelerator.num_processes > 1:
            extract = accelerator.reduce(mean, "mean")
            assert isinstance(extract, Tensor)
            mean = extract
        pull, push = mean.double().norm(dim=1).tolist()
        self.weight = min(pull / (push + DELTA), self._config.adaptive_weight_limit)

    def forget(self) -> None:
        """Drops the gradients of a step that is not made."""
        self.network.zero_grad(set_to_none=True)
        self._wishes = []
