"""Chunks of a call for many pictures, and what does not fit into memory."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline
from ldm.models import UNetConfig
from ldm.pipelines import ProgressStrip, memory
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(params=["pixel", "latent"])
def pipeline(request, tmp_path):
    return tiny.pipeline(tmp_path / "parts", request.param)


def cut_into(monkeypatch, pipeline, pictures):
    """Sets the budget so that so many pictures are drawn at a time."""
    side = 8 * pipeline.codec.factor
    params = pipeline.sampling_params()
    sizes = []
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40)
    with monkeypatch.context() as context:
        context.setattr("ldm.pipelines.pipeline.chunk_sizes", lambda *a, **k: sizes.append(k["sample_bytes"]))
        pipeline._chunk_sizes(1, side, side, params)
    monkeypatch.setattr(memory, "CHUNK_BYTES", pictures * sizes[0] + 1)


def arrays(output):
    return np.stack([np.asarray(image).astype(int) for image in output.images])


CALLS = {
    "one prompt": lambda p: p("a cat", num_images_per_prompt=7, seed=3),
    "with noise": lambda p: p("a cat", num_images_per_prompt=7, seed=3, sampler="ddpm"),
    "prompts": lambda p: p(
        ["a", "b", "a", "c"],
        negative_prompt=["x", "x", "", "y"],
        num_images_per_prompt=2,
        seed=[9, 4, 7, 1, 2, 3, 8, 6],
    ),
    "latents": lambda p: p(
        ["a", "b", "c"],
        seed=2,
        latents=torch.randn(3, *p._blank(1, None, None).shape[1:], generator=torch.Generator().manual_seed(0)),
    ),
    "interpolate": lambda p: p.interpolate(["a", "b"], (1, 2), steps=7),
    "variations": lambda p: p.variations("a", shared_until=500, shared_seed=1, seed=5, count=7),
}


@pytest.mark.parametrize("how", CALLS)
def test_pictures_do_not_depend_on_the_chunks(how, pipeline, monkeypatch):
    whole = CALLS[how](pipeline)
    sizes = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    cut_into(monkeypatch, pipeline, 2)
    cut = CALLS[how](pipeline)
    assert max(sizes) == 4 and len(sizes) > 4  # two pictures, each with and without its prompt
    assert cut.seeds == whole.seeds and len(cut.images) == len(whole.images)
    # As alone and in a batch: a level of 256 at most.
    assert np.abs(arrays(cut) - arrays(whole)).max() <= 1
    assert len({image.tobytes() for image in cut.images}) == len({image.tobytes() for image in whole.images})


def test_inversion_is_cut_too(pipeline, monkeypatch):
    side = 8 * pipeline.codec.factor
    pictures = [Image.new("RGB", (side, side), (40 * i, 90, 9 * i)) for i in range(5)]
    whole = pipeline.invert(pictures, list("abcde"))
    sizes = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2 * pipeline.codec.decode_bytes(side, side))
    cut = pipeline.invert(pictures, list("abcde"))
    assert max(sizes) < 5
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_each_prompt_is_encoded_once_and_states_come_chunk_by_chunk(pipeline, monkeypatch):
    cut_into(monkeypatch, pipeline, 2)
    encoded, seen = [], []  # the tokens of each text
    pipeline.text_encoder.model.register_forward_pre_hook(lambda _, inputs: encoded.extend(inputs[0].tolist()))
    strip = ProgressStrip(pipeline.preview, 4)
    pipeline(["a", "b"], num_images_per_prompt=3, seed=1, on_step=lambda state: (seen.append(state), strip(state)))
    assert len(encoded) == len({tuple(tokens) for tokens in encoded}) == 3  # "", "a" and "b"
    assert [(state.index, len(state.latents)) for state in seen] == [(i, 2) for _ in range(3) for i in range(4)]
    assert len(strip.timesteps) == 4 and [len(column) for column in strip._columns.values()] == [6] * 4
    assert strip.sheet([str(i) for i in range(6)]).height > 6 * 96


def test_a_call_with_a_classifier_is_not_cut(pipeline, monkeypatch):
    cut_into(monkeypatch, pipeline, 1)
    sizes = []

    def classifier(x, t):
        sizes.append(len(x))
        return x.flatten(1).sum(dim=1)

    pipeline(["a", "b", "c"], seed=1, classifier=classifier)
    assert set(sizes) == {3}


def test_the_rule(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100 * 2**30)
    sizes = memory.chunk_sizes(50, (8, 8), sample_bytes=2**30, image_bytes=2**28, device=CPU)
    assert (sizes.sampled, sizes.decoded) == (2, 8)
    assert memory.chunk_sizes(3, (8, 8), sample_bytes=2**28, image_bytes=2**28, device=CPU).sampled == 3
    assert memory.chunk_sizes(50, (8, 8), sample_bytes=2**33, image_bytes=2**28, device=CPU).sampled == 1
    assert (
        memory.chunk_sizes(50, (8, 8), sample_bytes=2**30, image_bytes=2**28, device=CPU, in_one_batch=True).sampled
        == 50
    )
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)  # fewer where less is free
    assert memory.chunk_sizes(50, (8, 8), sample_bytes=2**28, image_bytes=2**28, device=CPU).sampled == 3
    for wrong, message in (
        ({"sample_bytes": 2**32}, r"height and width are 8 and 8: .* 4\.0 GiB"),
        ({"image_bytes": 2**32}, r"4\.0 GiB of memory, and 1\.0 GiB are free on cpu"),
        ({"in_one_batch": True}, r"50 .*classifier.* 25"),
        ({"held_bytes": 2**32}, r"50 .* 8x8 .*4\.0 GiB, .*512 MiB"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.chunk_sizes(50, (8, 8), **({"sample_bytes": 2**29, "image_bytes": 2**28, "device": CPU} | wrong))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p("a", height=10**6, width=10**6), "height and width are 1000000 and 1000000: an image of this"),
        (lambda p: p("a", height=2**70), f"height and width are {2**70} and"),
        (lambda p: p("a", num_images_per_prompt=10**13), "10,000,000,000,000 images of .* and their prompts take"),
        (lambda p: p.interpolate("a", (1, 2), steps=10**13), "10,000,000,000,000 images of"),
        (lambda p: p.variations("a", shared_until=500, shared_seed=1, count=10**13), "10,000,000,000,000 images of"),
        (lambda p: p.variations("a", shared_until=500, shared_seed=1, width=10**10), "width are .* and 10000000000: a"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_computed(call, said, pipeline, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 64 * 2**30)
    monkeypatch.setattr(type(pipeline.unet), "forward", lambda *given: pytest.fail("computed"))
    with pytest.raises(ValueError, match=said) as caught:
        call(pipeline)
    assert "\n" not in str(caught.value)


def test_an_allocation_that_fails_is_one_line(pipeline, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**80)  # the estimate lets it pass
    with pytest.raises(ValueError, match=r"image did not fit into memory .*; choose a smaller size") as caught:
        pipeline("a", height=10**12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_errors_of_memory_are_known(error):
    class Large:
        """In the place of a tensor."""

    def fill():
        large.append(weakref.ref(held := Large()))
        assert held is not None
        raise error

    large = []
    with (
        pytest.raises(ValueError, match=r"it did not fit into memory .*; do less") as caught,
        memory.explain_out_of_memory("it", "do less"),
    ):
        fill()
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert large[0]() is None  # what filled the memory is free again


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory.explain_out_of_memory("it", "do less"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_estimates_are_near_what_was_measured():
    """Peaks on the CPU, in float32, in units of a map of the first level."""
    down, attention_down, up, attention_up = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    measured = {
        (160, 320, 640, 640): (37.4, (attention_down,) * 3 + (down,), (up,) + (attention_up,) * 3, 2),
        (128, 256, 384): (18.4, (down,) + (attention_down,) * 2, (attention_up,) * 2 + (up,), 2),
        (64, 64): (30.0, (attention_down, down), (up, attention_up), 2),
        (64, 256, 256): (34.7, (down, attention_down, down), (up, attention_up, up), 3),
    }
    for widths, (peak, downs, ups, layers) in measured.items():
        config = UNetConfig(
            block_out_channels=widths, down_block_types=downs, up_block_types=ups, layers_per_block=layers
        )
        estimated = memory.unet_bytes(config, 64, 64, 4) / (4 * 64 * 64 * widths[0])
        assert 0.95 * peak < estimated < 1.4 * peak, widths


def test_free_memory_is_asked_of_the_system_and_of_the_container(tmp_path):
    assert 2**20 < memory.available_bytes(CPU) <= memory._ENDLESS
    assert memory.available_bytes(torch.device("meta")) == memory._ENDLESS
    group = tmp_path / "cgroup" / "a" / "b"
    group.mkdir(parents=True)
    for folder, most in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 400\ninactive_file 100\n")
    (tmp_path / "listing").write_text("4:memory:/old\n0::/a/b\n")
    assert min(memory._left_to_containers(tmp_path / "cgroup", tmp_path / "listing")) == 400
    assert min(memory._left_to_containers(tmp_path / "nothing", tmp_path / "listing")) == memory._ENDLESS


def test_the_limit_of_a_process_counts():
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("what is used is read from /proc")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        assert 2**27 < memory.available_bytes(CPU) <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "device", ["cuda:7", "mps", "meta", "abacus", "cuda", 3.5, torch.float16, torch.device("meta"), 10**30]
)
def test_a_device_that_cannot_be_used_is_named_and_nothing_moves(device, tmp_path):
    if str(device).startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    pipeline = tiny.pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"device is .*, which cannot be used") as caught:
        pipeline.to(device, torch.bfloat16)
    assert "\n" not in str(caught.value)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="which cannot be used"):
        Pipeline.from_pretrained("scenes-64", device=device)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn, 16])
def test_a_dtype_that_networks_cannot_have_is_named(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"dtype is .*; it must be one of"):
        tiny.pipeline(tmp_path).to("cpu", dtype)
