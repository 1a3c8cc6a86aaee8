"""Where captioned images come from: one record for all layouts, and the function that opens any of them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image, ImageColor

from ldm.requirements import pip_install

BUILT_IN = ("digits", "openmoji", "scenes")
MIN_COMPOSED_RESOLUTION = 16  # pixels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how an image becomes a square of pixels.

    Args:
        path: "digits", "openmoji", "scenes", a folder or file, or the id of a data set on the hub; a folder that bears
            the name of a built-in one is written "./digits".
        resolution: side R of square images in pixels; with buckets, images of any shape have about R² pixels.
        flip: mirror half of the images horizontally, drawn anew in every epoch.
        crop: which part of an image is taken where its shape does not fit: the "center", or a "random" one drawn
            anew in every epoch.
        buckets: batches of images of one aspect ratio instead of squares; None does so above 128 pixels.
        image_column, caption_column: names of the columns of tables and data sets; None guesses them.
        split: the split of a data set that `datasets` reads.
        subset: its configuration, where it has several.
        cache_dir: where what is known of the data is kept between runs; None is $LDM_CACHE or ~/.cache/ldm.
        held_out: share of the groups, in [0, 1), that training never sees.
        background: the colour behind transparent images, as CSS names it ("white", "#f0f0f0").
        skin_tones: with openmoji, its variants in five skin tones too.
        caption_source: of a folder with several sources of captions, the one to use: the path of a table in it, or
            "metadata", "sidecars" (text beside images), "shards", or "folders" (the names of sub-folders); None takes
            the one that captions most images.
        caption_templates: each caption counts once more with every one of these, "a photo of {}", around it.
        compose: share of the samples of an epoch, in [0, 1), that are composed of training images: see
            `ldm.data.composing`.
        renew_every: the epochs, at least 1, after which others are composed, or take the place of scenes.
        scenes: of path "scenes", how many are in use at a time, at least 1.
        first_scene: the number of the first, at least 0: a training that goes on from another's weights sees new ones.
        things: what they show: the "common" third of all things, or "all".

    Raises:
        ValueError: naming key and value.
    """

    # pydantic would drop unknown keys in silence.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str
    resolution: int
    flip: bool = False
    crop: Literal["center", "random"] = "center"
    buckets: bool | None = None
    held_out: float = 0.1
    background: str = "white"
    skin_tones: bool = False
    caption_templates: tuple[str, ...] = ()
    compose: float = 0.0
    renew_every: int = 6
    scenes: int = 4096
    first_scene: int = 0
    things: Literal["common", "all"] = "common"
    image_column: str | None = None
    caption_column: str | None = None
    caption_source: str | None = None
    split: str = "train"
    subset: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError(f"data.path is empty; give a folder, or one of {', '.join(BUILT_IN)}")
        for key in ("path", "cache_dir"):
            place = getattr(self, key) or ""
            if place.startswith("~") and os.path.expanduser(place) == place:
                raise ValueError(
                    f"data.{key} is {place!r}, in the home of a user that does not exist; write ./{place} for a folder"
                )
        if self.resolution < 1:
            raise ValueError(f"data.resolution is {self.resolution}; it is a number of pixels, at least 1")
        if self.crop not in ("center", "random"):
            raise ValueError(f'data.crop is "{self.crop}"; choose "center" or "random"')
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out is {self.held_out}; it is a share of the data, at least 0 and below 1")
        if self.skin_tones and self.path != "openmoji":
            raise ValueError(f'data.skin_tones is for data.path "openmoji" only, not for "{self.path}"; leave it out')
        for key, default in (("scenes", 4096), ("first_scene", 0), ("things", "common")):
            if self.path != "scenes" and getattr(self, key) != default:
                raise ValueError(f'data.{key} is for data.path "scenes" only, not for "{self.path}"; leave it out')
        self._check_compose()
        for key, least in (("scenes", 1), ("renew_every", 1), ("first_scene", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} is {getattr(self, key)}; it is at least {least}")
        if self.path == "scenes" and self.flip:
            raise ValueError('data.flip would turn "left of" into "right of"; leave it out for data.path "scenes"')
        for template in self.caption_templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(
                    f'data.caption_templates has "{template}"; each needs one {{}}, where the caption goes: '
                    '"a photo of {}"'
                )
        for key in ("image_column", "caption_column", "caption_source", "subset"):
            if getattr(self, key) is not None and self.path in BUILT_IN:
                raise ValueError(
                    f"data.{key} is for {'folders' if key == 'caption_source' else 'tables and data sets of the hub'}, "
                    f'not for "{self.path}"; leave it out'
                )
        _rgb(self.background)

    def _check_compose(self) -> None:
        if not 0 <= self.compose < 1:
            raise ValueError(f"data.compose is {self.compose}; it is a share of the samples, at least 0 and below 1")
        if self.compose > 0 and self.path == "scenes":
            raise ValueError('data.compose is for images of your own, and "scenes" are composed already; leave it out')
        if self.compose > 0 and self.resolution < MIN_COMPOSED_RESOLUTION:
            raise ValueError(
                f"data.compose puts two images into one, which at data.resolution {self.resolution} nobody could tell "
                f"apart; raise that to {MIN_COMPOSED_RESOLUTION} or more, or leave data.compose out"
            )
        if self.compose == 0 and self.path != "scenes" and self.renew_every != 6:
            raise ValueError(
                f'data.renew_every is for data.path "scenes" and for data.compose above 0, not for "{self.path}" as it '
                "is; leave it out"
            )

    @property
    def bucketed(self) -> bool:
        """Whether images keep their aspect ratio, about."""
        return self.resolution > 128 if self.buckets is None else self.buckets

    @property
    def cache_folder(self) -> Path:
        """The folder of everything that can be computed again from the data."""
        given = self.cache_dir or os.environ.get("LDM_CACHE") or "~/.cache/ldm"
        return Path(given).expanduser()

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """`background` as red, green and blue in 0..255."""
        return _rgb(self.background)


def _rgb(background: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *alpha = ImageColor.getrgb(background)
    except ValueError:
        alpha = [0]
    if alpha:
        raise ValueError(f'data.background is "{background}"; give an opaque CSS colour such as "white" or "#f0f0f0"')
    return red, green, blue


@dataclass(frozen=True)
class Decoded:
    """An image as it was found, and as it is used.

    Args:
        image: at its native size, in mode RGB, upright, transparent parts on the background.
        format, mode: as stored, in the words of Pillow ("JPEG", "CMYK").
        traits: what had to be dealt with, out of "rotated", "cmyk", "16-bit", "palette", "transparent", "animated".
        alpha: how opaque each pixel was before, in mode L; None where all are, or nobody asked.
    """

    image: Image.Image
    format: str
    mode: str
    traits: tuple[str, ...] = ()
    alpha: Image.Image | None = field(default=None, compare=False, repr=False)


class UnreadableError(ValueError):
    """An image could be read before, and now cannot; the message names it."""


@dataclass(frozen=True)
class Sample:
    """One captioned image.

    Args:
        id: names the sample within its source, and stays the same when other samples come or go.
        captions: texts that describe the image, the plainest first; none only in a source that needs none.
        group: what is held out as a whole: variants of one picture share it.
        read: returns the image as it is stored, which is what caches are keyed by; OSError or ValueError where
            it cannot.
        decode: makes an image of those bytes; ValueError with the reason, without the name, where it cannot.
            Both can be pickled.
        digest: `content_hash` those bytes, and
        size: width and height of the upright image in pixels, once they are known.
        place: where a person finds it (file:row), if the id does not say.
        templated: how many of the captions, the last ones, are of `data.caption_templates`.
        held_out: the side of the split that it is on; None leaves that to its group.
        renew: gives the sample that takes this one's place in an epoch ≥ 0; None: this one, always.
        cutout: of one that shows something on a transparent ground, the mean color of that, once it is known; None
            for one that brings its own ground.
    """

    id: str
    captions: tuple[str, ...]
    group: str
    # Not a part of what a sample is: functions are equal only to themselves.
    read: Callable[[], bytes] = field(compare=False, repr=False)
    decode: Callable[[bytes], Decoded] = field(compare=False, repr=False)
    digest: str | None = None
    size: tuple[int, int] | None = None
    place: str = field(default="", compare=False)
    templated: int = 0
    held_out: bool | None = None
    renew: Callable[[int], Sample] | None = field(default=None, compare=False, repr=False)
    cutout: tuple[int, int, int] | None = None

    @property
    def display_name(self) -> str:
        """What to call it in front of a person."""
        return self.place or self.id

    def load(self) -> Image.Image:
        """The image; ValueError naming the sample if it has become unreadable."""
        return self.load_decoded().image

    def load_decoded(self) -> Decoded:
        """The image and how it was stored; ValueError naming the sample if it has become unreadable."""
        try:
            return self.decode(self.read())
        except UnreadableError:  # of another sample that this one is made of
            raise
        except (OSError, ValueError) as error:
            raise UnreadableError(
                f"{self.display_name} could be read before, and now cannot: {error}; restore or remove it"
            ) from error


@dataclass(frozen=True)
class Skipped:
    """Something that could not become a sample: its path within the source (or file:line), and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class CaptionSource:
    """Where a folder has captions, or what looks as if it had.

    Args:
        name: as `data.caption_source` takes it; of a file that is not read, its path.
        images: how many images it captions, or names.
        more: how many of them have no caption otherwise.
        reason: why it is not used; "" where it is.
        doubtful: it may hold captions that nobody reads.
    """

    name: str
    images: int
    more: int = 0
    reason: str = ""
    doubtful: bool = False

    @property
    def is_missed(self) -> bool:
        """Whether captions may be lost: it is not used, and has what no other source has, or nobody knows what."""
        return bool(self.reason) and self.doubtful and (self.more > 0 or not self.images)


@dataclass(frozen=True)
class Source:
    """All samples of a data set in a fixed order, and all that was left out.

    Nothing is decoded yet, unless the set is `curated`: then every image is known to be sound, and no two are the
    same by mistake. Samples have captions, unless it was opened by someone who needs none.
    """

    name: str
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    curated: bool = False
    caption_sources: tuple[CaptionSource, ...] = ()
    captioned: bool = True


# What to do about a data set without captions.
WAYS_OUT = (
    "put an a.txt with its caption beside each a.png, or sort the images into sub-folders named after what they show, "
    "or add a metadata.csv with the columns file_name and text"
)


class NoCaptionsError(ValueError):
    """Raised where there is a data set, but no captioned image in it; `source` has what was skipped, and why."""

    def __init__(self, message: str, source: Source) -> None:
        super().__init__(message)
        self.source = source


def open_source(config: DataConfig, *, captioned: bool = True) -> Source:
    """Opens the data set that `config.path` names: built in, or told apart by what is there (`ldm.data.layouts`).

    Nothing is decoded: whatever names itself an image is listed, and what has no caption is skipped.

    Args:
        captioned: False lists images without a caption too, for what learns from images alone.

    Raises:
        NoCaptionsError: a ValueError, if it holds no captioned image, or none at all.
        ValueError: if there is no such data set, a package that it needs is missing, or columns, split or subset are
            asked for that it does not have.
    """
    source = _opened(config, captioned)
    if not config.caption_templates:
        return source
    return replace(source, samples=tuple(_templated(sample, config.caption_templates) for sample in source.samples))


def _opened(config: DataConfig, captioned: bool) -> Source:
    # Each layout imports the records above, and what it needs of other packages only when it is opened.
    if config.path == "digits":
        from ldm.data.digits import open_digits

        return open_digits()
    if config.path == "openmoji":
        from ldm.data.openmoji import open_openmoji

        return open_openmoji(
            config.resolution, config.background_rgb, skin_tones=config.skin_tones, cutouts=config.compose > 0
        )
    if config.path == "scenes":
        from ldm.data.scenes.source import open_scenes

        return open_scenes(config)
    from ldm.data.layouts import open_path

    return open_path(config, captioned)


def _templated(sample: Sample, templates: tuple[str, ...]) -> Sample:
    """With its captions, and after them each in each template, where that says something new."""
    said = dict.fromkeys(template.replace("{}", caption) for template in templates for caption in sample.captions)
    new = tuple(text for text in said if text not in sample.captions)
    return replace(sample, captions=(*sample.captions, *new), templated=len(new))


def require(source: str, *modules: str) -> None:
    """Refuses to open a built-in data set without the packages it is made from."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f'the data set "{source}" needs {" and ".join(missing)}; run: {pip_install(*missing)}')
