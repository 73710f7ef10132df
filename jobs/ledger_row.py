"""A run's row in the ledger: made of the run's own records, the same however often it is made."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.storage import MissingKey, Store
from jobs.job import Job, parse_job
from jobs.pricing import Account, account_for
from jobs.records import Attempt, Run, Started
from workflows.steps import digest

TIME = pa.timestamp("ms", tz="UTC")
PARTITIONS = {"tenant": pa.string(), "month": pa.string()}  # in the path, not in the file
COLUMNS = {
    "business_unit": pa.string(), "run": pa.string(), "name": pa.string(), "model": pa.string(),
    "source_digest": pa.string(), "recipe_digest": pa.string(), "shape_digest": pa.string(),
    "model_digest": pa.string(), "release": pa.string(), "pattern": pa.string(), "sparsity": pa.float64(),
    "stages": pa.int32(), "perplexity_increase": pa.float64(), "worst_slice_increase": pa.float64(),
    "accuracy_drop": pa.float64(), "worst_slice_drop": pa.float64(),
    "attempts": pa.int32(), "state": pa.string(), "started": TIME, "ended": TIME, "seconds": pa.float64(),
    "cpu_seconds": pa.float64(), "gpu_seconds": pa.float64(), "stored_bytes": pa.int64(), "usd": pa.float64(),
    "estimated_usd": pa.float64(), "karikomi": pa.string(),
}  # fmt: skip
FILE = pa.schema(COLUMNS)
WHOLE = pa.schema(PARTITIONS | COLUMNS)


def row_of(store: Store, run: Run, now: datetime) -> dict[str, Any]:
    """A run's row: its partition and its columns.

    Raises:
        InputError: a record cannot be read.
    """
    first, last = run.attempts[0].started, run.last
    job = _job(store, run.run)
    told = last.ended or last.progress
    steps = list(_steps(store, run.run))
    accounts = [account for one in run.attempts if (account := _account(store, one.started, job)) is not None]
    released = next((one.ended for one in reversed(run.attempts) if one.ended and one.ended.release), None)
    judged = next((one.ended.figures for one in reversed(run.attempts) if one.ended and one.ended.figures), None)
    state = run.state(now)
    return {
        "tenant": first.tenant,
        "month": month_of(first.at),
        "business_unit": accounts[-1].business_unit if accounts else first.tenant,
        "run": run.run,
        "name": first.name,
        "model": job.model if job else "",
        "source_digest": _source_digest(steps),
        "recipe_digest": digest(job.recipe) if job else "",
        "shape_digest": shape_digest(job) if job else "",
        "model_digest": released.digest if released else "",
        "release": released.release if released else "",
        "pattern": job.target.pattern if job else "",
        "sparsity": judged.sparsity if judged else None,
        "stages": judged.stages if judged else 0,
        "perplexity_increase": judged.perplexity_increase if judged else None,
        "worst_slice_increase": judged.worst_slice_increase if judged else None,
        "accuracy_drop": judged.accuracy_drop if judged else None,
        "worst_slice_drop": judged.worst_slice_drop if judged else None,
        "attempts": len(run.attempts),
        "state": state,
        "started": first.at,
        "ended": told.at if told and state not in ("queued", "running") else None,
        **run.usage.model_dump(),
        "stored_bytes": _stored_bytes(steps),
        "usd": sum(_dollars(store, one, job) for one in run.attempts),
        "estimated_usd": accounts[-1].estimated_usd if accounts else 0.0,
        "karikomi": last.started.karikomi,
    }


def month_of(at: datetime) -> str:
    """YYYY-MM in UTC."""
    return f"{at.astimezone(UTC):%Y-%m}"


def shape_digest(job: Job) -> str:
    """What decides how long a run takes beside its model: two runs of one shape cost about the same."""
    data = {
        role: (source.windows, source.length)
        for role in ("calibration", "tuning", "evaluation")
        if (source := getattr(job.data, role))
    }
    keys = (
        "target", "solver", "recovery", "allocation", "score", "token_weights", "stages", "dtype", "device", "threads",
        "format",
    )  # fmt: skip
    return digest({"data": data, "hardware": job.hardware} | {name: getattr(job, name) for name in keys})


def account_key(run: str, number: int) -> str:
    """Where an attempt's account is kept."""
    return f"runs/{run}/attempts/{number}/account.json"


def _account(store: Store, started: Started, job: Job | None) -> Account | None:
    """The attempt's own account; the profile's price for an attempt without one; None when that is not here."""
    try:
        return Account.model_validate_json(store.get(account_key(started.run, started.number)))
    except MissingKey:
        try:
            return account_for(job, None) if job else None
        except InputError:
            return None
    except ValidationError as error:
        key = account_key(started.run, started.number)
        raise InputError(f"{store.uri}: {key} is no record of this version: {error}") from error


def _dollars(store: Store, attempt: Attempt, job: Job | None) -> float:
    account = _account(store, attempt.started, job)
    return account.dollars(attempt.usage) if account else 0.0


def _job(store: Store, run: str) -> Job | None:
    """The job as it was claimed; None when other code wrote it."""
    try:
        return parse_job(store.get(f"runs/{run}/job.yaml").decode(), f"{store.uri}/runs/{run}/job.yaml")
    except (InputError, MissingKey, UnicodeDecodeError):
        return None


def _steps(store: Store, run: str) -> Iterator[dict[str, Any]]:
    """The records of a run's steps, in the order of their ends."""
    records = [json.loads(store.get(key)) for key in store.keys(f"runs/{run}/steps/")]
    return iter(sorted(records, key=lambda one: (one.get("ended", ""), one.get("key", ""))))


def _source_digest(steps: list[dict[str, Any]]) -> str:
    """Of the model that the run last read, as the step that made its windows was told."""
    return next((str(one["inputs"].get("source", "")) for one in reversed(steps) if one.get("step") == "windows"), "")


def _stored_bytes(steps: list[dict[str, Any]]) -> int:
    """Bytes of all objects that the steps' records name, each once; the published copy of the weights is not added."""
    sizes: dict[str, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if {"key", "sha256", "size"} == set(value) and str(value["key"]).startswith("runs/"):
                sizes[value["key"]] = int(value["size"])
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk([one.get("result") for one in steps])
    return sum(sizes.values())
