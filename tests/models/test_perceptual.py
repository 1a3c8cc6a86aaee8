"""The perceptual distance: LPIPS by hand, what gradients reach, small images, and what 1 means."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

from ldm.models import PerceptualDistance
from ldm.models.efficientnet import CHANNELS, PERCEPTUAL_SCALES, EfficientNetLite0, perceptual_distance


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def distance(network: EfficientNetLite0) -> PerceptualDistance:
    return PerceptualDistance(network.maps, PERCEPTUAL_SCALES)


def halves(images: Tensor, levels: int) -> list[Tensor]:
    """Maps that can be computed by hand: the image itself, smaller and smaller."""
    return [F.avg_pool2d(images, 2**level) for level in range(1, levels + 1)]


def test_it_is_lpips() -> None:
    a, b = torch.randn(3, 3, 16, 24), torch.randn(3, 3, 16, 24)
    expected = torch.zeros(3)
    for sample in range(3):
        for x, y, scale in zip(halves(a, 3), halves(b, 3), (2.0, 3.0, 5.0), strict=True):
            places = []
            for u, v in zip(x[sample].flatten(1).T, y[sample].flatten(1).T, strict=True):  # [3] each
                places.append((u / u.norm() - v / v.norm()).square().sum())
            expected[sample] += torch.stack(places).mean() / scale / 3
    torch.testing.assert_close(PerceptualDistance(halves, (2.0, 3.0, 5.0))(a, b), expected)


def test_it_is_a_distance_of_each_pair_by_itself(distance: PerceptualDistance) -> None:
    a, b = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    torch.testing.assert_close(distance(a, a), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a, b)[1:], distance(a[1:], b[1:]), rtol=1e-4, atol=1e-6)
    near = distance(a, a + 0.05 * torch.randn_like(a))
    assert (near > 0).all() and (near < 0.5 * distance(a, b)).all()


def test_gradients_flow_to_the_images_alone(distance: PerceptualDistance, network: EfficientNetLite0) -> None:
    images, others = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(images, others).sum(), others)
    assert float(gradient.flatten(1).norm(dim=1).min()) > 0
    # The gradient is that of the distance: a small step against it shortens it by what it promises.
    with torch.no_grad():
        step = 1e-3 * gradient / gradient.norm()
        shorter = distance(images, others).sum() - distance(images, others - step).sum()
    assert float(shorter) == pytest.approx(float((gradient * step).sum()), rel=0.1)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    blank = torch.zeros(1, 3, 16, 16, requires_grad=True)  # where maps are zero there is no direction
    (gradient,) = torch.autograd.grad(
        PerceptualDistance(halves, PERCEPTUAL_SCALES)(torch.ones(1, 3, 16, 16), blank).sum(), blank
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("height", "width", "levels"), [(8, 8, 2), (15, 64, 2), (16, 16, 3), (32, 48, 4), (64, 64, 5)])
def test_small_images_are_seen_in_the_maps_that_have_places(
    height: int, width: int, levels: int, distance: PerceptualDistance, network: EfficientNetLite0
) -> None:
    a, b = (torch.rand(1, 3, height, width) * 2 - 1 for _ in range(2))
    maps = network.maps(a, levels)
    assert [m.shape[1] for m in maps] == list(CHANNELS[:levels])
    assert min(maps[-1].shape[2:]) >= 2
    differences = distance.differences(a, b)
    assert differences.shape == (1, levels)
    torch.testing.assert_close(distance(a, b), (differences / torch.tensor(PERCEPTUAL_SCALES[:levels])).mean(dim=1))


def test_images_that_are_too_small_are_refused(distance: PerceptualDistance) -> None:
    with pytest.raises(ValueError, match=r"images of 7x64 are too small .* 8 pixels a side; leave it out"):
        distance(torch.zeros(1, 3, 7, 64), torch.zeros(1, 3, 7, 64))


def test_autocast_does_not_change_it(distance: PerceptualDistance) -> None:
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    expected = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(a, b), expected, rtol=0, atol=0)


def test_one_is_the_distance_of_different_photographs() -> None:
    """Photographs are a little farther from each other than the mean of photographs and emoji, which is 1."""
    photos = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() for image in load_sample_images().images]
    one, other = (F.interpolate(photo[..., :400, :400], (64, 64), mode="area") / 127.5 - 1 for photo in photos)
    distance = perceptual_distance()
    assert 0.8 < float(distance(one, other)) < 1.6
    # Each map counts about the same.
    shares = distance.differences(one, other) / torch.tensor(PERCEPTUAL_SCALES)
    assert float(shares.max() / shares.min()) < 2
    blurred = F.interpolate(F.avg_pool2d(one, 2), (64, 64), mode="bilinear")
    assert float(distance(one, blurred)) < 0.5
