"""What `train/train_autoencoder.py` is made of: networks, loss, statistics of the latents, held-out reconstructions."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import checkpoint
from ldm.codecs import LatentCodec
from ldm.config import AutoencoderLossConfig, AutoencoderTrainingConfig, check_autoencoder, section_of
from ldm.data import Batch, CaptionedImages, collate, to_signed
from ldm.evaluation.perceptual import perceptual_distance
from ldm.models import (
    AutoencoderConfig,
    AutoencoderKL,
    FirstStage,
    PatchDiscriminator,
    PerceptualDistance,
    Quantized,
    VQConfig,
    VQModel,
    enable_gradient_checkpointing,
    kl_divergence,
)
from ldm.pipelines import contact_sheet, to_pil
from ldm.training import timing
from ldm.training.adversarial import AdversarialLoss
from ldm.training.codebook import Codebook
from ldm.training.nonfinite import StepLosses
from ldm.training.plan import Costs, make_plan
from ldm.training.run import Run
from ldm.training.space import load_first_stage
from ldm.training.training_state import TrainingState

IMAGES_AT_ONCE = 32
# What follows from data and training, and may be otherwise in a model that training goes on from.
_NOT_OF_SHAPE = {"sample_size", "scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"}


def make_autoencoder(config: AutoencoderTrainingConfig) -> FirstStage:
    """The network of the config, with the parameters marked that learn.

    If all of it learns its latents will need no scaling factor (see `export_autoencoder`). If the decoder alone does,
    encoder, `quant_conv` and a codebook stay, and with them the config: what stands on the latents goes on to work.

    Raises:
        ValueError: if `start_from` cannot be opened, or is no autoencoder that can be trained so.
    """
    autoencoder: FirstStage
    if config.start_from is None:
        described = config.network
        assert described is not None
        autoencoder = VQModel(described) if isinstance(described, VQConfig) else AutoencoderKL(described)
    else:
        autoencoder = load_first_stage(config.start_from).autoencoder
        _check_start(autoencoder.config, config)
    if config.trained == "decoder":
        autoencoder.requires_grad_(False)
        autoencoder.decoder.requires_grad_(True)
        if autoencoder.post_quant_conv is not None:
            autoencoder.post_quant_conv.requires_grad_(True)
    else:
        autoencoder.requires_grad_(True)
        learned = autoencoder.config.without_statistics()
        autoencoder.config = dataclasses.replace(learned, sample_size=config.data.resolution)
    enable_gradient_checkpointing(autoencoder, config.train.gradient_checkpointing)
    return autoencoder


def _check_start(found: AutoencoderConfig | VQConfig, config: AutoencoderTrainingConfig) -> None:
    """Refuses an autoencoder of another shape than the config asks for, or that cannot be trained."""
    asked = config.network or found
    section = section_of(asked)
    if type(asked) is not type(found):
        raise ValueError(
            f"{section} describes {asked.diffusers_class}, but {config.start_from} (start_from) is "
            f"{found.diffusers_class}; leave {section} out, or set it to null"
        )
    for key, value in asked.to_dict().items():
        if key not in _NOT_OF_SHAPE and value != found.to_dict()[key]:
            raise ValueError(
                f"{section}.{key} is {value}, but {config.start_from} (start_from) has {found.to_dict()[key]}; leave "
                f"{section} out, or set it to null"
            )
    try:
        check_autoencoder(found, config.trained)
        config.check_regulariser(found)
    except ValueError as error:
        raise ValueError(f"{config.start_from} (start_from) cannot be trained: {error}") from None


def make_discriminator(config: AutoencoderTrainingConfig, device: torch.device) -> PatchDiscriminator | None:
    """A new discriminator, if what it says has a weight."""
    return PatchDiscriminator(config.discriminator).to(device) if config.loss.adversarial_weight > 0 else None


def make_perceptual_distance(config: AutoencoderTrainingConfig, device: torch.device) -> PerceptualDistance | None:
    """The perceptual distance, if it has a weight; ValueError if its network is not installed."""
    return perceptual_distance(device) if config.loss.perceptual_weight > 0 else None


def make_codebook(
    config: AutoencoderTrainingConfig, autoencoder: FirstStage, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> Codebook | None:
    """What looks after the codes, if there are such and they learn."""
    if not isinstance(autoencoder, VQModel) or not autoencoder.quantize.embedding.weight.requires_grad:
        return None
    assert isinstance(averaged, VQModel)
    return Codebook(
        autoencoder.quantize, averaged.quantize, optimizer, seed=config.seed, revive_after=config.revive_codes_after
    )


def latent_shape(autoencoder: FirstStage, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of what an autoencoder makes of images of `size` (height, width), which its factor divides."""
    return LatentCodec(autoencoder).latent_shape(*size)


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
    """LDM (arXiv:2112.10752), Eq. 25: distance + regulariser, and with an adversary what it says of reconstructions.

    `values` hold distance and regulariser. The adversarial term is a move in a game and measures nothing, so that it is
    not among them; it is in `figures`, as each term is before it is weighted, and in `objectives`.

    Args:
        images, reconstruction: [B, 3, H, W] in [−1, 1].
        latents: what the autoencoder gives beside reconstructions: moments [B, 2C, h, w], or latents and their codes.
        adversary: None while there is none, and before its start.
        last_layer: weight of the last layer of the decoder.
        regularize: whether the encoder learns; if not, the regulariser acts on nothing, and is left out.
    """
    regularisation, figures = (
        regularization_loss(images, latents, loss) if regularize else (images.new_zeros(len(images)), {})
    )
    seen = reconstruction if adversary is None else reconstruction.detach().requires_grad_()
    terms = distance_terms(images, seen, loss, perceptual)
    distance = terms["loss_reconstruction"]
    if perceptual is not None:
        distance = distance + loss.perceptual_weight * terms["loss_perceptual"]
    values = distance + regularisation
    figures = terms | figures
    if adversary is None:
        return StepLosses(values, figures=figures)
    opinion = adversary.judge(images, reconstruction, seen, distance, last_layer)
    figures["loss_generator"], figures["loss_discriminator"] = opinion.generator, opinion.discriminator
    figures["adversarial_weight"] = values.new_tensor(opinion.weight)
    # The inner product has the gradient that was found at the reconstructions, and takes it into the autoencoder in one
    # backward pass. The two objectives share no parameter: neither network sees the other's gradient.
    generated = (reconstruction * opinion.gradient).sum() + regularisation.mean()
    return StepLosses(values, figures=figures, objectives=(generated, opinion.discriminator.mean()))


def regularization_loss(
    images: Tensor, latents: Tensor | Quantized, loss: AutoencoderLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """What keeps latents in bounds: ([B], what of it is logged), the first weighted and the second not."""
    if isinstance(latents, Quantized):
        weighted = loss.codebook_weight * latents.codebook + loss.commitment_weight * latents.commitment
        return weighted, {"loss_quantisation": latents.codebook}  # both are the same number
    divergence = kl_divergence(latents) / images[0].numel()
    return loss.kl_weight * divergence, {"loss_kl": divergence}


def distance_terms(
    images: Tensor, reconstruction: Tensor, loss: AutoencoderLossConfig, perceptual: PerceptualDistance | None
) -> dict[str, Tensor]:
    """How far reconstructions are from images [B, 3, H, W], term by term: name → [B]."""
    error = images - reconstruction
    error = error.abs() if loss.reconstruction == "l1" else error.square()
    terms = {"loss_reconstruction": error.flatten(1).mean(dim=1)}
    return terms if perceptual is None else terms | {"loss_perceptual": perceptual(images, reconstruction)}


def export_autoencoder(
    folder: Path,
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    device: torch.device,
) -> None:
    """Writes the autoencoder with the statistics of its latents in it: see `fold_statistics` of both kinds.

    Mean and deviation a channel, over every training image (and its posterior), in float64: Var[z] = E[z²] − E[z]².
    Where the decoder alone was trained the latents are what they were, and nothing is folded.
    """
    assert isinstance(averaged, FirstStage)
    if config.trained == "decoder":
        checkpoint.save_model(folder, averaged)
        return
    autoencoder = copy.deepcopy(averaged)
    channels = autoencoder.channels
    first, second, count = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    for batch in _in_batches(images, device, len(images)):
        with torch.no_grad():
            mean, square = autoencoder.expectations(autoencoder.encode(batch).double().cpu())  # [B, C, h, w]
        first += mean.sum(dim=(0, 2, 3))
        second += square.sum(dim=(0, 2, 3))
        count += mean[:, 0].numel()
    mean_of_channels = first / count
    deviation = (second / count - mean_of_channels.square()).clamp(min=1e-12).sqrt()
    autoencoder.fold_statistics(mean_of_channels, deviation)
    checkpoint.save_model(folder, autoencoder)


@torch.no_grad()
def held_out_metrics(
    averaged: nn.Module,
    images: CaptionedImages,
    config: AutoencoderTrainingConfig,
    perceptual: PerceptualDistance | None,
    device: torch.device,
) -> dict[str, float]:
    """What held-out images lose by going through the posterior's mean and back, means over images.

    Returns:
        `held_out_psnr` in dB; `held_out_perceptual` where that distance is trained with.
    """
    batches = _in_batches(images, device, config.train.validation_samples)
    measured = [reconstruction_metrics(averaged, batch, perceptual) for batch in batches]
    return {f"held_out_{name}": float(torch.cat([m[name] for m in measured]).mean()) for name in measured[0]}


@torch.no_grad()
def reconstruction_metrics(
    averaged: nn.Module, images: Tensor, perceptual: PerceptualDistance | None
) -> dict[str, Tensor]:
    """Of reconstructions of images [B, 3, H, W]: `psnr` (peak signal-to-noise ratio, in dB) and `perceptual`, [B]."""
    assert isinstance(averaged, FirstStage)
    reconstruction = averaged(images)[0].clamp(-1, 1)
    error = (images - reconstruction).square().flatten(1).mean(dim=1)  # [B]
    figures = {"psnr": 10 * torch.log10(4 / error.clamp(min=1e-12))}  # the range of images is 2
    return figures if perceptual is None else figures | {"perceptual": perceptual(images, reconstruction)}


@torch.no_grad()
def reconstruction_grid(averaged: nn.Module, images: CaptionedImages, device: torch.device) -> Image.Image:
    """Up to twelve images, evenly from the whole data set, above their reconstructions."""
    assert isinstance(averaged, FirstStage)
    count = min(12, len(images))
    originals, reconstructions = [], []
    for i in range(count):  # one by one, since their sizes differ
        image = _stack(images, [i * len(images) // count], device)
        originals += to_pil(image)
        reconstructions += to_pil(averaged(image)[0])
    return contact_sheet([originals, reconstructions], ["images", "reconstructions"])


def choose_autoencoder_threads(
    images: CaptionedImages,
    model: nn.Module,
    networks: TrainingState,
    run: Run,
    losses_of: Callable[[nn.Module, Batch, AdversarialLoss | None], StepLosses],
) -> None:
    """Chooses the number of threads, where it is open, by the network that learns."""
    positions = next(iter(run.micro_batches(images, run.step, run.step + 1)))

    def passes(count: int) -> Callable[[], None]:
        batch = collate([images[position] for position in positions[:count]])
        return lambda: losses_of(model, batch, None).backward(run.accelerator)

    timing.choose_threads(run, networks, passes)


def plan_autoencoder_run(
    config: AutoencoderTrainingConfig,
    images: CaptionedImages,
    held_out: CaptionedImages | None,
    model: nn.Module,
    networks: TrainingState,
    run: Run,
    perceptual: PerceptualDistance | None,
    losses_of: Callable[[nn.Module, Batch, AdversarialLoss | None], StepLosses],
) -> None:
    """Measures what the parts of the run cost, and says what is about to happen."""
    step = _step_seconds(config, images, model, networks, run, losses_of)
    if run.is_main:

        def measure(network: nn.Module, batch: Batch) -> None:
            reconstruction_metrics(network, _pixels(batch, run.device), perceptual)

        def encode(network: nn.Module, batch: Batch) -> None:
            assert isinstance(network, FirstStage)
            network.encode(_pixels(batch, run.device))

        one = timing.evaluation_seconds(run, networks.ema.module, images, measure)
        # The statistics of the latents are those of all images.
        folded = len(images) if config.trained == "all" else 0
        encoded = timing.evaluation_seconds(run, networks.ema.module, images, encode) * folded
        weights = 4 * sum(p.numel() for p in model.parameters())
        # What learns and the average of the autoencoder, two moments of AdamW, and what is exported.
        averaged = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        written = 12 * networks.trainable_parameters + averaged + weights
        sheet = io.BytesIO()

        def draw() -> None:
            reconstruction_grid(networks.ema.module, held_out or images, run.device).save(sheet, format="PNG")

        costs = Costs(
            step=step,
            validation=one * min(len(held_out), config.train.validation_samples) if held_out else 0.0,
            sheet=timing.seconds_of(draw),
            checkpoint=timing.checkpoint_seconds(run, written) + encoded,
            memory=timing.peak_memory(run, networks),
            checkpoint_bytes=written,
            sheet_bytes=len(sheet.getvalue()),
            once_bytes=0,
        )
        run.announce(
            make_plan(
                config,
                images,
                held_out,
                model,
                step=run.step,
                space=_task_of(config),
                costs=costs,
                device=run.device,
                threads=str(run.threads or ""),
                beside=networks.adversary.network if networks.adversary else None,
            )
        )
    run.accelerator.wait_for_everyone()


def _step_seconds(
    config: AutoencoderTrainingConfig,
    images: CaptionedImages,
    model: nn.Module,
    networks: TrainingState,
    run: Run,
    losses_of: Callable[[nn.Module, Batch, AdversarialLoss | None], StepLosses],
) -> float:
    """The mean over the steps to come, those before and those after the start of the adversary."""

    def seconds(adversary: AdversarialLoss | None) -> float:
        present = dataclasses.replace(networks, adversary=adversary)
        return timing.step_seconds(run, model, present, images, lambda net, batch: losses_of(net, batch, adversary))

    to_come = config.train.max_steps - run.step
    alone = min(max(0, config.loss.adversarial_start - run.step), to_come) if networks.adversary else to_come
    if alone == to_come:  # also where nothing is to come
        return seconds(None)
    judged = seconds(networks.adversary)
    return judged if alone == 0 else (alone * seconds(None) + (to_come - alone) * judged) / to_come


def _task_of(config: AutoencoderTrainingConfig) -> str:
    """What is trained, in words, for the plan."""
    start = f", from {config.start_from}" if config.start_from else ""
    if config.trained == "decoder":
        return f"the decoder of a first stage{start}; its latents stay as they are"
    codes = f", by way of {config.vq.num_vq_embeddings} codes" if config.vq else ""
    return f"a first stage: images to latents and back{codes}{start}"


def _pixels(batch: Batch, device: torch.device) -> Tensor:
    assert batch.images is not None
    return to_signed(batch.images).to(device)  # [B, 3, h, w]


def _in_batches(images: CaptionedImages, device: torch.device, limit: int) -> Iterator[Tensor]:
    for chunk in images.chunks(IMAGES_AT_ONCE, limit):
        yield _stack(images, chunk, device)


def _stack(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]
