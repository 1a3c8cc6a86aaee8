"""Trains the built-in model on from its last release within a given time, and writes its average in float16.

    python -m tools.gpu_training FIGURES --out OUT --scratch FOLDER --seconds 400 --use BUNDLE
    python -m tools.gpu_training --join OUT --to runs/openmoji-64-gpu       # a pipeline folder of what came back

It starts from the averaged weights with a new optimizer, so the learning rate first rises; it is constant for three
quarters of the time; then the speed is known, and it falls to 0 in the rest (arXiv:2405.18392). Whatever ends a run
early, the newest checkpoint is written out. OUT gets weights in files of at most 15 MiB; the figures have their hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm import Pipeline, hub
from ldm.codecs import LatentCodec
from ldm.text import load_text_encoder
from ldm.training.interruption import EXIT_CODE as STOPPED
from tools import gpu_bundle

ROOT = Path(__file__).parents[1]
NAME = "openmoji-64"
FILE_BYTES, ALL_BYTES = 15 * 2**20, 60 * 2**20
CONSTANT_SHARE = 0.75
RESERVED = 40.0  # seconds for what is not counted: this program's start, the last checkpoint, the export
GRACE = 20.0  # of these, from SIGTERM to the end of the training script
WARMUP = 200


def prepare(scratch: Path, bundle: Path | None, most: int | None = None) -> dict[str, Any]:
    """Unpacks data and text encoder, writes the model to start from, and returns the config of the run; of the pictures
    at most `most` are used.
    """
    if bundle is None:
        bundle = scratch / "bundle"
        bundle.mkdir()
        gpu_bundle.write_training_data(bundle, most)
    gpu_bundle.unpack(bundle / "pictures.tar.xz", scratch / "pictures")
    if most is not None:
        table = scratch / "pictures" / "metadata.jsonl"
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:most]))
        for path in sorted((scratch / "pictures").glob("*.webp"))[most:]:
            path.unlink()
    gpu_bundle.read_text_encoder(bundle, scratch / "text")
    release = hub.find_pipeline(NAME)
    unet = hub.load_model(release / "unet", "UNet2DConditionModel")
    codec = hub.load_autoencoder(release / "vae")
    index = hub.read_json(release / "model_index.json")["_ldm"]
    Pipeline(
        unet=unet,  # type: ignore[arg-type]
        codec=LatentCodec(codec, source=release / "vae"),
        text_encoder=load_text_encoder(str(scratch / "text"), gpu_bundle.MAX_LENGTH),
        schedule=hub.load_schedule(release / "scheduler"),
        **index,
    ).save_pretrained(scratch / "start")
    base = yaml.safe_load((ROOT / "configs" / f"{NAME}.yaml").read_text())
    return {
        "output_dir": str(scratch / "run"),
        "start_from": str(scratch / "start"),
        "data": base["data"] | {"path": str(scratch / "pictures"), "held_out": 0, "cache_dir": str(scratch / "cache")},
        "sample": base["sample"],
        "train": base["train"]
        # The rate of the release, for eight times its batch.
        | {"batch_size": 256, "warmup_steps": WARMUP, "cooldown_steps": 0, "max_steps": 10**6, "evaluate_every": None}
        | {"validate_every": 10**6, "sample_every": 10**6, "checkpoint_every": 10**6, "checkpoint_minutes": 1.0},
    }


def train(config: dict[str, Any], scratch: Path, until: float, *arguments: str) -> tuple[int, str]:
    """Runs the training script until it ends, or until the time `until`, when it is told to save.

    Returns:
        The step of its newest checkpoint, and "" or what was wrong.
    """
    path = scratch / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    script = [sys.executable, str(ROOT / "train" / "train_ldm.py"), "--config", str(path), *arguments]
    process = subprocess.Popen(script, cwd=ROOT)
    wrong = ""
    try:
        code = process.wait(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code not in (0, STOPPED):
        wrong = f"train_ldm.py ended with {code}; the log has its output"
    return step_of(newest(scratch / "run")), wrong


def newest(run: Path) -> Path:
    found = sorted((run / "checkpoints").glob("step_*/manifest.json"))
    if not found:
        raise SystemExit("training wrote no checkpoint: it failed, or needs more seconds; the log has its output")
    return found[-1].parent


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def log_of(run: Path) -> list[dict[str, Any]]:
    """Its lines with a loss; a run that was ended early may have none."""
    path = run / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
    return [line for line in lines if "loss" in line]


def write_weights(pipeline: Path, out: Path, scratch: Path) -> dict[str, Any]:
    """The averaged UNet in float16 as files in `out`; returns their hashes."""
    unet = hub.load_model(pipeline / "unet", "UNet2DConditionModel")
    hub.save_model(scratch / "half", unet, torch.float16, FILE_BYTES)
    for path in out.glob("unet.*"):  # of an earlier call
        path.unlink()
    files = {}
    for path in sorted((scratch / "half").iterdir()):
        data = path.read_bytes()
        name = f"unet.{path.name}"
        (out / name).write_bytes(data)
        files[name] = [len(data), hashlib.sha256(data).hexdigest()]
    if sum(size for size, _ in files.values()) > ALL_BYTES:
        raise SystemExit(f"the weights take more than {ALL_BYTES:,} bytes; nothing is lost, they lie in {out}")
    return files


def join(out: Path, target: Path) -> Path:
    """A pipeline folder of the built-in model with the weights in `out`.

    Raises:
        ValueError: naming the file that is missing or whose bytes are not those that were trained.
    """
    parts = hub.read_json(out / "gpu.json")["parts"]
    records = [f for f in parts.get("training", {}).get("figures", []) if f["name"] == "weights"]
    if not records:
        raise ValueError(f"{out / 'gpu.json'} tells of no weights; run the part training first")
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder")
    for name, (_, sha256) in records[-1]["files"].items():
        if not (out / name).is_file() or hashlib.sha256((out / name).read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{out / name} is missing or is not the file that was trained; copy it again")
    hub.link_tree(hub.find_pipeline(NAME), target)
    shutil.rmtree(target / "unet")
    (target / "unet").mkdir()
    for name in records[-1]["files"]:
        shutil.copyfile(out / name, target / "unet" / name.removeprefix("unet."))
    hub.load_model(target / "unet", "UNet2DConditionModel")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--use", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--join", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.join:
        try:
            print(join(arguments.join, arguments.to or Path("runs") / f"{NAME}-gpu"))
        except ValueError as error:
            parser.error(str(error))
        return
    started = time.monotonic()
    end = started + arguments.seconds - RESERVED
    scratch = arguments.scratch / "training"
    scratch.mkdir()

    def record(name: str, **facts: Any) -> None:
        with arguments.figures.open("a") as file:
            file.write(json.dumps({"name": name, **facts}) + "\n")

    config = prepare(scratch, arguments.use, 16 if arguments.rehearse else None)
    record("prepared", value=round(time.monotonic() - started, 1), unit="s")
    if arguments.rehearse:
        config["train"] |= {"batch_size": 2, "max_steps": 2, "warmup_steps": 1, "log_every": 1}
        config["sample"] |= {"prompts": ["a cat"], "images_per_prompt": 1, "num_inference_steps": 2}
    run, batch = scratch / "run", config["train"]["batch_size"]
    begun = time.monotonic()
    step, wrong = train(config, scratch, begun + CONSTANT_SHARE * (end - begun))
    log = log_of(run)
    took = time.monotonic() - begun
    speed = log[-1]["samples_per_second"] / batch if log else step / took
    record("constant rate", value=step, unit="steps", samples_per_second=speed * batch, seconds=round(took, 1))
    # The second start encodes nothing, so it takes no longer than the first.
    left = end - time.monotonic() - (took - step / speed)
    more = 2 if arguments.rehearse else int(0.95 * speed * left)
    last = step
    if more < 1:
        wrong = wrong or "no time was left for the falling rate"
    if not wrong:
        warmup = min(config["train"]["warmup_steps"], step)  # a slow machine has not come to its end
        config["train"] |= {"max_steps": step + more, "cooldown_steps": more, "warmup_steps": warmup}
        last, wrong = train(config, scratch, end, "--resume", "--accept", "train.warmup_steps")
        record("falling rate", value=last - step, unit="steps", planned=more, samples=last * batch)
    files = write_weights(newest(run) / "pipeline", arguments.out, scratch)
    record("weights", value=len(files), unit="files", files=files, step=last)
    if wrong:
        record("training ended early", failed=wrong)
    if log := log_of(run):
        record("loss", value=log[-1]["loss"], first=log[0]["loss"], unit="mean square")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
