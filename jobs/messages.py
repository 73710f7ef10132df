"""What is told of a run's end, as plain fields and as Slack's Block Kit. Pure: records in, text out."""

from datetime import datetime
from typing import Any, Literal

from jobs.notice import Told
from jobs.records import Ended, Record, Result, Started, Usage
from jobs.redacting import redact

EVENTS: dict[Result, Told] = {
    "done": "done",
    "rolled back": "rolled back",
    "gate not met": "needs decision",
    "bad input": "failed",
    "failed": "failed",
    "lost": "failed",
    "cancelled": "cancelled",
}
# Slack's limits: https://docs.slack.dev/reference/block-kit/blocks
LONGEST_HEADER, LONGEST_TEXT, LONGEST_FIELD = 150, 3000, 2000


class Message(Record):
    """A run's end, for who waits for it. Receivers may rely on these names."""

    kind: Literal["karikomi.run-ended.v1"] = "karikomi.run-ended.v1"
    event: Told
    run: str
    attempt: str
    tenant: str
    name: str
    state: Result
    code: int
    sentence: str
    release: str
    digest: str
    release_uri: str
    report_uri: str
    next: str
    at: datetime
    usage: Usage


def message(
    run: str,
    tenant: str,
    name: str,
    started: Started | None,
    ended: Ended,
    store: str,
    release_uri: str = "",
    report_uri: str = "",
) -> Message:
    """The message about a run's end.

    Args:
        run: the run.
        tenant: whose it is.
        name: the release's name.
        started: the attempt; None when it was refused before it was claimed.
        ended: how it ended.
        store: the store's uri, for the next command.
        release_uri: where the release is; empty when there is none.
        report_uri: where its report is.
    """
    return Message(
        event=EVENTS[ended.result],
        run=run,
        attempt=started.attempt if started else "",
        tenant=tenant,
        name=name,
        state=ended.result,
        code=ended.code,
        sentence=redact(ended.sentence),
        release=ended.release,
        digest=ended.digest,
        release_uri=release_uri,
        report_uri=report_uri,
        next=redact(next_step(run, started, ended, store)),
        at=ended.at,
        usage=ended.usage,
    )


def next_step(run: str, started: Started | None, ended: Ended, store: str) -> str:
    """What to do now: a command, or the hint that the error gave."""
    if ended.release:
        fetch = f"karikomi pull {ended.release} DIR --from {store}"
        return fetch if ended.result == "done" else f"{fetch} (the last stage that met its gate)"
    if ended.result == "gate not met":
        return (
            "Loosen gates, lower target.sparsity, or give stages more tune.steps; "
            f"the numbers: karikomi explain {run} --from {store}"
        )
    if ended.result in ("lost", "cancelled"):
        again = "karikomi run JOB" if started is None or started.cluster == "embedded" else f"karikomi resume {run}"
        return f"{again} goes on where it was cut off"
    return ended.hint or f"karikomi explain {run} --from {store}"


def as_json(told: Message) -> bytes:
    """Every field, by its name."""
    return told.model_dump_json().encode()


def as_slack(told: Message) -> dict[str, Any]:
    """Block Kit: a header, the sentence, the facts, the next command; `text` is what a notification shows."""
    title = cut(f"{told.release or told.name}: {told.event}", LONGEST_HEADER)
    facts = {"Tenant": told.tenant, "Run": told.attempt or told.run, "State": f"{told.state} (exit code {told.code})"}
    facts |= {"Release": told.release_uri} if told.release_uri else {}
    facts |= {"Report": told.report_uri} if told.report_uri else {}
    return {
        "text": escaped(f"{title} – {told.sentence}", LONGEST_TEXT),
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": title, "emoji": False}},
            {"type": "section", "text": markdown(escaped(told.sentence or told.state, LONGEST_TEXT))},
            {
                "type": "section",
                "fields": [
                    markdown(f"*{name}*\n{escaped(fact, LONGEST_FIELD - len(name) - 3)}")
                    for name, fact in facts.items()
                ],
            },
            {"type": "section", "text": markdown(f"*Next*\n{escaped(told.next, LONGEST_TEXT - 7)}")},
        ],
    }


def markdown(text: str) -> dict[str, Any]:
    """A text object; `verbatim` keeps Slack from making links of what looks like one."""
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def escaped(text: str, longest: int) -> str:
    """Text in which nothing is a mention, a link or a channel call, and that Slack takes whole."""
    for number in range(min(len(text), longest), -1, -1):  # an escaped character is longer than it was
        found = cut(text, number).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        if len(found) <= longest:
            return found
    return ""


def cut(text: str, longest: int) -> str:
    """The text, or as much of it as may be."""
    return text if len(text) <= longest else text[: max(longest - 1, 0)] + "…"
