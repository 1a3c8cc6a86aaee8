"""How much of what a decoder loses its latents still hold: the part that a better decoder could give back.

Latents and decoder fail in different ways. What the encoder has dropped is gone, and only another first stage brings
it back; what the latents hold and the decoder does not show, fine-tuning the decoder does. A linear readout tells them
apart in seconds, without training: from 5x5 latents and what the decoder makes of the place and its neighbours, to the
block of pixels that belongs to a latent, fitted by ridge regression to some of the images and measured on others. It
is a lower bound: a decoder is more than linear.

Measured with the built-in first stage at 64 pixels, dB on 48 images. The readout was fitted to 96 others; "tuned" is
the decoder after 120 steps of 4 of these (AdamW, 1e-3), "all" encoder and decoder after as many:

    images                     decoder   readout   tuned    all
    digits                       11.5      33.8     35.0    35.1
    crops of photographs         13.8      23.6     24.0    24.3
    noise of 24x24 cells         10.1      14.2     14.4    14.8
    OpenMoji, noisy decoder      23.4      25.4     28.5    28.6    (30.6 before the noise)
    OpenMoji, new decoder         6.8      17.8     18.3    18.4
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.codecs import LatentCodec
from ldm.data import generator
from ldm.evaluation.similarity import psnr

LATENTS_AROUND = 2
PIXELS_AROUND = 1
BLOCKS_OF_AN_IMAGE = 1024
# Fewer blocks than this many times the inputs of the regression would fit themselves.
BLOCKS_AN_INPUT = 4
RIDGE = 1e-4


@torch.no_grad()
def readout_psnr(codec: LatentCodec, images: Sequence[Tensor], *, seed: int = 0) -> Tensor | None:
    """PSNR of images [1, 3, H, W] in [−1, 1], whose sizes may differ, as they are read from latents and reconstruction.

    Each half of the images is read by what was fitted to the other.

    Args:
        seed: of the blocks that are drawn from large images.

    Returns:
        [N] in dB, in the order of the images; None where there are too few to fit a readout to.
    """
    parts = [_Blocks(codec, image) for image in images]
    halves = [parts[::2], parts[1::2]]
    found = torch.empty(len(parts), dtype=torch.float32)
    for own, other in ((0, 1), (1, 0)):
        drawn = [part.drawn(seed, index) for index, part in enumerate(halves[other])]
        if not drawn or sum(len(inputs) for inputs, _ in drawn) < BLOCKS_AN_INPUT * drawn[0][0].shape[1]:
            return None
        read = _Ridge(torch.cat([inputs for inputs, _ in drawn]), torch.cat([blocks for _, blocks in drawn]))
        found[own::2] = torch.stack([part.psnr(read) for part in halves[own]])
    return found


class _Blocks:
    """An image as a block of f² · 3 values for each of its latents, beside what each is read from."""

    def __init__(self, codec: LatentCodec, image: Tensor) -> None:
        factor = codec.factor
        latents = codec.sample_latents(codec.moments(image))  # [1, C, h, w]
        decoded = codec.decode(latents).clamp(-1, 1)
        around = F.pad(latents.float(), (LATENTS_AROUND,) * 4, mode="replicate")
        near = F.pad(decoded.float(), (PIXELS_AROUND,) * 4, mode="replicate")
        inputs = [F.unfold(around, 2 * LATENTS_AROUND + 1), F.unfold(near, factor + 2 * PIXELS_AROUND, stride=factor)]
        self.inputs = torch.cat(inputs, dim=1)[0].T.cpu()  # [h·w, C · 25 + 3 (f + 2)²]
        self.blocks = F.unfold(image, factor, stride=factor)[0].T.cpu()  # [h·w, 3 f²]

    def drawn(self, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and blocks of at most `BLOCKS_OF_AN_IMAGE` places."""
        count = len(self.blocks)
        if count <= BLOCKS_OF_AN_IMAGE:
            return self.inputs, self.blocks
        places = torch.from_numpy(generator(seed, "readout", index).permutation(count)[:BLOCKS_OF_AN_IMAGE])
        return self.inputs[places], self.blocks[places]

    def psnr(self, read: _Ridge) -> Tensor:
        """Of the image as it is read, a scalar: the blocks make it up."""
        return psnr(read(self.inputs).clamp(-1, 1)[None], self.blocks[None])[0]


class _Ridge:
    """The linear map from inputs [N, D] to targets [N, E] with the least squares, a little drawn towards zero."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.mean(dim=0), targets.mean(dim=0)
        x, y = (inputs - self.inputs).double(), (targets - self.targets).double()
        gram = x.T @ x / len(x)
        # Never 0, so that inputs which are all the same can be solved for too.
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        gram.diagonal().add_(ridge)
        self.weight = torch.linalg.solve(gram, x.T @ y / len(x)).float()  # [D, E]

    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs - self.inputs) @ self.weight + self.targets
