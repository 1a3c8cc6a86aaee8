"""Exact resume: a run that was broken off is, from then on, the run that was not; and one process is as good as four.

A run that was killed after step k leaves the checkpoints up to k, and a log that may be ahead of them. That is what
`broken_off` makes of a run that is done. Kills of real processes: tests/training/test_torture.py.
"""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests.training.runs import ROOT, captioned_folder, evaluations, losses, run_autoencoder, run_ldm, settings
from tools.torture_resume import differences, evidence, temporaries

# 32 of the 40 pictures are trained on, 12 a step: the batches of steps 3 and 6 cross from one epoch to the next.
PICTURES, HELD_OUT, BATCH, STEPS = 40, 0.2, 12, 7
# Breaks before a batch that lies in two epochs, and before one that does not; neither is a line of the log.
CROSSING, WITHIN = 5, 4


@dataclass(frozen=True)
class Case:
    """A way to train, and the step after which it is broken off."""

    kind: str
    accumulation: int
    workers: int
    checkpointing: bool
    log_every: int
    broken_after: int
    dropout: float = 0.0

    def __str__(self):
        words = [self.kind, f"accumulation-{self.accumulation}", f"workers-{self.workers}", f"log-{self.log_every}"]
        words += ["checkpointing"] * self.checkpointing + ["dropout"] * (self.dropout > 0)
        return "-".join([*words, f"broken-after-{self.broken_after}"])


KINDS = ("autoencoder", "pixel", "latent-cached", "latent-random-crops")
CASES = [
    Case("autoencoder", 1, 0, False, 3, WITHIN),
    Case("autoencoder", 3, 2, True, 1, CROSSING),
    Case("pixel", 1, 0, False, 1, CROSSING, dropout=0.3),
    Case("pixel", 3, 2, True, 3, WITHIN),
    Case("latent-cached", 1, 0, True, 1, CROSSING),
    Case("latent-cached", 3, 2, False, 3, WITHIN, dropout=0.3),
    Case("latent-random-crops", 1, 2, False, 1, WITHIN),
    Case("latent-random-crops", 3, 0, True, 3, CROSSING, dropout=0.3),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Larger than what is trained on, so that crops differ."""
    return captioned_folder(tmp_path_factory.mktemp("pictures") / "data", PICTURES, side=20)


@pytest.fixture
def train(pictures, encoder_folder, first_stage):
    """A function that trains as a case says, into a folder."""

    def run(case, folder, *, checkpoint_every=0, resume=False):
        more = [f"data.path={pictures}", f"data.held_out={HELD_OUT}", "data.resolution=16", "data.flip=true"]
        more += [f"train.max_steps={STEPS}", f"train.batch_size={BATCH}", "train.warmup_steps=6"]
        more += [f"train.checkpoint_every={checkpoint_every or case.broken_after}", "train.keep_checkpoints=9"]
        more += ["train.validate_every=3", "train.sample_every=6"]
        more += [f"train.gradient_accumulation_steps={case.accumulation}", f"train.num_workers={case.workers}"]
        more += [f"train.gradient_checkpointing={case.checkpointing}", f"train.log_every={case.log_every}"]
        if case.kind == "autoencoder":
            assert case.dropout == 0, "the autoencoder has none"
            # Broken off while the discriminator plays, and before its first step.
            start = 2 if case.broken_after == WITHIN else CROSSING
            more += ["loss.perceptual_weight=0.5", "loss.adversarial_weight=0.5", f"loss.adversarial_start={start}"]
            more += ["discriminator={channels: 8, levels: 2, norm_num_groups: 4}"]
            return run_autoencoder(folder, *more, resume=resume)
        space = "pixel" if case.kind == "pixel" else "latent"
        more += ["data.crop=random"] * (case.kind != "latent-cached") + [f"unet.dropout={case.dropout}"]
        return run_ldm(settings(folder, encoder_folder, space, first_stage), *more, resume=resume)

    return run


def broken_off(run, target, step):
    """A copy of a run as a kill would have left it some time after the checkpoint of a step, before the next.

    The log is ahead of it, with half a line at its end; what else came later is gone, so that it has to be made again.
    """
    shutil.copytree(run, target)
    for path in (*target.glob("checkpoints/step_*"), *target.glob("samples/step_*")):
        if int(path.stem.removeprefix("step_")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for export in ("pipeline", "autoencoder"):
        shutil.rmtree(target / export, ignore_errors=True)
    best = target / "best" / "best.json"
    if best.exists() and json.loads(best.read_text())["step"] > step:
        shutil.rmtree(best.parent)
    with (target / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    return target


def checkpoints_of(run):
    return [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]


def names_of(found):
    """What was compared, without the steps."""
    return {name.split("/")[-1] if name.startswith("checkpoints") else name.split("/")[0] for name in found}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_was_broken_off_goes_on_as_if_it_were_not(case, train, tmp_path):
    train(case, tmp_path / "one")
    expected = evidence(tmp_path / "one")
    weights = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "samples"}
    assert weights | {"autoencoder" if case.kind == "autoencoder" else "pipeline", "log line 1"} <= names_of(expected)
    figures = {key for name, line in expected.items() if name.startswith("log line") for key in line}
    held_out = "held_out_psnr" if case.kind == "autoencoder" else "held_out_loss"
    assert {"loss", "gradient_norm", "learning_rate", held_out} <= figures
    if case.kind == "autoencoder":
        assert {"discriminator.safetensors", "discriminator_optimizer.safetensors"} <= names_of(expected)
        assert {"adversarial_weight", "loss_discriminator", "held_out_perceptual"} <= figures

    two = broken_off(tmp_path / "one", tmp_path / "two", case.broken_after)
    assert max(checkpoints_of(two)) == case.broken_after, "nothing would be left to be done"
    train(case, two, resume=True)
    assert differences(expected, evidence(two)) == []


def test_every_two_ways_of_training_meet_in_a_case():
    names = [field.name for field in dataclasses.fields(Case)]
    values = {name: {getattr(case, name) for case in CASES} for name in names}
    assert values["kind"] == set(KINDS)
    assert all(len(values[name]) == 2 for name in names if name != "kind")
    for one, two in itertools.combinations(names, 2):
        met = {(getattr(case, one), getattr(case, two)) for case in CASES}
        missing = set(itertools.product(values[one], values[two])) - met
        assert missing <= {("autoencoder", 0.3)}, (one, two)


def test_a_run_that_is_killed_again_and_again_is_still_the_same(train, tmp_path):
    """Also where it is broken off at a step that it had reached before, and after its last."""
    case = Case("pixel", 3, 0, False, 3, CROSSING, dropout=0.3)
    last = tmp_path / "one"
    train(case, last, checkpoint_every=2)
    expected = evidence(last)
    for step in (4, 2, STEPS):
        last = broken_off(last, tmp_path / str(step), step)
        train(case, last, checkpoint_every=2, resume=True)
        assert differences(expected, evidence(last)) == [], step


def test_resuming_updates_an_older_export(train, tmp_path):
    case = Case("pixel", 1, 0, False, 1, CROSSING)
    train(case, tmp_path / "one")
    two = broken_off(tmp_path / "one", tmp_path / "two", STEPS)
    shutil.copytree(two / "checkpoints" / f"step_{CROSSING:08d}" / "pipeline", two / "pipeline")
    assert differences(evidence(tmp_path / "one"), evidence(two))
    train(case, two, resume=True)
    assert differences(evidence(tmp_path / "one"), evidence(two)) == []


def test_what_a_kill_left_half_written_is_cleared_away(train, tmp_path):
    case = Case("pixel", 1, 0, False, 1, CROSSING)
    train(case, tmp_path / "one")
    two = broken_off(tmp_path / "one", tmp_path / "two", CROSSING)
    for name in (
        "checkpoints/.step_00000007.11111111.partial",
        "checkpoints/.step_00000006.22222222.partial",
        ".pipeline.33333333.partial",
    ):
        shutil.copytree(tmp_path / "one" / "checkpoints" / f"step_{STEPS:08d}" / "training", two / name / "training")
    train(case, two, resume=True)
    assert differences(evidence(tmp_path / "one"), evidence(two)) == []
    assert temporaries(two) == set()


def test_a_kill_while_the_run_folder_is_made_does_not_spoil_it(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # the lock is the first file of a run
    train(Case("pixel", 1, 0, False, 1, STEPS), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run")


# ---- several processes


def many_steps(folder, encoder_folder, pictures):
    """20 steps of 8 of 35 pictures: epochs end within batches."""
    more = [f"data.path={pictures}", "data.held_out=0.1", "data.resolution=16", "data.flip=true", "data.crop=random"]
    more += ["train.max_steps=20", "train.checkpoint_every=7", "train.keep_checkpoints=9", "train.validate_every=20"]
    more += ["train.sample_every=20", "train.learning_rate=0.001", "train.warmup_steps=4"]
    more += ["train.evaluate_every=20", "train.evaluation_samples=50", "train.evaluation_features=pixel"]
    return [*settings(folder, encoder_folder), *more]


def torchrun(processes, arguments, *more, script="train_ldm.py"):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command += [str(ROOT / "train" / script), *more, "--set", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def processes_of(run):
    """Step → how many processes wrote that checkpoint."""
    states = [json.loads(path.read_text()) for path in run.glob("checkpoints/step_*/training/state.json")]
    return {state["step"]: state["processes"] for state in states}


def assert_same_losses(run, one):
    found, expected = losses(run), losses(one)
    assert len(found) == len(expected) == 20
    assert max(expected) / min(expected) > 1.05, "losses that do not move would show nothing"
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, encoder_folder, pictures):
    folder = tmp_path_factory.mktemp("one") / "run"
    run_ldm(many_steps(folder, encoder_folder, pictures))
    assert processes_of(folder) == {7: 1, 14: 1, 20: 1}
    return folder


def test_two_processes_train_as_one(tmp_path, encoder_folder, pictures, one_process):
    """One of them evaluates what it draws, while the other waits."""
    torchrun(2, many_steps(tmp_path / "run", encoder_folder, pictures))
    assert processes_of(tmp_path / "run") == {7: 2, 14: 2, 20: 2}
    assert_same_losses(tmp_path / "run", one_process)
    found, expected = evaluations(tmp_path / "run"), evaluations(one_process)
    assert [step for step, _ in found] == [20] and len(expected[0][1]) >= 3
    assert found[0][1] == pytest.approx(expected[0][1], abs=0.05)  # weights differ by rounding


@pytest.mark.slow
def test_a_run_goes_from_four_processes_to_two_and_to_one(tmp_path, encoder_folder, pictures, one_process):
    def arguments(folder):
        return many_steps(folder, encoder_folder, pictures)

    torchrun(4, arguments(tmp_path / "four"))
    assert processes_of(tmp_path / "four") == {7: 4, 14: 4, 20: 4}
    assert_same_losses(tmp_path / "four", one_process)

    two = broken_off(tmp_path / "four", tmp_path / "two", 7)
    torchrun(2, arguments(two), "--resume")
    assert processes_of(two) == {7: 4, 14: 2, 20: 2}
    assert_same_losses(two, one_process)

    one = broken_off(two, tmp_path / "one", 14)
    run_ldm(arguments(one), resume=True)
    assert processes_of(one) == {7: 4, 14: 2, 20: 1}
    assert_same_losses(one, one_process)
