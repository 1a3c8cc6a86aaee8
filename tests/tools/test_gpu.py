"""The run on a GPU: a part that fails or hangs costs only itself, and all of it runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
import yaml

from ldm import hub
from ldm.data import DataConfig
from ldm.data.builtin import held_out_scene, training_scene
from ldm.data.scenes import FEW_SINGLES_FROM
from ldm.models import UNetConfig
from ldm.text import load_text_encoder
from tools import gpu, gpu_benchmark, gpu_bundle
from tools.gpu import ROOT, Part, Report, run_part

WRITES = "import json, sys, time; open(sys.argv[1], 'a').write(json.dumps({'name': 'a', 'value': 1}) + '\\n'); "


@pytest.fixture
def report(tmp_path):
    (tmp_path / "out").mkdir()
    machine = gpu.machine(rehearse=True)
    return Report(tmp_path / "out", machine, {name: Part() for name in ("one", "two", "three")})


def run(report, name, code, seconds, tmp_path):
    command = [sys.executable, "-c", WRITES + code, str(tmp_path / f"{name}.jsonl")]
    run_part(report, name, command, seconds, tmp_path, None)


def test_a_part_that_fails_or_hangs_costs_only_itself(report, tmp_path):
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=1); "
    run(report, "one", "print('out of luck'); raise SystemExit(3)", 60, tmp_path)
    started = time.monotonic()
    run(report, "two", child + "time.sleep(60)", 2, tmp_path)
    assert time.monotonic() - started < 10
    run(report, "three", "", 60, tmp_path)
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["status"] for part in content["parts"].values()] == ["failed", "timed out", "done"]
    assert all(part["figures"] == [{"name": "a", "value": 1}] for part in content["parts"].values())
    assert "exit code 3" in content["parts"]["one"]["reason"]
    assert content["parts"]["one"]["reason"].endswith("the last line: out of luck")
    assert "timed out" in (tmp_path / "out" / "gpu.md").read_text()


def test_figures_of_an_earlier_call_stay(report, tmp_path):
    run(report, "one", "", 60, tmp_path)
    assert gpu.earlier(report.out, report.machine, ["two"])["one"].status == "done"
    assert "one" not in gpu.earlier(report.out, report.machine, ["one"])
    with pytest.raises(ValueError, match="another rehearsal"):
        gpu.earlier(report.out, report.machine | {"rehearsal": False}, ["two"])


def test_a_stopped_part_keeps_its_figures(report, tmp_path, monkeypatch):
    def interrupted(seconds):
        if gpu.read_figures(tmp_path / "one.jsonl"):
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(report, "one", "time.sleep(60)", 60, tmp_path)
    part = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]["one"]
    assert part["status"] == "stopped"
    assert part["figures"] == [{"name": "a", "value": 1}]


def test_a_long_log_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 100)
    (tmp_path / "log.txt").write_text("x" * 500 + "the end")
    gpu.shorten(tmp_path / "log.txt")
    assert len((tmp_path / "log.txt").read_text()) < 100
    assert (tmp_path / "log.txt").read_text().endswith("the end")


def test_a_damaged_bundle_is_named(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {"wheels.tar.xz": [1, "0"]}}))
    (tmp_path / "wheels.tar.xz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"wheels\.tar\.xz is missing or damaged"):
        gpu.install(tmp_path, tmp_path / "site")


def test_versions_are_those_that_the_parts_use(tmp_path):
    (tmp_path / "peft-99.0.dist-info").mkdir()
    (tmp_path / "peft-99.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.0\n")
    with_bundle, without = (gpu.machine(rehearse=True, site=site)["versions"] for site in (tmp_path, None))
    assert with_bundle["peft"] == "99.0"
    assert without["peft"] != "99.0"
    assert with_bundle["torch"] == without["torch"] is not None


def test_a_bundle_for_another_python_is_named(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {}, "python": "3.7"}))
    with pytest.raises(ValueError, match=r"wheels for Python 3\.7 and this is "):
        gpu.install(tmp_path, tmp_path / "site")


def test_tests_that_cannot_be_imported_say_why(tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_library_of_ours")
    command = [sys.executable, "-m", "tools.gpu_tests", str(tmp_path / "tests.jsonl"), str(tmp_path / "test_broken.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no_such_library_of_ours" in gpu.read_figures(tmp_path / "tests.jsonl")[0]["failed"]


def test_a_half_written_line_waits(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"name": "a"}\n{"na')
    assert gpu.read_figures(tmp_path / "f.jsonl") == [{"name": "a"}]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--out"),
        (["--out", "x", "--parts", "tests,dreams"], "dreams"),
        (["--out", "x", "--parts", "tests,peer"], "--peer"),
        (["--out", "x", "--minutes", "0"], "--minutes"),
        (["--out", "x", "--minutes", "soon"], "--minutes"),
        (["--out", "/dev/null/x"], "/dev/null"),
        (["--out", "x", "--use", "nowhere"], "bundle.json"),
    ],
)
def test_wrong_arguments_are_named(arguments, named, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


CONFIG = yaml.safe_load((ROOT / "configs" / "scenes-64.yaml").read_text())


@pytest.mark.parametrize("count", [100, pytest.param(gpu_bundle.CAPTIONS, marks=pytest.mark.slow)])
def test_a_bundle_knows_the_tokens_of_captions_that_it_was_not_made_from(count, tmp_path):
    assert CONFIG["text"]["max_length"] == gpu_bundle.MAX_LENGTH
    assert DataConfig(**CONFIG["data"]).things == gpu_bundle.THINGS
    gpu_bundle.write_text_encoder(tmp_path, gpu_bundle.texts(count))
    gpu_bundle.read_text_encoder(tmp_path, tmp_path / "text")
    few, all_of_them = (load_text_encoder(name, gpu_bundle.MAX_LENGTH) for name in (str(tmp_path / "text"), "minilm"))
    captions = [
        training_scene(number)[1] for number in range(7, 4 * FEW_SINGLES_FROM, max(1, 2 * FEW_SINGLES_FROM // count))
    ]
    captions += [held_out_scene(number)[1] for number in range(count)]
    kept, found = (
        [one.tokenizer.convert_ids_to_tokens(row) for row in one.tokenizer(captions).input_ids]
        for one in (few, all_of_them)
    )
    assert kept == found
    assert torch.allclose(few(captions[:4]), all_of_them(captions[:4]), atol=0.02)


def test_the_benchmark_has_the_size_of_the_built_in_model():
    size = gpu_benchmark.BUILT_IN
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in CONFIG["unet"].items()}
    assert UNetConfig(**size.unet | config) == UNetConfig(**size.unet)
    assert size.tokens == CONFIG["text"]["max_length"]


@pytest.mark.slow
def test_a_rehearsal_ends_green(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu.py"),
        "--out",
        str(tmp_path / "out"),
        "--rehearse",
        "--first-scene",
        "100",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {name: part["status"] for name, part in content["parts"].items()} == dict.fromkeys(gpu.PARTS, "done")
    assert done.returncode == 0
    assert len(files := list((tmp_path / "out").iterdir())) <= 8
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert not [f for part in content["parts"].values() for f in part["figures"] if "failed" in f or "skipped" in f]
    from tools.gpu_training import join

    folder = join(tmp_path / "out", tmp_path / "joined", hub.find_pipeline("scenes-64"))
    assert (folder / "unet" / "config.json").is_file()
    assert json.loads((folder / "data.json").read_text())["scenes"] == 100 + 8
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    assert (data["first_scene"], data["scenes"]) == (100, 8)
