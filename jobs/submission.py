"""Runs on a cluster, for the command line, notebooks and CI: submit, resume, retry, cancel; `following` looks at them.

A run is known by its job and lives in the store. Ray knows its attempts: `<run>-a1`, `<run>-a2`, … – and takes each
name only once, so that the same request, made twice, is one attempt.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from cluster.errors import InputError
from cluster.ray_jobs import RayJobs
from cluster.storage import Store, open_store
from jobs import ledger
from jobs.absolute import absolute_paths
from jobs.admission import Admission
from jobs.cancelling import cancel
from jobs.closing import close
from jobs.endings import ending_of
from jobs.estimating import admitted, still_let_in
from jobs.following import ENDED, View, follow, jobs_of, look
from jobs.job import Job, dump_job, parse_job
from jobs.package import entrypoint
from jobs.records import Started, State, asked_by, claim_number, read_run
from workflows.compress import compress
from workflows.steps import NotDone

FINAL: frozenset[State] = frozenset(("done", "rolled back", "gate not met"))


@dataclass(frozen=True)
class Submission:
    """What came of a request.

    Attributes:
        started: the attempt that counts now.
        fresh: whether it was submitted just now.
        sentences: what happened, for a person.
    """

    started: Started
    fresh: bool
    sentences: tuple[str, ...]


def submit(
    job: Job, cluster: str | None = None, grace: int | None = None, by: str | None = None, retries: int = 0
) -> Submission:
    """Submits a job to a cluster, unless it is on its way or done.

    Args:
        job: what is asked; local paths in it must mean the same on the cluster.
        cluster: http(s) address of the cluster; by default as in `cluster_url`.
        grace: seconds that a cancelled driver may take; by default the job's `cluster.grace_seconds`.
        by: who asks; by default user@host.
        retries: how often the caller will try again after lost machines, see `watch`.

    Raises:
        InputError: the job cannot be carried out, or the cluster refuses the token.
        Unavailable: cluster or store are out of reach.
    """
    url = cluster_url(cluster, job.cluster.address)
    admission, remarks = prepared(job, grace, by)
    job = admission.job
    check(job)
    jobs, store = RayJobs(url), open_store(job.publish.to)
    while True:
        found = read_run(store, job.run)
        if found is not None:
            view = look(store, job.run, jobs)
            if view.state in FINAL:
                return Submission(view.last.started, False, (f"{job.run} is {view.state} already; nothing to do.",))
            if not view.over and not unknown_to(jobs, view):
                where = view.last.started
                return Submission(where, False, (f"{where.attempt} is {view.state} already on {where.cluster}.",))
            if not view.over:  # claimed by somebody who did not come to submit it
                return start(admission, view.last.started, jobs, remarks, retries)
        number = found.last.started.number + 1 if found else 1
        if (started := claimed(store, admission, number, url, by)) is not None:
            return start(admission, started, jobs, remarks, retries)


def rehearse(job: Job, cluster: str | None = None, grace: int | None = None) -> Iterator[str]:
    """What `submit` would do, as sentences; nothing is written and nothing submitted.

    Raises:
        InputError: whatever `submit` would refuse.
    """
    from jobs.planning import sentences

    url = cluster_url(cluster, job.cluster.address)
    admission, remarks = prepared(job, grace, None)
    job = admission.job
    there = job.cluster.model_copy(update={"address": url})
    yield from sentences(job.model_copy(update={"cluster": there}))
    yield from remarks
    jobs, found = RayJobs(url), read_run(open_store(job.publish.to), job.run)
    number = found.last.started.number + 1 if found else 1
    started = Started(
        run=job.run, number=number, tenant=job.tenant, name=job.name, by=asked_by(), cluster=url, at=datetime.now(UTC)
    )
    with entrypoint(admission, started, jobs.nodes()) as (entry, where):
        size = sum(path.stat().st_size for path in entry.directory.rglob("*") if path.is_file())
        yield where
        yield f"Submits {started.attempt} to {url}: `{entry.command}`, with {size / 1024:.0f} KiB of package and job."
    if found is not None:
        yield f"The run is {found.state(datetime.now(UTC))} at attempt {found.last.started.number}."


def retry(
    store: Store,
    run: str,
    cluster: str | None = None,
    only: frozenset[State] = ENDED,
    retries: int = 0,
    by: str | None = None,
) -> Submission:
    """Submits the next attempt of a run that has ended; it goes on at what is finished.

    Args:
        store: where the run is.
        run: its full name.
        cluster: as for `submit`; by default where it ran last.
        only: states from which this is done.
        retries: as for `submit`.
        by: as for `submit`.

    Raises:
        InputError: it has not ended, or not so.
    """
    job = parse_job(store.get(f"runs/{run}/job.yaml").decode(), f"{store.uri}/runs/{run}/job.yaml")
    found = read_run(store, run)
    last = found.last.started.cluster if found else ""
    jobs = RayJobs(cluster_url(cluster, last if last.startswith("http") else job.cluster.address))
    view = look(store, run, jobs)
    if not view.over:
        raise InputError(f"{view.last.started.attempt} is {view.state}", f"`karikomi watch {run}` follows it.")
    if view.state not in only:
        raise InputError(f"{run} is {view.state}, not {' or '.join(sorted(only))}", f"`karikomi retry {run}` tries it.")
    admission = replace(
        admitted(job, by or asked_by())[0], job=job
    )  # the run is what it was, whatever its tenant's defaults are now
    number = view.last.started.number + 1
    if (started := claimed(store, admission, number, jobs.url, by)) is None:
        raise InputError(f"{run}: somebody else has just started attempt {number}", f"`karikomi watch {run}`")
    return start(admission, started, jobs, admission.sentences, retries)


def resume(store: Store, run: str, cluster: str | None = None) -> Submission:
    """Submits the next attempt of a run that was cancelled or lost.

    Raises:
        InputError: it is running, or ended in another way.
    """
    return retry(store, run, cluster, frozenset(("cancelled", "lost")))


def watch(store: Store, run: str, cluster: str | None, on_view: Callable[[View], None], retries: int = 0) -> View:
    """Follows a run to its end; when machines were lost, the next attempt is submitted, `retries` times at most."""
    left = retries

    def again(view: View) -> bool:
        nonlocal left
        if left == 0:
            return False
        left -= 1
        retry(store, run, cluster, frozenset(("lost",)), left)
        return True

    return follow(store, run, jobs_of(store, run, cluster), on_view, again)


def start(admission: Admission, started: Started, jobs: RayJobs, remarks: tuple[str, ...], retries: int) -> Submission:
    """Hands a claimed attempt to Ray; one that somebody else has handed over meanwhile is left to it."""
    with entrypoint(admission, started, jobs.nodes(), retries) as (entry, where):
        fresh = jobs.submit(entry)
    told = f"{started.attempt} is submitted to {jobs.url}."
    return Submission(started, fresh, (*remarks, where, told))


def prepared(job: Job, grace: int | None, by: str | None) -> tuple[Admission, tuple[str, ...]]:
    """A job that may be submitted, its paths absolute, and what was changed and decided, in words.

    Raises:
        InputError: its tenant may not.
    """
    job, made = absolute_paths(job)
    moved = (f"Made absolute, and must be there on the cluster's nodes, too: {', '.join(made)}.",) if made else ()
    if grace is not None:
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"grace_seconds": grace})})
    admission, _ = admitted(job, by or asked_by())
    return admission, (*moved, *admission.sentences)


def claimed(store: Store, admission: Admission, number: int, url: str, by: str | None) -> Started | None:
    """Claims an attempt, and reserves what it was let in for; None when somebody else was first.

    Once the claim is there for all to see, the budget is looked at again: of two requests at one moment at least the
    later one sees the other, so together they do not pass a budget that has room for one. The model is not read for it.

    Raises:
        InputError: there is no room any more.
    """
    job = admission.job
    started = claim_number(store, job.run, number, job.tenant, job.name, by or asked_by(), url, dump_job(job))
    if started is not None:
        ledger.open_account(store, job, started, admission.environment)
        try:
            still_let_in(admission, by or asked_by())
        except InputError as error:
            close(store, started, ending_of(error))
            raise
    return started


def unknown_to(jobs: RayJobs, view: View) -> bool:
    """Whether a queued attempt never came to this cluster."""
    return view.state == "queued" and view.last.started.cluster == jobs.url and view.seen is not None and (
        view.seen.job is None
    )  # fmt: skip


def check(job: Job) -> None:
    """Refuses before it is submitted what a run would refuse at its start.

    Raises:
        InputError: names the field or file.
    """
    try:
        compress(job.recipe, job.settings, dry=True)
    except NotDone:
        return


def cluster_url(given: str | None, other: str) -> str:
    """The job server's address: the given one, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or `other` – whichever is http(s).

    Raises:
        InputError: there is none.
    """
    if given:
        return given.rstrip("/")
    for one in (os.environ.get("RAY_API_SERVER_ADDRESS", ""), os.environ.get("RAY_ADDRESS", ""), other):
        if one.startswith(("http://", "https://")):
            return one.rstrip("/")
    raise InputError(
        "no cluster to submit to",
        "Give --cluster http://HOST:8265, set RAY_API_SERVER_ADDRESS, or write it as cluster.address in the job.",
    )


__all__ = ["Submission", "cancel", "follow", "look", "resume", "retry", "submit", "watch"]
