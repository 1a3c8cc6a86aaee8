"""What a run leaves behind when the disk fails, a signal comes, numbers are not finite, or files were changed."""

import builtins
import ctypes
import errno
import json
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ldm import disk, hub, weights
from ldm.config import LDMConfig
from ldm.config.overrides import load_config
from ldm.training import checkpoints, launch, resume, train_ldm
from ldm.training.checkpoints import TrainingState, find_damage
from ldm.training.distributed import EXIT_CODE, Stopped, interruption, join_processes
from ldm.training.launch import load_data
from ldm.training.run import Run
from ldm.training.run_folder import open_folder
from ldm.training.trainable import make_ema
from tests.training.runs import ROOT, digests, fresh_processes, losses, metrics, run_ldm, settings

OPERATIONS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "link"), (os, "mkdir"), (shutil, "copyfile"))


class Failing:
    """Makes operation number `at` on the disk fail, counted over opening for writing, writing, syncing, renaming."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count, self.failed = at, 0, ""
        for module, name in OPERATIONS:
            monkeypatch.setattr(module, name, self.counted(getattr(module, name), name))
        monkeypatch.setattr("io.open", self.counted_open(builtins.open))
        monkeypatch.setattr(weights, "save_file", self.counted_save(safetensors.torch.save_file))

    def tick(self, what: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.failed = what
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    def counted(self, call, name):
        def wrapped(*arguments, **keywords):
            self.tick(f"{name} {arguments[0]}")
            return call(*arguments, **keywords)

        return wrapped

    def counted_open(self, call):
        def wrapped(file, mode="r", *arguments, **keywords):
            if not set("wax+").isdisjoint(mode):
                self.tick(f"open {file}")
            opened = call(file, mode, *arguments, **keywords)
            if not set("wax+").isdisjoint(mode):
                self.tick(f"write {file}")  # what was opened stands there, empty
            return opened

        return wrapped

    def counted_save(self, call):
        def wrapped(tensors, path, *arguments):
            self.tick(f"save {path}")
            call(tensors, path, *arguments)
            try:
                self.tick(f"save half of {path}")
            except OSError as error:
                with builtins.open(path, "r+b") as file:
                    file.truncate(100)
                raise safetensors.SafetensorError(f"I/O error: {error}") from None

        return wrapped


@pytest.fixture
def small_run(tmp_path, encoder_folder):
    """A run whose network is one layer, so that a checkpoint costs little: (run, networks, export)."""
    fresh_processes()
    overrides = [*settings(tmp_path / "run", encoder_folder), "train.keep_checkpoints=1", "train.checkpoint_every=1"]
    overrides += ["train.max_steps=1000"]
    config = load_config(ROOT / "configs" / "digits.yaml", overrides, LDMConfig)
    processes = join_processes(config.train, tmp_path / "run")
    run = Run(config, load_data(config, processes), processes)
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    networks = TrainingState(model=layer, optimizer=optimizer, ema=make_ema(layer, 0.9))
    run.start(networks)

    def export(folder: Path) -> None:
        folder.mkdir()
        hub.save_tensors(folder / "weights.safetensors", {"step": torch.tensor(float(run.step))})
        hub.write_json(folder / "model_index.json", {"step": run.step})

    yield run, networks, export
    run.finish(networks, export)


def test_whatever_fails_on_the_disk_the_checkpoint_before_stands(small_run, monkeypatch):
    run, networks, export = small_run
    run.step = 1
    run.save_if_due(networks, export)
    failed = []
    while True:
        run.step += 1
        with monkeypatch.context() as patch:
            disk = Failing(patch, at=len(failed) + 1)
            message = ""
            try:
                run.save_if_due(networks, export)
            except OSError as error:
                message = str(error)
        if not disk.failed:
            break
        failed.append(disk.failed)
        if not message:  # a folder that should be made was there, a hard link became a copy
            assert disk.failed.split()[0] in ("mkdir", "link"), disk.failed
            assert find_damage(checkpoints.checkpoint_folder(run.folder, run.step)) is None
            continue
        assert "No space left on device" in message, disk.failed
        # Before the checkpoint stands it is named, with what to go on from.
        newest, damaged = checkpoints.find_checkpoint(run.accelerator, run.folder, print)
        assert newest is not None and not damaged, disk.failed
        if newest.name != f"step_{run.step:08d}":
            assert f"the checkpoint of step {run.step} cannot be written" in message, disk.failed
            assert f"the newest checkpoint is {newest}" in message, disk.failed
        state = hub.read_json(newest / "training" / "state.json")
        assert state["step"] == checkpoints.checkpoint_step(newest), disk.failed
        exported = hub.load_tensors(newest / "pipeline" / "weights.safetensors")
        assert exported["step"] == state["step"], disk.failed
        assert not list(run.folder.glob("checkpoints/.*")), disk.failed
    kinds = {failure.split()[0] for failure in failed}
    assert kinds >= {"fsync", "rename", "replace", "open", "write", "save", "mkdir"}, kinds
    assert len(failed) > 30
    # With the disk mended, all is as it should be, and the old ones are gone.
    assert [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(run.folder)] == [run.step]
    assert find_damage(run.folder / "checkpoints" / f"step_{run.step:08d}") is None
    assert hub.read_json(run.folder / "pipeline" / "model_index.json") == {"step": run.step}


def test_a_disk_that_takes_no_more_ends_the_run_with_one_line(tmp_path, encoder_folder, monkeypatch, capsys):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.validate_every=100"]
    run_ldm(arguments, "train.max_steps=2")
    before = digests(tmp_path / "run" / "checkpoints" / "step_00000002")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", "--resume", "--set", *arguments])
    fresh_processes()
    batches = Run.batches

    def on_a_full_disk(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))  # smaller than the weights
        return batches(self)

    monkeypatch.setattr(Run, "batches", on_a_full_disk)
    try:
        with pytest.raises(SystemExit) as caught:
            launch.main("train_ldm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the checkpoint of step 4 cannot be written (")
    assert "File too large" in line
    assert f"the newest checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step_00000002'}" in line
    assert digests(tmp_path / "run" / "checkpoints" / "step_00000002") == before
    monkeypatch.setattr(Run, "batches", batches)
    run_ldm(arguments, resume=True)
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]


# ---- signals


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, encoder_folder, first_stage):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_ldm(settings(folder, encoder_folder, "latent", first_stage), "train.validate_every=1", "train.sample_every=2")
    return folder


def sheets(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted((folder / "samples").glob("*.png"))}


def held_out(folder: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["held_out_loss"]) for entry in metrics(folder) if "held_out_loss" in entry]


# Where the signal comes: a function that the run calls, and the call at which it does; then the step that is saved.
MOMENTS = {
    "opening the data": ("ldm.training.launch.inspect", 1, None),
    "caching": ("ldm.training.latents.CachedEncoders.states_of", 1, None),
    "planning": ("ldm.training.estimate.evaluation_seconds", 1, None),
    "a step": ("ldm.training.run.Run.backward", 3, 3),
    "validating": ("ldm.training.setup.diffusion_loss", 2, 2),
    "sampling": ("ldm.training.run.save_png", 1, 2),
    "saving": ("ldm.training.setup.export", 2, 2),
    "the end": ("ldm.training.run.save_png", 2, 4),
}


@pytest.mark.parametrize(
    ("number", "moment"), [*((signal.SIGTERM, moment) for moment in MOMENTS), (signal.SIGINT, "a step")]
)
def test_a_signal_stops_a_run_that_resumes_exactly(
    moment, number, tmp_path, encoder_folder, first_stage, unbroken, monkeypatch, capsys
):
    name, at, saved = MOMENTS[moment]
    arguments = settings(tmp_path / "run", encoder_folder, "latent", first_stage)
    arguments += ["train.validate_every=1", "train.sample_every=2", f"data.cache_dir={tmp_path / 'cache'}"]
    place, _, function = name.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_ldm.py", "--set", *arguments])
        called = 0
        owner = pkgutil.resolve_name(place)
        original = getattr(owner, function)

        def signalled(*positional, **keywords):
            nonlocal called
            called += 1
            if called == at:
                os.kill(os.getpid(), number)
            return original(*positional, **keywords)

        patch.setattr(owner, function, signalled)
        fresh_processes()
        with pytest.raises(SystemExit) as caught:
            launch.main("train_ldm")
    assert caught.value.code == EXIT_CODE
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert called >= at
    steps = [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(tmp_path / "run")]
    if saved is not None:
        assert steps[-1] == saved
    if steps:
        assert last == f"stopped: step {steps[-1]} of 4 is saved; continue with ldm train --resume {tmp_path / 'run'}"
    else:
        assert last.startswith("stopped: nothing was lost")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run_ldm(arguments, resume=True)
    one, two = (folder / "checkpoints" / "step_00000004" for folder in (unbroken, tmp_path / "run"))
    assert digests(one) == digests(two)
    assert losses(unbroken) == losses(tmp_path / "run")
    assert held_out(unbroken) == held_out(tmp_path / "run")
    assert sheets(unbroken) == sheets(tmp_path / "run")


def test_a_second_interrupt_exits_at_once():
    program = """
import os, signal, sys, time
from ldm.training.distributed import interruption
with interruption.handle_signals():
    interruption.may_abort = False
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)   # passed on by a launcher
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGINT)
    print("never here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "still here\n"
    assert "SIGINT: finishing the step and saving it" in done.stderr
    assert "at once" in done.stderr


def test_a_worker_that_is_forked_does_not_answer_signals():
    with interruption.handle_signals():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if interruption.requested is None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_what_may_be_broken_off_is_not_begun_after_the_signal():
    with interruption.handle_signals():
        interruption.may_abort = False
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), interruption.abortable(True):
            raise AssertionError("was begun")
        with interruption.abortable(False):
            pass
    assert interruption.requested is None


# ---- numbers that are not finite


def spoil(monkeypatch, steps, where="loss"):
    """Makes the loss (or its gradient) of the second sample of some steps not finite."""
    original, seen = train_ldm.diffusion_loss, 0

    def spoilt(network, *arguments, **keywords):
        nonlocal seen
        values = original(network, *arguments, **keywords)
        if torch.is_grad_enabled() and isinstance(network, torch.nn.Module) and spoilt.training:
            seen += 1
            if seen in steps:
                bad = torch.zeros_like(values)
                bad[1] = float("nan")
                if where == "loss":
                    return values + bad
                values.register_hook(lambda gradient: gradient + bad)
        return values

    spoilt.training = False
    monkeypatch.setattr(train_ldm, "diffusion_loss", spoilt)
    batches = Run.batches

    def counted(self):  # what the plan measures is no step
        spoilt.training = True
        yield from batches(self)
        spoilt.training = False

    monkeypatch.setattr(Run, "batches", counted)


def test_gradient_norm_survives_a_kill(tmp_path, encoder_folder, monkeypatch):
    runs = [tmp_path / "unbroken", tmp_path / "broken"]
    for run in runs:
        with monkeypatch.context() as patch:
            spoil(patch, {3, 4})
            run_ldm(settings(run, encoder_folder), "train.log_every=4")
    shutil.rmtree(runs[1] / "checkpoints" / "step_00000004")
    with monkeypatch.context() as patch:
        spoil(patch, {1, 2})
        run_ldm(settings(runs[1], encoder_folder), "train.log_every=4", resume=True)
    one, two = ([entry["gradient_norm"] for entry in metrics(run) if "loss" in entry] for run in runs)
    assert one == two and one[0] > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_passed_over_and_named(where, tmp_path, encoder_folder, monkeypatch, capsys):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.checkpoint_every=1", "train.keep_checkpoints=9"]
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4}, where)
        run_ldm(arguments)
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (1, 2, 3, 4)]
    states = [digests(folder) for folder in folders]
    assert states[0] == states[1] != states[2] == states[3]  # weights, moments and average alike
    stored = [hub.read_json(folder / "training" / "state.json") for folder in folders]
    assert [state["skipped"]["in_all"] for state in stored] == [0, 1, 1, 2]
    assert [state["skipped"]["in_a_row"] for state in stored] == [0, 1, 0, 1]
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 3]
    assert [entry.get("skipped_steps", 0) for entry in metrics(tmp_path / "run") if "learning_rate" in entry] == [
        0,
        1,
        1,
        2,
    ]
    noted = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in noted] == [2, 4]
    samples = noted[0]["samples"]
    assert len(samples) == (1 if where == "loss" else 8)  # of a gradient it is not known whose it is
    assert all({"id", "epoch", "caption", "timestep", "loss"} == set(sample) for sample in samples)
    printed = capsys.readouterr().out
    assert f"step 2 was skipped: its loss is {'nan' if where == 'loss' else ''}" in printed
    assert f"{samples[0]['id']} at t = {samples[0]['timestep']}" in printed


def test_the_sample_that_is_named_is_the_one(tmp_path, encoder_folder, monkeypatch):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.gradient_accumulation_steps=2"]
    seen = []
    with monkeypatch.context() as patch:
        spoil(patch, {6})  # the second micro-batch of the third step
        batches = Run.batches

        def noted(self):
            for batch in batches(self):
                seen.append((self.step, batch.ids[1], batch.captions[1]))
                yield batch

        patch.setattr(Run, "batches", noted)
        run_ldm(arguments)
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    step, name, caption = seen[5]
    assert (step, entry["step"]) == (2, 3)
    assert [(sample["id"], sample["caption"]) for sample in entry["samples"]] == [(name, caption)]


def test_too_many_nonfinite_steps_end_the_run(tmp_path, encoder_folder, monkeypatch):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.max_steps=20", "train.max_nonfinite_steps=5"]
    with monkeypatch.context() as patch:
        spoil(patch, set(range(2, 99)))
        run_ldm(arguments, "train.max_steps=4")
        with pytest.raises(ValueError, match="not finite in 5 steps in a row") as caught:
            run_ldm(arguments, resume=True, accept=["train.max_steps"])
    assert "step_00000004; leave" in str(caught.value)  # the steps are 2 to 6
    assert f"ldm train --resume {tmp_path / 'run'} --set train.learning_rate=" in str(caught.value)
    assert "--accept train.learning_rate" in str(caught.value)
    run_ldm(arguments, "train.max_steps=8", "train.learning_rate=1e-4", resume=True, accept=["train.learning_rate"])
    assert metrics(tmp_path / "run")[-1]["step"] == 8


# ---- files that were changed


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ATTACKS = {
    "a flipped bit": lambda folder: flip(folder / "training" / "optimizer.safetensors"),
    "a flipped bit in what is exported": lambda folder: flip(
        folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    ),
    "a file cut short": lambda folder: os.truncate(folder / "training" / "ema.safetensors", 1000),
    "an empty file": lambda folder: os.truncate(folder / "training" / "model.safetensors", 0),
    "a file that is gone": lambda folder: (folder / "training" / "state.json").unlink(),
    "an edited number": lambda folder: (folder / "training" / "state.json").write_text(
        (folder / "training" / "state.json").read_text().replace('"step": 4', '"step": 3')
    ),
    "a manifest of nothing": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
    "a manifest of another kind": lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'),
    "a manifest cut short": lambda folder: os.truncate(folder / "manifest.json", 50),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "the files of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("step_00000002"), folder),
    ),
    "a folder that is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("no")),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_ldm(settings(folder, encoder_folder))
    return folder


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(attack, tmp_path, encoder_folder, finished, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in run.rglob("*.safetensors"):  # the copies share nothing with the original
        assert path.stat().st_nlink == 1
    ATTACKS[attack](run / "checkpoints" / "step_00000004")
    run_ldm(settings(run, encoder_folder), resume=True)
    printed = capsys.readouterr().out
    assert "resumed" in printed and "step_00000002" in printed
    if attack not in ("no manifest", "a folder that is a file"):
        assert "step_00000004 is damaged (" in printed
    assert digests(run / "checkpoints" / "step_00000004") == digests(finished / "checkpoints" / "step_00000004")
    assert losses(run) == losses(finished)


def test_what_a_killed_process_leaves_is_cleared_away(tmp_path, encoder_folder):
    run = tmp_path / "run"
    run_ldm(settings(run, encoder_folder), "train.max_steps=2")
    for name in (".pipeline.0123abcd.partial", "checkpoints/.step_00000004.0123abcd.partial"):
        (run / name / "unet").mkdir(parents=True)
        (run / name / "unet" / "half").write_bytes(b"x")
    (run / ".config.yaml.0123abcd.partial").write_text("half")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    shutil.rmtree(run / "pipeline")  # killed between two renames
    run_ldm(settings(run, encoder_folder), resume=True)
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert [entry["step"] for entry in metrics(run) if "loss" in entry] == [1, 2, 3, 4]
    assert (run / "pipeline" / "model_index.json").is_file()


def test_a_run_without_checkpoint_restarts_in_its_folder(tmp_path, encoder_folder, capsys):
    arguments = settings(tmp_path / "run", encoder_folder)
    run_ldm(arguments, "train.max_steps=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_ldm(arguments, resume=True)
    assert "has no checkpoint to resume; starting at step 0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_ldm(arguments, "train.learning_rate=0.5", resume=True)  # another run: what is there is kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


def test_a_lock_does_not_outlive_the_process_in_its_workers(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from ldm.training.run_folder import lock_folder
lock_folder(Path(sys.argv[1]))
if os.fork() == 0:   # a worker, which lives on when its parent is killed
    time.sleep(20)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    from ldm.training.run_folder import lock_folder

    started = time.monotonic()
    lock_folder(tmp_path)()
    assert time.monotonic() - started < 3


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked, and their death is told by SIGCHLD")
def test_a_worker_that_is_killed_ends_the_run_with_one_line(tmp_path, encoder_folder, monkeypatch, capsys):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.num_workers=1", "train.checkpoint_every=1"]
    backward, called = Run.backward, 0

    def killing(self, values):
        nonlocal called
        called += 1
        if called == 3:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            time.sleep(60)  # broken off as soon as torch hears of it
        backward(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "backward", killing)
        patch.setattr(sys, "argv", ["train_ldm.py", "--set", *arguments])
        fresh_processes()
        with pytest.raises(SystemExit) as caught:
            launch.main("train_ldm")
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: a process that loads images has died (DataLoader worker (pid")
    assert last.endswith(f"ldm train --resume {tmp_path / 'run'} --set train.num_workers=0")
    run_ldm([*arguments, "train.num_workers=0"], resume=True)
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").write_text("old")
    rename, called = Path.rename, 0

    def interrupted(self, target):
        nonlocal called
        called += 1
        if called == 2:
            raise Stopped
        return rename(self, target)

    def replace():
        with disk.new_folder(tmp_path / "best") as folder:
            (folder / "new").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # as on file systems that cannot swap two names
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(Stopped):
            replace()
    assert called == 3
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "old").read_text() == "old"


def test_half_a_line_on_a_full_disk_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("x" * 95)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl") as caught:
            disk.append_line(path, "0123456789")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.stat().st_size == 100  # the system has taken a part of it without a word


# ---- which checkpoints stay, and what a run must be to go on


def test_copies_beside_checkpoints_stay(tmp_path, encoder_folder, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "step_00000004"
    copies = [newest.with_name(name) for name in ("step_00000004 (copy)", "step_00000099.bak", "step_9")]
    for copy in copies:
        shutil.copytree(newest, copy)
    run_ldm(settings(run, encoder_folder), "train.max_steps=6", "train.keep_checkpoints=1", resume=True)
    assert [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(run)] == [6]
    assert all(find_damage(copy) is None for copy in copies)


def test_a_run_is_not_cut_back_to_fewer_steps(tmp_path, encoder_folder, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(ValueError, match=r"step_00000004 is beyond train.max_steps 3; raise that to 4 or more"):
        run_ldm(settings(run, encoder_folder), "train.max_steps=3", resume=True)


def test_checkpoints_of_another_process_stay(tmp_path, encoder_folder, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = load_config(ROOT / "configs" / "digits.yaml", settings(run, encoder_folder), LDMConfig)
    with pytest.raises(ValueError, match=r"another process has continued .* to .*step_00000004; start again"):
        open_folder(run, config, 2, resume=True, damaged=[], log=print)
    open_folder(run, config, 4, resume=True, damaged=[], log=print)()


def test_which_checkpoints_are_kept(tmp_path, encoder_folder):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.max_steps=7", "train.checkpoint_every=1"]
    run_ldm(arguments, "train.keep_every=3", "train.keep_checkpoints=2")
    assert [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(tmp_path / "run")] == [
        3,
        6,
        7,
    ]
    assert find_damage(tmp_path / "run" / "best", "best.json") is None


def test_checkpoints_by_minutes(tmp_path, encoder_folder):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.checkpoint_every=1000", "train.keep_checkpoints=9"]
    run_ldm(arguments, "train.checkpoint_minutes=1e-9")
    assert [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(tmp_path / "run")] == [
        1,
        2,
        3,
        4,
    ]
    run_ldm([*arguments, f"output_dir={tmp_path / 'other'}"], "train.checkpoint_minutes=60")
    assert [checkpoints.checkpoint_step(folder) for folder in checkpoints.list_checkpoints(tmp_path / "other")] == [4]


def test_another_environment_is_refused_and_accepted_key_by_key(tmp_path, encoder_folder, monkeypatch, capsys):
    arguments = settings(tmp_path / "run", encoder_folder)
    run_ldm(arguments, "train.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "code_digest", lambda: "0123456789ab")
        patch.setattr(resume, "version", lambda name: "9.9" if name == "torch" else "1.0")
        changed = [*arguments, "train.cpu_threads=2", "train.adam_beta1=0.5"]
        with pytest.raises(ValueError, match="was made under other conditions") as caught:
            run_ldm(changed, resume=True)
        message = str(caught.value)
        # What is installed: torch.__version__ may have "+cu130" behind it.
        for part in ("train.adam_beta1: 0.9 → 0.5", f"versions.torch: {version('torch')} → 9.9", "threads: 1 → 2"):
            assert part in message
        keys = message.partition("--accept ")[2].partition(",")[0].split()
        assert set(keys) >= {"train.adam_beta1", "versions.torch", "versions.numpy", "code", "threads"}
        with pytest.raises(ValueError, match=r"conditions \(code: "):
            run_ldm(changed, resume=True, accept=[key for key in keys if key != "code"])
        run_ldm([*arguments, "train.adam_beta1=0.5"], resume=True, accept=keys)
    assert "accepted: train.adam_beta1: 0.9 → 0.5" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    state = hub.read_json(tmp_path / "run/checkpoints/step_00000004/training/state.json")
    assert state["config"]["train"]["adam_beta1"] == 0.5
    assert state["environment"]["versions.torch"] == "9.9"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="which process has which rank is read from /proc")
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, encoder_folder):
    arguments = [*settings(tmp_path / "run", encoder_folder), "train.max_steps=100000", "train.checkpoint_every=100000"]
    arguments += ["train.validate_every=100000", "train.sample_every=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531"]
    command += [str(ROOT / "train" / "train_ldm.py"), "--set", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (second,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(second), signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (newest,) = checkpoints.list_checkpoints(tmp_path / "run")
    last = checkpoints.checkpoint_step(newest)
    assert find_damage(newest) is None
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, last + 1))
    assert (
        error.count(f"stopped: step {last} of 100000 is saved; continue with ldm train --resume {tmp_path / 'run'}")
        == 2
    )
    assert error.count(f"exitcode  : {EXIT_CODE}") == 2
    assert "SIGTERM: finishing the step" in error
