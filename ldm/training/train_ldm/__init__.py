"""Train a text-to-image diffusion model on captioned images, on pixels or on latents, as the config says.

accelerate launch train/train_ldm.py --config configs/digits.yaml --set train.max_steps=500
"""

from functools import partial
from pathlib import Path

from torch import nn

from ldm.codecs import decoder_of
from ldm.config import LDMConfig
from ldm.data import Batch
from ldm.diffusion import NoiseSchedule, diffusion_loss, drop_conditioning
from ldm.training import setup
from ldm.training.checkpoints import TrainingState
from ldm.training.distributed import StepLosses
from ldm.training.latents import LatentCache
from ldm.training.noise import BatchPositions, step_noise
from ldm.training.prior import PRIOR_FRACTION, make_prior
from ldm.training.run import Hooks, Run
from ldm.training.trainable import make_ema, make_optimizer, select_trainable


def train_diffusion(config: LDMConfig, run: Run, hooks: Hooks) -> None:
    # The model at step 0.
    pipeline = setup.make_pipeline(config, run)
    schedule = NoiseSchedule.from_config(pipeline.schedule)
    prediction_type = pipeline.schedule.prediction_type
    decoder = decoder_of(pipeline.codec)
    evaluator = hooks.evaluate(run) if hooks.evaluate and config.train.evaluate_every else None

    prior = make_prior(config, pipeline, run)  # what fine-tuning should not change

    # The trainable weights, and their EMA, which is exported.
    unet = select_trainable(pipeline.unet, config)
    ema = make_ema(unet, config.train.ema_decay)
    model, optimizer = run.accelerator.prepare(unet, make_optimizer(unet, config.train))
    state = TrainingState(model=model, optimizer=optimizer, ema=ema)
    run.start(state)
    setup.choose_unet_threads(pipeline, state, run)

    # The frozen networks encode the data once and then leave memory, until samples are generated.
    frozen = setup.save_frozen_components(pipeline, config, run)
    encoders = setup.make_cached_encoders(config, pipeline, run)
    cache = LatentCache(run.data.train, encoders)
    held_out_cache = run.data.held_out and LatentCache(run.data.held_out, encoders)
    setup.log_cache_summary(cache, pipeline.text_encoder, run)
    del pipeline, encoders

    # Timesteps are sampled independently, or stratified over the global batch of a step.
    stratified = config.train.timesteps == "stratified"
    order = run.data.train.order(config.train.batch_size) if stratified else None

    def losses_of(network: nn.Module, batch: Batch) -> StepLosses:
        noise = step_noise(
            config.seed,
            batch.epochs,
            batch.ids,
            run.step,
            shape=cache.latent_shape(*batch.size),
            num_train_timesteps=schedule.num_train_timesteps,
            caption_dropout=config.train.caption_dropout,
            positions=None if order is None else BatchPositions.find(order, batch, run.step),
            logit_normal=config.train.logit_normal,
            device=run.device,
        )
        latents = cache.latents(batch, noise.posterior)
        condition = drop_conditioning(cache.text(batch.captions), cache.null, noise.dropped)
        loss = partial(
            diffusion_loss, network, schedule, prediction_type=prediction_type, loss=config.train.loss, decoder=decoder
        )
        losses = loss(latents, condition, timesteps=noise.timesteps, noise=noise.noise)
        if prior is None:
            return StepLosses(losses, noise.timesteps)

        # Per image of the batch, as the loss is: its share of images brings one prediction of the model before.
        held = prior.rows(config.seed, batch)
        difference = losses.new_zeros(())
        if len(held):
            x_0, eps, states = (part[held].to(losses) for part in (prior.latents, prior.noise, prior.condition))
            squares = loss(x_0, states, timesteps=prior.timesteps[held], noise=eps)
            difference = squares.sum() / (PRIOR_FRACTION * len(losses))
        objective = losses.mean() + config.finetune.prior_weight * difference
        return StepLosses(losses, noise.timesteps, {"prior_loss": difference}, (objective,))

    def export(folder: Path) -> None:
        setup.export(folder, ema.module, frozen, config)

    def validate_and_sample() -> None:
        if held_out_cache and run.is_due(config.train.validate_every):
            run.measure(lambda: setup.held_out_loss(ema.module, schedule, prediction_type, config, held_out_cache))
            run.save_best("held_out_loss", export)
        if run.is_due(config.train.sample_every):
            run.save_samples(lambda: setup.sample_grid(frozen.pipeline(ema.module), config.sample))
        if evaluator and run.is_due(config.train.evaluate_every):
            run.measure(lambda: evaluator(frozen.pipeline(ema.module)))

    if run.step > 0 or config.start_from is not None:  # what an interrupted run missed, or the model to start from
        validate_and_sample()
    if hooks.estimate:
        hooks.estimate(run, state, model, losses_of, frozen=frozen, evaluator=evaluator)

    for batch in run.batches():
        with run.accelerator.accumulate(model):
            run.backward(losses_of(model, batch))
            stepped = run.optimize(model, optimizer)

        if run.accelerator.sync_gradients:  # the last micro-batch of a step
            if stepped:
                ema.update_parameters(unet)
            run.advance()
            run.save_if_due(state, export)
            validate_and_sample()

    run.finish(state, export)
