"""Evaluation of an autoencoder (first stage): reconstruction quality, statistics of its latents, and advice."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
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
ACTIONS = {"use": "use it", "tune": "fine-tune its decoder", "train": "train one", "pixels": "diffuse pixels"}


@dataclass(frozen=True)
class ReconstructionQuality:
    """What the advice depends on, of a first stage with a downsampling `factor`.

    Attributes:
        resolution, images: pixels a side, and number of images to train on.
        psnr: of reconstructions, in dB, a mean over images; None if the factor does not divide the images.
        perceptual: mean distance of reconstructions to the images; None where it cannot be measured.
        readout: PSNR of a linear probe of the latents, in dB; None if not measured.
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


@dataclass(frozen=True)
class Advice:
    """What to do, and the reason in words."""

    action: Action
    why: str


def advise(found: ReconstructionQuality) -> Advice:
    """The cheapest option that suffices."""
    if found.resolution <= MAX_PIXEL_RESOLUTION:
        return Advice("pixels", no_first_stage_reason(found.resolution))
    if found.psnr is None:
        why = f"the factor {found.factor} of {found.name} does not divide {found.resolution}"
    else:
        why = f"{found.name} reconstructs these images at {found.psnr:.1f} dB"
        if found.perceptual is not None:
            why += f" and a perceptual distance of {found.perceptual:.2f}"
        if found.good:
            limits = f"{GOOD_PSNR:g} or more" if found.perceptual is None else f"{GOOD_PSNR:g} and {GOOD_PERCEPTUAL:g}"
            return Advice("use", f"{why}, where {limits} are good")
        why += f", below {GOOD_PSNR:g}" if found.psnr < GOOD_PSNR else f", above {GOOD_PERCEPTUAL:g}"
        if found.readout is not None and found.readout >= GOOD_PROBE_PSNR:
            why += f", but its latents hold more: a linear probe of them reaches {found.readout:.1f} dB"
            return Advice("tune", f"{why}; use train/train_autoencoder.py with start_from and trained: decoder")
        if found.images >= MIN_TRAINING_IMAGES:
            why += f", and {found.images} images suffice to train a new first stage (or to train this one longer)"
            return Advice("train", f"{why}: train/train_autoencoder.py")
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
    """On up to 64 images, evenly from the data; the linear probe only if reconstructions are not good."""
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
    mean = float(torch.cat(distances).mean()) if distances else None
    found = dataclasses.replace(found, psnr=float(torch.cat(ratios).mean()), perceptual=mean)
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
    the images uses the map fitted to the other (docs/evaluation.md). Images are [1, 3, H, W] in [−1, 1], of any sizes →
    PSNR [N] in dB; None for too few images.
    """
    parts = []  # what the blocks are predicted from [h·w, C · 25 + 3 (f + 2)²], and the blocks [h·w, 3 f²]
    for image in images:
        latents = codec.sample_latents(codec.moments(image))  # [1, C, h, w]
        decoded = codec.decode(latents).clamp(-1, 1)
        around = F.pad(latents.float(), (PROBE_LATENTS,) * 4, mode="replicate")
        near = F.pad(decoded.float(), (PROBE_PIXELS,) * 4, mode="replicate")
        size = codec.factor + 2 * PROBE_PIXELS
        unfolded = [F.unfold(around, 2 * PROBE_LATENTS + 1), F.unfold(near, size, stride=codec.factor)]
        blocks = F.unfold(image, codec.factor, stride=codec.factor)
        parts.append((torch.cat(unfolded, dim=1)[0].T.cpu(), blocks[0].T.cpu()))
    found = torch.empty(len(parts), dtype=torch.float32)
    for own in (0, 1):
        inputs, targets = [], []  # of the other half
        for index, (x, y) in enumerate(parts[1 - own :: 2]):
            rows = torch.arange(len(y))
            if len(y) > MAX_PROBE_BLOCKS:
                rows = torch.from_numpy(generator(0, "readout", index).permutation(len(y))[:MAX_PROBE_BLOCKS])
            inputs.append(x[rows])
            targets.append(y[rows])
        if not inputs or sum(map(len, inputs)) < MIN_BLOCKS_PER_INPUT * inputs[0].shape[1]:
            return None
        x, y = torch.cat(inputs), torch.cat(targets)
        center, middle = x.mean(dim=0), y.mean(dim=0)
        x, y = (x - center).double(), (y - middle).double()
        gram = x.T @ x / len(x)
        # Never 0, so that constant inputs can be solved for too.
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
        weight = torch.linalg.solve(gram, x.T @ y / len(x)).float()  # [D, E]
        for index in range(own, len(parts), 2):
            x, y = parts[index]
            found[index] = psnr(((x - center) @ weight + middle).clamp(-1, 1)[None], y[None])[0]
    return found


# ---- the report


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and std of each channel of the latents that are diffused; KL(q(z|x) ‖ N(0, I)) in nats a value, unscaled."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: float | None


@dataclass(frozen=True)
class ReconstructionFrechet:
    """The Fréchet distance between reconstructions and originals or, for few images, a ratio.

    The ratio is the distance of `samples` reconstructions to `references` other images, over that of their originals to
    the same: 1 is as good as the originals. `against` says in words what they are compared with.
    """

    name: str
    interval: Interval
    is_ratio: bool
    samples: int
    references: int
    against: str
    features: str

    @classmethod
    def from_features(
        cls,
        originals: Tensor,
        decoded: Tensor,
        training: CaptionedImages | None,
        space: FeatureSpace,
        device: torch.device,
        seed: int,
    ) -> ReconstructionFrechet | str:
        """The distance, or a ratio of distances, or the reason that there is neither; from features [N, D]."""
        count, label = len(originals), space.label()
        if count > space.dimensions:
            name = "reconstruction FID" if space.is_fid else "reconstruction Fréchet"
            interval = frechet_interval(decoded, originals)
            return cls(name, interval, False, count, count, f"their {count:,} originals", label)
        if training is not None:
            order = generator(seed, "references").permutation(len(training))
            chosen = set(order[:MAX_REFERENCE_IMAGES].tolist())
            chunks = ([index for index in chunk if index in chosen] for chunk in _chunks(training))
            reference = space.compute(_pixels(training, chunk, device) for chunk in chunks if chunk)
            against = f"{len(reference):,} training images"
        else:
            halves = torch.from_numpy(generator(seed, "halves").permutation(count)).tensor_split([count // 2])
            originals, decoded, reference = originals[halves[0]], decoded[halves[0]], originals[halves[1]]
            against = f"{len(reference):,} other originals"
        count = min(len(originals), len(reference))
        if count < MIN_FRECHET_IMAGES:
            needed = f"at least {MIN_FRECHET_IMAGES} are needed (and as many other images to compare with)"
            return f"Left out: the Fréchet ratio, for there are {count} images on a side; {needed}."
        interval = frechet_ratio(decoded, originals, reference, seed=seed)
        name = "reconstruction FID ratio" if space.is_fid else "Fréchet ratio"
        return cls(name, interval, True, len(originals), len(reference), against, label)


@dataclass(frozen=True)
class AutoencoderReport:
    """Means over images with 95 % intervals; what is None was left out, for the reasons in `left_out`.

    Attributes:
        images, sizes: number of images, and their (height, width).
        perceptual: 0 for equal images, about 1 for two different ones.
        readout: PSNR of a linear probe on up to 64 images; if there are fewer, it is fitted to training images too.
        worst: (id, perceptual distance) of the worst images, the worst first.
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
        images: two or more held-out images, or any that the autoencoder was not trained on.
        training: other images to compare with, if `images` are too few for a Fréchet distance in `space`; None uses
            halves of `images`.
        training_images: number of images to train on, for the advice.
        seed: for subsets.
        progress: called with the number of images done since.

    Raises:
        ValueError: for fewer than two images, sizes that the factor does not divide, and images below 8 pixels.
    """
    if len(images) < MIN_IMAGES_OF_INTERVAL:
        raise ValueError(f"there is {len(images)} image to measure; an interval needs {MIN_IMAGES_OF_INTERVAL}")
    images.check_factor(codec.factor)
    has_ssim = all(min(size) >= WINDOW for size in images.buckets.sizes)
    left_out = [] if has_ssim else [f"Left out: SSIM, which needs {WINDOW} pixels a side."]
    psnrs, ssims, kl = list[float](), list[float](), list[float]()
    distances: dict[int, float] = {}
    features = []  # of originals and of reconstructions
    sums = torch.zeros(3, codec.channels, dtype=torch.float64)  # E[z], E[z²], positions
    _, scale = codec.autoencoder.statistics
    for chunk in _chunks(images):
        pixels = _pixels(images, chunk, device)  # [B, 3, H, W]
        moments = codec.moments(pixels)
        latents = codec.sample_latents(moments)  # [B, C, h, w]
        decoded = codec.decode(latents).clamp(-1, 1)
        psnrs += psnr(pixels, decoded).tolist()
        ssims += ssim(pixels, decoded).tolist() if has_ssim else []
        distances |= dict(zip(chunk, perceptual(pixels, decoded).tolist(), strict=True))
        features.append((space.compute([pixels]), space.compute([decoded])))
        raw, squares = (values.cpu().double() for values in codec.autoencoder.expectations(moments))
        variance = (squares - raw.square()) / torch.tensor(scale, dtype=torch.float64).view(1, -1, 1, 1).square()
        mean = latents.cpu().double()
        positions = torch.full((codec.channels,), mean[:, 0].numel(), dtype=torch.float64)
        sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3)), positions])
        if moments.shape[1] == 2 * latents.shape[1]:  # a posterior: means and log-variances
            kl += (kl_divergence(moments) / latents[0].numel()).tolist()
        progress(len(chunk))
    originals, reconstructions = (torch.cat(side) for side in zip(*features, strict=True))  # [N, D]
    frechet = ReconstructionFrechet.from_features(originals, reconstructions, training, space, device, seed)
    if isinstance(frechet, str):
        left_out.append(frechet)
    # A probe fitted to fewer images would be worse, so training images make up for missing ones.
    own = _evenly(images, ADVICE_IMAGES, device)
    extra = _evenly(training, ADVICE_IMAGES - len(own), device) if training is not None else []
    readout = _mean_probe_psnr(codec, own, extra)
    if readout is None:
        left_out.append("Left out: the linear probe of the latents, for there are too few images to fit it.")
    psnr_of, perceptual_of = student_interval(psnrs), student_interval(list(distances.values()))
    quality = ReconstructionQuality(
        name, images.config.resolution, training_images, psnr_of.mean, perceptual_of.mean, readout, factor=codec.factor
    )
    mean, squares = sums[0] / sums[2], sums[1] / sums[2]
    std = (squares - mean.square()).clamp(min=0).sqrt()
    return AutoencoderReport(
        name=name,
        images=len(images),
        sizes=tuple(images.buckets.sizes),
        psnr=psnr_of,
        ssim=student_interval(ssims) if has_ssim else None,
        perceptual=perceptual_of,
        frechet=None if isinstance(frechet, str) else frechet,
        latents=LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()), sum(kl) / len(kl) if kl else None),
        readout=readout,
        advice=advise(quality),
        worst=tuple(
            (images.samples[index].id, distances[index])
            for index in heapq.nlargest(WORST_IMAGES, distances, key=distances.__getitem__)
        ),
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


def _chunks(images: CaptionedImages) -> list[list[int]]:
    """Batches of indices of images of one size."""
    return images.chunks(max(1, BATCH_PIXELS // max(height * width for height, width in images.buckets.sizes)))


def _pixels(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]
