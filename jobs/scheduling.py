"""Schedules as a person handles them: apply, pause, resume, list, history. What is due is in `jobs.run_due`."""

from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from cluster.errors import Unavailable
from cluster.storage import Store
from jobs import fires
from jobs.admitting import admit
from jobs.due import next_moment
from jobs.fires import Applied, Fire, FireEnded, applied_key, encoded, tagged
from jobs.schedules import Schedule
from jobs.tenants import Tenants
from workflows.steps import digest

SWAP_TRIES = 50


class Listed(BaseModel):
    """A schedule as `list` shows it."""

    model_config = ConfigDict(frozen=True)

    name: str
    job: str
    starts: str
    paused: bool
    next: datetime | None
    last: str


def under_rules(schedule: Schedule, tenants: Tenants | None) -> Schedule:
    """The schedule with its job as its tenant's rules make it, so that whoever looks names the run that will start.

    Raises:
        InputError: the schedule is no member of its tenant, or its job breaks a rule.
    """
    job = admit(schedule.job, tenants, f"schedule:{schedule.name}", spent=0.0).job
    return schedule.model_copy(update={"job": job})


def apply(store: Store, schedule: Schedule, at: datetime, by: str) -> tuple[Applied, bool]:
    """Puts a schedule in force; True when that changed anything.

    Changed moments count from now on; a change of anything else leaves what has come due meanwhile as it is.
    """
    key = applied_key(schedule.name)
    sha256 = digest(schedule.model_dump(mode="json", exclude={"paused"}))
    for _ in range(SWAP_TRIES):
        found = tagged(store, key, Applied)
        old, tag = found if found else (None, None)
        paused = schedule.paused if schedule.paused is not None else old is not None and old.paused
        if old is not None and (old.digest, old.paused) == (sha256, paused):
            return old, False
        same_moments = old is not None and _moments(old.schedule) == _moments(schedule)
        resumed = old is not None and old.paused and not paused
        since = old.since if old is not None and same_moments and not resumed else at
        new = Applied(schedule=schedule, digest=sha256, paused=paused, by=by, at=at, since=since)
        if store.swap(key, encoded(new), tag):
            return new, True
    raise _keeps_changing(store, schedule.name)


def change(store: Store, name: str, at: datetime, by: str, paused: bool) -> Applied:
    """Pauses or resumes a schedule; moments of a pause are not made up for."""
    for _ in range(SWAP_TRIES):
        old, tag = fires.read_applied(store, name)
        if old.paused == paused:
            return old
        new = old.model_copy(update={"paused": paused, "at": at, "by": by} | ({} if paused else {"since": at}))
        if store.swap(applied_key(name), encoded(new), tag):
            return new
    raise _keeps_changing(store, name)


def list_schedules(store: Store, now: datetime) -> Iterator[Listed]:
    """All schedules, with their next moment and what became of the last fire."""
    for name in fires.schedule_names(store):
        applied, _ = fires.read_applied(store, name)
        last = next(iter(history(store, name, newest=1)), None)
        schedule = applied.schedule
        checks = [schedule.cron, schedule.when_gate_fails.check if schedule.when_gate_fails else None]
        moments = [next_moment(one, schedule.timezone, now) for one in checks if one]
        yield Listed(
            name=name,
            job=schedule.job.name,
            starts=starts(schedule),
            paused=applied.paused,
            next=None if applied.paused else min(moments, default=None),
            last=f"{last[0].due:%Y-%m-%d %H:%M}Z {last[1].result if last[1] else 'open'}" if last else "never",
        )


def starts(schedule: Schedule) -> str:
    """What starts a schedule, as a phrase."""
    parts = []
    if schedule.cron:
        parts.append(f"{schedule.cron} {schedule.timezone}")
    if schedule.when_model_changes:
        parts.append("model changed")
    if schedule.when_gate_fails:
        parts.append(f"gate failed (checked {schedule.when_gate_fails.check} {schedule.timezone})")
    return ", ".join(parts)


def history(store: Store, name: str, newest: int | None = None) -> list[tuple[Fire, FireEnded | None]]:
    """A schedule's fires, newest first, each with what became of it (None: it is open).

    Raises:
        InputError: no such schedule.
    """
    fires.read_applied(store, name)
    ids, _ = fires.fire_ids(store, name)
    read = [(fires.read_fire(store, name, one)[0], fires.read_ended(store, name, one)) for one in ids]
    return sorted(read, key=lambda pair: (pair[0].due, pair[0].id), reverse=True)[:newest]


def _moments(schedule: Schedule) -> tuple[str | None, str, str | None]:
    return schedule.cron, schedule.timezone, schedule.when_gate_fails.check if schedule.when_gate_fails else None


def _keeps_changing(store: Store, name: str) -> Unavailable:
    return Unavailable(f"{store.uri}: {applied_key(name)} keeps changing", "Run the same command again.")
