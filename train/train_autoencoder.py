"""Trains a first stage: an autoencoder whose latents a diffusion model learns.

accelerate launch train/train_autoencoder.py --config configs/openmoji-first-stage.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm.config import AutoencoderTrainingConfig
from ldm.data import Batch, to_signed
from ldm.training import autoencoder_setup, launch, setup
from ldm.training.adversarial import AdversarialLoss
from ldm.training.noise import step_noise
from ldm.training.nonfinite import StepLosses
from ldm.training.optimizer import make_ema, make_optimizer
from ldm.training.run import Run
from ldm.training.training_state import TrainingState


def train(config: AutoencoderTrainingConfig, resume: bool = False, accept: Sequence[str] = ()) -> Path:
    run = Run(config, export="autoencoder", resume=resume, accept=accept)
    images, held_out = setup.open_images(config.data, run, captioned=False)

    # The autoencoder at step 0, what of it learns, and the moving average of that, which is what is shipped.
    autoencoder = autoencoder_setup.make_autoencoder(config).to(run.device)
    images.check_factor(autoencoder.factor)
    ema = make_ema(autoencoder, config.train.ema_decay)

    # What it is judged by: a frozen network that sees, and one that learns to tell reconstructions from images.
    perceptual = autoencoder_setup.make_perceptual_distance(config, run.device)
    discriminator = autoencoder_setup.make_discriminator(config, run.device)
    optimizer = make_optimizer(autoencoder, config.train, discriminator)
    model, prepared, optimizer = run.accelerator.prepare(autoencoder, discriminator, optimizer)
    adversary = discriminator and AdversarialLoss(discriminator, prepared, config.loss)
    codebook = autoencoder_setup.make_codebook(config, autoencoder, ema.module, optimizer)
    networks = TrainingState(model=autoencoder, optimizer=optimizer, ema=ema, adversary=adversary, codebook=codebook)
    run.start(networks)

    def losses_of(network: nn.Module, batch: Batch, judge: AdversarialLoss | None) -> StepLosses:
        shape = autoencoder_setup.latent_shape(autoencoder, batch.size)
        draws = step_noise(config.seed, batch.epochs, batch.ids, run.step, shape=shape, device=run.device)
        pixels = to_signed(batch.images).to(run.device)
        reconstruction, latents = network(pixels, draws.posterior)
        if codebook:
            codebook.see(latents, batch.epochs, batch.ids)
        return autoencoder_setup.autoencoder_loss(
            pixels,
            reconstruction,
            latents,
            loss=config.loss,
            perceptual=perceptual,
            adversary=judge,
            last_layer=autoencoder.decoder.conv_out.weight,
            regularize=config.trained == "all",
        )

    def export(folder: Path) -> None:
        autoencoder_setup.export_autoencoder(folder, ema.module, images, config, run.device)

    def look() -> None:
        if held_out and run.due(config.train.validate_every):
            run.measure(
                lambda: autoencoder_setup.held_out_metrics(ema.module, held_out, config, perceptual, run.device)
            )
        if run.due(config.train.sample_every):
            run.save_samples(lambda: autoencoder_setup.reconstruction_grid(ema.module, held_out or images, run.device))

    autoencoder_setup.choose_autoencoder_threads(images, model, networks, run, losses_of)
    if run.step > 0 or config.start_from is not None:  # what a resumed run was stopped at, or a model could do before
        look()
    autoencoder_setup.plan_autoencoder_run(config, images, held_out, model, networks, run, perceptual, losses_of)

    for batch in run.batches(images):
        judge = adversary if run.step >= config.loss.adversarial_start else None
        with run.accelerator.accumulate(*filter(None, (model, prepared))):
            run.backward(losses_of(model, batch, judge))
            moved = run.optimize(model, optimizer, discriminator)

        if run.accelerator.sync_gradients:  # a step, however many micro-batches it took
            if moved:
                ema.update_parameters(autoencoder)
            if judge:
                judge.settle(run.accelerator, moved)
            if codebook:
                codebook.settle(run.accelerator, run.step, moved)
            run.advance(codebook)
            run.save_if_due(networks, export)
            look()

    run.finish(networks, export)
    return run.folder / "autoencoder"


def main() -> None:
    launch.main(
        train, AutoencoderTrainingConfig, Path(__file__).parents[1] / "configs" / "digits-first-stage.yaml", __doc__
    )


if __name__ == "__main__":
    main()
