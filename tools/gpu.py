"""One run on a GPU: tests that need CUDA, a benchmark beside diffusers, training of the built-in model.

    python tools/gpu.py --out OUT                                     # all parts, in the order of their worth
    python tools/gpu.py --out OUT --parts tests,benchmark --minutes 4
    python tools/gpu.py --out OUT --parts training --minutes 7 --use BUNDLE
    python tools/gpu.py --out OUT --parts peer --peer DIFFUSERS       # the training script of a checkout of diffusers
    python tools/gpu.py --out OUT --rehearse                          # on a CPU, with tiny sizes
    python tools/gpu.py --bundle BUNDLE                               # what a machine without network needs

Every part is a process of its own with a share of the minutes. One that fails or hangs costs only itself. OUT/gpu.json
and OUT/gpu.md are written anew after every result, OUT/log.txt holds what the parts printed, and weights that were
trained come in files of at most 15 MiB (`python -m tools.gpu_training --join OUT`). A second call with other parts and
the same OUT adds to what is there. Ctrl-C ends the part that runs and keeps what it has measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import lzma
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "numpy", "peft", "pillow", "safetensors", "xformers")
LOG_BYTES = 8 * 2**20
# Part → its share of the minutes.
PARTS = {"tests": 2.0, "benchmark": 2.5, "training": 7.0, "compile": 2.5}
PEER = "peer"  # runs only where --peer names a checkout of diffusers
SHARES = PARTS | {PEER: 1.5}


@dataclass
class Part:
    """What became of a part. `status` is "not run", "running", "done", "failed", "timed out" or "stopped"."""

    status: str = "not run"
    reason: str = ""
    limit_seconds: float = 0.0
    seconds: float = 0.0
    commit: str | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """OUT/gpu.json, and OUT/gpu.md made from it."""

    out: Path
    machine: dict[str, Any]
    parts: dict[str, Part]

    def write(self) -> None:
        content = {**self.machine, "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()}}
        for name, text in (("gpu.json", json.dumps(content, indent=1) + "\n"), ("gpu.md", markdown(content))):
            aside = self.out / f".{name}.partial"
            aside.write_text(text, encoding="utf-8")
            aside.replace(self.out / name)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def machine(rehearse: bool, bundle: Path | None = None, site: Path | None = None) -> dict[str, Any]:
    """Card, driver, versions and commit; asks the driver, not torch, so that a broken torch is a part's failure.

    What came with a bundle, in `site`, is used in the place of what is installed.
    """

    def answer(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    def installed(name: str) -> str | None:
        path = [*([str(site)] if site else []), *sys.path]
        return next((found.version for found in distributions(name=name, path=path)), None)

    asked = answer("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    card, driver, memory = (asked.splitlines()[0].split(", ") if asked else [None, None, None])[:3]
    return {
        "rehearsal": rehearse,
        "card": card,
        "driver": driver,
        "memory": memory,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in LIBRARIES},
        # A copy of a checkout may have no history; a bundle tells what it was made from.
        "commit": answer("git", "rev-parse", "HEAD") or (bundle and read_bundle(bundle).get("commit")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command_of(name: str, scratch: Path, out: Path, seconds: float, arguments: argparse.Namespace) -> list[str]:
    """The process of a part; figures are lines of JSON in `scratch/NAME.jsonl`."""
    figures = str(scratch / f"{name}.jsonl")
    rehearse = ["--rehearse"] if arguments.rehearse else []
    if name == "tests":
        selected = os.environ.get("LDM_GPU_TESTS", str(ROOT / "tests" / "cuda"))
        return [sys.executable, "-m", "tools.gpu_tests", figures, selected]
    if name == "training":
        use = ["--use", str(arguments.use)] if arguments.use else []
        start = ["--start", arguments.start] if arguments.start else []
        first = ["--first-scene", str(arguments.first_scene)] if arguments.first_scene else []
        return [
            sys.executable, "-m", "tools.gpu_training", figures, "--out", str(out), "--scratch", str(scratch),
            "--seconds", f"{seconds:.0f}", *use, *start, *first, *rehearse,
        ]  # fmt: skip
    if name == PEER:
        return [
            sys.executable, "-m", "tools.gpu_peer", figures, "--peer", str(arguments.peer), "--scratch", str(scratch),
            "--seconds", f"{seconds:.0f}", *rehearse,
        ]  # fmt: skip
    compiled = ["--compiled"] if name == "compile" else []
    # The last cases are long: none begins in the last sixth.
    return [
        sys.executable, "-m", "tools.gpu_benchmark", figures, "--seconds", f"{seconds * 5 / 6:.0f}", *compiled,
        *rehearse,
    ]  # fmt: skip


def run_part(report: Report, name: str, command: list[str], seconds: float, scratch: Path, site: Path | None) -> None:
    """Runs one part to its end or its limit, and takes over its figures as they come."""
    part, figures = report.parts[name], scratch / f"{name}.jsonl"
    part.status, part.limit_seconds, part.commit = "running", round(seconds, 1), report.machine["commit"]
    report.write()
    paths = [str(ROOT), *([str(site)] if site else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "LDM_CACHE": str(scratch / "cache")}
    if report.machine["rehearsal"]:
        environment |= {"LDM_REHEARSE_CUDA": "1", "ACCELERATE_USE_CPU": "true"}
    started = time.monotonic()
    with (report.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n==== {name}: {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        seen = 0
        try:
            while process.poll() is None and time.monotonic() - started < seconds:
                time.sleep(0.2)
                lines = read_figures(figures)
                if len(lines) > seen:
                    seen, part.figures = len(lines), lines
                    part.seconds = round(time.monotonic() - started, 1)
                    report.write()
            if process.poll() is None:
                part.status, part.reason = "timed out", f"it was ended after {seconds:.0f} s"
            elif process.returncode:
                part.status, part.reason = "failed", f"exit code {process.returncode}; log.txt has its output"
                if not any("failed" in figure for figure in read_figures(figures)):
                    part.reason += f", the last line: {last_line(report.out / 'log.txt')}"
            else:
                part.status = "done"
        except KeyboardInterrupt:
            part.status, part.reason = "stopped", "by a signal"
            raise
        finally:
            # Whatever it left running must not slow the next part, or hold the card's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            part.figures, part.seconds = read_figures(figures), round(time.monotonic() - started, 1)
            if failed := [figure["failed"] for figure in part.figures if "failed" in figure]:
                told = f"{len(failed)} of {len(part.figures)} failed: {failed[0]}"
                part.reason = "; ".join(filter(None, [part.reason, told]))
            report.write()
            shorten(report.out / "log.txt")
            print(f"{name}: {part.status} in {part.seconds:.0f} s {part.reason}".rstrip(), flush=True)


def last_line(log: Path) -> str:
    """What a part said last; an exception names itself there."""
    lines = log.read_text(encoding="utf-8", errors="replace")[-10_000:].strip().splitlines()
    return lines[-1][:300] if lines else ""


def shorten(log: Path) -> None:
    """Keeps the end of a log that has grown too long."""
    if log.stat().st_size > LOG_BYTES:
        data = log.read_bytes()[-LOG_BYTES // 2 :]
        log.write_bytes(b"(what came before is cut)\n" + data)


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a part's file; the last may be half written."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def markdown(content: dict[str, Any]) -> str:
    """gpu.md: a table a part."""
    where = f"{content['card']}, driver {content['driver']}, {content['memory']}" if content["card"] else "no GPU"
    lines = [f"# {'Rehearsal on a CPU: no figure counts' if content['rehearsal'] else where}", ""]
    libraries = ", ".join(f"{name} {found}" for name, found in content["versions"].items() if found)
    lines += [f"{content['started']}, commit {content['commit']}, Python {content['python']}, {libraries}.", ""]
    for name, part in content["parts"].items():
        lines += [f"## {name}: {part['status']}, {part['seconds']} s {part['reason']}".rstrip(), ""]
        # Of the tests only those are named that did not pass; gpu.json has them all.
        left_out = [figure["name"] for figure in part["figures"] if figure.get("value") == "skipped"]
        told = [figure for figure in part["figures"] if figure.get("value") not in ("passed", "skipped")]
        lines += ["- " + describe(figure) for figure in told]
        if left_out:
            lines += ["- skipped: " + ", ".join(name.rpartition("/")[2] for name in left_out)]
        lines.append("")
    return "\n".join(lines)


def describe(figure: dict[str, Any]) -> str:
    """One line of gpu.md."""
    facts = {k: v for k, v in figure.items() if k in ("batch", "precision", "latents", "steps") and v is not None}
    facts |= {key: True for key in ("channels_last", "compiled") if figure.get(key)}
    head = figure["name"] + "".join(
        f", {key} {value}" if value is not True else f", {key}" for key, value in facts.items()
    )
    if "skipped" in figure or "failed" in figure:
        return f"{head}: {figure.get('skipped') or figure['failed']}"
    if "milliseconds" not in figure:
        return f"{head}: {figure.get('value')} {figure.get('unit', '')}".rstrip()
    times = [
        f"{side} {taken['median']:.4g} ms ({taken['min']:.4g} to {taken['max']:.4g}, {taken['repeats']} times)"
        for side, taken in figure["milliseconds"].items()
    ]
    ratios = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in figure["ratios"].items()]
    memory = [f"{side} {size / 2**30:.2f} GiB more" for side, size in figure["peak_bytes_above_weights"].items()]
    share = figure.get("model_flop_utilization")
    extra = [f"model FLOP utilization {share:.1%}"] if share else []
    return f"{head}: " + "; ".join([*ratios, *times, *memory, *extra])


def earlier(out: Path, present: dict[str, Any], names: list[str]) -> dict[str, Part]:
    """Parts that an earlier call left in `out` and this one does not run again.

    Raises:
        ValueError: if they were measured on another machine, or in a rehearsal, where this is none.
    """
    try:
        content = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
        parts = {name: Part(**part) for name, part in content["parts"].items()}
        differing = [key for key in ("rehearsal", "card", "versions") if content[key] != present[key]]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out / 'gpu.json'} is none of ours ({error}); choose another folder for --out") from error
    kept = {name: part for name, part in parts.items() if name not in names}
    if differing and any(part.status != "not run" for part in kept.values()):
        raise ValueError(
            f"{out / 'gpu.json'} holds {', '.join(kept)} of a run with another {' and '.join(differing)}; choose "
            "another folder for --out"
        )
    return kept


def read_bundle(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    return content


def install(bundle: Path, target: Path) -> Path:
    """Unpacks the wheels of a bundle into a folder for PYTHONPATH; they are zip files of what Python imports.

    Raises:
        ValueError: naming a file of the bundle that is damaged or missing, or if its wheels are for another Python.
    """
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found != (wanted := read_bundle(bundle).get("python", found)):
        raise ValueError(f"{bundle} holds wheels for Python {wanted} and this is {found}; run it with Python {wanted}")
    for name, (_, sha256) in read_bundle(bundle)["files"].items():
        path = bundle / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is missing or damaged; copy the bundle again, or make it anew with --bundle")
    with lzma.open(bundle / "wheels.tar.xz") as compressed, tarfile.open(fileobj=compressed) as tar:
        tar.extractall(target / "wheels", filter="data")
    for wheel in sorted((target / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(target)
    return target


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="of tests, benchmark, training, compile; and peer, with --peer"
    )
    parser.add_argument(
        "--peer", type=Path, metavar="FOLDER",
        help="a checkout of diffusers: its train_text_to_image.py is timed in a part of its own, peer",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: whether everything runs")
    parser.add_argument("--bundle", type=Path, help="write a bundle into this folder, and end")
    parser.add_argument("--use", type=Path, help="a bundle, for a machine without network")
    parser.add_argument("--start", help="the model that the part training continues; default: the built-in model")
    parser.add_argument("--first-scene", type=int, help="the first scene that it was not trained on")
    arguments = parser.parse_args()
    if arguments.bundle:
        from tools import gpu_bundle

        try:
            gpu_bundle.write(arguments.bundle)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
        return
    names = arguments.parts.split(",")
    if arguments.peer and PEER not in names:
        names.insert(names.index("benchmark") + 1 if "benchmark" in names else len(names), PEER)
    if arguments.out is None:
        parser.error("--out is missing; name a folder for the results")
    if PEER in names and not arguments.peer:
        parser.error("--parts has peer; name a checkout of diffusers with --peer")
    if unknown := set(names) - set(SHARES):
        parser.error(f"--parts has {min(unknown)!r}; choose of {', '.join(PARTS)}")
    if not 0 < arguments.minutes < 24 * 60:
        parser.error(f"--minutes is {arguments.minutes}; it must be above 0")
    if arguments.use and not (arguments.use / "bundle.json").is_file():
        parser.error(f"--use {arguments.use} holds no bundle.json; make a bundle with --bundle")
    out = arguments.out.resolve()
    bundle = arguments.use and arguments.use.resolve()
    arguments.use = bundle
    arguments.peer = arguments.peer and arguments.peer.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = Path(tempfile.mkdtemp(prefix="ldm-gpu-"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        site = install(bundle, scratch / "site") if bundle else None
        found = machine(arguments.rehearse, bundle, site)
        report = Report(out, found, earlier(out, found, names) | {name: Part() for name in names})
        report.write()
        run_parts(report, names, scratch, site, arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(out / "gpu.md")
    sys.exit(any(report.parts[name].status != "done" for name in names))


def run_parts(
    report: Report, names: list[str], scratch: Path, site: Path | None, arguments: argparse.Namespace
) -> None:
    """Runs the parts in turn; what one leaves of its time is shared by those behind it."""
    deadline = time.monotonic() + 60 * arguments.minutes
    for i, name in enumerate(names):
        seconds = deadline - time.monotonic()
        if not arguments.rehearse:  # where the machine may be slow, and only whether it runs is asked
            seconds *= SHARES[name] / sum(SHARES[later] for later in names[i:])
        if seconds < 5:
            report.parts[name].reason = "no time was left"
            report.write()
            continue
        run_part(report, name, command_of(name, scratch, report.out, seconds, arguments), seconds, scratch, site)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
