"""One attempt at a run, from claim to end, told to the store: the same on a laptop and as a driver on a cluster."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

import structlog

from cluster.errors import Cancelled, GateNotMet, InputError, KarikomiError, Unavailable
from cluster.storage import Store, open_store
from jobs.job import Job, dump_job
from jobs.metering import Meter
from jobs.records import (
    HEARTBEAT_SECONDS,
    Ended,
    Progress,
    Result,
    Started,
    asked_by,
    claim,
    note_end,
    note_progress,
)
from workflows.compress import Outcome, compress
from workflows.events import Advanced, Event, GateJudged, Listener, StepEnded, StepStarted

log = structlog.get_logger()
RESULTS: dict[type[BaseException], Result] = {
    InputError: "bad input",
    GateNotMet: "gate not met",
    Unavailable: "lost",
    Cancelled: "cancelled",
    KeyboardInterrupt: "cancelled",
}


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

    with attempt.alive():
        outcome = compress(job.recipe, job.settings, both, stop)
        attempt.ended(ending_of(outcome))
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
        self.progress = Progress(at=datetime.now(UTC), stages=len(job.recipe.stages))
        self.events: list[str] = []
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        self.meter(event)
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
            fields = {"at": now.isoformat(timespec="milliseconds"), "event": type(event).__name__} | asdict(event)
            self.events.append(json.dumps(fields))
        if self.started is None and isinstance(event, StepEnded):
            self.started = claim(
                self.store, self.job.run, self.job.tenant, self.job.name, asked_by(), self.job.cluster.address,
                dump_job(self.job),
            )  # fmt: skip
            self._beat()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Beats while the block goes on, and records the error that ends it."""
        thread = threading.Thread(target=self._keep_beating, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        except BaseException as error:
            self.ended(ending_of(error))
            raise
        finally:
            self._over.set()
            thread.join()

    def ended(self, ending: Ended) -> None:
        """Writes the end down, if there was a beginning."""
        self._over.set()
        if self.started is not None:
            with tolerant(self.started.attempt):
                self._write_events()
                note_end(self.store, self.started, ending.model_copy(update={"usage": self.meter.usage()}))

    def _keep_beating(self) -> None:
        self._beat()
        while not self._over.wait(HEARTBEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        if self.started is None:
            return
        with self._lock:
            now = self.progress.model_copy(update={"at": datetime.now(UTC), "usage": self.meter.usage()})
        with tolerant(self.started.attempt):
            note_progress(self.store, self.started, now)

    def _write_events(self) -> None:
        assert self.started is not None
        with self._lock:
            text = "".join(f"{line}\n" for line in self.events)
        self.store.put(f"runs/{self.started.run}/events/{self.started.number}.jsonl", text.encode())


def ending_of(what: Outcome | BaseException) -> Ended:
    """How an attempt ended, as a record; its usage is still to be filled in."""
    if isinstance(what, BaseException):
        result = next((RESULTS[kind] for kind in type(what).__mro__ if kind in RESULTS), "failed")
        code = (
            what.exit_code if isinstance(what, KarikomiError) else Cancelled.exit_code if result == "cancelled" else 1
        )
        message = what.message if isinstance(what, KarikomiError) else f"{type(what).__name__}: {what}"
        hint = what.hint if isinstance(what, KarikomiError) else ""
        return Ended(at=datetime.now(UTC), code=code, result=result, sentence=message, hint=hint)
    last = what.history[-1].verdict.sentence
    if what.published is None:
        return Ended(at=datetime.now(UTC), code=GateNotMet.exit_code, result="gate not met", sentence=last)
    return Ended(
        at=datetime.now(UTC),
        code=0 if what.complete else GateNotMet.exit_code,
        result="done" if what.complete else "rolled back",
        sentence=last,
        release=f"{what.published.name}@{what.published.version}",
        digest=what.published.digest,
    )


@contextmanager
def tolerant(attempt: str) -> Iterator[None]:
    """Bookkeeping that the store does not take is logged, and no reason to end a run."""
    try:
        yield
    except KarikomiError as error:
        log.warning("bookkeeping not written", attempt=attempt, error=str(error))
