"""The ledger: one row per run, for usage and charge-back, made of the run's own records and of nothing else.

    <root>/ledger/tenant=<tenant>/month=<YYYY-MM>/<run>.parquet

The month is that in which the run was first attempted (UTC). A row is written when an attempt begins and when it
ends; writing it again changes nothing. Whoever reads makes rows of unfinished runs anew, so that a killed driver's
run counts by its last heartbeat. Any tool that knows Hive partitions can read the folder.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.storage import MissingKey, Store
from jobs.job import Job, parse_job
from jobs.pricing import Account, account_for, account_here
from jobs.records import Attempt, Run, Started, list_runs, read_run
from workflows.steps import digest

UNFINISHED = ("queued", "running", "lost")  # the last: what is lost may be taken up again
READERS = 16  # requests at once
TIME = pa.timestamp("ms", tz="UTC")
PARTITIONS = {"tenant": pa.string(), "month": pa.string()}  # in the path, not in the file
COLUMNS = {
    "business_unit": pa.string(), "run": pa.string(), "name": pa.string(), "model": pa.string(),
    "source_digest": pa.string(), "recipe_digest": pa.string(), "shape_digest": pa.string(),
    "model_digest": pa.string(), "release": pa.string(), "pattern": pa.string(), "sparsity": pa.float64(),
    "stages": pa.int32(), "perplexity_increase": pa.float64(), "worst_slice_increase": pa.float64(),
    "attempts": pa.int32(), "state": pa.string(), "started": TIME, "ended": TIME, "seconds": pa.float64(),
    "cpu_seconds": pa.float64(), "gpu_seconds": pa.float64(), "stored_bytes": pa.int64(), "usd": pa.float64(),
    "estimated_usd": pa.float64(), "karikomi": pa.string(),
}  # fmt: skip
FILE = pa.schema(COLUMNS)
WHOLE = pa.schema(PARTITIONS | COLUMNS)


def open_account(store: Store, job: Job, started: Started, environment: Mapping[str, str] = os.environ) -> None:
    """Notes at what price an attempt works, once, and writes the run's row.

    Called when an attempt is claimed, so that what it was let in for counts at once, or when it begins.

    Args:
        store: the run's.
        job: what is asked.
        started: the attempt.
        environment: of the attempt's driver; may hold the account that the run was let in with.

    Raises:
        KarikomiError: the store does not take it, or the account is wrong.
    """
    account = account_here(job, environment)
    store.create(_account_key(started.run, started.number), account.model_dump_json(indent=1).encode())
    write_row(store, started.run)


def write_row(store: Store, run: str, now: datetime | None = None) -> dict[str, Any] | None:
    """Makes a run's row of its records and writes it; None when the run was never attempted.

    Raises:
        InputError: a record cannot be read.
    """
    found = read_run(store, run)
    if found is None:
        return None
    row = row_of(store, found, now or datetime.now(UTC))
    buffer = io.BytesIO()
    content = {name: row[name] for name in COLUMNS}
    pq.write_table(pa.Table.from_pylist([content], schema=FILE), buffer, compression="zstd")
    store.put(f"{_folder(row['tenant'], row['month'])}{run}.parquet", buffer.getvalue())
    return row


def rebuild(store: Store, now: datetime | None = None) -> int:
    """Writes the rows of all runs again from their records; how many. Rows of runs that are gone stay."""
    return sum(write_row(store, run.run, now) is not None for run in list_runs(store))


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


def read_ledger(
    store: Store, month: str | None = None, tenant: str | None = None, now: datetime | None = None
) -> pa.Table:
    """All rows of a month and a tenant; other partitions are not touched. Unfinished runs are looked up anew.

    Raises:
        InputError: a row cannot be read; `karikomi usage --rebuild` makes them again.
    """
    now = now or datetime.now(UTC)
    tenants = [tenant] if tenant else [one.removeprefix("tenant=") for one in store.folders("ledger/")]
    keys = [(one, key) for one in tenants for key in _keys(store, one, month)]
    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(lambda place: _read(store, place[0], place[1], now), keys))
    return pa.Table.from_pylist(rows, schema=WHOLE)


def committed(store: Store, tenant: str, month: str, besides: str, now: datetime | None = None) -> tuple[float, float]:
    """US dollars that a tenant's runs of a month have cost or were let in for, and those that one of them has cost.

    A run that is still on its way counts by its estimate, when that is more.

    Args:
        store: holds the ledger.
        tenant: whose runs.
        month: YYYY-MM.
        besides: a run that is asked for again: it counts by what it cost so far alone.
        now: for tests.
    """
    total = own = 0.0
    for row in read_ledger(store, month, tenant, now).to_pylist():
        open_yet = row["state"] in ("queued", "running") and row["run"] != besides
        total += max(row["usd"], row["estimated_usd"]) if open_yet else row["usd"]
        own += row["usd"] if row["run"] == besides else 0.0
    return total, own


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
    keys = ("target", "solver", "stages", "dtype", "device", "threads", "format")
    return digest({"data": data, "hardware": job.hardware} | {name: getattr(job, name) for name in keys})


def _read(store: Store, tenant: str, key: str, now: datetime) -> dict[str, Any]:
    month = key.split("/")[2].removeprefix("month=")
    try:
        (row,) = pq.read_table(pa.BufferReader(store.get(key)), schema=FILE).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{store.uri}: {key} is no row of the ledger: {error}",
            f"Make the rows again: karikomi usage --rebuild --from {store.uri}",
        ) from error
    if row["state"] in UNFINISHED and (run := read_run(store, row["run"])) is not None:
        return row_of(store, run, now)
    return {"tenant": tenant, "month": month} | row


def _keys(store: Store, tenant: str, month: str | None) -> Iterator[str]:
    prefix = _folder(tenant, month) if month else f"ledger/tenant={tenant}/"
    return (key for key in store.keys(prefix) if key.endswith(".parquet") and key.count("/") == 3)


def _folder(tenant: str, month: str) -> str:
    return f"ledger/tenant={tenant}/month={month}/"


def _account_key(run: str, number: int) -> str:
    return f"runs/{run}/attempts/{number}/account.json"


def _account(store: Store, started: Started, job: Job | None) -> Account | None:
    """The attempt's own account; the profile's price for an attempt without one; None when that is not here."""
    try:
        return Account.model_validate_json(store.get(_account_key(started.run, started.number)))
    except MissingKey:
        try:
            return account_for(job, None) if job else None
        except InputError:
            return None
    except ValidationError as error:
        key = _account_key(started.run, started.number)
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
