"""DDPM, DDIM and inversion: step by step against diffusers, and what is refused."""

import pytest
import torch

from ldm.diffusion import NoiseSchedule, ScheduleConfig, Step, ddim, ddim_inversion, ddpm

KEYS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())
SHAPE = (2, 3, 4, 4)


def network(x, t):
    """Some smooth function, other at every timestep."""
    return torch.tanh(x * 0.7 + 0.001 * t) + 0.1 * x.roll(1, -1)


def with_variance(x, t):
    """[B, 2C, H, W]: the same prediction, and ν in (−1, 1)."""
    return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def shared_noise(count, shape):
    drawn = iter(torch.randn(count, *shape, generator=torch.Generator().manual_seed(3)))
    return lambda: next(drawn)


def pairs(timesteps):
    """The grid of a list of timesteps that diffusers printed."""
    return [Step(t, t_prev) for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True)]


def clamp(x):
    return x.clamp(-1, 1)


def assert_near(ours, theirs):
    # Their table is a product of float32 numbers.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "to_one"),
    # 30 does not divide 1000; the stride 1000 // 30 of their previous timestep is that of "leading" all the same
    [(20, "trailing", 0, True), (20, "leading", 1, False), (30, "leading", 0, True)],
)
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_that_of_diffusers_step_by_step(kind, eta, steps, spacing, offset, to_one, clip):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        **KEYS, prediction_type=kind, clip_sample=clip, set_alpha_to_one=to_one, steps_offset=offset,
        timestep_spacing=spacing,
    )  # fmt: skip
    schedule = NoiseSchedule.from_config(ScheduleConfig(set_alpha_to_one=to_one))
    theirs.set_timesteps(steps)
    ours_noise, their_noise = (shared_noise(steps, SHAPE) for _ in range(2))
    states = ddim(
        network, start(), schedule, pairs(theirs.timesteps.tolist()), eta=eta, noise=ours_noise,
        clip_x0=clamp if clip else (lambda x: x), prediction_type=kind,
    )  # fmt: skip
    latents = start()
    for state, t in zip(states, theirs.timesteps.tolist(), strict=True):
        step = theirs.step(
            network(latents, t), t, latents, eta=eta, use_clipped_model_output=clip,
            variance_noise=their_noise() if eta > 0 else None,
        )  # fmt: skip
        latents = step.prev_sample
        assert state.timestep == t
        assert_near(state.latents, latents)
        assert_near(state.pred_original_sample, step.pred_original_sample)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("steps", "spacing"), [(20, "linspace"), (30, "linspace"), (30, "trailing"), (7, "trailing")])
def test_ddim_walks_the_printed_grid_where_that_of_diffusers_leaves_it(eta, steps, spacing):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**KEYS, clip_sample=False, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    printed = theirs.timesteps.tolist()
    theirs_next = [t - 1000 // steps for t in printed]
    assert theirs_next[:-1] != printed[1:]
    assert SCHEDULE.grid(steps, spacing) == tuple(pairs(printed))
    states = ddim(network, start(), SCHEDULE, SCHEDULE.grid(steps, spacing), eta=eta, noise=shared_noise(steps, SHAPE))
    assert [state.timestep for state in states] == printed
    # The formula is the same: over the pairs that they really walk, each step agrees.
    latents, ours_noise, their_noise = start(), shared_noise(steps, SHAPE), shared_noise(steps, SHAPE)
    for t, t_prev in zip(printed, theirs_next, strict=True):
        pair = Step(t, max(t_prev, -1))
        (state,) = ddim(network, latents, SCHEDULE, [pair], eta=eta, noise=ours_noise)
        drawn = their_noise() if eta > 0 else None
        latents = theirs.step(network(latents, t), t, latents, eta=eta, variance_noise=drawn).prev_sample
        assert_near(state.latents, latents)


@pytest.mark.parametrize(("steps", "spacing"), [(1000, "trailing"), (50, "trailing"), (30, "linspace"), (7, "leading")])
@pytest.mark.parametrize(
    ("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm_is_that_of_diffusers_step_by_step(variance, name, steps, spacing):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**KEYS, variance_type=name, clip_sample=False, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    grid = pairs(theirs.timesteps.tolist())
    denoise = with_variance if variance == "learned" else network
    latents = start()
    for step in grid:
        # Theirs draws inside step(), ours asks for noise: the same numbers for both.
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step.t))
        (state,) = ddpm(denoise, latents, SCHEDULE, [step], noise=lambda drawn=drawn: drawn, variance=variance)
        generator = torch.Generator().manual_seed(step.t)
        after = theirs.step(denoise(latents, step.t), step.t, latents, generator=generator)
        if step.t_prev == -1 and step.t > 0 and variance != "small":
            # Algorithm 2 adds no noise in the last step; theirs does so only at t = 0.
            after.prev_sample = state.pred_original_sample
        torch.testing.assert_close(state.latents, after.prev_sample, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(state.pred_original_sample, after.pred_original_sample, rtol=1e-3, atol=1e-3)
        latents = state.latents


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sigma_hat_is_ddpm_with_the_variance_beta(kind):
    grid = SCHEDULE.grid(10)
    ours = ddim(
        network, start(), SCHEDULE, grid, eta=1, variance="sigma_hat", noise=shared_noise(10, SHAPE), clip_x0=clamp,
        prediction_type=kind,
    )  # fmt: skip
    other = ddpm(
        network, start(), SCHEDULE, grid, variance="large", noise=shared_noise(10, SHAPE), clip_x0=clamp,
        prediction_type=kind,
    )  # fmt: skip
    for one, two in zip(ours, other, strict=True):
        torch.testing.assert_close(one.latents, two.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [ddim, ddpm, ddim_inversion])
def test_a_network_of_learned_variance_serves_every_sampler(sampler):
    keys = {"noise": lambda: torch.ones(SHAPE)} if sampler is not ddim_inversion else {}
    for one, two in zip(
        sampler(with_variance, start(), SCHEDULE, SCHEDULE.grid(3), **keys),
        sampler(network, start(), SCHEDULE, SCHEDULE.grid(3), **keys),
        strict=True,
    ):
        assert torch.equal(one.latents, two.latents)


@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "to_one"),
    [(20, "leading", 1, True), (20, "leading", 0, False), (30, "leading", 0, True), (20, "trailing", 0, True)],
)
def test_inversion_is_that_of_diffusers_step_by_step(steps, spacing, offset, to_one):
    # The arithmetic of a step: their pipelines ask the network under t, we under the label of the state it sees.
    # Not lined up: "trailing" where S does not divide T (their stride leaves the grid), x_0 (they divide by σ = 0
    # at the start).
    from diffusers import DDIMInverseScheduler

    theirs = DDIMInverseScheduler(
        **KEYS, clip_sample=False, set_alpha_to_one=to_one, steps_offset=offset, timestep_spacing=spacing
    )
    schedule = NoiseSchedule.from_config(ScheduleConfig(set_alpha_to_one=to_one))
    theirs.set_timesteps(steps)
    grid = schedule.grid(steps, spacing, steps_offset=offset)
    assert [step.t for step in reversed(grid)] == theirs.timesteps.tolist()
    latents = start()
    states = ddim_inversion(network, start(), schedule, grid)
    for state, t, step in zip(states, theirs.timesteps.tolist(), reversed(grid), strict=True):
        label = step.t_prev if step.t_prev >= 0 else t if to_one else 0
        after = theirs.step(network(latents, label), t, latents)
        latents = after.prev_sample
        assert state.timestep == step.t_prev
        assert_near(state.latents, latents)
        assert_near(state.pred_original_sample, after.pred_original_sample)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}; it must be 0"):
        next(ddim(network, start(), SCHEDULE, SCHEDULE.grid(2), eta=eta))


def test_unknown_variances_are_refused():
    grid = SCHEDULE.grid(2)
    with pytest.raises(ValueError, match="variance is 'medium'; choose small"):
        next(ddpm(network, start(), SCHEDULE, grid, noise=lambda: 0, variance="medium"))
    with pytest.raises(ValueError, match="variance is 'large'; choose ddim"):
        next(ddim(network, start(), SCHEDULE, grid, variance="large"))
    with pytest.raises(ValueError, match=r"eta is 0\.5 with variance sigma_hat"):
        next(ddim(network, start(), SCHEDULE, grid, variance="sigma_hat", eta=0.5, noise=start))


def test_a_learned_variance_needs_a_network_that_gives_it():
    with pytest.raises(ValueError, match="variance is learned but the network gives 3 channels"):
        next(ddpm(network, start(), SCHEDULE, SCHEDULE.grid(2), noise=start, variance="learned"))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "the grid has 0 steps; it must have 1 to 1000"),
        ([Step(1, 0)] * 1001, "the grid has 1001 steps; it must have 1 to 1000"),
        ([Step(5, 9)], "goes from timestep 5 to 9; t_prev must be below t"),
        ([Step(5, 5)], "goes from timestep 5 to 5"),
        ([Step(9, 5), Step(4, -1)], "starts at timestep 4 but the one before ends at 5"),
        ([Step(1000, 5)], "timestep 1000 is outside"),
        ([Step(5, -2)], "timestep -2 is outside"),
    ],
)
@pytest.mark.parametrize("sampler", [ddim, ddim_inversion])
def test_wrong_grids_are_refused(sampler, grid, message):
    with pytest.raises(ValueError, match=message):
        next(sampler(network, start(), SCHEDULE, grid))


def test_a_step_that_starts_without_noise_is_refused():
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="alphas_cumprod is 1 at timestep 0"):
        next(ddim(network, start(), schedule, schedule.grid(2)))
    (state,) = ddpm(with_variance, start(), schedule, [Step(1, 0)], noise=start, variance="learned")
    assert state.latents.isfinite().all()  # β̃ = 0, and its logarithm is clipped
