"""The real work on blocks, struck at seeded moments from within; and a driver of its own to be struck."""

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.blockwork import PruneStage
from workflows.steps import Journal, Work

PIECES = ("advance", "statistics", "prepare", "solve", "assemble")


class Disturbed(PruneStage):
    """Writes down each piece of work that is begun, and strikes its own process at the moments that a seed chose.

    Attributes (set after construction; they travel to the workers with the rest):
        journal: file that takes one line per piece.
        strikes: piece → signal, each done once; a piece is "<what> <block>/<which>".
    """

    journal: str
    strikes: dict[str, int]

    def piece(self, what: str, block: int, which: str = "") -> None:
        """Notes a piece of work, and strikes if it is its turn."""
        piece = f"{what} {block}/{which}"
        with open(self.journal, "a") as file:  # one short line: appended whole, whoever else writes
            file.write(f"{piece}\n")
        if piece in self.strikes:
            mark = Path(f"{self.journal}-{hashlib.sha256(piece.encode()).hexdigest()[:12]}")
            try:
                with mark.open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                return
            os.kill(os.getpid(), self.strikes[piece])

    def advance(self, block, finished, last, shards):
        self.piece("advance", block, str(min(shards, default="")))
        super().advance(block, finished, last, shards)

    def statistics(self, block, shards, groups, solved=()):
        self.piece("statistics", block, f"{min(shards, default='')}, turn {len(solved)}")
        yield from super().statistics(block, shards, groups, solved)

    def prepare(self, group, total):
        self.piece("prepare", 0, group)
        return super().prepare(group, total)

    def solve(self, block, unit, prepared):
        self.piece("solve", block, f"{unit.linear}:{unit.start}")
        return super().solve(block, unit, prepared)

    def assemble(self, block, refined, results):
        self.piece("assemble", block)
        return super().assemble(block, refined, results)

    def struck(self) -> list[int]:
        """The processes that were struck."""
        return [int(mark.read_text()) for mark in Path(self.journal).parent.glob(f"{Path(self.journal).name}-*")]

    def worked(self) -> int:
        """Pieces begun so far."""
        path = Path(self.journal)
        return len(path.read_text().splitlines()) if path.exists() else 0


def disturbed(stage: PruneStage, journal: Path, strikes: dict[str, int]) -> Disturbed:
    """The same stage, to be struck."""
    made = Disturbed(**stage.__getstate__())
    made.journal, made.strikes = str(journal), strikes
    return made


@contextmanager
def when_done(stage: Disturbed, pieces: float, act: Callable[[], None]) -> Iterator[None]:
    """Acts once so many pieces of work are begun, or never, if the block under this is over before.

    Progress, not time: how fast a machine is must not decide what a seed shows.
    """
    over = threading.Event()

    def watch() -> None:
        while stage.worked() < pieces:
            if over.wait(0.02):
                return
        act()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def chosen(seed: int, count: int, journal: Path, number: int = signal.SIGKILL) -> dict[str, int]:
    """Some pieces of an undisturbed run, drawn by a seed; of each kind of piece as often as of the others."""
    draw = random.Random(seed)
    pieces = journal.read_text().splitlines()
    kinds = draw.sample(PIECES, count) if count <= len(PIECES) else draw.choices(PIECES, k=count)
    return {draw.choice([one for one in pieces if one.startswith(f"{kind} ")]): number for kind in kinds}


def drive() -> None:
    """A driver: works through the blocks that its journal does not have yet, on a cluster that others started."""
    import ray

    from cluster.layerwise import run_blocks

    stage, address = pickle.loads(bytes.fromhex(sys.argv[1]))
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    work = journal_of(stage)
    print("begun", flush=True)
    blocks = run_blocks(
        stage, ClusterSpec(workers=2, wait_seconds=120), 1, work.finished_blocks(), work.record_block, lambda: False
    )
    print(" ".join(one.sha256 for one in blocks), flush=True)


def journal_of(stage: PruneStage) -> Work:
    """Where a driver records its blocks."""
    return Work(Journal(open_store(stage.before.store), "r", lambda event: None), "prune", 1, "0" * 64)


def start_driver(stage: PruneStage, address: str) -> subprocess.Popen:
    """A driver in a process of its own, attached to a running cluster."""
    order = pickle.dumps((stage, address)).hex()
    return subprocess.Popen(
        [sys.executable, "-c", "import disturbed; disturbed.drive()", order],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
