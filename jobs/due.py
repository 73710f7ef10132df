"""Which runs are due, given what stands in the records and a clock. Pure: no store, no time of its own."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

from jobs.records import Attempt
from jobs.schedules import Missed

ON_TIME = timedelta(minutes=15)  # `run-due` is called every few minutes; later than this is missed
START_LEASE = timedelta(minutes=10)  # an attempt on this machine that never told anything by then never will


@dataclass(frozen=True)
class Moment:
    """A moment that has come, and what becomes of it.

    Attributes:
        at: in UTC; a fire is named by it.
        runs: a run starts; else it is only noted that moments were missed.
        missed: how many earlier moments it stands for, none of which starts a run of its own.
    """

    at: datetime
    runs: bool
    missed: int


def moments_between(cron: str, timezone: str, after: datetime, until: datetime) -> list[datetime]:
    """All moments in (after, until] at which the expression comes true, in UTC, in order, each once.

    Changes of daylight-saving time are those of Debian's cron, as cronsim keeps them: of an expression with fixed
    hours, what falls into the skipped hour comes right after it, and what falls into the doubled one comes in its
    first pass only. Expressions with `*` in minutes or hours go by elapsed time; where clocks change by half an hour
    (Lord Howe Island alone), cronsim's jump to a minute may pass one such moment by.

    Args:
        cron: five fields.
        timezone: IANA name.
        after: with a time zone.
        until: with a time zone.
    """
    found: list[datetime] = []
    for local in CronSim(cron, after.astimezone(ZoneInfo(timezone))):
        moment = local.astimezone(UTC)
        if moment > until:
            break
        # Begun within a doubled hour, cronsim first gives moments of its first pass; several local times of a
        # skipped hour come at one moment.
        if moment > after and moment not in found[-1:]:
            found.append(moment)
    return found


def next_moment(cron: str, timezone: str, after: datetime) -> datetime:
    """The first moment after `after`, in UTC."""
    for local in CronSim(cron, after.astimezone(ZoneInfo(timezone))):
        if (moment := local.astimezone(UTC)) > after:
            return moment
    raise AssertionError("an expression that never comes true is refused when it is read")


def due(moments: list[datetime], missed: Missed, now: datetime) -> list[Moment]:
    """What becomes of the moments that have come since the last one that was dealt with.

    `all` starts a run for each. `once` starts one for all of them, named by the latest. `skip` starts one only for
    the latest, and only if that is not older than `ON_TIME`.
    """
    if not moments:
        return []
    if missed == "all":
        return [Moment(one, runs=True, missed=0) for one in moments]
    runs = missed == "once" or now - moments[-1] <= ON_TIME
    return [Moment(moments[-1], runs=runs, missed=len(moments) - 1)]


def is_alive(attempt: Attempt, now: datetime) -> bool:
    """Whether an attempt is still to be reckoned with.

    On a cluster it may be queued for days. One on a single machine begins to tell at once; if it did not, its driver
    died between the claim and the first heartbeat.
    """
    state = attempt.state(now)
    on_one_machine = not attempt.started.cluster.startswith(("http://", "https://"))
    if state == "queued" and on_one_machine:
        return now - attempt.started.at < START_LEASE
    return state in ("queued", "running")
