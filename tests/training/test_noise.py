"""Randomness that is a function of (seed, epoch, sample, step), and the parts that only depend on the step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.config import TrainConfig
from ldm.data import CaptionedImages, DataConfig, collate, generator, micro_batches
from ldm.data.layouts import open_source
from ldm.training.noise import BatchPositions, step_noise
from ldm.training.trainable import (
    learning_rate,
    make_ema,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)


def draws(ids, *, seed=0, epochs=None, step=3, shape=(2, 4, 4), dropout=0.3):
    return step_noise(
        seed, epochs or [0] * len(ids), ids, step, shape=shape, num_train_timesteps=1000, caption_dropout=dropout
    )


def test_a_sample_draws_the_same_wherever_it_stands():
    whole, part = draws(["a", "b", "c"]), draws(["c"])
    for name in ("timesteps", "dropped", "noise", "posterior"):
        assert torch.equal(getattr(whole, name)[2:], getattr(part, name)), name


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": [1]}, {"step": 4}])
def test_seed_epoch_and_step_all_matter(other):
    one, two = draws(["a"]), draws(["a"], **other)
    assert not torch.equal(one.noise, two.noise)
    assert not torch.equal(one.posterior, two.posterior)


def test_draws_have_the_distributions_of_the_paper():
    many = draws([str(i) for i in range(4000)])
    assert many.timesteps.min() >= 0
    assert many.timesteps.max() <= 999
    counts = torch.bincount(many.timesteps // 100, minlength=10)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi squared, 9 degrees, p = 0.001
    assert float(many.dropped.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    for noise in (many.noise, many.posterior):
        assert float(noise.mean()) == pytest.approx(0, abs=0.02)
        assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(many.noise.flatten(), many.posterior.flatten())[0, 1]) < 0.02
    assert not bool(draws(["a", "b"], dropout=0.0).dropped.any())
    assert bool(draws(["a", "b"], dropout=1.0).dropped.all())


def test_uniform_draws_are_what_they_always_were():
    """Runs that were begun before timesteps could be stratified go on with the same numbers, in the same order."""
    drawn = draws(["a", "b"], seed=1, step=3)
    for i, name in enumerate("ab"):
        draw = generator(1, "step", 0, name, 3)
        assert int(drawn.timesteps[i]) == draw.integers(1000)
        assert bool(drawn.dropped[i]) == (draw.random() < 0.3)
        for which in ("noise", "posterior"):
            assert (getattr(drawn, which)[i].numpy() == draw.standard_normal((2, 4, 4), np.float32)).all()


@pytest.fixture(scope="module")
def digits():
    config = DataConfig(path="digits", resolution=8, flip=True)
    images = CaptionedImages(open_source(config).samples[:20], config, 5)
    images.with_images = False
    return images


def spread(images, step, accumulation, world):
    """(epoch, id) → timestep of a global batch of 16 of 20 images, which crosses epochs, however it is cut up."""
    order, found = images.order(16), {}
    for rank in range(world):
        cut = {"first_step": step, "last_step": step + 1, "accumulation": accumulation, "rank": rank, "world": world}
        for positions in micro_batches(images.order(16), **cut):
            batch = collate([images[position] for position in positions])
            drawn = step_noise(
                5, batch.epochs, batch.ids, step, shape=(1, 1, 1), num_train_timesteps=50,
                positions=BatchPositions.find(order, batch, step),
            )  # fmt: skip
            found |= dict(zip(zip(batch.epochs, batch.ids, strict=True), drawn.timesteps.tolist(), strict=True))
    return found


@pytest.mark.parametrize("step", [0, 3])
def test_stratified_timesteps_do_not_depend_on_batch_splits(step, digits):
    whole = spread(digits, step, 1, 1)
    assert len(whole) == 16
    for place, t in enumerate(whole.values()):  # stratum i of 16 of the 50 timesteps, in whole numbers
        assert place * 50 // 16 <= t <= ((place + 1) * 50 - 1) // 16
    for accumulation, world in ((4, 1), (1, 2), (2, 4), (16, 1)):
        assert spread(digits, step, accumulation, world) == whole


def test_stratified_timesteps_are_uniform_over_many_steps():
    counts = torch.zeros(10, dtype=torch.int64)
    for step in range(400):
        drawn = step_noise(
            0, [0] * 4, list("abcd"), step, shape=(1, 1, 1), num_train_timesteps=10, caption_dropout=0.3,
            positions=BatchPositions(range(4), 4),
        )  # fmt: skip
        counts += torch.bincount(drawn.timesteps, minlength=10)
    assert float(((counts - 160) ** 2 / 160).sum()) < 27.9  # chi squared, 9 degrees, p = 0.001


def test_learning_rates_rise_stay_and_fall():
    constant = TrainConfig(max_steps=100, learning_rate=0.5, warmup_steps=10)
    assert [learning_rate(constant, step) for step in (0, 4, 9, 50)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
    cooled = TrainConfig(max_steps=100, learning_rate=0.5, warmup_steps=10, cooldown_steps=40)
    assert [learning_rate(cooled, step) for step in (0, 50, 60, 80, 100)] == pytest.approx([0.05, 0.5, 0.5, 0.25, 0])
    with pytest.raises(ValueError, match="warmup_steps 10 and cooldown_steps 91 are more than max_steps 100"):
        TrainConfig(max_steps=100, warmup_steps=10, cooldown_steps=91)
    with pytest.raises(ValueError, match='cooldown_steps is for lr_schedule "constant"'):
        TrainConfig(max_steps=100, warmup_steps=10, cooldown_steps=9, lr_schedule="cosine")
    cosine = TrainConfig(max_steps=110, learning_rate=0.5, warmup_steps=10, lr_schedule="cosine")
    assert learning_rate(cosine, 10) == pytest.approx(0.5)
    assert learning_rate(cosine, 60) == pytest.approx(0.25)
    assert learning_rate(cosine, 110) == pytest.approx(0)


def test_the_average_is_that_of_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = make_ema(model, decay=0.6)
    values, average = [2.0, 5.0, -1.0, 4.0, 8.0], None
    for n, value in enumerate(values):
        torch.nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        decay = min(0.6, (1 + n) / (10 + n))
        average = value if average is None else decay * average + (1 - decay) * value
        assert float(ema.module.weight) == pytest.approx(average)
    assert not any(parameter.requires_grad for parameter in ema.parameters())


@pytest.mark.parametrize("before", [True, False])  # fused, and as checkpoints of older versions and of GPUs are
def test_an_optimizer_comes_back_as_it_was(before):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def step(model, optimizer, seed):
        loss = model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    config = TrainConfig(max_steps=10)
    model = network()
    optimizer = make_optimizer(model, config)
    assert optimizer.defaults["fused"] is True  # on a CPU
    optimizer.param_groups[0]["fused"] = before
    for seed in range(3):
        step(model, optimizer, seed)
    again = network()
    again.load_state_dict(model.state_dict())
    optimizer_again = make_optimizer(again, config)
    restore_optimizer(again, optimizer_again, optimizer_tensors(model, optimizer))
    for seed in (3, 4):
        step(model, optimizer, seed)
        step(again, optimizer_again, seed)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0 if before else 1e-7)


def test_weight_decay_and_betas_reach_the_optimizer():
    config = TrainConfig(max_steps=1, weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.7, learning_rate=0.01)
    (group,) = make_optimizer(torch.nn.Linear(2, 2), config).param_groups
    settings = SimpleNamespace(**group)
    assert (settings.weight_decay, settings.betas, settings.lr) == (0.3, (0.5, 0.7), 0.01)
