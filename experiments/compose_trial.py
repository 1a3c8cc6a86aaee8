"""Trains on OpenMoji with and without `data.compose`, in the same steps, and measures what was learned.

    python experiments/compose_trial.py --steps 6000
    python experiments/compose_trial.py --shares 0,0.15,0.3,0.6 --set train.batch_size=16
    python experiments/compose_trial.py --measure-only                      # of runs that are there

OUTPUT/SHARE/            a run of configs/openmoji-64.yaml; one that was broken off goes on
OUTPUT/SHARE.json        `ldm evaluate`: captions of training and held-out images, suspects of memorization
OUTPUT/SHARE-unseen.json experiments/unseen_phrasings.py
OUTPUT/trial.json        the three figures of each, side by side
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm import hub

ROOT = Path(__file__).parents[1]
# Joined captions need more tokens than those of single emoji; both runs get them.
SETTINGS = ("text.max_length=32", "train.evaluate_every=null", "train.keep_checkpoints=1")


def train(folder: Path, share: float, steps: int, more: Sequence[str]) -> None:
    settings = [f"output_dir={folder}", f"data.compose={share}", f"train.max_steps={steps}", *SETTINGS, *more]
    script, config = ROOT / "train" / "train_ldm.py", ROOT / "configs" / "openmoji-64.yaml"
    subprocess.run([sys.executable, script, "--config", config, "--resume", "--set", *settings], check=True)


def measure(folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """What `ldm evaluate` and experiments/unseen_phrasings.py say of a run; the files stand beside it."""
    program = [sys.executable, "-c", "from ldm.cli import main; main()", "evaluate", str(folder)]
    told = subprocess.run(
        [*program, "--json", "--samples", str(samples), "--steps", str(steps)], check=True, stdout=subprocess.PIPE
    ).stdout
    found = json.loads(told)
    hub.write_json(folder.with_name(f"{folder.name}.json"), found)
    unseen = folder.with_name(f"{folder.name}-unseen.json")
    script = ROOT / "experiments" / "unseen_phrasings.py"
    model = ["--model", folder / "pipeline", "--steps", str(steps), "-o", unseen]
    subprocess.run([sys.executable, script, *model], check=True)
    return found | {"unseen": hub.read_json(unseen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compose-trial"))
    parser.add_argument("--shares", default="0,0.3", help="of samples that are composed, each a run")
    parser.add_argument("--steps", type=int, default=6000, help="of training")
    parser.add_argument("--samples", type=int, default=256, help="pictures that are measured")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config, for all runs")
    arguments = parser.parse_args()
    shares = [float(share) for share in arguments.shares.split(",")]
    # A run goes on with an absolute folder from wherever this is called.
    folders = {share: arguments.output.resolve() / f"{share:g}" for share in shares}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for share, folder in folders.items():
        if not arguments.measure_only:
            train(folder, share, arguments.steps, arguments.set)
    told = {}
    for share, folder in folders.items():
        found = measure(folder, arguments.samples, arguments.sampling_steps)
        told[f"{share:g}"] = {"retrieval": found["retrieval"], "copying": found["copying"], "unseen": found["unseen"]}
    hub.write_json(arguments.output / "trial.json", told)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
