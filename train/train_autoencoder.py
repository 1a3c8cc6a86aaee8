"""Trains a first stage: an autoencoder whose latents a diffusion model learns.

accelerate launch train/train_autoencoder.py --config configs/openmoji-first-stage.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm.config import AutoencoderTrainingConfig
from ldm.data import Batch, to_signed
from ldm.training import first_stage, launch, parts
from ldm.training.draws import keyed_draws
from ldm.training.guard import Losses
from ldm.training.networks import Networks
from ldm.training.optimisation import make_ema, make_optimizer
from ldm.training.run import Run


def train(config: AutoencoderTrainingConfig, resume: bool = False, accept: Sequence[str] = ()) -> Path:
    run = Run(config, export="autoencoder", resume=resume, accept=accept)
    images, held_out = parts.open_images(config.data, run)

    autoencoder = first_stage.make_autoencoder(config).to(run.device)
    images.check_factor(autoencoder.factor)
    ema = make_ema(autoencoder, config.train.ema_decay)
    model, optimizer = run.accelerator.prepare(autoencoder, make_optimizer(autoencoder, config.train))
    networks = Networks(model=autoencoder, optimizer=optimizer, ema=ema)
    run.start(networks)

    def export(folder: Path) -> None:
        first_stage.export_autoencoder(folder, ema.module, images, run.device)

    def losses_of(network: nn.Module, batch: Batch) -> Losses:
        shape = first_stage.latent_shape(autoencoder, batch.size)
        draws = keyed_draws(config.seed, batch.epochs, batch.ids, run.step, shape=shape, device=run.device)
        pixels = to_signed(batch.images).to(run.device)
        reconstruction, moments = network(pixels, draws.posterior)
        return Losses(first_stage.autoencoder_loss(pixels, reconstruction, moments, config.loss.kl_weight))

    def look() -> None:
        if held_out and run.due(config.train.validate_every):
            run.measure(lambda: {"held_out_psnr": first_stage.held_out_psnr(ema.module, held_out, config, run.device)})
        if run.due(config.train.sample_every):
            run.save_sheet(lambda: first_stage.reconstruction_sheet(ema.module, held_out or images, run.device))

    if run.step > 0:  # what a resumed run was stopped at
        look()
    first_stage.plan_run(config, images, held_out, model, networks, run, losses_of)

    for batch in run.batches(images):
        with run.accelerator.accumulate(model):
            run.backward(losses_of(model, batch))
            moved = run.optimize(model, optimizer)

        if run.accelerator.sync_gradients:  # a step, however many micro-batches it took
            if moved:
                ema.update_parameters(autoencoder)
            run.advance()
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
