"""A world for schedules: a clock that is moved by hand, runs that take as long as they are told, records that are real."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cluster.directory_store import DirectoryStore
from cluster.storage import open_store
from jobs.edges import Edges
from jobs.job import dump_job
from jobs.records import Ended, Progress, Started, claim, note_end, note_progress
from jobs.run_due import run_due
from jobs.schedules import Schedule
from jobs.scheduling import apply

JOB = {"name": "tiny", "model": "org/model", "target": {"pattern": "2:4", "sparsity": 0.5}}


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def schedule(to: str, name: str = "weekly", **changes) -> Schedule:
    content = {"name": name, "job": JOB | {"publish": {"to": to}}, "cron": "0 3 * * *", "timezone": "Europe/Berlin"}
    return Schedule.model_validate(content | changes)


class Died(BaseException):
    """The process was killed here."""


@dataclass
class World:
    """All that is outside, for any number of callers."""

    to: str
    now: datetime
    takes: timedelta = timedelta(0)
    result: str = "done"
    digest: str | None = "a" * 64
    verdict: tuple[bool, str] | None = None
    error: Exception | None = None
    nothing: str | None = None
    went: Counter = field(default_factory=Counter)  # runs that really began, by who asked
    running: list[tuple[Started, datetime]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def edges(self) -> Edges:
        return Edges(
            clock=lambda: self.now,
            start=self.start,
            finished=self.finished,
            model_digest=lambda store, plan: self.digest,
            live_verdict=lambda job, data: self.verdict,
            me="tests",
        )

    def finished(self, job) -> str | None:
        if self.error:
            raise self.error
        return self.nothing

    def start(self, job, by, note) -> None:
        store = open_store(job.publish.to)
        mine = claim(store, job.run, job.tenant, job.name, by, "embedded", dump_job(job))
        note_progress(store, mine, Progress(at=self.now))
        if not note(mine):
            note_end(store, mine, self.ended("cancelled"))
            return
        with self.lock:
            self.went[by.rpartition(" ")[2]] += 1
        if self.takes:
            self.running.append((mine, self.now + self.takes))
        else:
            note_end(store, mine, self.ended(self.result))

    def ended(self, result: str) -> Ended:
        return Ended(at=self.now, code=0 if result == "done" else 1, result=result, sentence=f"it is {result}")

    def move(self, to: datetime) -> None:
        """Time goes on: runs beat, and end."""
        self.now = to
        store = open_store(self.to)
        for one in list(self.running):
            if one[1] <= to:
                note_end(store, one[0], self.ended(self.result))
                self.running.remove(one)
            else:
                note_progress(store, one[0], Progress(at=to))

    def apply(self, plan: Schedule) -> None:
        apply(open_store(self.to), plan, self.now, "ann")

    def call(self, at: datetime | None = None, store=None) -> list[tuple[str, str]]:
        """One `run-due`: (fire, what came of it)."""
        self.move(at or self.now)
        return [(one.fire, one.what) for one in run_due(store or open_store(self.to), self.edges())]


class Fragile(DirectoryStore):
    """Its process dies at the n-th write, before or after that was done."""

    def __init__(self, uri: str, writes: int, after: bool) -> None:
        super().__init__(uri)
        self.left = writes
        self.after = after

    def _die(self) -> bool:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Died
        return self.left == 0

    def create(self, key: str, data: bytes) -> bool:
        dies = self._die()
        done = super().create(key, data)
        if dies:
            raise Died
        return done

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        dies = self._die()
        done = super().swap(key, data, tag)
        if dies:
            raise Died
        return done
