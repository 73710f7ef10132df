"""Cancel: the block at hand is finished and recorded, and the machines are free when it says so."""

from datetime import UTC, datetime

from cluster.errors import Cancelled, InputError, Unavailable
from cluster.ray_jobs import RayJobs
from cluster.storage import Store
from jobs.closing import close
from jobs.following import View, look, wait_for
from jobs.job import parse_job
from jobs.notifying import tell_for
from jobs.records import Cancel, Ended, asked_by, note_cancel

BEYOND_GRACE = 120.0  # seconds that Ray may take to see a driver's end


def cancel(store: Store, run: str, cluster: str | None = None, grace: float | None = None) -> View:
    """Ends a run: its driver finishes the block at hand and records it; returns when its machines are free again.

    Args:
        store: where the run is.
        run: its full name.
        cluster: its address; by default the one it was submitted to.
        grace: seconds after which it is ended in the middle of a block; by default (and at most) the job's.

    Raises:
        InputError: it is not running, or not on a cluster.
        Unavailable: the cluster is out of reach, or the driver did not end in time.
    """
    view = look(store, run, None)
    started = view.last.started
    if view.last.ended is None and not started.cluster.startswith("http"):
        raise InputError(f"{started.attempt} runs on {started.by}'s machine", "Press Ctrl-C there.")
    try:
        jobs = RayJobs(cluster or started.cluster)
        view = look(store, run, jobs)
    except Unavailable:
        if view.state != "queued":
            raise
        return never_begun(store, view)  # its driver looks before it begins, should the cluster come back
    if view.over:
        raise InputError(f"{started.attempt} is {view.state} already", f"`karikomi explain {run}` says why.")
    limit = parse_job(store.get(f"runs/{run}/job.yaml").decode(), "job.yaml").cluster.grace_seconds
    patience = min(grace if grace is not None else limit, limit)
    now = datetime.now(UTC)
    note_cancel(store, started, Cancel(by=asked_by(), at=now, grace_seconds=patience))
    if view.state == "queued" and (view.seen is None or view.seen.job is None or view.seen.job.status == "PENDING"):
        ended = never_begun(store, view)
        if view.seen and view.seen.job:
            jobs.stop(started.attempt)
        return ended
    jobs.stop(started.attempt)
    if not wait_for(lambda: look(store, run, jobs).over and freed(jobs, started.attempt), patience + BEYOND_GRACE):
        held = ", ".join(jobs.holds(job.job_id)) if (job := jobs.look(started.attempt)) and job.job_id else "its place"
        raise Unavailable(
            f"{started.attempt} was told to end, but still holds {held}", f"`karikomi explain {run}` looks again."
        )
    return look(store, run, None)


def never_begun(store: Store, view: View) -> View:
    """Ends an attempt that waits in Ray's queue; Ray lets go of it when its turn comes, and nothing runs."""
    sentence, now = "cancelled before it began", datetime.now(UTC)
    ended = Ended(at=now, code=Cancelled.exit_code, result="cancelled", sentence=sentence)
    if close(store, view.last.started, ended):
        tell_for(store, view.run.run)
    return look(store, view.run.run, None)


def freed(jobs: RayJobs, attempt: str) -> bool:
    """Whether an attempt's driver is gone and holds nothing of the cluster."""
    job = jobs.look(attempt)
    return job is None or (job.over and not (job.job_id and jobs.holds(job.job_id)))
