"""Runs of which some samples are composed: broken off, cut up and spread, they are the same run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import CaptionedImages, DataConfig, collate, to_signed
from ldm.data.composer import Composer
from ldm.data.inspection import inspect
from ldm.data.layouts import open_source
from ldm.training import latents as module
from ldm.training.latents import CachedEncoders, LatentCache
from tests.training.runs import losses, run_autoencoder, run_ldm, settings
from tests.training.test_latents import make_codec, text_encoder, text_files  # noqa: F401 (fixtures)
from tests.training.test_resume import broken_off
from tools.torture_resume import differences, evidence

STEPS, BROKEN_AFTER = 7, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of noise, every second one on transparent ground."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        if i % 2:
            pixels[:5, :, 3] = pixels[-5:, :, 3] = pixels[:, :5, 3] = pixels[:, -5:, 3] = 0
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}")
    return folder


def arguments(folder, pictures, *, accumulation=1, workers=0):
    more = [f"data.path={pictures}", "data.held_out=0.2", "data.resolution=16", "data.flip=true", "data.compose=0.5"]
    more += ["data.renew_every=2", f"train.max_steps={STEPS}", "train.batch_size=12", "train.warmup_steps=6"]
    more += [f"train.checkpoint_every={BROKEN_AFTER}", "train.keep_checkpoints=9", "train.validate_every=3"]
    more += ["train.sample_every=6", f"train.gradient_accumulation_steps={accumulation}"]
    return [*more, f"train.num_workers={workers}"]


CASES = [("pixel", "center"), ("latent", "center"), ("latent", "random")]


@pytest.mark.parametrize(("space", "crop"), CASES)
def test_a_run_that_was_broken_off_goes_on_as_if_it_were_not(
    space, crop, pictures, encoder_folder, first_stage, tmp_path, capsys
):
    """Steps 5 to 7 lie in the epochs 2 and 3, whose pictures are composed once: the one resumed begins with none."""

    def train(folder, resume=False, **how):
        known = settings(folder, encoder_folder, space, first_stage)
        run_ldm(known, *arguments(folder, pictures, **how), f"data.crop={crop}", resume=resume)

    train(tmp_path / "one", accumulation=1, workers=0)
    said = capsys.readouterr().out
    assert "50 % of the samples of an epoch are composed" in said
    assert "% of the samples are composed of others, anew every 2 epochs" in said
    expected = evidence(tmp_path / "one")
    two = broken_off(tmp_path / "one", tmp_path / "two", BROKEN_AFTER)
    train(two, resume=True)
    assert differences(expected, evidence(two)) == []

    train(tmp_path / "three", accumulation=3, workers=1)
    np.testing.assert_allclose(losses(tmp_path / "three"), losses(tmp_path / "one"), rtol=1e-4)


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_scenes_that_were_broken_off_go_on_as_if_they_were_not(space, encoder_folder, first_stage, tmp_path):
    def train(folder, resume=False, **how):
        given = [one for one in arguments(folder, "scenes", **how) if "flip" not in one and "compose" not in one]
        known = settings(folder, encoder_folder, space, first_stage)
        run_ldm(known, *given, "data.scenes=24", "data.resolution=16", resume=resume)

    train(tmp_path / "one")
    two = broken_off(tmp_path / "one", tmp_path / "two", BROKEN_AFTER)
    train(two, resume=True)
    assert differences(evidence(tmp_path / "one"), evidence(two)) == []
    train(tmp_path / "three", accumulation=3, workers=1)
    np.testing.assert_allclose(losses(tmp_path / "three"), losses(tmp_path / "one"), rtol=1e-4)


def test_what_is_held_out_is_not_composed(pictures, encoder_folder, first_stage, tmp_path):
    """So that its loss is that of a run without, where nothing is learned."""
    first = []
    for compose in ("0", "0.9"):
        folder = tmp_path / compose
        more = [f"data.path={pictures}", "data.held_out=0.2", "train.max_steps=1", "train.validate_every=1"]
        more += [f"data.compose={compose}", "train.learning_rate=1e-30", "train.warmup_steps=0"]
        run_ldm(settings(folder, encoder_folder, "latent", first_stage), *more)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first.append([line["held_out_loss"] for line in lines if "held_out_loss" in line])
    assert first[0] and first[0] == first[1]


def test_a_first_stage_sees_composed_pictures(pictures, tmp_path):
    seen = []
    for compose in ("0", "0.9"):
        folder = tmp_path / compose
        run_autoencoder(folder, f"data.path={pictures}", f"data.compose={compose}", "data.held_out=0.2")
        seen.append(losses(folder))
    assert seen[0] != seen[1]


# ---- the mixture in one batch


def composed(pictures, tmp_path, **changes):
    known = {"resolution": 16, "compose": 0.5, "renew_every": 2, "flip": True, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(path=str(pictures), **known | changes)
    used = inspect(open_source(config), config).used
    return CaptionedImages(used, config, 0, composer=Composer(used, config, 0))


def encode(images, text_encoder, codec):  # noqa: F811
    device = torch.device("cpu")
    encoders = CachedEncoders(codec, text_encoder, images.config.cache_folder, device=device, print=lambda _: None)
    return LatentCache(images, encoders)


def batch_of(images, epoch):
    return collate([images[epoch, index] for index in range(len(images))])


def test_a_batch_mixes_what_is_kept_on_disk_and_in_memory(pictures, tmp_path, text_encoder, monkeypatch):  # noqa: F811
    codec = make_codec()
    images = composed(pictures, tmp_path)
    looked_at = composed(pictures, tmp_path)  # that goes on loading all images
    encoded = encode(images, text_encoder, codec)
    for epoch in (0, 1, 2, 3):
        batch, plain = batch_of(images, epoch), batch_of(looked_at, epoch)
        assert batch.captions == plain.captions
        assert 0 < int(batch.renewed.sum()) < len(batch.ids)
        assert torch.equal(batch.loaded, batch.renewed & (epoch % 2 == 0)), "loaded once, plain ones never"
        latents, states = encoded.latents(batch, None), encoded.text(batch.captions)
        with torch.no_grad():
            expected = codec.sample_latents(codec.moments(to_signed(plain.images)))
        torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(states, text_encoder(batch.captions), rtol=2e-3, atol=2e-3)
        # One whose memory is empty, and one whose memory is too small, say the same to the last bit.
        fresh = encode(composed(pictures, tmp_path), text_encoder, codec)
        assert torch.equal(fresh.latents(batch, None), latents)
        with monkeypatch.context() as patch:
            patch.setattr(module, "MEMORY_BYTES", 4000)
            small = encode(composed(pictures, tmp_path), text_encoder, codec)
            assert 0 < small.images.renewed_cached < len(images)
            some = batch_of(small.images, epoch)
            assert torch.equal(small.latents(some, None), latents)
            assert torch.equal(small.text(some.captions), states)
            assert len(small._memory._moments) <= small.images.renewed_cached
    kept = encoded._memory._moments
    assert set(kept) == set(batch.indices[batch.renewed].tolist()), "what was composed before is forgotten"
    assert torch.equal(encoded.text([""]), encoded.null)
    assert encoded.statistics() is not None


def test_a_row_does_not_depend_on_what_is_composed_beside_it(pictures, tmp_path, text_encoder):  # noqa: F811
    images = composed(pictures, tmp_path)
    encoded = encode(images, text_encoder, make_codec())
    together = encoded.latents(batch_of(images, 0), None)
    alone = encode(composed(pictures, tmp_path), text_encoder, make_codec())
    for index in range(len(images)):
        assert torch.equal(alone.latents(collate([images[0, index]]), None)[0], together[index])


def test_several_processes_load_in_every_epoch(pictures, tmp_path, text_encoder):  # noqa: F811
    images = composed(pictures, tmp_path)
    device = torch.device("cpu")
    cache = images.config.cache_folder
    encoders = CachedEncoders(make_codec(), text_encoder, cache, device=device, world=2, print=lambda _: None)
    LatentCache(images, encoders)
    batch = batch_of(images, 1)
    assert torch.equal(batch.loaded, batch.renewed)
