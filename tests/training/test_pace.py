"""Steps that take longer than was planned: noticed once, from time that went into steps alone."""

import dataclasses
import re
import time

import pytest

from ldm.training import estimate as timing
from ldm.training import setup
from ldm.training.estimate import PACE_STEPS, Pace, Plan, slow_step_message
from tests.training.runs import run_ldm, settings

PLAN = Plan(
    data="", space="", network="", parameters=1, trained_parameters=1, batch="", epochs=1.0, seconds_per_step=0.1,
    expected_seconds=240.0, memory_bytes=1, fixed_bytes=1, memory_of=1, disk_bytes=1, quality="",
)  # fmt: skip


def said(seconds_of_steps, aside=None, plan=PLAN):
    """Step → what is said after it, of steps that take so many seconds; `aside` are seconds of something else."""
    now = [100.0]
    pace = Pace(plan, 2, clock=lambda: now[0])
    found = {}
    for number, seconds in enumerate(seconds_of_steps, start=1):
        now[0] += seconds
        line = pace.step()
        if line is not None:
            found[number] = line
        if aside is not None:
            now[0] += aside
            pace.exclude(aside)
    return found


def test_slow_steps_warn_once():
    found = said([1.85] * 100)
    assert list(found) == [PACE_STEPS]
    assert " s instead of 0.1 s, and the run about 74 min instead of 4 min" in found[PACE_STEPS]


@pytest.mark.parametrize(
    ("steps", "aside", "slow"),
    [
        ([0.1] * 50, None, False),
        ([0.19] * 50, None, False),
        ([0.21] * 50, None, True),
        ([30.0] + [0.1] * 50, None, False),  # processes that load images start in the first
        ([0.1] * 50, 30.0, False),  # a validation after each
        ([0.5] * 50, 30.0, True),
        ([0.1] * 10 + [3.0] + [0.1] * 20, None, True),  # 0.25 s a step
        ([0.1] * 20 + [9.0] * 20, None, False),  # it was looked at before
        ([9.0] * 19, None, False),
    ],
)
def test_only_steps_count(steps, aside, slow):
    assert bool(said(steps, aside)) is slow


@pytest.mark.parametrize(
    ("threads", "parts", "others"),
    [
        (2, ["the cores", "fewer threads than its 2: OMP_NUM_THREADS=1, --resume, --accept threads"], ["GPU"]),
        (1, ["the cores", "train.max_steps", "train.batch_size"], ["OMP_NUM_THREADS"]),
        (None, ["the GPU", "train.max_steps"], ["OMP_NUM_THREADS", "cores"]),
    ],
)
def test_what_to_do(threads, parts, others):
    line = slow_step_message(PLAN, 0.3, threads)
    assert all(part in line for part in parts) and not any(other in line for other in others) and "\n" not in line


def test_a_run_says_it(tmp_path, encoder_folder, monkeypatch, capsys):
    rare = [f"train.{key}=100" for key in ("checkpoint_every", "sample_every")]
    passed, now, measure, validate = [0.0], time.perf_counter, timing.step_seconds, setup.held_out_loss

    def for_hours(*arguments):
        passed[0] += 1e4
        return validate(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: now() + passed[0])
    monkeypatch.setattr(setup, "held_out_loss", for_hours)
    monkeypatch.setattr(timing, "step_seconds", lambda *arguments: measure(*arguments) / 1000)
    run_ldm(settings(tmp_path / "run", encoder_folder), *rare, f"train.max_steps={PACE_STEPS + 1}")
    (line,) = re.findall("slower than planned: a step takes (.*) s instead of", capsys.readouterr().out)
    assert float(line) < 100


def test_a_plan_without_threads_has_no_line_of_them():
    assert "threads" not in PLAN.text()
    assert "  threads  1, as the run began" in dataclasses.replace(PLAN, threads="1, as the run began").text()
