"""Randomness that is a function of (seed, epoch, sample, step), and the parts that only depend on the step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.config import TrainConfig
from ldm.training.draws import keyed_draws
from ldm.training.optimisation import (
    learning_rate,
    make_ema,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)


def draws(ids, *, seed=0, epochs=None, step=3, shape=(2, 4, 4), dropout=0.3):
    return keyed_draws(
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


def test_learning_rates_rise_stay_and_fall():
    constant = TrainConfig(max_steps=100, learning_rate=0.5, warmup_steps=10)
    assert [learning_rate(constant, step) for step in (0, 4, 9, 50)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
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


def test_an_optimizer_comes_back_as_it_was():
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
        assert torch.equal(one, two)


def test_weight_decay_and_betas_reach_the_optimizer():
    config = TrainConfig(max_steps=1, weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.7, learning_rate=0.01)
    (group,) = make_optimizer(torch.nn.Linear(2, 2), config).param_groups
    settings = SimpleNamespace(**group)
    assert (settings.weight_decay, settings.betas, settings.lr) == (0.3, (0.5, 0.7), 0.01)
