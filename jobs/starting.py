"""How a schedule's run is started: here, to its end, or on a cluster by Ray's Jobs API."""

from collections.abc import Callable
from datetime import UTC, datetime

from rich.console import Console

from cluster.errors import Cancelled
from cluster.storage import open_store
from jobs import triggers
from jobs.edges import Edges, Note
from jobs.estimating import admitted
from jobs.job import Job, dump_job
from jobs.progress import Terminal
from jobs.records import Ended, Progress, Started, asked_by, claim, note_end, note_progress, read_attempt
from jobs.running import carry_out
from jobs.tenants import load_tenants
from workflows.events import Listener


def start_here(job: Job, by: str, note: Note, listener: Listener, stop: Callable[[], bool]) -> None:
    """Carries a job out on this machine, or attached to the Ray cluster that it names, to its end.

    The first heartbeat is written before the attempt is told of: from then on its silence means that it was lost.

    Raises:
        KarikomiError: its tenant may not; or as a run does, and then it is in the attempt's record.
    """
    if load_tenants() is not None:
        job = admitted(job, by)[0].job  # with the credentials that this machine has: it starts others' schedules too
    store = open_store(job.publish.to)
    mine = claim(store, job.run, job.tenant, job.name, by, job.cluster.address, dump_job(job))
    note_progress(store, mine, Progress(at=datetime.now(UTC), stages=len(job.recipe.stages)))
    if note(mine):
        carry_out(job, listener, stop, mine)
        return
    sentence = "another process took the schedule's fire over before this attempt began"
    note_end(store, mine, Ended(at=datetime.now(UTC), code=Cancelled.exit_code, result="cancelled", sentence=sentence))


def start_on(cluster: str, job: Job, by: str, note: Note) -> None:
    """Submits a job to a cluster's job server; it goes on by itself.

    To submit a run that has come to its end does nothing; a schedule means the next attempt of it, since the model or
    its data are others by now.

    Raises:
        KarikomiError: the cluster does not take it.
    """
    from jobs.submission import retry, submit

    store = open_store(job.publish.to)
    started: Started = submit(job, cluster=cluster, by=by).started
    there = read_attempt(store, started.run, started.number)
    if there is not None and there.ended is not None:
        started = retry(store, started.run, cluster=cluster, by=by).started
    note(started)


def edges_here(cluster: str | None, screen: Console, stop: Callable[[], bool]) -> Edges:
    """The real edges of `run_due`.

    Args:
        cluster: see `karikomi schedule run-due --cluster`.
        screen: where the progress of a run on this machine is shown.
        stop: asked between pieces of work.
    """

    def start(job: Job, by: str, note: Note) -> None:
        if cluster and cluster.startswith(("http://", "https://")):
            start_on(cluster, job, by, note)
            return
        if cluster:
            job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": cluster})})
        with Terminal(screen, len(job.recipe.stages)) as terminal:
            start_here(job, by, note, terminal, stop)

    return Edges(
        clock=lambda: datetime.now(UTC),
        start=start,
        finished=triggers.finished,
        model_digest=triggers.model_digest,
        live_verdict=triggers.live_verdict,
        me=asked_by(),
    )
