"""Trains a text-to-image diffusion model on captioned images, on pixels or on latents, as the config says.

accelerate launch train/train_ldm.py --config configs/digits.yaml --set train.max_steps=500
"""

from pathlib import Path

from ldm.config import LDMConfig
from ldm.diffusion import NoiseSchedule, diffusion_loss, drop_conditioning
from ldm.text import load_text_encoder
from ldm.training import launch, parts
from ldm.training.draws import keyed_draws
from ldm.training.encoded import EncodedImages
from ldm.training.optimisation import make_ema, make_optimizer
from ldm.training.run import Networks, Run


def train(config: LDMConfig, resume: bool) -> Path:
    run = Run(config, export="pipeline", resume=resume)

    # The data, and the frozen networks that encode it.
    images, held_out = parts.open_images(config.data, run)
    text = config.text
    text_encoder = load_text_encoder(text.encoder, text.max_length, layer=text.layer).to(run.device)
    codec = parts.make_codec(config, images).to(run.device)
    parts.report_captions(text_encoder, images, run)
    shape = codec.latent_shape(config.data.resolution, config.data.resolution)

    # The network that learns, its schedule, and the moving average of its weights, which is what is shipped.
    schedule = NoiseSchedule.from_config(config.schedule)
    unet = parts.make_unet(config, codec, text_encoder, run)
    ema = make_ema(unet, config.train.ema_decay)
    pipeline = parts.make_pipeline(config, ema.module, codec, text_encoder)
    model, optimizer = run.accelerator.prepare(unet, make_optimizer(unet, config.train))
    networks = Networks(model=unet, optimizer=optimizer, ema=ema)
    run.start(networks)
    frozen = run.write_once("frozen", pipeline.save_frozen)

    encoders = parts.make_encoders(config, codec, text_encoder, run)
    encoded = EncodedImages(images, encoders)
    parts.report_latents(encoded, run)
    held_out_encoded = held_out and EncodedImages(held_out, encoders)

    for batch in run.batches(images):
        with run.accelerator.accumulate(model):
            draws = keyed_draws(
                config.seed,
                batch.epochs,
                batch.ids,
                run.step,
                shape=shape,
                num_train_timesteps=schedule.num_train_timesteps,
                caption_dropout=config.train.caption_dropout,
                device=run.device,
            )
            latents = encoded.latents(batch, draws.posterior)
            condition = drop_conditioning(encoded.text(batch.captions), encoded.null, draws.dropped)
            loss = diffusion_loss(
                model,
                schedule,
                latents,
                condition,
                timesteps=draws.timesteps,
                noise=draws.noise,
                prediction_type=config.schedule.prediction_type,
            ).mean()
            run.backward(loss)
            run.optimize(model, optimizer, batch.ids)

        if run.accelerator.sync_gradients:  # an optimizer step, however many micro-batches it took
            ema.update_parameters(unet)
            run.advance()
            if held_out_encoded and run.due(config.train.validate_every):
                run.measure(
                    "held_out_loss", lambda: parts.held_out_loss(ema.module, schedule, config, held_out_encoded)
                )
            if run.due(config.train.sample_every):
                run.save_sheet(lambda: parts.sample_sheet(pipeline, config.sample))
            if run.due(config.train.checkpoint_every):
                run.save_checkpoint(networks, lambda folder: pipeline.save_pretrained(folder, frozen=frozen))

    run.finish()
    return run.folder / "pipeline"


def main() -> None:
    launch.main(train, LDMConfig, Path(__file__).parents[1] / "configs" / "digits.yaml", __doc__)


if __name__ == "__main__":
    main()
