"""Why a run waits, what it does, or how it ended: one sentence with the number that decides, and what to do next.

Pure: the run's records and what Ray says of it come in, words go out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cluster.ray_facts import Cluster, RayJob, RayNode
from jobs.records import LOST_AFTER_SECONDS, Attempt, Ended, Result, State

ASKS = "asks"  # key of a submission's metadata: the resources that its driver takes, as JSON
LABELS = "labels"  # and the labels that its node must have
START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
NO_ENVIRONMENT = "RUNTIME_ENV_SETUP_FAILURE"
LONGEST = 300  # characters of another program's message


@dataclass(frozen=True)
class Explanation:
    """A sentence, and the way on."""

    sentence: str
    hint: str = ""


def explain_attempt(attempt: Attempt, state: State, seen: Cluster | None, now: datetime) -> Explanation:
    """What is the matter with an attempt.

    Args:
        attempt: its records.
        state: its state, see `merged_state`.
        seen: what the cluster says of it; None when there is no cluster at hand.
        now: to tell ages.
    """
    run, cluster = attempt.started.run, attempt.started.cluster
    if attempt.ended is not None:
        return _ending(run, attempt.ended)
    if state == "lost":
        silent = f", silent for {_age(attempt.progress.at, now)}" if attempt.progress else ""
        return Explanation(
            f"lost: attempt {attempt.started.number} on {cluster} left no end{silent}",
            f"`karikomi retry {run}` goes on at the last finished block.",
        )
    if seen is None and state == "queued":
        return Explanation(
            f"queued for {_age(attempt.started.at, now)} on {cluster}, which is not at hand to say why",
            "Name the cluster with --cluster.",
        )
    if state == "queued":
        return _queued(attempt, seen, now)
    return _running(attempt, seen, now)


def merged_state(attempt: Attempt, seen: Cluster | None, now: datetime) -> State:
    """The state by the records, corrected by a cluster that sees the driver live although it tells nothing."""
    state = attempt.state(now)
    alive = seen is not None and seen.job is not None and seen.job.status == "RUNNING"
    return "running" if state == "lost" and attempt.ended is None and alive else state


def ending_by_ray(job: RayJob | None, began: bool, now: datetime) -> Ended | None:
    """How an attempt ended that left no end itself; None while Ray does not say that it is over.

    Args:
        job: what Ray says; None when it knows none of that name (the head was started anew).
        began: whether its driver ever told of itself.
        now: when this was found out.
    """
    if job is not None and not job.over:
        return None
    if job is None:
        return _lost(now, "the cluster does not know it any more: its head was started anew, or is another")
    code, words = job.exit_code, " ".join(job.message.split())[:LONGEST]
    if job.error_type == START_TIMEOUT:
        return _lost(
            now,
            "it waited in Ray's queue for longer than the cluster lets a job wait: " + words,
            "Start the head with RAY_JOB_START_TIMEOUT_SECONDS=86400 in its environment, then submit again.",
        )
    if job.status == "STOPPED":
        return Ended(at=now, code=130, result="cancelled", sentence="stopped at the cluster; its driver left no record")
    if job.error_type == NO_ENVIRONMENT:
        return Ended(
            at=now, code=1, result="failed", sentence=f"its package could not be set up on the cluster: {words}",
            hint="Look at the cluster's disk and at Ray's runtime_env_setup logs, then retry.",
        )  # fmt: skip
    known: dict[int, Result] = {2: "bad input", 3: "gate not met", 130: "cancelled"}
    if code in known:
        return Ended(at=now, code=code, result=known[code], sentence=f"ended without a record: {words}")
    if code in (1, 126, 127) and not began:
        return Ended(
            at=now, code=1, result="failed", sentence=f"its driver could not start: {words}",
            hint="The image on the cluster needs Python 3.11 and Karikomi's dependencies; see `karikomi logs`.",
        )  # fmt: skip
    how = f"its driver was killed (exit code {code})" if code is not None else f"its driver is gone: {words}"
    return _lost(now, how)


def asked(resources: Mapping[str, float]) -> str:
    """Resources in words: 1 CPU and 1 quota-retail."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


def blocking(asks: Mapping[str, float], labels: Mapping[str, str], nodes: Sequence[RayNode]) -> str | None:
    """The numbers that keep a driver from its place; None when there is room for it.

    Args:
        asks: what it takes, by name.
        labels: what its node must have; "!x" means: not x.
        nodes: the living ones.
    """
    allowed = [node for node in nodes if all(_matches(node.labels.get(k), v) for k, v in labels.items())]
    if not allowed:
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        return f"it waits for a node labelled {wanted}; none of {len(nodes)} nodes is"
    if any(_fits(asks, node.free) for node in allowed):
        return None
    if not any(_fits(asks, node.total) for node in allowed):
        parts = [f"{name}: asked {a:g}, most on one node {_most(allowed, name):g}" for name, a in asks.items()]
        return f"no node is big enough for {asked(asks)} ({'; '.join(parts)})"
    short = [name for name, amount in asks.items() if all(node.free.get(name, 0) < amount for node in allowed)]
    parts = [
        f"{name}: asked {asks[name]:g}, cluster has {_sum(allowed, name):g}, free {_sum(allowed, name, free=True):g}"
        for name in short or asks
    ]
    return f"it waits for {asked({name: asks[name] for name in short or asks})} ({'; '.join(parts)})"


def _queued(attempt: Attempt, seen: Cluster | None, now: datetime) -> Explanation:
    since = f"queued for {_age(attempt.started.at, now)}"
    run, cluster = attempt.started.run, attempt.started.cluster
    if seen is None or seen.job is None:
        return Explanation(
            f"{since}: claimed, but not yet known to {cluster}",
            f"Submit it again; the same attempt ({attempt.started.attempt}) is taken.",
        )
    if seen.job.status == "RUNNING":
        return Explanation(f"{since}: its driver is starting", f"`karikomi watch {run}` follows it.")
    asks = json.loads(seen.job.metadata.get(ASKS, "{}"))
    labels = json.loads(seen.job.metadata.get(LABELS, "{}"))
    reason = blocking(asks, labels, seen.nodes)
    if reason is None:
        return Explanation(f"{since}: there is room ({asked(asks)}); Ray is placing it and sets its package up")
    if reason.startswith("it waits for") and "labelled" not in reason:
        hint = "It starts by itself when others end; `karikomi list` shows who is running."
    else:
        hint = f"Add such a node, or `karikomi cancel {run}` and ask for less."
    return Explanation(f"{since}: {reason}", hint)


def _running(attempt: Attempt, seen: Cluster | None, now: datetime) -> Explanation:
    progress, run = attempt.progress, attempt.started.run
    if progress is None:
        return Explanation("running: its driver has told nothing yet", f"`karikomi logs {run}` shows its log.")
    if seen is not None and seen.gangs:
        return _gang(progress_words(attempt), seen.gangs[0], seen.nodes)
    silent = (now - progress.at).total_seconds()
    if silent > LOST_AFTER_SECONDS:
        return Explanation(
            f"its driver lives at {attempt.started.cluster}, but has told nothing for {_age(progress.at, now)}",
            f"Is the store slow, or the node frozen? `karikomi cancel {run}`, then `karikomi resume {run}`.",
        )
    return Explanation(f"running: {progress_words(attempt)}", f"`karikomi watch {run}` follows it.")


def progress_words(attempt: Attempt) -> str:
    """How far it is: stage 1 of 2, prune 3 of 18."""
    progress = attempt.progress
    if progress is None:
        return ""
    stage = f"stage {progress.stage} of {progress.stages}, " if progress.stage else ""
    count = f" {progress.done} of {progress.total}" if progress.total else ""
    return f"{stage}{progress.step}{count}"


def _gang(where: str, gang: Sequence[Mapping[str, float]], nodes: Sequence[RayNode]) -> Explanation:
    bundle = gang[0]
    parts = [
        f"{name}: asked {len(gang)} x {amount:g}, "
        f"cluster has {_sum(nodes, name):g}, free {_sum(nodes, name, free=True):g}"
        for name, amount in bundle.items()
    ]
    enough = all(_sum(nodes, name) >= len(gang) * amount for name, amount in bundle.items())
    return Explanation(
        f"running, but {where} waits for {len(gang)} workers ({'; '.join(parts)})",
        "It goes on by itself when others end; it gives up after cluster.wait_seconds."
        if enough
        else "The cluster is too small for it: lower cluster.workers or cluster.gpus_per_worker, or add nodes.",
    )


def _ending(run: str, ended: Ended) -> Explanation:
    hints = {
        "done": f"`karikomi pull {ended.release} DIR` fetches it.",
        "rolled back": f"`karikomi pull {ended.release} DIR` fetches the last good stage.",
        "gate not met": "Loosen gates, lower target.sparsity, or give stages more tune.steps.",
        "bad input": "Correct it and submit again; it is never retried by itself.",
        "cancelled": f"`karikomi resume {run}` goes on where it stopped.",
        "lost": f"`karikomi retry {run}` goes on at the last finished block.",
        "failed": f"`karikomi logs {run}` shows where; `karikomi retry {run}` tries again.",
    }
    release = f" ({ended.release})" if ended.release else ""
    hint = hints[ended.result]
    if ended.hint and ended.result in ("bad input", "lost", "failed"):
        hint = ended.hint if ended.result == "bad input" else f"{ended.hint} {hint}"
    return Explanation(f"{ended.result}{release}: {ended.sentence}", hint)


def _lost(now: datetime, sentence: str, hint: str = "") -> Ended:
    return Ended(at=now, code=75, result="lost", sentence=sentence, hint=hint)


def _matches(value: str | None, wanted: str) -> bool:
    return value != wanted[1:] if wanted.startswith("!") else value == wanted


def _fits(asks: Mapping[str, float], there: Mapping[str, float]) -> bool:
    return all(there.get(name, 0) >= amount for name, amount in asks.items())


def _most(nodes: Sequence[RayNode], name: str) -> float:
    return max((node.total.get(name, 0) for node in nodes), default=0)


def _sum(nodes: Sequence[RayNode], name: str, free: bool = False) -> float:
    return sum((node.free if free else node.total).get(name, 0) for node in nodes)


def _age(since: datetime, now: datetime) -> str:
    return age((now - since).total_seconds())


def age(seconds: float) -> str:
    """A length of time for a person: 42 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
