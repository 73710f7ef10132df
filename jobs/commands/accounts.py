"""tenants, usage: who shares the cluster, and what each used."""

import json
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from cluster.errors import InputError
from jobs.commands.console import StoreOption, out, say, warn

app = typer.Typer()


class By(StrEnum):
    """What runs are summed by."""

    tenant = "tenant"
    model = "model"
    business_unit = "business-unit"
    run = "run"


class Format(StrEnum):
    """How sums are written."""

    table = "table"
    csv = "csv"
    html = "html"


@app.command()
def tenants(
    file: Annotated[
        str | None,
        typer.Option("--tenants", envvar="KARIKOMI_TENANTS", help="The tenants file: a path or an s3:// address."),
    ] = None,
) -> None:
    """Check a tenants file and show it: members, places, quotas, budgets.

    Below stand the custom resources that the cluster's driver nodes must carry, so that Ray holds the quotas.
    """
    from jobs.tenants import load_tenants

    found = load_tenants(file)
    if found is None:
        raise InputError("no tenants file is named", "Give --tenants FILE, or set KARIKOMI_TENANTS.")
    for name, tenant in found.tenants.items():
        kept = tenant.credentials.name if tenant.credentials else "none"
        budget = "none" if tenant.monthly_budget_usd is None else f"${tenant.monthly_budget_usd:,.2f} a month"
        quotas = ", ".join(f"{amount:g} {kind}" for kind, (_, amount) in tenant.quotas(name).items())
        say(f"{name} ({tenant.business_unit or 'no business unit'})")
        say(f"  members: {', '.join(tenant.members)}")
        say(f"  may use: {', '.join(tenant.prefixes)}; publishes to {tenant.store or 'any of these'}")
        say(f"  credentials: {kept}; quotas: {quotas or 'none'}; budget: {budget}; priority {tenant.priority}")
    held = dict(quota for name, tenant in found.tenants.items() for quota in tenant.quotas(name).values())
    say(f"Start the nodes that drivers run on with: --resources='{json.dumps(held)}'")
    say("(one node carries all of them: a driver takes its share from a single node)")


@app.command()
def usage(
    store: StoreOption,
    month: Annotated[str | None, typer.Option(help="YYYY-MM; this month if not given.")] = None,
    by: Annotated[By, typer.Option(help="What runs are summed by.")] = By.tenant,
    form: Annotated[Format, typer.Option("--format", help="How it is written.")] = Format.table,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First make all rows again from the runs' records.")
    ] = False,
) -> None:
    """Sum up what runs used and cost, from the store's ledger: the sums are those of the runs' own records."""
    month = month or f"{datetime.now(UTC):%Y-%m}"
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise InputError(f"--month: {month!r} is no month", "Write YYYY-MM.")
    from cluster.storage import open_store
    from jobs import usage as report
    from jobs.ledger import read_ledger
    from jobs.ledger import rebuild as make_rows_again

    ledger = open_store(store)
    if rebuild:
        make_rows_again(ledger, warn)
    used = report.sums(read_ledger(ledger, month, unreadable=warn), by.value)
    if form is Format.csv:
        typer.echo(report.as_csv(used, by.value, month), nl=False)
    elif form is Format.html:
        typer.echo(report.as_html(used, by.value, month, ledger.uri), nl=False)
    else:
        out.print(report.as_table(used, by.value, month))
