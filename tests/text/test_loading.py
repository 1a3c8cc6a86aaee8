"""From a name to an encoder: families, lengths, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.text import load_text_encoder, load_text_encoder_folders, loading, reference_to
from ldm.text.files import read_json


def test_minilm_tells_captions_apart_and_needs_its_mask(tmp_path: Path) -> None:
    encoder = load_text_encoder("minilm")
    captions = ["a corgi wearing a hat", "a handwritten three"]
    states = encoder(captions)
    # Padded as in Stable Diffusion unless told otherwise.
    assert states.shape == (2, 77, 384)
    assert encoder.uses_attention_mask
    assert (states[0] - states[1]).abs().mean() > 0.1
    assert "sentence_transformers" not in sys.modules
    assert encoder.overflow(["a " * 80, "a cat"]) == [5, 0]

    encoder.save(tmp_path)
    config = read_json(tmp_path / "text_encoder/config.json")
    assert config.pop("use_attention_mask") is True
    (tmp_path / "text_encoder/config.json").write_text(json.dumps(config))
    unmasked = load_text_encoder_folders(tmp_path / "text_encoder", tmp_path / "tokenizer")
    similarity = torch.cosine_similarity(unmasked(captions[:1])[0, :7], states[0, :7], dim=-1)
    assert similarity.mean() < 0.8


def test_a_reference_stands_for_the_files_of_an_encoder_that_a_package_holds(
    save_encoder: Any, captions: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    packaged = Path(save_encoder("bert", length=None))
    monkeypatch.setitem(loading._PACKAGED, "minilm", lambda: packaged)
    encoder = load_text_encoder("minilm", 8)
    encoder.save(tmp_path / "files")
    copied = load_text_encoder_folders(tmp_path / "files/text_encoder", tmp_path / "files/tokenizer")
    content = reference_to(copied)
    assert content == {"name": "minilm", "max_length": 8, "fingerprint": encoder.fingerprint()}

    reference = tmp_path / "named" / "reference.json"
    reference.parent.mkdir()
    reference.write_text(json.dumps(content))
    named = load_text_encoder_folders(reference.parent, tmp_path / "no tokenizer")
    assert torch.equal(named(captions), copied(captions))

    (tmp_path / "named" / "text_encoder").mkdir()
    (tmp_path / "named" / "text_encoder" / "reference.json").write_text(json.dumps(content))
    (tmp_path / "named" / "model_index.json").write_text("{}")
    assert load_text_encoder(str(tmp_path / "named")).max_length == 8  # of a whole pipeline
    assert load_text_encoder(str(tmp_path / "named"), 6).max_length == 6
    with pytest.raises(ValueError, match=r"is in torch\.bfloat16"):
        reference_to(load_text_encoder("minilm", 8).to(dtype=torch.bfloat16))

    for change, message in (
        ({"name": "../elsewhere"}, "names the text encoder '../elsewhere'"),
        ({"name": ["minilm"]}, "names the text encoder"),
        ({"max_length": "8"}, "max_length '8'"),
        ({"max_length": 10_000}, "cannot pad captions to 10000 tokens"),
        ({"fingerprint": "0" * 32}, "is not the one that the model was trained with"),
        ({"max_length": 9}, "is not the one that the model was trained with"),
    ):
        reference.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load_text_encoder_folders(reference.parent, tmp_path)
    other = load_text_encoder(str(save_encoder("t5", length=8)))
    with pytest.raises(ValueError, match="none that a package holds"):
        reference_to(other)


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "xlm-roberta", "mpnet"])
def test_other_families_of_bert_load_to_their_last_position(kind: str, save_encoder: Any, captions: list[str]) -> None:
    folder = str(save_encoder(kind, length=None))
    # 20 positions; those of the last three kinds are counted from behind the padding index, 1.
    longest = 20 if kind == "distilbert" else 18
    encoder = load_text_encoder(folder)
    assert (encoder.max_length, encoder.uses_attention_mask) == (longest, True)
    assert encoder(["cat " * 30]).shape == (1, longest, 32)  # no position beyond the table is asked for
    with pytest.raises(ValueError, match=f"cannot pad captions to {longest + 1} tokens.*from 3 to {longest}"):
        load_text_encoder(folder, longest + 1)


def test_a_clip_without_a_stated_length_has_that_of_its_positions(save_encoder: Any) -> None:
    folder = save_encoder("clip", length=None)
    assert load_text_encoder_folders(folder, folder).max_length == 12


def test_a_t5_has_no_longest_but_needs_a_length(save_encoder: Any) -> None:
    folder = str(save_encoder("t5", length=None))
    with pytest.raises(ValueError, match="states no model_max_length: give max_length"):
        load_text_encoder(folder)
    assert load_text_encoder(folder, 99)(["a cat"]).shape == (1, 99, 32)


@pytest.mark.parametrize("length", [-1, 0, 2])
def test_a_length_without_room_for_a_word_is_refused(length: int, save_encoder: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot pad captions to {length} tokens.*from 3 to 20"):
        load_text_encoder(str(save_encoder("bert")), length)


def test_a_foreign_tokenizer_longer_than_its_model_is_refused(save_encoder: Any) -> None:
    folder = save_encoder("clip", length=13)
    with pytest.raises(ValueError, match="to 13 tokens"):
        load_text_encoder_folders(folder, folder)


def test_the_length_given_is_stored_with_the_tokenizer(save_encoder: Any, tmp_path: Path) -> None:
    encoder = load_text_encoder(str(save_encoder("bert")), 9)
    assert encoder.tokenizer.model_max_length == encoder.max_length == 9
    encoder.save(tmp_path / "saved")
    assert read_json(tmp_path / "saved/tokenizer/tokenizer_config.json")["model_max_length"] == 9


@pytest.mark.parametrize("name", ["minilmm", "nobody/nothing", "", ".", "some/dir/deep", "C:\\models"])
def test_an_unknown_name_lists_the_choices(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"minilm.*open_clip:MODEL:WEIGHTS.*folder or hub id|config.json is m"):
        load_text_encoder(name)


def test_a_hub_id_is_loaded_from_the_cache_and_saved_as_plain_files(
    save_encoder: Any, captions: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    source = save_encoder("bert")
    cache = tmp_path / "hub/models--somebody--tiny"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, cache / f"blobs/{number}")
        (cache / f"snapshots/abc/{path.name}").symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    encoder = load_text_encoder("somebody/tiny")
    torch.testing.assert_close(encoder(captions), load_text_encoder(str(source))(captions), rtol=0, atol=0)
    encoder.save(tmp_path / "saved")
    saved = tmp_path / "saved/text_encoder/model.safetensors"
    assert not saved.is_symlink()
    assert saved.read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_layer_is_a_choice_for_open_clip_only(save_encoder: Any) -> None:
    with pytest.raises(ValueError, match="layer='penultimate' is a choice for open_clip only"):
        load_text_encoder(str(save_encoder("clip")), layer="penultimate")


def test_a_model_of_another_kind_is_refused_by_name(save_encoder: Any) -> None:
    folder = save_encoder("bert", config={"model_type": "siglip"})
    with pytest.raises(ValueError, match=r"model_type 'siglip'.*choose one of clip, .*t5, .*bert"):
        load_text_encoder(str(folder))


def test_a_missing_folder_or_config_is_named(save_encoder: Any, tmp_path: Path) -> None:
    folder = save_encoder("bert")
    with pytest.raises(ValueError, match=r"none/config.json is missing: the folder is incomplete"):
        load_text_encoder_folders(tmp_path / "none", folder)
    with pytest.raises(ValueError, match=r"none is missing: the folder is incomplete"):
        load_text_encoder_folders(folder, tmp_path / "none")


def test_a_tokenizer_without_its_vocabulary_is_one_line(save_encoder: Any, tmp_path: Path) -> None:
    folder = save_encoder("bert")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(folder / "tokenizer_config.json", tokenizer)
    with pytest.raises(ValueError, match="holds no vocabulary") as missing:
        load_text_encoder_folders(folder, tokenizer)
    (tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="does not load as a tokenizer") as damaged:
        load_text_encoder_folders(folder, tokenizer)
    assert "\n" not in f"{missing.value}{damaged.value}"


def test_weights_that_do_not_suit_the_config_are_one_line(save_encoder: Any) -> None:
    with pytest.raises(ValueError, match="lacks 16 weights of a BertModel") as fewer:
        load_text_encoder(str(save_encoder("bert", config={"num_hidden_layers": 3})))
    with pytest.raises(ValueError, match=r"has shape .* in the weights but .* by config") as narrower:
        load_text_encoder(str(save_encoder("bert", config={"intermediate_size": 48})))
    assert "\n" not in f"{fewer.value}{narrower.value}"


def test_code_that_comes_with_a_model_is_never_run(save_encoder: Any) -> None:
    folder = save_encoder("bert", config={"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    load_text_encoder(str(folder))
    path = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(read_json(path) | code))
    load_text_encoder(str(folder))
