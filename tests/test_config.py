"""Configs: complete, strict, and explained in one line."""

from pathlib import Path

import pytest
import yaml

from ldm.config import AutoencoderTrainingConfig, LDMConfig, load_config, parse_config, to_yaml, with_overrides

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DIGITS = next(path for path in CONFIGS if path.name == "digits.yaml")
LATENT = next(path for path in CONFIGS if path.name == "digits-latent.yaml")


def kind_of(path):
    return AutoencoderTrainingConfig if "first-stage" in path.name else LDMConfig


def refused(*overrides, path=DIGITS, kind=LDMConfig):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the tests look at the message)
        load_config(path, overrides, kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_survives_being_written(path):
    config = load_config(path, [], kind_of(path))
    assert parse_config(yaml.safe_load(to_yaml(config)), kind_of(path), "again") == config


def test_pixel_and_latent_runs_differ_in_a_handful_of_keys():
    pixel, latent = (yaml.safe_load(path.read_text()) for path in (DIGITS, LATENT))
    differing = {
        f"{section}.{key}" if isinstance(pixel.get(section), dict) else section
        for section in pixel.keys() | latent.keys()
        for key in (pixel[section].keys() | latent[section].keys() if isinstance(pixel.get(section), dict) else [""])
        if (
            pixel[section].get(key) != latent[section].get(key)
            if isinstance(pixel.get(section), dict)
            else pixel.get(section) != latent.get(section)
        )
    }
    assert differing == {"output_dir", "space", "first_stage", "data.resolution"} | {
        "schedule.beta_schedule",
        "schedule.prediction_type",
    }


def test_overrides_change_one_key_each():
    config = load_config(
        DIGITS,
        ["train.max_steps=7", "sample.prompts=[a, b]", "train.learning_rate=1e-4", "text.max_length=null"],
        LDMConfig,
    )
    assert config.train.max_steps == 7
    assert config.sample.prompts == ("a", "b")
    assert config.train.learning_rate == 1e-4
    assert config.text.max_length is None
    assert config.train.batch_size == load_config(DIGITS, [], LDMConfig).train.batch_size


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_step=5", ["unknown key train.max_step", "did you mean train.max_steps?"]),
        ("max_steps=5", ["unknown key max_steps", "train.max_steps"]),
        ("trian.max_steps=5", ["unknown key trian", "train"]),
        ("data.resolutions=8", ["data.resolution"]),
        ("unet.block_channels=[8]", ["unet.block_channels", "unet.block_out_channels"]),
        ("unet.in_channels=3", ["unet.in_channels follows from the codec"]),
        ("train.max_steps=-1", ["train", "max_steps is -1"]),
        ("train.max_steps=many", ["train.max_steps", "'many'"]),
        ("train.batch_size=1.5", ["train.batch_size", "1.5"]),
        ("train.learning_rate=0", ["learning_rate is 0"]),
        ("train.ema_decay=1", ["ema_decay is 1"]),
        ("train.caption_dropout=2", ["caption_dropout is 2"]),
        ("train.lr_schedule=linear", ["train.lr_schedule", "linear"]),
        ("train.mixed_precision=fp8", ["train.mixed_precision"]),
        ("sample.prompts=[]", ["prompts is empty"]),
        ("sample.guidance_scale=.inf", ["guidance_scale is inf"]),
        ("sample.num_inference_steps=-2", ["num_inference_steps is -2"]),
        ("sample.num_inference_steps=2000", ["num_inference_steps is 2000"]),
        ("space=latent", ["first_stage is not set"]),
        ("first_stage=runs/x", ["space is pixel"]),
        ("schedule.beta_schedule=exp", ["schedule.beta_schedule", "exp"]),
        ("unet.norm_num_groups=7", ["unet", "norm_num_groups"]),
        ("data.path=", ["data.path"]),
        ("train=5", ["train"]),
        ("data.caption_templates=a {}", ["data.caption_templates is 'a {}': write a list, [a {}]"]),
        ("data.caption_templates=[a]", ['data.caption_templates has "a"; each needs one {}']),
        ("text.layer=middle", ["text.layer", "middle"]),
        ("unet=5", ["unet"]),
        ("train.learning_rate=.nan", ["learning_rate is nan"]),
        ("train.max_grad_norm=.inf", ["max_grad_norm is inf"]),
        ("train.cpu_threads=0", ["cpu_threads is 0"]),
        ("data.path=runs/digits/pictures", ["inside output_dir"]),
        ("output_dir=", ["output_dir"]),
        ("noequals", ["--set", "noequals"]),
        ("seed.x=5", ["seed is a value, not a section"]),
        ("train.max_steps=[1", ["train.max_steps"]),
        ("unet.out_channels=6", ["unet.out_channels follows from the codec, and from train.loss.weighting"]),
        ("sample.sampler=dimm", ["sampler is 'dimm'; did you mean 'ddim'?", "predictor-corrector"]),
        ("train.timesteps=even", ["train.timesteps", "'even'"]),
        ("train.los.weighting=vlb", ["unknown key train.los", "train.loss"]),
        ("train.loss.weight=vlb", ["unknown key train.loss.weight", "did you mean train.loss.weighting?"]),
        ("train.loss.weighting=snr", ["train.loss.weighting", "'snr'"]),
        ("train.loss.gamma=3", ["loss.gamma is for weighting min_snr, and weighting is simple"]),
        ("train.loss.vlb_weight=1", ["loss.vlb_weight is for weighting hybrid"]),
        ("train.loss.variance=large", ["loss.variance is for weighting vlb"]),
        ("train.loss={weighting: min_snr, gamma: 0}", ["gamma is 0"]),
        ("train.loss={weighting: hybrid, vlb_weight: -1}", ["vlb_weight is -1"]),
        ("schedule.prediction_type=mean", ["schedule.prediction_type", "'mean'"]),
    ],
)
def test_wrong_keys_and_values_are_explained(override, parts):
    message = refused(override)
    for part in parts:
        assert part in message, message


def test_a_start_that_ruins_latents_is_refused_when_the_config_is_read():
    message = refused("schedule.beta_schedule=cosine", path=LATENT)
    assert "nothing bounds" in message
    assert "scaled_linear" in message
    load_config(LATENT, ["schedule.beta_schedule=cosine", "schedule.prediction_type=v_prediction"], LDMConfig)


ZERO_SNR = "schedule.rescale_betas_zero_snr=true"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["schedule.prediction_type=epsilon"], ["prediction_type is epsilon", "at timestep 999 alpha is 0"]),
        (["schedule.prediction_type=posterior_mean"], ["posterior_mean, which samplers read as noise"]),
        (["train.loss.weighting=min_snr"], ["min_snr, whose weight is 0 where SNR is 0"]),
        (["sample.sampler=langevin"], ["langevin, which walks in x/alpha and cannot start where alpha is 0"]),
    ],
)
def test_what_makes_no_sense_at_zero_terminal_snr_is_refused(overrides, parts):
    message = refused(ZERO_SNR, *overrides)
    for part in (*parts, "rescale_betas_zero_snr"):
        assert part in message, message
    load_config(DIGITS, overrides, LDMConfig)  # and makes sense elsewhere
    load_config(DIGITS, [ZERO_SNR, "train.loss.weighting=vlb", "sample.sampler=ddpm"], LDMConfig)


def test_a_variance_needs_a_second_step():
    few = ["schedule.num_train_timesteps=1", "sample.num_inference_steps=1"]
    for weighting in ("vlb", "hybrid"):
        assert "num_train_timesteps is 1" in refused(*few, f"train.loss.weighting={weighting}")
    load_config(DIGITS, few, LDMConfig)


@pytest.mark.parametrize(
    ("content", "part"),
    [("", "holds no keys"), ("[1, 2]", "holds no keys"), ("a: [", "not valid YAML"), ("output_dir: x", "is missing")],
)
def test_files_that_are_no_config_are_named(tmp_path, content, part):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    message = refused(path=path)
    assert part in message
    assert str(path) in message
    assert "cannot be read" in refused(path=tmp_path / "absent.yaml")


def test_a_grid_that_diffusers_would_not_keep_is_refused_for_latents():
    leading, offset = "schedule.timestep_spacing=leading", "schedule.steps_offset=0"
    assert "steps_offset is 0" in refused(leading, offset, path=LATENT)
    load_config(LATENT, [leading], LDMConfig)
    load_config(DIGITS, [leading, offset], LDMConfig)


def test_nothing_of_a_config_can_be_executed(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    assert "not valid YAML" in refused(path=path)


FINETUNE = next(path for path in CONFIGS if path.name == "finetune.yaml")
LORA = next(path for path in CONFIGS if path.name == "lora.yaml")


@pytest.mark.parametrize(
    ("path", "override", "part"),
    [
        (FINETUNE, "unet.layers_per_block=1", "unet follows from start_from"),
        (FINETUNE, "space=auto", "space follows from start_from"),
        (FINETUNE, "start_from=runs/finetune/pipeline", "inside output_dir"),
        (FINETUNE, "finetune.alpha=4", "alpha is for method lora, and method is full"),
        (FINETUNE, "finetune.methods=lora", "did you mean finetune.method?"),
        (LORA, "finetune.rank=0", "rank is 0"),
        (LORA, "finetune.alpha=-1", "alpha is -1"),
        (LORA, "finetune.target_modules=[]", "target_modules is empty"),
        (LORA, 'finetune.target_modules=[to_q, ""]', "or names nothing"),
        (LORA, "finetune.target_modules=to_q", "finetune.target_modules is 'to_q'"),
        (LORA, "start_from=null", "finetune says how to go on from a model"),
        (DIGITS, "start_from=runs/x/pipeline", "follows from start_from"),
        (DIGITS, "finetune.rank=4", "name that model in start_from"),
        (DIGITS, "unet=null", "unet is missing; describe the network, or name a model to go on from in start_from"),
    ],
)
def test_going_on_from_a_model_takes_all_from_it(path, override, part):
    assert part in refused(override, path=path)


def test_a_run_inside_its_data_is_refused_unless_the_data_is_built_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    message = refused("data.path=./digits", "output_dir=digits/run")
    assert "output_dir 'digits/run' is inside data.path './digits'" in message
    load_config(DIGITS, ["output_dir=digits/run"], LDMConfig)
    load_config(DIGITS, ["data.path=./digits", "output_dir=digits-run"], LDMConfig)


def test_overrides_leave_what_they_change_a_copy_of_alone():
    content = {"train": {"max_steps": 5}}
    assert with_overrides(content, ["train.max_steps=7", "data.path=x"]) == {
        "train": {"max_steps": 7},
        "data": {"path": "x"},
    }
    assert content == {"train": {"max_steps": 5}}


def test_a_fine_tuning_config_writes_only_what_it_may_say():
    written = yaml.safe_load(to_yaml(load_config(LORA, [], LDMConfig)))
    assert not written.keys() & {"unet", "space", "first_stage", "text", "schedule"}
    assert not yaml.safe_load(to_yaml(load_config(DIGITS, [], LDMConfig))).keys() & {"start_from", "finetune"}


FIRST_STAGE = next(path for path in CONFIGS if path.name == "openmoji-first-stage.yaml")
ADVERSARIAL = ["loss.adversarial_weight=0.5"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.perceptual_weight=-1"], "loss: perceptual_weight is -1"),
        (["loss.adversarial_weight=.nan"], "loss: adversarial_weight is nan"),
        (["loss.adversarial_start=-5"], "loss: adversarial_start is -5"),
        (["loss.adaptive_weight_limit=0"], "loss: adaptive_weight_limit is 0"),
        (["loss.reconstruction=l3"], "loss.reconstruction is 'l3'"),
        (["loss.adversarial=wasserstein"], "loss.adversarial is 'wasserstein'"),
        (["discriminator.channel=8"], "did you mean discriminator.channels?"),
        (["discriminator={channels: 12}"], "discriminator: norm_num_groups = 8: must divide the 12 channels"),
        ([*ADVERSARIAL, "loss.adversarial_start=5000"], "adversarial_start is 5000 and train.max_steps 5000"),
        ([*ADVERSARIAL, "data.resolution=4"], "resolution is 4, which discriminator.levels 3 would halve to nothing"),
        ([*ADVERSARIAL, "train.mixed_precision=fp16"], "mixed_precision is fp16, whose range does not hold"),
        (["loss.perceptual_weight=1", "data.resolution=4"], "the perceptual distance needs 8 pixels a side"),
        (["autoencoder=null"], "autoencoder is missing; describe the network, or name one"),
        (["trained=decoder"], "trained is decoder, but a new network has no encoder"),
        (["trained=encoder"], "trained is 'encoder'"),
        (["start_from=runs/openmoji-first-stage/autoencoder"], "start_from is 'runs/openmoji-first-stage/autoencoder'"),
        (["autoencoder.use_quant_conv=false"], "autoencoder.use_quant_conv is false"),
    ],
)
def test_a_first_stage_that_cannot_be_meant_is_refused_when_the_config_is_read(overrides, said):
    assert said in refused(*overrides, path=FIRST_STAGE, kind=AutoencoderTrainingConfig)


def test_a_first_stage_that_goes_on_from_another_leaves_its_shape_out():
    start = ["start_from=openmoji-first-stage", "autoencoder=null", "trained=decoder"]
    config = load_config(FIRST_STAGE, start, AutoencoderTrainingConfig)
    assert (config.autoencoder, config.trained) == (None, "decoder")
    assert parse_config(yaml.safe_load(to_yaml(config)), AutoencoderTrainingConfig, "again") == config
    # What a term needs is asked of runs that have it.
    load_config(FIRST_STAGE, ["train.mixed_precision=fp16", "data.resolution=4"], AutoencoderTrainingConfig)
    load_config(FIRST_STAGE, [*ADVERSARIAL, "loss.adversarial_start=4999"], AutoencoderTrainingConfig)
