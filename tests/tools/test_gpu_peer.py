"""The training script of diffusers is timed as it is; what keeps it from running is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tools import gpu_steps
from tools.gpu import ROOT
from tools.gpu_peer import SCRIPT, check

STEPS = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(int(sys.argv[1])):
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
# Of the real one's arguments those that tell it what to do; the rest must be there.
LIKE_THE_REAL_ONE = """
import json, sys
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from pathlib import Path
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer
given = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:])
model, images = (Path(given[key]) for key in ("pretrained_model_name_or_path", "train_data_dir"))
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
AutoencoderKL.from_pretrained(model, subfolder="vae")
DDPMScheduler.from_pretrained(model, subfolder="scheduler")
CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
assert Image.open(images / rows[0]["file_name"]).size == (int(given["resolution"]),) * 2
assert len(rows) >= int(given["train_batch_size"]) * int(given["max_train_steps"])
optimizer = torch.optim.AdamW(unet.parameters())
for step in range(int(given["max_train_steps"])):
    optimizer.step()
"""


def checkout(folder: Path, source: str) -> Path:
    (folder / SCRIPT).parent.mkdir(parents=True)
    (folder / SCRIPT).write_text(source)
    return folder


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="name a checkout of diffusers with --peer"):
        check(tmp_path)
    with pytest.raises(ValueError, match="is no Python"):
        check(checkout(tmp_path / "page", "<!DOCTYPE html>"))
    source = "import json\nimport no_such_library.of_ours\nfrom nowhere.at import all\nif 0:\n    import wandb\n"
    with pytest.raises(ValueError, match="imports no_such_library, nowhere, not installed here"):
        check(checkout(tmp_path / "libraries", source))
    with pytest.raises(ValueError, match=f"asks for diffusers 99.0.0.dev0.*check out the tag v{diffusers.__version__}"):
        check(checkout(tmp_path / "newer", 'check_min_version("99.0.0.dev0")\n'))
    found = check(checkout(tmp_path / "older", 'check_min_version("0.30.0")\nimport torch\n'))
    assert found == tmp_path / "older" / SCRIPT


def run_steps(monkeypatch, tmp_path, wanted: int, made: int) -> Path:
    (tmp_path / "script.py").write_text(STEPS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        sys, "argv", ["gpu_steps", str(tmp_path / "steps.json"), str(wanted), str(tmp_path / "script.py"), str(made)]
    )
    gpu_steps.main()
    return tmp_path / "steps.json"


def test_steps_are_timed_and_end_the_script(monkeypatch, tmp_path):
    taken = json.loads(run_steps(monkeypatch, tmp_path, 3, 10**9).read_text())["milliseconds"]
    assert len(taken) == 3
    assert min(taken) > 0


def test_too_few_steps_are_an_error(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="ended after 3 optimizer steps; 4 were needed"):
        run_steps(monkeypatch, tmp_path, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("source", [LIKE_THE_REAL_ONE, "print('so far')\nraise OSError('the disk is full')\n"])
def test_a_script_that_runs_and_one_that_fails(source, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--out", str(tmp_path / "out"), "--rehearse"]
    command += ["--parts", "peer", "--peer", str(checkout(tmp_path / "diffusers", source))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    part = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]["peer"]
    if source == LIKE_THE_REAL_ONE:
        assert done.returncode == 0, part
        assert part["figures"][0]["milliseconds"]["script"]["repeats"] == 2
        assert part["figures"][-1]["value"] > 0
    else:
        assert done.returncode == 1
        assert "train_text_to_image.py ended with 1: OSError: the disk is full" in part["reason"]
        assert done.stdout.count("\n") == 2
