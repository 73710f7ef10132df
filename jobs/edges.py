"""What the outside world does for schedules, so that a clock moved by hand and pretended runs can stand in for it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cluster.storage import Store
from jobs.job import Job
from jobs.records import Started
from jobs.schedules import Schedule
from workflows.recipe import DataSource

Note = Callable[[Started], bool]


@dataclass(frozen=True)
class Edges:
    """What the outside world does for schedules.

    Attributes:
        clock: the time, with a time zone.
        start: starts a job for somebody, here or on a cluster. It claims an attempt in that one's name and tells of
            it; on a False, another process has taken over, and it must not go on.
        finished: says so if a run of this job would do nothing: same model, recipe and data. Else None.
        model_digest: the digest of a schedule's model; None while it is being written.
        live_verdict: whether the latest release meets the job's gates on this data, and a sentence; None when there
            is no release.
        me: who calls, for the records.
    """

    clock: Callable[[], datetime]
    start: Callable[[Job, str, Note], None]
    finished: Callable[[Job], str | None]
    model_digest: Callable[[Store, Schedule], str | None]
    live_verdict: Callable[[Job, DataSource], tuple[bool, str] | None]
    me: str
