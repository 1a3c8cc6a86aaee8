"""Tiny text encoders of each family, saved by transformers, with tokenizers made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

torch.set_num_threads(1)

CAPTIONS = ["a red cat", "a blue dog on a mat", "", "cat cat cat cat cat cat cat cat cat cat cat cat cat"]
WORDS = ["a", "red", "blue", "cat", "dog", "on", "mat"]
LENGTH = 12

_TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}


def clip_tokenizer() -> Any:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("c", "a"), ("ca", "t</w>")]
    )


def bert_tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS)]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def clip_config(**changes: Any) -> Any:
    sizes = {"vocab_size": 516, "max_position_embeddings": LENGTH, "bos_token_id": 514, "eos_token_id": 515}
    return transformers.CLIPTextConfig(**(sizes | _TINY | changes))


def model_and_tokenizer(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "max_position_embeddings": 20} | _TINY
    if kind == "clip":
        return transformers.CLIPTextModel(clip_config()), clip_tokenizer()
    if kind == "clip-full":
        vision = _TINY | {"image_size": 32, "patch_size": 16}
        config = transformers.CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision)
        return transformers.CLIPModel(config), clip_tokenizer()
    if kind in ("t5", "t5-full"):
        config = transformers.T5Config(vocab_size=11, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        model = transformers.T5EncoderModel if kind == "t5" else transformers.T5ForConditionalGeneration
        return model(config), t5_tokenizer()
    if kind == "byt5":
        config = transformers.T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        return transformers.T5EncoderModel(config), transformers.ByT5Tokenizer()
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)), bert_tokenizer()
    if kind == "bert-masked":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)), bert_tokenizer()
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=12, max_position_embeddings=20, dim=32, hidden_dim=64, n_layers=2, n_heads=4
        )
        return transformers.DistilBertModel(config), bert_tokenizer()
    model_class, config_class = {
        "roberta": (transformers.RobertaModel, transformers.RobertaConfig),
        "xlm-roberta": (transformers.XLMRobertaModel, transformers.XLMRobertaConfig),
        "mpnet": (transformers.MPNetModel, transformers.MPNetConfig),
    }[kind]
    return model_class(config_class(**sizes, pad_token_id=1)), bert_tokenizer()


SaveEncoder = Callable[..., Path]


@pytest.fixture
def save_encoder(tmp_path: Path) -> SaveEncoder:
    """`save_encoder(kind)`: the folder of a model and its tokenizer, written by transformers.

    `config` are keys added to its config.json; `how` are arguments of the model's save_pretrained.
    """

    def save(kind: str, length: int | None = LENGTH, config: dict[str, Any] | None = None, **how: Any) -> Path:
        folder = tmp_path / f"source-{kind}"
        model, tokenizer = model_and_tokenizer(kind)
        if length is not None:
            tokenizer.model_max_length = length
        model.save_pretrained(folder, **how)
        tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        return folder

    return save


@pytest.fixture
def captions() -> list[str]:
    """Four captions: of different lengths, one of them empty, the last longer than every tiny encoder's."""
    return list(CAPTIONS)
