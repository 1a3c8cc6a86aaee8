"""What a GPU machine without network needs beside a checkout: `python tools/gpu.py --bundle FOLDER`, used with `--use`.

    FOLDER/wheels.tar.xz      libraries that may be missing there, for Python 3.12 on x86-64 Linux
    FOLDER/text.safetensors.xz, text.json    MiniLM in float16, with the embedding rows that captions of scenes use
    FOLDER/bundle.json        sizes and hashes, and the commit that it was made from

It stays below 24 MB: wheels are compressed together, and of diffusers and peft only the modules travel that our tests
and benchmark import. peft travels although most have it: one older than 0.18 cannot be imported beside transformers 5,
and diffusers not beside it. Scenes need nothing: their drawings are in the checkout.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, save

from ldm.data.builtin import TIERS, training_scene
from ldm.data.scenes import COLORS, FEW_SINGLES_FROM, load_catalog
from ldm.data.scenes import captions as grammar
from ldm.text import load_text_encoder
from ldm.training.resume import commit

MOST_BYTES = 24 * 10**6
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "diffusers", "peft", "resvg-py")
# diffusers imports requests, and huggingface_hub has no need of it any more. What guesses the encoding of a page for it
# stays behind.
PURE_WHEELS = ("requests", "urllib3")
# Machine code of pydantic-core: jumps are written as absolute addresses, which repeat.
XZ_OF_WHEELS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
# float16 has two bytes a number: positions that alternate help LZMA (18.3 MB of MiniLM where the default gives 19.2).
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "lc": 1, "pb": 1}]
FAST = [{"id": lzma.FILTER_LZMA2, "preset": 0}]  # for a rehearsal
PYTHON = "3.12"
MAX_LENGTH, THINGS = 48, "common"  # of configs/scenes-64.yaml
CAPTIONS = 50_000
PROMPTS = Path(__file__).with_name("scene_prompts.txt")
# Package → what is used of it; modules that this does not load stay behind.
NEEDED = {
    "diffusers": """
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
    StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler, VQModel)
from diffusers.loaders import lora_conversion_utils
from diffusers.training_utils import EMAModel
from diffusers.utils import state_dict_utils
""",
    "peft": """
import peft.tuners.lora
from peft.utils.other import get_pattern_key
""",
}
# pydantic 1, inside of pydantic 2 for those who still need it; a plugin of mypy; proxies and browsers.
LEFT_OUT = ("pydantic/v1/", "pydantic/mypy.py", "urllib3/contrib/")


def write(folder: Path) -> None:
    """Writes the bundle.

    Raises:
        ValueError: if the folder is not empty, or the bundle is larger than MOST_BYTES.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the bundle")
    folder.mkdir(parents=True, exist_ok=True)
    write_wheels(folder / "wheels.tar.xz")
    write_text_encoder(folder, texts(), XZ)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: [len(data := (folder / name).read_bytes()), hashlib.sha256(data).hexdigest()] for name in names}
    size = sum(count for count, _ in files.values())
    content = {"bytes": size, "python": PYTHON, "commit": commit(), "files": files}
    (folder / "bundle.json").write_text(json.dumps(content, indent=1) + "\n")
    if size > MOST_BYTES:
        raise ValueError(f"the bundle takes {size:,} bytes, and {MOST_BYTES:,} may be")
    print(f"{folder}: {size / 1e6:.1f} MB in {len(files)} files")


def texts(count: int = CAPTIONS) -> list[str]:
    """Every word of the things that are trained on, every string of the grammar, the prompts of the card, and `count`
    captions from the first scene on to where their shares no longer change.

    A caption has no other words than these: its tokens are those of its words.
    """
    tier = TIERS[THINGS]
    words = {"", *COLORS, *map(str, range(10))}
    for thing in (thing for thing in load_catalog().things if thing.tier <= tier):
        words |= {thing.name, *thing.synonyms, *thing.kinds, *thing.classes, *thing.forms}
        words |= {plural for _, plural in thing.forms.values()} | {drawing.family for drawing in thing.drawings}
    for node in ast.walk(ast.parse(inspect.getsource(grammar))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(re.sub(r"{\w+}", " ", node.value))
    numbers = range(0, 2 * FEW_SINGLES_FROM, 2 * FEW_SINGLES_FROM // count)
    said = {training_scene(number, tier)[1] for number in numbers}
    return sorted(words | said | set(PROMPTS.read_text(encoding="utf-8").splitlines()))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def write_text_encoder(folder: Path, captions: list[str], filters: list[dict[str, int]] = FAST) -> None:
    """MiniLM with a vocabulary of the tokens of these captions alone: longest matches stay what they are."""
    encoder = load_text_encoder("minilm", MAX_LENGTH)
    special = [encoder.tokenizer.pad_token_id, encoder.tokenizer.unk_token_id, encoder.tokenizer.mask_token_id]
    ids = sorted({*special, *(token for row in encoder.tokenizer(captions).input_ids for token in row)})
    vocabulary = dict(zip(encoder.tokenizer.convert_ids_to_tokens(ids), range(len(ids)), strict=True))
    tensors = {name: tensor.half() for name, tensor in encoder.model.state_dict().items()}
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][ids]
    tensors["embeddings.position_embeddings.weight"] = tensors["embeddings.position_embeddings.weight"][:MAX_LENGTH]
    tensors = {name: tensor * ("pooler" not in name) for name, tensor in tensors.items()}  # no state depends on it
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / "text.safetensors.xz").write_bytes(lzma.compress(save(tensors), filters=filters))
    config = encoder.model.config.to_dict() | {"vocab_size": len(ids), "max_position_embeddings": MAX_LENGTH}
    (folder / "text.json").write_text(json.dumps({"config": config, "vocabulary": vocabulary}))


def read_text_encoder(bundle: Path, target: Path) -> None:
    """Writes the text encoder of a bundle as a folder of transformers."""
    content = json.loads((bundle / "text.json").read_text())
    model = transformers.BertModel(transformers.BertConfig(**content["config"]))
    model.load_state_dict(load(lzma.decompress((bundle / "text.safetensors.xz").read_bytes())))
    model.to(torch.float32).save_pretrained(target)
    tokenizer = transformers.BertTokenizer(vocab=content["vocabulary"])
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(target)


def write_wheels(path: Path) -> None:
    """Downloads the tested versions; needs the network."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", name]
        platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014")]
        pure = ["--platform=any", "--implementation=py", "--abi=none"]
        for wheels, kind in ((WHEELS, platforms), (PURE_WHEELS, pure)):
            wanted = [f"{wheel}=={version(wheel)}" for wheel in wheels]
            subprocess.run([*command, f"--python-version={PYTHON}", *kind, *wanted], check=True)
        with (
            lzma.open(path, "wb", filters=XZ_OF_WHEELS) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as tar,
        ):
            for wheel in sorted(Path(name).glob("*.whl")):
                package = wheel.name.partition("-")[0]
                add(tar, wheel.name, stored(wheel, modules_of(package) if package in NEEDED else None))


def modules_of(package: str) -> set[str]:
    """Paths inside its wheel of the modules that are loaded with what we use of it."""
    code = f"""import sys
{NEEDED[package]}
print(*(m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "{package}"), sep="\\n")"""
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    inside = f"/{package}/"
    return {inside[1:] + path.rpartition(inside)[2] for path in listed.split("\n") if inside in path}


def stored(wheel: Path, kept: set[str] | None) -> bytes:
    """The same wheel without compression, so that all of them can be compressed together; with `kept`, of its modules
    only these.
    """

    def stays(name: str) -> bool:
        return not name.startswith(LEFT_OUT) and (kept is None or name in kept or ".dist-info/" in name)

    data = io.BytesIO()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as packed:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = b"".join(line for line in content.splitlines(True) if stays(line.split(b",")[0].decode()))
            if entry.filename.endswith(".dist-info/METADATA"):
                content = content.partition(b"\n\n")[0] + b"\n"  # without the page of the registry
            if stays(entry.filename):
                packed.writestr(entry.filename, content)
    return data.getvalue()
