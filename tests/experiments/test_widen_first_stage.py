import dataclasses

import pytest
import torch

from experiments.widen_first_stage import widened
from ldm.models import AutoencoderConfig, AutoencoderKL

CONFIG = AutoencoderConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=2,
    norm_num_groups=4,
    mid_block_add_attention=False,
)


def test_a_wider_network_computes_the_same_and_all_of_it_can_learn() -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(CONFIG)
    wide = widened(network)
    assert wide.config.block_out_channels == (12, 24)
    assert wide.config.norm_num_groups == 6
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = network.encode(images)
    latents = moments[:, :2]
    assert torch.equal(wide.encode(images), moments)
    assert torch.equal(wide.decode(latents), network.decode(latents))
    # New channels reach the output once the zeros have moved.
    optimizer = torch.optim.SGD(wide.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (wide.decode(wide.encode(images)[:, :2]) - images).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in wide.parameters() if parameter.dim() > 1)


def test_channels_that_do_not_divide_are_refused() -> None:
    config = dataclasses.replace(CONFIG, block_out_channels=(3, 6), norm_num_groups=3)
    with pytest.raises(ValueError, match="3 channels or groups cannot become 3/2 as many"):
        widened(AutoencoderKL(config))
