"""Checks a real Stable Diffusion 1.x/2.x model here against diffusers, for people who have its weights.

    python tools/check_sd15.py stable-diffusion-v1-5/stable-diffusion-v1-5      # or a folder; needs the extra `lora`
    python tools/check_sd15.py FOLDER --output check --steps 20 --size 512

1. Both draw the same prompts from the same noise, with DDIM and guidance: the images are compared.
2. A LoRA is trained for 20 steps on these images, and loaded in both: the images are compared again.

Writes `images.png` (each row: here, diffusers, and the same with the LoRA) and `result.json` into the output folder.
Exit code 1 if images differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.config import LDMConfig, parse_config
from ldm.hub import find_pipeline
from ldm.models.similarity import psnr
from ldm.pipelines import Pipeline, contact_sheet, save_png
from ldm.pipelines.pipeline import default_device
from ldm.training.launch import train

PROMPTS = ("a photo of a dog on a beach", "a red bicycle against a brick wall")
GUIDANCE = 7.5
LORA_STEPS = 20
# dB between 8-bit images of the two: float32 gives 50 or more; in half precision rounding errors grow over the steps.
MIN_PSNR = {torch.float32: 40.0, torch.float16: 20.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of diffusers, or a hub id")
    parser.add_argument("--output", type=Path, default=Path("check_sd15"))
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--size", type=int, help="side in pixels; that of the model by default")
    parser.add_argument("--half", action="store_true", help="draw in float16, for a GPU of 8 GB")
    arguments = parser.parse_args()
    try:
        differing = check(arguments.model, arguments.output, arguments.steps, arguments.size, arguments.half)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(1 if differing else 0)


def check(model: str, output: Path, steps: int, size: int | None, half: bool) -> list[str]:
    """Returns the comparisons in which the images differ."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    if steps < 1:
        raise ValueError(f"--steps is {steps}; it must be at least 1")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name another folder with --output")
    device, dtype = default_device(), torch.float16 if half else torch.float32
    folder = find_pipeline(model)
    ours = Pipeline.from_pretrained(folder, device=device, dtype=dtype)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype).to(device)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    side = size or ours.default_size[0]
    shape = ours.codec.latent_shape(side, side)
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {"model": model, "device": str(device), "dtype": str(dtype), "size": side, "steps": steps}
    columns: list[list[Image.Image]] = []

    def compare(name: str) -> None:
        settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "height": side, "width": side, "eta": 0.0}
        started = time.perf_counter()
        here = ours(PROMPTS, latents=noise, sampler="ddim", **settings).images
        middle = time.perf_counter()
        there = theirs(list(PROMPTS), latents=noise.to(device, dtype), **settings).images
        result[f"{name}_psnr"] = [round(ratio_of(a, b), 1) for a, b in zip(here, there, strict=True)]
        result[f"{name}_seconds"] = {"ldm": middle - started, "diffusers": time.perf_counter() - middle}
        columns.extend([here, there])
        print(f"{name}: PSNR {result[f'{name}_psnr']} dB between ldm and diffusers", flush=True)

    compare("model")
    data, run = output / "images", output / "run"
    data.mkdir(parents=True)
    for index, (prompt, image) in enumerate(zip(PROMPTS, columns[0], strict=True)):
        image.save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(prompt)
    content = {
        "output_dir": str(run),
        "start_from": str(folder),
        "finetune": {"method": "lora"},
        "data": {"path": str(data), "resolution": side, "held_out": 0.0},
        "train": {
            "max_steps": LORA_STEPS,
            "batch_size": 1,
            "learning_rate": 1e-3,  # so that 20 steps are visible
            "warmup_steps": 0,
            "mixed_precision": "bf16" if device.type == "cuda" else "no",
            "ema_decay": 0.0,
            "sample_every": LORA_STEPS,
            "checkpoint_every": LORA_STEPS,
        },
        "sample": {"prompts": PROMPTS[:1], "images_per_prompt": 1, "num_inference_steps": steps},
    }
    trained = train(parse_config(content, LDMConfig, "check_sd15"))
    ours.load_lora(trained.export)
    theirs.load_lora_weights(trained.export)
    compare("lora")
    result["lora_change_psnr"] = [round(ratio_of(*pair), 1) for pair in zip(columns[0], columns[2], strict=True)]
    print(f"the LoRA changes the images: PSNR {result['lora_change_psnr']} dB to those without")
    save_png(contact_sheet([list(row) for row in zip(*columns, strict=True)], PROMPTS), output / "images.png")
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    differing = [name for name in ("model", "lora") if min(result[f"{name}_psnr"]) < MIN_PSNR[dtype]]
    print(f"{'DIFFERENT: ' + ', '.join(differing) if differing else 'the same'}; {output / 'images.png'}")
    return differing


def ratio_of(first: Image.Image, second: Image.Image) -> float:
    """PSNR of two images of one size, in dB; 120 for equal ones."""
    a, b = (torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)[None] for image in (first, second))
    return float(psnr(a, b))


if __name__ == "__main__":
    main()
