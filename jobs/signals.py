"""The first Ctrl-C or SIGTERM drains, the second stops at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CANCELLED = 130


class Drain:
    """Whether the user asked to stop; handed to everything that can stop between two pieces of work."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """True once a signal came."""
        return self.asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(CANCELLED)
        self.asked = True
        sys.stderr.write("\nstopping after the piece of work at hand; once more stops at once\n")


@contextmanager
def draining() -> Iterator[Drain]:
    """Takes SIGINT and SIGTERM over for the length of a run."""
    drain = Drain()
    before = {number: signal.signal(number, drain._note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
