"""NoiseSchedule against closed forms and against diffusers."""

import itertools
import json
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from ldm.diffusion import NoiseSchedule, ScheduleConfig, Step
from ldm.diffusion.diffusers_schedulers import config_from_diffusers, config_to_diffusers
from ldm.diffusion.schedule import BetaSchedule, PredictionType, check_first_step

DIFFUSERS_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 7, 100, 1000, 4000])
def test_tables_agree_with_diffusers(name, steps):
    ours = NoiseSchedule.from_config(
        ScheduleConfig(beta_schedule=name, num_train_timesteps=steps, beta_start=1e-4, beta_end=0.02)
    )
    theirs = DDIMScheduler(
        num_train_timesteps=steps, beta_schedule=DIFFUSERS_NAME[name], beta_start=1e-4, beta_end=0.02
    )
    # Theirs is a product of float32 numbers, ours of float64 ones.
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-3, atol=1e-6)
    assert ours.alphas_cumprod.dtype == torch.float64


def test_linear_is_the_product_written_out():
    schedule = NoiseSchedule.from_config(
        ScheduleConfig(beta_schedule="linear", num_train_timesteps=3, beta_start=0.1, beta_end=0.3)
    )
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.betas, torch.tensor([0.1, 0.2, 0.3]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.snr, expected / (1 - expected))


def test_scaled_linear_is_linear_in_the_root():
    betas = NoiseSchedule.from_config(ScheduleConfig()).betas
    roots = betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(999), rtol=1e-7, atol=1e-12)
    assert float(betas[0]) == pytest.approx(0.00085)
    assert float(betas[-1]) == pytest.approx(0.012)


def test_cosine_is_the_formula_of_improved_ddpm():
    schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="cosine"))

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 500, 998):  # the last step is clipped
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert float(schedule.betas[999]) == pytest.approx(0.999)


def test_plain_cosine_is_its_formula_inside_its_margin_and_falls_strictly():
    for steps in (1, 2, 10, 1000, 20000):
        schedule = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="plain_cosine", num_train_timesteps=steps))
        table = schedule.alphas_cumprod
        bare = torch.tensor([(math.cos(math.pi * t / steps) + 1) / 2 for t in range(1, steps + 1)]).double()
        torch.testing.assert_close(table, 1e-4 + (1 - 2e-4) * bare, rtol=0, atol=1e-6)
        assert float((table - bare).abs().max()) <= 1.01e-4
        assert float(table.min()) >= 1e-4 * (1 - 1e-9)
        assert float(table.max()) <= 1 - 1e-4
        assert bool((table.diff() < 0).all())
        assert float(table[-1]) == pytest.approx(1e-4, rel=1e-9)
    check_first_step(schedule, schedule.grid(10), "epsilon", bounded=False)  # with signal enough for ε without a bound


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("rescaled", [False, True])
def test_sigmoid_is_that_of_diffusers(steps, rescaled):
    keys = {"beta_schedule": "sigmoid", "num_train_timesteps": steps, "beta_start": 1e-4, "beta_end": 0.02}
    keys["rescale_betas_zero_snr"] = rescaled and steps > 1
    theirs = DDPMScheduler(**keys)
    ours = NoiseSchedule.from_config(ScheduleConfig(**keys, prediction_type="v_prediction"))
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", get_args(BetaSchedule))
@pytest.mark.parametrize("steps", [2, 17, 1000])
def test_without_terminal_signal_the_last_is_zero_and_the_first_stays(name, steps):
    keys = {"beta_schedule": name, "num_train_timesteps": steps, "prediction_type": "v_prediction"}
    before = NoiseSchedule.from_config(ScheduleConfig(**keys))
    after = NoiseSchedule.from_config(ScheduleConfig(**keys, rescale_betas_zero_snr=True))
    assert float(after.alphas_cumprod[-1]) == 0
    assert (float(after.snr[-1]), float(after.betas[-1])) == (0, 1)
    assert after.alpha_sigma(steps - 1) == (0, 1)
    assert after.error_gain(steps - 1) == math.inf
    assert float(after.alphas_cumprod[0]) == pytest.approx(float(before.alphas_cumprod[0]), rel=1e-14)
    # arXiv:2305.08891, Algorithm 1: affine in √ᾱ.
    moved = (before.alpha - before.alpha[-1]) / (before.alpha[0] - before.alpha[-1]) * before.alpha[0]
    torch.testing.assert_close(after.alpha, moved, rtol=1e-12, atol=1e-15)


def test_a_start_without_any_signal_is_refused_for_the_noise_even_with_a_bound():
    schedule = NoiseSchedule.from_config(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="sample"))
    with pytest.raises(ValueError, match=r"at timestep 999 alpha is 0: .*choose v_prediction or sample"):
        check_first_step(schedule, schedule.grid(10), "epsilon", bounded=True)
    check_first_step(schedule, schedule.grid(10), "v_prediction", bounded=False)
    with pytest.raises(ValueError, match="at timestep 999 alpha is 0"):
        schedule.check_prediction("epsilon")


def test_coefficients_reach_a_device_in_float32():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    like = torch.zeros(2, 3, 4, 4)
    alpha, sigma = schedule.coefficients(torch.tensor([0, 999]), like)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.shape == (2, 1, 1, 1)
    torch.testing.assert_close(alpha.double() ** 2 + sigma.double() ** 2, torch.ones(2, 1, 1, 1).double())
    assert float(alpha[1]) == pytest.approx(float(schedule.alphas_cumprod[999].sqrt()))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("total", [1000, 17])
def test_every_grid_is_that_of_diffusers(spacing, total):
    schedule = NoiseSchedule.from_betas([0.01] * total)
    theirs = DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    for steps in range(1, total + 1):
        grid = schedule.grid(steps, spacing)
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        # numpy's arange makes one element too many for some S, which diffusers then samples at t = -1.
        assert [step.t for step in grid] == expected[:steps], steps
        assert expected[steps:] in ([], [-1])
        assert len(grid) == steps
        assert grid[-1].t_prev == -1
        assert [step.t_prev for step in grid[:-1]] == [step.t for step in grid[1:]]
        assert all(total > t > t_prev for t, t_prev in grid)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.2, 0.3], "beta is 1.2 at timestep 1; it must be strictly between 0 and 1"),
        ([0.1, 1.0, 0.3], "beta is 1.0 at timestep 1"),
        ([0.0, 0.3], "beta is 0.0 at timestep 0"),
        ([0.1, math.nan], "beta is nan at timestep 1"),
        ([[0.1]], r"betas have shape \[1, 1\]"),
    ],
)
def test_wrong_betas_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(betas)
    assert NoiseSchedule.from_betas([0.1, 1.0]).alphas_cumprod.tolist() == [0.9, 0.0]


def test_a_grid_written_out():
    grid = NoiseSchedule.from_betas([0.01] * 10).grid(3, "trailing")
    assert grid == (Step(9, 6), Step(6, 2), Step(2, -1))


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_steps_outside_the_table_are_refused(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}; it must be 1 to 1000"):
        NoiseSchedule.from_config(ScheduleConfig()).grid(steps)


def test_an_offset_that_leaves_the_table_is_refused():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    assert schedule.grid(999, "leading", steps_offset=1)[0].t == 999
    with pytest.raises(ValueError, match="starts at timestep 1000"):
        schedule.grid(1000, "leading", steps_offset=1)


def test_the_end_of_sampling():
    betas = [0.1, 0.2]
    assert NoiseSchedule.from_betas(betas).alpha_sigma(-1) == (1.0, 0.0)
    assert NoiseSchedule.from_betas(betas, set_alpha_to_one=False).alpha_cumprod_at(-1) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="timestep 2 is outside"):
        NoiseSchedule.from_betas(betas).alpha_sigma(2)


@pytest.mark.parametrize("table", [[0.5, 0.6], [1.2, 0.5], [0.5, 0.0, 0.0], [0.5, -0.1], [float("nan")], []])
def test_wrong_tables_are_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(torch.tensor(table))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beta_schedule": "exp"}, "beta_schedule is 'exp'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"beta_start": 0.5}, "beta_start is 0.5"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"trained_betas": (0.1,)}, "trained_betas has 1 entries"),
        ({"rescale_betas_zero_snr": True}, "prediction_type is epsilon, but at timestep 999 alpha is 0"),
        (
            {"trained_betas": (0.1, 1.0), "num_train_timesteps": 2},
            "prediction_type is epsilon, but at timestep 1 alpha is 0",
        ),
        (
            {"rescale_betas_zero_snr": True, "num_train_timesteps": 1, "prediction_type": "sample"},
            "num_train_timesteps is 1",
        ),
    ],
)
def test_wrong_configs_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**keys)


@pytest.mark.parametrize(
    ("schedule", "prediction", "spacing", "bounded", "refused"),
    [
        ("cosine", "epsilon", "trailing", False, True),
        ("cosine", "epsilon", "linspace", False, True),
        ("cosine", "epsilon", "leading", False, False),  # starts at 980, where alpha is 0.03
        ("cosine", "epsilon", "trailing", True, False),
        ("cosine", "v_prediction", "trailing", False, False),
        ("scaled_linear", "epsilon", "trailing", False, False),
    ],
)
def test_a_start_without_signal_needs_a_bound(schedule, prediction, spacing, bounded, refused):
    value = NoiseSchedule.from_config(ScheduleConfig(beta_schedule=schedule))
    grid = value.grid(50, spacing)
    if refused:
        with pytest.raises(ValueError, match=r"choose schedule\.beta_schedule: scaled_linear"):
            check_first_step(value, grid, prediction, bounded=bounded)
    else:
        check_first_step(value, grid, prediction, bounded=bounded)


def test_configs_survive_the_way_through_diffusers():
    config = ScheduleConfig(
        beta_schedule="cosine", prediction_type="v_prediction", steps_offset=2, set_alpha_to_one=False
    )
    written = config_to_diffusers(config)
    assert config_from_diffusers(dict(DDIMScheduler.from_config(written).config)) == config


OWN = tuple(0.01 + 0.001 * i for i in range(20))


@pytest.mark.parametrize(
    ("name", "betas", "rescaled"), list(itertools.product(get_args(BetaSchedule), (None, OWN), (False, True)))
)
def test_every_schedule_is_written_for_diffusers_and_read_back_the_same(name, betas, rescaled):
    base = ScheduleConfig(
        beta_schedule=name,
        trained_betas=betas,
        num_train_timesteps=20 if betas else 1000,
        rescale_betas_zero_snr=rescaled,
        prediction_type="v_prediction",
    )
    for kind in get_args(PredictionType):
        if kind == "epsilon" and rescaled:
            continue
        config = replace(base, prediction_type=kind)
        written = json.loads(json.dumps(config_to_diffusers(config)))
        assert config_from_diffusers(written) == config
        theirs = DDIMScheduler.from_config(written)  # as it reads scheduler_config.json
        ours = NoiseSchedule.from_config(config)
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-3, atol=1e-6)
        assert float(ours.alphas_cumprod[-1] == 0) == float(theirs.alphas_cumprod[-1] == 0) == rescaled
        assert config_from_diffusers(json.loads(theirs.to_json_string())) == config  # and as it writes it


def test_the_sigmoid_of_a_foreign_scheduler_keeps_its_name():
    theirs = DDPMScheduler(beta_schedule="sigmoid", beta_start=0.001, beta_end=0.03, rescale_betas_zero_snr=False)
    config = config_from_diffusers({"_class_name": "DDPMScheduler", **theirs.config})
    assert (config.beta_schedule, config.beta_start, config.trained_betas) == ("sigmoid", 0.001, None)
    assert config_from_diffusers(config_to_diffusers(config)) == config


def test_a_name_that_is_not_that_of_the_table_is_refused():
    written = config_to_diffusers(ScheduleConfig(beta_schedule="plain_cosine", num_train_timesteps=10))
    changed = {**written, "trained_betas": [0.1] * 10}
    with pytest.raises(ValueError, match=r"trained_betas are not those of _ldm\.beta_schedule 'plain_cosine'"):
        config_from_diffusers(changed)
    with pytest.raises(ValueError, match="no name for a table trained_betas; drop _ldm"):
        config_from_diffusers({**written, "trained_betas": None})
    with pytest.raises(ValueError, match="beta_schedule is 'exp'"):
        config_from_diffusers({**written, "_ldm": {"beta_schedule": "exp"}})


def test_the_scheduler_of_stable_diffusion_1_5_is_read():
    theirs = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    config = config_from_diffusers({"_class_name": "PNDMScheduler", **theirs.config})
    assert config == ScheduleConfig(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)


def test_absent_keys_have_the_default_of_their_class():
    assert config_from_diffusers({"_class_name": "EulerDiscreteScheduler"}).timestep_spacing == "linspace"
    assert config_from_diffusers({"_class_name": "DDIMScheduler"}).timestep_spacing == "leading"
    assert not config_from_diffusers({"_class_name": "PNDMScheduler"}).set_alpha_to_one


@pytest.mark.parametrize(
    "keys", [{"beta_schedule": "laplace"}, {"thresholding": True}, {"prediction_type": "flow_prediction"}]
)
def test_schedulers_that_are_not_supported_are_refused_by_name(keys):
    (key,) = keys
    with pytest.raises(ValueError, match=key):
        config_from_diffusers({"_class_name": "DDIMScheduler", **keys})
