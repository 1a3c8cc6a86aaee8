"""Runs the tests that need CUDA and writes a line of JSON as each ends: `python -m tools.gpu_tests FILE TESTS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Recorder:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        record = {"name": report.nodeid, "value": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            record["failed"] = report.longreprtext.strip().splitlines()[-1][:300]
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    file, *tests = sys.argv[1:]
    sys.exit(pytest.main(["-m", "cuda", "-q", "-p", "no:cacheprovider", *tests], plugins=[Recorder(Path(file))]))
