"""Train a first stage: an autoencoder whose latents a diffusion model learns.

accelerate launch train/train_autoencoder.py --config configs/openmoji-first-stage.yaml
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ldm.codecs import LatentCodec
from ldm.config import AutoencoderTrainingConfig
from ldm.data import Batch, collate, to_signed
from ldm.models import PatchDiscriminator
from ldm.models.efficientnet import perceptual_distance
from ldm.training import autoencoder_setup
from ldm.training.autoencoder_setup import AdversarialLoss, autoencoder_loss
from ldm.training.checkpoints import TrainingState
from ldm.training.distributed import StepLosses
from ldm.training.noise import step_noise
from ldm.training.run import Hooks, Run
from ldm.training.trainable import make_ema, make_optimizer


def train_autoencoder(config: AutoencoderTrainingConfig, run: Run, hooks: Hooks) -> None:
    images, held_out = run.data.train, run.data.held_out

    # The autoencoder at step 0, its trainable weights, and their EMA, which is exported.
    autoencoder = autoencoder_setup.make_autoencoder(config).to(run.device)
    images.check_factor(autoencoder.factor)
    ema = make_ema(autoencoder, config.train.ema_decay)

    # A frozen network that measures the perceptual distance, and a discriminator that learns.
    perceptual = perceptual_distance(run.device) if config.loss.perceptual_weight > 0 else None
    discriminator = None
    if config.loss.adversarial_weight > 0:
        discriminator = PatchDiscriminator(config.discriminator).to(run.device)
    optimizer = make_optimizer(autoencoder, config.train, discriminator)
    model, prepared, optimizer = run.accelerator.prepare(autoencoder, discriminator, optimizer)
    adversarial_loss = AdversarialLoss(discriminator, prepared, config.loss) if discriminator else None
    codebook = autoencoder_setup.make_codebook(config, autoencoder, ema.module, optimizer)
    state = TrainingState(
        model=autoencoder, optimizer=optimizer, ema=ema, adversary=adversarial_loss, codebook=codebook
    )
    run.start(state)

    def losses_of(network: nn.Module, batch: Batch, adversary: AdversarialLoss | None) -> StepLosses:
        shape = LatentCodec(autoencoder).latent_shape(*batch.size)
        noise = step_noise(config.seed, batch.epochs, batch.ids, run.step, shape=shape, device=run.device)
        assert batch.images is not None
        pixels = to_signed(batch.images).to(run.device)
        reconstruction, latents = network(pixels, noise.posterior)
        if codebook:
            codebook.add(latents, batch.epochs, batch.ids)
        return autoencoder_loss(
            pixels,
            reconstruction,
            latents,
            loss=config.loss,
            perceptual=perceptual,
            adversary=adversary,
            last_layer=autoencoder.decoder.conv_out.weight,
            regularize=config.trained == "all",
        )

    def export(folder: Path) -> None:
        autoencoder_setup.export_autoencoder(folder, ema.module, images, config, run.device)

    def validate_and_sample() -> None:
        if held_out and run.is_due(config.train.validate_every):
            run.measure(
                lambda: autoencoder_setup.held_out_metrics(ema.module, held_out, config, perceptual, run.device)
            )
        if run.is_due(config.train.sample_every):
            run.save_samples(lambda: autoencoder_setup.reconstruction_grid(ema.module, held_out or images, run.device))

    def training_pass(count: int) -> Callable[[], None]:
        positions = next(iter(run.micro_batches(run.step, run.step + 1)))[:count]
        batch = collate([images[position] for position in positions])
        return lambda: losses_of(model, batch, None).backward(run.accelerator)

    run.choose_threads(state, training_pass)
    if run.step > 0 or config.start_from is not None:  # what an interrupted run missed, or the model to start from
        validate_and_sample()
    if hooks.estimate:
        hooks.estimate(run, state, model, losses_of, perceptual=perceptual, adversary=adversarial_loss)

    for batch in run.batches():
        adversary = adversarial_loss if run.step >= config.loss.adversarial_start else None
        with run.accelerator.accumulate(*filter(None, (model, prepared))):
            run.backward(losses_of(model, batch, adversary))
            stepped = run.optimize(model, optimizer, discriminator)

        if run.accelerator.sync_gradients:  # the last micro-batch of a step
            if stepped:
                ema.update_parameters(autoencoder)
            if adversary:
                adversary.update_weight(run.accelerator, stepped)
            if codebook:
                codebook.end_step(run.accelerator, run.step, stepped)
            run.advance(codebook)
            run.save_if_due(state, export)
            validate_and_sample()

    run.finish(state, export)
