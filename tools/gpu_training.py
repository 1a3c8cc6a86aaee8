"""Trains `scenes-64` from a given model, within a given time, and writes its EMA in float16.

    python -m tools.gpu_training FIGURES --out OUT --scratch FOLDER --seconds 400 --use BUNDLE
    python -m tools.gpu_training --join OUT --to runs/scenes-64-gpu       # a pipeline folder of what came back

It starts from EMA weights with a new optimizer, so the learning rate first rises; it is constant for three quarters of
the time; then the speed is known, and it falls to 0 in the rest (arXiv:2405.18392). Its scenes come after those that
the model to start from was shown. If anything ends the run early, the newest checkpoint is written out.
OUT gets weights in files of at most 15 MiB; the figures have their hashes.
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
from ldm.environment import usable_cores
from ldm.text import load_text_encoder
from ldm.training import run_info
from ldm.training.distributed import EXIT_CODE as STOPPED
from tools import gpu_bundle

ROOT = Path(__file__).parents[1]
NAME = "scenes-64"  # of the config
START = "scenes-64"
FILE_BYTES, ALL_BYTES = 15 * 2**20, 60 * 2**20
# Of the time. A start takes 50 s on an H200, and the falling rate brings the most: with 0.75 it had 41 of 680 steps.
CONSTANT_SHARE = 0.45
RESERVED = 40.0  # seconds for what is not counted: this program's start, the last checkpoint, the export
GRACE = 20.0  # of these, from SIGTERM to the end of the training script
WARMUP = 200
# Epochs that show the same scenes: with 8, 15 processes rendered and loaded 4,400 samples per second, and the card can
# take 8,000.
RENEW_EVERY = 16


def prepare(scratch: Path, bundle: Path | None, start: Path, first_scene: int) -> dict[str, Any]:
    """Unpacks the text encoder, writes the model to start from, and returns the config of the run."""
    if bundle is None:
        bundle = scratch / "bundle"
        bundle.mkdir()
        gpu_bundle.write_text_encoder(bundle, gpu_bundle.texts(1000))
    gpu_bundle.read_text_encoder(bundle, scratch / "text")
    unet = hub.load_model(start / "unet", "UNet2DConditionModel")
    codec = hub.load_autoencoder(start / "vae")
    index = hub.read_json(start / "model_index.json")["_ldm"]
    Pipeline(
        unet=unet,  # type: ignore[arg-type]
        codec=LatentCodec(codec, source=start / "vae"),
        text_encoder=load_text_encoder(str(scratch / "text"), gpu_bundle.MAX_LENGTH),
        schedule=hub.load_schedule(start / "scheduler"),
        **index,
    ).save_pretrained(scratch / "start")
    base = yaml.safe_load((ROOT / "configs" / f"{NAME}.yaml").read_text())
    return {
        "output_dir": str(scratch / "run"),
        "start_from": str(scratch / "start"),
        "data": base["data"]
        | {"first_scene": first_scene, "renew_every": RENEW_EVERY, "cache_dir": str(scratch / "cache")},
        "sample": base["sample"],
        "train": base["train"]
        # A step of 1,024 takes 0.13 s on an H200 and one of 256 0.08 s: the time is that of starting kernels.
        | {
            "batch_size": 1024,
            "learning_rate": 1.5 * base["train"]["learning_rate"],
            "num_workers": max(1, usable_cores() - 1),
            "warmup_steps": WARMUP,
            "cooldown_steps": 0,
            "max_steps": 10**6,
            "evaluate_every": None,
        }
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


def speed_of(log: list[dict[str, Any]]) -> float:
    """Samples a second in the later half of the lines: those with new scenes are slower than those with known ones."""
    rates = [line["samples_per_second"] for line in log[len(log) // 2 :]]
    return len(rates) / sum(1 / rate for rate in rates)


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


def released(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Of the trained model what a release says of its data."""
    found = run_info.find_run(str(run))
    assert found is not None
    data = {key: value for key, value in config["data"].items() if key != "cache_dir"}
    return {
        "config": {"data": data, "train": config["train"]},
        "trained_on": {"samples": found.samples, "sha256": found.sha256, "scenes": found.scenes},
    }


def join(out: Path, target: Path, start: Path) -> Path:
    """The model `start` with the weights in `out`, and with the config and the data that they were trained on.

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
    hub.link_tree(start, target)
    shutil.rmtree(target / "unet")
    (target / "unet").mkdir()
    for name in records[-1]["files"]:
        shutil.copyfile(out / name, target / "unet" / name.removeprefix("unet."))
    config = yaml.safe_load((ROOT / "configs" / f"{NAME}.yaml").read_text()) | records[-1]["config"]
    for name in (run_info.CONFIG, run_info.DATA):
        (target / name).unlink(missing_ok=True)  # links to files of the model that it continued
    (target / run_info.CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    hub.write_json(target / run_info.DATA, records[-1]["trained_on"])
    hub.load_model(target / "unet", "UNet2DConditionModel")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--use", type=Path)
    parser.add_argument("--start", default=START, help="model to start from: a pipeline folder with latents")
    parser.add_argument("--first-scene", type=int, help="first new scene; recorded in released models")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--join", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.join:
        try:
            target = arguments.to or Path("runs") / f"{NAME}-gpu"
            print(join(arguments.join, target, hub.find_pipeline(arguments.start)))
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

    known = run_info.find_run(arguments.start)
    first_scene = arguments.first_scene or (known and known.scenes) or 0
    config = prepare(scratch, arguments.use, hub.find_pipeline(arguments.start), first_scene)
    record("prepared", value=round(time.monotonic() - started, 1), unit="s")
    if arguments.rehearse:
        config["data"] |= {"scenes": 8}
        config["train"] |= {"batch_size": 2, "max_steps": 2, "warmup_steps": 1, "log_every": 1, "num_workers": 1}
        config["sample"] |= {"prompts": ["a cat"], "images_per_prompt": 1, "num_inference_steps": 2}
    run, batch = scratch / "run", config["train"]["batch_size"]
    begun = time.monotonic()
    step, wrong = train(config, scratch, begun + CONSTANT_SHARE * (end - begun))
    log = log_of(run)
    took = time.monotonic() - begun
    speed = speed_of(log) / batch if log else step / took
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
    record("weights", value=len(files), unit="files", files=files, step=last, **released(run, config))
    if wrong:
        record("training ended early", failed=wrong)
    if log := log_of(run):
        record("loss", value=log[-1]["loss"], first=log[0]["loss"], unit="mean square")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
