"""Records of captioned images: the data config, samples, and sources of samples."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image, ImageColor

from ldm.environment import pip_install

BUILT_IN = ("digits", "openmoji", "scenes")
MIN_COMPOSED_RESOLUTION = 16  # pixels


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, and how an image becomes a tensor.

    Args:
        path: "digits", "openmoji", "scenes", a folder or file, or the id of a data set on the hub. Write "./digits" for
            a folder with the name of a built-in data set.
        resolution: side R of square images in pixels. With buckets, images of any shape have about R² pixels.
        flip: mirror half of the images horizontally, at random in each epoch.
        crop: "center", or "random" in each epoch.
        buckets: batches of one aspect ratio instead of squares; None enables them above 128 pixels.
        image_column, caption_column: columns of tables and data sets; None guesses them.
        split, subset: the split of a data set that has several, and its configuration if it has several.
        cache_dir: folder of the caches; None is $LDM_CACHE or ~/.cache/ldm.
        held_out: fraction of the groups, in [0, 1), that is not trained on.
        background: CSS color behind transparent images ("white", "#f0f0f0").
        skin_tones: openmoji only: also use the variants in five skin tones.
        caption_source: which captions of a folder to use: the path of a table in it, "metadata", "sidecars" (text files
            beside images), "shards" or "folders" (names of sub-folders). None takes the source that captions most
            images.
        caption_language: of text files beside images, lines of which may begin with a language, as in "de.utf8=": the
            one to take, such as "de". None takes lines without a language, which count as English ("en").
        caption_templates: each caption is also used inside each of these, such as "a photo of {}".
        compose: fraction of the samples of an epoch, in [0, 1), composed of several images (`ldm.data.composer`).
        renew_every: number of epochs, at least 1, after which compositions or scenes are replaced by new ones.
        scenes, first_scene, things: scenes only: number in use at a time, the first scene number, and whether the
            "common" third of all things or "all" are shown.

    Raises:
        ValueError: naming the key and its value.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # without it, pydantic ignores unknown keys

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
    caption_language: str | None = None
    split: str = "train"
    subset: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        def refuse(key: str, why: str) -> None:
            raise ValueError(f"data.{key} is {getattr(self, key)!r}{why}")

        if not self.path.strip():
            raise ValueError(f"data.path is empty; give a folder, or one of {', '.join(BUILT_IN)}")
        for key in ("path", "cache_dir"):
            path = getattr(self, key) or ""
            if path.startswith("~") and os.path.expanduser(path) == path:
                refuse(key, f", but that user does not exist; write ./{path} for a folder")
        for key, minimum in (("resolution", 1), ("scenes", 1), ("renew_every", 1), ("first_scene", 0)):
            if getattr(self, key) < minimum:
                refuse(key, f"; it is at least {minimum}")
        if self.crop not in ("center", "random"):
            refuse("crop", '; choose "center" or "random"')
        for key in ("held_out", "compose"):
            if not 0 <= getattr(self, key) < 1:
                refuse(key, "; it is a fraction, at least 0 and below 1")
        for path, keys in (("openmoji", ("skin_tones",)), ("scenes", ("scenes", "first_scene", "things"))):
            for key in keys:
                if self.path != path and getattr(self, key) != getattr(type(self), key):
                    refuse(key, f', which is for data.path "{path}" only, not for "{self.path}"; leave it out')
        if self.compose > 0 and self.path == "scenes":
            refuse("compose", ', which is not for data.path "scenes": they are composed already; leave it out')
        if self.compose > 0 and self.resolution < MIN_COMPOSED_RESOLUTION:
            why = f"needs data.resolution {MIN_COMPOSED_RESOLUTION} or more, not {self.resolution}"
            refuse("compose", f", which {why}; raise it, or leave data.compose out")
        if self.compose == 0 and self.path != "scenes" and self.renew_every != type(self).renew_every:
            refuse("renew_every", f', which is for scenes or data.compose above 0, not for "{self.path}"; leave it out')
        if self.path == "scenes" and self.flip:
            refuse("flip", ', but would turn "left of" into "right of"; leave it out for data.path "scenes"')
        for template in self.caption_templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ValueError(f'data.caption_templates has "{template}"; each needs one {{}}: "a photo of {{}}"')
        for key in ("image_column", "caption_column", "caption_source", "caption_language", "subset"):
            if getattr(self, key) is not None and self.path in BUILT_IN:
                kind = "folders" if key in ("caption_source", "caption_language") else "tables and data sets of the hub"
                refuse(key, f', which is for {kind}, not for "{self.path}"; leave it out')
        _ = self.background_rgb

    @property
    def bucketed(self) -> bool:
        """Whether images keep approximately their aspect ratio."""
        return self.resolution > 128 if self.buckets is None else self.buckets

    @property
    def cache_folder(self) -> Path:
        """The folder of everything that can be computed again from the data."""
        return Path(self.cache_dir or os.environ.get("LDM_CACHE") or "~/.cache/ldm").expanduser()

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """`background` as red, green and blue in 0..255."""
        try:
            red, green, blue, *alpha = ImageColor.getrgb(self.background)
        except ValueError:
            alpha = [0]
        if alpha:
            color = f'"{self.background}"'
            raise ValueError(f'data.background is {color}; give an opaque CSS color such as "white" or "#f0f0f0"')
        return red, green, blue


@dataclass(frozen=True)
class Decoded:
    """A decoded image, RGB, native size, upright, transparent parts on the background.

    Args:
        format, mode: as stored, in Pillow's words ("JPEG", "CMYK").
        traits: the conversions that were needed: "rotated", "cmyk", "16-bit", "palette", "transparent", "animated".
        alpha: opacity before blending, mode L; None for opaque images, or if not computed.
    """

    image: Image.Image
    format: str
    mode: str
    traits: tuple[str, ...] = ()
    alpha: Image.Image | None = field(default=None, compare=False, repr=False)


Decode = Callable[[bytes], Decoded]


class UnreadableError(ValueError):
    """A readable image became unreadable; the message names it."""


@dataclass(frozen=True)
class Sample:
    """One captioned image.

    Args:
        id: unique in its source, and independent of other samples.
        captions: the plainest first. Empty only in a source without captions.
        group: samples of one group are on the same side of the split.
        read: returns the stored bytes, which are the key of caches. Raises OSError or ValueError.
        decode: bytes → image. Raises ValueError with the reason, without the name. Both can be pickled.
        digest, size: `content_hash` of the bytes, and (width, height) of the upright image in pixels, if known.
        place: file:row for messages, if the id does not say it.
        templated: how many of the last captions come from `data.caption_templates`.
        held_out: the side of the split; None lets the group decide.
        renew: epoch ≥ 0 → the sample that replaces this one in that epoch; None keeps it.
        cutout: mean color of a motif on a transparent ground; None for other images.
    """

    id: str
    captions: tuple[str, ...]
    group: str
    read: Callable[[], bytes] = field(compare=False, repr=False)  # equal only to itself
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
        """The name in messages."""
        return self.place or self.id

    def load(self) -> Image.Image:
        """The image. Raises `UnreadableError` if it has become unreadable."""
        return self.load_decoded().image

    def load_decoded(self) -> Decoded:
        """The image and how it was stored. Raises `UnreadableError` if it has become unreadable."""
        try:
            return self.decode(self.read())
        except UnreadableError:  # of a part of a composition
            raise
        except (OSError, ValueError) as error:
            reason = f"could be read before, and now cannot: {error}; restore or remove it"
            raise UnreadableError(f"{self.display_name} {reason}") from error


@dataclass(frozen=True)
class Skipped:
    """An entry that did not become a sample: its path in the source (or file:line), and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class CaptionSource:
    """A source of captions in a folder, or a file that may be one.

    Args:
        name: as in `data.caption_source`, or the path of a file that is not read.
        images, more: how many images it captions or names, and how many of them have no other caption.
        reason: why it is not used; "" if it is.
        doubtful: it may hold captions that are not read.
    """

    name: str
    images: int
    more: int = 0
    reason: str = ""
    doubtful: bool = False


@dataclass(frozen=True)
class Source:
    """All samples of a data set in a fixed order, not decoded yet, and all entries that were skipped.

    In a `curated` source all images are known to be valid and distinct. Samples have captions unless `captioned` is
    False.
    """

    name: str
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    curated: bool = False
    caption_sources: tuple[CaptionSource, ...] = ()
    captioned: bool = True
    languages: dict[str, int] = field(default_factory=dict)  # lines of captions by language, if they have a key


@dataclass
class Listing:
    """The samples of one source of captions.

    Args:
        name: as in data.caption_source: "metadata", "sidecars", "folders", "shards", or the path of a table.
        covered: files that became a sample, or are in `skipped`.
        uncovered: why other images are skipped.
        error: why it has no captions, although it names images, which are in `named`.
        files: its tables.
        weak: images are named in an unusual column, so that others are preferred at a tie.
        numbers: its captions have no letters and are in a column without a caption name.
    """

    name: str = ""
    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    uncovered: str = "no caption"
    error: ValueError | None = None
    named: set[str] = field(default_factory=set)
    files: tuple[str, ...] = ()
    weak: bool = False
    numbers: bool = False

    @cached_property
    def images(self) -> set[str]:
        """The images that it captions, or names."""
        return {sample.id for sample in self.samples} or self.named


# The advice for a data set without captions.
WAYS_OUT = (
    "put an a.txt with its caption beside each a.png, or sort the images into sub-folders named after what they show, "
    "or add a metadata.csv with the columns file_name and text"
)


class NoCaptionsError(ValueError):
    """A data set has no captioned image; `source` lists the skipped entries."""

    def __init__(self, message: str, source: Source) -> None:
        super().__init__(message)
        self.source = source


def require(source: str, *modules: str) -> None:
    """Raises ValueError if modules that a built-in data set needs are not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f'the data set "{source}" needs {" and ".join(missing)}; run: {pip_install(*missing)}')
