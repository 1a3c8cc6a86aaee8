"""Every prediction, loss, choice of timesteps and sampler in a config: trained with, validated, saved, reloaded."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from ldm import Pipeline
from ldm.config import LDMConfig, SampleConfig
from ldm.config.overrides import load_config
from ldm.data import CaptionedImages, generator, split, to_signed
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    add_noise,
    discretized_decoder,
    logit_normal_timesteps,
    stratified_timestep,
    variational_terms,
)
from ldm.diffusion.denoiser import velocity
from ldm.diffusion.losses import log_variance_tables
from ldm.diffusion.samplers import SAMPLER_NAMES
from ldm.pipelines import SAMPLERS, contact_sheet
from ldm.training.noise import step_noise
from ldm.training.setup import sample_grid
from tests import tiny
from tests.training.runs import captioned_folder, digests, losses, metrics, run_config, run_ldm, settings

SHORT = ["train.max_steps=1", "train.warmup_steps=0", "sample.prompts=[a handwritten three]"]
LEARNED = "train.loss.weighting=hybrid"

CASES = {
    "x_0": ["schedule.prediction_type=sample", "sample.sampler=dpm++2m"],
    "mean": ["schedule.prediction_type=posterior_mean", "sample.sampler=ddim-sigma-hat", "sample.guidance_scale=2.5"],
    "noise, plain cosine": ["schedule.prediction_type=epsilon", "schedule.beta_schedule=plain_cosine"],
    "sigmoid": ["schedule.beta_schedule=sigmoid", "schedule.beta_start=0.0001", "schedule.beta_end=0.02"],
    "zero terminal SNR": ["schedule.rescale_betas_zero_snr=true", "sample.sampler=euler-maruyama"],
    "bound": ["train.loss.weighting=vlb", "sample.sampler=predictor-corrector", "train.max_grad_norm=10"],
    "bound, x_0, large": [
        "train.loss.weighting=vlb", "train.loss.variance=large", "schedule.prediction_type=sample",
        "sample.sampler=ddpm-large",
    ],
    "min-SNR": ["train.loss.weighting=min_snr", "train.loss.gamma=3", "sample.sampler=dpm++2m"],
    "learned variance": [LEARNED, "sample.sampler=ddpm"],
    "learned variance of the mean": [LEARNED, "train.loss.vlb_weight=0.01", "schedule.prediction_type=posterior_mean"],
    "learned variance, decoded": [
        LEARNED, "train.loss.vlb_weight=1", "schedule.num_train_timesteps=3", "sample.sampler=ddpm"
    ],
    "stratified": ["train.timesteps=stratified", "sample.sampler=ddpm"],
    "logit-normal": ["train.timestep_density=logit_normal", "train.logit_mean=0.5", "train.logit_std=0.8"],
}  # fmt: skip


def first_batch(config, pipeline):
    """x_0 and the draws of the first step, from the data itself."""
    used = inspect(open_source(config.data), config.data).used
    images = CaptionedImages(split(used, config.data.held_out)[0], config.data, config.seed)
    positions = images.order(config.train.batch_size).batch(0)
    pixels = torch.stack([images.image_at(index) for _, index in positions])
    draws = step_noise(
        config.seed,
        [epoch for epoch, _ in positions],
        [images.samples[index].id for _, index in positions],
        0,
        shape=(3, 8, 8),
        num_train_timesteps=config.schedule.num_train_timesteps,
    )
    return pipeline.codec.sample_latents(to_signed(pixels)).double(), draws


def loss_of_silence(config, pipeline):
    """The loss of the first step: a new network predicts zero, so that it follows from data and draws alone."""
    x_0, draws = first_batch(config, pipeline)
    noise, loss, kind = draws.noise.double(), config.train.loss, config.schedule.prediction_type
    t, steps = draws.timesteps, config.schedule.num_train_timesteps
    if config.train.timesteps == "stratified":
        used = inspect(open_source(config.data), config.data).used
        images = CaptionedImages(split(used, config.data.held_out)[0], config.data, config.seed)
        drawn = []
        for place, (epoch, index) in enumerate(images.order(8).batch(0)):
            draw = generator(config.seed, "step", epoch, images.samples[index].id, 0)
            drawn.append(stratified_timestep(place, 8, draw.random(), 1000))
            draw.random()  # whether the caption is dropped
            noise[place] = torch.from_numpy(draw.standard_normal((3, 8, 8), np.float32))
        t = torch.tensor(drawn)
        assert (t // 125).tolist() == list(range(8))
    if config.train.timestep_density == "logit_normal":
        t = logit_normal_timesteps(t, steps, mean=0.5, std=0.8)
    schedule = NoiseSchedule.from_config(config.schedule)
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    a, b = (table[t].view(-1, 1, 1, 1) for table in schedule.posterior_mean_coefficients)
    x_t = add_noise(x_0, noise, alpha, sigma)
    target = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": velocity(x_0, noise, alpha, sigma),
        "posterior_mean": a * x_0 + b * x_t,
    }[kind]
    squares = target.square().flatten(1).mean(dim=1)
    snr = schedule.snr[t]
    if loss.weighting == "simple":
        return float(squares.mean())
    if loss.weighting == "min_snr":
        assert kind == "v_prediction"
        return float((snr.clamp(max=loss.gamma) / (snr + 1) * squares).mean())
    if loss.weighting == "vlb":
        gain = {"sample": 1, "v_prediction": schedule.sigma[t]}[kind]
        variance = log_variance_tables(schedule)[loss.variance == "large"].exp()[t]
        weight = (a.flatten() * gain) ** 2 / (2 * variance)
        return float((steps * weight * squares / math.log(2)).mean())
    codec = pipeline.codec
    decoder = discretized_decoder(codec.mean.flatten().tolist(), codec.std.flatten().tolist())
    assert steps == 1000 or 0 in t.tolist()
    output = torch.zeros(8, 6, 8, 8, dtype=torch.float64)
    terms = variational_terms(output, x_t, x_0, schedule, t, decoder=decoder, prediction_type=kind, variance="learned")
    return float((squares + loss.vlb_weight * steps * terms).mean())


@pytest.mark.parametrize("name", CASES)
def test_it_trains_is_measured_and_comes_back(name, tmp_path, encoder_folder):
    folder = tmp_path / "run"
    made = run_ldm(settings(folder, encoder_folder), *SHORT, *CASES[name])
    config = load_config(folder / "config.yaml", [], LDMConfig)
    assert (folder / "config.yaml").read_text().count("weighting") == 1  # every key is spelled out

    # It was trained with what the config says.
    pipeline = Pipeline.from_pretrained(made)
    assert losses(folder)[0] == pytest.approx(loss_of_silence(config, pipeline), rel=1e-4)

    # The held-out loss is L_simple of the prediction, whatever was minimised: of a network that says about zero it is
    # the mean square of what is predicted, which for all but v and noise depends on the timestep.
    (held_out,) = [line["held_out_loss"] for line in metrics(folder) if "held_out_loss" in line]
    assert 0.2 < held_out < 1.3

    # The model that comes back is the one that the sheet was drawn with, and knows its sampler.
    assert pipeline.schedule == config.schedule
    assert (pipeline.sampler, pipeline.guidance_scale) == (config.sample.sampler, config.sample.guidance_scale)
    assert pipeline.unet.config.out_channels == (6 if LEARNED in CASES[name] else 3)
    scheduler = json.loads((made / "scheduler" / "scheduler_config.json").read_text())
    learned = ("DDPMScheduler", "learned_range") if LEARNED in CASES[name] else ("DDIMScheduler", None)
    assert (scheduler["_class_name"], scheduler.get("variance_type")) == learned
    assert json.loads((made / "model_index.json").read_text())["scheduler"] == ["diffusers", learned[0]]
    drawn = pipeline("a handwritten three", seed=0)
    sheet = contact_sheet([drawn.images], ["a handwritten three"])
    assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(folder / "samples" / "step_00000001.png")))


def test_the_held_out_loss_does_not_know_what_is_minimised(tmp_path, encoder_folder):
    found = {}
    for weighting in ("simple", "vlb", "hybrid"):
        run_ldm(
            settings(tmp_path / weighting, encoder_folder),
            *SHORT,
            "train.learning_rate=1e-12",
            f"train.loss.weighting={weighting}",
        )
        (found[weighting],) = [line["held_out_loss"] for line in metrics(tmp_path / weighting) if len(line) > 5]
    assert len(found) == 3
    assert all(value == pytest.approx(found["simple"], rel=1e-6) for value in found.values()), found


HOW = ["train.gradient_accumulation_steps=4", "train.num_workers=2"]


def test_stratified_timesteps_depend_on_the_global_batch_alone(tmp_path, encoder_folder):
    more = ["train.timesteps=stratified", "train.max_steps=3", LEARNED, "train.loss.vlb_weight=0.01"]
    run_ldm(settings(tmp_path / "one", encoder_folder), *more)
    run_ldm(settings(tmp_path / "two", encoder_folder), *more, *HOW)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def test_learned_variances_resume_bit_for_bit(tmp_path, encoder_folder):
    one, two = (settings(tmp_path / name, encoder_folder) for name in ("one", "two"))
    more = ["train.timesteps=stratified", LEARNED]
    run_ldm(one, *more)
    run_ldm(two, *more, "train.max_steps=2")
    with pytest.raises(ValueError, match=r"train\.timesteps: stratified → uniform"):
        run_ldm(two, LEARNED, resume=True)
    with pytest.raises(ValueError, match=r"train\.loss\.vlb_weight: 0\.001 → 0\.01"):
        run_ldm(two, *more, "train.loss.vlb_weight=0.01", resume=True)
    run_ldm(two, *more, resume=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert digests(tmp_path / "one/checkpoints/step_00000004") == digests(tmp_path / "two/checkpoints/step_00000004")


# ---- from a model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return captioned_folder(tmp_path_factory.mktemp("data") / "mine", 12, 8)


def model_of(folder, learned=False, space="pixel", **schedule):
    pipeline = tiny.pipeline(folder / "parts", space, sampler="ddpm")
    if learned:
        channels = pipeline.codec.channels
        config = pipeline.unet.config.to_dict() | {"out_channels": 2 * channels}
        torch.manual_seed(2)
        pipeline.unet = type(pipeline.unet)(type(pipeline.unet.config).from_dict(config)).eval()
        for parameter in pipeline.unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.schedule = ScheduleConfig(**schedule)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def going_on(folder, model, pictures, sample=None, method="full", **train):
    return {
        "output_dir": str(folder),
        "start_from": str(model),
        "finetune": {"method": method},
        "data": {"path": str(pictures), "resolution": 8, "held_out": 0.2},
        "train": {"max_steps": 1, "batch_size": 4, "cpu_threads": 1} | train,
        "sample": {"prompts": ["a"], "images_per_prompt": 1, "num_inference_steps": 2} | (sample or {}),
    }


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning_keeps_the_schedule_and_changes_the_loss(method, tmp_path, pictures):
    kind = {"prediction_type": "posterior_mean", "beta_schedule": "plain_cosine"}
    model = model_of(tmp_path, learned=True, **kind)
    more = {"loss": {"weighting": "hybrid", "vlb_weight": 0.01}, "timesteps": "stratified"}
    made = run_config(going_on(tmp_path / "run", model, pictures, {"sampler": "ddpm-large"}, method, **more))
    config = load_config(tmp_path / "run" / "config.yaml", [], LDMConfig)
    assert (config.train.loss.weighting, config.train.timesteps) == ("hybrid", "stratified")
    if method == "lora":
        pipeline = Pipeline.from_pretrained(model)
        pipeline.load_lora(made)
        assert pipeline.sampler == "ddpm"
    else:
        pipeline = Pipeline.from_pretrained(made)
        assert pipeline.sampler == "ddpm-large"
    assert pipeline.schedule == ScheduleConfig(**kind)
    assert pipeline("a", seed=0).images


@pytest.mark.parametrize(
    ("learned", "schedule", "train", "sample", "message"),
    [
        (False, {}, {"loss": {"weighting": "hybrid"}}, {}, r"is hybrid, but .*model has no learned variances"),
        (True, {}, {}, {}, r"is simple, but .*model has learned variances; choose hybrid"),
        (False, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
         {"loss": {"weighting": "min_snr"}}, {}, "min_snr, whose weight is 0"),
        (False, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
         {}, {"sampler": "langevin"}, "langevin, which walks in x/alpha"),
    ],
)  # fmt: skip
def test_a_loss_or_sampler_that_the_model_cannot_have_is_refused(
    learned, schedule, train, sample, message, tmp_path, pictures
):
    model = model_of(tmp_path, learned, **schedule)
    with pytest.raises(ValueError, match=message):
        run_config(going_on(tmp_path / "run", model, pictures, sample, **train))
    assert not (tmp_path / "run").exists()


# ---- what diffusers makes of it


def test_a_model_with_learned_variances_draws_in_diffusers(tmp_path):
    model = model_of(tmp_path, learned=True, space="latent", num_train_timesteps=8)
    assert UNet2DConditionModel.from_pretrained(model / "unet").config.out_channels == 8
    theirs = StableDiffusionPipeline.from_pretrained(model)
    assert isinstance(theirs.scheduler, DDPMScheduler)
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    # On all timesteps: diffusers takes β of one step where ours is that of the whole stride.
    kind = {"latents": start, "num_inference_steps": 8, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(4)
    expected = theirs("a cat", generator=generator, output_type="latent", height=16, width=16, **kind).images
    ours, seen = Pipeline.from_pretrained(model), []
    ours("a cat", seed=4, on_step=seen.append, **kind)
    torch.testing.assert_close(seen[-1].latents, expected, rtol=1e-3, atol=1e-3)
    learned = seen[-1].latents
    ours("a cat", seed=4, sampler="ddpm-large", on_step=seen.append, **kind)
    assert not torch.allclose(seen[-1].latents, learned, atol=0.05)  # that is β, whatever was learned
    ours("a cat", seed=4, sampler="ddim", eta=1.0, on_step=seen.append, **kind)
    assert not torch.allclose(seen[-1].latents, learned, atol=0.05)  # that of DDPM is another


def test_diffusers_refuses_to_draw_with_a_posterior_mean_by_its_name(tmp_path):
    model = model_of(tmp_path, space="latent", prediction_type="posterior_mean")
    theirs = StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="prediction_type given as posterior_mean must be one of"):
        theirs("a cat", num_inference_steps=2, height=16, width=16)
    assert Pipeline.from_pretrained(model)("a cat", seed=0, num_inference_steps=2).images


def test_a_model_brings_its_sampler(tmp_path):
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    model = model_of(tmp_path)
    index = json.loads((model / "model_index.json").read_text())
    assert index["_ldm"]["sampler"] == "ddpm"
    pipeline = Pipeline.from_pretrained(model)
    own, named, other = (
        pipeline("a", seed=0, **kind).images[0] for kind in ({}, {"sampler": "ddpm"}, {"sampler": "ddim"})
    )
    assert own == named != other
    del index["_ldm"]["sampler"]  # as an older folder
    (model / "model_index.json").write_text(json.dumps(index))
    assert Pipeline.from_pretrained(model)("a", seed=0).images[0] == other
    index["_ldm"]["sampler"] = "dppm"
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="sampler is 'dppm'; did you mean 'ddpm'"):
        Pipeline.from_pretrained(model)


def test_a_sheet_is_drawn_with_the_sampler_of_the_config(tmp_path):
    pipeline = tiny.pipeline(tmp_path)
    config = SampleConfig(
        prompts=("a",), images_per_prompt=1, num_inference_steps=3, guidance_scale=2.0, sampler="ddpm"
    )
    drawn = pipeline("a", seed=0, num_inference_steps=3, sampler="ddpm").images
    assert sample_grid(pipeline, config) == contact_sheet([drawn], ["a"])
