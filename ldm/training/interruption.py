"""SIGTERM and SIGINT: finish the step, save, and exit with a code of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later.
EXIT_CODE = 75
# A launcher may repeat a signal that the terminal has already sent to all of its processes.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """A signal stopped the run, and nothing is unsaved."""


class Interruption:
    """Whether this process received a signal, and whether the present work may be aborted.

    If it `may_abort`, a signal raises `Stopped` at once; otherwise it is only recorded. A second SIGINT exits at once:
    files on disk are always complete.

    Attributes:
        requested: name of the received signal, or None.
        may_abort: True before training has started and while a model is validated or sampled.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.may_abort = True
        self._since = 0.0
        self._process = 0

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle both signals inside the block; main thread only."""
        self.requested, self.may_abort, self._process = None, True, os.getpid()
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = None

    @contextmanager
    def abortable(self, allowed: bool) -> Iterator[None]:
        """A block that may be aborted, or may not."""
        before, self.may_abort = self.may_abort, allowed
        try:
            if allowed and self.requested is not None:
                raise Stopped
            yield
        finally:
            self.may_abort = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent ends it
            return
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
            action = "stopping" if self.may_abort else "finishing the step and saving it"
            _write(f"{self.requested}: {action} (Ctrl-C again exits at once)")
            if self.may_abort:
                raise Stopped
        elif number == signal.SIGINT and now - self._since > SAME_SIGNAL_SECONDS:
            _write("exiting at once; the newest checkpoint is valid")
            os._exit(128 + number)


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be closed
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())  # the signal may have interrupted a print


interruption = Interruption()
