"""The patch discriminator and the adversarial losses."""

import math

import pytest
import torch
from torch import Tensor

from ldm.models import DiscriminatorConfig, PatchDiscriminator, discriminator_loss, generator_loss


def small(levels: int) -> PatchDiscriminator:
    return PatchDiscriminator(DiscriminatorConfig(channels=8, levels=levels, norm_num_groups=4))


@pytest.mark.parametrize(
    ("levels", "height", "width", "shape"),
    [(3, 8, 8, (1, 1)), (3, 64, 64, (8, 8)), (3, 20, 45, (2, 5)), (2, 64, 32, (16, 8)), (1, 8, 8, (4, 4))],
)
def test_logits_are_one_a_patch(levels: int, height: int, width: int, shape: tuple[int, int]) -> None:
    network = small(levels)
    assert network(torch.randn(2, 3, height, width)).shape == (2, 1, *shape)
    assert min(height, width) >= network.config.min_image_size


@pytest.mark.parametrize(("levels", "patch"), [(1, 12), (2, 26), (3, 54)])
def test_the_patch_is_as_wide_as_it_says(levels: int, patch: int) -> None:
    network = small(levels)
    for module in network.modules():  # its statistics are of the whole image
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = network(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], image)
    columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert int(columns.max() - columns.min()) + 1 == patch


def test_an_image_is_judged_by_itself() -> None:
    network, images = small(3), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-5)
    assert len(list(network.parameters())) == len(network.state_dict()), "no statistics of batches"


def by_hand(kind: str, real: Tensor, fake: Tensor) -> tuple[list[float], list[float]]:
    """(discriminator's, generator's) losses of each sample."""
    judged, fooled = [], []
    for r, f in zip(real, fake, strict=True):
        rs, fs = r.flatten().tolist(), f.flatten().tolist()
        if kind == "hinge":
            left, right = [max(0.0, 1 - x) for x in rs], [max(0.0, 1 + x) for x in fs]
            fool = [-x for x in fs]
        else:
            sigmoid = [1 / (1 + math.exp(-x)) for x in fs]
            left = [-math.log(1 / (1 + math.exp(-x))) for x in rs]
            right, fool = [-math.log(1 - s) for s in sigmoid], [-math.log(s) for s in sigmoid]
        judged.append((sum(left) / len(left) + sum(right) / len(right)) / 2)
        fooled.append(sum(fool) / len(fool))
    return judged, fooled


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_the_losses_are_those_of_the_papers(kind: str) -> None:
    real, fake = 2 * torch.randn(3, 1, 4, 5), 2 * torch.randn(3, 1, 4, 5)
    judged, fooled = by_hand(kind, real, fake)
    torch.testing.assert_close(discriminator_loss(real, fake, kind), torch.tensor(judged))  # type: ignore[arg-type]
    torch.testing.assert_close(generator_loss(fake, kind), torch.tensor(fooled))  # type: ignore[arg-type]
    zero, at_zero = torch.zeros(1, 1, 2, 2), 1 if kind == "hinge" else math.log(2)
    assert float(discriminator_loss(zero, zero, kind)) == pytest.approx(at_zero)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"channels": 0}, "channels = 0"), ({"levels": -1}, "levels = -1"), ({"norm_num_groups": 7}, "divide the 64")],
)
def test_a_shape_that_cannot_be_built_is_refused(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiscriminatorConfig(**wrong)
