"""Tells who asked to be told how a run ended: at least once, and not again when the run is only looked at again.

After a delivery `runs/<run>/attempts/<n>/notified.json` says so. A driver that dies before it is written tells again
in its next attempt, so a receiver may see a message twice; both have the same `X-Karikomi-Delivery`. A failed
delivery is logged and recorded, and never fails a run.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import structlog
from pydantic import SecretStr, ValidationError

from cluster.errors import KarikomiError
from cluster.storage import Store
from jobs.job import Job, parse_job
from jobs.messages import EVENTS, Message, as_json, as_slack, message
from jobs.notice import NOT_KEPT, Notice, Told
from jobs.records import Ended, Record, Started, attempt_numbers, read_run
from jobs.redacting import hold_back
from jobs.webhooks import NotDelivered, Patience, send, signed
from workflows.release import Manifest, find_version

log = structlog.get_logger()
SECRET = "KARIKOMI_WEBHOOK_SECRET"
RETRIES_LEFT = "KARIKOMI_RETRIES_LEFT"  # set for a driver by who will submit the next attempt when this one is lost


class Delivery(Record):
    """A message to one receiver, and what became of it."""

    target: str
    event: Told
    about: str
    at: datetime
    delivered: bool
    answer: str


class Notified(Record):
    """Who was told of an attempt's end."""

    deliveries: tuple[Delivery, ...] = ()


def tell(
    job: Job, store: Store, started: Started | None, ended: Ended, patience: Patience | None = None
) -> tuple[Delivery, ...]:
    """Tells every receiver of `job.notify` that asked for this kind of end; gives back what was tried now.

    Never raises: whatever goes wrong is logged. All receivers are told at once, so it takes no longer than one of
    them may, however many hang.

    Args:
        job: names the receivers.
        store: keeps what was told.
        started: the attempt; None when it was refused before it was claimed – then nothing is kept.
        ended: how it ended.
        patience: with receivers that do not answer.
    """
    try:
        return _tell(job, store, started, ended, patience or Patience())
    except Exception as error:
        log.warning("nobody was told", run=job.run, error=f"{type(error).__name__}: {error}")
        return ()


def tell_for(store: Store, run: str) -> tuple[Delivery, ...]:
    """Tells of a run whose driver no longer could: who found it lost and recorded that, calls this once.

    The receivers are those of the kept job; their variables must be set where this is called. Never raises.
    """
    try:
        found = read_run(store, run)
        if found is None or found.last.ended is None:
            return ()
        job = parse_job(store.get(f"runs/{run}/job.yaml").decode(), f"the job of run {run}")
    except (KarikomiError, UnicodeDecodeError) as error:
        log.warning("nobody was told", run=run, error=str(error))
        return ()
    return tell(job, store, found.last.started, found.last.ended)


def get_ready(job: Job) -> None:
    """Before a run: learns the URLs, so that no log or record shows them, and warns of those that are missing."""
    for one in job.notify:
        try:
            address(one)
        except NotDelivered as error:
            log.warning("nobody will be told", run=job.run, target=one.target, error=str(error))


def _tell(job: Job, store: Store, started: Started | None, ended: Ended, patience: Patience) -> tuple[Delivery, ...]:
    event = EVENTS[ended.result]
    if ended.result == "lost" and os.environ.get(RETRIES_LEFT, "0") not in ("", "0"):
        return ()  # not the end: whoever watches the run submits the next attempt
    receivers = [(f"{number} {one.target}", one) for number, one in enumerate(job.notify, 1) if event in one.on]
    if not receivers:
        return ()
    about = subject(started, ended)
    before = told_before(store, started) if started else ()
    heard = {(one.target, one.event, one.about) for one in before if one.delivered}
    receivers = [(target, one) for target, one in receivers if (target, event, about) not in heard]
    release_uri, report_uri = places(store, ended)
    told = message(job.run, job.tenant, job.name, started, ended, store.uri, release_uri, report_uri)
    deliveries = tuple(_deliver(receivers, told, about, patience))
    if started and deliveries:
        kept = read_notified(store, started.run, started.number).deliveries
        store.put(_key(started.run, started.number), Notified(deliveries=kept + deliveries).model_dump_json().encode())
    return deliveries


def subject(started: Started | None, ended: Ended) -> str:
    """What a message is about.

    A release and a verdict are the same whichever attempt reads them from the records; a failure is news every time.
    """
    if ended.digest:
        return ended.digest[:12]
    if ended.result == "gate not met":
        return hashlib.sha256(ended.sentence.encode()).hexdigest()[:12]
    return started.attempt if started else ended.at.isoformat()


def told_before(store: Store, started: Started) -> tuple[Delivery, ...]:
    """Deliveries of this run's attempts so far."""
    numbers = attempt_numbers(store, started.run)
    return tuple(one for number in numbers for one in read_notified(store, started.run, number).deliveries)


def read_notified(store: Store, run: str, number: int) -> Notified:
    """Who was told of an attempt; nobody when there is no record, or none that can be read."""
    try:
        return Notified.model_validate_json(store.get(_key(run, number)))
    except (KarikomiError, ValidationError):
        return Notified()


def places(store: Store, ended: Ended) -> tuple[str, str]:
    """Where the release and its REPORT.html are; empty when there is none, or it cannot be found out now."""
    if not ended.release:
        return "", ""
    name, version = ended.release.split("@", 1)
    folder = f"models/{name}/{ended.digest[:12]}"
    try:
        pointer = find_version(store, name, version)
        if pointer is None:
            return "", ""
        manifest = Manifest.model_validate_json(store.get(f"{folder}/{pointer.manifest.key}"))
    except (KarikomiError, ValidationError):
        return f"{store.uri}/{folder}", ""
    report = manifest.files.get("REPORT.html")
    return f"{store.uri}/{folder}", f"{store.uri}/{folder}/{report.key}" if report else ""


def address(notice: Notice) -> str:
    """A receiver's URL, from here on known as a secret.

    Raises:
        NotDelivered: this machine does not know it.
    """
    if notice.url_from is not None:
        url = os.environ.get(notice.url_from, "")
        if not url:
            raise NotDelivered(f"the variable {notice.url_from} is not set on this machine")
    else:
        url = (notice.url or SecretStr(NOT_KEPT)).get_secret_value()
        if url == NOT_KEPT:
            raise NotDelivered("notify.url was not kept in the records; name a variable with url_from")
    return hold_back(url)


def _deliver(receivers: list[tuple[str, Notice]], told: Message, about: str, patience: Patience) -> Iterator[Delivery]:
    """Tells all receivers at once and waits as long as one may take; who has not answered by then is left behind."""
    answers: dict[str, tuple[bool, str]] = {}

    def one(target: str, notice: Notice) -> None:
        try:
            body = as_json(told) if notice.form == "json" else json.dumps(as_slack(told)).encode()
            headers = {"X-Karikomi-Event": told.event.replace(" ", "-")}
            headers["X-Karikomi-Delivery"] = f"{told.run}/{headers['X-Karikomi-Event']}/{about}"
            if secret := os.environ.get(SECRET):
                headers |= signed(secret, body)
            answers[target] = True, send(address(notice), body, headers, patience)
        except (NotDelivered, ValueError) as error:
            answers[target] = False, str(error)
        except Exception as error:  # its text might hold the URL
            answers[target] = False, type(error).__name__

    threads = [threading.Thread(target=one, args=pair, daemon=True, name="webhook") for pair in receivers]
    deadline = time.monotonic() + patience.in_all
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for target, _ in receivers:
        delivered, answer = answers.get(target, (False, f"no answer within {patience.in_all:g} s"))
        if delivered:
            log.info("told", target=target, told=told.event, answer=answer)
        else:
            log.warning("not told", target=target, told=told.event, answer=answer)
        yield Delivery(
            target=target, event=told.event, about=about, at=datetime.now(UTC), delivered=delivered, answer=answer
        )


def _key(run: str, number: int) -> str:
    return f"runs/{run}/attempts/{number}/notified.json"
