"""What has come due of a schedule and nobody has claimed yet."""

from collections.abc import Iterator
from datetime import datetime

from cluster.storage import Store
from jobs import fires
from jobs.due import due, moments_between
from jobs.edges import Edges
from jobs.fires import Applied, Fire, Trigger, moment_id, moment_of
from jobs.overlap import blocker
from jobs.schedules import Schedule


def new_fires(store: Store, name: str, applied: Applied, edges: Edges) -> Iterator[Fire]:
    """Fires that nobody holds yet, in the order in which they must be claimed; each is looked for when it is asked for.

    Moments are claimed in order of time: whatever comes before the latest claimed one has been dealt with.
    """
    schedule, now = applied.schedule, edges.clock()
    ids, _ = fires.fire_ids(store, name)
    if schedule.cron:
        seen = [moment_of(one) for one in ids if one[0].isdigit()]
        moments = moments_between(schedule.cron, schedule.timezone, max([applied.since, *seen]), now)
        for one in due(moments, schedule.missed, now):
            yield unheld(name, moment_id(one.at), "cron", one.at, missed=one.missed, runs=one.runs)
    if schedule.when_gate_fails:
        seen = [moment_of(one.removeprefix("gate-")) for one in ids if one.startswith("gate-")]
        after = max([applied.since, *seen])
        moments = moments_between(schedule.when_gate_fails.check, schedule.timezone, after, now)
        for one in due(moments, "skip" if schedule.missed == "skip" else "once", now):  # to look twice is no use
            fire = f"gate-{moment_id(one.at)}"
            yield unheld(name, fire, "gate failed", one.at, missed=one.missed, runs=one.runs)
    if schedule.when_model_changes:
        yield from model_changed(store, name, schedule, edges)


def model_changed(store: Store, name: str, schedule: Schedule, edges: Edges) -> Iterator[Fire]:
    """A fire if the model is another one than at the last fire of this kind, or was never seen.

    While a run is alive there is none, whatever the policy: the change is still there afterwards, and skipping it
    would lose it.
    """
    if blocker(store, name, schedule.job, None, edges.clock()):
        return
    digest = edges.model_digest(store, schedule)
    seen = [one for one in fires.fire_ids(store, name)[0] if one.startswith("model-")]
    if digest is None or (seen and seen[-1].endswith(digest[:16])):
        return
    why = f"the model's digest is {digest[:12]}"
    fire = f"model-{len(seen) + 1:06d}-{digest[:16]}"
    yield unheld(name, fire, "model changed", edges.clock(), why=why)


def unheld(
    name: str, fire: str, trigger: Trigger, moment: datetime, missed: int = 0, runs: bool = True, why: str = ""
) -> Fire:
    """A fire of a schedule before anybody holds it."""
    return Fire(
        schedule=name,
        id=fire,
        trigger=trigger,
        due=moment,
        missed=missed,
        runs=runs,
        why=why,
        holder="",
        by="",
        held_until=moment,
    )
