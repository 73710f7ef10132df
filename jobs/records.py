"""What a run leaves in the store beside its steps: who tried it, how far each attempt came, how it ended.

    runs/<run>/job.yaml                     the job, as it was given
    runs/<run>/attempts/<n>/started.json    created once by whoever claims attempt n
    runs/<run>/attempts/<n>/progress.json   replaced every few seconds while it lives; its age tells a lost driver
    runs/<run>/attempts/<n>/cancel.json     that somebody asked it to end, and how long it may take
    runs/<run>/attempts/<n>/ended.json      the exit code, what came out, and what it used
    runs/<run>/events/<n>.jsonl             every event of attempt n
    runs/<run>/logs/<n>.txt                 its driver's log, copied from the cluster

A run's state is derived from these alone, so it is still there when the cluster is gone.
"""

import getpass
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import InputError
from cluster.storage import MissingKey, Store
from cluster.version import VERSION
from workflows.recipe import Name

HEARTBEAT_SECONDS = 5.0
LARGEST_RECORD = 1 << 20  # bytes; ours have a few thousand
LOST_AFTER_SECONDS = 60.0  # without a heartbeat
ATTEMPT_NUMBER = re.compile(r"[1-9][0-9]{0,8}")

Kind = TypeVar("Kind", bound="Record")
Result = Literal["done", "rolled back", "gate not met", "bad input", "failed", "lost", "cancelled"]
State = Literal["queued", "running"] | Result
Held = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of everything that is kept: unknown fields are refused, so that other code's records are noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Started(Record):
    """An attempt at a run. Its name is also the submission id on a Ray cluster, which takes each id only once."""

    run: str
    number: int
    tenant: Name
    name: Name
    by: str = Field(description="Who asked, as user@host or a schedule's name.")
    cluster: str = Field(description="embedded, or the address it was submitted to.")
    at: AwareDatetime
    karikomi: str = VERSION

    @property
    def attempt(self) -> str:
        """Name of the attempt: <run>-a<n>."""
        return f"{self.run}-a{self.number}"


class Usage(Record):
    """What an attempt held of the machines, whether or not its steps came to an end."""

    seconds: Held = 0.0
    cpu_seconds: Held = 0.0
    gpu_seconds: Held = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            seconds=self.seconds + other.seconds,
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
        )


class Progress(Record):
    """How far an attempt is; `at` is its heartbeat."""

    at: AwareDatetime
    step: str = ""
    stage: Count = 0
    stages: Count = 0
    done: Count = 0
    total: Count = 0
    gate: str = Field("", description="The last gate's numbers, as one sentence.")
    usage: Usage = Usage()


class Figures(Record):
    """What came out in numbers, as shares (0.1 is 10 %); None when the model is broken, or judged by the other two."""

    stages: int = Field(description="Stages that met their gates.")
    sparsity: float = Field(description="Of the last of them; 0 when none did.")
    perplexity_increase: float | None
    worst_slice_increase: float | None
    accuracy_drop: float | None = None
    worst_slice_drop: float | None = None


class Cancel(Record):
    """Somebody asked an attempt to end."""

    by: str
    at: AwareDatetime
    grace_seconds: float = Field(description="After these it is ended in the middle of its block.")


class Ended(Record):
    """How an attempt ended."""

    at: AwareDatetime
    code: int
    result: Result
    sentence: str = Field(description="What happened, for a person: the verdict, or the error.")
    hint: str = Field("", description="What to do next.")
    release: str = Field("", description="NAME@VERSION, when something was published.")
    digest: str = Field("", description="The published model's digest.")
    figures: Figures | None = Field(None, description="When the run came to a verdict.")
    usage: Usage = Usage()


class Attempt(Record):
    """One attempt with all that is known of it."""

    started: Started
    progress: Progress | None
    ended: Ended | None

    @property
    def usage(self) -> Usage:
        """The last that was told of what it used."""
        return self.ended.usage if self.ended else self.progress.usage if self.progress else Usage()

    def state(self, now: datetime) -> State:
        """Derived, never written: an attempt that stopped telling is lost."""
        if self.ended:
            return self.ended.result
        if self.progress is None:
            return "queued"
        return "running" if (now - self.progress.at).total_seconds() < LOST_AFTER_SECONDS else "lost"


class Run(Record):
    """A run with its attempts, first to last."""

    run: str
    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt:
        """The attempt that counts."""
        return self.attempts[-1]

    @property
    def usage(self) -> Usage:
        """What all its attempts used."""
        return sum((one.usage for one in self.attempts), Usage())

    def state(self, now: datetime) -> State:
        """That of its last attempt."""
        return self.last.state(now)


def claim(store: Store, run: str, tenant: str, name: str, by: str, cluster: str, job: bytes) -> Started:
    """Claims the run's next attempt: of several claimants at once each gets a number of its own."""
    for number in itertools.count(len(attempt_numbers(store, run)) + 1):
        if (mine := claim_number(store, run, number, tenant, name, by, cluster, job)) is not None:
            return mine
    raise AssertionError("unreachable")


def claim_number(
    store: Store, run: str, number: int, tenant: str, name: str, by: str, cluster: str, job: bytes
) -> Started | None:
    """Claims one attempt of a run by its number; None when somebody else has it: of several claimants one wins."""
    store.put(f"runs/{run}/job.yaml", job)
    mine = Started(run=run, number=number, tenant=tenant, name=name, by=by, cluster=cluster, at=datetime.now(UTC))
    return mine if store.create(_key(run, number, "started"), mine.model_dump_json(indent=1).encode()) else None


def note_progress(store: Store, started: Started, progress: Progress) -> None:
    """Replaces the attempt's heartbeat."""
    store.put(_key(started.run, started.number, "progress"), progress.model_dump_json(indent=1).encode())


def note_cancel(store: Store, started: Started, cancel: Cancel) -> None:
    """Records that an attempt was asked to end."""
    store.put(_key(started.run, started.number, "cancel"), cancel.model_dump_json(indent=1).encode())


def read_cancel(store: Store, started: Started) -> Cancel | None:
    """Whether somebody asked an attempt to end."""
    return _read(store, _key(started.run, started.number, "cancel"), Cancel)


def log_key(started: Started) -> str:
    """Where an attempt's log is kept."""
    return f"runs/{started.run}/logs/{started.number}.txt"


def note_end(store: Store, started: Started, ended: Ended) -> bool:
    """Records how an attempt ended; the first to say so is believed. False when somebody had."""
    return store.create(_key(started.run, started.number, "ended"), ended.model_dump_json(indent=1).encode())


def attempt_numbers(store: Store, run: str) -> list[int]:
    """Numbers of the attempts that were claimed, in order; a folder that no claim makes is none."""
    return sorted(int(one) for one in store.folders(f"runs/{run}/attempts/") if ATTEMPT_NUMBER.fullmatch(one))


def read_run(store: Store, run: str) -> Run | None:
    """A run by its name; None when nobody ever attempted it.

    Raises:
        InputError: a record was written by other code, or changed by hand.
    """
    attempts = tuple(_attempt(store, run, number) for number in attempt_numbers(store, run))
    return Run(run=run, attempts=attempts) if attempts else None


def read_attempt(store: Store, run: str, number: int) -> Attempt | None:
    """One attempt; None when it was never claimed.

    Raises:
        InputError: a record was written by other code, or changed by hand.
    """
    return _attempt(store, run, number) if store.size(_key(run, number, "started")) is not None else None


def list_runs(store: Store, unreadable: Callable[[InputError], None]) -> Iterator[Run]:
    """All runs that were ever attempted, by name.

    Args:
        store: whose runs.
        unreadable: told of each run whose records other code wrote, or somebody by hand; it hides no other one.
    """
    for name in store.folders("runs/"):
        try:
            run = read_run(store, name)
        except InputError as error:
            unreadable(error)
            continue
        if run is not None:
            yield run


def asked_by() -> str:
    """Who asks: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _attempt(store: Store, run: str, number: int) -> Attempt:
    started = _read(store, _key(run, number, "started"), Started)
    if started is None:
        raise InputError(f"{store.uri}: {_key(run, number, 'started')} is gone")
    if (started.run, started.number) != (run, number):
        raise InputError(f"{store.uri}: {_key(run, number, 'started')} is that of {started.attempt}; it was put there")
    return Attempt(
        started=started,
        progress=_read(store, _key(run, number, "progress"), Progress),
        ended=_read(store, _key(run, number, "ended"), Ended),
    )


def _read(store: Store, key: str, kind: type[Kind]) -> Kind | None:
    try:
        if (store.size(key) or 0) > LARGEST_RECORD:
            raise InputError(f"{store.uri}: {key} is larger than {LARGEST_RECORD} bytes: it is no record")
        return kind.model_validate_json(store.get(key))
    except MissingKey:
        return None
    except ValidationError as error:
        raise InputError(f"{store.uri}: {key} is no record of this version: {error}") from error


def _key(run: str, number: int, what: str) -> str:
    return f"runs/{run}/attempts/{number}/{what}.json"
