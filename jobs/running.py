"""One attempt at a run, from claim to end, told to the store: the same on a laptop and as a driver on a cluster."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

import structlog

from cluster.errors import KarikomiError
from cluster.storage import Store, open_store
from jobs import ledger, logs
from jobs.closing import close
from jobs.endings import ending_of
from jobs.job import Job, dump_job
from jobs.measures import Measures, beginning, note_measures
from jobs.metering import Meter
from jobs.notifying import get_ready, tell
from jobs.records import (
    HEARTBEAT_SECONDS,
    Ended,
    Progress,
    Started,
    asked_by,
    claim,
    note_progress,
)
from workflows.compress import Outcome, compress
from workflows.events import Advanced, Event, GateJudged, Listener, StepEnded, StepStarted

log = structlog.get_logger()


def carry_out(
    job: Job,
    listener: Listener,
    stop: Callable[[], bool],
    started: Started | None = None,
) -> Outcome:
    """Carries a job out, or goes on with it, and keeps the store told.

    Args:
        job: what is asked.
        listener: told of every step, beside the store.
        stop: asked between pieces of work.
        started: the attempt, when whoever submitted it has claimed it; else one is claimed at the first step that
            ends, so that bad input leaves no trace.

    Raises:
        KarikomiError: as `compress` does; it is recorded first.
    """
    attempt = AttemptLog(job, open_store(job.publish.to), started)

    def both(event: Event) -> None:
        attempt(event)
        listener(event)

    name = started.attempt if started else ""
    with logs.bound(job.run, job.tenant, name), attempt.alive():
        outcome = compress(job.recipe, job.settings, both, stop)
        attempt.ended(ending_of(outcome), outcome)
    return outcome


class AttemptLog:
    """Listens to an attempt and writes it down: a heartbeat every few seconds, events, the end.

    A write of these that fails is not worth a run: it is logged, and made up for by the next one.
    """

    def __init__(self, job: Job, store: Store, started: Started | None) -> None:
        self.job = job
        self.store = store
        self.started = started
        self.meter = Meter(job)
        get_ready(job)
        self.progress = Progress(at=datetime.now(UTC), stages=len(job.recipe.stages))
        self.measures = beginning()
        self._told: Measures | None = None  # the measures that the store has
        self.events: list[str] = []
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        self.meter(event)
        logs.bind_place(event)
        now = datetime.now(UTC)
        with self._lock:
            changes: dict[str, object] = {}
            if isinstance(event, StepStarted | StepEnded):
                changes = {"step": event.name, "stage": event.stage, "done": 0, "total": 0}
            elif isinstance(event, Advanced):
                changes = {"done": event.done, "total": event.total}
            elif isinstance(event, GateJudged):
                changes = {"gate": event.sentence}
            self.progress = self.progress.model_copy(update=changes)
            self.measures = self.measures.after(event)
            fields = {"at": now.isoformat(timespec="milliseconds"), "event": type(event).__name__} | asdict(event)
            self.events.append(json.dumps(fields))
        if self.started is None and isinstance(event, StepEnded):
            self.started = claim(
                self.store, self.job.run, self.job.tenant, self.job.name, asked_by(), self.job.cluster.address,
                dump_job(self.job),
            )  # fmt: skip
            logs.bind_attempt(self.started.attempt)
            self._open_account()
            self._beat()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Beats while the block goes on, and records the error that ends it."""
        thread = threading.Thread(target=self._keep_beating, daemon=True, name="heartbeat")
        thread.start()
        self._open_account()
        try:
            yield
        except BaseException as error:
            self.ended(ending_of(error))
            raise
        finally:
            self._over.set()
            thread.join()

    def ended(self, ending: Ended, outcome: Outcome | None = None) -> None:
        """Writes the end down, if there was a beginning, and tells who wants to know."""
        self._over.set()
        ending = ending.model_copy(update={"usage": self.meter.usage()})
        if outcome is not None and outcome.report is not None:
            dense, compressed = outcome.report.dense_size, outcome.report.compressed_size
            self.measures = self.measures.of_release(dense.weight_bytes, compressed.weight_bytes)
        if self.started is not None:
            with tolerant(self.started.attempt):
                self._write_events()
                note_measures(self.store, self.started, self.measures)
                close(self.store, self.started, ending)
        log.info("ended", result=ending.result, code=ending.code, sentence=ending.sentence, **ending.usage.model_dump())
        tell(self.job, self.store, self.started, ending)

    def _open_account(self) -> None:
        if self.started is not None:
            with tolerant(self.started.attempt):
                ledger.open_account(self.store, self.job, self.started)

    def _keep_beating(self) -> None:
        self._beat()
        while not self._over.wait(HEARTBEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        if self.started is None:
            return
        with self._lock:
            now = self.progress.model_copy(update={"at": datetime.now(UTC), "usage": self.meter.usage()})
            measures, told = self.measures, self._told
        with tolerant(self.started.attempt):
            note_progress(self.store, self.started, now)
            if measures is not told:
                note_measures(self.store, self.started, measures)
                self._told = measures

    def _write_events(self) -> None:
        assert self.started is not None
        with self._lock:
            text = "".join(f"{line}\n" for line in self.events)
        self.store.put(f"runs/{self.started.run}/events/{self.started.number}.jsonl", text.encode())


@contextmanager
def tolerant(attempt: str) -> Iterator[None]:
    """Bookkeeping that the store does not take is logged, and no reason to end a run."""
    try:
        yield
    except KarikomiError as error:
        log.warning("bookkeeping not written", attempt=attempt, error=str(error))
