"""SIGTERM and SIGINT: the step is finished, all is saved, and the process ends with a code of its own."""

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
# A launcher passes a signal on that the terminal has sent to all of its processes already.
SAME_SIGNAL_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """A signal has stopped the run where nothing was left to be finished, or what was is saved."""


class Interruption:
    """Whether this process was asked to stop, and what may be broken off for it.

    Where something `may_break_off`, the signal raises `Stopped` at once, as Ctrl-C raises KeyboardInterrupt; elsewhere
    it is only noted. A second SIGINT ends the process at once: whatever stands on the disk under its name is complete.

    Attributes:
        requested: the name of the signal that came, or None.
        may_break_off: True before training has begun, since nothing is lost then, and while a model is looked at.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.may_break_off = True
        self._since = 0.0
        self._process = 0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles both signals inside the block; in the main thread only, as Python does."""
        self.requested, self.may_break_off, self._process = None, True, os.getpid()
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = None

    @contextmanager
    def breaking_off(self, allowed: bool) -> Iterator[None]:
        """A part that may be broken off, or may not."""
        before, self.may_break_off = self.may_break_off, allowed
        try:
            if allowed and self.requested is not None:
                raise Stopped
            yield
        finally:
            self.may_break_off = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked: whoever forked it ends it
            return
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
            doing = "stopping" if self.may_break_off else "finishing the step and saving it"
            _say(f"{self.requested}: {doing} (Ctrl-C again leaves at once)")
            if self.may_break_off:
                raise Stopped
        elif number == signal.SIGINT and now - self._since > SAME_SIGNAL_SECONDS:
            _say("leaving at once; the newest checkpoint stands")
            os._exit(128 + number)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody listens any more
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())  # print may be what was interrupted


interruption = Interruption()
