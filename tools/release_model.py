"""Makes the built-in model of a run: half precision, files small enough for any host, the text encoder by its name.

    python tools/release_model.py runs/scenes-64 --guidance 3 --steps 50

Writes ldm/assets/NAME, with the model card docs/NAME.md as its README.md, and with the config of the run and the digest
of its data, so that `ldm evaluate NAME` knows what was held out; of scenes also how many the model was shown, so that
training can go on with others: `data.first_scene`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from ldm import Pipeline, hub
from ldm.training import run_info

ROOT = Path(__file__).parents[1]
FILE_BYTES = 15 * 2**20
ALL_BYTES = 30 * 10**6
PROMPTS = "prompts.txt"


def release(run: Path, target: Path, card: Path, guidance: float | None, steps: int | None) -> int:
    """The model of a run as a folder that is small; returns its bytes.

    Raises:
        ValueError: if there is no such model, or it takes more than ALL_BYTES; an older one stands then.
    """
    if not card.is_file():
        raise ValueError(f"{card} is missing; a model without a card is not released")
    found = run_info.find_run(str(run))
    if found is None or found.sha256 is None:
        raise ValueError(f"{run} is no run folder with a checkpoint; name one that train/train_ldm.py has written")
    pipeline = Pipeline.from_pretrained(run / "pipeline")
    pipeline.guidance_scale = pipeline.guidance_scale if guidance is None else guidance
    pipeline.num_inference_steps = pipeline.num_inference_steps if steps is None else steps
    with hub.atomic_folder(target) as aside:
        pipeline.save_pretrained(aside, dtype=torch.float16, shard_bytes=FILE_BYTES, text_encoder="reference")
        shutil.copyfile(card, aside / "README.md")
        shutil.copyfile(run / "config.yaml", aside / run_info.CONFIG)
        if (target / PROMPTS).is_file():  # for prior preservation, `ldm.training.prior`
            shutil.copyfile(target / PROMPTS, aside / PROMPTS)
        data = {"samples": found.samples, "sha256": found.sha256, "scenes": found.scenes}
        hub.write_json(aside / run_info.DATA, {key: value for key, value in data.items() if value is not None})
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        if size > ALL_BYTES:
            raise ValueError(f"the model takes {size:,} bytes, and {ALL_BYTES:,} may be; train a smaller one")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", choices=hub.BUILT_IN_PIPELINES, default="scenes-64")
    parser.add_argument("--guidance", type=float, help="the default guidance scale; else that of the run")
    parser.add_argument("--steps", type=int, help="the default number of steps; else that of the run")
    arguments = parser.parse_args()
    target, card = hub.BUILT_IN_PIPELINES[arguments.name], ROOT / "docs" / f"{arguments.name}.md"
    try:
        size = release(arguments.run, target, card, arguments.guidance, arguments.steps)
    except ValueError as error:
        parser.error(str(error))
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
