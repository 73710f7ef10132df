"""What one disturbed run showed, and the sums over many."""

import statistics
from collections.abc import Iterable

from pydantic import BaseModel


class Shown(BaseModel):
    """One disturbed run that passed the oracle.

    Attributes:
        kind: class of fault.
        seed: of everything that was drawn.
        injected: faults that really happened.
        recovered: of these, those after which the run ended well by itself.
        resumed: those that ended an attempt – killed it, or made it refuse with one clear message – after which the
            same command got there.
        seconds: extra seconds, one number per fault (the run's extra time shared by its faults).
        worked: pieces of work done, in all attempts together.
        needed: pieces of work of an undisturbed run.
        requests: requests to the store, where they were counted.
    """

    kind: str
    seed: int
    injected: int
    recovered: int = 0
    resumed: int = 0
    seconds: tuple[float, ...] = ()
    worked: int = 0
    needed: int = 0
    requests: int = 0


def table(shown: Iterable[Shown], titles: dict[str, str]) -> str:
    """One line per class of fault, and their sum, as Markdown."""
    shown = [one for one in shown if one.injected]  # a publisher can only be killed while it lives
    lines = [
        "| fault | runs | faults | recovered by itself | ended, then resumed | work redone | s to recover, median (max) "
        "| requests per fault |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(title, [one for one in shown if one.kind == kind]) for kind, title in titles.items()]
    for title, some in [*rows, ("**all**", shown)]:
        if not some:
            continue
        faults = sum(one.injected for one in some)
        seconds = [each for one in some for each in one.seconds]
        needed = sum(one.needed for one in some)
        redone = f"{(sum(one.worked for one in some) / needed - 1) * 100:.1f} %" if needed else "–"
        requests = sum(one.requests for one in some)
        counted = sum(one.injected for one in some if one.requests)
        cells = [
            title,
            str(len(some)),
            str(faults),
            str(sum(one.recovered for one in some)),
            str(sum(one.resumed for one in some)),
            redone,
            f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "–",
            f"{requests / counted:.1f}" if counted else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
