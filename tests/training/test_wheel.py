"""The package as pip installs it, in a folder that knows no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.training.runs import ROOT, captioned_folder, settings

pytest.importorskip("setuptools")
pytest.importorskip("pip")


def run(*command: object, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "ldm", source / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, folder=folder)
    shutil.rmtree(source)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    programs = folder / "venv" / "bin"
    (wheel,) = folder.glob("ldm-*.whl")
    run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel, folder=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.slow
def test_an_installed_wheel_trains(installed: Path, encoder_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(installed / "python", "-c", "import ldm; print(ldm.__file__)", folder=empty)
    assert "site-packages" in where and str(ROOT) not in where

    captioned_folder(tmp_path / "images", 12)
    small = ["train.max_steps=3", "train.cpu_threads=1", "unet.block_out_channels=[8,8]", "unet.norm_num_groups=4"]
    small += ["unet.attention_head_dim=2", "sample.num_inference_steps=2", "train.mixed_precision=no"]
    small += ["train.batch_size=4", "train.warmup_steps=0"]
    arguments = [argument for setting in small for argument in ("--set", setting)]
    command = [installed / "ldm", "train", tmp_path / "images", "--encoder", encoder_folder, "--minutes", 0.01]
    printed = run(*command, "--resolution", 8, "-o", "out", *arguments, folder=empty)
    assert "generate: ldm generate" in printed
    assert (empty / "out" / "pipeline" / "model_index.json").is_file()
    assert (empty / "out" / "report.html").is_file()

    config = tmp_path / "digits.yaml"
    shutil.copy(ROOT / "configs" / "digits.yaml", config)
    command = [installed / "python", "-m", "ldm.training.train_ldm", "--config", config]
    run(*command, "--set", *settings(Path("run"), encoder_folder), "train.max_steps=3", folder=empty)
    assert (empty / "run" / "checkpoints" / "step_00000003" / "manifest.json").is_file()
