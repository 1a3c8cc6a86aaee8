"""The text encoder: a frozen language model and its tokenizer, from captions to hidden states."""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ldm import disk
from ldm.weights import STEM, WeightFiles, copy_weights, find_weights, plain_names, update_hash

_CHUNK = 64  # captions that go through the language model at once; more would only cost memory
_COUNTED = 4096  # captions whose tokens are held at once where they are only counted
_QUOTED, _LETTERS = 10, 300  # of texts that lose words, so many are quoted, and so much of each
# Entries of a config.json that say who wrote it, and how.
_NOTES = frozenset({"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"})


class CutPromptWarning(UserWarning):
    """A prompt is longer than the text encoder reads: its last words change nothing."""


@contextmanager
def ignore_cut_prompts() -> Iterator[None]:
    """No `CutPromptWarning` inside: for callers that warn themselves, once for many images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutPromptWarning)
        yield


@dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """Where an encoder came from, so that saving it copies files instead of writing tensors anew.

    `config` is the saved `config.json`; `other_towers` are prefixes of tensors in `weights` that are not of the text
    encoder; `tokenizer` its files but `tokenizer_config.json`; `scratch` keeps a temporary folder alive.
    """

    config: dict[str, Any]
    weights: WeightFiles
    other_towers: tuple[str, ...]
    tokenizer: tuple[Path, ...]
    tokenizer_config: dict[str, Any]
    scratch: TemporaryDirectory[str] | None = None


@dataclass(frozen=True)
class Fits:
    """Whether a caption has at most `max_length` tokens; it can be pickled."""

    tokenizer: Callable[..., Any]
    max_length: int

    def __call__(self, caption: str) -> bool:
        return len(self.tokenizer(caption)["input_ids"]) <= self.max_length


class TextEncoder:
    """A frozen text encoder: `encoder(captions)` gives the states that cross-attention sees.

    Captions are padded or cut to `max_length` tokens, and the states of all positions are returned, padding included,
    as by `StableDiffusionPipeline.encode_prompt`. The model is given the attention mask exactly when its config says
    `use_attention_mask: true` (`uses_attention_mask`). Threads may share one encoder.
    """

    def __init__(self, *, model: nn.Module, tokenizer: Any, max_length: int, files: EncoderFiles) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.tokenizer.model_max_length = max_length
        self.max_length = max_length
        self.uses_attention_mask = files.config.get("use_attention_mask") is True
        self._files = files
        self._stamps = {path: disk.file_stamp(path) for path in (*files.weights.shards, *files.tokenizer)}

    @property
    def hidden_size(self) -> int:
        """D, the last dimension of the hidden states."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model computes and its states lie."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states: float32 until moved with `to`."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextEncoder":
        """Moves the model; returns itself. A T5 overflows in float16: give it bfloat16."""
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Hidden states of captions, "" included: [B, L, D] in `dtype` on `device`; ValueError as in `check_text`."""
        captions = _checked(captions)
        return torch.cat([self._encode(captions[i : i + _CHUNK]) for i in range(0, len(captions), _CHUNK)])  # [B, L, D]

    @cached_property
    def _padded(self) -> Callable[..., Any]:
        """The tokens of captions, padded and cut."""
        padded = {"padding": "max_length", "max_length": self.max_length, "truncation": True}
        return self._tokenizer_with(**padded, return_tensors="pt")

    @cached_property
    def _whole(self) -> Callable[..., Any]:
        """The tokens of captions, all of them."""
        return self._tokenizer_with(padding=False, truncation=False, verbose=False)

    def _tokenizer_with(self, **settings: Any) -> Callable[..., Any]:
        """A copy that is always called with these settings: a fast tokenizer stores them, and threads share it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer([""], **settings)
        return partial(tokenizer, **settings)

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = self._padded(captions)
        config: Any = self.model.config
        largest, known = int(tokens.input_ids.max()), config.vocab_size
        if largest >= known:
            why = f"but the text encoder has {known}: save or download both again"
            raise ValueError(f"the tokenizer gives the token {largest}, {why}")
        mask = tokens.attention_mask.to(self.device) if self.uses_attention_mask else None
        # Output 0 is the last hidden state; in a CLIP, after its final layer norm.
        return self.model(tokens.input_ids.to(self.device), attention_mask=mask)[0]  # [b, L, D]

    def truncated_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens of each caption do not fit in `max_length`; `ValueError` as in `__call__`."""
        tokens = self._whole(_checked(captions))
        return [max(0, len(ids) - self.max_length) for ids in tokens["input_ids"]]

    def fits(self) -> "Fits":
        """A function that says of a caption whether all of it is read, for other processes: without the model."""
        return Fits(self._whole, self.max_length)

    def fingerprint(self) -> str:
        """32 hexadecimal digits that name this function of captions: weights, tokenizer, length and use of the mask."""
        files = self._files
        tokenizer = {"tokenizer_class": _tokenizer_class(self.tokenizer)} | files.tokenizer_config
        settings = {
            "config": {key: value for key, value in files.config.items() if key not in _NOTES},
            # max_length below counts instead
            "tokenizer": {key: value for key, value in tokenizer.items() if key != "model_max_length"},
            "max_length": self.max_length,
            "mask": self.uses_attention_mask,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in files.tokenizer:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        weights = plain_names(self.model.state_dict())
        # The pooler is not used, and random if the file has none.
        update_hash(digest, {name: value for name, value in weights.items() if not name.startswith("pooler.")})
        return digest.hexdigest()[:32]

    def truncated_words(self, captions: Sequence[str]) -> list[str]:
        """The words of each caption that do not fit in `max_length`, "" where all do; `ValueError` as in `__call__`."""
        captions, lost = _checked(captions), []
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        for start in range(0, len(captions), _COUNTED):
            some = captions[start : start + _COUNTED]
            for caption, over in zip(some, self.truncated_tokens(some), strict=True):
                if not over:
                    lost.append("")
                elif self.tokenizer.is_fast:
                    tokens = self._whole(caption, add_special_tokens=False, return_offsets_mapping=True)
                    words = tokens.word_ids()
                    first = words.index(words[room])  # where the word begins that the cut falls into
                    lost.append(caption[tokens["offset_mapping"][first][0] :].strip())
                else:  # tokens that are bytes, with no way back to the words
                    rest = self._whole(caption, add_special_tokens=False)["input_ids"][room:]
                    lost.append(self.tokenizer.decode(rest).strip())
        return lost

    def truncation_message(self, texts: Iterable[str]) -> str:
        """One line that names the words which `truncated_words` finds, text by text; "" where all of them fit."""
        unique = list(dict.fromkeys(texts))
        pairs = [(text, gone) for text, gone in zip(unique, self.truncated_words(unique), strict=True) if gone]
        if not pairs:
            return ""
        quoted = [f"{_quoted(gone)} of {_quoted(text)}" for text, gone in pairs[:_QUOTED]]
        more = [f"words of {len(pairs) - _QUOTED:,} texts more"] if len(pairs) > _QUOTED else []
        return f"the text encoder reads {self.max_length} tokens of a text; lost: {'; '.join(quoted + more)}"

    @property
    def library_classes(self) -> dict[str, tuple[str, str]]:
        """What `model_index.json` says of the two folders: name → (library, class), loadable by diffusers."""
        return {
            "text_encoder": ("transformers", type(getattr(self.model, "_orig_mod", self.model)).__name__),
            "tokenizer": ("transformers", _tokenizer_class(self.tokenizer)),
        }

    def save(self, folder: Path | str, *, changed: bool = False) -> None:
        """Writes `folder/text_encoder` and `folder/tokenizer` as transformers and diffusers load them, each atomically.

        Weights and vocabulary are copied byte for byte from where the encoder was loaded; with `changed`, the weights
        are those of the model as it is now (an adapter was merged into them). ValueError where a folder exists, and
        where a file to copy has changed since it was read.
        """
        for path in self._files.tokenizer if changed else self._stamps:
            if disk.file_stamp(path) != self._stamps[path]:
                raise ValueError(f"{path} is not the file that was read: restore it, or load the model again")
        files, folder = self._files, disk.expand_user(folder)
        for target in (folder / "text_encoder", folder / "tokenizer"):
            if target.exists():
                raise ValueError(f"{target} exists already: choose another folder or delete it first")
        with disk.new_folder(folder / "text_encoder") as target:
            if changed:
                with quiet_transformers():
                    weights = plain_names(self.model.state_dict())
                    self.model.save_pretrained(target, state_dict=weights)  # type: ignore[operator]
            else:
                copy_weights(files.weights, target, STEM, files.other_towers)
            disk.write_json(target / "config.json", files.config)
        with disk.new_folder(folder / "tokenizer") as target:
            for path in files.tokenizer:
                shutil.copyfile(path, target / path.name)
            config = {"tokenizer_class": _tokenizer_class(self.tokenizer)} | files.tokenizer_config
            disk.write_json(target / "tokenizer_config.json", config | {"model_max_length": self.max_length})

    def set_source(self, folder: Path, *, changed: bool = False) -> None:
        """Says that `folder` holds what `save` wrote; files that came from there are copied from there again."""

        def replaced(paths: Sequence[Path], part: str) -> bool:
            return any(path.parent.resolve() == (folder / part).resolve() for path in paths)

        weights, tokenizer, stamps = self._files.weights, self._files.tokenizer, dict(self._stamps)
        if replaced(weights.shards, "text_encoder") and not changed:
            weights = find_weights(folder / "text_encoder", STEM)
            stamps |= {path: disk.file_stamp(path) for path in weights.shards}
        if replaced(tokenizer, "tokenizer"):
            tokenizer = tuple(folder / "tokenizer" / path.name for path in tokenizer)
            stamps |= {path: disk.file_stamp(path) for path in tokenizer}
        self._files = replace(self._files, weights=weights, tokenizer=tokenizer)
        self._stamps = {path: stamps[path] for path in (*weights.shards, *tokenizer)}


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…")  # repr: on one line, whatever the text holds


def _checked(captions: Sequence[str]) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"captions must be a list of strings, not one string: write [{captions!r}]")
    captions = list(captions)
    if not captions:
        raise ValueError('the list of captions is empty: give at least one, [""] for no condition')
    for position, caption in enumerate(captions):
        check_text(f"caption {position}", caption)
    return captions


def check_text(what: str, text: Any) -> None:
    """Raises ValueError unless a tokenizer takes it."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {text!r}; it must be a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(
            f"{what} has half of a surrogate pair at place {error.start} ({around}); write UTF-8"
        ) from None


def _tokenizer_class(tokenizer: Any) -> str:
    import transformers

    # The general class of transformers 5 bears a name that older versions, and so diffusers with them, lack.
    if type(tokenizer) is transformers.PreTrainedTokenizerFast:
        return "PreTrainedTokenizerFast"
    # Both names are one class in transformers 5; in version 4 only the fast one reads tokenizer.json.
    name = type(tokenizer).__name__.removesuffix("Fast")
    return f"{name}Fast" if tokenizer.is_fast else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers inside; its settings afterwards are those before."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_disabled = are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars_disabled:  # transformers switches the hub's bars together with its own
            disable_progress_bars()
