"""Runs the tests that need CUDA and writes a line of JSON as each ends: `python -m tools.gpu_tests FILE TESTS`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        record = {"name": report.nodeid, "value": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            record["failed"] = (report.longreprtext.strip().splitlines() or ["without a message"])[-1][:300]
        self.outcomes[report.outcome] += 1
        self.write(record)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported; without this nothing would say why none of its tests was run."""
        if report.failed:
            lines = report.longreprtext.strip().splitlines() or ["without a message"]
            self.write({"name": report.nodeid, "value": "not imported", "failed": lines[-1].removeprefix("E   ")[:300]})

    def write(self, record: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def main() -> int:
    """Runs them; without CUDA all are skipped, which is a failure here."""
    file, *tests = sys.argv[1:]
    recorder = Recorder(Path(file))
    # A warning that a card gives rise to is told in the log; as an error it would cost the test.
    options = ["-m", "cuda", "-q", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*options, *tests], plugins=[recorder])
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(recorder.outcomes.items()))
    record = {"name": "tests", "value": counts or "none was run"}
    if not recorder.outcomes["passed"]:
        code = code or 1
        record["failed"] = f"{record['value']}; does torch see a CUDA device?"
    recorder.write(record)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
