"""What a fire would overlap with: an earlier fire of its schedule that is at work, or a run of the same job."""

from datetime import datetime

from cluster.storage import Store, open_store
from jobs import fires
from jobs.due import is_alive
from jobs.fire_attempts import attempt_of
from jobs.fires import Fire
from jobs.job import Job
from jobs.records import attempt_numbers, read_attempt


def blocker(store: Store, name: str, job: Job, mine: Fire | None, now: datetime) -> str:
    """The run or fire that this one would overlap with; empty when there is none.

    Of two fires that are both about to start, the one that is later in turn gives way.

    Args:
        store: holds the schedule.
        name: the schedule's.
        job: what would be run.
        mine: the fire that asks; None when it has not been claimed, and so comes after all others.
        now: the time.
    """
    for other in open_fires(store, name):
        if mine is not None and other.id == mine.id:
            continue
        if other.attempts:
            last = attempt_of(other.attempts[-1])
            if last is not None and is_alive(last, now):
                return f"run {other.attempts[-1]}"
        elif not other.waits and now < other.held_until and (mine is None or in_turn(other) < in_turn(mine)):
            return f"fire {other.id}"
    runs = open_store(job.publish.to)
    numbers = attempt_numbers(runs, job.run)
    last = read_attempt(runs, job.run, numbers[-1]) if numbers else None
    return f"run {last.started.attempt}" if last is not None and is_alive(last, now) else ""


def open_fires(store: Store, name: str) -> list[Fire]:
    """A schedule's fires that have not ended, in turn."""
    _, ids = fires.fire_ids(store, name)
    return sorted((fires.read_fire(store, name, one)[0] for one in ids), key=in_turn)


def in_turn(fire: Fire) -> tuple[datetime, str]:
    """The order in which fires are dealt with."""
    return fire.due, fire.id
