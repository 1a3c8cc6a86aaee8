"""The files of a text encoder: which ones it consists of, and how they reach another folder unchanged."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import disk
from ldm.weights import check_weights
from ldm.wrapped import plain_name, plain_names

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Counters that old files hold beside the weights.
_COUNTERS = ("position_ids", "token_type_ids")

# Variants of weights, as transformers names them (`model.fp16.safetensors`), the better first; None has no name.
_PREFERRED = (None, "fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The safetensors files of one model, as they lie in its source folder.

    `shards` are in the order of their names; `index` lists which tensor lies in which shard and is None for a
    single file; `variant` is what transformers calls the middle of `model.fp16.safetensors`; `keys` are the
    names of all tensors, without the prefixes of a network that was wrapped (`_orig_mod.`), and `wrapped` says
    whether the files have such.
    """

    shards: tuple[Path, ...]
    index: Path | None
    variant: str | None
    keys: frozenset[str]
    wrapped: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. `ValueError` names the file where it is missing, damaged or not an object."""
    try:
        disk.check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is incomplete, save or download it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): save or download it again") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is not valid JSON ({error}): save or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: save or download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, keys in their own order."""
    disk.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def find_weights(folder: Path) -> Weights:
    """Find the safetensors files of a model folder: one file or shards, full precision before half and any other.

    Reads the header of every file. `ValueError` where there are none, where one that the index lists is
    missing, or where one is damaged; for several variants of which none is preferred.
    """
    variants = _variants(folder)
    if len(variants) > 1 and not variants.keys() & set(_PREFERRED):
        both = " and ".join(sorted(map(str, variants)))
        raise ValueError(f"{folder} holds the variants {both} of its weights: name the one you mean {WEIGHTS_NAME}")
    for variant in (*_PREFERRED, *variants):
        if variant not in variants:
            continue
        path = variants[variant]
        index = path if path.suffix == ".json" else None
        shards = (path,) if index is None else _shards_of(index)
        names = {key: None for shard in shards for key in tensor_names(shard)}
        plain = plain_names(names, folder)
        wrapped = plain.keys() != names.keys()
        return Weights(shards=shards, index=index, variant=variant, keys=frozenset(plain), wrapped=wrapped)
    pickled = sorted(path.name for path in folder.glob("pytorch_model*"))
    if pickled:
        raise ValueError(
            f"{folder} holds its weights only as {pickled[0]}, which would have to be unpickled: "
            f"convert it to {WEIGHTS_NAME} (save_pretrained of transformers does) or choose another model"
        )
    raise ValueError(f"{folder} holds no {WEIGHTS_NAME}: save or download the model again")


def _variants(folder: Path) -> dict[str | None, Path]:
    """Variant → its file, or the index of its shards."""
    found: dict[str | None, Path] = {}
    indexed, single = (r"model\.safetensors\.index(?:\.([^.]+))?\.json", r"model(?:\.([^.]+))?\.safetensors")
    for pattern in (indexed, single):  # a single file counts before shards
        for path in sorted(folder.glob("model*")):
            match = re.fullmatch(pattern, path.name)
            if match is not None and path.is_file() and not re.search(r"-\d{5}-of-\d{5}", path.name):
                found[match[1]] = path
    return found


def _shards_of(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} lists no weights (weight_map): save or download the model again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # An index comes from others: it must not reach out of its folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} lists {name!r}, which is not a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing: save or download the model again")
    return tuple(index.parent / name for name in names)


def read_tensors(weights: Weights, other_towers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a model, without those whose names start with one of `other_towers`, under plain names.

    `ValueError` names the file and the first tensor that is quantized or not finite.
    """
    kept = {}
    for shard in weights.shards:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensor_names(shard):
                plain = plain_name(name)
                if not plain.startswith(other_towers):
                    kept[plain] = tensors.get_tensor(name)
                    if not plain.endswith(_COUNTERS):
                        check_weights({plain: kept[plain]}, shard)
    return kept


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; `ValueError` where it is cut off or damaged."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is damaged or cut off ({error}): save or download it again") from None


def write_weights(weights: Weights, folder: Path, other_towers: tuple[str, ...]) -> None:
    """Bring weights into `folder`, byte for byte, under the names that are found without naming a variant.

    Only where the source also holds a tower that is not the text encoder's (tensor names that start with
    one of `other_towers`: the image half of a CLIP, the decoder of a T5) a new file is written without it;
    the tensors that remain keep their names and values. So it is where the names are those of a wrapped network.
    """
    if weights.wrapped or any(key.startswith(other_towers) for key in weights.keys):
        kept = read_tensors(weights, other_towers)
        try:
            save_file(kept, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # the tensors are sound: what fails is the disk
            raise OSError(f"{folder / WEIGHTS_NAME} cannot be written: {error}") from None
        return
    if weights.index is None:
        shutil.copyfile(weights.shards[0], folder / WEIGHTS_NAME)
        return
    for shard in weights.shards:  # links, as in the hub's cache, are followed
        shutil.copyfile(shard, folder / shard.name)
    shutil.copyfile(weights.index, folder / INDEX_NAME)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that is called `target` only once it is complete; what fails leaves nothing behind.

    `ValueError` where `target` exists: frozen parts are written once and never replaced.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: choose another folder or delete it first")
    with disk.new_folder(target) as aside:
        yield aside
