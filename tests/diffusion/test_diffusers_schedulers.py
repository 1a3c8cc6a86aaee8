"""Scheduler files of diffusers: each class and each key is honored, without effect, or refused by name."""

import importlib
import inspect
import json
import math
import pkgutil

import pytest
import torch
from diffusers import schedulers

from ldm.diffusion import NoiseSchedule, alpha_sigma_at, ddim
from ldm.diffusion.diffusers_schedulers import IGNORED_KEYS, REFUSED, SCHEDULERS, config_from_diffusers


def installed():
    """Every scheduler class of the diffusers that is installed, by name; torchsde, which two need, is not here."""
    found = {}
    for module in pkgutil.iter_modules(schedulers.__path__):
        if module.name.startswith("scheduling_"):
            try:
                content = vars(importlib.import_module(f"diffusers.schedulers.{module.name}"))
            except ImportError:
                continue
            found |= {
                name: value
                for name, value in content.items()
                if inspect.isclass(value) and name.endswith("Scheduler") and hasattr(value, "step")
            }
    return found


INSTALLED = installed()
FAMILY = sorted(SCHEDULERS.keys() & INSTALLED.keys())


def written(name, **keys):
    """The file that a scheduler writes."""
    return json.loads(INSTALLED[name](**keys).to_json_string())


@pytest.mark.parametrize("name", FAMILY)
def test_the_table_knows_each_key_of_a_class_with_its_default(name):
    defaults = {
        key: parameter.default for key, parameter in inspect.signature(INSTALLED[name].__init__).parameters.items()
    }
    del defaults["self"]
    assert set(defaults) <= set(SCHEDULERS[name]) | IGNORED_KEYS
    assert {key: defaults[key] for key in SCHEDULERS[name] if key in defaults} == {
        key: value for key, value in SCHEDULERS[name].items() if key in defaults
    }


def test_most_of_the_family_is_installed():
    assert len(FAMILY) >= 15


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_file_is_read_as_the_scheduler_that_wrote_it_is_made(name, spacing):
    keys = {"beta_schedule": "scaled_linear", "beta_end": 0.013, "timestep_spacing": spacing, "steps_offset": 1}
    keys = {key: value for key, value in keys.items() if key in inspect.signature(INSTALLED[name].__init__).parameters}
    theirs, config = INSTALLED[name](**keys), config_from_diffusers(written(name, **keys))
    ours = NoiseSchedule.from_config(config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    assert config.timestep_spacing == keys.get("timestep_spacing", "linspace")
    # The keys that are left out have the defaults of the class.
    absent = config_from_diffusers({"_class_name": name})
    torch.testing.assert_close(
        NoiseSchedule.from_config(absent).alphas_cumprod,
        INSTALLED[name]().alphas_cumprod.double(),
        rtol=2e-4,
        atol=1e-6,
    )
    # And sampling ends at the same noise level.
    theirs.set_timesteps(10)
    if getattr(theirs, "sigmas", None) is not None:
        alpha, sigma = ours.alpha_sigma(-1)
        assert float(theirs.sigmas[-1]) == pytest.approx(sigma / alpha, rel=1e-3)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_final_sigmas_type_is_where_sampling_ends(name):
    assert config_from_diffusers(written(name)).set_alpha_to_one
    assert not config_from_diffusers(written(name, final_sigmas_type="sigma_min")).set_alpha_to_one
    with pytest.raises(ValueError, match="final_sigmas_type is 'half'; supported are zero, sigma_min"):
        config_from_diffusers({"_class_name": name, "final_sigmas_type": "half"})


DRAWS_NOISE = ("DDPM", "EulerAncestral", "KDPM2Ancestral", "SASolver", "DPMSolverSDE")
DETERMINISTIC = [name for name in FAMILY if not name.startswith(DRAWS_NOISE)]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ddim_on_the_schedule_of_a_folder_comes_to_what_its_scheduler_draws(name):
    keys = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    keys = {key: value for key, value in keys.items() if key in inspect.signature(INSTALLED[name].__init__).parameters}
    config = config_from_diffusers(written(name, **keys))
    schedule = NoiseSchedule.from_config(config)

    def denoise(x, t):
        alpha, sigma = alpha_sigma_at(schedule, float(t))
        return sigma * (x - 0.7 * alpha) / (0.16 * alpha**2 + sigma**2) + 0.05 * torch.tanh(x.roll(1, -1))

    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    differences = []
    for steps in (20, 80):
        theirs = INSTALLED[name](**keys)
        theirs.set_timesteps(steps)
        x = start * theirs.init_noise_sigma
        for t in theirs.timesteps:
            x = theirs.step(denoise(theirs.scale_model_input(x, t), t), t, x).prev_sample
        *_, last = ddim(denoise, start, schedule, schedule.grid(steps, config.timestep_spacing))
        differences.append(float((last.latents - x).abs().max()))
    assert differences[1] < 0.08
    assert differences[1] < 0.75 * differences[0] or differences[0] < 0.01  # of first order, or the same walk


@pytest.mark.parametrize("name", sorted(INSTALLED.keys() - SCHEDULERS.keys()))
def test_every_other_scheduler_of_diffusers_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"scheduler {name} "):
        config_from_diffusers({"_class_name": name})


@pytest.mark.parametrize("name", ["ScoreSdeVpScheduler", "KarrasVeScheduler", "FlaxDDIMScheduler", "MyScheduler", ""])
def test_a_class_that_nobody_knows_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"scheduler {name} does not sample a DDPM schedule, or is not known here"):
        config_from_diffusers({"_class_name": name})


def test_a_misspelt_class_and_a_distilled_network_get_the_way_out():
    with pytest.raises(ValueError, match="did you mean PNDMScheduler"):
        config_from_diffusers({"_class_name": "PNMDScheduler"})
    with pytest.raises(ValueError, match=r"distilled for it.*diffusers\.LCMScheduler\.from_pretrained\(FOLDER"):
        config_from_diffusers({"_class_name": "LCMScheduler"})


OTHER = {"interpolation_type": "log_linear", "timestep_type": "continuous", "lambda_min_clipped": -5.1}
REFUSALS = [(name, key) for name, keys in SCHEDULERS.items() for key in keys if key in REFUSED]


@pytest.mark.parametrize(("name", "key"), REFUSALS)
def test_a_key_that_asks_for_another_walk_is_refused_by_class_and_key(name, key):
    value = OTHER.get(key, True)
    with pytest.raises(ValueError, match=f"scheduler {name} has {key} {value!r}, which .*; (set it to|take a model)"):
        config_from_diffusers({"_class_name": name, key: value})
    # Its default is not, nor null for a switch.
    config_from_diffusers({"_class_name": name, key: SCHEDULERS[name][key]})
    if SCHEDULERS[name][key] is False:
        config_from_diffusers({"_class_name": name, key: None})
        with pytest.raises(ValueError, match=f"{key} 'false'"):
            config_from_diffusers({"_class_name": name, key: "false"})


def test_the_file_of_diffusers_with_the_key_is_refused():
    for name, keys in (
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ):
        with pytest.raises(ValueError, match=f"scheduler {name} has {next(iter(keys))}"):
            config_from_diffusers(written(name, **keys))
    assert math.isinf(written("DPMSolverMultistepScheduler")["lambda_min_clipped"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variance_type": "learned"}, "has variance_type 'learned'; supported are fixed_small"),
        ({"use_new_sigmas": True}, "has use_new_sigmas True, a key that is not known here"),
        ({"shift": 3.0}, "has shift 3.0, a key that is not known here"),
        ({"predict_epsilon": False}, 'has predict_epsilon False, .*set "prediction_type" to "sample"'),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr 'false'; it must be true or false"),
        ({"beta_start": "0.00085"}, "beta_start '0.00085'; it must be a number"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0; it must be a whole number"),
        ({"num_train_timesteps": True}, "num_train_timesteps True; it must be a whole number"),
        ({"trained_betas": "0.1"}, "trained_betas '0.1'; it must be null or a list of numbers"),
        ({"beta_schedule": None}, "beta_schedule None; it must be a text"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    ],
)
def test_a_value_that_means_nothing_here_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        config_from_diffusers({"_class_name": "DDPMScheduler", **keys})


def test_a_key_of_another_class_is_ignored_as_in_diffusers():
    # Schedulers keep the keys of the one they were made from, and write them again.
    stray = {"use_karras_sigmas": True, "timestep_type": "continuous", "use_flow_sigmas": True, "skip_prk_steps": True}
    plain = written("DDIMScheduler")
    assert config_from_diffusers(plain | stray) == config_from_diffusers(plain)
    assert config_from_diffusers(written("EulerDiscreteScheduler") | {"set_alpha_to_one": False}).set_alpha_to_one
    assert config_from_diffusers(plain | {"use_new_sigmas": False, "new": None, "_own": 3, "predict_epsilon": True})


def test_the_class_is_that_of_the_index_where_both_name_one():
    file = written("DDIMScheduler") | {"use_karras_sigmas": True}
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has use_karras_sigmas True"):
        config_from_diffusers(file, "EulerDiscreteScheduler")


PUBLISHED = {
    "1.4, 1.5": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "2.1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    },
    "of 2022": {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "timestep_values": None,
        "trained_betas": None, "variance_type": "fixed_large", "tensor_format": "pt", "predict_epsilon": True,
    },
    "a converted DEIS": {
        "_class_name": "DEISMultistepScheduler", "_diffusers_version": "0.20.0.dev0", "algorithm_type": "deis",
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "dynamic_thresholding_ratio": 0.995, "interpolation_type": "linear", "lower_order_final": True,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
        "skip_prk_steps": True, "solver_order": 2, "solver_type": "logrho", "steps_offset": 1, "thresholding": False,
        "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    },
    "turbo": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.24.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
        "sigma_max": None, "sigma_min": None, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
        "timestep_type": "discrete", "trained_betas": None, "use_karras_sigmas": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_of_published_models_are_read(name):
    config = config_from_diffusers(PUBLISHED[name])
    theirs = INSTALLED[PUBLISHED[name]["_class_name"]].from_config(PUBLISHED[name])
    ours = NoiseSchedule.from_config(config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    assert config.prediction_type == theirs.config.prediction_type
    assert config.timestep_spacing == theirs.config.timestep_spacing


@pytest.mark.parametrize("name", ["IPNDMScheduler", "CosineDPMSolverMultistepScheduler"])
def test_another_scheduler_is_no_misspelling_of_one_that_is_known(name):
    with pytest.raises(ValueError, match=f"{name} does not sample a DDPM schedule.*supported are"):
        config_from_diffusers({"_class_name": name})


def test_a_schedule_that_fills_the_memory_is_refused():
    with pytest.raises(ValueError, match=r"num_train_timesteps is 10000000000; it must be .*1000000"):
        config_from_diffusers({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**10})
