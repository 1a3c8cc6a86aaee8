"""The main job from end to end: draws with the built-in model, then trains on real captioned images from scratch, in
pixels and in latents, and draws with that.

    make demo        or        python tools/demo.py

Leaves `runs/first-picture.png` and `runs/gallery.png`, `runs/digits/pipeline` and `runs/digits-latent/pipeline`, and
for each of these a sheet of pictures beside real ones.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ldm.data import DataConfig, open_source, split
from ldm.data.builtin import digit_captions
from ldm.evaluation.digits import DigitReader, draw_digits, label
from ldm.pipelines import Pipeline, contact_sheet, save_png

ROOT = Path(__file__).parents[1]
STARTED = time.perf_counter()
EACH, STEPS = 50, 25
FIRST = "a corgi wearing a hat"


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


def draw_and_judge(run: str) -> tuple[float, float]:
    """Draws 500 digits, writes the sheet, and returns how many are read right: (drawn, real held-out)."""
    source = open_source(DataConfig(path="digits", resolution=8))
    training, held_out = split(source.samples, 0.1)
    reader = DigitReader.fit(training)
    pipeline = Pipeline.from_pretrained(ROOT / "runs" / run / "pipeline")
    pictures, digits = draw_digits(pipeline, EACH, num_inference_steps=STEPS)

    rows, captions = [], []
    size = pictures[0].size
    for digit in range(10):
        real = [sample.load().resize(size, 3) for sample in training if label(sample) == digit][:6]
        rows.append([picture for picture, asked in zip(pictures, digits, strict=True) if asked == digit][:10] + real)
        captions.append(f"{digit_captions(digit)[0]}: ten drawn, then six real scans")
    path = ROOT / "runs" / run / "sheet.png"
    save_png(contact_sheet(rows, captions, size=64), path)
    say(f"pictures: {path.relative_to(ROOT)}")
    real_accuracy = reader.accuracy([sample.load() for sample in held_out], [label(sample) for sample in held_out])
    return reader.accuracy(pictures, digits), real_accuracy


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
    draw_first()
    launch("train_ldm.py", "digits.yaml")
    pixel, real = draw_and_judge("digits")
    say(f"in pixels, {pixel:.1%} of {10 * EACH} pictures are read as the digit asked for")
    launch("train_autoencoder.py", "digits-first-stage.yaml")
    launch("train_ldm.py", "digits-latent.yaml")
    latent, real = draw_and_judge("digits-latent")
    print(
        f"\nRead as the digit asked for, by a classifier fitted to the real training scans ({STEPS} DDIM steps):\n"
        f"  real held-out scans        {real:6.1%}\n"
        f"  drawn by runs/digits       {pixel:6.1%}   (pixels)\n"
        f"  drawn by runs/digits-latent{latent:6.1%}   (latents)\n\n"
        "Now draw your own:\n"
        '  .venv/bin/ldm generate "a handwritten three" --model runs/digits/pipeline -n 4 -o three.png'
    )
    say("done")


if __name__ == "__main__":
    main()
