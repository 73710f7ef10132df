"""Runs as they stand: read from the store, with the cluster's word where there is a cluster at hand."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.errors import InputError, Unavailable
from cluster.ray_facts import Cluster
from cluster.ray_jobs import RayJobs
from cluster.storage import MissingKey, Store
from jobs.closing import close
from jobs.explaining import Explanation, ending_by_ray, explain_attempt, merged_state
from jobs.notifying import RETRIES_LEFT, tell_for
from jobs.records import LOST_AFTER_SECONDS, Attempt, Run, Started, State, log_key, read_run

LOOK_AGAIN = 0.5  # seconds
ENDED: frozenset[State] = frozenset(("done", "rolled back", "gate not met", "bad input", "failed", "lost", "cancelled"))


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Attributes:
        run: its records.
        seen: what the cluster says of its last attempt; None when none was at hand.
        at: the moment.
    """

    run: Run
    seen: Cluster | None
    at: datetime

    @property
    def last(self) -> Attempt:
        """The attempt that counts."""
        return self.run.last

    @property
    def state(self) -> State:
        """Its state, by store and cluster."""
        return merged_state(self.last, self.seen, self.at)

    @property
    def over(self) -> bool:
        """Whether it will not change by itself."""
        return self.state in ENDED

    @property
    def code(self) -> int | None:
        """The exit code of the last attempt; None while it lives."""
        if not self.over:
            return None
        return self.last.ended.code if self.last.ended else Unavailable.exit_code

    def explain(self) -> Explanation:
        """One sentence, and the way on."""
        return explain_attempt(self.last, self.state, self.seen, self.at)


def find_run(store: Store, name: str) -> str:
    """A run's full name.

    Args:
        store: where runs are kept.
        name: the name, its unique beginning, or an attempt's name.

    Raises:
        InputError: none or several begin so.
    """
    names = store.folders("runs/")
    if name in names:
        return name
    found = [one for one in names if one.startswith(name)] or [
        one for one in names if name.startswith(f"{one}-a") and name.removeprefix(f"{one}-a").isdigit()
    ]
    way = f"`karikomi list --from {store.uri}` lists them."
    if not name or not found:
        raise InputError(f"{store.uri}: no run is called {name!r}", way)
    if len(found) > 1:
        raise InputError(f"{name}: {len(found)} runs begin so: {', '.join(found[:5])}", "Give more letters.")
    return found[0]


def look(store: Store, run: str, jobs: RayJobs | None) -> View:
    """A run as it stands. An attempt that the cluster knows to be over, but that left no end, gets one here.

    Raises:
        InputError: there is no such run.
        Unavailable: the store, or the cluster that was handed in, is out of reach.
    """
    found = read_run(store, run)
    if found is None:
        raise InputError(f"{store.uri}: nobody has tried run {run}", "`karikomi submit JOB` does.")
    seen = None
    if jobs is not None and found.last.ended is None and found.last.started.cluster.startswith("http"):
        seen = jobs.see(found.last.started.attempt)
        if settle(store, found.last, seen, jobs):
            found = read_run(store, run) or found
    return View(found, seen, datetime.now(UTC))


def settle(store: Store, attempt: Attempt, seen: Cluster, jobs: RayJobs) -> bool:
    """Records the end of an attempt that the cluster knows to be over; False when it goes on, or ended by itself."""
    now, started = datetime.now(UTC), attempt.started
    if seen.job is None:
        beat = attempt.progress.at if attempt.progress else started.at
        if jobs.url != started.cluster or (now - beat).total_seconds() < LOST_AFTER_SECONDS:
            return False  # another cluster was asked, or it is being submitted just now
    ended = ending_by_ray(seen.job, attempt.progress is not None, now)
    if ended is None:
        return False
    if seen.job is not None:
        keep_log(store, started, jobs)
    # The driver may have written its own end since we read; the first is believed.
    first = close(store, started, ended.model_copy(update={"usage": attempt.usage}))
    again = seen.job is not None and seen.job.metadata.get(RETRIES_LEFT, "0") != "0"
    if first and not (again and ended.result == "lost"):  # else somebody will submit the next attempt
        tell_for(store, started.run)
    return True


def keep_log(store: Store, started: Started, jobs: RayJobs) -> None:
    """Copies an attempt's whole log from the cluster."""
    store.put(log_key(started), jobs.log(started.attempt).encode())


def jobs_of(store: Store, run: str, cluster: str | None) -> RayJobs | None:
    """The cluster that a run's last attempt is on.

    Args:
        store: where the run is.
        run: its name.
        cluster: the address that the user gave. One that does not answer is an error; the recorded one may be gone.
    """
    if cluster:
        return RayJobs(cluster)
    found = read_run(store, run)
    address = found.last.started.cluster if found else ""
    if found is None or found.last.ended is not None or not address.startswith("http"):
        return None
    try:
        return RayJobs(address)
    except Unavailable:
        return None


def follow(
    store: Store,
    run: str,
    jobs: RayJobs | None,
    on_view: Callable[[View], None],
    again: Callable[[View], bool] = lambda view: False,
    stop: Callable[[], bool] = lambda: False,
) -> View:
    """Looks at a run until it is over.

    Args:
        store: where it is.
        run: its name.
        jobs: the cluster that it is on, if there is one at hand.
        on_view: shown every look.
        again: asked when an attempt was lost; True when it has started the next one.
        stop: asked between looks; the run goes on.

    Raises:
        Unavailable: store or cluster have not answered for a minute.
    """
    pause = threading.Event()
    answered = time.monotonic()
    while True:
        try:
            view = look(store, run, jobs)
        except Unavailable:
            if time.monotonic() - answered > LOST_AFTER_SECONDS:
                raise
            pause.wait(LOOK_AGAIN)
            continue
        answered = time.monotonic()
        on_view(view)
        if stop() or (view.over and not (view.code == Unavailable.exit_code and again(view))):
            return view
        pause.wait(LOOK_AGAIN)


def read_log(store: Store, view: View) -> str:
    """The log of a run's last attempt, from the store.

    Raises:
        InputError: none was copied yet.
    """
    try:
        return store.get(log_key(view.last.started)).decode(errors="replace")
    except MissingKey as error:
        raise InputError(
            f"{view.last.started.attempt}: no log in the store",
            "A driver's log is there half a minute after it began; `logs -f` reads it from the cluster.",
        ) from error


def log_lines(store: Store, run: str, jobs: RayJobs | None, until_over: bool) -> Iterator[str]:
    """The log of a run's last attempt, in pieces.

    Args:
        store: where it is copied to.
        run: its name.
        jobs: read from there while the attempt lives and is known there.
        until_over: go on until the attempt ends.

    Raises:
        InputError: there is none.
    """
    view = look(store, run, jobs)
    name = view.last.started.attempt
    if jobs is not None and not view.over and view.seen is not None and view.seen.job is not None:
        if until_over:
            yield from jobs.follow(name)
        else:
            yield jobs.log(name)
        return
    yield read_log(store, view)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Looks until it holds; False when it did not within the time."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(LOOK_AGAIN)
    return True
