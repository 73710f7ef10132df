"""Private memory of Ray's worker processes over time: resident pages less the shared ones (the object store's, files').

Looks from outside, so that what is measured is not changed; a worker tells by its title what it is at.
"""

import threading
import time
from dataclasses import dataclass

import psutil

EVERY = 0.02  # seconds between looks
NEW_PROCESSES = 0.5  # seconds between looks for new processes
KEPT = 0.5  # seconds; of a process in one role the largest look within them is kept
PAGE = 4096
TITLE = "ray::"
AT_WORK = ("ShardWorker", "prepare", "solve", "assemble")


@dataclass(frozen=True)
class Look:
    """What one process held at a moment.

    Attributes:
        at: Unix time.
        process: its number.
        role: what it was at: a name of `AT_WORK`, or "idle".
        private, shared: bytes.
    """

    at: float
    process: int
    role: str
    private: int
    shared: int


def private_memory(process: int | str = "self") -> tuple[int, int]:
    """Private and shared bytes of a process.

    Raises:
        OSError: it is gone.
    """
    with open(f"/proc/{process}/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * PAGE, shared * PAGE


def role_of(process: int) -> str | None:
    """What a Ray worker is at; None for any other process.

    Raises:
        OSError: it is gone.
    """
    with open(f"/proc/{process}/cmdline") as file:
        title = file.read().strip("\0 ")
    if not title.startswith(TITLE):
        return None
    name = title.removeprefix(TITLE).split(".")[0].split("(")[0]
    return name if name in AT_WORK else "idle"


class WorkerWatch(threading.Thread):
    """Looks at all Ray workers below a process until told to stop; keeps the largest looks in `looks`."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.looks: list[Look] = []
        self.roles: set[str] = set()  # of the last look
        self._over = threading.Event()
        self._largest: dict[tuple[int, str], Look] = {}

    def run(self) -> None:
        """Looks, until `stop`."""
        processes: list[int] = []
        last_search = kept = 0.0
        while not self._over.wait(EVERY):
            now = time.time()
            if now - last_search > NEW_PROCESSES:
                processes, last_search = below(self.root), now
            self.roles = {role for process in processes if (role := self._look(process, now))}
            if now - kept > KEPT:
                self._keep()
                kept = now
        self._keep()

    def stop(self) -> list[Look]:
        """Ends the watch; everything that was seen."""
        self._over.set()
        self.join()
        return self.looks

    def _look(self, process: int, now: float) -> str | None:
        try:
            role = role_of(process)
            private, shared = private_memory(process)
        except OSError:
            return None
        if role is not None:
            before = self._largest.get((process, role))
            if before is None or private > before.private:
                self._largest[process, role] = Look(now, process, role, private, shared)
        return role

    def _keep(self) -> None:
        self.looks += self._largest.values()
        self._largest = {}


def below(root: int) -> list[int]:
    """All processes below one."""
    try:
        return [one.pid for one in psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peaks(looks: list[Look], baseline: int) -> dict[str, int]:
    """Largest private bytes by role, above the baseline."""
    found: dict[str, int] = {}
    for one in looks:
        found[one.role] = max(found.get(one.role, 0), one.private - baseline)
    return found
