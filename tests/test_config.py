"""Configs: complete, strict, and explained in one line."""

from pathlib import Path

import pytest
import yaml

from ldm.config import AutoencoderTrainingConfig, LDMConfig, parse_config, to_yaml
from ldm.config.overrides import load_config, with_overrides

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


def test_an_unknown_key_is_named_before_wrong_values():
    with pytest.raises(ValueError, match=r"unknown key train\.max_step;"):
        load_config(DIGITS, ["data.resolution=-1", "train.max_step=5"], LDMConfig)


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
        ("train.logit_std=0", ["logit_std is 0"]),
        ("train.logit_mean=nan", ["logit_mean"]),
        ("train.logit_mean=0.5", ["logit_mean", "timestep_density"]),
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


# Texts that YAML 1.1 takes for something else, or for less than they are.
TEXTS = (
    *("no", "on", "y", "True", "null", "~", "007", "1e3", "0x10", "1_000", "12:30:45", "2026-01-01", ".5", ".inf", "5"),
    *("pics #2", "#x", "a: b", "a:b", "{a: b}", "[a", "a, b", '"quoted"', "it's", "@a", "*a", "&a", "!a", "%a", "`a"),
    *(
        "- a",
        "? a",
        "| a",
        "> a",
        "=",
        "<<",
        " leading",
        "trailing ",
        "tab\tinside",
        "two\nlines",
        "ünï 猫",
        "a\\b",
        "…",
    ),
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_keys_take_their_text_as_it_stands_and_a_written_config_gives_it_back(text, tmp_path):
    overrides = [f"output_dir=runs/{text}", f"data.path={text}", f"data.split={text}", f"text.encoder={text}"]
    config = load_config(DIGITS, overrides, LDMConfig)
    assert (config.output_dir, config.data.path, config.data.split) == (f"runs/{text}", text, text)
    assert config.text.encoder == text
    content = yaml.safe_load(DIGITS.read_text())
    content["sample"]["prompts"] = [text, "another"]
    content["data"] |= {"path": text, "image_column": text}
    written = parse_config(content, LDMConfig, "the test")
    (tmp_path / "config.yaml").write_text(to_yaml(written), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml", [], LDMConfig) == written
    assert written.sample.prompts[0] == written.data.image_column == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("no", "no"),
        ("bf16", "bf16"),
    ],
)
def test_a_word_that_yaml_takes_for_false_is_a_word(value, expected, tmp_path):
    for text in (value, f'"{value}"', f"'{value}'"):  # quotes, as YAML needs them
        assert load_config(DIGITS, [f"train.mixed_precision={text}"], LDMConfig).train.mixed_precision == expected
    changed = DIGITS.read_text().replace("train:\n", f"train:\n  mixed_precision: {value}\n")
    (tmp_path / "c.yaml").write_text(changed)
    assert load_config(tmp_path / "c.yaml", [], LDMConfig).train.mixed_precision == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[a red square, a blue circle]", ("a red square", "a blue circle")),
        ("  [ a ,b,]  ", ("a", "b")),
        ("[a cat: sitting, a dog #2, it's]", ("a cat: sitting", "a dog #2", "it's")),
        ('["a, b", \'it\'\'s "so"\', "tab\\t", ""]', ("a, b", 'it\'s "so"', "tab\t", "")),
        (
            "[no, 007, 1e3, null, 12:30, @a, *a, &a, !a, %a]",
            ("no", "007", "1e3", "null", "12:30", "@a", "*a", "&a", "!a", "%a"),
        ),
        ("[a [b] c, {} of {}]", ("a [b] c", "{} of {}")),
        ("[a]", ("a",)),
    ],
)
def test_lists_of_texts_are_split_at_commas_alone(written, expected):
    assert load_config(DIGITS, [f"sample.prompts={written}"], LDMConfig).sample.prompts == expected


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sample.prompts=[a, b", "without its closing bracket"),
        ("sample.prompts=[a, b] # two", "without its closing bracket"),
        ("sample.prompts=[a,, b]", "has an empty element"),
        ("sample.prompts=[[a, b], c]", "has a list in it"),
        ('sample.prompts=["a, b" c]', "a quote is not closed, or not at the end of its element"),
        ('sample.prompts=[ "a" c]', "a quote is not closed, or not at the end of its element"),
        ("sample.prompts=['a, b]", "a quote is not closed"),
        ('sample.prompts=["\\q"]', "no value in YAML"),
        ("sample.prompts=a cat", "write a list, [a cat]"),
        ("data.subset=", "data.subset is empty; write data.subset=null for none"),
        ("first_stage= ", "first_stage is empty"),
        ("text.max_length=", "text.max_length is empty"),
        ("train.max_steps=true", "train.max_steps is 'true'; it must be a whole number"),
        ("train.max_steps=yes", "train.max_steps is 'yes'"),
        ("train.batch_size=010", "train.batch_size is '010'; it must be a whole number, without leading zeros"),
        ("train.learning_rate=010", "without leading zeros"),
        ("train.max_steps=12:30", "train.max_steps is '12:30'"),
        ("train.max_steps=2026-01-01", "train.max_steps is '2026-01-01'"),
        ("train.max_steps=1e-3", "train.max_steps is '1e-3'"),
        ("train.max_steps=.nan", "train.max_steps is '.nan'"),
        ("train.max_steps=1e300", "train.max_steps is '1e300'"),
        ("train.max_steps=9223372036854775808", "must be a whole number below 2**63"),
        ("sample.seed=-1", "seed is -1; it must be a whole number from 0 on"),
        ("sample.seed=9223372036854775807", "seed is 9223372036854775807"),
        ("seed=-9223372036854775809", "must be a whole number below 2**63"),
        ("train.max_steps=٣", "train.max_steps is '٣'"),
        ("train.max_steps=[5]", "train.max_steps is '[5]'"),
        ("text.max_length=none", "it must be a whole number, or null"),
        ("unet.layers_per_block=two", "a whole number, or a list of them: [1, 2]"),
        ("unet.block_out_channels=[8, x]", "unet.block_out_channels.1 is 'x'"),
        ("data.flip=maybe", "data.flip is 'maybe'"),
        ("train=5", "train is '5', and it is a section; set one of its keys, train.max_steps=…"),
        ("train.loss={weighting: vlb", "it is a section"),
        ("train.loss={weighting: vlb, weighting: min_snr}", "weighting stands in line 1 and again in line 1"),
        ("first_stage.x=5", "first_stage is a value, not a section"),
        (
            "data.path=~no-such-user/pics",
            "data.path is '~no-such-user/pics'",
        ),
        ("output_dir=~no-such-user/run", "output_dir: ~no-such-user/run"),
    ],
)
def test_values_of_set_that_cannot_be_meant_are_explained(override, part):
    assert part in refused(override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3.0),
        ("1_000", 1000.0),
        ("0x10", 16.0),
        ("2", 2.0),
    ],
)
def test_numbers_are_read_the_same_in_a_file_and_behind_set(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(DIGITS.read_text().replace("1.0e-3", text))
    for config in (
        load_config(tmp_path / "c.yaml", [], LDMConfig),
        load_config(DIGITS, [f"train.learning_rate={text}"], LDMConfig),
    ):
        assert config.train.learning_rate == expected and type(config.train.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "expected"), [("1e3", 1000), ("1_000", 1000), ("+3", 3), ("0x10", 16), ("7.0", 7), (" 7 ", 7)]
)
def test_whole_numbers_are_read_the_same_in_a_file_and_behind_set(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(DIGITS.read_text().replace("max_steps: 1000", f"max_steps: {text}"))
    for config in (
        load_config(tmp_path / "c.yaml", [], LDMConfig),
        load_config(DIGITS, [f"train.max_steps={text}"], LDMConfig),
    ):
        assert config.train.max_steps == expected and type(config.train.max_steps) is int


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "1"])
def test_truth_values_are_what_they_were(word):
    assert load_config(DIGITS, [f"data.flip={word}"], LDMConfig).data.flip is True
    config = load_config(
        DIGITS, ["data.buckets=null", "data.flip=off", "first_stage=null", "data.subset=null"], LDMConfig
    )
    assert (config.data.buckets, config.data.flip, config.first_stage, config.data.subset) == (None, False, None, None)


def float_keys(kind, section=""):
    config = load_config(DIGITS, [], LDMConfig)
    for name in section.split(".") if section else []:
        config = getattr(config, name)
    found = []
    for key, value in vars(config).items():
        if isinstance(value, float):
            found.append(f"{section}.{key}")
        elif hasattr(value, "__dataclass_fields__"):
            found += float_keys(kind, f"{section}.{key}" if section else key)
    return found


@pytest.mark.parametrize("key", float_keys(LDMConfig))
@pytest.mark.parametrize("value", ["nan", ".inf", "-inf"])
def test_no_number_of_a_config_may_be_infinite(key, value):
    refused(f"{key}={value}")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed: 0\n": "seed: 0\nseed: 1\n"}, "seed stands in line 3 and again in line 4; leave one out"),
        ({"  batch_size: 128\n": "  batch_size: 128\n  'batch_size': 8\n"}, "batch_size stands in line"),
        ({"batch_size: 128": "batch_size: 0128"}, "train.batch_size is '0128'; it must be a whole number"),
        ({"batch_size: 128": "batch_size: yes"}, "train.batch_size is 'yes'"),
        ({"path: digits": "path: digits\t# tab"}, "found character '\\t' that cannot start any token"),
        ({"  path: digits": "\tpath: digits"}, "not valid YAML"),
        ({"path: digits": "path: null"}, "data.path is null, where a text is wanted; put it in quotes if it is one"),
        ({"path: digits": "path: {a: b}"}, "data.path is {'a': 'b'}, where a text is wanted"),
        (
            {"the digit 5": "a digit: 5"},
            "sample.prompts.5 is {'a digit': '5'}, where a text is wanted; put it in quotes",
        ),
        ({"seed: 0": "seed: !!int x"}, "not valid YAML"),
        ({"seed: 0": f"seed: {'[' * 900}"}, "nested too deeply"),
        ({"seed: 0": "seed: &a [*a]"}, "seed is"),
        ({"path: digits": "path: " + "a" * 1000 + ": b"}, "not valid YAML"),
    ],
)
def test_files_that_yaml_reads_otherwise_than_they_look_are_refused(change, part, tmp_path):
    text = DIGITS.read_text()
    for before, after in change.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "c.yaml").write_text(text)
    message = refused(path=tmp_path / "c.yaml")
    assert part in message and len(message) < 600, message


def test_merge_keys_anchors_and_a_byte_order_mark_are_read(tmp_path):
    text = DIGITS.read_text().replace("train:\n", "train:\n  <<: {max_steps: 5, log_every: 7}\n")
    text = text.replace("guidance_scale: 2.0", "guidance_scale: &g 3.5")
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8-sig", newline="\r\n")
    config = load_config(tmp_path / "c.yaml", [], LDMConfig)
    assert (config.train.max_steps, config.train.log_every, config.sample.guidance_scale) == (1000, 7, 3.5)


def test_a_value_that_aliases_make_endless_is_shown_in_a_few_words(tmp_path):
    lists = ["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7))]
    text = DIGITS.read_text().replace("output_dir: runs/digits", f"output_dir: [{', '.join(lists)}]")
    (tmp_path / "c.yaml").write_text(text)
    message = refused(path=tmp_path / "c.yaml")
    assert "output_dir is [" in message and len(message) < 1000


def test_a_config_of_the_other_script_says_which_one_takes_it():
    message = refused(path=next(path for path in CONFIGS if path.name == "openmoji-first-stage-vq.yaml"))
    assert "openmoji-first-stage-vq.yaml is for train/train_autoencoder.py, not for train/train_ldm.py" in message
    assert "revive_codes_after" in message
    for path in (DIGITS, LORA):
        message = refused(path=path, kind=AutoencoderTrainingConfig)
        assert "is for train/train_ldm.py, not for train/train_autoencoder.py" in message
    assert "unknown key autoencoder; it is a key of train/train_autoencoder.py" in refused("autoencoder={}")
    message = refused("train.caption_dropout=0", path=FIRST_STAGE, kind=AutoencoderTrainingConfig)
    assert "unknown key train.caption_dropout; it is a key of train/train_ldm.py" in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            "model:\n  base_learning_rate: 1e-6\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n",
            ["model.target", "CompVis"],
        ),
        ("pretrained_model_name_or_path: x\nnetwork_module: networks.lora\n", ["network_module", "kohya"]),
        ("pretrained_model_name_or_path: x\ninstance_data_dir: pics\noutput_dir: out\n", ["diffusers"]),
        ('{"_class_name": "UNet2DConditionModel", "sample_size": 64}', ["_class_name", "diffusers"]),
        ('{"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}', ["transformers"]),
        ("compute_environment: LOCAL_MACHINE\nnum_processes: 2\n", ["accelerate"]),
        ("job: extension\nconfig: {name: x}\n", ["ai-toolkit"]),
    ],
)
def test_configs_of_other_tools_are_called_what_they_are(content, parts, tmp_path):
    (tmp_path / "theirs.yaml").write_text(content)
    for kind in (LDMConfig, AutoencoderTrainingConfig):
        message = refused(path=tmp_path / "theirs.yaml", kind=kind)
        assert all(part in message for part in [*parts, "theirs.yaml", "configs/"]), message
        assert "did you mean" not in message


def test_a_hint_is_given_for_near_keys_alone():
    assert "unknown key model; known are data, " in refused("model=x")
    message = refused("train.foo=1")
    assert "did you mean" not in message and "known in train are train.adam_beta1, " in message
    assert "did you mean train.loss.gamma?" in refused("train.loss.gama=1")
    assert "did you mean train.batch_size?" in refused("batch_size=1")


def test_a_folder_or_a_toml_file_is_no_config_and_a_home_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(DIGITS.read_text())
    assert f"is a folder; name a YAML file, {tmp_path / 'config.yaml'}" in refused(path=tmp_path)
    (tmp_path / "kohya.toml").write_text("[model_arguments]\n")
    assert "kohya.toml is TOML" in refused(path=tmp_path / "kohya.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(Path("~/config.yaml"), [], LDMConfig).output_dir == "runs/digits"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_posterior_mean_is_trained_in_float32(precision):
    changes = ["schedule.prediction_type=posterior_mean", "schedule.timestep_spacing=leading"]
    with pytest.raises(ValueError, match=f"posterior_mean, of which {precision} leaves noise alone"):
        load_config(DIGITS, [*changes, f"train.mixed_precision={precision}"], LDMConfig)
    load_config(DIGITS, [*changes, "train.mixed_precision=no"], LDMConfig)


@pytest.mark.parametrize("weighting", ["vlb", "hybrid"])
def test_the_bound_needs_uniform_timesteps(weighting):
    message = refused("train.timestep_density=logit_normal", f"train.loss.weighting={weighting}")
    assert "timestep_density" in message and weighting in message
