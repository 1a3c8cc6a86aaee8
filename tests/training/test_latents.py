"""The cache of the frozen networks: what a change makes anew, and that nothing random is kept."""

import dataclasses
import gc
import os
import shutil
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ldm.codecs import LatentCodec, PixelCodec
from ldm.data import CaptionedImages, DataConfig, collate, to_signed
from ldm.data.dataset import Buckets
from ldm.data.layouts import open_source
from ldm.diffusion import drop_conditioning
from ldm.models import AutoencoderConfig, AutoencoderKL
from ldm.text import load_text_encoder_folders
from ldm.training import latents as module
from ldm.training.latents import CachedEncoders, LatentCache
from ldm.training.noise import step_noise
from tests import tiny

ROOT = Path(__file__).parents[2]
COUNT = 7
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    return tiny.text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture
def text_encoder(text_files):
    return load_text_encoder_folders(text_files / "text_encoder", text_files / "tokenizer")


@pytest.fixture
def codec():
    return make_codec()


def make_codec():
    torch.manual_seed(0)
    return LatentCodec(AutoencoderKL(AutoencoderConfig(**tiny.VAE)).eval().requires_grad_(False))


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of 20 x 20 noise, one of them transparent, with a caption each."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(COUNT):
        channels = 4 if i == 3 else 3
        Image.fromarray(random.integers(256, size=(20, 20, channels), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def data(folder, tmp_path, **changes):
    settings = {"resolution": 16, "flip": True, "cache_dir": str(tmp_path / "cache")} | changes
    config = DataConfig(path=str(folder), **settings)
    return CaptionedImages(open_source(config).samples, config, 0)


def encode(images, codec, text_encoder, lines=None, **how):
    encoders = CachedEncoders(
        codec,
        text_encoder,
        images.config.cache_folder,
        device=torch.device("cpu"),
        print=(lines if lines is not None else []).append,
        **how,
    )
    return LatentCache(images, encoders)


def new(encoded):
    return encoded.new_images, encoded.new_captions


def everything(encoded):
    """All latents, both flips, and all states."""
    images = encoded.images
    both = []
    for flipped in (False, True) if images.config.flip else (False,):
        items = [dataclasses.replace(images[0, i], flipped=flipped) for i in range(len(images))]
        both.append(encoded.latents(collate(items), None))
    captions = [sample.captions[0] for sample in images.samples]
    return torch.cat(both), torch.cat([encoded.text(captions), encoded.null])


def test_what_is_kept_is_what_the_networks_say(folder, tmp_path, codec, text_encoder):
    images = data(folder, tmp_path)
    encoded = encode(images, codec, text_encoder)
    assert new(encoded) == (COUNT, COUNT + 1)
    latents, states = everything(encoded)
    pixels = torch.stack([images.image_at(i, flipped) for flipped in (False, True) for i in range(COUNT)])
    with torch.no_grad():
        expected = codec.sample_latents(codec.moments(to_signed(pixels)))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents[:COUNT], latents[COUNT:])
    expected = text_encoder([*(f"number {i}" for i in range(COUNT)), ""])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert not images.with_images

    mean, std = encoded.statistics()
    torch.testing.assert_close(mean, latents[:COUNT].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(std, latents[:COUNT].transpose(0, 1).flatten(1).std(dim=1))


def change_a_pixel(folder):
    pixels = np.array(Image.open(folder / "2.png"))
    pixels[0, 0, 0] ^= 1  # far from the middle square's content, but bytes are what counts
    Image.fromarray(pixels).save(folder / "2.png")


def add_an_image(folder):
    shutil.copy(folder / "0.png", folder / "new.png")
    with (folder / "new.png").open("ab") as file:
        file.write(b"x")
    (folder / "new.txt").write_text("number 0")


def change_weight(network, name):
    dict(network.named_parameters())[name].data.view(-1)[0] += 1e-3


CHANGES = {
    "nothing": (lambda folder, codec, text: {}, (0, 0)),
    "one byte of an image": (lambda folder, codec, text: change_a_pixel(folder), (1, 0)),
    "a caption": (lambda folder, codec, text: (folder / "1.txt").write_text("number one"), (0, 1)),
    "a caption that others have": (lambda folder, codec, text: (folder / "1.txt").write_text("number 2"), (0, 0)),
    "one more image": (lambda folder, codec, text: add_an_image(folder), (1, 0)),
    "a copy of an image": (lambda folder, codec, text: shutil.copy(folder / "0.png", folder / "1.png"), (0, 0)),
    "a name": (lambda folder, codec, text: (folder / "0.png").rename(folder / "00.PNG"), (0, 0)),
    "the first weight": (
        lambda folder, codec, text: change_weight(codec.autoencoder, "encoder.conv_in.weight"),
        (COUNT, 0),
    ),
    "the last weight": (
        lambda folder, codec, text: change_weight(codec.autoencoder, "quant_conv.bias"),
        (COUNT, 0),
    ),
    "the decoder": (lambda folder, codec, text: change_weight(codec.autoencoder, "decoder.conv_in.weight"), (0, 0)),
    "the text encoder": (
        lambda folder, codec, text: change_weight(text.model, "final_layer_norm.bias"),
        (0, COUNT + 1),
    ),
    "resolution": (lambda folder, codec, text: {"resolution": 18}, (COUNT, 0)),
    "background": (lambda folder, codec, text: {"background": "black"}, (COUNT, 0)),
    "flips no more": (lambda folder, codec, text: {"flip": False}, (0, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_anew_what_depends_on_it(change, folder, tmp_path, codec, text_encoder):
    encode(data(folder, tmp_path), codec, text_encoder)
    act, expected = CHANGES[change]
    settings = act(folder, codec, text_encoder)
    if change == "a name":
        (folder / "0.txt").rename(folder / "00.txt")
    images = data(folder, tmp_path, **(settings if isinstance(settings, dict) else {}))
    warm = encode(images, codec, text_encoder)
    assert new(warm) == expected
    # And what comes out is what a fresh cache gives.
    (tmp_path / "cache").rename(tmp_path / "old")
    fresh = everything(encode(images, codec, text_encoder))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "old").rename(tmp_path / "cache")
    for one, two in zip(everything(warm), fresh, strict=True):
        assert torch.equal(one, two)


def test_the_scale_of_latents_is_not_kept(folder, tmp_path, codec, text_encoder):
    images = data(folder, tmp_path)
    before, _ = everything(encode(images, codec, text_encoder))
    scaled = dataclasses.replace(codec.autoencoder.config, scaling_factor=0.5, shift_factor=0.25)
    autoencoder = AutoencoderKL(scaled).eval()
    autoencoder.load_state_dict(codec.autoencoder.state_dict())
    encoded = encode(images, LatentCodec(autoencoder), text_encoder)
    assert new(encoded) == (0, 0)
    after, _ = everything(encoded)
    torch.testing.assert_close(after, (before * (1 / tiny_scale(codec)) - 0.25) * 0.5)


def tiny_scale(codec):
    return codec.autoencoder.config.scaling_factor


def test_flips_are_added_to_what_is_there(folder, tmp_path, codec, text_encoder):
    encode(data(folder, tmp_path, flip=False), codec, text_encoder)
    (shard,) = (tmp_path / "cache" / "moments").rglob("*.safetensors")
    size = shard.stat().st_size
    assert new(encode(data(folder, tmp_path), codec, text_encoder)) == (COUNT, 0)
    one, two = (path.stat().st_size for path in (tmp_path / "cache" / "moments").rglob("*.safetensors"))
    assert one == two == size  # the unflipped ones were not encoded again


def test_a_text_encoder_is_known_again_and_told_apart(tmp_path, text_files, text_encoder):
    def fingerprint(folder):
        return load_text_encoder_folders(folder / "text_encoder", folder / "tokenizer").fingerprint()

    own = text_encoder.fingerprint()
    text_encoder.save(tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") == own
    other = tmp_path / "other"
    shutil.copytree(text_files, other)
    tiny.edit_json(other / "text_encoder" / "config.json", transformers_version="0")
    assert fingerprint(other) == own
    seen = [own]
    tiny.edit_json(other / "tokenizer" / "tokenizer_config.json", model_max_length=tiny.LENGTH - 1)
    seen.append(fingerprint(other))
    tiny.edit_json(other / "text_encoder" / "config.json", use_attention_mask=True)
    seen.append(fingerprint(other))
    tiny.edit_json(other / "text_encoder" / "config.json", hidden_act="relu")
    seen.append(fingerprint(other))
    path = other / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    seen.append(fingerprint(other))
    assert len(set(seen)) == 5


def test_a_pooler_that_the_weights_lack_changes_nothing(tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=6, max_position_embeddings=20, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "text_encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        seen.append(load_text_encoder_folders(tmp_path / "text_encoder", tmp_path / "tokenizer"))
    assert not torch.equal(*(encoder.model.pooler.dense.weight for encoder in seen))
    assert seen[0].fingerprint() == seen[1].fingerprint()


def test_a_cache_built_in_parts_equals_one_built_at_once(folder, tmp_path, codec, text_encoder, monkeypatch):
    whole = everything(encode(data(folder, tmp_path), codec, text_encoder))
    monkeypatch.setattr(module, "SHARD_ROWS", 4)  # two images a shard, both flips
    monkeypatch.setattr(module.RowCache, "add", killed_twice(module.RowCache.add))
    images = data(folder, tmp_path, cache_dir=str(tmp_path / "second"))
    with pytest.raises(KeyboardInterrupt):
        encode(images, codec, text_encoder)  # while captions are encoded
    with pytest.raises(KeyboardInterrupt):
        encode(images, codec, text_encoder)  # while images are
    monkeypatch.undo()
    resumed = encode(images, codec, text_encoder)
    assert new(resumed) == (COUNT - 2, 0)
    for one, two in zip(everything(resumed), whole, strict=True):
        assert torch.equal(one, two)


def killed_twice(add):
    """One shard is written and the second ends the process; of the next session the third."""
    calls = []

    def dying(self, keys, rows, to_come=0):
        calls.append(self)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        add(self, keys, rows, to_come)

    return dying


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_does_not_depend_on_what_is_encoded_with_it(workers, folder, tmp_path, codec, text_encoder):
    every = everything(encode(data(folder, tmp_path), codec, text_encoder, num_workers=workers))
    for i in (0, 5):  # alone, in folders of their own
        alone = tmp_path / f"alone {i}"
        alone.mkdir()
        for suffix in ("png", "txt"):
            shutil.copy(folder / f"{i}.{suffix}", alone)
        images = data(alone, tmp_path, cache_dir=str(tmp_path / f"cache {i}"))
        with torch.autocast("cpu", torch.bfloat16):
            encoded = encode(images, codec, text_encoder)
        latents, states = everything(encoded)
        assert torch.equal(latents, every[0][[i, COUNT + i]])
        assert torch.equal(states, every[1][[i, COUNT]])


def test_processes_share_the_work(folder, tmp_path, codec, text_encoder):
    whole = everything(encode(data(folder, tmp_path), codec, text_encoder))
    meeting, done, lines = threading.Barrier(2), {}, ([], [])

    def process(rank):
        images = data(folder, tmp_path, cache_dir=str(tmp_path / "shared"))
        how = {"rank": rank, "world": 2, "wait": lambda: meeting.wait(60)}
        done[rank] = encode(images, codec, text_encoder, lines[rank], **how)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        assert new(done[rank]) == (COUNT, COUNT + 1)
        for one, two in zip(everything(done[rank]), whole, strict=True):
            assert torch.equal(one, two)
    stored = sorted((tmp_path / "shared" / "moments").rglob("*.safetensors"))
    sizes = [path.stat().st_size for path in stored]
    assert len(sizes) == 2  # one shard a process, of 4 and 3 images: nothing was encoded twice
    row_bytes = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2] * 4
    assert max(sizes) - min(sizes) == pytest.approx(2 * (row_bytes + 16), abs=16)


def test_a_process_whose_disk_nobody_shares_encodes_all(folder, tmp_path, codec, text_encoder):
    alone = encode(data(folder, tmp_path), codec, text_encoder, rank=1, world=3)
    whole = encode(data(folder, tmp_path, cache_dir=str(tmp_path / "b")), codec, text_encoder)
    for one, two in zip(everything(alone), everything(whole), strict=True):
        assert torch.equal(one, two)


def batch_of(images, epoch):
    return collate([images[epoch, i] for i in range(len(images))])


def test_nothing_random_is_kept(folder, tmp_path, codec, text_encoder):
    for i in range(COUNT):
        (folder / f"{i}.txt").unlink()
    lines = [f'{{"file_name": "{i}.png", "text": "{text} {i}"}}' for i in range(COUNT) for text in ("one", "two")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = data(folder, tmp_path)
    encoded = encode(images, codec, text_encoder)
    assert new(encoded) == (COUNT, 2 * COUNT + 1)

    flips, captions, dropped, drawn = set(), set(), set(), []
    for epoch in range(12):
        batch = batch_of(images, epoch)
        assert batch.images is None  # nothing is decoded any more
        draws = step_noise(0, batch.epochs, batch.ids, epoch, shape=SHAPE, caption_dropout=0.3)
        latents = encoded.latents(batch, draws.posterior)
        mean = encoded.latents(batch, None)
        deviation = (latents - mean) / draws.posterior
        assert bool((deviation > 0).all())  # σ of the posterior, of each value
        drawn.append(latents[0])
        flips.add(bool(batch.flipped[0]))
        captions.add(batch.captions[0])
        dropped.add(bool(draws.dropped[0]))
        states = drop_conditioning(encoded.text(batch.captions), encoded.null, draws.dropped)
        for i in range(COUNT):
            expected = text_encoder(["" if draws.dropped[i] else batch.captions[i]])[0]
            torch.testing.assert_close(states[i], expected, rtol=1e-4, atol=1e-5)
        pixels = torch.stack([images.image_at(i, bool(batch.flipped[i])) for i in range(COUNT)])
        torch.testing.assert_close(mean, codec.sample_latents(codec.moments(to_signed(pixels))), rtol=1e-4, atol=1e-5)
    assert flips == dropped == {False, True}
    assert captions == {"one 0", "two 0"}
    assert len({tuple(latents.flatten().tolist()) for latents in drawn}) == 12


def test_random_crops_are_not_kept_and_the_reason_is_said(folder, tmp_path, codec, text_encoder):
    lines = []
    images = data(folder, tmp_path, crop="random")
    encoded = encode(images, codec, text_encoder, lines)
    assert new(encoded) == (0, COUNT + 1)
    assert 'latents are not cached: data.crop is "random"' in lines[0]
    assert encoded.statistics() is None
    assert not (tmp_path / "cache" / "moments").exists()
    # The pictures are square, so that there is one crop, and cached training sees the same.
    kept_images = data(folder, tmp_path)
    kept = encode(kept_images, codec, text_encoder)
    batch = batch_of(images, 3)
    noise = torch.randn(COUNT, *SHAPE)
    assert batch.images is not None
    torch.testing.assert_close(
        encoded.latents(batch, noise), kept.latents(batch_of(kept_images, 3), noise), rtol=1e-4, atol=1e-5
    )


def test_pixels_stay_in_the_data_set(folder, tmp_path, text_encoder):
    lines = []
    images = data(folder, tmp_path)
    codec = PixelCodec((0.0, 0.1, 0.2), (0.5, 0.4, 0.3))
    encoded = encode(images, codec, text_encoder, lines)
    assert new(encoded) == (0, COUNT + 1)
    assert lines == [line for line in lines if "images" not in line]
    batch = batch_of(images, 0)
    assert torch.equal(encoded.latents(batch, None), codec.sample_latents(to_signed(batch.images)))


def test_the_networks_can_be_freed(folder, tmp_path, text_files):
    images = data(folder, tmp_path)
    codec = make_codec()
    text_encoder = load_text_encoder_folders(text_files / "text_encoder", text_files / "tokenizer")
    encoders = CachedEncoders(codec, text_encoder, tmp_path / "cache", device=torch.device("cpu"), print=lambda _: None)
    encoded = LatentCache(images, encoders)
    expected = everything(encoded)
    networks = [weakref.ref(codec.autoencoder), weakref.ref(text_encoder.model)]
    del codec, text_encoder, encoders
    gc.collect()
    assert [network() for network in networks] == [None, None]
    for one, two in zip(everything(encoded), expected, strict=True):
        assert torch.equal(one, two)


def test_shapes_may_differ(folder, tmp_path, codec, text_encoder):
    images = data(folder, tmp_path, flip=False)
    images = CaptionedImages(images.samples, images.config, 0, cache_bytes=0)
    images.buckets = Buckets(((8, 24), (16, 16)), tuple(index % 2 for index in range(COUNT)))
    encoded = encode(images, codec, text_encoder)
    assert new(encoded) == (COUNT, COUNT + 1)
    wide, square = [0, 2, 4, 6], [1, 3, 5]
    images.with_images = True
    for group, shape in ((wide, (4, 4, 12)), (square, SHAPE)):
        batch = collate([images[0, i] for i in group])
        latents = encoded.latents(batch, None)
        assert latents.shape == (len(group), *shape)
        with torch.no_grad():
            expected = codec.sample_latents(codec.moments(to_signed(batch.images)))
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    mean, std = encoded.statistics()
    assert mean.shape == std.shape == (4,)
    assert new(encode(images, codec, text_encoder)) == (0, 0)
    assert new(encode(data(folder, tmp_path, flip=False), codec, text_encoder)) == (4, 0)  # the wide ones, as squares


def test_an_image_that_has_become_unreadable_is_named(folder, tmp_path, codec, text_encoder):
    for workers in (0, 1):
        images = data(folder, tmp_path)
        (folder / "4.png").write_bytes(b"no image any more")
        with pytest.raises(ValueError, match=r"4\.png could be read before, and now cannot") as caught:
            encode(images, codec, text_encoder, num_workers=workers)
        assert "\n" not in str(caught.value)
        Image.new("RGB", (20, 20), "red").save(folder / "4.png")
    images = data(folder, tmp_path)
    (folder / "4.png").unlink()
    with pytest.raises(ValueError, match=r"4\.png cannot be read: .*restore or remove it"):
        encode(images, codec, text_encoder)


def test_numbers_that_are_not_finite_are_never_kept(folder, tmp_path, codec, text_encoder):
    codec.autoencoder.encoder.conv_in.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="encoding images gave numbers that are not finite"):
        encode(data(folder, tmp_path), codec, text_encoder)
    assert not (tmp_path / "cache" / "moments").exists()


def test_encoding_leaves_the_random_numbers_of_a_run_alone(folder, tmp_path, codec, text_encoder):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    encode(data(folder, tmp_path), codec, text_encoder)
    assert torch.equal(torch.rand(1), expected)


def test_the_transform_changes_with_its_version_alone(tmp_path):
    """If this fails, the way from bytes to pixels gives others than before: raise TRANSFORM_VERSION and renew this."""
    folder = tmp_path / "data"
    folder.mkdir()
    y, x = np.mgrid[0:30, 0:42]
    pixels = np.stack([6 * x, 8 * y, (x * y) % 256, 255 - 4 * x], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[..., :3]).convert("P").save(folder / "b.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "c.png")
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    images = data(folder, tmp_path, background="orange")
    sums = [int((images.image_at(i).to(torch.int64).flatten() * torch.arange(1, 769)).sum()) for i in range(3)]
    assert (module.TRANSFORM_VERSION, sums) == (2, [32098560, 35984751, 35840640])


WAITER = """
import datetime, sys, time, torch
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
from ldm.training.latents import long_barrier
wait = long_barrier(2)
time.sleep(3 * torch.distributed.get_rank())
wait()
"""


@pytest.mark.slow
def test_processes_wait_longer_than_their_group_would():
    port = str(socket.create_server(("127.0.0.1", 0)).getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITER]
    both = [
        subprocess.Popen(command, env=shared | {"RANK": rank}, cwd=ROOT, stderr=subprocess.PIPE) for rank in ("0", "1")
    ]
    for process in both:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()[-500:]
