"""What `train_autoencoder` uses: networks, their loss, the use of a codebook, export, validation, grids."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm import hub
from ldm.config import AutoencoderLossConfig, AutoencoderTrainingConfig, check_autoencoder, section_name
from ldm.data import Batch, CaptionedImages, generator, to_signed
from ldm.models import (
    AutoencoderKL,
    FirstStage,
    PatchDiscriminator,
    PerceptualDistance,
    Quantized,
    VectorQuantizer,
    VQConfig,
    VQModel,
    codebook_usage,
    discriminator_loss,
    enable_gradient_checkpointing,
    generator_loss,
    kl_divergence,
)
from ldm.models.similarity import psnr
from ldm.pipelines import contact_sheet, to_pil
from ldm.training.distributed import StepLosses
from ldm.training.setup import load_first_stage

BATCH_SIZE = 32
DELTA = 1e-6  # VQGAN, Eq. 7
GRID_IMAGES = 12
# Config keys that depend on data and training, and may differ in `start_from`.
_NOT_OF_SHAPE = {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}


def make_autoencoder(config: AutoencoderTrainingConfig) -> FirstStage:
    """The autoencoder of the config, with trainable parameters marked. Raises ValueError if `start_from` cannot be
    opened or does not fit the config.

    With `trained: all`, latents get new statistics (see `export_autoencoder`). With `trained: decoder`, encoder,
    `quant_conv`, codebook and config are unchanged, so models on these latents keep working.
    """
    autoencoder: FirstStage
    if config.start_from is None:
        network = config.network
        assert network is not None
        autoencoder = VQModel(network) if isinstance(network, VQConfig) else AutoencoderKL(network)
    else:
        autoencoder = load_first_stage(config.start_from).autoencoder
        found = autoencoder.config
        described = config.network or found
        section, where = section_name(described), f"{config.start_from} (start_from)"
        out = f"leave {section} out, or set it to null"
        if type(described) is not type(found):
            raise ValueError(
                f"{section} describes {described.diffusers_class}, but {where} is {found.diffusers_class}; {out}"
            )
        for key, value in described.to_dict().items():
            if key not in _NOT_OF_SHAPE and value != found.to_dict()[key]:
                raise ValueError(f"{section}.{key} is {value}, but {where} has {found.to_dict()[key]}; {out}")
        try:
            check_autoencoder(found, config.trained)
            config.check_regularizer(found)
        except ValueError as error:
            raise ValueError(f"{where} cannot be trained: {error}") from None
    if config.trained == "decoder":
        autoencoder.requires_grad_(False)
        autoencoder.decoder.requires_grad_(True)
        if autoencoder.post_quant_conv is not None:
            autoencoder.post_quant_conv.requires_grad_(True)
    else:
        autoencoder.requires_grad_(True)
        without_statistics = autoencoder.config.without_statistics()
        autoencoder.config = dataclasses.replace(without_statistics, sample_size=config.data.resolution)
    enable_gradient_checkpointing(autoencoder, config.train.gradient_checkpointing)
    return autoencoder


def make_codebook(
    config: AutoencoderTrainingConfig, autoencoder: FirstStage, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> Codebook | None:
    """The codebook usage tracker; None for KL autoencoders and frozen codes."""
    if not isinstance(autoencoder, VQModel) or not autoencoder.quantize.embedding.weight.requires_grad:
        return None
    assert isinstance(averaged, VQModel)
    return Codebook(
        autoencoder.quantize, averaged.quantize, optimizer, seed=config.seed, revive_after=config.revive_codes_after
    )


def export_autoencoder(
    folder: Path,
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    device: torch.device,
) -> None:
    """Write the autoencoder, with the statistics of its latents folded in: see `fold_statistics`.

    Mean and std per channel are taken over all training images and their posteriors, in float64. A trained decoder
    leaves the latents unchanged, so nothing is folded.
    """
    assert isinstance(averaged, FirstStage)
    if config.trained == "decoder":
        hub.save_model(folder, averaged)
        return
    autoencoder = copy.deepcopy(averaged)
    channels = autoencoder.channels
    first, second, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for batch in _batches(images, device, len(images)):
        with torch.no_grad():
            mean, square = autoencoder.expectations(autoencoder.encode(batch).double().cpu())  # [B, C, h, w]
        first += mean.sum(dim=(0, 2, 3))
        second += square.sum(dim=(0, 2, 3))
        count += mean[:, 0].numel()
    channel_mean = first / count
    std = (second / count - channel_mean.square()).clamp(min=1e-12).sqrt()  # Var[z] = E[z²] − E[z]²
    autoencoder.fold_statistics(channel_mean, std)
    hub.save_model(folder, autoencoder)


@torch.no_grad()
def held_out_metrics(
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    perceptual: PerceptualDistance | None,
    device: torch.device,
) -> dict[str, float]:
    """Means over held-out images: `held_out_psnr` in dB, and `held_out_perceptual` if trained with that distance."""
    batches = _batches(images, device, config.train.validation_samples)
    measured = [reconstruction_metrics(averaged, batch, perceptual) for batch in batches]
    return {f"held_out_{name}": float(torch.cat([m[name] for m in measured]).mean()) for name in measured[0]}


@torch.no_grad()
def reconstruction_metrics(
    averaged: nn.Module, images: Tensor, perceptual: PerceptualDistance | None
) -> dict[str, Tensor]:
    """Of reconstructions (by the posterior mean) of images [B, 3, H, W]: `psnr` in dB and `perceptual`, [B] each."""
    assert isinstance(averaged, FirstStage)
    reconstruction = averaged(images)[0].clamp(-1, 1)
    figures = {"psnr": psnr(images, reconstruction)}
    return figures if perceptual is None else figures | {"perceptual": perceptual(images, reconstruction)}


@torch.no_grad()
def reconstruction_grid(averaged: nn.Module, images: CaptionedImages, device: torch.device) -> Image.Image:
    """Up to twelve images, spread evenly over the data set, above their reconstructions."""
    assert isinstance(averaged, FirstStage)
    count = min(GRID_IMAGES, len(images))
    originals, reconstructions = [], []
    for i in range(count):  # one by one, since their sizes differ
        image = _stack(images, [i * len(images) // count], device)
        originals += to_pil(image)
        reconstructions += to_pil(averaged(image)[0])
    return contact_sheet([originals, reconstructions], ["images", "reconstructions"])


def pixels(batch: Batch, device: torch.device) -> Tensor:
    assert batch.images is not None
    return to_signed(batch.images).to(device)  # [B, 3, h, w]


def _batches(images: CaptionedImages, device: torch.device, limit: int) -> Iterator[Tensor]:
    for chunk in images.chunks(BATCH_SIZE, limit):
        yield _stack(images, chunk, device)


def _stack(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]


# ---- the loss, the adaptive weight of a discriminator, the use of a codebook


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
    regularization, figures = images.new_zeros(len(images)), {}
    if isinstance(latents, Quantized) and regularize:
        regularization = loss.codebook_weight * latents.codebook + loss.commitment_weight * latents.commitment
        figures["loss_quantisation"] = latents.codebook  # both are the same number
    elif isinstance(latents, Tensor) and regularize:
        figures["loss_kl"] = kl_divergence(latents) / images[0].numel()
        regularization = loss.kl_weight * figures["loss_kl"]
    detached = reconstruction if adversary is None else reconstruction.detach().requires_grad_()
    error = images - detached
    error = error.abs() if loss.reconstruction == "l1" else error.square()
    distance = error.flatten(1).mean(dim=1)  # [B]
    terms = {"loss_reconstruction": distance}
    if perceptual is not None:
        terms["loss_perceptual"] = perceptual(images, detached)
        distance = distance + loss.perceptual_weight * terms["loss_perceptual"]
    values, figures = distance + regularization, terms | figures
    if adversary is None:
        return StepLosses(values, figures=figures)
    gradient, generator, discriminator, weight = adversary(images, reconstruction, detached, distance, last_layer)
    figures |= {"loss_generator": generator, "loss_discriminator": discriminator}
    figures["adversarial_weight"] = values.new_tensor(weight)
    # The inner product has the gradient found at the reconstructions and carries it into the autoencoder in one
    # backward pass. The two objectives share no parameter.
    objective = (reconstruction * gradient).sum() + regularization.mean()
    return StepLosses(values, figures=figures, objectives=(objective, discriminator.mean()))


class AdversarialLoss:
    """A discriminator and the adaptive weight of its loss.

    The weight (VQGAN, arXiv:2012.09841, Eq. 7) is the ratio of the gradient norms of distance and generator loss at the
    last layer of the decoder. Gradients are averaged over the micro-batches and processes of a step before the norms
    are taken, so that the weight does not depend on how a batch is split. It is known at the end of a step and applied
    in the next: the first step trains the discriminator alone.

    Args:
        prepared: the discriminator as accelerate returned it, whose backward pass reduces gradients over processes.

    Attributes:
        weight: adaptive weight of the next step; 0 before the first. Stored in checkpoints.
    """

    def __init__(self, discriminator: PatchDiscriminator, prepared: nn.Module, config: AutoencoderLossConfig) -> None:
        self.discriminator = discriminator
        self.weight = 0.0
        self._prepared, self._config = prepared, config
        self._last_layer_grads: list[Tensor] = []  # of the micro-batches of this step

    def __call__(
        self, images: Tensor, reconstruction: Tensor, detached: Tensor, distance: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Losses of both networks for images [B, 3, H, W] and their reconstructions.

        Args:
            detached: `reconstruction` as a leaf that requires a gradient.
            distance: of `detached` to the images, [B].
            last_layer: weight of the autoencoder that made `reconstruction`.

        Returns:
            The gradient of the autoencoder's objective with respect to the reconstructions [B, 3, H, W], the losses of
            the generator [B], detached, and of the discriminator [B], and the factor of the generator loss.
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
        return rec_grad + weight * gan_grad, generator.detach(), discriminator_loss(real, fake, kind), weight

    def update_weight(self, accelerator: Accelerator, stepped: bool) -> None:
        """Compute the weight of the next step, the same in all processes. A collective call; a skipped step leaves
        the weight unchanged.
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


class Codebook:
    """Counts code usage over the batches of all processes and revives dead codes.

    A code that is nearest to no latent has no gradient. After `revive_after` unused steps (None: never) it is moved to
    a latent of the batch, sampled with probability proportional to its squared distance from its code, as k-means++
    samples its centers (Arthur and Vassilvitskii 2007); its EMA too, and its moments in the optimizer are reset.
    Samples are keyed, so the number of processes or micro-batches does not matter. All codes count as unused at first:
    after one step the codebook lies among the latents.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        averaged: VectorQuantizer,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        revive_after: int | None,
    ) -> None:
        self.codes = quantizer.embedding.weight  # [K, C]
        # Steps since each code was last used [K], its usage since the last log line [K], and revived codes since then.
        self.unused = torch.full((len(self.codes),), revive_after or 0, device=self.codes.device)
        self.counts = torch.zeros_like(self.unused)
        self.revived = torch.zeros((), dtype=torch.int64)
        self._averaged = averaged.embedding.weight
        self._optimizer = optimizer
        self._seed, self._revive_after = seed, revive_after
        # Of this step: quantized latents, and the epoch and id of each sample.
        self._micro_batches: list[tuple[Quantized, Sequence[int], Sequence[str]]] = []

    def add(self, quantized: Quantized, epochs: Sequence[int], ids: Sequence[str]) -> None:
        """Add a micro-batch of the present step."""
        detached = Quantized(*(tensor.detach() for tensor in quantized))
        self._micro_batches.append((detached, epochs, ids))

    def discard_step(self) -> None:
        self._micro_batches = []

    @torch.no_grad()
    def end_step(self, accelerator: Accelerator, step: int, stepped: bool) -> None:
        """Count used codes and revive dead ones, the same in all processes. A collective call; a skipped `step`
        (0-based) changes nothing.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not stepped:
            return
        indices = torch.cat([quantized.indices.flatten() for quantized, _, _ in micro_batches])
        counts = torch.bincount(indices, minlength=len(self.codes))
        if accelerator.num_processes > 1:
            summed = accelerator.reduce(counts, "sum")
            assert isinstance(summed, Tensor)
            counts = summed
        self.counts += counts
        self.unused = torch.where(counts > 0, 0, self.unused + 1)
        if self._revive_after is None:
            return
        dead = (self.unused >= self._revive_after).nonzero().flatten()
        if not len(dead):
            return
        keyed = torch.cat([_keyed_latents(*micro_batch, self._seed, step) for micro_batch in micro_batches])
        latents = _smallest_keys(accelerator, keyed, len(dead)).to(self.codes)
        rows = dead[: len(latents)]  # with fewer latents than dead codes the rest wait
        self.codes[rows] = latents
        self._averaged[rows] = latents
        for moment in self._optimizer.state.get(self.codes, {}).values():
            if moment.shape == self.codes.shape:
                moment[rows] = 0
        self.unused[rows] = 0
        self.revived += len(rows)

    def figures(self) -> dict[str, float]:
        """Perplexity, used fraction and number of revived codes since the last log line."""
        if not bool(self.counts.any()):  # every step was skipped
            return {}
        usage = codebook_usage(self.counts)
        return {
            "codebook_perplexity": usage.perplexity,
            "codebook_used": usage.used,
            "codes_revived": int(self.revived),
        }

    def reset_counts(self) -> None:
        """Start a new log interval."""
        self.counts.zero_()
        self.revived.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"unused": self.unused, "counts": self.counts, "revived": self.revived}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert state["unused"].shape == self.unused.shape, "a resumed run has the same codebook"
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _smallest_keys(accelerator: Accelerator, keyed: Tensor, max_count: int) -> Tensor:
    """Up to `max_count` latents of the global batch, sampled without replacement: [n, C], the same in all processes.

    A latent at squared distance d² from its code gets the key E / d², E standard exponential. The smallest keys are a
    sample with probabilities proportional to d² (Efraimidis and Spirakis 2006, up to a monotone map). Rows are ordered
    by E, which no rounding changes.
    """
    rows = keyed[keyed[:, 0].argsort()[:max_count]]
    if accelerator.num_processes > 1:
        # Padded to the same length in all processes; padding has an infinite key.
        padding = torch.full((max_count - len(rows), rows.shape[1]), torch.inf, dtype=rows.dtype)
        gathered = accelerator.gather(torch.cat([rows, padding]).to(accelerator.device))
        assert isinstance(gathered, Tensor)
        rows = gathered.cpu()
        rows = rows[rows[:, 0].argsort()[:max_count]]
    rows = rows[rows[:, 0].isfinite()]  # drops padding and latents that equal their code
    return rows[rows[:, 1].argsort(), 2:]


def _keyed_latents(quantized: Quantized, epochs: Sequence[int], ids: Sequence[str], seed: int, step: int) -> Tensor:
    """A row (E / d², E, latent) for each latent of a micro-batch: [B · h · w, 2 + C] float64 on the CPU."""
    latents, codes = (tensor.cpu().double().movedim(1, -1) for tensor in (quantized.moments, quantized.latents))
    distance = (latents - codes).square().sum(dim=-1)  # [B, h, w]
    exponentials = torch.stack(
        [
            torch.from_numpy(generator(seed, "codes", epoch, name, step).standard_exponential(distance.shape[1:]))
            for epoch, name in zip(epochs, ids, strict=True)
        ]
    )  # [B, h, w]
    return torch.cat([(exponentials / distance)[..., None], exponentials[..., None], latents], dim=-1).flatten(0, 2)
