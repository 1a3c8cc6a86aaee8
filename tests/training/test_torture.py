"""The program that kills runs (tools/torture_resume.py): it finds what is wrong, and finds nothing wrong with us."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from tests.training.runs import ROOT, captioned_folder, run_ldm, settings
from tools.torture_resume import (
    MAX_TURNS,
    MIX,
    Attack,
    Difference,
    Watch,
    differences,
    evidence,
    markdown,
    plan,
    valid_checkpoints,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("torture")
    data = captioned_folder(folder / "data", 20)
    run_ldm([*settings(folder / "run", encoder_folder), f"data.path={data}", "train.validate_every=1"])
    return folder / "run"


@pytest.fixture
def run(done, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(done, tmp_path / "run")


def flip(path, place=-1):
    """One bit of a file is another."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_seed_plans_the_kills():
    attacks = plan(200, 0, ["KILL", "TERM"])
    assert attacks == plan(200, 0, ["KILL", "TERM"])
    assert attacks[:50] == plan(50, 0, ["KILL", "TERM"])
    assert attacks != plan(200, 1, ["KILL", "TERM"])
    assert Counter(attack.phase for attack in attacks) == {phase: 20 * count for phase, count in MIX.items()}
    assert {attack.signal for attack in attacks} == {"KILL", "TERM"}
    assert {attack.turn for attack in attacks if attack.phase == "save"} == set(range(1, MAX_TURNS + 1))
    assert min(attack.moment for attack in attacks) < 0.05 and max(attack.moment for attack in attacks) > 0.95


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("checkpoints/step_00000002/training/optimizer.safetensors", None),  # not valid then, so it is not compared
        ("pipeline/unet/diffusion_pytorch_model.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"),
        ("best/pipeline/unet/diffusion_pytorch_model.safetensors", "best/pipeline/unet/diffusion_pytorch_model"),
        ("checkpoints/step_00000004/training/model.safetensors", "the newest checkpoint"),
    ],
)
def test_a_bit_of_a_weight_is_a_difference(place, name, done, run):
    assert differences(evidence(done), evidence(run)) == []
    flip(run / place)
    if name == "the newest checkpoint":
        with pytest.raises(Difference, match=r"step_00000004 is damaged: training/model\.safetensors has changed"):
            evidence(run)
        return
    found = differences(evidence(done), evidence(run))
    assert len(found) == (name is not None)
    assert all(difference.startswith(name) for difference in found)


def test_a_figure_a_line_and_a_pixel_are_differences_and_speeds_are_not(done, run):
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["samples_per_second"] += 1

    def found(changed):
        log.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return differences(evidence(done), evidence(run))

    assert found(lines) == []
    assert found(lines[:-1])[0].startswith(f"log line {len(lines)}: missing instead of")
    assert found([*lines, lines[-1]])[0].endswith("instead of nothing")
    (line,) = found([lines[0] | {"loss": lines[0]["loss"] * (1 + 1e-15)}, *lines[1:]])
    assert line.startswith("log line 1: ")
    assert found(lines) == []
    log.write_text('{"step": 1, "lo' + log.read_text())  # half a line, and the next behind it
    assert differences(evidence(done), evidence(run))[0].startswith("log line 1: {'unreadable'")
    assert found(lines) == []

    sheet = run / "samples" / "step_00000004.png"
    with Image.open(sheet) as image:
        pixels = image.copy()
    pixels.save(sheet, compress_level=1)
    assert found(lines) == []
    red, *rest = pixels.getpixel((5, 5))
    pixels.putpixel((5, 5), (red ^ 1, *rest))
    pixels.save(sheet)
    assert [difference.split(":")[0] for difference in found(lines)] == ["samples/step_00000004.png"]


def test_a_checkpoint_is_valid_if_it_is_whole(run):
    two, four = run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000004"
    assert valid_checkpoints(run) == {2: two, 4: four}
    (two / "training" / "more.json").write_text("{}")
    assert valid_checkpoints(run) == {4: four}
    (four / "manifest.json").rename(four / "gone")  # as before it was written
    (two / "training" / "more.json").unlink()
    assert valid_checkpoints(run) == {2: two}
    (two / "training" / "ema.safetensors").unlink()
    with pytest.raises(Difference, match=r"ema\.safetensors is missing"):
        valid_checkpoints(run)


def test_a_watch_tells_the_phases_of_a_session_that_goes_on(run):
    log = (run / "metrics.jsonl").read_text()
    first, *_ = log.splitlines(keepends=True)
    old = run / "checkpoints" / ".step_00000003.old"
    old.mkdir()
    watch = Watch(run, resumed=1)
    assert watch.hit() == "start-up" and watch.steps == []
    (run / "metrics.jsonl").write_text(first)  # lines that are ahead are cut first
    watch.poll()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("validate_every: 1", "validate_every: 3"))
    with (run / "metrics.jsonl").open("a") as file:
        for phase, step in (("step", 2), ("evaluation", 3)):
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
            file.flush()
            assert watch.hit() == phase
    old.rmdir()
    assert watch.hit() == "evaluation"
    old.mkdir()
    assert watch.hit() == "save, before the rename"
    old.rename(run / "checkpoints" / "step_00000003")
    assert watch.hit() == "save, after the rename"
    assert watch.steps == [2, 3]
    assert [phase for _, phase in watch.begun] == ["start-up", "step", "evaluation", "save", "rename"]
    times = [at for at, _ in watch.begun]
    assert times == sorted(times)
    assert watch.due(Attack("save", 1, 0.5, "KILL", 0.0), {"save": 2.0}) == times[3] + 1
    assert watch.due(Attack("save", 2, 0.5, "KILL", 0.0), {"save": 2.0}) is None


def torture(folder, *arguments):
    """The result of the program, in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / "torture_resume.py"), "--folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = folder / "result.json"
    done = subprocess.run([*command, "--out", str(out), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_same(tmp_path, encoder_folder):
    data = captioned_folder(tmp_path / "data", 40)
    small = [*settings("unused", encoder_folder)[1:], f"data.path={data}", "train.max_steps=8"]
    result, printed = torture(tmp_path, "--kills", "3", "--seed", "6", "--set", *small)
    assert sum(result["kills"].values()) == 3 and result["differences"] == []
    assert result["compared"] > 20 and len(result["sessions_of_each_run"]) >= 1
    assert result["exit_codes"] == {"SIGKILL: -9": 3}
    assert markdown(result) in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ldm-torture")] == []
