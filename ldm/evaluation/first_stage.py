"""What a first stage does to images: how much is lost, what its latents look like, and what to do about it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.codecs import LatentCodec
from ldm.data import CaptionedImages, generator, to_signed
from ldm.evaluation.advice import MEASURED_IMAGES, Advice, Findings, advise, readout_of
from ldm.evaluation.features import FeatureSpace
from ldm.evaluation.few_samples import GROUPS, frechet_interval, frechet_ratio
from ldm.evaluation.frechet import Interval, interval_over
from ldm.evaluation.similarity import WINDOW, psnr, ssim
from ldm.models import PerceptualDistance, kl_divergence
from ldm.pipelines import contact_sheet, to_pil

PIXELS_AT_ONCE = 32 * 64 * 64  # a batch of small images, or one that is large
FEWEST_IMAGES = 2  # for an interval
FEWEST_FOR_RATIO = GROUPS + 2  # what the jackknife of a Fréchet ratio needs on a side
MOST_REFERENCES = 2000  # training images that reconstructions are compared with
WORST = 12
SHEET_SIDE = 192
# A channel that is not within these is too far from N(0, 1): the schedule's share of noise is another one for it.
MEAN_LIMIT, STD_LIMITS = 0.3, (0.7, 1.4)


@dataclass(frozen=True)
class LatentStatistics:
    """What is diffused, over all places of all images and, where there is a posterior, over it: N(0, 1) is wished for.

    Attributes:
        mean, std: of each channel.
        kl: KL(q(z|x) ‖ N(0, I)) in nats a latent value, before any scaling; None without a posterior.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: float | None

    def off(self) -> str:
        """Which channels are far from mean 0 and deviation 1, in words; "" for none."""
        far = [
            f"{channel} (mean {mean:.2f}, deviation {std:.2f})"
            for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True))
            if abs(mean) > MEAN_LIMIT or not STD_LIMITS[0] <= std <= STD_LIMITS[1]
        ]
        return ", ".join(far)


@dataclass(frozen=True)
class ReconstructionFrechet:
    """The Fréchet distance between reconstructions and their originals, or, of few images, a ratio.

    Attributes:
        name: "reconstruction FID" for what is that and nothing else.
        interval: with the ends of its 95 % interval over images.
        is_ratio: it is the distance of `samples` reconstructions to `references` other images, over that of their
            originals to the same: 1 is as good as the originals.
        against: what they are compared with, in words.
    """

    name: str
    interval: Interval
    is_ratio: bool
    samples: int
    references: int
    against: str
    features: str

    def line(self) -> str:
        over = f"{self.samples:,} reconstructions" + (" over their originals, each" if self.is_ratio else "")
        return f"{_figure(self.name, self.interval)}  {over} against {self.against}, {self.features}"


@dataclass(frozen=True)
class FirstStageReport:
    """All figures of a first stage on some images; means are over images, with 95 % intervals.

    Attributes:
        name: of the first stage.
        images, sizes: how many were measured, and their (height, width).
        psnr: in dB.
        ssim: None where an image has less than 11 pixels a side.
        perceptual: 0 for the same image, about 1 for two different ones.
        frechet: None where there are too few images.
        readout: PSNR of a linear readout of latents and reconstruction, on up to 64 images; where there are fewer it is
            fitted to training images too.
        worst: (id, perceptual distance) of the worst images by it, the worst first.
        left_out: a sentence for what is None.
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

    def lines(self) -> list[str]:
        """For the terminal; the advice is the last."""
        n = f"{self.images:,} images"
        lines = [_figure("PSNR, dB", self.psnr) + f"  {n}"]
        if self.ssim is not None:
            lines.append(_figure("SSIM", self.ssim) + f"  {n}, mean over channels, Gaussian window of {WINDOW} pixels")
        lines.append(
            _figure("perceptual", self.perceptual) + f"  {n}, EfficientNet-Lite0 maps; 1 is between different images"
        )
        if self.frechet is not None:
            lines.append(self.frechet.line())
        for name, values in (("latent means", self.latents.mean), ("latent deviations", self.latents.std)):
            lines.append(f"{name:<26} {' '.join(f'{value:.3f}' for value in values)}")
        if self.latents.kl is not None:
            lines.append(f"{'KL, nats a latent':<26} {self.latents.kl:9.4g}")
        if self.readout is not None:
            lines.append(f"{'linear readout, dB':<26} {self.readout:9.4g}  of latents and reconstruction, cross-fitted")
        if self.latents.off():
            lines.append(
                f"Channels of the latents that are far from mean 0 and deviation 1: {self.latents.off()}. The noise "
                "of a schedule is meant for 0 and 1: see scaling_factor in config.json."
            )
        return [*lines, *self.left_out, self.advice.line()]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate_first_stage(
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
) -> FirstStageReport:
    """Measures reconstructions, from the posterior's mean, of images of any sizes that the codec's factor divides.

    Args:
        name: of the first stage, for the advice.
        images: what is measured: held-out images, or any that the first stage has not learned from.
        training: other images, which reconstructions and originals are compared with where `images` are too few for a
            Fréchet distance; None splits `images` into two halves.
        space: of the Fréchet distance.
        training_images: how many images there are to train on, for the advice.
        seed: of the subsets that are drawn.
        progress: is told how many images were done since.

    Raises:
        ValueError: for fewer than two images, sizes that the factor does not divide, and images below 8 pixels.
    """
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"there is {len(images)} image to measure; an interval over images needs {FEWEST_IMAGES}")
    images.check_factor(codec.factor)
    measure = _Measurement(codec, images, space, perceptual, device)
    for chunk in _chunks(images):
        measure.add(chunk)
        progress(len(chunk))
    left_out = [] if measure.ssim else [f"Left out: SSIM, which needs {WINDOW} pixels a side."]
    frechet = measure.frechet(training, seed)
    if isinstance(frechet, str):
        left_out.append(frechet)
    readout = _readout(codec, images, training, device)
    if readout is None:
        left_out.append("Left out: the linear readout of the latents, for there are too few images to fit one to.")
    psnr_of, perceptual_of = interval_over(measure.psnr), interval_over(list(measure.perceptual.values()))
    resolution = images.config.resolution
    found = Findings(name, resolution, training_images, psnr_of.mean, perceptual_of.mean, readout, factor=codec.factor)
    worst = heapq.nlargest(WORST, measure.perceptual, key=measure.perceptual.__getitem__)
    return FirstStageReport(
        name=name,
        images=len(images),
        sizes=tuple(images.buckets.sizes),
        psnr=psnr_of,
        ssim=interval_over(measure.ssim) if measure.ssim else None,
        perceptual=perceptual_of,
        frechet=None if isinstance(frechet, str) else frechet,
        latents=measure.latents(),
        readout=readout,
        advice=advise(found),
        worst=tuple((images.samples[index].id, measure.perceptual[index]) for index in worst),
        left_out=tuple(left_out),
    )


def _readout(
    codec: LatentCodec, images: CaptionedImages, training: CaptionedImages | None, device: torch.device
) -> float | None:
    """The readout of up to 64 images, in dB; None where there are too few.

    Fitted to fewer it says less than the latents hold, and the advice would not be that of `space: auto`: so training
    images make up what is missing. They are not measured.
    """
    measured = _evenly(images, MEASURED_IMAGES, device)
    helping = _evenly(training, MEASURED_IMAGES - len(measured), device) if training is not None else []
    return readout_of(codec, measured, helping)


def _evenly(images: CaptionedImages, most: int, device: torch.device) -> list[Tensor]:
    """Up to `most` images [1, 3, h, w], evenly from all."""
    count = min(most, len(images))
    return [_pixels(images, [i * len(images) // count], device) for i in range(count)]


@torch.no_grad()
def worst_sheet(
    codec: LatentCodec, images: CaptionedImages, report: FirstStageReport, device: torch.device
) -> Image.Image:
    """The worst images of a report above their reconstructions, side by side, the worst on the left."""
    places = {sample.id: index for index, sample in enumerate(images.samples)}
    originals, reconstructions = [], []
    for name, _ in report.worst:  # one by one, since their sizes differ
        pixels = _pixels(images, [places[name]], device)
        originals += to_pil(pixels)
        reconstructions += to_pil(codec.decode(codec.sample_latents(codec.moments(pixels))))
    first, last = report.worst[0][1], report.worst[-1][1]
    captions = [
        f"the worst of {report.images} images, by perceptual distance",
        f"{report.name}: from {first:.2f} (left) to {last:.2f} (right); the mean is {report.perceptual.mean:.2f}",
    ]
    side = max(max(picture.size) for picture in originals)
    return contact_sheet([originals, reconstructions], captions, size=min(SHEET_SIDE, max(side, 96)))


class _Measurement:
    """What adds up over the images."""

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
        self.sums = torch.zeros(3, codec.channels, dtype=torch.float64)  # E[z], E[z²], places
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
        self.features.append((self.space.of([pixels]), self.space.of([decoded])))
        self._add_latents(moments, latents)

    def _add_latents(self, moments: Tensor, latents: Tensor) -> None:
        raw, squares = (values.cpu().double() for values in self.codec.autoencoder.expectations(moments))
        variance = squares - raw.square()  # of the posterior, before scaling
        _, std = self.codec.autoencoder.statistics
        variance = variance / torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1).square()
        mean = latents.cpu().double()
        places = torch.full((self.codec.channels,), mean[:, 0].numel(), dtype=torch.float64)
        self.sums += torch.stack([mean.sum((0, 2, 3)), (mean.square() + variance).sum((0, 2, 3)), places])
        if moments.shape[1] == 2 * latents.shape[1]:  # a posterior: means and log-variances
            self.kl += (kl_divergence(moments) / latents[0].numel()).tolist()

    def latents(self) -> LatentStatistics:
        mean, squares = self.sums[0] / self.sums[2], self.sums[1] / self.sums[2]
        std = (squares - mean.square()).clamp(min=0).sqrt()
        kl = sum(self.kl) / len(self.kl) if self.kl else None
        return LatentStatistics(tuple(mean.tolist()), tuple(std.tolist()), kl)

    def frechet(self, training: CaptionedImages | None, seed: int) -> ReconstructionFrechet | str:
        """The distance, or a ratio of distances, or why there is neither."""
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
        fewest = min(len(originals), len(reference))
        if fewest < FEWEST_FOR_RATIO:
            return (
                f"Left out: the Fréchet ratio, for there are {fewest} images on a side; at least {FEWEST_FOR_RATIO} "
                "are needed (and as many other images to compare with)."
            )
        interval = frechet_ratio(decoded, originals, reference, seed=seed)
        name = "reconstruction FID ratio" if self.space.is_fid else "Fréchet ratio"
        return ReconstructionFrechet(name, interval, True, len(originals), len(reference), against, label)

    def _reference(self, training: CaptionedImages, seed: int) -> Tensor:
        chosen = set(generator(seed, "references").permutation(len(training))[:MOST_REFERENCES].tolist())
        chunks = ([index for index in chunk if index in chosen] for chunk in _chunks(training))
        return self.space.of(_pixels(training, chunk, self.device) for chunk in chunks if chunk)


def _chunks(images: CaptionedImages) -> Iterator[list[int]]:
    """Indices of images of one size, as many as are computed at once."""
    for members, (height, width) in zip(images.buckets.members(), images.buckets.sizes, strict=True):
        size = max(1, PIXELS_AT_ONCE // (height * width))
        for start in range(0, len(members), size):
            yield list(members[start : start + size])


def _pixels(images: CaptionedImages, indices: list[int], device: torch.device) -> Tensor:
    return to_signed(torch.stack([images.image_at(index) for index in indices])).to(device)  # [B, 3, h, w]


def _figure(name: str, interval: Interval) -> str:
    return f"{name:<26} {interval.mean:9.4g}  ({interval.low:.4g} to {interval.high:.4g})"
