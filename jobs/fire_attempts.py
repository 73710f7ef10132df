"""The attempts that a fire started: in whose name they are claimed, and how they are found again."""

from datetime import datetime

from cluster.storage import open_store
from jobs.due import is_alive
from jobs.fires import AttemptName, Fire
from jobs.job import Job
from jobs.records import Attempt, read_attempt, read_run


def asker(fire: Fire) -> str:
    """In whose name a fire's attempts are claimed."""
    return f"schedule:{fire.schedule} {fire.id}"


def unnoted(job: Job, fire: Fire, now: datetime) -> list[AttemptName]:
    """Attempts that were claimed in a fire's name, are not noted in it, and came to something."""
    run = read_run(open_store(job.publish.to), job.run)
    found = [
        AttemptName(run=job.run, number=one.started.number, store=job.publish.to)
        for one in (run.attempts if run else ())
        if one.started.by == asker(fire)
        and (is_alive(one, now) or one.state(now) not in ("queued", "lost", "cancelled"))
    ]
    return [one for one in found if one not in fire.attempts]


def attempt_of(name: AttemptName) -> Attempt | None:
    """An attempt's records; None when they are gone."""
    return read_attempt(open_store(name.store), name.run, name.number)
