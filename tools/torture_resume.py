"""Proves that a run which is killed anywhere goes on exactly: kills it again and again and compares with one that was not.

    python tools/torture_resume.py --kills 200 --seed 0 --out docs/torture.md docs/torture.json
    python tools/torture_resume.py --kills 20 --processes 2 --signal KILL TERM INT

A config is trained once without a break. Then the same is trained in other folders, in real processes that are ended at
random moments (by default SIGKILL to every process of the run) and started again with --resume, until there were
enough kills and the last run is done. After each kill the checkpoints are verified with their manifests, by code of this
file alone: once there was a valid one there must always be one, and never an older one than before. Of each run that is
done, weights, averages, moments, exported weights, the log (without speeds) and the pixels of all sample grids must be
those of the unbroken run, bit for bit. Exit code 1 if anything is not.

Kills are planned from the seed: a phase, which of its moments after the start, and a share of the phase's duration, which
the unbroken run tells. Where a kill hit is read from what it left on disk. The config is shrunk (see SMALL); --set
comes after that.
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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIGS = {"ldm": "digits.yaml", "autoencoder": "digits-first-stage.yaml"}
SMALL = [
    "train.max_steps=24", "train.batch_size=16", "train.log_every=1", "train.checkpoint_every=2", "train.cpu_threads=1",
    "train.validate_every=4", "train.validation_samples=16", "train.sample_every=4",
]  # fmt: skip
SMALL_SAMPLES = ["sample.images_per_prompt=1", "sample.num_inference_steps=4", "sample.prompts=[the digit 5, a seven]"]
# Of 10 planned kills; start-up is what all others have to pay for.
MIX = {"start-up": 2, "step": 2, "evaluation": 2, "save": 4}
MOST_TURNS = 3
PHASES = ("start-up", "step", "evaluation", "inside a save", "after a save's rename")  # where kills hit
POLL_SECONDS = 0.002
STOPPED = 75  # the exit code of a run that was asked to stop, and has saved
PATIENCE_SECONDS = 300


class Difference(Exception):
    """A promise that was not kept."""


# ---- what is on disk, read without ldm


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None: all files that are named and no others, as they were."""
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
    """Step → folder, oldest first. A damaged one is passed over unless it would be the newest."""
    folders = sorted(path for path in run.glob("checkpoints/step_*") if (path / "manifest.json").is_file())
    faults = {path: damage(path) for path in folders}
    if folders and (fault := faults[folders[-1]]) is not None:
        raise Difference(f"the newest checkpoint {folders[-1]} is damaged: {fault}")
    return {step_of(path): path for path in folders if faults[path] is None}


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def logged(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log."""
    path = run / "metrics.jsonl"
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def temporaries(run: Path) -> set[Path]:
    """Folders that something is written into before it gets its name."""
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
    """Where two runs differ. Checkpoints that only one of them has kept are left out, but for the newest."""
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
    """A planned kill: after the `turn`-th beginning of a phase (1-based), a share `moment` of its usual duration later."""

    phase: str
    turn: int
    moment: float
    signal: str
    rank: float  # which of several processes is asked to stop, as a share of them


def plan(kills: int, seed: int, signals: list[str]) -> Iterator[Attack]:
    """As many attacks as there are to be kills, in the proportions of MIX; a function of the arguments alone."""
    random_ = random.Random(seed)
    deck: list[str] = []
    for _ in range(kills):
        if not deck:
            deck = [phase for phase, count in MIX.items() for _ in range(count)]
            random_.shuffle(deck)
        yield Attack(
            deck.pop(), random_.randint(1, MOST_TURNS), random_.random(), random_.choice(signals), random_.random()
        )


@dataclass
class Rhythm:
    """When the unbroken run did what, from its config and as it was watched."""

    run: Path
    every: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Path, watch: Watch) -> Rhythm:
        train = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]
        rhythm = cls(run, {key: train[key] for key in ("max_steps", "log_every", "validate_every", "sample_every")})
        spans: dict[str, list[float]] = {phase: [] for phase in MIX}
        spans["start-up"] = [watch.events[0][0] - watch.started]
        for (begin, kind, step), (end, following, _) in zip(
            watch.events, [*watch.events[1:], watch.ended()], strict=True
        ):
            if kind == "save":
                spans["save"].append(end - begin)
            elif rhythm.evaluates(step):
                spans["evaluation"].append(end - begin)
            elif following != "save":
                spans["step"].append(end - begin)
        rhythm.seconds = {phase: statistics.median(times or [0.1]) for phase, times in spans.items()}
        return rhythm

    def evaluates(self, step: int) -> bool:
        last = step == self.every["max_steps"]
        return last or any(step % self.every[key] == 0 for key in ("validate_every", "sample_every"))


@dataclass
class Watch:
    """What a session of a run does, seen from outside: it logs a step, or begins to save.

    Attributes:
        events: (time, "log" or "save", the last step that was logged).
    """

    run: Path
    resumed: int
    started: float = field(default_factory=time.perf_counter)
    events: list[tuple[float, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.old = temporaries(self.run)
        self._saves: set[Path] = set()
        self._log: tuple[int, int] | None = None
        self._polled = False
        self._cut = False  # what was logged after the checkpoint is dropped before anything new is
        self.poll()

    def poll(self) -> None:
        path, now = self.run / "metrics.jsonl", time.perf_counter()
        seen = (path.stat().st_ino, path.stat().st_size) if path.exists() else None
        if seen != self._log or not self._polled:
            self._log, self._polled = seen, True
            steps = [line["step"] for line in logged(self.run) if "loss" in line]
            self._cut = self._cut or (steps or [0])[-1] <= self.resumed
            known = max([self.resumed, *(step for _, _, step in self.events)])
            self.events += [(now, "log", step) for step in steps if self._cut and step > known]
        for path in temporaries(self.run) - self.old - self._saves:
            if path.name.startswith(".step_"):
                self._saves.add(path)
                self.events.append((now, "save", self.events[-1][2] if self.events else self.resumed))

    def ended(self) -> tuple[float, str, int]:
        return time.perf_counter(), "end", 0

    @property
    def step(self) -> int | None:
        """The last step that this session has logged."""
        return next((step for _, kind, step in reversed(self.events) if kind == "log"), None)

    def due(self, attack: Attack, rhythm: Rhythm) -> float | None:
        """The time of an attack, once its phase has begun."""
        if attack.phase == "start-up":
            begins = [self.started]
        elif attack.phase == "save":
            begins = [at for at, kind, _ in self.events if kind == "save"]
        else:
            evaluation = attack.phase == "evaluation"
            begins = [at for at, kind, step in self.events if kind == "log" and rhythm.evaluates(step) == evaluation]
        turn = 1 if attack.phase == "start-up" else attack.turn
        return begins[turn - 1] + attack.moment * rhythm.seconds[attack.phase] if len(begins) >= turn else None

    def phase(self, rhythm: Rhythm) -> str:
        """Where a session was when it ended, by what it left: more is known then than when the attack was made."""
        self.poll()
        names = {path.name for path in temporaries(self.run) - self.old}
        if any(name.startswith(".step_") for name in names):
            return "inside a save"
        if self.step is None:
            return "start-up"
        if self.events[-1][1] == "save":
            return "after a save's rename"  # the export is renewed, the report written, old ones pruned
        return "evaluation" if rhythm.evaluates(self.step) else "step"


# ---- processes


def end(process: subprocess.Popen[bytes], attack: Attack, processes: int) -> None:
    """Kills all processes of a session, or asks one of those that train to stop, and waits for the last."""
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
    except psutil.NoSuchProcess:  # it has just ended by itself
        members = []
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        for member in family(launcher):
            member.kill()
        raise Difference(f"SIG{attack.signal} did not end the run within {PATIENCE_SECONDS} s") from None
    psutil.wait_procs(members, PATIENCE_SECONDS)


def family(launcher: psutil.Process) -> list[psutil.Process]:
    """A process and all below it, stopped, so that none starts another meanwhile; torchrun gives each its own group."""
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
    """An unbroken run, and runs that are killed, below one folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.kills: Counter[str] = Counter()  # by where they hit
        self.valid: Counter[str] = Counter()  # of these, after which there was a valid checkpoint
        self.codes: Counter[str] = Counter()  # by signal and exit code
        self.resumed = self.left_over = 0
        self.sessions: list[int] = []  # of each run
        self.differences: list[str] = []

    def command(self, run: Path) -> list[str]:
        """The script as a user calls it, on a cache of its own, so that some kills hit while that is filled."""
        a = self.arguments
        launch = [sys.executable]
        if a.processes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={a.processes}", f"--master_port={free_port()}"]
        small = [*SMALL, *(SMALL_SAMPLES if a.script == "ldm" else [])]
        settings = [f"output_dir={run}", f"data.cache_dir={run.parent / 'cache'}", *small, *a.set]
        return [*launch, str(ROOT / "train" / f"train_{a.script}.py"), "--config", str(a.config), "--set", *settings]

    def start(self, run: Path, *more: str) -> subprocess.Popen[bytes]:
        run.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [*self.command(run), *more]
        with (run.parent / "output.txt").open("ab") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    def unbroken(self) -> Rhythm:
        run = self.folder / "unbroken" / "run"
        watch, process = Watch(run, 0), self.start(run)
        while process.poll() is None:
            watch.poll()
            time.sleep(POLL_SECONDS)
        self.check_done(run, process.returncode)
        self.expected = evidence(run)
        return Rhythm.of(run, watch)

    def check_done(self, run: Path, code: int) -> None:
        if code != 0:
            tail = (run.parent / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise Difference(f"{run} failed with exit code {code}:\n" + "\n".join(tail))

    def break_runs(self, rhythm: Rhythm) -> None:
        """Runs that are killed and resumed until there were enough kills; each is compared when it is done."""
        attacks = plan(self.arguments.kills, self.arguments.seed, self.arguments.signal)
        attack = next(attacks, None)
        while attack is not None:
            run = self.folder / f"broken-{len(self.sessions) + 1}" / "run"
            newest: int | None = 0
            self.sessions.append(0)
            while newest is not None:
                self.sessions[-1] += 1
                hits = self.hits
                newest = self.session(run, rhythm, attack, newest)
                if self.hits > hits:
                    attack = next(attacks, None)
            wrong = differences(self.expected, evidence(run))
            self.left_over += len(temporaries(run))
            self.differences += [f"{run}, {difference}" for difference in wrong]
            print(f"{run} is done after {self.sessions[-1]} sessions; differences: {len(wrong)}", flush=True)
            if not wrong:
                shutil.rmtree(run.parent)

    def session(self, run: Path, rhythm: Rhythm, attack: Attack | None, newest: int) -> int | None:
        """Starts a run or goes on with it, and attacks it. The step of its newest checkpoint, None once it is done."""
        watch, process = Watch(run, newest), self.start(run, "--resume")
        due: float | None = None
        while process.poll() is None and (due is None or time.perf_counter() < due):
            time.sleep(POLL_SECONDS)
            watch.poll()
            due = due or (watch.due(attack, rhythm) if attack is not None else None)
        alive = process.poll() is None
        if attack is not None and alive:
            end(process, attack, self.arguments.processes)
        phase, first = watch.phase(rhythm), next((step for _, kind, step in watch.events if kind == "log"), None)
        valid = max(valid_checkpoints(run), default=0)
        if valid < newest:
            raise Difference(f"{run}: the newest valid checkpoint was step {newest}, and after {phase} it is {valid}")
        if first is not None and first > newest + rhythm.every["log_every"]:
            raise Difference(f"{run}: checkpoint {newest} was valid, and the session went on with step {first}")
        if first is not None and newest:
            self.resumed += 1
        if not alive or process.returncode == 0:
            self.check_done(run, process.returncode)
            return None
        assert attack is not None
        self.kills[phase] += 1
        self.valid[phase] += valid > 0
        self.codes[f"SIG{attack.signal}: {process.returncode}"] += 1
        print(
            f"kill {self.hits}, SIG{attack.signal} at {phase}, step {watch.step or newest}: {valid} is valid",
            flush=True,
        )
        if attack.signal != "KILL" and watch.step is not None:
            self.check_stop(run, process.returncode, valid, watch.step)
        return valid

    def check_stop(self, run: Path, code: int, valid: int, step: int) -> None:
        """A run that was asked to stop while it trained has saved its last step and says so by its exit code."""
        if valid < step:
            self.differences.append(f"{run}: asked to stop, step {step} was lost; the newest checkpoint is {valid}")
        if self.arguments.processes == 1 and code != STOPPED:  # torchrun has exit codes of its own
            self.differences.append(f"{run}: asked to stop at step {step}, it ended with {code} instead of {STOPPED}")

    @property
    def hits(self) -> int:
        return sum(self.kills.values())

    def result(self, rhythm: Rhythm, seconds: float) -> dict[str, Any]:
        a = self.arguments
        packages = {name: version(name) for name in ("torch", "numpy", "accelerate", "transformers", "safetensors")}
        return {
            "script": f"train/train_{a.script}.py",
            "config": str(
                a.config.resolve().relative_to(ROOT) if a.config.resolve().is_relative_to(ROOT) else a.config
            ),
            "set": [*SMALL, *(SMALL_SAMPLES if a.script == "ldm" else []), *a.set],
            "processes": a.processes,
            "seed": a.seed,
            "kills": {phase: self.kills[phase] for phase in PHASES},
            "valid_checkpoint_after": {phase: self.valid[phase] for phase in PHASES},
            "exit_codes": dict(sorted(self.codes.items())),
            "sessions_that_went_on": self.resumed,
            "sessions_of_each_run": self.sessions,
            "compared_of_each_run": len(self.expected),
            "temporary_folders_left": self.left_over,
            "differences": self.differences,
            "seconds": round(seconds),
            "seconds_of": {phase: round(value, 3) for phase, value in rhythm.seconds.items()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **packages},
        }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    kills, valid = result["kills"], result["valid_checkpoint_after"]
    rows = [f"| {phase} | {kills[phase]} | {valid[phase]} |" for phase in PHASES]
    rows.append(f"| all | {sum(kills.values())} | {sum(valid.values())} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    faults = [f"- {difference}" for difference in result["differences"]] or ["None."]
    lines = [
        "# Runs that were killed, and went on",
        "",
        f"`{result['script']}` with `{result['config']}`, made small by `--set {' '.join(map(shlex.quote, result['set']))}`; "
        f"{result['processes']} process(es), seed {result['seed']}. Written by `tools/torture_resume.py` in "
        f"{result['seconds'] / 60:.0f} minutes ({result['machine']}; {versions}).",
        "",
        "| where the kill hit | kills | of these with a valid checkpoint afterwards |",
        "|---|--:|--:|",
        *rows,
        "",
        "Where there was none afterwards, there had been none before: the first was not written yet. How sessions ended: "
        + ", ".join(f"{code} ({count})" for code, count in result["exit_codes"].items())
        + f". {result['sessions_that_went_on']} sessions went on from a checkpoint, each from the newest one that was valid.",
        "",
        f"{len(result['sessions_of_each_run'])} runs were done, in {', '.join(map(str, result['sessions_of_each_run']))} "
        f"sessions. Each was compared with the unbroken run in {result['compared_of_each_run']} places (SHA-256 of weights, "
        "averages, moments and exported weights, all lines of the log but for speeds, pixels of all sample grids). "
        f"Temporary folders that they left behind: {result['temporary_folders_left']}.",
        "",
        "## Differences",
        "",
        *faults,
    ]
    return "\n".join(lines) + "\n"


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
    rhythm = torture.unbroken()
    print("the unbroken run took", ", ".join(f"{v:.2f} s for {k}" for k, v in rhythm.seconds.items()), flush=True)
    try:
        torture.break_runs(rhythm)
    except Difference as difference:
        torture.differences.append(str(difference))
    result = torture.result(rhythm, time.perf_counter() - started)
    for path in arguments.out:
        text = markdown(result) if path.suffix == ".md" else json.dumps(result, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
    print(markdown(result))
    if torture.differences:
        print(f"the runs are kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
