"""Trains a text-to-image diffusion model on captioned images, on pixels or on latents, as the config says.

accelerate launch train/train_ldm.py --config configs/digits.yaml --set train.max_steps=500
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm.config import LDMConfig
from ldm.data import Batch
from ldm.diffusion import NoiseSchedule, diffusion_loss, drop_conditioning
from ldm.evaluation.likelihood import decoder_of
from ldm.training import finetune, launch, setup
from ldm.training.evaluator import Evaluator
from ldm.training.latents import LatentCache
from ldm.training.noise import GlobalBatchIndex, step_noise
from ldm.training.nonfinite import StepLosses
from ldm.training.optimizer import make_ema, make_optimizer
from ldm.training.run import Run
from ldm.training.training_state import TrainingState


def train(config: LDMConfig, resume: bool = False, accept: Sequence[str] = ()) -> Path:
    run = Run(config, export=config.export, resume=resume, accept=accept)

    # The data, and the model at step 0; "auto" is decided here.
    images, held_out = setup.open_images(config.data, run)
    config = setup.resolve_config(config, images, run)
    pipeline = setup.make_pipeline(config, images, run)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    prediction_type = pipeline.schedule.prediction_type
    decoder = decoder_of(pipeline.codec)
    evaluator = Evaluator(config, images, held_out, run) if config.train.evaluate_every else None

    # What of it learns, and the moving average of that, which is what is shipped.
    unet = finetune.prepare(pipeline.unet, config)
    ema = make_ema(unet, config.train.ema_decay)
    model, optimizer = run.accelerator.prepare(unet, make_optimizer(unet, config.train))
    networks = TrainingState(model=unet, optimizer=optimizer, ema=ema)
    run.start(networks)
    setup.choose_unet_threads(pipeline, model, networks, run)

    # What the frozen networks say of the data is encoded once; then they leave memory, and come back to draw samples.
    frozen = setup.save_frozen_components(pipeline, config, run)
    encoders = setup.make_cached_encoders(config, pipeline, run)
    encoded = LatentCache(images, encoders)
    held_out_encoded = held_out and LatentCache(held_out, encoders)
    setup.log_cache_summary(encoded, pipeline.text_encoder, run)
    del pipeline, encoders

    # Timesteps are drawn each by itself, or spread over the global batch of a step.
    stratified = GlobalBatchIndex(images, config.train.batch_size) if config.train.timesteps == "stratified" else None

    def losses_of(network: nn.Module, batch: Batch) -> StepLosses:
        draws = step_noise(
            config.seed,
            batch.epochs,
            batch.ids,
            run.step,
            shape=encoded.latent_shape(*batch.size),
            num_train_timesteps=schedule.num_train_timesteps,
            caption_dropout=config.train.caption_dropout,
            places=stratified and stratified.places(batch, run.step),
            device=run.device,
        )
        latents = encoded.latents(batch, draws.posterior)
        condition = drop_conditioning(encoded.text(batch.captions), encoded.null, draws.dropped)
        losses = diffusion_loss(
            network,
            schedule,
            latents,
            condition,
            timesteps=draws.timesteps,
            noise=draws.noise,
            prediction_type=prediction_type,
            loss=config.train.loss,
            decoder=decoder,
        )
        return StepLosses(losses, draws.timesteps)

    def export(folder: Path) -> None:
        setup.export(folder, ema.module, frozen, config)

    def look() -> None:
        if held_out_encoded and run.due(config.train.validate_every):
            run.measure(lambda: setup.held_out_loss(ema.module, schedule, prediction_type, config, held_out_encoded))
            run.save_best("held_out_loss", export)
        if run.due(config.train.sample_every):
            run.save_samples(lambda: setup.sample_grid(frozen.pipeline(ema.module), config.sample))
        if evaluator and run.due(config.train.evaluate_every):
            run.measure(lambda: evaluator(frozen.pipeline(ema.module)))

    if run.step > 0 or config.start_from is not None:  # what a resumed run was stopped at, or a model could do before
        look()
    setup.plan_diffusion_run(config, images, held_out, model, networks, frozen, run, losses_of, evaluator)

    for batch in run.batches(images):
        with run.accelerator.accumulate(model):
            run.backward(losses_of(model, batch))
            moved = run.optimize(model, optimizer)

        if run.accelerator.sync_gradients:  # a step, however many micro-batches it took
            if moved:
                ema.update_parameters(unet)
            run.advance()
            run.save_if_due(networks, export)
            look()

    run.finish(networks, export)
    return run.folder / config.export


def main() -> None:
    launch.main(train, LDMConfig, Path(__file__).parents[1] / "configs" / "digits.yaml", __doc__)


if __name__ == "__main__":
    main()
