"""Scenes as a data set: a scene is a function of its number, and epochs use different numbers."""

from __future__ import annotations

import json
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING

from ldm.data.rng import content_hash, generator
from ldm.data.scenes.captions import CaptionWriter
from ldm.data.scenes.catalog import load_catalog
from ldm.data.scenes.render import render_scene
from ldm.data.scenes.scene import KIND_FRACTIONS, Scene, SceneSampler
from ldm.data.sources import Decoded, Sample, Source

if TYPE_CHECKING:
    from PIL import Image

    from ldm.data.sources import DataConfig

# Raised when numbers give other scenes.
VERSION = 2
TIERS = {"common": 1, "all": 2}


def open_scenes(config: DataConfig) -> Source:
    """`config.scenes` training scenes, replaced every `config.renew_every` epochs, and `config.held_out` times as many
    held-out scenes.
    """
    samples = [
        training_sample(config, config.first_scene + place, partial(_renewed, config, place))
        for place in range(config.scenes)
    ]
    samples += [held_out_sample(config, place) for place in range(round(config.held_out * config.scenes))]
    return Source("scenes", tuple(samples), curated=True)


def training_sample(config: DataConfig, number: int, renew: partial[Sample] | None = None) -> Sample:
    """Training scene `number`, 0 or more."""
    _, caption = training_scene(number, TIERS[config.things])
    return _sample(config, f"scenes/{number}", caption, {"number": number}, held_out=False, renew=renew)


# Used for the caption, the name and the image of a sample.
@lru_cache(maxsize=2**13)
def training_scene(number: int, tier: int = 1) -> tuple[Scene, str]:
    """Training scene `number` and its caption."""
    rng = generator(VERSION, "scene", number)
    scene = _sampler(tier).sample(rng, number)
    return scene, CaptionWriter(rng).caption(scene).text


def held_out_sample(config: DataConfig, number: int) -> Sample:
    """Held-out scene `number`; kinds alternate."""
    _, caption = held_out_scene(number, TIERS[config.things])
    return _sample(config, f"scenes/held-out/{number}", caption, {"held_out": number}, held_out=True)


def held_out_scene(number: int, tier: int = 1) -> tuple[Scene, str]:
    """A scene with a concept that no training scene shows."""
    rng = generator(VERSION, "held-out scene", number)
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
    rng = generator(VERSION, "held-out pixels", name["held_out"])
    return Decoded(render_scene(scene, rng, resolution), "SVG", "RGB")


def render_training_scene(number: int, resolution: int, tier: int = 1) -> Image.Image:
    """The RGB image of training scene `number`."""
    scene, _ = training_scene(number, tier)
    return render_scene(scene, generator(VERSION, "pixels", number), resolution)


def _renewed(config: DataConfig, place: int, epoch: int) -> Sample:
    block = epoch // config.renew_every
    return training_sample(config, config.first_scene + block * config.scenes + place)


def _sample(
    config: DataConfig,
    id: str,
    caption: str,
    name: dict[str, int],
    *,
    held_out: bool,
    renew: partial[Sample] | None = None,
) -> Sample:
    tier = TIERS[config.things]
    key = json.dumps({**name, "tier": tier, "version": VERSION, "catalog": load_catalog().digest}).encode()
    return Sample(
        id=id,
        captions=(caption,),
        group=id,
        read=partial(bytes, key),
        decode=partial(decode_scene, resolution=config.resolution, tier=tier),
        digest=content_hash(key),
        size=(config.resolution, config.resolution),
        held_out=held_out,
        renew=renew,
    )


@cache
def _sampler(tier: int) -> SceneSampler:
    return SceneSampler(load_catalog(), tier)
