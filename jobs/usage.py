"""What was used and what it costs: the ledger's rows, summed, as a table, CSV or one HTML page."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from rich.table import Table

from jobs.pricing import money

By = Literal["tenant", "model", "business-unit", "run"]
HOUR = 3600
GIB = 1 << 30


@dataclass(frozen=True)
class Used:
    """The sum over some runs.

    Attributes:
        who: what they have in common.
        runs: how many.
        published: how many of them published a release.
        seconds: wall time of all attempts.
        cpu_seconds, gpu_seconds: held on the machines.
        stored_bytes: of what their steps recorded.
        usd: US dollars at the prices of their days.
    """

    who: str
    runs: int
    published: int
    seconds: float
    cpu_seconds: float
    gpu_seconds: float
    stored_bytes: int
    usd: float


HEADS = ("runs", "published", "hours", "CPU hours", "GPU hours", "GiB stored", "price")


def sums(rows: pa.Table, by: By) -> list[Used]:
    """Sums by one property of the runs, the dearest first."""
    groups: dict[str, list[dict[str, object]]] = {}
    for row in rows.to_pylist():
        groups.setdefault(row[by.replace("-", "_")], []).append(row)
    found = [_sum(who, group) for who, group in groups.items()]
    return sorted(found, key=lambda one: (-one.usd, one.who))


def total(used: Sequence[Used]) -> Used:
    """The sum of sums."""
    return Used(
        who="all",
        runs=sum(one.runs for one in used),
        published=sum(one.published for one in used),
        seconds=math.fsum(one.seconds for one in used),
        cpu_seconds=math.fsum(one.cpu_seconds for one in used),
        gpu_seconds=math.fsum(one.gpu_seconds for one in used),
        stored_bytes=sum(one.stored_bytes for one in used),
        usd=math.fsum(one.usd for one in used),
    )


def as_table(used: Sequence[Used], by: By, month: str) -> Table:
    """For the terminal."""
    table = Table(title=f"Usage of {month}", title_justify="left", box=None, pad_edge=False)
    table.add_column(by)
    for head in HEADS:
        table.add_column(head, justify="right")
    for one in (*used, total(used)):
        table.add_row(one.who, *_cells(one))
    return table


def as_csv(used: Sequence[Used], by: By, month: str) -> str:
    """For a spreadsheet: whole seconds and bytes, no total; a cell that a spreadsheet would compute is quoted."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("month", by, "runs", "published", "seconds", "cpu_seconds", "gpu_seconds", "stored_bytes", "usd"))
    for one in used:
        who = f"'{one.who}" if one.who.startswith(("=", "+", "-", "@", "\t", "\r")) else one.who
        numbers = (f"{one.seconds:.3f}", f"{one.cpu_seconds:.3f}", f"{one.gpu_seconds:.3f}", one.stored_bytes)
        writer.writerow((month, who, one.runs, one.published, *numbers, f"{one.usd:.6f}"))
    return buffer.getvalue()


def as_html(used: Sequence[Used], by: By, month: str, store: str) -> str:
    """One page without any outside resource; all names are escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("jobs") / "usage.html.j2").read_text())
    rows = [(one.who, _cells(one)) for one in used]
    return template.render(by=by, month=month, store=store, heads=HEADS, rows=rows, total=_cells(total(used)))


def _sum(who: str, group: list[dict[str, object]]) -> Used:
    def floats(name: str) -> float:
        return math.fsum(float(str(row[name])) for row in group)

    return Used(
        who=who,
        runs=len(group),
        published=sum(bool(row["release"]) for row in group),
        seconds=floats("seconds"),
        cpu_seconds=floats("cpu_seconds"),
        gpu_seconds=floats("gpu_seconds"),
        stored_bytes=sum(int(str(row["stored_bytes"])) for row in group),
        usd=floats("usd"),
    )


def _cells(one: Used) -> tuple[str, ...]:
    return (
        str(one.runs),
        str(one.published),
        f"{one.seconds / HOUR:,.2f}",
        f"{one.cpu_seconds / HOUR:,.2f}",
        f"{one.gpu_seconds / HOUR:,.2f}",
        f"{one.stored_bytes / GIB:,.2f}",
        money(one.usd),
    )
