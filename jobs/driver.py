"""The driver of one attempt on a cluster: `python -m jobs.driver job.yaml --attempt RUN-aN`, as Ray starts it.

It retries nothing: its exit code says what happened, and whoever follows the run decides. One line per event goes to
its log, which is copied to the store.
"""

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cluster.credentials import adopt
from cluster.errors import Cancelled, KarikomiError
from cluster.storage import Store, open_store
from jobs.closing import close
from jobs.commands.console import quiet_libraries, say, show_error
from jobs.job import Job, read_job
from jobs.notifying import tell_for
from jobs.records import Ended, Progress, Started, Usage, log_key, note_progress, read_cancel, read_run
from jobs.signals import Drain, draining
from workflows.events import Advanced, Event, GateJudged, StepEnded, StepStarted

COPY_EVERY = 30.0  # seconds
LARGEST_LOG = 4 << 20  # bytes; of a longer one the end is kept
LOOK_AGAIN = 0.5  # seconds


def main(arguments: list[str] | None = None) -> int:
    """Runs one attempt and returns the exit code of the contract."""
    parser = argparse.ArgumentParser(prog="python -m jobs.driver")
    parser.add_argument("job", type=Path)
    parser.add_argument("--attempt", required=True)
    given = parser.parse_args(arguments)
    with draining() as drain:  # first of all: a cancel may come at once
        try:
            adopt()  # a tenant's keys, before anything is read
            job = read_job(given.job)
            store = open_store(job.publish.to)
            started = find_started(store, job, given.attempt)
            with log_copied(store, log_key(started)):
                return attempt(job, store, started, drain)
        except KarikomiError as error:
            show_error(error)
            return error.exit_code


def attempt(job: Job, store: Store, started: Started, drain: Drain) -> int:
    """Carries the job out as this attempt."""
    run = read_run(store, job.run)
    before = next((one.ended for one in run.attempts if one.started == started), None) if run else None
    if before is not None:
        say(f"{started.attempt} has ended already: {before.result}: {before.sentence}")
        return before.code
    note_progress(store, started, Progress(at=datetime.now(UTC), step="starting", stages=len(job.stages)))
    say(f"{started.attempt} on {os.uname().nodename}, asked by {started.by}")
    threading.Thread(target=end_after_grace, args=(drain, store, started), daemon=True, name="grace").start()
    quiet_libraries()
    from jobs.running import carry_out
    from jobs.summary import print_outcome

    here = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": "auto"})})
    try:
        outcome = carry_out(here, Teller(len(job.stages)), drain, started)
    except KarikomiError as error:
        show_error(error)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    from jobs.commands.console import out

    print_outcome(outcome, job.settings, out)
    return 0 if outcome.complete else 3


def find_started(store: Store, job: Job, name: str) -> Started:
    """The record of the attempt's claim.

    Raises:
        KarikomiError: there is none; whoever submitted it wrote to another store.
    """
    run = read_run(store, job.run)
    for one in run.attempts if run else ():
        if one.started.attempt == name:
            return one.started
    raise KarikomiError(
        f"{store.uri}: nobody has claimed {name}",
        "Does the cluster see the store that it was submitted from? publish.to must be reachable from both.",
    )


class Teller:
    """Writes one line for an event; what was said last is not said again."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.last = ""

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        line = words_of(event, self.stages)
        if line != self.last:
            self.last = line
            say(f"{datetime.now(UTC):%H:%M:%S} {line}")
            sys.stdout.flush()


def words_of(event: Event, stages: int) -> str:
    """An event in words: stage 1/2: prune 3/18."""
    where = f"stage {event.stage}/{stages}: " if event.stage else ""
    match event:
        case StepStarted():
            return f"{where}{event.name} begins"
        case StepEnded():
            return f"{where}{event.name} {'was done' if event.resumed else f'done in {event.seconds:.1f} s'}"
        case Advanced():
            numbers = "".join(f", {name} {value:.4g}" for name, value in event.numbers.items())
            return f"{where}{event.name} {event.done}/{event.total}{numbers}"
        case GateJudged():
            return f"{where}gate {'passed' if event.passed else 'failed'}: {event.sentence}"


def end_after_grace(drain: Drain, store: Store, started: Started) -> None:
    """Ends the process when it was cancelled and its grace is over, in the middle of a block if need be.

    Ray itself kills it after `cluster.grace_seconds`; whoever cancels may give it less.
    """
    pause = threading.Event()
    while not drain():
        pause.wait(LOOK_AGAIN)
    cancel = read_cancel(store, started)
    if cancel is None:  # somebody stopped it at Ray itself, whose own limit holds
        return
    pause.wait(max(0.0, cancel.grace_seconds - (datetime.now(UTC) - cancel.at).total_seconds()))
    sentence = f"stopped after {cancel.grace_seconds:g} s of grace; what was not finished is done again"
    try:
        run = read_run(store, started.run)
        usage = next((one.usage for one in run.attempts if one.started == started), Usage()) if run else Usage()
        ended = Ended(
            at=datetime.now(UTC), code=Cancelled.exit_code, result="cancelled", sentence=sentence, usage=usage
        )
        first = close(store, started, ended)
        copy_log(store, log_key(started))
        if first:
            tell_for(store, started.run)
    finally:
        os._exit(Cancelled.exit_code)


@contextmanager
def log_copied(store: Store, key: str) -> Iterator[None]:
    """Copies this process's output to the store every half minute and at the end, however it ends."""
    over = threading.Event()

    def keep_copying() -> None:
        while not over.wait(COPY_EVERY):
            copy_log(store, key)

    thread = threading.Thread(target=keep_copying, daemon=True, name="log")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        copy_log(store, key)


def copy_log(store: Store, key: str) -> None:
    """Copies what was written so far; Ray has made our output a file. Under a terminal there is nothing to copy."""
    sys.stdout.flush()
    sys.stderr.flush()
    path = Path(f"/proc/self/fd/{sys.stdout.fileno()}")
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LARGEST_LOG))
        content = file.read()
    try:
        store.put(key, content)
    except KarikomiError as error:  # the run is worth more than its log
        sys.stderr.write(f"the log could not be copied: {error.message}\n")


if __name__ == "__main__":
    sys.exit(main())
