"""Folders on disk: atomic, strict, and each fault named in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import Pipeline, hub
from ldm.text import load_text_encoder, load_text_encoder_folders
from tests import tiny


@pytest.fixture
def saved(tmp_path):
    tiny.pipeline(tmp_path / "parts", "latent").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fault(folder):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the tests look at the message)
        Pipeline.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(saved, part):
    shutil.rmtree(saved / part)
    assert part in fault(saved)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("how", ["gone", "empty", "half"])
def test_a_missing_or_half_written_file_is_named(saved, name, how):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[: 0 if how == "empty" else len(content) // 2])
    assert name.rpartition("/")[2].split(".")[0] in fault(saved)


def test_a_folder_that_is_none_is_named(tmp_path):
    assert "there is no model folder" in fault(tmp_path / "nothing" / "here")
    assert "holds no model_index.json" in fault(tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert "did you mean" in fault(tmp_path)
    assert "the hub did not give a model of that id" in fault("nobody/nothing")


def test_other_kinds_of_pipeline_are_refused_by_name(saved):
    tiny.edit_json(saved / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "StableDiffusionXLPipeline" in fault(saved)
    tiny.edit_json(
        saved / "model_index.json",
        _class_name="StableDiffusionPipeline",
        text_encoder_2=["transformers", "CLIPTextModel"],
    )
    assert "text_encoder_2" in fault(saved)


def test_weights_of_the_wrong_shape_are_named(saved):
    tiny.edit_json(saved / "unet" / "config.json", block_out_channels=[8, 32])
    message = fault(saved)
    assert "shape" in message
    assert "unet" in message


def test_text_encoder_weights_of_the_wrong_shape_are_named(saved):
    tiny.edit_json(saved / "text_encoder" / "config.json", intermediate_size=48)
    message = fault(saved)
    assert "has shape" in message
    assert "mlp.fc1" in message


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"beta_start": 3}, "scheduler_config.json"),
        ("vae/config.json", {"scaling_factor": 0}, "vae/config.json"),
        ("unet/config.json", {"block_out_channels": "wide"}, "unet/config.json"),
    ],
)
def test_wrong_values_are_named_with_their_file(name, changes, part, saved):
    tiny.edit_json(saved / name, **changes)
    assert part in fault(saved)


WEIGHTS_OF = {
    "unet/diffusion_pytorch_model": "mid_block.resnets.0.conv1.weight",
    "vae/diffusion_pytorch_model": "decoder.conv_in.bias",
    "text_encoder/model": "mlp.fc1.weight",
}


def spoil(path, ending, change):
    """Rewrites the one tensor of a file whose name ends so."""
    weights = load_file(path)
    (name,) = (key for key in weights if key.endswith(ending))
    weights[name] = change(weights[name])
    save_file(weights, path, {"format": "pt"})
    return name


def last_is(number):
    def change(tensor):
        tensor.view(-1)[-1] = number
        return tensor

    return change


@pytest.mark.parametrize("part", WEIGHTS_OF)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: torch.full_like(t, torch.nan), "holds numbers that are not finite"),
        (last_is(torch.nan), "holds numbers that are not finite"),
        (last_is(-torch.inf), "holds numbers that are not finite"),
        (lambda t: t.to(torch.int8), "is stored as int8, but weights are float32, float16, bfloat16, float64"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn, but"),
        (lambda t: t.to(torch.complex64), "is stored as complex64, but"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_file_and_name(saved, part, change, said):
    path = saved / f"{part}.safetensors"
    name = spoil(path, WEIGHTS_OF[part], change)
    assert f"{path}: {name} {said}" in fault(saved)


def test_the_shard_with_the_broken_tensor_is_named(tmp_path):
    pipeline = tiny.pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model", shard_bytes=20_000)
    shards = sorted((tmp_path / "model" / "unet").glob("*.safetensors"))
    name = min(load_file(shards[1]))
    spoil(shards[1], name, last_is(torch.inf))
    assert len(shards) > 2
    assert fault(tmp_path / "model").startswith(f"{shards[1]}: {name} holds numbers that are not finite")


def test_weights_that_the_dtype_cannot_hold_are_refused(saved):
    name = spoil(saved / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight", last_is(-70_000.0))
    with pytest.raises(ValueError, match=rf"unet: {name} holds 7e\+04, which is too large for float16; take bfloat16"):
        Pipeline.from_pretrained(saved, dtype=torch.float16)
    assert Pipeline.from_pretrained(saved, dtype=torch.bfloat16).unet.conv_in.weight.dtype == torch.bfloat16


def test_counters_and_other_towers_of_a_text_encoder_are_no_weights(saved):
    path = saved / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    more = {
        "text_model.embeddings.position_ids": torch.arange(12).view(1, -1),
        "vision_model.embeddings.class_embedding": torch.full((3,), torch.nan),
    }
    save_file(weights | more, path, {"format": "pt"})
    tiny.edit_json(saved / "text_encoder" / "config.json", model_type="clip")
    Pipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("vae", {"shift_factor": float("nan")}),
        ("vae", {"scaling_factor": float("inf")}),
        ("vae", {"_class_name": "VQModel", "latents_mean": [0, 0, float("nan"), 0], "latents_std": [1, 1, 1, 1]}),
        ("vae", {"_class_name": "VQModel", "latents_mean": [0, 0, 0, 0], "latents_std": [1, float("inf"), 1, 1]}),
        ("unet", {"norm_eps": float("nan")}),
        ("codec", {"mean": [0, float("nan"), 0]}),
        ("codec", {"std": [1, 1, float("inf")]}),
        ("codec", {"std": [1, 1e-60, 1]}),
        ("codec", {"mean": [0, 10**400, 0]}),
        ("codec", {"mean": ["a", 0, 0]}),
    ],
)
def test_statistics_that_are_not_finite_are_refused_by_file(config, changes, saved, tmp_path):
    if config == "codec":
        tiny.pipeline(tmp_path / "more").save_pretrained(tmp_path / "pixels")
        saved = tmp_path / "pixels"
    tiny.edit_json(saved / config / "config.json", **changes)
    assert fault(saved).startswith(f"{saved / config / 'config.json'}: ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16", None])
def test_a_dtype_that_networks_cannot_have_is_refused(saved, dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; it must be one of torch's float32, float16, bfloat16, float64"):
        Pipeline.from_pretrained(saved, dtype=dtype)


def test_an_index_without_its_map_is_named(saved):
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("elsewhere"))
    index = weights.with_name(f"{weights.name}.index.json")
    for content in ("{}", '{"weight_map": {"a": "../../secret.safetensors"}}'):
        index.write_text(content)
        assert "weight_map" in fault(saved)


def test_weights_of_another_network_are_named(saved):
    tiny.edit_json(saved / "unet" / "config.json", layers_per_block=2)
    assert "missing (first:" in fault(saved)


def test_an_unsupported_key_is_refused_with_its_file(saved):
    tiny.edit_json(saved / "unet" / "config.json", class_embed_type="timestep")
    message = fault(saved)
    assert "unet/config.json" in message
    assert "class_embed_type" in message


def test_pickled_weights_are_never_opened(saved):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").rename(saved / "unet" / "diffusion_pytorch_model.bin")
    assert "pickled weights" in fault(saved)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with hub.atomic_folder(target) as folder:
        (folder / "model_index.json").write_text("old")
        assert not target.exists()

    def fail_half_way():
        with hub.atomic_folder(target) as folder:
            (folder / "model_index.json").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert (target / "model_index.json").read_text() == "old"
    with hub.atomic_folder(target) as folder:
        (folder / "model_index.json").write_text("new")
    assert (target / "model_index.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def written(folder):
    """Every file of a folder → its content, links by where they lead."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


FOREIGN = {
    "README.md": b"# my model",
    ".git/HEAD": b"ref: refs/heads/main",
    ".git/objects/ab/cdef": b"\x00",
    ".gitattributes": b"*.safetensors filter=lfs",
    ".DS_Store": b"\x00",
    "photos/2024/holiday.jpg": b"precious",
    "unet/notes.txt": b"step 400 is the best",
    "unet/diffusion_pytorch_model.bin": b"pickled",
    "unet/diffusion_pytorch_model.before.safetensors": b"a copy of mine",
    "unet/deeper/.DS_Store": b"\x00",
    "text_encoder/model.onnx": b"exported",
    "tokenizer/README": b"words",
    "safety_checker/config.json": b"{}",
    "v1-5-pruned.safetensors": b"another format",
    "config.json": b'{"name": "my-web-project"}',
    "best.json": b"{}",
}
STALE = [
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model.safetensors.index.bf16.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model-00001-of-00002.fp16.safetensors",
    "text_encoder/model.bf16-00001-of-00002.safetensors",
    "text_encoder/reference.json",
    "tokenizer/vocab.txt",
    "tokenizer/added_tokens.json",
    "tokenizer/spiece.model",
]


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_only_files_that_the_format_names_make_way(tmp_path):
    pipeline = tiny.pipeline(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "fresh")
    pipeline.save_pretrained(tmp_path / "model")
    tiny.edit_json(tmp_path / "model" / "model_index.json", unet=["old", "old"])
    put(tmp_path / "model", FOREIGN | dict.fromkeys(STALE, b"stale"))
    (tmp_path / "model" / "empty").mkdir()
    (tmp_path / "model" / "dataset").symlink_to(tmp_path / "parts")
    (tmp_path / "model" / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "model" / "queue")
    before = (tmp_path / "model" / "README.md").stat()
    pipeline.save_pretrained(tmp_path / "model")
    links = {"dataset": str(tmp_path / "parts"), "gone": "nowhere"}
    assert written(tmp_path / "model") == written(tmp_path / "fresh") | FOREIGN | links
    assert (tmp_path / "model" / "empty").is_dir()
    assert (tmp_path / "model" / "queue").is_fifo()
    after = (tmp_path / "model" / "README.md").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "model", "parts"]
    Pipeline.from_pretrained(tmp_path / "model", device="cpu").save_pretrained(tmp_path / "model")  # over itself
    assert written(tmp_path / "model") == written(tmp_path / "fresh") | FOREIGN | links


@pytest.mark.parametrize(
    "files",
    [
        {"holiday.jpg": b"precious"},
        {"config.json": b'{"name": "my-web-project"}', "src/index.js": b""},
        {"unet/config.json": b"{}"},  # half of someone's model
        {".bashrc": b""},
        {"manifest.json": b"{}", "pipeline/model_index.json": b"{}"},
        {"best.json": b"{}", "pytorch_lora_weights.safetensors": b""},
    ],
)
def test_a_folder_of_other_things_is_refused_and_left(files, tmp_path):
    put(tmp_path / "folder", files)
    for kind in ("pipeline", "autoencoder"):
        with (
            pytest.raises(ValueError, match="holds files that are no model"),
            hub.atomic_folder(tmp_path / "folder", kind),
        ):
            pass
    assert written(tmp_path / "folder") == files
    assert os.listdir(tmp_path) == ["folder"]


def test_the_clone_of_an_empty_repository_is_filled(tmp_path):
    clone = {".git/HEAD": b"ref", ".gitattributes": b"lfs", "README.md": b"---"}
    put(tmp_path / "clone", clone)
    with hub.atomic_folder(tmp_path / "clone") as folder:
        (folder / "model_index.json").write_text("{}")
    assert written(tmp_path / "clone") == clone | {"model_index.json": b"{}"}


def test_a_config_of_another_program_is_no_autoencoder(tmp_path):
    for content, ours in ((b'{"_class_name": "AutoencoderKL"}', True), (b'{"name": "web"}', False), (b"[1]", False)):
        put(tmp_path / "f", {"config.json": content})
        try:
            with hub.atomic_folder(tmp_path / "f", "autoencoder") as folder:
                (folder / "config.json").write_bytes(b"new")
        except ValueError:
            assert not ours
        assert (tmp_path / "f" / "config.json").read_bytes() == (b"new" if ours else content)


def test_a_link_is_never_replaced(tmp_path):
    with hub.atomic_folder(tmp_path / "real") as folder:
        (folder / "model_index.json").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link to file").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with hub.atomic_folder(f"{tmp_path}/link/") as folder:
        (folder / "model_index.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model_index.json").read_text() == "new"
    before = written(tmp_path)
    for name in ("link to file", "dangling", "loop", "file", "file/below", ""):
        with (
            pytest.raises(ValueError, match=r"is a file|is a link to|is empty"),
            hub.atomic_folder(tmp_path / name if name else ""),
        ):
            pass
    (tmp_path / "real" / "unet").symlink_to(tmp_path)  # a component elsewhere
    with (
        pytest.raises(ValueError, match="unet is not what a model has"),
        hub.atomic_folder(tmp_path / "real") as folder,
    ):
        (folder / "unet").mkdir()
    assert written(tmp_path) == before | {"real/unet": str(tmp_path)}


def test_what_stands_in_the_way_of_a_file_is_named(tmp_path):
    put(tmp_path / "f", {"model_index.json": b"old", "unet/config.json/mine": b"x", "vae": b"a file"})
    for part in ("unet/config.json", "vae/config.json"):
        with (
            pytest.raises(ValueError, match="nothing was written, move it"),
            hub.atomic_folder(tmp_path / "f") as folder,
        ):
            put(folder, {part: b"{}"})
    assert written(tmp_path / "f") == {"model_index.json": b"old", "unet/config.json/mine": b"x", "vae": b"a file"}


def test_what_was_read_from_a_folder_is_saved_though_another_model_stands_there_now(tmp_path):
    first, second = (tiny.pipeline(tmp_path / name, "latent") for name in ("a", "b"))
    with torch.no_grad():
        second.codec.autoencoder.decoder.conv_out.bias.fill_(3)
    first.save_pretrained(tmp_path / "model")
    read = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    second.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"is not the file that was read: restore it"):
        read.save_pretrained(tmp_path / "again")  # it may have been replaced by another one
    read.text_encoder = first.text_encoder
    read.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(again.codec.autoencoder.decoder.conv_out.bias, first.codec.autoencoder.decoder.conv_out.bias)
    with torch.no_grad():
        again.codec.autoencoder.decoder.conv_out.bias.fill_(5)  # trained since
    again.save_pretrained(tmp_path / "trained")
    trained = Pipeline.from_pretrained(tmp_path / "trained", device="cpu")
    assert trained.codec.autoencoder.decoder.conv_out.bias.unique().item() == 5


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_a_pointer_of_git_lfs_is_named_with_what_to_do(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert len(files) > 9
    for path in files:
        content = path.read_bytes()
        path.write_bytes(POINTER)
        message = fault(saved)
        assert f"{path} is a git-LFS pointer" in message
        assert "`git lfs pull`" in message
        path.write_bytes(content)
    Pipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", ["v1-5.safetensors", "models/v1-5.ckpt", "~/x/y.gguf", "http://hub/a/b.safetensors"])
def test_a_single_file_is_named_as_that(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fault(name)
    assert f"{name} is a single file" in message
    assert "StableDiffusionPipeline.from_single_file" in message
    with pytest.raises(ValueError, match=r"is a single file.*AutoencoderKL\.from_single_file"):
        hub.find_autoencoder(name)
    with pytest.raises(ValueError, match="is a single file"):
        load_text_encoder(name)
    (tmp_path / "v.safetensors").write_bytes(b"")
    assert "is a single file" in fault(tmp_path / "v.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a file; name the folder" in fault("model_index.json")


def test_a_moving_average_of_diffusers_opens_as_a_unet(saved):
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    theirs = UNet2DConditionModel.from_pretrained(saved / "unet")
    EMAModel(theirs.parameters(), model_cls=UNet2DConditionModel, model_config=theirs.config).save_pretrained(
        saved / "unet"
    )
    assert json.loads((saved / "unet" / "config.json").read_text())["decay"] == 0.9999
    tiny.edit_json(saved / "unet" / "config.json", torch_dtype="float16")
    Pipeline.from_pretrained(saved)


def test_a_working_folder_inside_goes_on_to_be_there(tmp_path, monkeypatch):
    put(tmp_path / "f", {"model_index.json": b"old", "notes/a": b"x"})
    for inside in ("notes", "."):
        monkeypatch.chdir(tmp_path / "f" / inside)
        with hub.atomic_folder(tmp_path / "f" if inside == "notes" else ".") as folder:
            (folder / "model_index.json").write_text("new")
        assert os.path.samefile(os.getcwd(), tmp_path / "f" / inside)
    assert written(tmp_path / "f") == {"model_index.json": b"new", "notes/a": b"x"}


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pipeline = tiny.pipeline(tmp_path / "parts")
    pipeline.save_pretrained("~/model")
    pipeline.save_pretrained(Path("~/model"))
    assert (tmp_path / "model" / "model_index.json").is_file()
    Pipeline.from_pretrained("~/model", device="cpu")
    assert hub.find_autoencoder("~/model/unet") == tmp_path / "model" / "unet"
    pipeline.text_encoder.save("~/text")
    assert load_text_encoder_folders("~/text/text_encoder", "~/text/tokenizer").max_length == tiny.LENGTH
    assert sorted(os.listdir(tmp_path)) == ["model", "parts", "text"]
    with pytest.raises(ValueError, match="home folder of a user that does not exist"):
        pipeline.save_pretrained("~nobody-of-this-name/model")


def test_weights_are_kept_bit_for_bit(tmp_path):
    unet = tiny.pipeline(tmp_path / "parts").unet
    hub.save_model(tmp_path / "unet", unet)
    again = hub.load_model(tmp_path / "unet", "UNet2DConditionModel")
    for name, value in unet.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.config == unet.config
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_a_first_stage_is_found_wherever_it_stands(saved, tmp_path):
    assert hub.find_autoencoder(str(saved)) == saved / "vae"
    assert hub.find_autoencoder(str(saved / "vae")) == saved / "vae"
    model = hub.load_model(hub.find_autoencoder("openmoji-first-stage"), "AutoencoderKL")
    assert model.factor == 4
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        hub.find_autoencoder(str(tmp_path / "parts"))  # text encoder and tokenizer only
    for name in ("nobody/nothing", "./nowhere", "nowhere"):
        with pytest.raises(ValueError, match="there is no model folder"):
            hub.find_autoencoder(name)


def test_a_pipeline_with_a_codebook_is_kept_byte_for_byte_and_opens_part_by_part_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel, VQModel

    pipeline = tiny.pipeline(tmp_path / "parts", "codebook")
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again.codec.autoencoder.config == pipeline.codec.autoencoder.config
    images = [model("a", seed=3, height=16, width=16).images[0].tobytes() for model in (pipeline, again)]
    assert images[0] == images[1]
    again.save_pretrained(tmp_path / "copy")
    for name in ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert (index["_class_name"], index["vae"]) == ("CodebookDiffusionPipeline", ["diffusers", "VQModel"])

    theirs = VQModel.from_pretrained(tmp_path / "model" / "vae")
    UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    latents = torch.randn(1, 4, 8, 8)
    z = latents * torch.tensor(again.codec.std).view(1, 4, 1, 1) + torch.tensor(again.codec.mean).view(1, 4, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(again.codec.decode(latents), theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
        # Stable Diffusion cannot decode with it, and says so instead of drawing something else.
        with pytest.raises((TypeError, ValueError, AttributeError)):
            StableDiffusionPipeline.from_pretrained(tmp_path / "model")("a", num_inference_steps=1, output_type="np")


def test_a_first_stage_of_another_class_is_named(saved):
    tiny.edit_json(saved / "vae" / "config.json", _class_name="AutoencoderTiny")
    assert "describes an AutoencoderTiny; a first stage is an AutoencoderKL or a VQModel" in fault(saved)
    tiny.edit_json(saved / "vae" / "config.json", _class_name="VQModel")
    assert "vae/config.json" in fault(saved)


def test_a_pipe_among_the_files_is_named_and_not_waited_for(saved):
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        os.mkfifo(saved / name)
        message = fault(saved)
        assert name in message
        assert "Not a regular file" in message
        (saved / name).unlink()
        (saved / name).write_bytes(content)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "text_encoder/config.json"])
def test_json_that_is_too_deep_or_too_long_a_number_is_named(saved, name, text):
    (saved / name).write_text(text)
    assert str(saved / name) in fault(saved)


def test_configs_that_ask_for_more_than_the_weights_hold_cost_neither_time_nor_memory(saved):
    cases = [
        ("unet", "layers_per_block", 10**6, "at most 100"),
        ("unet", "transformer_layers_per_block", 10**6, "at most 100"),
        ("unet", "in_channels", 10**18, "at most 2147483647"),
        ("unet", "block_out_channels", [2**30, 2**31 - 4], "no such network can be built"),
        ("vae", "layers_per_block", 10**6, "at most 100"),
        ("text_encoder", "num_hidden_layers", 10**6, "has 1000000 layers"),
        ("text_encoder", "vocab_size", 10**11, "the weights hold"),
        ("text_encoder", "intermediate_size", 10**9, "the weights hold"),
    ]
    for part, key, value, message in cases:
        path = saved / part / "config.json"
        content = path.read_text()
        path.write_text(json.dumps(json.loads(content) | {key: value}))
        assert message in fault(saved)
        path.write_text(content)


def test_an_autoencoder_that_is_not_finite_is_not_saved(saved, tmp_path):
    pipeline = Pipeline.from_pretrained(saved)
    with torch.no_grad():
        pipeline.codec.autoencoder.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the autoencoder: .*decoder.conv_out.bias holds numbers that are not finite"):
        pipeline.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tokens_that_the_text_encoder_does_not_have_are_named(saved):
    tiny.edit_json(saved / "tokenizer" / "tokenizer_config.json", eos_token="<|another|>")
    pipeline = Pipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match="the tokenizer gives the token 514, but the text encoder has 514"):
        pipeline("a cat", num_inference_steps=1)
