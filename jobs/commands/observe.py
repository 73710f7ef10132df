"""metrics: what a monitoring system reads."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.console import StoreOption

app = typer.Typer()


@app.command()
def metrics(
    store: StoreOption,
    days: Annotated[
        float, typer.Option(min=0, help="Runs that did anything in so many days are given one by one.")
    ] = 7,
    to: Annotated[
        Path | None, typer.Option(help="Write a file, whole or not at all: for node_exporter's textfile collector.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve /metrics there until stopped, read anew each time.")
    ] = None,
) -> None:
    """Print Prometheus metrics of all runs in a store; needs no cluster.

    Made from the runs' own records, so lost and finished runs are in them too. They show names of tenants, models and
    runs: listen where only your monitoring can reach it. A dashboard for Grafana is in cluster/deploy/grafana.
    """
    from cluster.errors import InputError
    from cluster.storage import open_store
    from jobs.exporting import serve, write_whole
    from jobs.logs import configure
    from jobs.metrics import exposition

    configure("console")
    if to is not None and listen is not None:
        raise InputError("--to and --listen exclude each other", "Give one of them.")
    source = open_store(store)
    if listen is not None:
        serve(source, days, listen)
        return
    text = exposition(source, days)
    if to is None:
        typer.echo(text, nl=False)
    else:
        write_whole(to, text)
