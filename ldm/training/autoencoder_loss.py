"""The loss of an autoencoder: reconstruction, perceptual distance, regularization, discriminator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.config import AutoencoderLossConfig
from ldm.models import (
    PatchDiscriminator,
    PerceptualDistance,
    Quantized,
    discriminator_loss,
    generator_loss,
    kl_divergence,
)
from ldm.training.distributed import StepLosses

DELTA = 1e-6


def autoencoder_loss(
    images: Tensor,
    reconstruction: Tensor,
    latents: Tensor | Quantized,
    *,
    loss: AutoencoderLossConfig,
    perceptual: PerceptualDistance | None,
    adversary: AdversarialLoss | None,
    last_layer: Tensor,
    regularize: bool = True,
) -> StepLosses:
    """LDM (arXiv:2112.10752), Eq. 25: distance + regularization, and optionally an adversarial term.

    `values` hold distance and regularization. The adversarial term measures no quality, so it is only in `figures`
    (like every term, unweighted) and in `objectives`.

    Args:
        images, reconstruction: [B, 3, H, W] in [−1, 1].
        latents: second output of the autoencoder: moments [B, 2C, h, w], or quantized latents.
        adversary: None without a discriminator and before its start.
        last_layer: weight of the last layer of the decoder.
        regularize: False if the encoder is frozen.
    """
    regularization, figures = (
        regularization_loss(images, latents, loss) if regularize else (images.new_zeros(len(images)), {})
    )
    detached = reconstruction if adversary is None else reconstruction.detach().requires_grad_()
    terms = distance_terms(images, detached, loss, perceptual)
    distance = terms["loss_reconstruction"]
    if perceptual is not None:
        distance = distance + loss.perceptual_weight * terms["loss_perceptual"]
    values = distance + regularization
    figures = terms | figures
    if adversary is None:
        return StepLosses(values, figures=figures)
    adversarial = adversary(images, reconstruction, detached, distance, last_layer)
    figures["loss_generator"], figures["loss_discriminator"] = adversarial.generator, adversarial.discriminator
    figures["adversarial_weight"] = values.new_tensor(adversarial.weight)
    # The inner product has the gradient found at the reconstructions and carries it into the autoencoder in one
    # backward pass. The two objectives share no parameter.
    generator = (reconstruction * adversarial.gradient).sum() + regularization.mean()
    return StepLosses(values, figures=figures, objectives=(generator, adversarial.discriminator.mean()))


def regularization_loss(
    images: Tensor, latents: Tensor | Quantized, loss: AutoencoderLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted regularization of the latents [B], unweighted figures to log)."""
    if isinstance(latents, Quantized):
        weighted = loss.codebook_weight * latents.codebook + loss.commitment_weight * latents.commitment
        return weighted, {"loss_quantisation": latents.codebook}  # both are the same number
    divergence = kl_divergence(latents) / images[0].numel()
    return loss.kl_weight * divergence, {"loss_kl": divergence}


def distance_terms(
    images: Tensor, reconstruction: Tensor, loss: AutoencoderLossConfig, perceptual: PerceptualDistance | None
) -> dict[str, Tensor]:
    """Unweighted distances between images [B, 3, H, W] and reconstructions: name → [B]."""
    error = images - reconstruction
    error = error.abs() if loss.reconstruction == "l1" else error.square()
    terms = {"loss_reconstruction": error.flatten(1).mean(dim=1)}
    return terms if perceptual is None else terms | {"loss_perceptual": perceptual(images, reconstruction)}


class AdversarialTerms(NamedTuple):
    """Adversarial terms of a micro-batch.

    Attributes:
        gradient: of the autoencoder's objective with respect to the reconstructions, [B, 3, H, W].
        generator: loss of the generator, [B], detached.
        discriminator: loss of the discriminator, [B], with a gradient for the discriminator alone.
        weight: factor of the generator loss.
    """

    gradient: Tensor
    generator: Tensor
    discriminator: Tensor
    weight: float


class AdversarialLoss:
    """A discriminator and the adaptive weight of its loss.

    The weight (VQGAN, arXiv:2012.09841, Eq. 7) is the ratio of the gradient norms of distance and generator loss at the
    last layer of the decoder. Gradients are averaged over the micro-batches and processes of a step before the norms
    are taken, so that the weight does not depend on how a batch is split. It is known at the end of a step and applied
    in the next: the first step trains the discriminator alone.

    Args:
        discriminator: the network.
        prepared: the same network as accelerate returned it, whose backward pass reduces gradients over processes.

    Attributes:
        weight: adaptive weight of the next step; 0 before the first. Stored in checkpoints.
    """

    def __init__(self, discriminator: PatchDiscriminator, prepared: nn.Module, config: AutoencoderLossConfig) -> None:
        self.discriminator = discriminator
        self.weight = 0.0
        self._prepared = prepared
        self._config = config
        self._last_layer_grads: list[Tensor] = []  # of the micro-batches of this step

    def __call__(
        self, images: Tensor, reconstruction: Tensor, detached: Tensor, distance: Tensor, last_layer: Tensor
    ) -> AdversarialTerms:
        """Losses of both networks for images [B, 3, H, W] and their reconstructions.

        Args:
            detached: `reconstruction` as a leaf that requires a gradient.
            distance: of `detached` to the images, [B].
            last_layer: weight of the autoencoder that made `reconstruction`.
        """
        kind = self._config.adversarial
        # The network itself, without gradient reduction: of this pass only the gradient at `detached` is computed.
        generator = generator_loss(self.discriminator(detached), kind)
        (rec_grad,) = torch.autograd.grad(distance.mean(), detached)
        (gan_grad,) = torch.autograd.grad(generator.mean(), detached)
        last_layer_grads = [
            torch.autograd.grad(reconstruction, last_layer, grad, retain_graph=True)[0].flatten()
            for grad in (rec_grad, gan_grad)
        ]
        self._last_layer_grads.append(torch.stack(last_layer_grads))  # [2, P]
        logits = self._prepared(torch.cat([images, detached.detach()]))  # [2 B, 1, h, w]: one call, one backward pass
        real, fake = logits.chunk(2)
        weight = self._config.adversarial_weight * self.weight
        return AdversarialTerms(
            gradient=rec_grad + weight * gan_grad,
            generator=generator.detach(),
            discriminator=discriminator_loss(real, fake, kind),
            weight=weight,
        )

    def update_weight(self, accelerator: Accelerator, stepped: bool) -> None:
        """Compute the weight of the next step, the same in all processes. A collective call.

        Args:
            stepped: False for a skipped step, which leaves the weight unchanged.
        """
        grads, self._last_layer_grads = self._last_layer_grads, []
        if not grads or not stepped:
            return
        mean = torch.stack(grads).mean(dim=0)
        if accelerator.num_processes > 1:
            reduced = accelerator.reduce(mean, "mean")
            assert isinstance(reduced, Tensor)
            mean = reduced
        rec_norm, gan_norm = mean.double().norm(dim=1).tolist()
        self.weight = min(rec_norm / (gan_norm + DELTA), self._config.adaptive_weight_limit)

    def discard_gradients(self) -> None:
        self.discriminator.zero_grad(set_to_none=True)
        self._last_layer_grads = []
