"""The Inception network of FID: that of torch-fidelity, with the one file of weights that makes a number an FID."""

from __future__ import annotations

import hashlib
import importlib

from torch import nn

from ldm import disk
from ldm.requirements import pip_install

# Of weights-inception-2015-12-05-6726825d.pth, the network of arXiv:1706.08500 converted from TensorFlow.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
DIMENSIONS = 2048
SIZE = 299


def load_inception(weights: str) -> nn.Module:
    """uint8 images [B, 3, H, W] → their 2048 pooled features; the frozen network resizes to 299 as FID's does.

    torchmetrics resizes with antialiasing unless told otherwise; here the resize is that of the paper's network
    (TensorFlow 1, bilinear without antialiasing), or the number would not be FID.

    weights: path of the file above; another file is refused, since it is unpickled by torch-fidelity and since other
        weights give another number.

    Raises:
        ValueError: where weights or packages are missing, or the weights are others.
    """
    if not weights:
        raise ValueError(
            f"Inception features need their weights, a file of 91 MiB that is not downloaded here: fetch {SOURCE} and "
            "give its path"
        )
    path = disk.expand_user(weights)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"the weights of Inception cannot be read ({error}); give the path of {FILE}") from None
    if digest != SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, not {SHA256}: it is damaged or another network, whose distance is not FID; "
            f"fetch {SOURCE}"
        )
    try:
        importlib.import_module("torch_fidelity")  # torchmetrics misses it only when it builds the network
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ValueError(
            f"Inception features need torch-fidelity ({error}): {pip_install('torch_fidelity', 'torchmetrics')}"
        ) from None
    network: nn.Module = NoTrainInceptionV3("inception-v3-compat", [str(DIMENSIONS)], str(path), antialias=False)
    return network.requires_grad_(False)
