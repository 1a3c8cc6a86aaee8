"""Files on their way to another folder: byte for byte, whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.disk import new_folder, read_json
from ldm.text import load_text_encoder, load_text_encoder_folders
from ldm.weights import find_weights


def bytes_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_weights_and_vocabulary_are_copied_byte_for_byte(kind: str, save_encoder: Any, tmp_path: Path) -> None:
    source = save_encoder(kind)
    load_text_encoder(str(source)).save(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert bytes_of(saved / "text_encoder", "*.safetensors") == bytes_of(source, "*.safetensors")
    assert bytes_of(saved / "tokenizer", "tokenizer.json") == bytes_of(source, "tokenizer.json")
    assert sorted(path.name for path in saved.iterdir()) == ["text_encoder", "tokenizer"]
    assert {path.name for path in (saved / "text_encoder").iterdir()} == {"config.json", "model.safetensors"}
    # Only what was promised differs from the source.
    kept = read_json(saved / "text_encoder/config.json")
    assert kept.pop("use_attention_mask", None) == (None if kind == "clip" else True)
    assert kept == read_json(source / "config.json")


def test_shards_and_their_index_are_copied(save_encoder: Any, captions: list[str], tmp_path: Path) -> None:
    source = save_encoder("bert", max_shard_size="30KB")
    assert len(bytes_of(source, "*.safetensors")) > 1
    encoder = load_text_encoder(str(source))
    encoder.save(tmp_path / "saved")
    assert bytes_of(tmp_path / "saved/text_encoder", "model*") == bytes_of(source, "model*")
    again = load_text_encoder_folders(tmp_path / "saved/text_encoder", tmp_path / "saved/tokenizer")
    torch.testing.assert_close(again(captions), encoder(captions), rtol=0, atol=0)


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "30KB"}])
def test_files_of_a_variant_are_found_and_saved_under_the_plain_name(
    how: dict[str, Any], save_encoder: Any, captions: list[str], tmp_path: Path
) -> None:
    plain = load_text_encoder(str(save_encoder("clip")))(captions)
    source = save_encoder("clip", variant="fp16", **how)
    (source / "model.safetensors").unlink()
    encoder = load_text_encoder(str(source))
    torch.testing.assert_close(encoder(captions), plain, rtol=0, atol=0)
    encoder.save(tmp_path / "saved")
    again = load_text_encoder_folders(tmp_path / "saved/text_encoder", tmp_path / "saved/tokenizer")
    torch.testing.assert_close(again(captions), plain, rtol=0, atol=0)
    saved = bytes_of(tmp_path / "saved/text_encoder", "*.safetensors")
    assert sorted(saved.values()) == sorted(bytes_of(source, "*.safetensors").values())
    assert not list((tmp_path / "saved/text_encoder").glob("*fp16*"))


def test_full_precision_comes_before_half(save_encoder: Any) -> None:
    source = save_encoder("clip", variant="fp16")
    save_encoder("clip")
    weights = find_weights(source, "model")
    assert [path.name for path in weights.shards] == ["model.safetensors"]


@pytest.mark.parametrize(("kind", "other"), [("clip-full", "vision_model."), ("t5-full", "decoder.")])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "30KB"}])
def test_only_the_text_half_of_a_model_is_saved(
    kind: str, other: str, how: dict[str, Any], save_encoder: Any, tmp_path: Path
) -> None:
    source = save_encoder(kind, **how)
    load_text_encoder(str(source)).save(tmp_path / "saved")
    everything = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    saved = load_file(tmp_path / "saved/text_encoder/model.safetensors")
    assert any(name.startswith(other) for name in everything)
    assert not any(name.startswith(other) for name in saved)
    assert len(saved) > 10
    if kind == "clip-full":
        assert read_json(tmp_path / "saved/text_encoder/config.json")["model_type"] == "clip_text_model"
    # What is written anew does not tell where the source lay.
    assert str(source) not in (tmp_path / "saved/text_encoder/config.json").read_text()
    assert all(torch.equal(tensor, everything[name]) for name, tensor in saved.items())


def test_a_file_in_the_shape_of_stable_diffusion_1_loads(
    save_encoder: Any, captions: list[str], tmp_path: Path
) -> None:
    folder = save_encoder("clip")
    expected = load_text_encoder(str(folder))(captions)
    # Old files name every tensor below text_model and hold the numbers of the positions as well.
    new = load_file(folder / "model.safetensors")
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in new.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    # And its tokenizer has no tokenizer.json.
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    words = read_json(folder / "tokenizer.json")["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(words["vocab"]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    names = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(ends))

    encoder = load_text_encoder_folders(folder, tokenizer)
    torch.testing.assert_close(encoder(captions), expected, rtol=0, atol=0)
    encoder.save(tmp_path / "saved")
    saved = tmp_path / "saved/text_encoder/model.safetensors"
    assert saved.read_bytes() == (folder / "model.safetensors").read_bytes()
    for pattern in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        assert bytes_of(tmp_path / "saved/tokenizer", pattern) == bytes_of(tokenizer, pattern) != {}
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor merges\.txt and vocab\.json"):
        load_text_encoder_folders(folder, tokenizer)


def test_a_tokenizer_of_nothing_but_words_is_saved_with_its_class(
    save_encoder: Any, captions: list[str], tmp_path: Path
) -> None:
    folder = save_encoder("bert")
    expected = load_text_encoder(str(folder), 12)(captions)
    words = read_json(folder / "tokenizer.json")["model"]["vocab"]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    encoder = load_text_encoder(str(folder), 12)
    torch.testing.assert_close(encoder(captions), expected, rtol=0, atol=0)
    encoder.save(tmp_path / "saved")
    config = read_json(tmp_path / "saved/tokenizer/tokenizer_config.json")
    assert config == {"tokenizer_class": "BertTokenizerFast", "model_max_length": 12}


def test_pickled_weights_are_refused_and_never_read(save_encoder: Any) -> None:
    folder = save_encoder("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_text_encoder(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*convert .*model.safetens"):
        load_text_encoder(str(folder))


def test_damaged_and_missing_files_are_named(save_encoder: Any) -> None:
    folder = save_encoder("bert", max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or cut off"):
        load_text_encoder(str(folder))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        load_text_encoder(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="which is not a safetensors file beside it"):
        load_text_encoder(str(folder))
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="has no weight_map"):
        load_text_encoder(str(folder))
    for text, match in [("{", "cannot be read as JSON"), ("[]", "not a JSON object")]:
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            load_text_encoder(str(folder))


def test_saving_never_replaces_and_leaves_nothing_half_written(
    save_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_encoder("bert")
    encoder = load_text_encoder(str(source))
    encoder.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="text_encoder exists already: choose another folder"):
        encoder.save(tmp_path / "saved")

    def full(source: Path, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.weights.shutil.copyfile", full)
        with pytest.raises(OSError, match="disk full"):
            encoder.save(tmp_path / "later")
    assert list((tmp_path / "later").iterdir()) == []
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was read"):
        encoder.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_a_new_folder_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "new") as folder:
            (folder / "a").write_text("a")
            assert not (tmp_path / "new").exists()
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
        assert (tmp_path / "new/a").read_text() == "a"
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
