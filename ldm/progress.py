"""Progress bars; durations, counts, errors and any text in words for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""(title, total) → a context that gives a function, which is called with the number of items done since."""


def no_progress(title: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows nothing."""
    return nullcontext(lambda done: None)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar of tqdm, in a terminal or a notebook, once two seconds have passed."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, delay=2, leave=False, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:
        yield bar.update


def format_duration(seconds: float) -> str:
    """ "2.5 s", "40 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def error_reason(error: BaseException) -> str:
    """The reason of an error of a library: the first line of its message, two after a colon, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def printable(text: str) -> str:
    """A text as one printable line; other characters are escaped as in Python."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"."""
    return f"{count} {one if count == 1 else many or one + 's'}"
