"""Data N(mean, deviation²): everything that a sampler approximates has a closed form."""

from __future__ import annotations

import itertools
import math

import torch

from ldm.diffusion import NoiseSchedule, Step

MEAN, DEVIATION = 0.7, 0.4


def marginal(level):
    """Mean and variance of x_t at (alpha, sigma)."""
    alpha, sigma = level
    return alpha * MEAN, alpha**2 * DEVIATION**2 + sigma**2


def exact(schedule, kind="epsilon"):
    """The prediction at x_t that follows from E[x_0 | x_t]; nothing is divided by alpha or sigma."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        mean, variance = marginal((alpha, sigma))
        noise = sigma / variance * (x - mean)
        original = MEAN + alpha * DEVIATION**2 / variance * (x - mean)
        return {"epsilon": noise, "sample": original, "v_prediction": alpha * noise - sigma * original}[kind]

    return denoise


def flow(x, start, end):
    """Where the probability flow ODE takes x from one level (alpha, sigma) to another: the same quantile."""
    (mean, variance), (mean_end, variance_end) = marginal(start), marginal(end)
    return mean_end + math.sqrt(variance_end / variance) * (x - mean)


def log_snr_uniform(size=2049, largest=3.0):
    """A table whose λ = log(α/σ) falls in equal steps from `largest` to its negative."""
    half_log_snr = torch.linspace(largest, -largest, size, dtype=torch.float64)
    return NoiseSchedule(torch.sigmoid(2 * half_log_snr))


def interior_grid(schedule, steps):
    """`steps` equal steps from the last timestep to timestep 0, where there still is noise."""
    last = schedule.num_train_timesteps - 1
    assert last % steps == 0
    timesteps = range(last, -1, -last // steps)
    return [Step(t, t_prev) for t, t_prev in itertools.pairwise(timesteps)]


def slope(steps, errors):
    """The order p in error ~ steps^−p, by least squares in the logarithms."""
    x, y = (torch.tensor([math.log(value) for value in values]) for values in (steps, errors))
    return float(-((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


class Coefficients:
    """Exact moments of a linear sampler, without drawing a number.

    The exact denoiser is affine, so a sample is c_0 + c_1 u + Σ c_i z_i with u and all z_i standard normal. The
    sampler runs on the rows c_i instead of numbers: `latents` [count, 1] and `noise()`, the next unit vector.
    """

    def __init__(self, count, start):
        mean, variance = marginal(start)
        self.latents = torch.zeros(count, 1, dtype=torch.float64)
        self.latents[0], self.latents[1] = mean, math.sqrt(variance)
        self.drawn = 1

    def noise(self):
        self.drawn += 1
        unit = torch.zeros_like(self.latents)
        unit[self.drawn] = 1
        return unit

    def denoiser(self, schedule, kind="epsilon"):
        denoise = exact(schedule, kind)

        def on_rows(rows, t):
            zero = torch.zeros(1, 1, dtype=torch.float64)
            constant = denoise(zero, t)
            moved = denoise(rows, t) - constant
            moved[0] += constant[0]
            return moved

        return on_rows

    @staticmethod
    def moments(rows):
        return float(rows[0]), float(rows[1:].square().sum())
