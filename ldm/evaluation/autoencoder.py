"""Evaluation of an autoencoder (first stage): reconstruction quality, statistics of its latents, and advice."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.codecs import LatentCodec
from ldm.data import CaptionedImages, generator, to_signed
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.fidelity import MIN_FRECHET_IMAGES, frechet_interval, frechet_ratio
from ldm.evaluation.stats import Interval, student_interval
from ldm.models import PerceptualDistance, kl_divergence
from ldm.models.similarity import WINDOW, psnr, ssim
from ldm.pipelines import contact_sheet, to_pil

BATCH_PIXELS = 32 * 64 * 64
MIN_IMAGES_OF_INTERVAL = 2
MAX_REFERENCE_IMAGES = 2000
WORST_IMAGES = 12
SHEET_SIDE = 192
# Channels outside these are too far from N(0, 1): the noise schedule assumes unit variance.
MAX_MEAN, STD_RANGE = 0.3, (0.7, 1.4)


# ---- what to do with a first stage

MAX_PIXEL_RESOLUTION = 32  # pixels a side: up to here latents save nothing (a factor of 4 leaves 8 x 8)
MAX_SLOW_PIXEL_RESOLUTION = 64  # above, a UNet on pixels takes hours where one on latents takes minutes
GOOD_PSNR = 24.0  # dB: faces and letters are recognizable
# PSNR misses blur on smooth images: photographs reduced to 8 of 64 pixels a side still have 34 dB. Reduced to 24 of 64,
# where eyes and letters vanish, OpenMoji have a perceptual distance of 0.18, and two photographs 0.21 and 0.26.
GOOD_PERCEPTUAL = 0.2
GOOD_PROBE_PSNR = 23.0  # dB of the linear probe, from which a fine-tuned decoder is good (docs/evaluation.md)
MIN_TRAINING_IMAGES = 1000  # from here on a new first stage generalizes (docs/openmoji.md: 1,717 gave 29.8 dB)
ADVICE_IMAGES = 64

Action = Literal["use", "tune", "train", "pixels"]
ACTIONS: dict[Action, str] = {
    "use": "use it",
    "tune": "fine-tune its decoder",
    "train": "train one",
    "pixels": "diffuse pixels",
}


@dataclass(frozen=True)
class ReconstructionQuality:
    """What the advice depends on.

    Attributes:
        name: of the first stage.
        resolution: of the images, in pixels.
        images: number of images to train on.
        psnr: of reconstructions, in dB, a mean over images; None if the factor does not divide the images.
        perceptual: mean distance of reconstructions to the images; None where it cannot be measured.
        readout: PSNR of a linear probe of the latents, in dB; None if not measured.
        factor: downsampling factor.
    """

    name: str
    resolution: int
    images: int
    psnr: float | None
    perceptual: float | None
    readout: float | None
    factor: int

    @property
    def good(self) -> bool:
        return self.psnr is not None and self.psnr >= GOOD_PSNR and (self.perceptual or 0.0) <= GOOD_PERCEPTUAL

    @property
    def latents_suffice(self) -> bool:
        """Whether a better decoder would be good with these latents."""
        return self.psnr is not None and self.readout is not None and self.readout >= GOOD_PROBE_PSNR

    def describe(self) -> str:
        """The measurements and their thresholds."""
        if self.psnr is None:
            return f"the factor {self.factor} of {self.name} does not divide {self.resolution}"
        text = f"{self.name} reconstructs these images at {self.psnr:.1f} dB"
        if self.perceptual is not None:
            text += f" and a perceptual distance of {self.perceptual:.2f}"
        if self.good:
            limits = f"{GOOD_PSNR:g} or more" if self.perceptual is None else f"{GOOD_PSNR:g} and {GOOD_PERCEPTUAL:g}"
            return f"{text}, where {limits} are good"
        if self.psnr < GOOD_PSNR:
            return f"{text}, below {GOOD_PSNR:g}"
        return f"{text}, above {GOOD_PERCEPTUAL:g}"


@dataclass(frozen=True)
class Advice:
    """What to do, and the reason in words."""

    action: Action
    why: str


def advise(found: ReconstructionQuality) -> Advice:
    """The cheapest option that suffices."""
    if found.resolution <= MAX_PIXEL_RESOLUTION:
        return Advice("pixels", no_first_stage_reason(found.resolution))
    why = found.describe()
    if found.good:
        return Advice("use", why)
    if found.latents_suffice:
        assert found.readout is not None
        return Advice(
            "tune",
            f"{why}, but its latents hold more: a linear probe of them reaches {found.readout:.1f} dB; use "
            "train/train_autoencoder.py with start_from and trained: decoder",
        )
    if found.psnr is not None:
        if found.images >= MIN_TRAINING_IMAGES:
            return Advice(
                "train",
                f"{why}, and {found.images} images suffice to train a new first stage (or to train this one longer): "
                "train/train_autoencoder.py",
            )
        why += f" and {found.images} images are too few to train a first stage"
    if found.resolution <= MAX_SLOW_PIXEL_RESOLUTION:
        return Advice("pixels", why)
    return Advice("use", f"{found.resolution} pixels a side are too many to diffuse directly, though {why}")


def no_first_stage_reason(resolution: int) -> str:
    return f"{resolution} pixels a side are few enough to diffuse directly"


@torch.no_grad()
def measure_reconstruction(
    codec: LatentCodec, name: str, images: CaptionedImages, device: torch.device, perceptual: PerceptualDistance | None
) -> ReconstructionQuality:
    """On up to 64 images, evenly from the data, through the posterior's mean.

    The linear probe is measured only if reconstructions are not good: otherwise the advice does not depend on it.
    """
    count, resolution = len(images), images.config.resolution
    found = ReconstructionQuality(name, resolution, count, None, None, None, factor=codec.factor)
    if any(side % codec.factor for size in images.buckets.sizes for side in size):
        return found
    pixels, ratios, distances = _evenly(images, ADVICE_IMAGES, device), [], []
    for image in pixels:  # [1, 3, H, W]
        decoded = codec.decode(codec.sample_latents(codec.moments(image))).clamp(-1, 1)
        ratios.append(psnr(image, decoded))
        if perceptual is not None:
            distances.append(perceptual(image, decoded))
    found = dataclasses.replace(
        found,
        psnr=float(torch.cat(ratios).mean()),
        perceptual=float(torch.cat(distances).mean()) if distances else None,
    )
    return found if found.good else dataclasses.replace(found, readout=_mean_probe_psnr(codec, pixels))


def _mean_probe_psnr(codec: LatentCodec, images: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> float | None:
    """Mean over `images`, None for too few; the probe is fitted to `extra` images too."""
    values = linear_probe_psnr(codec, [*images, *extra])
    return None if values is None else float(values[: len(images)].mean())


def _evenly(images: CaptionedImages, max_count: int, device: torch.device) -> list[Tensor]:
    """Up to `max_count` images [1, 3, h, w], evenly spaced."""
    count = min(max_count, len(images))
    return [_pixels(images, [i * len(images) // count], device) for i in range(count)]


# ---- linear probe

PROBE_LATENTS, PROBE_PIXELS = 2, 1  # on each side
MAX_PROBE_BLOCKS = 1024  # per image
MIN_BLOCKS_PER_INPUT = 4  # with fewer blocks the regression overfits
RIDGE = 1e-4


@torch.no_grad()
def linear_probe_psnr(codec: LatentCodec, images: Sequence[Tensor]) -> Tensor | None:
    """How well a linear map reconstructs images from latents and reconstruction: a lower bound for a better decoder.

    A ridge regression from 5×5 latents and the decoded pixels around to the block of pixels of one latent; each half of
    the images uses the map fitted to the other. What it says of fine-tuning a decoder: docs/evaluation.md.

    Args:
        images: [1, 3, H, W] in [−1, 1], of any sizes.

    Returns:
        PSNR [N] in dB; None for too few images.
    """
    parts = [_ProbeBlocks(codec, image) for image in images]
    halves = [parts[::2], parts[1::2]]
    found = torch.empty(len(parts), dtype=torch.float32)
    for own, other in ((0, 1), (1, 0)):
        fitted = [part.subset(index) for index, part in enumerate(halves[other])]
        if not fitted or sum(len(inputs) for inputs, _ in fitted) < MIN_BLOCKS_PER_INPUT * fitted[0][0].shape[1]:
            return None
        ridge = _Ridge(torch.cat([inputs for inputs, _ in fitted]), torch.cat([blocks for _, blocks in fitted]))
        found[own::2] = torch.stack([part.psnr(ridge) for part in halves[own]])
    return found


class _ProbeBlocks:
    """The blocks of f² · 3 values of an image, one per latent, and the inputs they are predicted from."""

    def __init__(self, codec: LatentCodec, image: Tensor) -> None:
        factor = codec.factor
        latents = codec.sample_latents(codec.moments(image))  # [1, C, h, w]
        decoded = codec.decode(latents).clamp(-1, 1)
        around = F.pad(latents.float(), (PROBE_LATENTS,) * 4, mode="replicate")
        near = F.pad(decoded.float(), (PROBE_PIXELS,) * 4, mode="replicate")
        inputs = [F.unfold(around, 2 * PROBE_LATENTS + 1), F.unfold(near, factor + 2 * PROBE_PIXELS, stride=factor)]
        self.inputs = torch.cat(inputs, dim=1)[0].T.cpu()  # [h·w, C · 25 + 3 (f + 2)²]
        self.blocks = F.unfold(image, factor, stride=factor)[0].T.cpu()  # [h·w, 3 f²]

    def subset(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and blocks, at most `MAX_PROBE_BLOCKS`."""
        count = len(self.blocks)
        if count <= MAX_PROBE_BLOCKS:
            return self.inputs, self.blocks
        rows = torch.from_numpy(generator(0, "readout", index).permutation(count)[:MAX_PROBE_BLOCKS])
        return self.inputs[rows], self.blocks[rows]

    def psnr(self, ridge: _Ridge) -> Tensor:
        """Of the predicted image, a scalar."""
        return psnr(ridge(self.inputs).clamp(-1, 1)[None], self.blocks[None])[0]


class _Ridge:
    """Ridge regression from inputs [N, D] to targets [N, E]."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.mean(dim=0), targets.mean(dim=0)
        x, y = (inputs - self.inputs).double(), (targets - self.targets).double()
        gram = x.T @ x / len(x)
        # Never 0, so that constant inputs can be solved for too.
        ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        gram.diagonal().add_(ridge)
        self.weight = torch.linalg.solve(gram, x.T @ y / len(x)).float()  # [D, E]

    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs - self.inputs) @ self.weight + self.targets


# ---- the report


@dataclass(frozen=True)
class LatentStatistics:
    """Of the latents that are diffused, over positions, images and posterior; ideally N(0, 1).

    Attributes:
        mean, std: of each channel.
        kl: KL(q(z|x) ‖ N(0, I)) in nats per latent value, before scaling; None without a posterior.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: float | None


@dataclass(frozen=True)
class ReconstructionFrechet:
    """The Fréchet distance between reconstructions and originals or, for few images, a ratio.

    Attributes:
        name: "reconstruction FID" only for FID itself.
        is_ratio: the distance of `samples` reconstructions to `references` other images, over that of their originals
            to the same: 1 is as good as the originals.
        against: what they are compared with, in words.
    """

    name: str
    interval: Interval
    is_ratio: bool
    samples: int
    references: int
    against: str
    features: str


@dataclass(frozen=True)
class AutoencoderReport:
    """Means over images with 95 % intervals.

    Attributes:
        images, sizes: number of images, and their (height, width).
        psnr: in dB.
        ssim: None if an image has fewer than 11 pixels a side.
        perceptual: 0 for equal images, about 1 for two different ones.
        frechet: None for too few images.
        readout: PSNR of a linear probe on up to 64 images; if there are fewer, it is fitted to training images too.
        worst: (id, perceptual distance) of the worst images, the worst first.
        left_out: a sentence for each None.
    """

    name: str
    images: int
    sizes: tuple[tuple[int, int], ...]
    psnr: Interval
    ssim: Interval | None
    perceptual: Interval
    frechet: ReconstructionFrechet | None
    latents: LatentStatistics
    readout: float | None
    advice: Advice
    worst: tuple[tuple[str, float], ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_autoencoder(
    codec: LatentCodec,
    name: str,
    images: CaptionedImages,
    training: CaptionedImages | None,
    *,
    space: FeatureSpace,
    perceptual: PerceptualDistance,
    device: torch.device,
    training_images: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> AutoencoderReport:
    """Measures reconstructions through the posterior's mean, of images of any sizes that the codec's factor divides.

    Args:
        images: held-out images, or any that the autoencoder was not trained on.
        training: other images to compare with, if `images` are too few for a Fréchet distance; None uses halves of
            `images`.
        space: of the Fréchet distance.
        training_images: number of images to train on, for the advice.
        seed: for subsets.
        progress: called with the number of images done since.

    Raises:
        ValueError: for fewer than two images, sizes that the factor does not divide, and images below 8 pixels.
    """
    if len(images) < MIN_IMAGES_OF_INTERVAL:
        raise ValueError(f"there is {len(images)} image to measure; an interval needs {MIN_IMAGES_OF_INTERVAL}")
    images.check_factor(codec.factor)
    measured = _Measurement(codec, images, space, perceptual, device)
    for chunk in _chunks(images):
        measured.add(chunk)
        progress(len(chunk))
    left_out = [] if measured.ssim else [f"Left out: SSIM, which needs {WINDOW} pixels a side."]
    frechet = measured.frechet(training, seed)
    if isinstance(frechet, str):
        left_out.append(frechet)
    # A probe fitted to fewer images would be worse, so training images make up for missing ones.
    own = _evenly(images, ADVICE_IMAGES, device)
    extra = _evenly(training, ADVICE_IMAGES - len(own), device) if training is not None else []
    readout = _mean_probe_psnr(codec, own, extra)
    if readout is None:
        left_out.append("Left out: the linear probe of the latents, for there are too few images to fit it.")
    psnr_of, perceptual_of = student_interval(measured.psnr), student_interval(list(measured.perceptual.values()))
    quality = ReconstructionQuality(
        name, images.config.resolution, training_images, psnr_of.mean, perceptual_of.mean, readout, factor=codec.factor
    )
    worst = heapq.nlargest(WORST_IMAGES, measured.perceptual, key=measured.perceptual.__getitem__)
    return AutoencoderReport(
        name=name,
        images=len(images),
        sizes=tuple(images.buckets.sizes),
        psnr=psnr_of,
        ssim=student_interval(measured.ssim) if measured.ssim else None,
        perceptual=perceptual_of,
        frechet=None if isinstance(frechet, str) else frechet,
        latents=measured.latents(),
        readout=readout,
        advice=advise(quality),
        worst=tuple((images.samples[index].id, measured.perceptual[index]) for index in worst),
        left_out=tuple(left_out),
    )


@torch.no_grad()
def worst_sheet(
    codec: LatentCodec, images: CaptionedImages, report: AutoencoderReport, device: torch.device
) -> Image.Image:
    """The worst images of a report above their reconstructions, the worst on the left."""
    indices = {sample.id: index for index, sample in enumerate(images.samples)}
    originals, reconstructions = [], []
    for name, _ in report.worst:  # one by one, since their sizes differ
        pixels = _pixels(images, [indices[name]], device)
        originals += to_pil(pixels)
        reconstructions += to_pil(codec.decode(codec.sample_latents(codec.moments(pixels))))
    first, last = report.worst[0][1], report.worst[-1][1]
    captions = [
        f"the worst of {report.images} images, by perceptual distance",
        f"{report.name}: from {first:.2f} (left) to {last:.2f} (right); the mean is {report.perceptual.mean:.2f}",
    ]
    side = max(max(image.size) for image in originals)
    return contact_sheet([originals, reconstructions], captions, size=min(SHEET_SIDE, max(side, 96)))


class _Measurement:
    """Sums over the images."""

    def __init__(
        self,
        codec: LatentCodec,
        images: CaptionedImages,
        space: FeatureSpace,
        perceptual: PerceptualDistance,
        device: torch.device,
    ) -> None:
        self.codec, self.images, self.space, self.device = codec, images, space, device
        self.distance = perceptual
        self.psnr: list[float] = []
        self.ssim: list[float] = []
        self.perceptual: dict[int, float] = {}
        self.has_ssim = all(min(size) >= WINDOW for size in images.buckets.sizes)
        self.features: list[tuple[Tensor, Tensor]] = []
        self.sums = torch.zeros(3, codec.channels, dtype=torch.float64)  # E[z], E[z²], positions
        self.kl: list[float] = []

    def add(self, chunk: list[int]) -> None:
        pixels = _pixels(self.images, chunk, self.device)  # [B, 3, H, W]
        moments = self.codec.moments(pixels)
        latents = self.codec.sample_latents(moments)  # [B, C, h, w]
        decoded = self.codec.decode(latents).clamp(-1, 1)
        self.psnr += psnr(pixels, decoded).tolist()
        if self.has_ssim:
            self.ssim += ssim(pixels, decoded).tolist()
        self.perceptual |= dict(zip(chunk, self.distance(pixels, decoded).tolist(), strict=True))
        self.features.append((self.space.compute([pixels]), self.space.compute([decoded])))
        self._add_latents(moments, latents)

    def _add_latents(self, moments: Tensor, latents: Tensor) -> None:
        raw, squares = (values.cpu().double() for values in self.codec.autoencoder.expectations(moments))
        variance = squares - raw.square()  # of the posterior, before scaling
        _, std = self.codec.autoencoder.statistics
        variance = variance / torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1).square()
        mean = latents.cpu().double()
        positions = torch.full((self.codec.channels,), mean[:, 0].numel(), dtype=torch.float64)
        self.sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3)), positions])
        if moments.shape[1] == 2 * latents.shape[1]:  # a posterior: means and log-variances
            self.kl += (kl_divergence(moments) / latents[0].numel()).tolist()

    def latents(self) -> LatentStatistics:
        mean, squares = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2]
        std = (squares - mean.square()).clamp(min=0).sqrt()
        kl = sum(self.kl) / len(self.kl) if self.kl else None
        return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()), kl)

    def frechet(self, training: CaptionedImages | None, seed: int) -> ReconstructionFrechet | str:
        """The distance, or a ratio of distances, or the reason that there is neither."""
        originals, decoded = (torch.cat(side) for side in zip(*self.features, strict=True))  # [N, D]
        count, label = len(originals), self.space.label()
        kind = "reconstruction FID" if self.space.is_fid else "reconstruction Fréchet"
        if count > self.space.dimensions:
            interval = frechet_interval(decoded, originals)
            against = f"their {count:,} originals"
            return ReconstructionFrechet(kind, interval, False, count, count, against, label)
        if training is not None:
            reference = self._reference(training, seed)
            against = f"{len(reference):,} training images"
        else:
            order = torch.from_numpy(generator(seed, "halves").permutation(count))
            reference = originals[order[count // 2 :]]
            originals, decoded = originals[order[: count // 2]], decoded[order[: count // 2]]
            against = f"{len(reference):,} other originals"
        count = min(len(originals), len(reference))
        if count < MIN_FRECHET_IMAGES:
            return (
                f"Left out: the Fréchet ratio, for there are {count} images on a side; at least {MIN_FRECHET_IMAGES} "
                "are needed (and as many other images to compare with)."
            )
        interval = frechet_ratio(decoded, originals, reference, seed=seed)
        name = "reconstruction FID ratio" if self.space.is_fid else "Fréchet ratio"
        return ReconstructionFrechet(name, interval, True, len(originals), len(reference), against, label)

    def _reference(self, training: CaptionedImages, seed: int) -> Tensor:
        chosen = set(generator(seed, "references").permutation(len(training))[:MAX_REFERENCE_IMAGES].tolist())
        chunks = ([index for index in chunk if index in chosen] for chunk in _chunks(training))
        return self.space.compute(_pixels(training, chunk, self.device) for chunk in chunks if chunk)


def _chunks(images: CaptionedImages) -> Iterator[list[int]]:
    """Batches of indices of images of one size."""
    for members, (height, width) in zip(images.buckets.members(), images.buckets.sizes, strict=True):
        size = max(1, BATCH_PIXELS // (height * width))
        for start in range(0, len(members), size):
            yield list(members[start : start + size])


def _pixels(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]
