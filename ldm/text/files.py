"""Weights of a text encoder, read and copied without the towers that are not its own."""

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm import disk
from ldm.weights import WeightFiles, check_weights, plain_name, plain_names, save_tensors

STEM = "model"
WEIGHTS_NAME = f"{STEM}.safetensors"
# Counters that old files hold beside the weights.
_COUNTERS = ("position_ids", "token_type_ids")


def read_tensors(files: WeightFiles, other_towers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a model under plain names, without those whose names start with one of `other_towers`.

    Raises:
        ValueError: naming the file and the first tensor that is quantized or not finite.
    """
    names = {name: shard for shard in files.shards for name in tensor_names(shard)}
    plain_names(names, files.shards[0].parent)
    found = {}
    for shard in files.shards:
        with safe_open(shard, framework="pt") as stream:
            for name in (name for name, home in names.items() if home == shard):
                plain = plain_name(name)
                if not plain.startswith(other_towers):
                    found[plain] = stream.get_tensor(name)
                    if not plain.endswith(_COUNTERS):
                        check_weights({plain: found[plain]}, shard)
    return found


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; ValueError if it is cut off or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return list(stream.keys())
    except SafetensorError as error:
        disk.check_not_pointer(path)
        raise ValueError(f"{path} is damaged or cut off ({error}): save or download it again") from None


def write_weights(files: WeightFiles, folder: Path, other_towers: tuple[str, ...]) -> None:
    """Copies weights into `folder` byte for byte, under names without a variant.

    A new file is written only if the source also holds other towers (the image half of a CLIP, the decoder of a T5),
    or the names of a wrapped network.
    """
    names = [name for shard in files.shards for name in tensor_names(shard)]
    if any(plain_name(name) != name or name.startswith(other_towers) for name in names):
        save_tensors(folder / WEIGHTS_NAME, read_tensors(files, other_towers))
    elif files.index is None:
        shutil.copyfile(files.shards[0], folder / WEIGHTS_NAME)
    else:
        for shard in files.shards:  # follows links, as in the hub's cache
            shutil.copyfile(shard, folder / shard.name)
        shutil.copyfile(files.index, folder / f"{WEIGHTS_NAME}.index.json")
