"""Kill a training run again and again, and verify that it resumes bit for bit.

    python tools/torture_resume.py --kills 200 --seed 0 --out docs/torture.md docs/torture.json
    python tools/torture_resume.py --kills 20 --processes 2 --signal KILL TERM INT

A config is trained once without interruption. Then it is trained in other folders, in real processes that are killed at
random moments (by default SIGKILL to every process of the run) and resumed until there were enough kills. After each
kill the checkpoints are verified with their manifests, by code of this file alone: at least one must be valid, and none
older than before. Weights, EMA, optimizer, exports, the log (without speeds) and the pixels of all sample grids must
equal those of the uninterrupted run. A run that received TERM or INT during training must have saved its last step and
exit with code 75. The exit code of this program is 1 if anything differs.

Kills are planned from the seed: a phase, its occurrence after the start, and a fraction of the phase's duration in the
uninterrupted run. Where a kill hit follows from what it left on disk. The config is made small (SMALL), --set follows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIGS = {"ldm": "digits.yaml", "autoencoder": "digits-first-stage.yaml"}
SMALL = [
    "train.max_steps=16", "train.batch_size=16", "train.log_every=1", "train.checkpoint_every=2", "train.cpu_threads=1",
    "train.validate_every=4", "train.validation_samples=16", "train.sample_every=4",
]  # fmt: skip
SMALL_SAMPLES = ["sample.images_per_prompt=1", "sample.num_inference_steps=4", "sample.prompts=[the digit 5, a seven]"]
# Of 10 kills. "rename" starts when a checkpoint gets its name: the export is updated, then old ones are pruned.
MIX = {"start-up": 2, "step": 1, "evaluation": 2, "save": 4, "rename": 1}
MAX_TURNS = 3
# Where kills hit.
HITS = ("start-up", "step", "evaluation", "save, before the rename", "save, after the rename")
POLL_SECONDS = 0.002
STOPPED = 75
PATIENCE_SECONDS = 300


class Difference(Exception):
    """A run that did not resume exactly."""


# ---- what is on disk, read without ldm


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def damage(checkpoint: Path) -> str | None:
    """How a checkpoint differs from its manifest, or None."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {error!r}"
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    if different := sorted((there - {"manifest.json"}) ^ files.keys()):
        return f"{different[0]} is missing, or not in the manifest"
    for name, entry in files.items():
        if (checkpoint / name).stat().st_size != entry["bytes"] or sha256(checkpoint / name) != entry["sha256"]:
            return f"{name} has changed"
    return None


def valid_checkpoints(run: Path) -> dict[int, Path]:
    """Step → folder, oldest first. Damaged checkpoints are skipped unless the newest is damaged."""
    folders = sorted(path for path in run.glob("checkpoints/step_*") if (path / "manifest.json").is_file())
    faults = {path: damage(path) for path in folders}
    if folders and (fault := faults[folders[-1]]) is not None:
        raise Difference(f"the newest checkpoint {folders[-1]} is damaged: {fault}")
    return {step_of(path): path for path in folders if faults[path] is None}


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def logged(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log; a line that is no JSON has the key "unreadable"."""
    path = run / "metrics.jsonl"
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append({"unreadable": line})
    return found


def temporaries(run: Path) -> set[Path]:
    """Folders that are being written under a temporary name."""
    return {Path(entry) for at in (run, run / "checkpoints") if at.is_dir() for entry in os.scandir(at)
            if entry.name.startswith(".") and entry.is_dir()}  # fmt: skip


def evidence(run: Path) -> dict[str, Any]:
    """All that must be the same in two runs of one config, under names: hashes of tensors and pixels, lines of the log.

    Checkpoints are those that are valid; what a kill left behind (hidden folders) does not count.
    """
    found: dict[str, Any] = {}
    for folder in [
        *valid_checkpoints(run).values(),
        *(run / name for name in ("pipeline", "lora", "autoencoder", "best")),
    ]:
        for path in sorted(folder.rglob("*.safetensors")):
            found[path.relative_to(run).as_posix()] = sha256(path)
        for path in (folder / "best.json", folder / "training" / "state.json"):
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))
                keys = content if path.name == "best.json" else ("step", "ema_updates", "grad_scaler")
                found[path.relative_to(run).as_posix()] = {key: content.get(key) for key in keys}
    for path in sorted(run.glob("samples/*.png")):
        with Image.open(path) as image:
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            found[path.relative_to(run).as_posix()] = [image.mode, *image.size, pixels]
    for number, line in enumerate(logged(run)):
        found[f"log line {number + 1}"] = {key: value for key, value in line.items() if "second" not in key}
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Differences of two runs. Checkpoints that only one of them has are ignored, except the newest."""
    checkpoints = [{part for name in run if (part := checkpoint_of(name))} for run in (expected, found)]
    shared = set.intersection(*checkpoints) | {max(steps) for steps in checkpoints if steps}
    return [
        f"{name}: {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name) and (checkpoint_of(name) is None or checkpoint_of(name) in shared)
    ]


def checkpoint_of(name: str) -> str | None:
    found = re.match(r"checkpoints/(step_\d+)/", name)
    return found and found[1]


# ---- when to kill


@dataclass(frozen=True)
class Attack:
    """A planned kill: a fraction `moment` of a phase's usual duration after its `turn`-th start (1-based).

    `rank` is the process that receives TERM or INT, as a fraction of their number.
    """

    phase: str
    turn: int
    moment: float
    signal: str
    rank: float


def plan(kills: int, seed: int, signals: list[str]) -> list[Attack]:
    """Attacks in the proportions of MIX; a function of the arguments alone."""
    draw = random.Random(seed)
    deck: list[str] = []
    attacks = []
    for _ in range(kills):
        if not deck:
            deck = [phase for phase, count in MIX.items() for _ in range(count)]
            draw.shuffle(deck)
        phase = deck.pop()
        turn = 1 if phase == "start-up" else draw.randint(1, MAX_TURNS)
        attacks.append(Attack(phase, turn, draw.random(), draw.choice(signals), draw.random()))
    return attacks


@dataclass
class Watch:
    """Observes a session of a run from outside.

    Attributes:
        resumed: step of the checkpoint that it goes on from, 0 without.
        begun: (time, phase) of each beginning; the log tells of a "step" that is done, folders of a save, and the
            report, which is renewed after it, that it has ended.
        steps: those that were logged in this session.
    """

    run: Path
    resumed: int = 0
    begun: list[tuple[float, str]] = field(default_factory=lambda: [(time.perf_counter(), "start-up")])
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._old = temporaries(self.run)  # left by earlier kills until it is removed
        self._saves: set[Path] = set()
        self._seen: object = None
        self._cut = False  # lines after the checkpoint are dropped before new ones are written
        self._report = self._inode("report.html")
        self.poll()

    def _inode(self, name: str) -> int:
        return (self.run / name).stat().st_ino if (self.run / name).exists() else 0

    def poll(self) -> None:
        path, now = self.run / "metrics.jsonl", time.perf_counter()
        seen = (path.stat().st_ino, path.stat().st_size) if path.exists() else ()
        if seen != self._seen:
            self._seen = seen
            steps = [line["step"] for line in logged(self.run) if "loss" in line]
            self._cut = self._cut or (steps or [0])[-1] <= self.resumed
            new = [step for step in steps if self._cut and step > (self.steps or [self.resumed])[-1]]
            self.steps += new
            for step in new:
                self.begun.append((now, "evaluation" if self.evaluated(step) and not self.saved(step) else "step"))
        there = temporaries(self.run)
        self._old &= there
        present = f".step_{(self.steps or [-1])[-1]:08d}."  # older ones are being removed
        saves = {path for path in there - self._old if path.name.startswith(present)}
        self.begun += [(now, "rename")] * len(self._saves - saves) + [(now, "save")] * len(saves - self._saves)
        self._saves = saves
        report = self._inode("report.html")
        if report != self._report and self.steps:
            self.begun.append((now, "evaluation" if self.evaluated(self.steps[-1]) else "step"))
        self._report = report

    @cached_property
    def train(self) -> dict[str, Any]:
        """The train section of the config."""
        config: dict[str, Any] = yaml.safe_load((self.run / "config.yaml").read_text(encoding="utf-8"))
        return dict(config["train"])

    def evaluated(self, step: int) -> bool:
        return step == self.train["max_steps"] or any(
            step % self.train[every] == 0 for every in ("validate_every", "sample_every")
        )

    def saved(self, step: int) -> bool:
        return step == self.train["max_steps"] or step % self.train["checkpoint_every"] == 0

    def due(self, attack: Attack, seconds: dict[str, float]) -> float | None:
        """The time of an attack, once its phase has begun."""
        times = [at for at, phase in self.begun if phase == attack.phase]
        return times[attack.turn - 1] + attack.moment * seconds[attack.phase] if len(times) >= attack.turn else None

    def hit(self) -> str:
        """Where a session ended, by what it left on disk."""
        self.poll()
        phase = self.begun[-1][1]
        return {"save": HITS[3], "rename": HITS[4]}.get(phase, phase)


def usual_seconds(watch: Watch) -> dict[str, float]:
    """The median duration of each phase of a session that has just ended."""
    ends = [*(at for at, _ in watch.begun[1:]), time.perf_counter()]
    spans: dict[str, list[float]] = {phase: [] for phase in MIX}
    for (at, phase), following in zip(watch.begun, ends, strict=True):
        spans[phase].append(following - at)
    if unseen := [phase for phase, times in spans.items() if len(times) < (1 if phase == "start-up" else MAX_TURNS)]:
        raise ValueError(f"{unseen[0]} is too rare in this run to be hit; raise train.max_steps")
    return {phase: statistics.median(times) for phase, times in spans.items()}


# ---- processes


def end(process: subprocess.Popen[bytes], attack: Attack, processes: int) -> None:
    """Kill all processes of a session, or send TERM or INT to one that trains, and wait for the last."""
    launcher = psutil.Process(process.pid)
    try:
        if attack.signal == "KILL":
            members = family(launcher)
            for member in members:
                member.kill()
        else:
            members = [launcher, *launcher.children(recursive=True)]
            ranks = launcher.children() if processes > 1 else []
            target = ranks[int(attack.rank * len(ranks))] if ranks else launcher
            target.send_signal(getattr(signal, f"SIG{attack.signal}"))
    except psutil.NoSuchProcess:  # it has ended by itself
        members = []
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        for member in family(launcher):
            member.kill()
        raise Difference(f"SIG{attack.signal} did not end the run within {PATIENCE_SECONDS} s") from None
    psutil.wait_procs(members, PATIENCE_SECONDS)


def family(launcher: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants, stopped, so that none starts another; torchrun gives each its own group."""
    stopped: list[psutil.Process] = []
    found = [launcher]
    while found:
        for member in found:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
            stopped.append(member)
        found = [member for member in launcher.children(recursive=True) if member not in stopped]
    return stopped


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Torture:
    """An uninterrupted run, and runs that are killed, in one folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.small = [*SMALL, *(SMALL_SAMPLES if arguments.script == "ldm" else [])]
        self.attacks = plan(arguments.kills, arguments.seed, arguments.signal)
        self.seconds: dict[str, float] = {}  # duration of each phase
        self.expected: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None  # the session that runs
        self.kills: Counter[str] = Counter()  # by where they hit
        self.valid: Counter[str] = Counter()  # of these, after which there was a valid checkpoint
        self.codes: Counter[str] = Counter()  # by signal and exit code
        self.resumed = self.left_over = 0
        self.sessions: list[int] = []  # of each run
        self.differences: list[str] = []

    def command(self, run: Path) -> list[str]:
        """The command line of the script, with its own cache, so that some kills hit while it is filled."""
        a = self.arguments
        launch = [sys.executable]
        if a.processes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={a.processes}", f"--master_port={free_port()}"]
        settings = [f"output_dir={run}", f"data.cache_dir={run.parent / 'cache'}", *self.small, *a.set]
        return [*launch, str(ROOT / "train" / f"train_{a.script}.py"), "--config", str(a.config), "--set", *settings]

    def start(self, run: Path, *more: str) -> subprocess.Popen[bytes]:
        run.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [*self.command(run), *more]
        with (run.parent / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        return self.process

    def unbroken(self) -> None:
        run = self.folder / "unbroken" / "run"
        watch, process = Watch(run), self.start(run)
        while process.poll() is None:
            watch.poll()
            time.sleep(POLL_SECONDS)
        self.check_done(run, process.returncode)
        self.seconds = usual_seconds(watch)
        self.expected = evidence(run)

    def break_runs(self) -> None:
        """Kill and resume runs until there were enough kills; each finished run is compared."""
        while self.attacks:
            run = self.folder / f"broken-{len(self.sessions) + 1}" / "run"
            newest: int | None = 0
            self.sessions.append(0)
            while newest is not None:
                self.sessions[-1] += 1
                newest = self.session(run, newest)
            wrong = differences(self.expected, evidence(run))
            self.differences += [f"{run}, {difference}" for difference in wrong]
            self.left_over += len(temporaries(run))
            print(f"{run} is done after {self.sessions[-1]} sessions; differences: {len(wrong)}", flush=True)
            if not wrong:
                shutil.rmtree(run.parent)

    def session(self, run: Path, newest: int) -> int | None:
        """Start or resume a run and attack it. Returns the step of its newest checkpoint, or None if it is done."""
        attack = self.attacks[0] if self.attacks else None
        watch, process = Watch(run, newest), self.start(run, "--resume")
        due: float | None = None
        while process.poll() is None and (due is None or time.perf_counter() < due):
            time.sleep(POLL_SECONDS)
            watch.poll()
            due = due or (watch.due(attack, self.seconds) if attack is not None else None)
        if attack is not None and process.poll() is None:
            end(process, attack, self.arguments.processes)
            hit = watch.hit() if process.returncode else None
        else:
            hit = None
        valid = max(valid_checkpoints(run), default=0)
        if valid < newest:
            raise Difference(
                f"{run}: step {newest} had a valid checkpoint; now ({hit or 'done'}) the newest is {valid}"
            )
        if watch.steps and watch.steps[0] > newest + watch.train["log_every"]:
            raise Difference(f"{run}: checkpoint {newest} was valid, but the run resumed at step {watch.steps[0]}")
        self.resumed += bool(watch.steps and newest)
        if attack is None or hit is None:
            self.check_done(run, process.returncode)
            return None
        self.attacks.pop(0)
        self.kills[hit] += 1
        self.valid[hit] += valid > 0
        self.codes[f"SIG{attack.signal}: {process.returncode}"] += 1
        at = f"kill {sum(self.kills.values())}: SIG{attack.signal} in {hit}, step {max([newest, *watch.steps])}"
        print(f"{at}; {len(watch.begun)} phases begun; checkpoint {valid} is valid", flush=True)
        if attack.signal != "KILL" and watch.steps:
            self.check_stop(run, process.returncode, valid, watch.steps[-1])
        return valid

    def check_done(self, run: Path, code: int) -> None:
        if code != 0:
            tail = (run.parent / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise Difference(f"{run} failed with exit code {code}:\n" + "\n".join(tail))

    def check_stop(self, run: Path, code: int, valid: int, step: int) -> None:
        """A run that received TERM or INT during training has saved its last step and exits with its own code."""
        if valid < step:
            self.differences.append(
                f"{run}: stopped by a signal, step {step} was lost; the newest checkpoint is {valid}"
            )
        if self.arguments.processes == 1 and code != STOPPED:  # torchrun has exit codes of its own
            self.differences.append(
                f"{run}: stopped by a signal at step {step}, it ended with {code} instead of {STOPPED}"
            )

    def result(self, seconds: float) -> dict[str, Any]:
        a = self.arguments
        packages = {name: version(name) for name in ("torch", "numpy", "accelerate", "transformers", "safetensors")}
        return {
            "script": f"train/train_{a.script}.py",
            "config": a.config.name,
            "set": [*self.small, *a.set],
            "processes": a.processes,
            "seed": a.seed,
            "kills": {hit: self.kills[hit] for hit in HITS},
            "valid_checkpoint_after": {hit: self.valid[hit] for hit in HITS},
            "exit_codes": dict(sorted(self.codes.items())),
            "sessions_resumed": self.resumed,
            "sessions_of_each_run": self.sessions,
            "compared": len(self.expected),
            "temporary_folders_left": self.left_over,
            "differences": self.differences,
            "minutes": round(seconds / 60, 1),
            "usual_seconds": {phase: round(value, 3) for phase, value in self.seconds.items()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **packages},
        }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    kills, valid, runs = result["kills"], result["valid_checkpoint_after"], result["sessions_of_each_run"]
    table = [(hit, kills[hit], valid[hit]) for hit in HITS] + [("all", sum(kills.values()), sum(valid.values()))]
    rows = "\n".join(f"| {hit} | {count} | {after} |" for hit, count, after in table)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    codes = ", ".join(f"{code} ({count} times)" for code, count in result["exit_codes"].items())
    faults = "\n".join(f"- {difference}" for difference in result["differences"]) or "None."
    return f"""# Runs that were killed, and went on

Written by `tools/torture_resume.py` in {result["minutes"]} minutes on {result["machine"]}; {versions}.
`{result["script"]}`, `{result["config"]}`, processes: {result["processes"]}, seed {result["seed"]}, and

    --set {shlex.join(result["set"])}

| where the kill hit | kills | with a valid checkpoint afterwards |
|---|--:|--:|
{rows}

The others hit before a run had its first checkpoint. {result["sessions_resumed"]} sessions trained on from the newest
checkpoint that was valid. Exit codes: {codes}.
Runs that were done: {len(runs)}, after {", ".join(map(str, runs))} sessions.
Each was compared with the unbroken one in {result["compared"]} places.
Temporary folders left in them: {result["temporary_folders_left"]}.

## Differences

{faults}
"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the plan of kills")
    parser.add_argument("--signal", nargs="+", choices=("KILL", "TERM", "INT"), default=["KILL"], help="each as often")
    parser.add_argument("--processes", type=int, default=1, help="above 1 by torchrun; TERM and INT reach one of them")
    parser.add_argument("--script", choices=tuple(CONFIGS), default="ldm", help="of train/")
    parser.add_argument("--config", type=Path, help="by default that of the digits")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in training")
    parser.add_argument("--folder", type=Path, help="where to train; by default the folder of temporary files")
    parser.add_argument("--out", nargs="+", type=Path, default=[], help="files for the result, .json or .md")
    arguments = parser.parse_args()
    arguments.config = arguments.config or ROOT / "configs" / CONFIGS[arguments.script]
    if wrong := [str(path) for path in arguments.out if path.suffix not in (".json", ".md")]:
        parser.error(f"--out {wrong[0]} is neither .json nor .md")
    return arguments


def main() -> None:
    arguments = parsed()
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="ldm-torture-", dir=arguments.folder))
    torture = Torture(arguments, folder)
    try:
        torture.unbroken()
        print(
            "the uninterrupted run:", ", ".join(f"{name} {s:.2f} s" for name, s in torture.seconds.items()), flush=True
        )
        torture.break_runs()
    except Difference as difference:
        torture.differences.append(str(difference))
    finally:  # also where this program is interrupted
        if torture.process is not None and torture.process.poll() is None:
            end(torture.process, Attack("", 1, 0.0, "KILL", 0.0), arguments.processes)
    result = torture.result(time.perf_counter() - started)
    for path in arguments.out:
        text = markdown(result) if path.suffix == ".md" else json.dumps(result, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    print(markdown(result))
    if torture.differences:
        print(f"the runs are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
