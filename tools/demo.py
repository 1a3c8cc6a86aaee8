"""The main job from end to end: draws with the built-in model, then trains on real captioned images from scratch, in
pixels and in latents, and draws with that.

    make demo        or        python tools/demo.py

Leaves `runs/first-picture.png` and `runs/gallery.png`, `runs/digits/pipeline` and `runs/digits-latent/pipeline`, and
for each of these a sheet of pictures beside real ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from ldm.data import DataConfig, split
from ldm.data.builtin import digit_captions
from ldm.data.layouts import open_source
from ldm.evaluation.prompt_alignment import DigitClassifier, digit_of
from ldm.pipelines import Pipeline, contact_sheet, save_png

ROOT = Path(__file__).parents[1]
STARTED = time.perf_counter()
EACH, STEPS = 50, 25
FIRST = "three apples"


def say(text: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - STARTED), 60)
    print(f"[{minutes:02d}:{seconds:02d}] {text}", flush=True)


def launch(script: str, config: str) -> None:
    arguments = [f"train/{script}", "--config", f"configs/{config}"]
    say(f"accelerate launch {' '.join(arguments)}")
    # What accelerate would otherwise say in six lines that it assumes.
    assumed = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *assumed, *arguments]
    subprocess.run(command, cwd=ROOT, check=True)


def generate_digits(
    pipeline: Pipeline, each: int, *, num_inference_steps: int, batch_size: int = 100
) -> tuple[list[Image.Image], list[int]]:
    """`each` images of every digit, over all its phrasings in turn, and the digits; seeds 0, 1, …"""
    digits = [digit for digit in range(10) for _ in range(each)]
    prompts = [digit_captions(digit)[i % len(digit_captions(digit))] for digit in range(10) for i in range(each)]
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        images += pipeline(
            prompts[start : start + batch_size], seed=start, num_inference_steps=num_inference_steps
        ).images
    return images, digits


def generate_and_classify(run: str) -> tuple[float, float]:
    """Generates 500 digits, writes the sheet, and returns a classifier's accuracies: (generated, real held-out)."""
    source = open_source(DataConfig(path="digits", resolution=8))
    training, held_out = split(source.samples, 0.1)
    classifier = DigitClassifier.fit(training)
    pipeline = Pipeline.from_pretrained(ROOT / "runs" / run / "pipeline")
    images, digits = generate_digits(pipeline, EACH, num_inference_steps=STEPS)

    rows, captions = [], []
    size = images[0].size
    for digit in range(10):
        real = [sample.load().resize(size, 3) for sample in training if digit_of(sample) == digit][:6]
        rows.append([image for image, prompted in zip(images, digits, strict=True) if prompted == digit][:10] + real)
        captions.append(f"{digit_captions(digit)[0]}: ten generated, then six real scans")
    path = ROOT / "runs" / run / "sheet.png"
    save_png(contact_sheet(rows, captions, size=64), path)
    say(f"images: {path.relative_to(ROOT)}")
    real_accuracy = classifier.accuracy(
        [sample.load() for sample in held_out], [digit_of(sample) for sample in held_out]
    )
    return classifier.accuracy(images, digits), real_accuracy


def draw_first() -> None:
    """A picture from the built-in model at once, then those of the README."""
    picture, sheet = "runs/first-picture.png", "runs/gallery.png"
    (ROOT / "runs").mkdir(exist_ok=True)
    say(f'ldm generate "{FIRST}" --seed 0 -o {picture}')
    generate = [sys.executable, "-m", "ldm.cli", "generate", FIRST, "--seed", "0", "-o", picture]
    subprocess.run(generate, cwd=ROOT, check=True)
    say(f"that was the built-in model; twelve more prompts: tools/gallery.py -o {sheet}")
    subprocess.run([sys.executable, "tools/gallery.py", "-o", sheet], cwd=ROOT, check=True)
    say("now models of digits are trained from scratch")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw_first()
    launch("train_ldm.py", "digits.yaml")
    pixel, real = generate_and_classify("digits")
    say(f"in pixels, {pixel:.1%} of {10 * EACH} images are classified as the prompted digit")
    launch("train_autoencoder.py", "digits-first-stage.yaml")
    launch("train_ldm.py", "digits-latent.yaml")
    latent, real = generate_and_classify("digits-latent")
    print(
        f"\nClassified as the prompted digit, by a classifier fitted to the real training scans ({STEPS} DDIM steps):\n"
        f"  real held-out scans        {real:6.1%}\n"
        f"  drawn by runs/digits       {pixel:6.1%}   (pixels)\n"
        f"  drawn by runs/digits-latent{latent:6.1%}   (latents)\n\n"
        "Now draw your own:\n"
        '  .venv/bin/ldm generate "a handwritten three" --model runs/digits/pipeline -n 4 -o three.png'
    )
    say("done")


if __name__ == "__main__":
    main()
