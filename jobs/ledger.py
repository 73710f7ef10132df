"""The ledger: one row per run, for usage and charge-back, made of the run's own records and of nothing else.

    <root>/ledger/tenant=<tenant>/month=<YYYY-MM>/<run>.parquet

The month is that in which the run was first attempted (UTC). A row is written when an attempt begins and when it
ends; writing it again changes nothing. Whoever reads makes rows of unfinished runs anew, so that a killed driver's
run counts by its last heartbeat. Any tool that knows Hive partitions can read the folder.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.storage import Store
from jobs.job import Job
from jobs.ledger_row import COLUMNS, FILE, WHOLE, account_key, row_of
from jobs.pricing import account_here
from jobs.records import Started, list_runs, read_run

UNFINISHED = ("queued", "running", "lost")  # the last: what is lost may be taken up again
READERS = 16  # requests at once


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
    store.create(account_key(started.run, started.number), account.model_dump_json(indent=1).encode())
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


def rebuild(store: Store, unreadable: Callable[[InputError], None], now: datetime | None = None) -> int:
    """Writes the rows of all runs again from their records; how many. Rows of runs that are gone stay.

    Args:
        store: the runs'.
        unreadable: told of each run whose records cannot be read; its row stays as it is.
        now: for tests.
    """
    return sum(write_row(store, run.run, now) is not None for run in list_runs(store, unreadable))


def read_ledger(
    store: Store,
    month: str | None = None,
    tenant: str | None = None,
    now: datetime | None = None,
    unreadable: Callable[[InputError], None] | None = None,
) -> pa.Table:
    """All rows of a month and a tenant; other partitions are not touched. Unfinished runs are looked up anew.

    Args:
        store: holds the ledger.
        month: YYYY-MM; all if not given.
        tenant: all if not given.
        now: for tests.
        unreadable: told of each unfinished run whose records cannot be read; it counts by its row. Without this,
            such a run is an error: a budget must not be kept by half of the figures.

    Raises:
        InputError: a row cannot be read; `karikomi usage --rebuild` makes them again.
    """
    now = now or datetime.now(UTC)
    tenants = [tenant] if tenant else [one.removeprefix("tenant=") for one in store.folders("ledger/")]
    keys = [(one, key) for one in tenants for key in _keys(store, one, month)]
    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(lambda place: _read(store, place[0], place[1], now, unreadable), keys))
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


def _read(
    store: Store, tenant: str, key: str, now: datetime, unreadable: Callable[[InputError], None] | None
) -> dict[str, Any]:
    month = key.split("/")[2].removeprefix("month=")
    try:
        (row,) = pq.read_table(pa.BufferReader(store.get(key)), schema=FILE).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{store.uri}: {key} is no row of the ledger: {error}",
            f"Make the rows again: karikomi usage --rebuild --from {store.uri}",
        ) from error
    if row["state"] in UNFINISHED:
        try:
            run = read_run(store, row["run"])
        except InputError as error:
            if unreadable is None:
                raise
            unreadable(error)
            run = None
        if run is not None:
            return row_of(store, run, now)
    return {"tenant": tenant, "month": month} | row


def _keys(store: Store, tenant: str, month: str | None) -> Iterator[str]:
    prefix = _folder(tenant, month) if month else f"ledger/tenant={tenant}/"
    return (key for key in store.keys(prefix) if key.endswith(".parquet") and key.count("/") == 3)


def _folder(tenant: str, month: str) -> str:
    return f"ledger/tenant={tenant}/month={month}/"
