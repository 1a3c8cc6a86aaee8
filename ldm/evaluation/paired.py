"""Which of two settings is better, where both drew from the same captions and the same noise.

What the pictures share, and the images that they are compared with, cancels in the difference of two figures, so that
it is known far better than either. The jackknife (leave out one image, and the pictures of its captions, at a time)
gives the standard error of a difference for any figure whose values without each image are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kid_without_each(generated: Tensor, reference: Tensor, images: Tensor) -> tuple[float, Tensor]:
    """The Kernel Inception Distance (arXiv:1801.01401), and what it would be without each image.

    The unbiased estimate of MMD² with the kernel (x·y/D + 1)³: it needs no more samples than it has features, and its
    mean does not depend on their number, so that a few hundred pictures will do for a comparison.

    Args:
        generated: [N, D] features of pictures.
        reference: [M, D] features of the images whose captions they were drawn for.
        images: int64 [N], 0 to M − 1: for which image each picture was drawn; at least one for each.

    Returns:
        The estimate, and [M] estimates without image j and without the pictures of its captions; float64.
    """
    count, number = len(generated), len(reference)
    among, across, within = _kernel(generated, generated), _kernel(generated, reference), _kernel(reference, reference)
    among.fill_diagonal_(0)  # the unbiased estimate compares nothing with itself
    within.fill_diagonal_(0)
    of_image = torch.zeros(number, count, dtype=torch.float64)
    of_image[images, torch.arange(count)] = 1
    pictures = of_image.sum(dim=1)  # [M]
    assert bool((pictures > 0).all()), "an image without a picture"

    # Sums over all pairs, less those in which image j or a picture of it takes part.
    own = of_image @ among  # [M, N]
    left = among.sum() - 2 * own.sum(dim=1) + (own * of_image).sum(dim=1)
    crossed = across.sum() - (of_image @ across).sum(dim=1) - across.sum(dim=0) + (of_image @ across).diagonal()
    others = within.sum() - 2 * within.sum(dim=1)
    n, m = count - pictures, number - 1
    without = left / (n * (n - 1)) + others / (m * (m - 1)) - 2 * crossed / (n * m)
    whole = among.sum() / (count * (count - 1)) + within.sum() / (number * (number - 1)) - 2 * across.mean()
    return float(whole), without


def mean_without_each(values: Tensor, images: Tensor, number: int) -> tuple[float, Tensor]:
    """The mean of one value a picture, [N], and [number] means without the pictures of each image."""
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, images, values.double())
    counts = torch.bincount(images, minlength=number)
    return float(values.double().mean()), (values.double().sum() - sums) / (len(values) - counts)


def jackknife_error(without: Tensor) -> float:
    """The standard error of a figure, or of a difference of two, from its values without each image: [M]."""
    number = len(without)
    return math.sqrt(float((without - without.mean()).square().sum()) * (number - 1) / number)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3
