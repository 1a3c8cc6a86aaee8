"""From a name to an encoder: families, lengths, and what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ldm.disk import read_json
from ldm.text import load_text_encoder, load_text_encoder_folders, loading, reference_to


def test_minilm_tells_captions_apart_and_needs_its_mask(tmp_path: Path) -> None:
    encoder = load_text_encoder("minilm")
    captions = ["a corgi wearing a hat", "a handwritten three"]
    states = encoder(captions)
    # Padded as in Stable Diffusion unless told otherwise.
    assert states.shape == (2, 77, 384)
    assert encoder.uses_attention_mask
    assert (states[0] - states[1]).abs().mean() > 0.1
    assert "sentence_transformers" not in sys.modules
    assert encoder.truncated_tokens(["a " * 80, "a cat"]) == [5, 0]

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
    with pytest.raises(ValueError, match=r"none/config.json is missing.*the folder is incomplete"):
        load_text_encoder_folders(tmp_path / "none", folder)
    with pytest.raises(ValueError, match=r"none is missing.*the folder is incomplete"):
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


def plant_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real adapter of peft in a text encoder's folder, which changes its states and names a module to import.

    Returns the file that this module writes when it is imported.
    """
    import peft

    target = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(transformers.CLIPTextModel.from_pretrained(folder), target).save_pretrained(folder)
    path, mark = folder / "adapter_config.json", folder / "imported"
    names = {"base_model_class": "Model", "parent_library": "planted_module"}
    path.write_text(json.dumps(read_json(path) | {"auto_mapping": names}))
    (folder / "planted_module.py").write_text(f"open({str(mark)!r}, 'w').close()")
    monkeypatch.syspath_prepend(folder)
    return mark


def test_an_adapter_beside_the_weights_is_refused_and_never_applied(
    save_encoder: Any, captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_encoder("clip")
    states = load_text_encoder(str(folder))(captions)
    mark = plant_adapter(folder, monkeypatch)
    with pytest.raises(ValueError, match=r"adapter_config\.json is an adapter"):
        load_text_encoder(str(folder))
    # The second line of defense: the library does not see the folder.
    monkeypatch.setattr(loading, "refuse_untrusted", lambda _: None)
    torch.testing.assert_close(load_text_encoder(str(folder))(captions), states, rtol=0, atol=0)
    assert not mark.exists()
    monkeypatch.undo()
    adapted = transformers.CLIPTextModel.from_pretrained(folder).eval()  # as it is without care: the plant works
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(captions, padding="max_length", truncation=True)
    assert not torch.allclose(adapted(torch.tensor(tokens["input_ids"]))[0], states, atol=1e-3)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is an adapter"):
        load_text_encoder(str(folder))


def test_an_adapter_in_the_folder_of_a_tokenizer_is_refused(save_encoder: Any, tmp_path: Path) -> None:
    folder = save_encoder("clip")
    shutil.copytree(folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer/adapter_config\.json is an adapter"):
        load_text_encoder_folders(folder, tmp_path / "tokenizer")


CODE = {"AutoModel": "planted_module.Model", "AutoConfig": "planted_module.Config", "AutoTokenizer": ["a.B", None]}


ASKING = [
    ("auto_map", CODE),
    ("custom_pipeline", "someone/pipeline"),
    ("trust_remote_code", True),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ("quantization_config", {}),
    ("attn_implementation", "someone/kernel"),
    ("_attn_implementation", "someone/kernel:function"),
    ("_attn_implementation_internal", {"text_config": "someone/kernel"}),
    ("_experts_implementation", "someone/kernel"),
    ("use_kernels", True),
    ("transformers_weights", "other.safetensors"),
    ("configuration_files", ["config.4.0.0.json"]),
    ("fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
    ("gguf_file", "other.gguf"),
    ("fusion_config", {"patch_embeddings": True}),
    ("per_layer_config", {"0": {"num_attention_heads": 2}}),
    ("init_inputs", ["/etc/passwd"]),
]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_keys_that_ask_for_code_or_for_another_network_are_refused(name: str, save_encoder: Any) -> None:
    folder = save_encoder("bert")
    path = folder / name
    content = read_json(path) if path.is_file() else {}
    for key, value in ASKING:
        for nested in ({key: value}, {"text_config": {key: value}}, {"parts": [{"inner": {key: value}}]}):
            path.write_text(json.dumps(content | nested))
            with pytest.raises(ValueError, match=rf"{name} has .*{key}"):
                load_text_encoder(str(folder))


def test_keys_that_ask_for_nothing_are_no_reason_to_refuse(save_encoder: Any, captions: list[str]) -> None:
    states = load_text_encoder(str(save_encoder("clip")))(captions)
    empty = {"auto_map": None, "quantization_config": None, "trust_remote_code": False, "gguf_file": None}
    # Known, and left to transformers all the same: here nothing else is installed.
    own = {"_attn_implementation": "flash_attention_2", "_experts_implementation": "eager"}
    folder = save_encoder("clip", config=empty | own | {"dtype": "no_such_dtype"})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | empty | {"init_inputs": []}))
    torch.testing.assert_close(load_text_encoder(str(folder))(captions), states, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_weights": "other.safetensors"},
        {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"attribute_map": {"num_hidden_layers": "vocab_size"}, "sub_configs": {"a": "b"}, "_tp_plan": {"a": "b"}},
        {"fusion_config": {"patch_embeddings": True}, "auto_map": CODE, "name_or_path": "someone/model"},
        {"num_hidden_layers_": 7, "forward": "text", "validate": None},
    ],
)
def test_keys_that_transformers_does_not_declare_never_reach_it(
    changes: dict[str, Any], save_encoder: Any, captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = load_text_encoder(str(save_encoder("clip")))(captions)
    monkeypatch.setattr(loading, "refuse_untrusted", lambda _: None)
    encoder = load_text_encoder(str(save_encoder("clip", config=changes)))
    torch.testing.assert_close(encoder(captions), states, rtol=0, atol=0)


def test_other_files_of_weights_are_never_read(save_encoder: Any, captions: list[str]) -> None:
    folder = save_encoder("clip")
    states = load_text_encoder(str(folder))(captions)
    # transformers prefers the first to model.safetensors; the others are what it takes elsewhere.
    for name in ("shard-00001-model-00001-of-00001.safetensors", "pytorch_model.bin", "model.gguf", ".metadata"):
        (folder / name).write_bytes(b"no weights")
    os.mkfifo(folder / "some_config.json")  # nobody writes into it: who opens it waits forever
    torch.testing.assert_close(load_text_encoder(str(folder))(captions), states, rtol=0, atol=0)


def test_only_tokenizers_that_are_tables_are_taken(save_encoder: Any) -> None:
    folder = save_encoder("bert")
    path = folder / "tokenizer_config.json"
    stated = read_json(path)
    for name in ("Evil", "BertJapaneseTokenizer", "pipeline", "planted_module.Tokenizer", "../Tokenizer", ["a"]):
        path.write_text(json.dumps(stated | {"tokenizer_class": name}))
        with pytest.raises(ValueError, match=r"asks for the tokenizer .*which is none known here"):
            load_text_encoder(str(folder))


def test_paths_in_the_files_of_a_tokenizer_lead_nowhere(save_encoder: Any, captions: list[str], tmp_path: Path) -> None:
    folder = save_encoder("bert")
    states = load_text_encoder(str(folder))(captions)
    # A tokenizer with other words, as a file elsewhere.
    other = read_json(folder / "tokenizer.json")
    words = other["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(words)))
    paths = {"tokenizer_file": str(tmp_path / "other.json"), "vocab_file": str(tmp_path / "vocab.txt")}
    paths |= {"vocab": str(tmp_path / "vocab.txt"), "name_or_path": "someone/model", "chat_template": "{{ 1 }}"}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | paths))
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    encoder = load_text_encoder(str(folder))
    torch.testing.assert_close(encoder(captions), states, rtol=0, atol=0)
    assert encoder.tokenizer.chat_template is None
    (folder / "special_tokens_map.json").write_text(json.dumps(paths))
    with pytest.raises(ValueError, match=r"special_tokens_map\.json has the key 'tokenizer_file'"):
        load_text_encoder(str(folder))


def test_a_link_out_of_the_folder_is_refused_and_those_of_the_hubs_cache_are_not(
    save_encoder: Any, captions: list[str], tmp_path: Path
) -> None:
    folder = save_encoder("clip")
    states = load_text_encoder(str(folder))(captions)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    torch.testing.assert_close(load_text_encoder(str(snapshot))(captions), states, rtol=0, atol=0)
    (tmp_path / "linked").symlink_to(folder)  # a folder as a whole is its owner's link
    torch.testing.assert_close(load_text_encoder(str(tmp_path / "linked"))(captions), states, rtol=0, atol=0)
    (tmp_path / "secret.json").write_text('{"bos_token": "secret"}')
    (folder / "special_tokens_map.json").symlink_to("../secret.json")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json is a link that leads out of its folder"):
        load_text_encoder(str(folder))


def test_a_config_that_cannot_be_built_is_one_line(save_encoder: Any) -> None:
    for changes in (
        {"hidden_size": "wide"},
        {"id2label": {"x": 1}},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such_act"},
    ):
        with pytest.raises(ValueError, match="does not load as a BertModel") as caught:
            load_text_encoder(str(save_encoder("bert", config=changes)))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"field 'hidden_size': .*expected int"):
        load_text_encoder(str(save_encoder("bert", config={"hidden_size": "wide"})))
    folder = save_encoder("bert", config={"chunk_size_feed_forward": 5})  # does not divide the length
    assert load_text_encoder(str(folder))(["a cat"]).shape == (1, 12, 32)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"model_max_length": "12"}))
    with pytest.raises(ValueError, match="states model_max_length '12', which is no number"):
        load_text_encoder(str(folder))
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_text_encoder(str(folder))
