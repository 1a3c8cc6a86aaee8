"""NoiseSchedule against closed forms and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from ldm.diffusion import NoiseSchedule, ScheduleConfig, Step
from ldm.diffusion.schedule import check_start, config_from_diffusers, config_to_diffusers

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


@pytest.mark.parametrize("table", [[0.5, 0.6], [1.2, 0.5], [0.5, 0.0], [float("nan")], []])
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
            check_start(value, grid, prediction, bounded=bounded)
    else:
        check_start(value, grid, prediction, bounded=bounded)


def test_configs_survive_the_way_through_diffusers():
    config = ScheduleConfig(
        beta_schedule="cosine", prediction_type="v_prediction", steps_offset=2, set_alpha_to_one=False
    )
    written = config_to_diffusers(config)
    assert config_from_diffusers(dict(DDIMScheduler.from_config(written).config)) == config


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
    "keys", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}, {"thresholding": True}]
)
def test_schedulers_that_are_not_supported_are_refused_by_name(keys):
    (key,) = keys
    with pytest.raises(ValueError, match=key):
        config_from_diffusers({"_class_name": "DDIMScheduler", **keys})
