"""Times the training script of diffusers as it lies in a checkout, and our training step beside it.

    python -m tools.gpu_peer figures.jsonl --peer DIFFUSERS --scratch FOLDER --seconds 90
    python -m tools.gpu_peer figures.jsonl --peer DIFFUSERS --scratch FOLDER --rehearse

`examples/text_to_image/train_text_to_image.py` trains random weights of the size of Stable Diffusion 1.5 in bf16 with
EMA, on a folder of images that is made for it. A step of it loads images and encodes them and their captions.
`tools/gpu.py --peer` runs this as a part of its own.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = Path("examples", "text_to_image", "train_text_to_image.py")
WARMUP, STEPS = 3, 7


def check(checkout: Path) -> Path:
    """The script, if it can run here.

    Raises:
        ValueError: if the script, a library that it imports, or its version of diffusers is missing.
    """
    script = checkout / SCRIPT
    try:
        source = script.read_text(encoding="utf-8")
        statements = ast.parse(source).body
    except OSError as error:
        raise ValueError(f"{script}: {error.strerror}; name a checkout of diffusers with --peer") from error
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{script} is no Python ({error}); name a checkout of diffusers with --peer") from error
    names = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in statements if isinstance(node, ast.ImportFrom) and node.module}
    packages = sorted({name.partition(".")[0] for name in names})
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{SCRIPT.name} imports {', '.join(missing)}, not installed here; install it to run the peer")
    import diffusers
    from packaging.version import InvalidVersion, Version

    try:
        needed = re.search(r"check_min_version\([\"'](.+?)[\"']\)", source)
        older = needed is not None and Version(diffusers.__version__) < Version(needed[1])
    except InvalidVersion as error:
        raise ValueError(f"{script} asks for a version of diffusers that is none: {error}") from error
    if older:
        raise ValueError(
            f"{SCRIPT.name} asks for diffusers {needed[1]} and {diffusers.__version__} is installed; check out the tag "
            f"v{diffusers.__version__} there, or put {checkout / 'src'} on PYTHONPATH"
        )
    return script


def write_model(folder: Path, size: Any, device: Any) -> None:
    """Random weights as the folders of a Stable Diffusion."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from tools.gpu_benchmark import write_text_folders

    with torch.device(device):
        UNet2DConditionModel(**size.unet).save_pretrained(folder / "unet")
        AutoencoderKL(**size.vae).save_pretrained(folder / "vae")
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    write_text_folders(folder, size)


def write_images(folder: Path, side: int, count: int) -> None:
    """Smooth noise as JPEG with captions; enough of them for one epoch, as a new one starts its workers anew."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8))
        small.resize((side, side)).save(folder / f"{i:04d}.jpg", quality=90)
    rows = [json.dumps({"file_name": f"{i:04d}.jpg", "text": f"picture {i}"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def run(script: Path, scratch: Path, size: Any, seconds: float, marks: int, workers: int) -> dict[str, Any]:
    """Runs the script for `marks` steps and returns what `tools.gpu_steps` wrote.

    Raises:
        ValueError: with the last line of the script's output, or the time that it took too long for.
    """
    side = size.side * size.vae["sample_size"] // size.unet["sample_size"]
    write_images(scratch / "images", side, size.batch * (marks + 1))
    options = {
        "pretrained_model_name_or_path": scratch / "model", "train_data_dir": scratch / "images",
        "output_dir": scratch / "trained", "cache_dir": scratch / "cache", "resolution": side,
        "train_batch_size": size.batch, "max_train_steps": marks + 1, "learning_rate": 1e-4, "lr_warmup_steps": 0,
        "mixed_precision": "bf16", "dataloader_num_workers": workers, "checkpointing_steps": 10**6, "seed": 0,
    }  # fmt: skip
    written = scratch / "steps.json"
    command = [sys.executable, "-m", "tools.gpu_steps", str(written), str(marks), str(script)]
    command += [f"--{key}={value}" for key, value in options.items()] + ["--use_ema", "--allow_tf32", "--center_crop"]
    output = scratch / "output.txt"
    with output.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
            wrong = f"{SCRIPT.name} ended with {code}"
        except subprocess.TimeoutExpired:
            code, wrong = 1, f"{SCRIPT.name} was ended after {seconds:.0f} s"
    text = output.read_text(errors="replace")
    print(text, flush=True)
    if not written.is_file():
        # A progress bar writes over its line, and once more at the end.
        lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]
        raise ValueError(f"{wrong}: {lines[-1][:300] if lines else 'without a message'}")
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a line of JSON for each figure is added to this file")
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for what is made and thrown away")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    record: dict[str, Any] = {"name": f"training step of {SCRIPT.name}"}

    def end(wrong: str) -> None:
        with arguments.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"failed": " ".join(wrong.split())}) + "\n")
        sys.exit(wrong)

    try:
        script = check(arguments.peer)
        # Of what the benchmark needs, diffusers may be missing.
        from tools import gpu_benchmark as benchmark

        size = benchmark.TINY if arguments.rehearse else benchmark.STABLE_DIFFUSION
        bench = benchmark.start(arguments.file, deadline, arguments.rehearse)
        scratch = arguments.scratch / "peer"
        scratch.mkdir()
        write_model(scratch / "model", size, bench.device)
        bench.release()
        warmup, steps = (1, 2) if arguments.rehearse else (WARMUP, STEPS)
        workers = 0 if arguments.rehearse else min(4, os.cpu_count() or 1)
        # Our own step needs some seconds after it.
        seconds = max(1.0, 0.8 * (deadline - time.monotonic()))
        found = run(script, scratch, size, seconds, warmup + steps, workers)
    except Exception as error:  # whatever it is: one line that says it
        end(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    facts = {"batch": size.batch, "latents": size.side, "precision": "bf16"}
    times = found["milliseconds"][warmup:]
    theirs = {"median": statistics.median(times), "min": min(times), "max": max(times), "repeats": len(times)}
    memory = {"script": found["peak_bytes_above_weights"]} if "peak_bytes_above_weights" in found else {}
    record |= {"name": f"{size.name}: {record['name']}", **facts, "workers": workers}
    bench.write(record | {"milliseconds": {"script": theirs}, "ratios": {}, "peak_bytes_above_weights": memory})
    bench.group(benchmark.training_steps, size, size.side)
    last = json.loads(arguments.file.read_text().splitlines()[-1])
    if "milliseconds" in last:
        value = round(last["milliseconds"]["ours"]["median"] / theirs["median"], 3)
        bench.write({"name": f"{size.name}: ours per {SCRIPT.name}", "value": value, "unit": "of its time", **facts})


if __name__ == "__main__":
    main()
