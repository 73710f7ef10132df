"""How runs look: as a table, as lines, as JSON. Live it is `jobs.progress`."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from cluster.storage import Store
from jobs.commands.console import warn
from jobs.explaining import age, progress_words
from jobs.following import View
from jobs.records import Run, list_runs


def row_of(view: View) -> dict[str, Any]:
    """A run as plain values."""
    last = view.last
    progress, ended = last.progress, last.ended
    return {
        "run": view.run.run,
        "tenant": last.started.tenant,
        "name": last.started.name,
        "state": view.state,
        "attempt": last.started.number,
        "cluster": last.started.cluster,
        "by": last.started.by,
        "progress": progress_words(last),
        "stage": progress.stage if progress else 0,
        "stages": progress.stages if progress else 0,
        "step": progress.step if progress else "",
        "done": progress.done if progress else 0,
        "total": progress.total if progress else 0,
        "gate": progress.gate if progress else "",
        "age_seconds": round((view.at - view.run.attempts[0].started.at).total_seconds(), 1),
        "code": ended.code if ended else None,
        "sentence": ended.sentence if ended else "",
        "release": ended.release if ended else "",
        "digest": ended.digest if ended else "",
        "usage": view.run.usage.model_dump(),
    }


def seen_in(store: Store) -> Iterator[View]:
    """All runs by the store alone, the youngest first."""
    now = datetime.now(UTC)

    def youngest_first(run: Run) -> float:
        return -run.last.started.at.timestamp()

    for run in sorted(list_runs(store, warn), key=youngest_first):
        yield View(run, None, now)


def table_of(store: Store) -> Table:
    """All runs of a store."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "tenant", "state", "where", "gate", "age", "release"):
        table.add_column(column, overflow="fold", no_wrap=column in ("run", "state", "age"))
    for view in seen_in(store):
        row = row_of(view)
        where = "" if view.over else row["progress"]
        table.add_row(
            row["run"], row["tenant"], row["state"], where, row["gate"], age(row["age_seconds"]), row["release"]
        )
    return table


def json_of_all(store: Store) -> str:
    """All runs of a store, for programs."""
    return json.dumps([row_of(view) for view in seen_in(store)], indent=1)


def json_of(view: View) -> str:
    """One run with its attempts, for programs."""
    explanation = view.explain()
    row = row_of(view) | {"explanation": explanation.sentence, "hint": explanation.hint}
    attempts = [one.model_dump(mode="json") | {"state": one.state(view.at)} for one in view.run.attempts]
    return json.dumps(row | {"attempts": attempts}, indent=1)


def lines_of(view: View) -> Iterator[str]:
    """One run with its attempts, for a person."""
    row, explanation = row_of(view), view.explain()
    yield f"{row['run']}: {row['state']}"
    yield f"  for {row['tenant']}, asked by {row['by']}, {age(row['age_seconds'])} ago, on {row['cluster']}"
    if row["gate"]:
        yield f"  last gate: {row['gate']}"
    for one in view.run.attempts:
        usage = one.usage
        state = view.state if one is view.run.last else one.state(view.at)
        held = f"{usage.cpu_seconds:.0f} CPU-seconds, {usage.gpu_seconds:.0f} GPU-seconds"
        yield f"  attempt {one.started.number}: {state}, {progress_words(one) or 'not begun'}, held {held}"
    yield f"  {explanation.sentence}"
    if explanation.hint:
        yield f"  {explanation.hint}"
