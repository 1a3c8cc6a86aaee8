"""Component folders on disk in the layout of diffusers: safetensors and JSON, nothing else.

    model_index.json
    unet/config.json         unet/diffusion_pytorch_model.safetensors
    vae/…                    or codec/config.json for a model that works on pixels
    text_encoder/…  tokenizer/…  scheduler/scheduler_config.json

Names in `config.json` are mapped to our classes in one closed table. Every write is complete or not there: `ldm.disk`.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import disk
from ldm.codecs import PixelCodec
from ldm.diffusion.diffusers_schedulers import config_from_diffusers, config_to_diffusers
from ldm.diffusion.schedule import ScheduleConfig
from ldm.disk import read_json as read_json
from ldm.disk import write_json as write_json
from ldm.models import AutoencoderConfig, AutoencoderKL, FirstStage, UNet, UNetConfig, VQConfig, VQModel
from ldm.models.autoencoder import upgrade_state_dict
from ldm.progress import error_reason
from ldm.weights import (
    check_dtype,
    converted,
    copy_weights,
    find_weights,
    plain_names,
    read_tensors,
    refuse_untrusted,
    shard_names,
)
from ldm.weights import load_tensors as load_tensors
from ldm.weights import save_tensors as save_tensors

WEIGHTS = "diffusion_pytorch_model"
PARTS = ("unet", "vae", "codec", "text_encoder", "tokenizer", "scheduler")
ASSETS = Path(__file__).parent / "assets"
# First stages and pipelines that are part of the package, by the name under which they are asked for. A folder of
# such a name is written "./scenes-64".
BUILT_IN = {"openmoji-first-stage": ASSETS / "openmoji-first-stage"}
BUILT_IN_PIPELINES = {"scenes-64": ASSETS / "scenes-64"}
FORMER = {"openmoji-64": "configs/openmoji-64.yaml"}  # models that were part of the package, by the config of each
COMPONENTS: dict[str, tuple[type, type]] = {
    "UNet2DConditionModel": (UNet, UNetConfig),
    "AutoencoderKL": (AutoencoderKL, AutoencoderConfig),
    "VQModel": (VQModel, VQConfig),
}
FIRST_STAGES = ("AutoencoderKL", "VQModel")
# Whole models as other programs keep them.
SINGLE_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack")


def _weights(stem: str) -> str:
    """A pattern of the files of weights that are read here: one or shards, of the variants of diffusers, an index."""
    variant, shard = r"(\.(fp16|bf16|fp32|ema|non_ema))?", r"(-\d{5}-of-\d{5})?"
    return rf"{stem}({variant}{shard}|{shard}{variant})\.safetensors|{stem}\.safetensors\.index{variant}\.json"


_NETWORK = rf"config\.json|{_weights(WEIGHTS)}"
_TOKENIZER = "tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
_PIPELINE = "|".join(
    [
        r"model_index\.json|scheduler/scheduler_config\.json|codec/config\.json",
        rf"(unet|vae)/({_NETWORK})",
        rf"text_encoder/(config\.json|reference\.json|{_weights('model')})",
        rf"tokenizer/(({_TOKENIZER})\.json|merges\.txt|vocab\.txt|(spiece|tokenizer|sentencepiece\.bpe)\.model)",
    ]
)
_LORA = r"pytorch_lora_weights\.safetensors"
# What is written as a folder: the file by which an older one is known, and the pattern of all its files.
FORMATS = {
    "pipeline": ("model_index.json", _PIPELINE),
    "autoencoder": ("config.json", _NETWORK),
    "lora": ("pytorch_lora_weights.safetensors", _LORA),
    "best": ("best.json", rf"best\.json|pipeline/({_PIPELINE})|autoencoder/({_NETWORK})|lora/{_LORA}"),
}
OS_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
# What a folder may hold before its first model: what a clone of an empty repository of the hub holds.
_COMPANIONS = {".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", "README.md", "LICENSE", "LICENSE.md"}
_COMPANIONS |= {"LICENSE.txt", *OS_FILES}


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], kind: str = "pipeline") -> Iterator[Path]:
    """A temporary sibling to fill, synced and put in the place of `folder` at the end.

    Of an older model in `folder`, the files that the format names make way; all else stays: a README, `.git`, notes. A
    link to a folder stays, and what it points to is written.

    Args:
        kind: what is written, a key of `FORMATS`.

    Raises:
        ValueError: for a file, a link to nothing, a folder that holds other things and no model, and where something
            stands in the way of the model. Nothing is written then.
    """
    place = disk.writable_folder(folder)
    mark, names = FORMATS[kind]
    other = next((path.name for path in sorted(place.glob("*")) if path.name not in _COMPANIONS), None)
    is_model = (place / mark).is_file()
    if is_model and mark == "config.json":  # other programs have files of this name
        try:
            is_model = read_json(place / mark).get("_class_name") in FIRST_STAGES
        except ValueError:
            is_model = False
    if other is not None and not is_model:
        raise ValueError(
            f"{folder} holds files that are no model, such as {other}, and no {mark}; nothing was written, name another"
        )
    pattern = re.compile(names)
    with disk.new_folder(place, lambda name: pattern.fullmatch(name) is not None) as aside:
        yield aside


def link_tree(source: Path, target: Path) -> None:
    """Copies a folder into another. Weights become hard links where the file system has them; small files, which
    people edit in place, become copies.
    """

    def link(src: str, dst: str) -> None:
        try:
            if not src.endswith(".safetensors"):
                raise OSError
            os.link(os.path.realpath(src), dst)
        except OSError:
            shutil.copyfile(src, dst)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def save_model(
    folder: Path, model: UNet | FirstStage, dtype: torch.dtype = torch.float32, shard_bytes: int | None = None
) -> None:
    """Writes `config.json` and the weights of a network into `folder`, which stock diffusers can open.

    Of a network that was compiled or otherwise wrapped, as a whole or in parts, the names are those without.

    Args:
        shard_bytes: weights that take more are split into files with no more of them each, and an index beside them.

    Raises:
        ValueError: if one tensor alone takes more.
    """
    folder = disk.expand_user(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.config.to_dict())
    weights = {name: value.to(dtype) for name, value in plain_names(model.state_dict()).items()}
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    most = sum(size.values()) if shard_bytes is None else shard_bytes
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in weights.items():
        if size[name] > most:
            raise ValueError(f"{name} alone takes {size[name]:,} bytes, more than the {most:,} of a file; allow more")
        if size[name] > room:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= size[name]
    if len(shards) == 1:
        save_tensors(folder / f"{WEIGHTS}.safetensors", weights)
        return
    names = shard_names(WEIGHTS, len(shards))
    for file, shard in zip(names, shards, strict=True):
        save_tensors(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(size.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    write_json(folder / f"{WEIGHTS}.safetensors.index.json", index)


def copy_model(source: Path, target: Path) -> None:
    """Copies a component folder: its config, and its weights as `copy_weights` does."""
    source, target = disk.expand_user(source), disk.expand_user(target)
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    copy_weights(find_weights(source, WEIGHTS), target, WEIGHTS)


def has_weights(folder: Path, model: nn.Module) -> bool:
    """Whether a folder has the weights of a first stage, as they are in its dtype: either may have changed."""
    try:
        stored = upgrade_state_dict(read_tensors(find_weights(folder, WEIGHTS)))
    except ValueError:
        return False
    own = plain_names(model.state_dict())
    return stored.keys() == own.keys() and all(
        value.shape == own[name].shape and torch.equal(value.to(own[name].dtype), own[name].cpu())
        for name, value in stored.items()
    )


def load_model(folder: Path, expected: str, dtype: torch.dtype = torch.float32) -> UNet | FirstStage:
    """Builds the network that `folder/config.json` describes and fills it, strictly.

    Args:
        expected: the class that must stand in `config.json`, a key of `COMPONENTS`.

    Raises:
        ValueError: for a missing file, another class, a damaged file, weights that do not fit the config, are not
            finite or quantized, and a dtype that networks cannot have.
    """
    check_dtype(dtype)
    folder = disk.expand_user(folder)
    config = _read_config(folder)
    name = config.get("_class_name", expected)
    if name != expected:
        raise ValueError(f"{folder / 'config.json'} describes {_a(name)}; {_a(expected)} is needed here")
    network, network_config = COMPONENTS[expected]
    try:
        built = network_config.from_dict(config)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    try:
        with torch.device("meta"):
            model: UNet | FirstStage = network(built)
    except RuntimeError as error:  # more numbers than can be counted
        raise ValueError(f"{folder / 'config.json'}: no such network can be built ({error})") from None
    weights = read_tensors(find_weights(folder, WEIGHTS))
    if expected in FIRST_STAGES:
        weights = upgrade_state_dict(weights)
    assign_weights(model, weights, folder, dtype)
    return model.eval()


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> FirstStage:
    """The first stage of a folder, of whichever class of `FIRST_STAGES` its `config.json` names.

    Raises:
        ValueError: for a missing file, another class, a damaged file, or weights that do not fit the config.
    """
    folder = disk.expand_user(folder)
    name = _read_config(folder).get("_class_name", "AutoencoderKL")
    if name not in FIRST_STAGES:
        known = " or ".join(map(_a, FIRST_STAGES))
        raise ValueError(f"{folder / 'config.json'} describes {_a(name)}; a first stage is {known}")
    model = load_model(folder, name, dtype)
    assert not isinstance(model, UNet)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; the model folder is incomplete, copy or train it again")
    refuse_untrusted(folder)
    return read_json(folder / "config.json")


def _a(name: str) -> str:
    return f"{'an' if str(name)[:1] in 'AEIO' else 'a'} {name}"


def assign_weights(
    model: nn.Module, weights: Mapping[str, Tensor], where: Path, dtype: torch.dtype | None = None
) -> None:
    """Assigns `weights` to a model built on the meta device; every key and shape must fit."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{where}: the weights do not fit config.json: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]}); use the config.json that was saved with them"
        )
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(weights[name].shape)} in the weights but "
                f"{list(value.shape)} by config.json; use the config.json that was saved with them"
            )
    if dtype is not None:
        weights = converted(weights, dtype, where)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(True)


def load_schedule(folder: Path, class_name: str | None = None) -> ScheduleConfig:
    """The schedule, prediction and grid that `scheduler_config.json` describes, read as by diffusers' `class_name`."""
    path = disk.expand_user(folder) / "scheduler_config.json"
    content = read_json(path)
    try:
        return config_from_diffusers(content, class_name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def save_schedule(folder: Path, config: ScheduleConfig, learned_variance: bool = False) -> None:
    folder = disk.expand_user(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = config_to_diffusers(config, learned_variance=learned_variance)
    write_json(folder / "scheduler_config.json", content)


def save_pixel_codec(folder: Path, codec: PixelCodec) -> None:
    folder = disk.expand_user(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", codec.config)


def load_pixel_codec(folder: Path) -> PixelCodec:
    path = disk.expand_user(folder) / "config.json"
    config = read_json(path)
    try:
        return PixelCodec(tuple(config["mean"]), tuple(config["std"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: mean and std of the channels are wrong or missing ({error})") from None


def find_pipeline(name: str | os.PathLike[str]) -> Path:
    """The folder of a pipeline: a built-in one, a local one, or the hub snapshot of an id `owner/name`.

    Raises:
        ValueError: naming what was looked for and where.
    """
    if name in BUILT_IN_PIPELINES:  # a Path is a folder, whatever its name
        return BUILT_IN_PIPELINES[str(name)]
    local = _find_local(name, "model_index.json")
    return local or _download(os.fspath(name), ["model_index.json", *(f"{part}/*" for part in PARTS)], ".")


def find_autoencoder(name: str) -> Path:
    """The folder of an autoencoder: `name` itself, or `vae/` of the pipeline (folder or hub id) of that name.

    Raises:
        ValueError: naming what was looked for and where.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in BUILT_IN_PIPELINES:
        return BUILT_IN_PIPELINES[name] / "vae"
    inside = disk.expand_user(name) / "vae"
    if (inside / "config.json").is_file():
        return inside
    if (inside.parent / "codec" / "config.json").is_file():
        raise ValueError(f"{inside.parent} is a model of pixels, which has no autoencoder; name one of latents")
    local = _find_local(name, "config.json")
    return local or _download(name, ["config.json", f"{WEIGHTS}*", "vae/*"], ".", "vae")


def _find_local(name: str | os.PathLike[str], wanted: str) -> Path | None:
    """The folder `name` if it holds the file `wanted`; None if there is no such folder but `name` may be a hub id."""
    folder, text = disk.expand_user(name), os.fspath(name)
    if not folder.is_dir() and folder.suffix.lower() in SINGLE_FILES:
        theirs = "StableDiffusionPipeline" if wanted == "model_index.json" else "AutoencoderKL"
        raise ValueError(
            f"{text} is a single file, and a model is a folder; convert it once with diffusers.{theirs}."
            "from_single_file(...).save_pretrained(FOLDER) (a LoRA is loaded with load_lora or --lora)"
        )
    if folder.is_file():
        raise ValueError(f"{text} is a file; name the folder of a model, which holds {wanted}")
    if folder.is_dir():
        if (folder / wanted).is_file():
            return folder
        inside = [child for child in sorted(folder.iterdir()) if (child / wanted).is_file()]
        hint = f"; did you mean {inside[0]}?" if inside else "; it is not a model folder, or only half of one"
        raise ValueError(f"{folder} holds no {wanted}{hint}")
    if folder.is_absolute() or text.startswith(".") or text.count("/") != 1:
        known = BUILT_IN_PIPELINES if wanted == "model_index.json" else (*BUILT_IN, *BUILT_IN_PIPELINES)
        if name in FORMER:
            raise ValueError(
                f"{text} is no longer part of the package; train it with accelerate launch train/train_ldm.py --config "
                f"{FORMER[text]} and name runs/{text}/pipeline, or use {', '.join(BUILT_IN_PIPELINES)}"
            )
        near = difflib.get_close_matches(text.lower(), known, n=1) if isinstance(name, str) else []
        hint = f'did you mean "{near[0]}"?' if near else "train one first, or name a folder or a hub id owner/name"
        raise ValueError(f"there is no model folder {text}; {hint}")
    return None


def _download(hub_id: str, patterns: list[str], *places: str) -> Path:
    """The first of `places` in the hub snapshot of an id that holds a model."""
    from huggingface_hub import snapshot_download

    never = ["*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx*", "*non_ema*"]
    try:
        snapshot = Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=never))
    except Exception as error:  # the hub client raises many kinds; each means "not to be had"
        raise ValueError(
            f"there is no model folder {hub_id}, and the hub did not give a model of that id ({error_reason(error)})"
        ) from None
    for place in places:
        if any((snapshot / place / name).is_file() for name in ("model_index.json", "config.json")):
            return snapshot / place
    raise ValueError(f"the hub model {hub_id} holds no {patterns[0]}; it is not in the layout of diffusers")
