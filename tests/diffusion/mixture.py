"""Data whose every density is known: a mixture of Gaussians in the plane, in classes."""

import math

import torch

MEANS = torch.tensor([[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0], [1.0, 2.5]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.5, 0.4, 0.25], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.3, 0.35, 0.15], dtype=torch.float64)
CLASS_OF = torch.tensor([0, 1, 2, 0])  # class 0 is two of the Gaussians, one heavier than the other
CLASSES = 3


def of_class(label, count=1):
    """The condition that selects one class, [count, 1, 4]: which of the Gaussians may be meant."""
    return torch.eq(CLASS_OF, label).double().expand(count, 1, -1)


def of_all(count=1):
    return torch.ones(count, 1, len(WEIGHTS), dtype=torch.float64)


def log_densities(x, states, alpha, sigma):
    """log of weight × density of x_t = α x_0 + σ ε [B, 2, 1, 1] under each Gaussian that `states` selects, [B, 4]."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2  # [4]
    distance = (x.flatten(1)[:, None] - alpha * MEANS).square().sum(-1)  # [B, 4]
    return (WEIGHTS * states[:, 0]).log() - distance / (2 * variance) - (2 * math.pi * variance).log()


def log_density(x, states, alpha, sigma):
    """log p(x_t | one of the selected), up to a constant that no gradient sees, [B]."""
    return log_densities(x, states, alpha, sigma).logsumexp(1)


def score(x, states, alpha, sigma):
    """∇ log p(x_t), by autograd of the density: it shares nothing with `exact_noise` but the density."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(log_density(x, states, alpha, sigma).sum(), x)[0]


def exact_noise(x, states, alpha, sigma):
    """E[ε | x_t], from the posterior means of the Gaussians; [B, 2, 1, 1]."""
    share = log_densities(x, states, alpha, sigma).softmax(1)  # [B, 4]
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    gain = (alpha * DEVIATIONS**2 / variance)[:, None]  # [4, 1]
    means = MEANS + gain * (x.flatten(1)[:, None] - alpha * MEANS)  # [B, 4, 2]
    original = (share[..., None] * means).sum(1)
    return (x - alpha * original.view_as(x)) / sigma


def log_class(label, alpha, sigma):
    """x_t → log p(class | x_t), [B]."""

    def value(x):
        chosen, every = of_class(label, len(x)), of_all(len(x))
        return log_density(x, chosen, alpha, sigma) - log_density(x, every, alpha, sigma)

    return value
